"""A run as a whole: one scenario's failure is its own, and a smoke test replaces nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as program
from bench.model import MIRRORD
from tests.bench.results import fixed, scenario


def fails(_: Path) -> dict[str, float]:
    raise RuntimeError("made to fail")


def test_a_scenario_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(program.ALL, "bad", scenario(peers={MIRRORD: fails}, space_mib=0))
    monkeypatch.setitem(program.ALL, "good", scenario(space_mib=0))
    results = tmp_path / "results"
    asked = ["bad", "good", "--folder", str(tmp_path), "--results", str(results)]
    assert program.main(asked) == 1
    told = capsys.readouterr()
    assert "made to fail" in told.err
    assert told.err.endswith("failed: bad\n")
    assert "good: made up" in told.out
    assert {path.stem for path in results.iterdir()} == {"good"}


def test_a_smoke_test_does_not_replace_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    monkeypatch.setitem(
        program.ALL, "x", scenario(peers={MIRRORD: fixed({"speed": 1.0})}, space_mib=0)
    )
    for words in ([], ["--quick"]):
        assert program.main(["x", "--folder", str(tmp_path), *words]) == 0
    kept = json.loads((tmp_path / "x.json").read_text())
    assert not kept["quick"]
    assert json.loads((tmp_path / "quick" / "x.json").read_text())["quick"]
