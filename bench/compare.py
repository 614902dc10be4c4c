"""Compare two results, or two commits that are measured in turn.

A commit is checked out as a temporary worktree, and PYTHONPATH says which one a measurement's
daemon and disk processes come from. The benchmark itself is always the one that runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.model import Figures, Measure, Scenario
from bench.report import number
from bench.runner import NotAResultError, Result, figures_of, read
from bench.verdict import judge

ROOT = Path(__file__).resolve().parents[1]


class NothingToCompareError(Exception):
    """The two have nothing in common, or one of them can't be had."""


def files(before: Path, after: Path) -> str:
    """Return the verdict on each figure that two results share."""
    try:
        old, new = read(before), read(after)
    except NotAResultError as error:
        raise NothingToCompareError(str(error)) from error
    if old["scenario"] != new["scenario"]:
        raise NothingToCompareError(f"{old['scenario']} and {new['scenario']} are no pair")
    first, second = figures_of(old), figures_of(new)
    shared = {
        f"{row}, {peer}": (row, peer)
        for row in first
        for peer in first[row]
        if peer in second.get(row, {})
    }
    pairs = {name: (first[row][peer], second[row][peer]) for name, (row, peer) in shared.items()}
    less = {name for name, (row, _) in shared.items() if row in new["less_is_better"]}
    return verdicts(pairs, less)


def peers(result: Result) -> str:
    """Return the verdict on each row of a result with two peers."""
    figures: Figures = figures_of(result)
    before, after = result["peers"]
    pairs = {
        row: (by_peer[before], by_peer[after])
        for row, by_peer in figures.items()
        if before in by_peer and after in by_peer
    }
    return verdicts(pairs, set(result["less_is_better"]))


def verdicts(pairs: dict[str, tuple[list[float], list[float]]], less: set[str]) -> str:
    """Return a line a pair; the pairs named in `less` are better the smaller they are."""
    if not pairs:
        raise NothingToCompareError("the two have no figure in common")
    width = max(map(len, pairs))
    lines = []
    for name, (before, after) in pairs.items():
        try:
            found = judge(before, after, less_is_better=name in less)
        except ValueError as error:
            lines.append(f"{name:{width}}  {error}")
            continue
        known = f" ({number(found.low)} to {number(found.high)})" if found.low else ""
        lines.append(f"{name:{width}}  {number(found.ratio):>6} of before{known}  {found.word}")
    return "\n".join(lines)


def of_trees(scenario: Scenario, trees: dict[str, Path]) -> Scenario:
    """Return a scenario whose peers are trees, each measured as the scenario's first peer is."""
    measure = next(iter(scenario.peers.values()))
    both = {name: _from(tree, measure) for name, tree in trees.items()}
    return dataclasses.replace(scenario, peers=both, targets=())


def _from(tree: Path, measure: Measure) -> Measure:
    def measured(folder: Path) -> dict[str, float]:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(tree)
        try:
            return measure(folder)
        finally:
            del os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before

    return measured


@contextlib.contextmanager
def worktrees(before: str, after: str) -> Iterator[dict[str, Path]]:
    """Check out two commits side by side; they are gone afterwards.

    Raises:
        NothingToCompareError: There is no such commit, or both are the same.
    """
    names = {commit: _commit(commit) for commit in (before, after)}
    if len(set(names.values())) == 1:
        raise NothingToCompareError(f"{before} and {after} are the same commit")
    with tempfile.TemporaryDirectory(prefix="mb-trees-") as folder:
        trees = {commit: Path(folder, name) for commit, name in names.items()}
        try:
            for commit, tree in trees.items():
                _git("worktree", "add", "--quiet", "--detach", str(tree), names[commit])
            yield trees
        finally:
            for tree in trees.values():
                with contextlib.suppress(NothingToCompareError):
                    _git("worktree", "remove", "--force", str(tree))


def _commit(name: str) -> str:
    return _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()


def _git(*words: str) -> str:
    done = subprocess.run(("git", "-C", ROOT, *words), capture_output=True, text=True, check=False)
    if done.returncode:
        raise NothingToCompareError(f"git {words[0]} failed for {words[-1]}: {done.stderr.strip()}")
    return done.stdout
