"""One disk, or several, over NBD, as fio sees them; and what all scenarios share."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bench import processes
from bench.model import MIB, Measure, Scenario, Target, pick
from bench.servers import (
    Served,
    need,
    run,
    served_by_mirrord,
    served_by_nbdkit,
    served_by_qemu,
)

DISK_BYTES = 512 * MIB  # fits any page cache: what is measured is the server
SMALL_BYTES = 16 * MIB  # of a smoke test
FIO_S, QUICK_FIO_S = 1.5, 0.1
MANY = 4

Serve = Callable[..., AbstractContextManager[Served]]

QSD, NBDKIT = "qemu-storage-daemon", "nbdkit file"
POINTS = (
    ("randread", "4k", 1),
    ("randread", "4k", 32),
    ("randwrite", "4k", 1),
    ("randwrite", "4k", 32),
    ("read", "1m", 8),
    ("write", "1m", 8),
)
QUICK_POINTS = POINTS[2:5:2]


def make_disk(folder: Path, size: int, data: float, name: str = "disk") -> Path:
    """Make a disk once: random data, then a hole. Its pages are warm."""
    disk = folder / f"{name}-{size >> 20}.raw"
    if not disk.exists():
        with disk.open("wb") as file:
            for _ in range(int(size * data) // MIB):
                file.write(os.urandom(MIB))
            file.truncate(size)
        os.sync()
    return disk


def fio_command(uri: str, *options: str) -> list[str]:
    """Return the command of one load; its size is the disk's."""
    size = pick(DISK_BYTES, SMALL_BYTES)
    runtime_ms = int(1000 * pick(FIO_S, QUICK_FIO_S))
    command = [need("fio"), "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--size={size}"]
    command += ["--time_based", f"--runtime={runtime_ms}ms", "--output-format=json"]
    return [*command, "--group_reporting", *options]


def _requests(told: str) -> float:
    job: dict[str, Any] = json.loads(told[told.index("{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


def fio(uri: str, rw: str, depth: int, block: str, *options: str) -> float:
    """Return the requests a second of a load that fio makes."""
    load = (f"--rw={rw}", f"--bs={block}", f"--iodepth={depth}", *options)
    return _requests(run(*fio_command(uri, *load)))


def fio_at_once(uris: Iterable[str], *options: str) -> float:
    """Return the requests a second of loads that run at the same time, all together."""
    loads: list[subprocess.Popen[str]] = []
    try:
        for uri in uris:
            command = fio_command(uri, *options)
            loads.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        total = sum(_requests(load.communicate()[0]) for load in loads)
    finally:
        for load in loads:
            load.kill()
            load.wait()
    return total


def _disks(folder: Path, count: int) -> list[Path]:
    size = pick(DISK_BYTES, SMALL_BYTES)
    return [make_disk(folder, size, 1.0, f"disk{number}") for number in range(count)]


def _points(serve: Serve, *, direct: bool = False) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        with serve(folder, _disks(folder, 1), direct=direct) as served:
            return {
                f"{rw} {block}, depth {depth}": fio(served.uris[0], rw, depth, block)
                for rw, block, depth in pick(POINTS, QUICK_POINTS)
            }

    return measure


def _mixed(serve: Serve) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        load = ("--rw=randrw", "--rwmixread=70", "--bsrange=4k-64k", "--iodepth=16", "--fsync=64")
        with serve(folder, _disks(folder, 1)) as served:
            return {"70 % reads, 4-64 KiB, depth 16": _requests(_told(served, load))}

    return measure


def _told(served: Served, load: Sequence[str]) -> str:
    return run(*fio_command(served.uris[0], *load))


def _many(serve: Serve) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        figures: dict[str, float] = {}
        disks = _disks(folder, MANY)
        for word in pick(("randread", "randwrite"), ("randwrite",)):
            load = (f"--rw={word}", "--bs=4k", "--iodepth=16")
            with serve(folder, disks[:1]) as served:
                row = f"{word}, {MANY} connections"
                _with_processors(figures, served, row, served.uris * MANY, load)
            with serve(folder, disks) as served:
                row = f"{word}, {MANY} disks"
                _with_processors(figures, served, row, served.uris, load)
        return figures

    return measure


def _with_processors(
    figures: dict[str, float], served: Served, row: str, uris: list[str], load: Sequence[str]
) -> None:
    used_s, began = processes.all_processor_s(served.pids), time.monotonic()
    figures[row] = fio_at_once(uris, *load)
    used_s = processes.all_processor_s(served.pids) - used_s
    figures[f"{row}: processors"] = used_s / (time.monotonic() - began)


ALL: dict[str, Scenario] = {
    "nbd": Scenario(
        "one disk over NBD on a unix socket, warm",
        "requests a second",
        {
            "mirrord": _points(served_by_mirrord),
            QSD: _points(served_by_qemu),
            NBDKIT: _points(served_by_nbdkit),
        },
        targets=(Target("*", (QSD,), least=1.5), Target("*", (NBDKIT,), least=1.0)),
        space_mib=1024,
    ),
    "nbd-direct": Scenario(
        "one disk over NBD on a unix socket, past the page cache",
        "requests a second",
        {
            "mirrord": _points(served_by_mirrord, direct=True),
            QSD: _points(served_by_qemu, direct=True),
        },
        targets=(Target("*", (QSD,), least=1.0),),
        space_mib=1024,
    ),
    "nbd-mixed": Scenario(
        "reads and writes of many sizes, and a flush after every 64 writes",
        "requests a second",
        {
            "mirrord": _mixed(served_by_mirrord),
            QSD: _mixed(served_by_qemu),
            NBDKIT: _mixed(served_by_nbdkit),
        },
        targets=(Target("*", (QSD,), least=1.2),),
        space_mib=1024,
    ),
    "nbd-many": Scenario(
        "four connections to one disk; four disks at once; 4 KiB at depth 16 each, warm",
        "requests a second, and processors that the server uses meanwhile",
        {
            "mirrord": _many(served_by_mirrord),
            QSD: _many(served_by_qemu),
            NBDKIT: _many(served_by_nbdkit),
        },
        less_is_better=("*: processors",),
        targets=(
            Target("* connections", (QSD,), least=1.5),
            Target("* disks", (QSD,), least=1.5),
        ),
        space_mib=3 * 1024,
    ),
}
