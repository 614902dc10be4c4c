"""What is measured. A measurement returns figures by row; the first peer is mirrord."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench.servers import (
    MIRRORD,
    attach,
    mirrord,
    need,
    run,
    served_by_mirrord,
    served_by_nbdkit,
    served_by_qemu,
)

MIB = 1 << 20
DISK_BYTES = 512 * MIB  # fits any page cache: what is measured is the server
MOVED_BYTES = 1024 * MIB
MOVED_DATA = 0.6
FIO_S = 2
SPACE_BYTES = 6 * 1024 * MIB

Measure = Callable[[Path], dict[str, float]]
Serve = Callable[[Path, Path], AbstractContextManager[str]]


@dataclass(frozen=True)
class Scenario:
    """Rows of figures by peer; `unit` says what they are."""

    title: str
    unit: str
    peers: dict[str, Measure]
    in_memory: bool = False  # unless a folder is asked for
    rounds: int | None = None  # without a warm-up; else as many as are asked for, after one


def make_disk(folder: Path, size: int, data: float) -> Path:
    """Make a disk once: random data, then a hole. Its pages are warm."""
    disk = folder / f"disk-{size >> 20}.raw"
    if not disk.exists():
        with disk.open("wb") as file:
            for _ in range(int(size * data) // MIB):
                file.write(os.urandom(MIB))
            file.truncate(size)
        os.sync()
    return disk


def fio(uri: str, rw: str, depth: int, block: str) -> float:
    """Return the requests a second of a load that fio makes."""
    command = [need("fio"), "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}"]
    command += [f"--bs={block}", f"--iodepth={depth}", f"--size={DISK_BYTES}", "--time_based"]
    command += [f"--runtime={FIO_S}", "--output-format=json"]
    told = run(*command)
    job = json.loads(told[told.index("{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


def _nbd(serve: Serve) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        disk = make_disk(folder, DISK_BYTES, 1.0)
        with serve(folder, disk) as uri:
            return {
                f"{rw} {block}, depth {depth}": fio(uri, rw, depth, block)
                for rw, block, depth in (
                    ("randread", "4k", 1),
                    ("randread", "4k", 32),
                    ("randwrite", "4k", 1),
                    ("randwrite", "4k", 32),
                    ("read", "1m", 8),
                    ("write", "1m", 8),
                )
            }

    return measure


def _timed(work: Callable[[], object]) -> float:
    os.sync()
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _moved(verify: str) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        disk, copy = make_disk(folder, MOVED_BYTES, MOVED_DATA), folder / "vm.raw"
        target = folder / "moved.raw"
        run("cp", "--sparse=always", disk, copy)
        with mirrord(folder) as control:
            attach(control, "vm", copy)
            command = (*MIRRORD, "move", "vm", target, "--verify", verify)
            taken_s = _timed(lambda: run(*command, MIRRORD_SOCKET=str(control)))
        target.unlink()
        return {"1 GiB, 60 % data": taken_s}

    return measure


def _copied(*command: str) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        disk, target = make_disk(folder, MOVED_BYTES, MOVED_DATA), folder / "copied.raw"
        need(command[0])

        def work() -> None:
            run(*command, disk, target)
            descriptor = os.open(target, os.O_RDONLY)
            os.fsync(descriptor)  # mirrord's target is durable when the move is done
            os.close(descriptor)

        taken_s = _timed(work)
        target.unlink()
        return {"1 GiB, 60 % data": taken_s}

    return measure


def _latency_while_moving(folder: Path) -> dict[str, float]:
    disk, copy = make_disk(folder, DISK_BYTES, 1.0), folder / "vm.raw"
    target = folder / "moved.raw"
    shutil.copyfile(disk, copy)
    with mirrord(folder) as control:
        attach(control, "vm", copy)
        run(*MIRRORD, "move", "vm", target, MIRRORD_SOCKET=str(control))
        jobs = json.loads(run(*MIRRORD, "jobs", "vm", "--json", MIRRORD_SOCKET=str(control)))
    target.unlink()
    return {"pause": float(jobs[0]["pause_ms"])}


ALL: dict[str, Scenario] = {
    "nbd": Scenario(
        "one disk over NBD on a unix socket, warm",
        "requests a second",
        {
            "mirrord": _nbd(served_by_mirrord),
            "qemu-storage-daemon": _nbd(served_by_qemu),
            "nbdkit file": _nbd(served_by_nbdkit),
        },
    ),
    "move": Scenario(
        "an idle disk to another file of the same file system, durable at the end",
        "seconds",
        {
            "mirrord, unverified": _moved("none"),
            "mirrord, verified": _moved("full"),
            "qemu-img convert": _copied("qemu-img", "convert", "-f", "raw", "-O", "raw"),
            "cp --sparse": _copied("cp", "--sparse=always"),
        },
    ),
    "pause": Scenario(
        "pause of the guest at the cutover of an idle disk",
        "milliseconds",
        {"mirrord": _latency_while_moving},
    ),
}
