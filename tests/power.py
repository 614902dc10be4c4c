"""File systems whose every write and flush is logged, and what a power cut leaves of them.

ext4 on a loop device over a file that qemu-storage-daemon exports by FUSE, with its `blklogwrites`
driver below: what the file system writes, and when it flushes, ends up in a log of dm-log-writes'
format, in the order in which it was done (the export does one request at a time).

A cut at a place of the log is everything up to the last flush before it, and of each write since
then all, nothing, or some of its sectors, in any order: that is what a disk with a volatile cache
owes after a power cut, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirrord.core.geometry import MIB
from tests.helpers import eventually, require_fuse, require_loop_devices, require_program
from tests.storage.places import run

DISK_BYTES = 40 * MIB  # two small disks, the state of a move, and ext4's journal
SECTOR_BYTES = 512
ZEROES = bytes(MIB)
END_S = 10

_MAGIC = 0x6A736677736872
_SUPERBLOCK = struct.Struct("<QQQI")  # magic, version, entries, sector size
_ENTRY = struct.Struct("<QQQQ")  # sector, sectors, flags, length of a mark's text
_FLUSH, _DISCARD = 1, 4


# How many requests are in the log of each of some disks.
Position = tuple[int, ...]


def log_position(logs: Sequence[str]) -> Position:
    """Return how far logs are: every request that has ended is before that place."""
    return tuple(map(_length, logs))


def _length(path: str) -> int:
    with open(path, "rb") as log:
        superblock = log.read(_SUPERBLOCK.size)
    return int(_SUPERBLOCK.unpack(superblock)[2])


def require_logged_disks() -> None:
    """Skip unless such file systems can be made here."""
    require_loop_devices()
    require_fuse()
    for name in ("qemu-storage-daemon", "losetup", "mkfs.ext4", "e2fsck"):
        require_program(name)


@dataclass(frozen=True, slots=True)
class Entry:
    """One request: data written at an offset (none for a flush alone), and whether it flushed."""

    offset: int
    data: memoryview
    flush: bool


class LoggedDisk:
    """One file system of `DISK_BYTES`. Inside `recording` it is mounted at `mount`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.mount = folder / name
        self.mount.mkdir()
        self._store = folder / f"{name}.raw"
        self.log = folder / f"{name}.log"
        self._export = folder / f"{name}.export"
        self._cut = folder / f"{name}.cut"
        for path, size in ((self._store, DISK_BYTES), (self.log, 0), (self._export, DISK_BYTES)):
            path.touch()
            os.truncate(path, size)
        self._entries: list[Entry] = []
        self._image, self._applied = bytearray(DISK_BYTES), 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Make and mount it, and log what is written until the end; may be done once."""
        file = "driver=file,cache.no-flush=on"  # this machine's own power is not the question
        server = subprocess.Popen(
            [require_program("qemu-storage-daemon"),
             "--blockdev", f"{file},node-name=store,discard=unmap,filename={self._store}",
             "--blockdev", f"{file},node-name=log,filename={self.log}",
             "--blockdev", "driver=blklogwrites,node-name=logged,file=store,log=log,discard=unmap,"
             "log-super-update-interval=1",
             "--export", f"type=fuse,id=export,node-name=logged,mountpoint={self._export},"
             "writable=on,growable=off,allow-other=off"],
        )  # fmt: skip
        try:
            eventually(lambda: os.path.ismount(self._export) or server.poll() is not None)
            device = run(require_program("losetup"), "--find", "--show", str(self._export))
            try:
                options = ("-q", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0")
                run(require_program("mkfs.ext4"), *options, device)
                run("mount", device, str(self.mount))
                try:
                    yield
                finally:
                    _unmount(self.mount)
            finally:
                run("losetup", "--detach", device)
        finally:
            server.terminate()
            server.wait(END_S)
        self._entries = list(_parse(self.log.read_bytes()))

    def find(self, text: bytes) -> int:
        """Return the place before the first request that wrote `text`."""
        return next(n for n, entry in enumerate(self._entries) if text in bytes(entry.data))

    def cut(self, position: int, chance: random.Random) -> None:
        """Be what a power cut before entry `position` leaves."""
        flushes = (n for n in range(position, 0, -1) if self._entries[n - 1].flush)
        image = bytearray(self._durable(next(flushes, 0)))
        tail = [entry for entry in self._entries[self._applied : position] if entry.data]
        chance.shuffle(tail)
        kept = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        for entry in tail:
            _keep_some(image, entry, kept, chance)
        with self._cut.open("wb") as file:
            file.truncate(DISK_BYTES)
            for start in range(0, DISK_BYTES, MIB):
                part = image[start : start + MIB]
                if part != ZEROES:
                    file.seek(start)
                    file.write(part)

    def _durable(self, position: int) -> bytearray:
        """Return what the store holds after so many requests. Cheap for ever later places."""
        if position < self._applied:
            self._image, self._applied = bytearray(DISK_BYTES), 0
        for entry in self._entries[self._applied : position]:
            self._image[entry.offset : entry.offset + len(entry.data)] = entry.data
        self._applied = position
        return self._image

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """Mount what a cut has left, as the next boot does; it has to be sound."""
        device = run("losetup", "--find", "--show", str(self._cut))
        try:
            run("mount", device, str(self.mount))  # replays the file system's own journal
            try:
                yield
            finally:
                _unmount(self.mount)
            checked = subprocess.run(
                [require_program("e2fsck"), "-fn", device], capture_output=True, text=True
            )
            assert checked.returncode == 0, checked.stdout
        finally:
            run("losetup", "--detach", device)


def _unmount(where: Path) -> None:
    """Unmount what no process uses any more; the kernel ends an io_uring a moment after it."""

    def unmounted() -> bool:
        return subprocess.run(["umount", str(where)], capture_output=True).returncode == 0

    try:
        eventually(unmounted, END_S, f"{where} is unmounted")
    except BaseException:
        run("umount", "--lazy", str(where))
        raise


def _keep_some(image: bytearray, entry: Entry, kept: float, chance: random.Random) -> None:
    """Write an entry that was not flushed: whole, torn, or not at all."""
    if chance.random() < 0.7:
        if chance.random() < kept:
            image[entry.offset : entry.offset + len(entry.data)] = entry.data
        return
    for start in range(0, len(entry.data), SECTOR_BYTES):
        if chance.random() < kept:
            sector = entry.data[start : start + SECTOR_BYTES]
            image[entry.offset + start : entry.offset + start + len(sector)] = sector


def _parse(log: bytes) -> Iterator[Entry]:
    """Yield the requests of a log; its format is that of the kernel's dm-log-writes."""
    magic, version, entries, sector_bytes = _SUPERBLOCK.unpack_from(log)
    assert (magic, version) == (_MAGIC, 1)
    view = memoryview(log)
    position = sector_bytes
    for _ in range(entries):
        sector, sectors, flags, _ = _ENTRY.unpack_from(log, position)
        position += sector_bytes
        assert flags in (0, _FLUSH, _DISCARD), "loop devices write and flush apart"
        length = sectors * sector_bytes
        data = view[position : position + length]
        if flags & _DISCARD:
            data = memoryview(bytes(length))
        else:
            position += length
        yield Entry(sector * sector_bytes, data, flags == _FLUSH)
