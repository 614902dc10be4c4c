"""Where disks lie while they are measured: folders and file systems that are gone afterwards.

Everything here is undone on the way out, also when a signal ends the run (`signals_unwind`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bench.model import MIB, MissingPeerError, Scenario

LEFT_FREE_MIB = 512  # of the folder's file system, beside what a scenario needs


class TooLittleSpaceError(Exception):
    """A folder has less room than a scenario needs; nothing was begun."""


@contextlib.contextmanager
def signals_unwind() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM unwind the program as KeyboardInterrupt.

    Later ones are ignored, so that nothing interrupts the clean-up.
    """

    def unwind(number: int, frame: FrameType | None) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {each: signal.signal(each, unwind) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def check_space(folder: Path, need_mib: int) -> None:
    """Refuse a folder that is too small.

    Raises:
        TooLittleSpaceError: It has less than is needed, and a reserve.
    """
    space = os.statvfs(folder)
    have_mib = space.f_bavail * space.f_frsize // MIB
    if have_mib < need_mib + LEFT_FREE_MIB:
        raise TooLittleSpaceError(
            f"{folder} has {have_mib} MiB free, and {need_mib + LEFT_FREE_MIB} MiB are needed"
        )


@contextlib.contextmanager
def temporary(asked: Path | None, scenario: Scenario) -> Iterator[Path]:
    """A folder that is gone afterwards, in memory if the scenario wants that and root says so.

    Of huge pages, as in small ones a tmpfs takes 30 ms a GiB to find the next hole, which no file
    system of a real server does; or of small ones, as a huge one is zeroed in one go of 2 to 4 ms
    at its first write, which none does, either.
    """
    with tempfile.TemporaryDirectory(prefix="mb-", dir=asked, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with contextlib.ExitStack() as stack:
            if scenario.in_memory and asked is None and os.geteuid() == 0:
                with contextlib.suppress(subprocess.CalledProcessError):
                    stack.enter_context(in_ram(folder, huge=not scenario.small_pages))
            yield folder


@contextlib.contextmanager
def in_ram(folder: Path, *, huge: bool = True) -> Iterator[Path]:
    """Mount a tmpfs on a folder, of huge pages if they are wanted."""
    folder.mkdir(exist_ok=True)
    options = f"huge={'always' if huge else 'never'},mode=755"
    subprocess.run(("mount", "-t", "tmpfs", "-o", options, "none", folder), check=True)
    try:
        yield folder
    finally:
        subprocess.run(("umount", "--lazy", folder), check=True)


def had_memory(size: int) -> mmap.mmap:
    """Return memory to be closed just before as much is used, so that the machine has that much.

    A host takes back what a virtual machine leaves free for some seconds, and finding it anew
    takes longer than copying into it: a copy of 2 GiB took 3.8 to 5.5 s, and 0.9 when it was there.
    """
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


def why_no_file_system(kind: str) -> str | None:
    """Return why a file system of a kind can't be made and mounted here, or None."""
    if os.geteuid() != 0:
        return f"{kind} needs root"
    if kind != "tmpfs" and not shutil.which(f"mkfs.{kind}"):
        return f"mkfs.{kind} is not installed"
    if kind != "tmpfs" and not Path("/dev/loop-control").exists():
        return f"{kind} needs loop devices"
    known = Path("/proc/filesystems").read_text().split()
    return None if kind in known else f"the kernel has no {kind}"


@contextlib.contextmanager
def file_system(folder: Path, kind: str, size_mib: int) -> Iterator[Path]:
    """Make a file system on a loop device and mount it below a folder; yields where.

    Raises:
        MissingPeerError: It can't be had here.
    """
    if why := why_no_file_system(kind):
        raise MissingPeerError(kind, f"is left out: {why}")
    where = folder / kind
    where.mkdir(exist_ok=True)
    if kind == "tmpfs":
        with in_ram(where):
            yield where
        return
    backing = folder / f"{kind}.backing"
    with backing.open("wb") as file:
        file.truncate(size_mib * MIB)
    try:
        # btrfs has words for every user, also when it is told to be quiet
        subprocess.run((f"mkfs.{kind}", "-q", backing), check=True, capture_output=True)
        with _loop(backing) as device:
            subprocess.run(("mount", "-t", kind, device, where), check=True)
            try:
                yield where
            finally:
                subprocess.run(("umount", "--lazy", where), check=True)
    finally:
        backing.unlink()


@contextlib.contextmanager
def _loop(backing: Path) -> Iterator[str]:
    command = ("losetup", "--find", "--show", "--direct-io=on", backing)
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(("losetup", "--detach", device), check=True)
