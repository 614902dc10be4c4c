"""README's section: the same results give the same text, whatever was there before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import readme, runner
from tests.bench.results import scenario

TEXT = "before\n<!-- performance: by us -->\nold\n<!-- end of performance -->\nafter\n"


@pytest.fixture
def result(tmp_path: Path) -> runner.Result:
    return {**runner.measure("made-up", scenario(), tmp_path, 3), "busy": False}


def test_the_section_has_the_strictest_target_of_each_row(result: runner.Result) -> None:
    lines = readme.section([result]).splitlines()
    assert lines[2] == "| made-up: speed | 300.0 | 100.0, other | 3.00 | at least 1.5 | yes |"
    assert lines[3] == "| made-up: wait | 2.00 |  |  | at most 1 | no |"
    assert any(line.startswith("Measured on ") for line in lines)


def test_writing_it_again_or_in_another_order_changes_nothing(result: runner.Result) -> None:
    other = {**result, "scenario": "another"}
    once = readme.with_section(TEXT, [result, other])
    assert once == readme.with_section(once, [other, result])
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once


@pytest.mark.parametrize("change", [{"quick": True}, {"targets": []}])
def test_what_proves_nothing_is_not_shown(result: runner.Result, change: dict[str, Any]) -> None:
    assert readme.section([{**result, **change}]) == readme.NOTHING


def test_what_is_no_result_is_named_and_left_out(
    tmp_path: Path,
    result: runner.Result,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, kept = tmp_path / "README.md", tmp_path / "results"
    text.write_text(TEXT)
    monkeypatch.setattr(readme, "README", text)
    kept.mkdir()
    (kept / "made-up.json").write_text(json.dumps(result))
    (kept / "old.json").write_text('{"figures": {}}')
    readme.write(kept)
    assert text.read_text() == readme.with_section(TEXT, [result])
    assert "old.json is not a result of this program" in capsys.readouterr().err


def test_a_busy_machine_is_named(result: runner.Result) -> None:
    assert "only the ratios count: made-up" in readme.section([{**result, "busy": True}])


def test_the_readme_has_its_marks_and_a_text_without_is_refused() -> None:
    assert readme.BLOCK.search(readme.README.read_text())
    with pytest.raises(ValueError, match="marks"):
        readme.with_section("no marks", [])
