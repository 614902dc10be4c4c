"""What mirrord costs where little happens: huge empty disks, idle disks, questions.

There is no peer here: what is wanted are figures.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from bench import processes
from bench.loads import loaded
from bench.model import MIB, Scenario, Target, pick
from bench.places import file_system, why_no_file_system
from bench.scenarios import make_disk
from bench.servers import MIRRORD, attach, mirrord, run
from mirrord.control.client import Client
from mirrord.control.messages import MoveRequest

SPARSE_BYTES, QUICK_SPARSE_BYTES = 16 << 40, 64 << 30
DATA_BYTES, QUICK_DATA_BYTES = 1024 * MIB, 16 * MIB
XFS_MIB, QUICK_XFS_MIB = 8 * 1024, 512

IDLE_DISKS, QUICK_IDLE_DISKS = 16, 2
SETTLE_S, QUICK_SETTLE_S = 5.0, 0.2
IDLE_S, QUICK_IDLE_S = 10.0, 0.5

BUSY_DISKS, QUICK_BUSY_DISKS = 8, 2
BUSY_RATE = 1000
BUSY_LIMIT = MIB
ASKED, QUICK_ASKED = 10, 2


# A huge disk with little on it.


@contextlib.contextmanager
def _xfs(folder: Path) -> Iterator[None]:
    """The only common file system that has a file of 16 TiB on any device."""
    with file_system(folder, "xfs", pick(XFS_MIB, QUICK_XFS_MIB)):
        yield


def _no_xfs() -> str | None:
    return why_no_file_system("xfs")


def _scattered(disk: Path, size: int, data: int) -> None:
    """Make a disk whose data is spread evenly, a MiB at a time."""
    pieces = data // MIB
    with disk.open("wb") as file:
        for number in range(pieces):
            file.seek(size // pieces * number)
            file.write(os.urandom(MIB))
        file.truncate(size)
        os.fsync(file.fileno())


def _scan_s(disk: Path) -> float:
    """Return how long it takes to find the data of a file."""
    began = time.monotonic()
    with disk.open("rb") as file, contextlib.suppress(OSError):
        at = 0
        while True:  # until there is no more data: ENXIO
            at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            at = os.lseek(file.fileno(), at, os.SEEK_HOLE)
    return time.monotonic() - began


def _timed_move(folder: Path, disk: Path) -> tuple[float, float, float]:
    """Return the seconds of attach and move, and the peak memory of the disk process."""
    target = disk.with_name("moved.raw")
    os.sync()
    with mirrord(folder) as control:
        began = time.monotonic()
        run(*MIRRORD, "attach", "vm", disk, MIRRORD_SOCKET=str(control))
        attached = time.monotonic()
        run(*MIRRORD, "move", "vm", target, "--verify", "none", "--keep-source",
            MIRRORD_SOCKET=str(control))  # fmt: skip
        moved = time.monotonic()
        (pid,) = processes.disk_processes(folder)
        peak_mib = processes.peak_rss_mib(pid)
    target.unlink()
    return attached - began, moved - attached, peak_mib


def _sparse(folder: Path) -> dict[str, float]:
    place = folder / "xfs"
    size, data = pick(SPARSE_BYTES, QUICK_SPARSE_BYTES), pick(DATA_BYTES, QUICK_DATA_BYTES)
    sparse, dense = place / "sparse.raw", make_disk(place, data, 1.0, "dense")
    if not sparse.exists():
        _scattered(sparse, size, data)
    _, dense_s, _ = _timed_move(folder, dense)
    scan_s = _scan_s(sparse)
    attach_s, move_s, peak_mib = _timed_move(folder, sparse)
    return {
        "attach, seconds": attach_s,
        "move, seconds": move_s,
        "move of its data alone, seconds": dense_s,
        "scan, seconds": scan_s,
        "move by those two": move_s / (dense_s + scan_s),
        "peak memory, MiB": peak_mib,
    }


# Disks that nobody uses.


def _idle(folder: Path) -> dict[str, float]:
    count = pick(IDLE_DISKS, QUICK_IDLE_DISKS)
    with mirrord(folder) as control:
        for number in range(count):
            disk = folder / f"idle{number}.raw"
            with disk.open("wb") as file:
                file.truncate(DATA_BYTES)
            attach(control, f"idle{number}", disk)
        pids = processes.disk_processes(folder)
        assert len(pids) == count
        time.sleep(pick(SETTLE_S, QUICK_SETTLE_S))
        before, began = sum(map(processes.voluntary_switches, pids)), time.monotonic()
        used_s = processes.all_processor_s(pids)
        time.sleep(pick(IDLE_S, QUICK_IDLE_S))
        taken_s = time.monotonic() - began
        switches = sum(map(processes.voluntary_switches, pids)) - before
        used_s = processes.all_processor_s(pids) - used_s
        memory_mib = [processes.pss_mib(pid) for pid in pids]
    return {
        "memory of a disk (Pss), MiB": sum(memory_mib) / count,
        "memory of the largest, MiB": max(memory_mib),
        "wake-ups of a disk, a second": switches / count / taken_s,
        "processors, of a hundred disks": 100 * used_s / count / taken_s,
    }


# Questions.


def _asked_ms(control: Path, *words: str) -> float:
    """Return what a command takes, the start of its interpreter included."""
    times = []
    for _ in range(pick(ASKED, QUICK_ASKED)):
        began = time.monotonic()
        run(*MIRRORD, *words, MIRRORD_SOCKET=str(control))
        times.append(1000 * (time.monotonic() - began))
    return median(times)


def _cli(folder: Path) -> dict[str, float]:
    """Ask while disks are moved slowly, each keeping its daemon informed, and one has a guest."""
    with mirrord(folder) as control:
        client = Client(control)
        count = pick(BUSY_DISKS, QUICK_BUSY_DISKS)
        for number in range(count):
            disk = make_disk(folder, 64 * MIB, 1.0, f"busy{number}")
            socket = attach(control, f"busy{number}", disk)
            target = folder / f"moved{number}.raw"
            request = MoveRequest(str(target), keep_source=True, limit=BUSY_LIMIT)
            client.move(f"busy{number}", request)
        with loaded(socket, f"busy{count - 1}", "--rate", str(BUSY_RATE)):
            figures = {
                "mirrord ls": _asked_ms(control, "ls"),
                "mirrord jobs": _asked_ms(control, "jobs"),
            }
        for job in (job for job in client.jobs() if not job.ended_already):
            client.steer(job.id, "cancel")
        client.close()
    return figures


ALL: dict[str, Scenario] = {
    "sparse": Scenario(
        "a disk of 16 TiB with 1 GiB of data on it, xfs",
        "seconds, MiB, and shares",
        {"mirrord": _sparse},
        rounds=3,
        less_is_better=("*",),
        targets=(
            Target("attach, seconds", most=1.0),
            Target("move by those two", most=1.5),
            Target("peak memory, MiB", most=150),
        ),
        space_mib=9 * 1024,
        prepare=_xfs,
        refuse=_no_xfs,
    ),
    "idle": Scenario(
        f"{IDLE_DISKS} disks that nobody uses",
        "MiB, and times a second",
        {"mirrord": _idle},
        rounds=3,
        less_is_better=("*",),
        targets=(Target("memory of the largest, MiB", most=40),),
        space_mib=64,
    ),
    "cli": Scenario(
        "questions to a daemon whose disks are moved, the start of the command included",
        "milliseconds",
        {"mirrord": _cli},
        less_is_better=("*",),
        targets=(Target("*", most=300),),
        space_mib=2 * 1024,
    ),
}
