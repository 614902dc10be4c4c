"""What a move does to the page cache: is what the guest keeps warm still warm on the target?

Memory isn't made scarce. Two figures say what would happen if it were: how much slower the same
reads are afterwards, when another file is the disk, and how much of source and target is cached
beyond what was before.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from bench.live import attached, mirrored
from bench.loads import move
from bench.model import MIB, Scenario, Target, pick
from bench.qmp import mirror
from bench.scenarios import fio, fio_command
from bench.servers import need, run
from mirrord.control.messages import MoveRequest

DISK_BYTES, QUICK_BYTES = 1024 * MIB, 64 * MIB
WARM_BYTES, QUICK_WARM_BYTES = 128 * MIB, 8 * MIB
GIVE_UP_S = 120.0
BEFORE, AFTER = "warm reads before, p99", "warm reads after, p99"
BY, LEFT = "after by before", "cached by the move, MiB"


def _sizes() -> tuple[int, int]:
    return pick((DISK_BYTES, WARM_BYTES), (QUICK_BYTES, QUICK_WARM_BYTES))


def _cool(disk: Path) -> None:
    """Let the page cache forget a file."""
    descriptor = os.open(disk, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _cached_mib(*files: Path) -> float:
    command = (need("fincore"), "--bytes", "--noheadings", "--output", "RES")
    return sum(int(run(*command, file)) for file in files if file.exists()) / MIB


def _p99_us(uri: str) -> float:
    """Read the warm set one request at a time."""
    load = ("--rw=randread", "--bs=4k", "--iodepth=1", f"--size={_sizes()[1]}")
    told = run(*fio_command(uri, *load))
    job = json.loads(told[told.index("{") :])["jobs"][0]
    return float(job["read"]["clat_ns"]["percentile"]["99.000000"]) / 1000


def _told(before_us: float, after_us: float, left_mib: float) -> dict[str, float]:
    return {BEFORE: before_us, AFTER: after_us, BY: after_us / before_us, LEFT: left_mib}


def _warmed_us(uri: str, disk: Path) -> float:
    """Begin with a cold disk, warm the guest's set, and return how long reads of it take."""
    _cool(disk)
    fio(uri, "read", 8, "1m", f"--size={_sizes()[1]}")
    return _p99_us(uri)


def _mirrord(folder: Path) -> dict[str, float]:
    with attached(folder, _sizes()[0]) as (client, socket, target):
        uri, source = f"nbd+unix:///vm?socket={socket}", folder / "vm.raw"
        before_us, before_mib = _warmed_us(uri, source), _cached_mib(source)
        move(client, "vm", MoveRequest(str(target), keep_source=True))
        left_mib = _cached_mib(source, target) - before_mib
        return _told(before_us, _p99_us(uri), left_mib)


def _mirror(folder: Path) -> dict[str, float]:
    size = _sizes()[0]
    with mirrored(folder, size) as (qmp, socket, target):
        uri, source = f"nbd+unix:///disk0?socket={socket}", folder / "vm.raw"
        before_us, before_mib = _warmed_us(uri, source), _cached_mib(source)
        if math.isinf(mirror(qmp, target, size, "background", GIVE_UP_S)):
            raise TimeoutError(f"blockdev-mirror of an idle disk takes more than {GIVE_UP_S:g} s")
        left_mib = _cached_mib(source, target) - before_mib
        return _told(before_us, _p99_us(uri), left_mib)


ALL: dict[str, Scenario] = {
    "cache": Scenario(
        "128 MiB that a guest reads all the time, before and after a move of its disk of 1 GiB",
        "microseconds, MiB, and a share",
        {"mirrord": _mirrord, "blockdev-mirror": _mirror},
        rounds=3,
        less_is_better=("*",),
        targets=(Target(BY, most=1.5),),
        space_mib=4 * 1024,
    ),
}
