"""Run scenarios: every server or tool in turn, several rounds after a warm-up, medians and ratios.

    python -m bench                 all scenarios
    python -m bench nbd --rounds 7  one of them

Results are printed as a table and kept in `bench/results/SCENARIO.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from bench import scenarios, smb
from bench.servers import MissingPeerError, run

ALL = {**scenarios.ALL, **smb.ALL}
RESULTS = Path(__file__).parent / "results"
BUSY_LOAD = 0.5  # of the cores: above it the figures are said to be from a busy machine


def main() -> int:
    """Run what was asked for; exit 2 for an unknown scenario or too little space."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the disks lie (default: /tmp; of smb-*: memory)"
    )
    asked = parser.parse_args()
    unknown = [name for name in asked.scenario if name not in ALL]
    if unknown:
        parser.error(f"no scenario {unknown[0]!r}; there are {', '.join(ALL)}")
    for name in asked.scenario or ALL:
        with _folder(asked.folder, in_memory=ALL[name].in_memory) as folder:
            space = os.statvfs(folder)
            if space.f_bavail * space.f_frsize < scenarios.SPACE_BYTES:
                need = scenarios.SPACE_BYTES >> 30
                print(f"{folder} has less than the {need} GiB that are needed", file=sys.stderr)
                return 2
            report(name, ALL[name], folder, ALL[name].rounds or asked.rounds)
    return 0


@contextlib.contextmanager
def _folder(asked: Path | None, *, in_memory: bool) -> Iterator[Path]:
    """A folder that is gone afterwards, in memory if that is wanted and root says so.

    Of huge pages: in small ones a tmpfs takes 30 ms a GiB to find the next hole, which no file
    system of a real server does.
    """
    with tempfile.TemporaryDirectory(prefix="mb-", dir=asked) as folder:
        mount = ("mount", "-t", "tmpfs", "-o", "huge=always,mode=755", "none", folder)
        mounted = in_memory and asked is None and os.geteuid() == 0
        mounted = mounted and subprocess.run(mount, check=False).returncode == 0
        try:
            yield Path(folder)
        finally:
            if mounted:
                subprocess.run(("umount", "--lazy", folder), check=True)


def report(name: str, scenario: scenarios.Scenario, folder: Path, rounds: int) -> None:
    """Measure, print and keep."""
    figures: dict[str, dict[str, list[float]]] = {}
    missing: set[str] = set()
    before = os.getloadavg()[0]
    warm_ups = 1 if scenario.rounds is None else 0
    for number in range(1 - warm_ups, rounds + 1):
        for peer, measure in scenario.peers.items():
            if peer not in missing:
                _one(figures, missing, peer, measure, folder, counted=number > 0)
    print(f"\n{name}: {scenario.title} ({scenario.unit}; median of {rounds}, and least to most)")
    _table(figures, missing, scenario)
    busy = before > BUSY_LOAD * (os.cpu_count() or 1)
    where = run("stat", "--file-system", "--format=%T", folder).strip()
    print(
        f"{platform.release()}, Python {platform.python_version()}, disks on {where}, "
        f"load {before:.2f} before"
    )
    if busy:
        print("the machine was busy: read the ratios, not the figures")
    RESULTS.mkdir(exist_ok=True)
    kept = {
        "figures": figures, "unit": scenario.unit, "load": before, "rounds": rounds, "on": where
    }  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1))


def _one(
    figures: dict[str, dict[str, list[float]]],
    missing: set[str],
    peer: str,
    measure: Callable[[Path], dict[str, float]],
    folder: Path,
    *,
    counted: bool,
) -> None:
    try:
        measured = measure(folder)
    except MissingPeerError as error:
        missing.add(peer)
        print(f"{peer} is left out: {error} is not installed", file=sys.stderr)
        return
    for row, figure in measured.items() if counted else ():
        figures.setdefault(row, {}).setdefault(peer, []).append(figure)


def _table(
    figures: dict[str, dict[str, list[float]]], missing: set[str], scenario: scenarios.Scenario
) -> None:
    peers = [peer for peer in scenario.peers if peer not in missing]
    first = peers[0]
    print(f"{'':28}" + "".join(f"{peer:>30}" for peer in peers))
    for row, by_peer in figures.items():
        line = f"{row:28}"
        for peer in peers:
            values = by_peer[peer]
            line += f"{median(values):14,.1f} ({min(values):,.1f}-{max(values):,.1f})".rjust(30)
        ratios = [
            f"{median(by_peer[first]) / median(by_peer[peer]):.2f} of {peer}" for peer in peers[1:]
        ]
        print(line + "   " + ", ".join(ratios))


if __name__ == "__main__":
    sys.exit(main())
