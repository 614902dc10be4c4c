"""What a scenario is: rows of figures by peer, and what is wanted of them.

A measurement gets a folder and returns figures by row. The first peer is the one the scenario is
about. Nothing is measured, printed or written here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")

Measure = Callable[[Path], dict[str, float]]
Prepare = Callable[[Path], AbstractContextManager[object]]
Figures = dict[str, dict[str, list[float]]]  # by row and peer, one value a round

QUICK = "MIRRORD_BENCH_QUICK"  # in the environment, so that every process knows
MIRRORD = "mirrord"
MIB = 1 << 20


class MissingPeerError(Exception):
    """A peer can't be measured here. Its text says why."""

    def __init__(self, program: str, why: str = "is not installed") -> None:
        super().__init__(f"{program} {why}")


def pick(full: T, quick: T) -> T:
    """Return `full`, or `quick` when only a smoke test is wanted."""
    return quick if os.environ.get(QUICK) else full


def _nothing(_: Path) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


def _never() -> str | None:
    return None


def _no_notes() -> list[str]:
    return []


@dataclass(frozen=True)
class Target:
    """What is wanted of some rows: a ratio to the best of `peers`, or, without peers, the figure.

    The ratio is the subject's figure by the peer's, whichever is better for the row.
    """

    rows: str  # a pattern, as of file names
    peers: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    subject: str = MIRRORD

    def wanted(self) -> str:
        """Return the limits in words."""
        words = [f"at least {self.least:g}"] if self.least is not None else []
        words += [f"at most {self.most:g}"] if self.most is not None else []
        return ", ".join(words)


@dataclass(frozen=True)
class Outcome:
    """A target, and what came out for one row."""

    row: str
    target: Target
    figure: float
    peer: str | None  # the best of the target's peers that was measured
    peer_figure: float | None
    ratio: float  # the figure itself, when there is no peer
    reached: bool

    def as_json(self) -> dict[str, Any]:
        """Return what is kept of it."""
        return {
            "row": self.row, "subject": self.target.subject, "figure": self.figure,
            "peer": self.peer, "peer_figure": self.peer_figure, "ratio": self.ratio,
            "wanted": self.target.wanted(), "least": self.target.least, "most": self.target.most,
            "reached": self.reached,
        }  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """Rows of figures by peer; `unit` says what they are.

    With `rounds` there are never more, and no warm-up. `prepare` surrounds all rounds; `refuse`
    returns why the scenario can't run on this machine; `notes` returns what is left out of it.
    """

    title: str
    unit: str
    peers: dict[str, Measure]
    in_memory: bool = False  # unless a folder is asked for
    small_pages: bool = False  # of that memory
    rounds: int | None = None
    less_is_better: tuple[str, ...] = ()  # patterns of rows
    targets: tuple[Target, ...] = ()
    space_mib: int = 6 * 1024
    prepare: Prepare = field(default=_nothing)
    refuse: Callable[[], str | None] = field(default=_never)
    notes: Callable[[], list[str]] = field(default=_no_notes)

    def less(self, row: str) -> bool:
        """Tell whether less is better in a row."""
        return any(fnmatchcase(row, pattern) for pattern in self.less_is_better)


def outcomes(scenario: Scenario, figures: Figures) -> list[Outcome]:
    """Return what came of each target. One whose peers are all missing has no outcome."""
    found = []
    for row, by_peer in figures.items():
        for target in scenario.targets:
            if fnmatchcase(row, target.rows) and by_peer.get(target.subject):
                outcome = _outcome(target, row, by_peer, less=scenario.less(row))
                found += [outcome] if outcome else []
    return found


def _outcome(
    target: Target, row: str, by_peer: dict[str, list[float]], *, less: bool
) -> Outcome | None:
    figure = median(by_peer[target.subject])
    peer, peer_figure, ratio = None, None, figure
    if target.peers:
        measured = {name: median(by_peer[name]) for name in target.peers if by_peer.get(name)}
        if not measured:
            return None
        best = min if less else max
        peer = best(measured, key=lambda name: measured[name])
        peer_figure = measured[peer]
        ratio = ratio_of(figure, peer_figure)
    reached = (target.least is None or ratio >= target.least) and (
        target.most is None or ratio <= target.most
    )
    return Outcome(row, target, figure, peer, peer_figure, ratio, reached)


def ratio_of(one: float, other: float) -> float:
    """Return one figure by another; what never ends is infinitely more than what does."""
    if one == other:
        return 1.0
    return one / other if other else float("inf")


def spread(values: Sequence[float]) -> float:
    """Return the range of values, as a share of their median."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle and middle != float("inf") else 0.0
