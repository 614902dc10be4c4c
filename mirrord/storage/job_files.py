"""The real files of one job, in its directory of the state directory.

    lock    flock: one process has the job open
    log     the journal (`core/journal.py`), full of zeroes before its first record
    map     the intent map, written through
    dirty   a page that says which boot and disk it belongs to, then memory for the dirty bitmap

`log` and `map` get their names only once they are complete and durable, so one that is there but
has the wrong length was damaged. `dirty` is never made durable on purpose: a power cut changes the
boot, and another boot's bitmap is not believed. It is made all ones then, and its header stays
empty until `vouch`, because this process, too, may be killed at any moment: nobody ever believes a
bitmap that was only half rebuilt.

The map has no checksum and needs none against torn writes: a set bit matters only once its write
was durable, a cleared one never.

Files are written by one thread of the job's own, in the order of the calls; a call that is
cancelled is carried out nevertheless. On file systems that never overwrite in place (btrfs, ZFS)
preallocation does not keep ENOSPC away from the journal.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
from xxhash import xxh3_64_digest

from mirrord.core.bitmap import REGION_BYTES, bitmap_bytes_for, map_bytes_for
from mirrord.core.geometry import KIB, MIB
from mirrord.core.journal import CAPACITY_BYTES
from mirrord.engine.store import JobStore, unwritable
from mirrord.errors import DamagedError, RefusedError
from mirrord.storage import durable

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")
BOOT_ID_VARIABLE = "MIRRORD_BOOT_ID"  # for units that can't see the file (ProcSubset=pid)
HEADER_BYTES = 4 * KIB  # one page, so that the bitmap begins at a page too
# Filling holds the interpreter's lock, so it is done in pieces of less than a millisecond.
FILL_BYTES = MIB
_MAGIC = b"mirrord dirty 1\n"

T = TypeVar("T")


def read_boot_id(environment: Mapping[str, str] = os.environ) -> str:
    """Return this boot's id, "" if it can't be known: then no boot is the same as another.

    systemd's `%b` and the kernel write the same id with and without dashes; both are one.
    """
    told = environment.get(BOOT_ID_VARIABLE, "")
    if not told:
        try:
            told = BOOT_ID_FILE.read_text("ascii")
        except FileNotFoundError:
            return ""
    return told.strip().replace("-", "").lower()


class JobFiles(JobStore):
    """A job's files, open and locked. Made by `open`; end with `close`.

    After `close`, `dirty` is empty; a bitmap that still uses the mapped memory keeps it alive,
    and its changes still count.
    """

    def __init__(
        self, job_id: str, directory: int, lock: int, dirty: mmap.mmap, map_bytes: int
    ) -> None:
        """Take over what `open` opened."""
        self.job_id = job_id
        self.same_boot = False
        self.dirty = memoryview(dirty)[HEADER_BYTES:]
        self._header = memoryview(dirty)[:HEADER_BYTES]
        self._vouched = bytes(HEADER_BYTES)
        self._directory = directory
        self._lock = lock
        self._files: dict[str, int] = {}
        self._map_bytes = map_bytes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="job-files")
        self._closed = False

    @classmethod
    async def open(
        cls,
        directory: Path,
        size_bytes: int,
        boot_id: str,
        *,
        dirty_bytes: int | None = None,
        region_bytes: int = REGION_BYTES,
    ) -> JobFiles:
        """Open the files of the job whose directory (which exists) is named by its id.

        `size_bytes` is the disk's; `dirty_bytes` the length of `dirty`, if that is more than the
        bitmap. Raises: RefusedError when another process has them (`in-use`) or
        they can't be made (`state-error`).
        """
        map_bytes = map_bytes_for(size_bytes, region_bytes)
        dirty_bytes = dirty_bytes or bitmap_bytes_for(size_bytes)
        header = _header(boot_id, size_bytes)
        opening = asyncio.ensure_future(
            asyncio.to_thread(cls._open, directory, header, dirty_bytes, map_bytes)
        )
        try:
            files = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_discard)  # or the lock would stay with nobody
            raise
        files.same_boot = files.same_boot and boot_id != ""
        return files

    @classmethod
    def _open(cls, path: Path, header: bytes, dirty_bytes: int, map_bytes: int) -> JobFiles:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened = [directory]
        try:
            lock = _open_at(directory, "lock", os.O_RDWR | os.O_CREAT)
            opened.append(lock)
            if not durable.try_flock(lock):
                raise RefusedError("in-use", f"another process has job {path.name} open")
            dirty, same_boot = _map_dirty(directory, header, dirty_bytes)
        except BaseException as error:
            for descriptor in opened:
                os.close(descriptor)
            if isinstance(error, OSError):
                raise unwritable(error) from error
            raise
        files = cls(path.name, directory, lock, dirty, map_bytes)
        files.same_boot = same_boot
        files._vouched = header
        return files

    def vouch(self) -> None:
        """See `JobStore.vouch`."""
        self._header[:] = self._vouched

    async def create(self, map_bytes: bytes) -> None:
        """Create journal and intent map anew; see `JobStore.create`. Replaces what an attempt
        that never came to its first record left behind."""
        if len(map_bytes) != self._map_bytes:
            raise ValueError(f"the map has {len(map_bytes)} bytes, not {self._map_bytes}")
        await self._run(lambda: self._create(map_bytes))

    async def read_log(self) -> bytes:
        """Return the whole journal, made durable; b"" when it was never created.

        Raises: DamagedError when it has the wrong length, OSError.
        """
        return await self._run(self._read_log)

    async def write_log(self, offset: int, data: bytes) -> None:
        """See `JobStore.write_log`."""
        assert offset + len(data) <= CAPACITY_BYTES, "a record outside the journal"
        await self._run(lambda: self._write("log", offset, data, sync=True))

    async def read_map(self) -> bytes | None:
        """See `JobStore.read_map`."""
        return await self._run(self._read_map)

    async def write_map(self, offset: int, data: bytes, *, durable: bool) -> None:
        """See `JobStore.write_map`."""
        assert offset + len(data) <= self._map_bytes, "a page outside the map"
        await self._run(lambda: self._write("map", offset, data, sync=durable))

    async def close(self) -> None:
        """See `JobStore.close`. Waits for what is being written."""
        if self._closed:
            return
        self._closed = True
        await self._run(self._close)
        self._thread.shutdown(wait=False)
        self.dirty = memoryview(b"")

    # Inside: the thread's side

    async def _run(self, call: Callable[[], T]) -> T:
        running = asyncio.get_running_loop().run_in_executor(self._thread, call)
        return await asyncio.shield(running)

    def _create(self, map_bytes: bytes) -> None:
        for name, content in (("map", map_bytes), ("log", bytes(CAPACITY_BYTES))):
            # Written, not only allocated: a record then changes no metadata of the file system.
            durable.replace(self._directory, name, content)
            self._forget(name)

    def _read_log(self) -> bytes:
        try:
            data = self._read("log")
        except FileNotFoundError:
            os.fsync(self._directory)
            return b""
        if len(data) != CAPACITY_BYTES:
            raise DamagedError(
                f"the journal of job {self.job_id} has {len(data)} bytes, not {CAPACITY_BYTES}"
            )
        return data

    def _read_map(self) -> bytes | None:
        try:
            data = self._read("map")
        except OSError:  # part of the interface: what can't be read counts as marked everywhere
            return None
        return data if len(data) == self._map_bytes else None

    def _read(self, name: str) -> bytes:
        """Read the file, and make it and its name durable (R12).

        What was read is written once more before the flush: a flush that failed under an earlier
        process left pages that look written, and a flush alone would leave them so.
        """
        descriptor = self._file(name)
        parts = []
        position = 0
        while part := os.pread(descriptor, CAPACITY_BYTES, position):
            parts.append(part)
            position += len(part)
        data = b"".join(parts)
        if data:
            self._write(name, 0, data, sync=True)
        os.fsync(descriptor)
        os.fsync(self._directory)
        return data

    def _write(self, name: str, offset: int, data: bytes, *, sync: bool) -> None:
        descriptor = self._file(name)
        durable.write_all(descriptor, data, offset)
        if sync:
            os.fdatasync(descriptor)

    def _file(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = _open_at(self._directory, name, os.O_RDWR)
        return self._files[name]

    def _forget(self, name: str) -> None:
        if name in self._files:
            os.close(self._files.pop(name))

    def _close(self) -> None:
        for name in list(self._files):
            self._forget(name)
        os.close(self._lock)
        os.close(self._directory)


def _discard(opening: asyncio.Future[JobFiles]) -> None:
    """Close what was opened for a caller who has gone."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result()._close()


