"""A disk that nobody writes to, from one file system to another, beside tools that copy files.

Every copy is durable at the end, keeps its source, and counts from the start of the command.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from bench import processes
from bench.model import MIB, Measure, Scenario, Target, pick
from bench.places import file_system, why_no_file_system
from bench.servers import MIRRORD, attach, mirrord, need, run
from mirrord.control.client import Client

DISK_BYTES, QUICK_BYTES = 4096 * MIB, 20 * MIB
DATA_MIB, HOLE_MIB = 3, 2  # in turn: 60 % data
FILE_SYSTEM_MIB, QUICK_FILE_SYSTEM_MIB = 7 * 1024, 512
SOURCE = "ext4"
KINDS = ("ext4", "xfs", "btrfs", "tmpfs")
CLONING = ("xfs", "btrfs")

TOOLS: dict[str, tuple[str, ...]] = {
    "qemu-img convert": ("qemu-img", "convert", "-f", "raw", "-O", "raw"),
    "nbdcopy": ("nbdcopy",),
    "cp --sparse": ("cp", "--sparse=always"),
    "rsync --sparse": ("rsync", "--sparse"),
}
CLONE = "cp --reflink"
INSTANT_S = 1.0  # a command that copies nothing: mostly the start of its interpreter


@contextlib.contextmanager
def _file_systems(folder: Path) -> Iterator[None]:
    """Mount what can be had here; without root the source lies in the folder itself."""
    with contextlib.ExitStack() as stack:
        for kind in _kinds():
            size_mib = pick(FILE_SYSTEM_MIB, QUICK_FILE_SYSTEM_MIB)
            place = stack.enter_context(file_system(folder, kind, size_mib))
            if kind == SOURCE or kind in CLONING:
                _make(place)
        if SOURCE not in _kinds():
            _make(folder)
        yield


def _kinds() -> list[str]:
    return [kind for kind in KINDS if why_no_file_system(kind) is None]


def _left_out() -> list[str]:
    return [why for kind in KINDS if (why := why_no_file_system(kind)) is not None]


def _make(place: Path) -> None:
    """Make the source, three MiB of data and a hole of two in turn."""
    size = pick(DISK_BYTES, QUICK_BYTES)
    with (place / "source.raw").open("wb") as file:
        for offset in range(0, size, (DATA_MIB + HOLE_MIB) * MIB):
            file.seek(offset)
            file.write(os.urandom(DATA_MIB * MIB))
        file.truncate(size)
        os.fsync(file.fileno())


def _ways(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield a row's name, the source and the target of each copy."""
    kinds = _kinds()
    if SOURCE not in kinds:
        yield "within the folder", folder / "source.raw", folder / "target.raw"
        return
    for kind in kinds:
        yield f"{SOURCE} to {kind}", folder / SOURCE / "source.raw", folder / kind / "target.raw"


def _clones(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    for kind in _kinds():
        if kind in CLONING:
            source = folder / kind / "source.raw"
            yield f"{kind}, cloned", source, source.with_name("target.raw")


def _warm(source: Path) -> None:
    """Read a source into the page cache, and write out what earlier copies left."""
    with source.open("rb", buffering=0) as file:
        while file.read(8 * MIB):
            pass
    os.sync()


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _moved(verify: str) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        figures: dict[str, float] = {}
        ways = [*_ways(folder), *(_clones(folder) if verify == "none" else ())]
        with mirrord(folder) as control, contextlib.closing(Client(control)) as client:
            for row, source, target in ways:
                attach(control, "vm", source)
                _warm(source)
                servers = processes.below(folder)
                used_s = processes.all_processor_s(servers) + _children_s()
                began = time.monotonic()
                run(*MIRRORD, "move", "vm", target, "--verify", verify, "--keep-source", "--force",
                    MIRRORD_SOCKET=str(control))  # fmt: skip
                taken_s = time.monotonic() - began
                used_s = processes.all_processor_s(servers) + _children_s() - used_s
                client.detach("vm")
                target.unlink()
                _keep(figures, row, taken_s, used_s)
        return figures

    return measure


def _copied(command: tuple[str, ...], *, clone: bool = False) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        need(command[0])
        figures: dict[str, float] = {}
        for row, source, target in _clones(folder) if clone else _ways(folder):
            _warm(source)
            used_s, began = _children_s(), time.monotonic()
            run(*command, source, target)
            descriptor = os.open(target, os.O_RDONLY)
            os.fsync(descriptor)  # mirrord's target is durable when the move is done
            os.close(descriptor)
            taken_s, used_s = time.monotonic() - began, _children_s() - used_s
            target.unlink()
            _keep(figures, row, taken_s, used_s)
        return figures

    return measure


def _keep(figures: dict[str, float], row: str, taken_s: float, used_s: float) -> None:
    figures[f"{row}: seconds"] = taken_s
    if "cloned" not in row:
        figures[f"{row}: processor seconds a GiB"] = used_s / (
            pick(DISK_BYTES, QUICK_BYTES) / 2**30
        )


ALL: dict[str, Scenario] = {
    "copy": Scenario(
        "an idle disk of 4 GiB, 60 % of it data, to another file system, durable at the end",
        "seconds, and processor seconds of all processes",
        {
            "mirrord": _moved("none"),
            "mirrord, verified": _moved("full"),
            **{peer: _copied(command) for peer, command in TOOLS.items()},
            CLONE: _copied(("cp", "--reflink=always"), clone=True),
        },
        rounds=3,
        less_is_better=("*",),
        targets=(
            Target("* to *: seconds", tuple(TOOLS), most=1.0),
            Target("within *: seconds", tuple(TOOLS), most=1.0),
            Target("*, cloned: seconds", most=INSTANT_S),
            Target("*: processor seconds a GiB", tuple(TOOLS), most=1.0),
            Target("*: seconds", ("mirrord",), most=1.6, subject="mirrord, verified"),
        ),
        space_mib=20 * 1024,
        prepare=_file_systems,
        notes=_left_out,
    ),
}
