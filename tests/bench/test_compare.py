"""Two results, and two trees in turn."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from bench import compare, runner
from bench.__main__ import main
from tests.bench.results import fixed, scenario


def kept(path: Path, *figures: float) -> Path:
    peers = {"mirrord": fixed(*({"speed": figure, "wait": figure} for figure in figures))}
    result = runner.measure("x", scenario(peers=peers, rounds=len(figures)), path.parent, 5)
    path.write_text(json.dumps(result))
    return path


def test_two_files_are_judged_row_by_row(tmp_path: Path) -> None:
    before = kept(tmp_path / "a.json", 10, 11, 10, 11)
    after = kept(tmp_path / "b.json", 20, 21, 20, 21)
    speed, wait = compare.files(before, after).splitlines()
    assert speed.startswith("speed, mirrord")
    assert speed.endswith("  faster")
    assert wait.endswith("  slower")


def test_an_older_program_s_result_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text('{"figures": {}, "unit": "x"}')
    with pytest.raises(compare.NothingToCompareError, match="not a result of this program"):
        compare.files(old, old)


def test_no_result_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "not a result" in capsys.readouterr().err


def test_each_tree_is_measured_with_its_own_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "mine")
    seen: list[str] = []

    def measure(_: Path) -> dict[str, float]:
        seen.append(os.environ["PYTHONPATH"])
        return {"speed": float(len(seen))}

    trees = {"old": Path("/old"), "new": Path("/new")}
    both = compare.of_trees(scenario(peers={"mirrord": measure}, rounds=2), trees)
    result = runner.measure("x", both, tmp_path, 2)
    assert seen == ["/old", "/new"] * 2
    assert os.environ["PYTHONPATH"] == "mine"
    assert compare.peers(result).endswith("too few rounds")


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_worktrees_have_their_commit_and_are_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    for text in ("one", "two"):
        (tmp_path / "file").write_text(text)
        git(tmp_path, "add", "file")
        git(tmp_path, "commit", "--quiet", "--message", text)
    with compare.worktrees("HEAD~1", "HEAD") as trees:
        assert [(tree / "file").read_text() for tree in trees.values()] == ["one", "two"]
    assert not any(tree.exists() for tree in trees.values())
    assert len(git(tmp_path, "worktree", "list").splitlines()) == 1
    with pytest.raises(compare.NothingToCompareError, match="same commit"):
        compare.worktrees("HEAD", "HEAD").__enter__()
    with pytest.raises(compare.NothingToCompareError):
        compare.worktrees("HEAD", "no-such").__enter__()
