"""What the storage tests stand on: loop devices and file systems of their own.

Everything made here is undone by the context manager that made it, also when the test fails.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mirrord.core.geometry import MIB
from tests.helpers import eventually, require_loop_devices, require_program

RUN_DEADLINE_S = 30

# The least that mkfs takes: XFS wants 300 MiB, btrfs 109 MiB. The files are sparse.
SYSTEMS = {
    "ext4": ("mkfs.ext4", ["-q", "-F"], 64 * MIB),
    "xfs": ("mkfs.xfs", ["-q", "-f", "-m", "reflink=1"], 300 * MIB),
    "btrfs": ("mkfs.btrfs", ["-q", "-f"], 128 * MIB),
    "tmpfs": ("", [], 64 * MIB),
}


def run(*command: str) -> str:
    """Run a program that has to succeed; return what it printed."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=RUN_DEADLINE_S
    )
    return done.stdout.strip()


@contextmanager
def loop_device(folder: Path, size: int, sector_bytes: int = 512) -> Iterator[str]:
    """Make a block device of `size` bytes; its backing file lies in `folder`."""
    require_loop_devices()
    losetup = require_program("losetup")
    backing = folder / f"backing-{size}-{sector_bytes}"
    with backing.open("wb") as file:
        file.truncate(size)
    device = run(losetup, "--find", "--show", f"--sector-size={sector_bytes}", str(backing))
    try:
        yield device
    finally:
        run(losetup, "--detach", device)
        backing.unlink()


def unmount(where: Path) -> None:
    """Unmount; a file that a test left open is that test's failure, but no mount stays."""

    def unmounted() -> bool:
        gc.collect()  # tracebacks of expected refusals hold directories open
        done = subprocess.run(["umount", str(where)], capture_output=True, timeout=30)
        return done.returncode == 0

    try:
        # the kernel lets go of files a moment after an io_uring that used them
        eventually(unmounted, 5, f"{where} is unmounted")
    except BaseException:
        run("umount", "--lazy", str(where))
        raise


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """Make and mount a small file system of its own; return where."""
    require_loop_devices()
    program, options, size = SYSTEMS[kind]
    where = folder / f"mount-{kind}"
    where.mkdir()
    if not program:
        run("mount", "-t", kind, "-o", f"size={size}", "none", str(where))
        try:
            yield where
        finally:
            unmount(where)
        return
    make = require_program(program)
    with loop_device(folder, size) as device:
        run(make, *options, device)
        run("mount", device, str(where))
        try:
            yield where
        finally:
            unmount(where)


def allocated_bytes(path: str | os.PathLike[str]) -> int:
    """Return what a file takes on its file system."""
    return os.stat(path).st_blocks * 512


def make_file(path: Path, content: bytes, size: int | None = None) -> Path:
    """Write a file, with a hole behind `content` up to `size`."""
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size if size is not None else len(content))
    return path


def fill(device: str, content: bytes) -> None:
    """Write to a block device, durably."""
    with Path(device).open("r+b") as file:
        file.write(content)
        os.fsync(file.fileno())


def content_of(path: str | Path) -> bytes:
    """Read a file or a block device."""
    return Path(path).read_bytes()


def open_names() -> list[str]:
    """Return what this process has open, by name."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link)]


def resident_pages(path: Path) -> int:
    """Return how many pages of a file the page cache has, by mincore(2)."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as memory:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        byte = ctypes.c_char.from_buffer(memory)
        address = ctypes.c_void_p(ctypes.addressof(byte))
        failed = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), pages)
        del byte
    assert not failed
    return sum(state & 1 for state in pages)
