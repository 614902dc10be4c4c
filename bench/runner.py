"""Run a scenario: every peer in turn, several rounds after a warm-up; returns what is kept.

In turn, so that whatever else the machine does meets all peers alike.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import machine
from bench.model import Figures, MissingPeerError, Scenario, outcomes, pick

WIDE_SPREAD = 0.3  # of the median, from least to most: above it the figure is said to be uncertain
QUICK_MIB = 2560  # room for any scenario's tiny sizes; most of it stays a hole

Result = dict[str, Any]
KEYS = {"scenario", "quick", "figures", "less_is_better", "targets", "machine", "versions", "busy"}


def measure(name: str, scenario: Scenario, folder: Path, rounds: int) -> Result:
    """Measure every peer in every round; return the result, all of it JSON.

    A peer that can't be measured here is named in `missing`, with the reason.
    """
    figures: Figures = {}
    missing: dict[str, str] = {}
    load, began = os.getloadavg()[0], time.monotonic()
    rounds = min(rounds, scenario.rounds or rounds)
    warm_ups = 0 if scenario.rounds is not None or pick(False, True) else 1
    with scenario.prepare(folder):
        for number in range(1 - warm_ups, rounds + 1):
            for peer in scenario.peers:
                if peer not in missing:
                    _one(figures, missing, scenario, peer, folder, counted=number > 0)
        where = _file_system_of(folder)
    peers = [peer for peer in scenario.peers if peer not in missing]
    return {
        "scenario": name,
        "title": scenario.title,
        "unit": scenario.unit,
        "rounds": rounds,
        "quick": pick(False, True),
        "peers": list(scenario.peers),
        "missing": missing,
        "figures": {row: _plain(by_peer) for row, by_peer in figures.items()},
        "less_is_better": [row for row in figures if scenario.less(row)],
        "targets": [_finite(outcome.as_json()) for outcome in outcomes(scenario, figures)],
        "notes": scenario.notes(),
        "machine": machine.describe(),
        "versions": {peer: told for peer in peers if (told := machine.version(peer))},
        "commit": _commit(),
        "load": load,
        "took_s": round(time.monotonic() - began, 1),
        "busy": machine.is_busy(load),
        "on": where,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class NotAResultError(Exception):
    """A file isn't a result, or an older program's."""


def read(path: Path) -> Result:
    """Return a result that was kept.

    Raises:
        NotAResultError: It is none, or has not all that one has now.
    """
    try:
        result: Result = json.loads(path.read_text())
        lacks = KEYS - set(result)
    except (OSError, ValueError, TypeError) as error:
        raise NotAResultError(f"{path} is not a result: {error}") from error
    if lacks:
        raise NotAResultError(f"{path} is not a result of this program: no {min(lacks)!r}")
    return result


def figures_of(result: Result) -> Figures:
    """Return a result's figures as they were measured: what never ended is infinite."""
    return {
        row: {
            peer: [math.inf if value is None else value for value in values]
            for peer, values in by_peer.items()
        }
        for row, by_peer in result["figures"].items()
    }


def _one(
    figures: Figures,
    missing: dict[str, str],
    scenario: Scenario,
    peer: str,
    folder: Path,
    *,
    counted: bool,
) -> None:
    try:
        measured = scenario.peers[peer](folder)
    except MissingPeerError as error:
        missing[peer] = str(error)
        print(f"{peer} is left out: {error}", file=sys.stderr)
        return
    for row, figure in measured.items() if counted else ():
        figures.setdefault(row, {}).setdefault(peer, []).append(figure)


def _plain(by_peer: dict[str, list[float]]) -> dict[str, list[float | None]]:
    return {
        peer: [value if math.isfinite(value) else None for value in values]
        for peer, values in by_peer.items()
    }


def _finite(outcome: Result) -> Result:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in outcome.items()
    }


def _file_system_of(folder: Path) -> str:
    command = ("stat", "--file-system", "--format=%T", folder)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _commit() -> str | None:
    command = ("git", "-C", Path(__file__).parent, "describe", "--always", "--dirty")
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return told.stdout.strip() or None
