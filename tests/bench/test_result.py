"""What a result keeps and a table shows: missing peers, what never ends, targets, doubts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench import plots, runner
from bench.model import Target
from bench.report import table
from tests.bench.results import fixed, scenario

BARS_SHARE = 0.01  # of a picture, at least


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def measured(folder: Path, **changes: object) -> runner.Result:
    return runner.measure("made-up", scenario(**changes), folder, 3)


def test_a_missing_peer_is_named_and_its_column_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = table(measured(tmp_path)).splitlines()
    assert "absent-program is not installed" in capsys.readouterr().err
    assert "without absent: absent-program is not installed" in lines
    head = next(line for line in lines if "/ other" in line)
    speed = next(line for line in lines if line.startswith("speed"))
    assert "absent" in head
    assert speed.split() == ["speed", "300.0", "(300.0-300.0)", "100.0", "(100.0-100.0)", "3.00"]


def test_a_table_that_is_too_wide_has_its_ratios_below(tmp_path: Path) -> None:
    peers = {"mirrord": fixed({"speed": 300.0})}
    peers |= {f"a peer with a long name {n}": fixed({"speed": 100.0}) for n in range(6)}
    lines = table(measured(tmp_path, peers=peers, targets=())).splitlines()
    rows = [line.split() for line in lines if line.startswith("speed")]
    assert len(rows) == 2
    assert rows[1] == ["speed", *["3.00"] * 6]


def test_what_never_ended_is_said_and_survives_json(tmp_path: Path) -> None:
    result = measured(tmp_path)
    again = json.loads(json.dumps(result, allow_nan=False))
    assert again == result
    assert "never" in table(again)


def test_a_target_is_reached_missed_or_without_a_peer(tmp_path: Path) -> None:
    lines = table(measured(tmp_path)).splitlines()
    said = [line for line in lines if line.startswith(("reached", "missed"))]
    assert said == [
        "reached: speed, mirrord: 3.00 of other, wanted at least 1.5",
        "missed: wait, mirrord: 2.00, wanted at most 1",
    ]


def test_the_best_peer_is_the_one_that_counts(tmp_path: Path) -> None:
    peers = {"mirrord": fixed({"wait": 2.0}), "a": fixed({"wait": 4.0}), "b": fixed({"wait": 3.0})}
    targets = (Target("wait", ("a", "b"), most=0.5),)
    result = measured(tmp_path, peers=peers, targets=targets)
    (outcome,) = result["targets"]
    assert (outcome["peer"], outcome["reached"]) == ("b", False)


@pytest.mark.parametrize(("fixed_rounds", "counted"), [(None, [1.0, 2.0, 3.0]), (1, [9.0])])
def test_the_first_round_warms_up_unless_rounds_are_fixed(
    tmp_path: Path, fixed_rounds: int | None, counted: list[float]
) -> None:
    peers = {"mirrord": fixed({"x": 9.0}, {"x": 1.0}, {"x": 2.0}, {"x": 3.0})}
    result = measured(tmp_path, peers=peers, rounds=fixed_rounds)
    assert result["figures"]["x"]["mirrord"] == counted


def test_doubts_are_said_beside_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    told = table(measured(tmp_path, peers={"mirrord": fixed({"x": 1.0}, {"x": 2.0})}))
    assert "~" in next(line for line in told.splitlines() if line.startswith("x "))
    assert "the machine was busy" in told


def test_a_result_is_drawn(tmp_path: Path) -> None:
    if not plots.can_draw():
        pytest.skip("needs matplotlib")
    from matplotlib import image

    plots.draw(measured(tmp_path), tmp_path / "x.png")
    drawn = image.imread(tmp_path / "x.png")
    blue = (drawn[..., 2] > 0.6) & (drawn[..., 0] < 0.3)
    assert blue.mean() > BARS_SHARE, "no bars"
