"""Results as the runner makes them, from a scenario whose figures are made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.model import Measure, MissingPeerError, Scenario, Target


def fixed(*rows: dict[str, float]) -> Measure:
    """Return a measurement that has these figures, one set a round, again and again."""
    calls = iter(rows * 100)
    return lambda _: next(calls)


def missing(program: str) -> Callable[[Path], dict[str, float]]:
    """Return the measurement of a peer that isn't installed."""

    def measure(_: Path) -> dict[str, float]:
        raise MissingPeerError(program)

    return measure


def scenario(**changes: Any) -> Scenario:
    """Return a scenario with one peer that is there, and one that isn't."""
    peers: dict[str, Measure] = {
        "mirrord": fixed({"speed": 300.0, "wait": 2.0}),
        "other": fixed({"speed": 100.0, "wait": math.inf}),
        "absent": missing("absent-program"),
    }
    asked: dict[str, Any] = {
        "peers": peers,
        "less_is_better": ("wait",),
        "targets": (
            Target("speed", ("other", "absent"), least=1.5),
            Target("speed", ("absent",), least=1.0),
            Target("wait", most=1.0),
        ),
    }
    return Scenario("made up", "units", **{**asked, **changes})