def _open_at(directory: int, name: str, flags: int) -> int:
    return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory)


def _header(boot_id: str, size_bytes: int) -> bytes:
    told = _MAGIC + msgspec.json.encode({"boot": boot_id, "size": size_bytes})
    return (told + b"\n" + xxh3_64_digest(told)).ljust(HEADER_BYTES, b"\0")


def _map_dirty(directory: int, header: bytes, dirty_bytes: int) -> tuple[mmap.mmap, bool]:
    """Map `dirty`, and tell whether it is believed: of this boot, this disk, and whole."""
    length = HEADER_BYTES + dirty_bytes
    descriptor = _open_at(directory, "dirty", os.O_RDWR | os.O_CREAT)
    try:
        if os.fstat(descriptor).st_size == length:
            mapped = mmap.mmap(descriptor, length)
            if mapped[:HEADER_BYTES] == header:
                return mapped, True
        else:
            os.ftruncate(descriptor, 0)
            # Allocated, because a full file system would turn a mark into SIGBUS.
            os.posix_fallocate(descriptor, 0, length)
            mapped = mmap.mmap(descriptor, length)
    finally:
        os.close(descriptor)
    mapped[:HEADER_BYTES] = bytes(HEADER_BYTES)
    ones = b"\xff" * min(dirty_bytes, FILL_BYTES)
    for offset in range(0, dirty_bytes, FILL_BYTES):
        part = ones[: dirty_bytes - offset]
        mapped[HEADER_BYTES + offset : HEADER_BYTES + offset + len(part)] = part
    return mapped, False
