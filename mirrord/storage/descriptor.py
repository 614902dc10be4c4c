"""A disk behind a file descriptor: what regular files and block devices have in common.

Through the page cache (`Cache.WRITEBACK`): reads that the cache can answer end without an await,
the rest goes to the `FileIo`. A guest's usual writes are done at once on the authoritative side.

Past it (`Cache.DIRECT`): the kernel wants aligned offsets, so

* bytes that fill their block only in part are written by read-modify-write. It runs alone: it
  waits for every aligned write in flight, and later ones wait for it, since a block rewritten
  from an old reading would undo a neighbour's write;
* a size that isn't a whole number of blocks leaves a tail that can't be written directly without
  growing the file. Its last page goes through the page cache, by a second descriptor, and only
  it: cached and direct writes never meet in one page, where they would spoil each other.

The second descriptor (`_other`) is opened when first needed, in the other mode, through
/proc/self/fd: the same file, whatever its name leads to by now. It holds no lock of its own.

Requests of several steps run as tasks of the backend, so that a cancelled caller leaves whole
operations behind. `close` waits for those, for whoever is on the way to an operation (`_users`: it
may wait for a buffer, or for a read-modify-write), and then for the operations themselves, which
the `FileIo` knows. A number that was closed is at once another file's: nobody may still have it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mirrord.core.geometry import KIB, MIB, Extent, Status, round_down, round_up, split
from mirrord.storage.backend import Backend, Buffer, Cache, Capabilities, Hasher, Identity, Watch
from mirrord.storage.carrying import (
    CARRY_THREADS_MAX,
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    ONCE_BYTES_MIN,
    Side,
    carry,
    digests,
)
from mirrord.storage.fileio import FileIo, all_of, outcome
from mirrord.storage.memory_pool import (
    PAGE_BYTES,
    PIECE_BYTES_MAX,
    aligned_address,
    constant,
)
from mirrord.storage.page_cache import Wake, drop, reopen, warm

T = TypeVar("T")

# Reads up to this try the page cache inline: copying it takes the loop some 30 us.
INLINE_READ_BYTES_MAX = 256 * KIB

# Writes up to this may be done inline (`authoritative`): 1 MiB takes the loop about 0.4 ms, less
# than having a kernel thread woken for it.
INLINE_WRITE_BYTES_MAX = MIB

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_ZEROES = bytes(MIB)


class DescriptorBackend(Backend):
    """A disk behind an open descriptor, which belongs to this object."""

    def __init__(
        self,
        descriptor: int,
        io: FileIo,
        *,
        identity: Identity,
        capabilities: Capabilities,
        cache: Cache,
        unit_bytes: int,
        name: str = "",
        read_only: bool = False,
    ) -> None:
        """`unit_bytes` is what O_DIRECT wants offsets and lengths to be multiples of."""
        self.size = identity.size
        self.name = name
        self.identity = identity
        self.capabilities = capabilities
        self.read_only = read_only
        self.cache_mode = cache
        self._descriptor = descriptor
        self._io = io
        self._direct = cache is Cache.DIRECT
        self._unit = unit_bytes
        # Where a range to be zeroed must begin and end to be left to fallocate.
        self._zero_unit = PAGE_BYTES if self._direct else 1
        self._zeroes_any_end = True  # ... though it may always end where the disk ends
        whole = self.size % unit_bytes == 0
        self._direct_end = self.size if whole else round_down(self.size, PAGE_BYTES)
        self._punches = capabilities.punches_holes
        self._zeroes_ranges = capabilities.fast_zeroes
        self._no_wait = not self._direct
        self._wake = Wake(descriptor, cached=not self._direct, by_hand=capabilities.durable_flush)
        self._other_descriptor = -1
        self._other_lock = asyncio.Lock()
        self._lock = threading.Lock()  # of threads that copy to this
        self._carriers = ThreadPoolExecutor(CARRY_THREADS_MAX, "mirrord-carry")
        self._tasks: set[asyncio.Future[Any]] = set()
        self._users = 0  # coroutines that have a descriptor's number in hand
        self._unused: asyncio.Future[None] | None = None  # `close` waits for the last of them
        self._edges = asyncio.Lock()  # held by a read-modify-write
        self._aligned_writes = 0  # awaited; abandoned ones are known to the FileIo alone
        self._aligned_ended: asyncio.Future[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    # Reading.

    async def read(self, offset: int, length: int) -> Buffer:
        if self._direct:
            if (offset | length) % self._unit == 0 and offset + length <= self._direct_end:
                return await self._use(self._io.read_direct(self._descriptor, offset, length))
            return await self._use(self._read_past(offset, length))
        if self._no_wait and length <= INLINE_READ_BYTES_MAX:
            data = bytearray(length)
            try:
                done = os.preadv(self._descriptor, (data,), offset, os.RWF_NOWAIT)
            except BlockingIOError:
                done = 0
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._no_wait = False
                done = 0
            if done == length:
                return data
            if done:
                rest = self._io.read(self._descriptor, offset + done, length - done)
                data[done:] = await self._use(rest)
                return data
        return await self._use(self._io.read(self._descriptor, offset, length))

    async def read_once(self, offset: int, length: int) -> Buffer:
        """Read through the page cache and leave there what was there before."""
        flags = self._wake.flags
        if flags and length >= ONCE_BYTES_MIN:
            try:
                return await self._use(self._io.read(self._descriptor, offset, length, flags=flags))
            except OSError as error:
                self._wake.do_without(flags, error)
        return await self.read(offset, length)

    async def read_stored(self, offset: int, length: int) -> Buffer:
        """Read past the page cache: by O_DIRECT, or after dropping the range from the cache."""
        if self._direct:
            return await self.read(offset, length)
        return await self._use(self._read_stored(offset, length))

    async def digests_stored(self, runs: Sequence[tuple[int, int]]) -> list[int] | None:
        """Read past the page cache in a thread, and hash there."""
        self._refuse_closed()
        direct = self._descriptor if self._direct else await self._other()
        for offset, length in runs:
            if (offset | length) % self._unit or offset + length > self._direct_end:
                return None
        if direct < 0:
            return None
        return await outcome(self._carriers.submit(digests, direct, runs), self.lend_to)

    async def _read_stored(self, offset: int, length: int) -> Buffer:
        if await self._other() >= 0:
            return await self._read_past(offset, length)
        await self._own(self._io.call(drop, self._descriptor, offset, length))
        return await self._io.read(self._descriptor, offset, length)

    async def _read_past(self, offset: int, length: int) -> Buffer:
        """Read past the page cache, whatever the range; the tail's page through it."""
        end = offset + length
        start = round_down(offset, self._unit)
        stop = min(round_up(end, self._unit), self._direct_end)
        direct = cached = self._descriptor
        if not self._direct:
            direct = await self._other()
        elif end > self._direct_end:
            cached = await self._other()
        at = max(offset, self._direct_end)
        if at < end and not self._direct:
            await self._own(self._io.call(drop, cached, at, end - at))
        pieces: list[Coroutine[Any, Any, Buffer]] = []
        if start < stop:
            pieces.append(self._io.read_direct(direct, start, stop - start))
        if at < end:
            pieces.append(self._io.read(cached, at, end - at))
            start = min(start, at) if start < stop else at
        parts = [await pieces[0]] if len(pieces) == 1 else await all_of(pieces)
        joined = parts[0] if len(parts) == 1 else b"".join(parts)
        if start == offset and len(joined) == length:
            return joined
        return memoryview(joined)[offset - start :][:length]

    # Writing.

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        length = len(data)
        if self._direct:
            if (
                (offset | length) % self._unit == 0
                and offset + length <= self._direct_end
                and (length <= PIECE_BYTES_MAX or aligned_address(data))
            ):
                await self._use(self._write_aligned(offset, data, fua))
            else:
                await self._own(self._write_pieces(offset, constant(data), fua))
        elif self.authoritative and not fua and length <= INLINE_WRITE_BYTES_MAX:
            done = os.pwrite(self._descriptor, data, offset)
            if done != length:
                rest = memoryview(data)[done:]
                at = offset + done
                await self._use(self._io.write(self._descriptor, at, rest, dsync=False))
        else:
            await self._use(self._io.write(self._descriptor, offset, data, dsync=fua))

    def begin_write(
        self, offset: int, data: Buffer, ended: Callable[[OSError | None], None]
    ) -> bool:
        if self._direct or self.read_only:
            return False
        return self._io.begin_write(self._descriptor, offset, data, ended)

    async def write_once(self, offset: int, data: Buffer) -> None:
        """Write through the page cache, which hands it on at once and forgets it."""
        wake = self._wake
        if not self.read_only and len(data) >= ONCE_BYTES_MIN:
            if flags := wake.flags:
                write = self._io.write(self._descriptor, offset, data, dsync=False, flags=flags)
                try:
                    return await self._use(write)
                except OSError as error:
                    wake.do_without(flags, error)
            if wake.hands_on:
                await self.write(offset, data)
                return await self._own(self._io.call(wake.hand_on, offset, len(data)))
        return await self.write(offset, data)

    async def carry_from(
        self,
        source: Backend,
        runs: Sequence[tuple[int, int]],
        hasher: Hasher | None,
        watch: Watch,
    ) -> int | None:
        """Copy in a thread, from page cache to page cache, leaving both as they were.

        The threads are this target's own: one that doesn't answer holds up no other.
        """
        if not isinstance(source, DescriptorBackend) or self._direct or source._direct:
            return None
        self._refuse_closed()
        work = self._carriers.submit(carry, source._side(), self._side(), runs, hasher, watch)
        try:
            return await outcome(work, self.lend_to, source.lend_to)
        except asyncio.CancelledError:
            watch.given_up = True
            raise

    def _side(self) -> Side:
        ranges = FALLOC_ZERO_RANGE if self._zeroes_ranges else 0
        zeroing = FALLOC_PUNCH_HOLE if self._punches else ranges
        return Side(self._descriptor, self._wake, self._lock, zeroing, self._zero_unit)

    async def _write_aligned(self, offset: int, data: Buffer, dsync: bool) -> None:
        while self._edges.locked():
            async with self._edges:
                pass  # first come, first served; then look again
        self._aligned_writes += 1
        try:
            await self._io.write_direct(self._descriptor, offset, data, dsync=dsync)
        finally:
            self._aligned_writes -= 1
            if self._aligned_ended is not None and not self._aligned_writes:
                self._let_edge_go_on()

    async def _write_pieces(self, offset: int, data: Buffer, dsync: bool) -> None:
        """Write any range past the page cache; the tail's page through it."""
        view = memoryview(data)
        end = offset + len(data)
        stop = min(end, self._direct_end)
        cached = await self._other() if end > self._direct_end else -1
        pieces: list[Coroutine[Any, Any, None]] = []
        for at, count, whole in _blocks(offset, stop, self._unit):
            part = view[at - offset :][:count]
            write = self._write_aligned if whole else self._write_edge
            pieces.append(write(at, part, dsync))
        if end > self._direct_end:
            at = max(offset, self._direct_end)
            pieces.append(self._io.write(cached, at, view[at - offset :], dsync=dsync))
        await all_of(pieces)

    async def _write_edge(self, offset: int, data: Buffer, dsync: bool) -> None:
        """Replace a part of one block, alone."""
        block = round_down(offset, self._unit)
        async with self._edges:
            while self._aligned_writes:
                self._aligned_ended = asyncio.get_running_loop().create_future()
                await self._aligned_ended
            await self._io.settle(self._descriptor)
            content = bytearray(await self._io.read_direct(self._descriptor, block, self._unit))
            content[offset - block : offset - block + len(data)] = data
            await self._io.write_direct(self._descriptor, block, content, dsync=dsync)

    def _let_edge_go_on(self) -> None:
        ended, self._aligned_ended = self._aligned_ended, None
        if ended is not None and not ended.done():
            ended.set_result(None)

    # Zeroes and holes.

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, punch: bool = True, fast: bool = False
    ) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        await self._own(self._zero(offset, length, fua=fua, punch=punch, fast=fast))

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self.write_zeroes(offset, length, fua=fua)

    async def _zero(self, offset: int, length: int, *, fua: bool, punch: bool, fast: bool) -> None:
        end = offset + length
        start = min(round_up(offset, self._zero_unit), end)
        stop = max(start, round_down(end, self._zero_unit))
        if end == self.size and self._zeroes_any_end:
            stop = end
        if fast and not self.capabilities.fast_zeroes:
            raise OSError(errno.ENOTSUP, "zeroes are not faster than writing here")
        if stop > start and not await self._allocate_zeroes(start, stop - start, punch):
            if fast:
                raise OSError(errno.ENOTSUP, "zeroes are not faster than writing here")
            start = stop = end  # then everything is written
        for at, until in ((offset, start), (stop, end)):
            for piece, count in split(at, until - at, MIB):
                await self._write_zero_piece(piece, count)
        if fua:
            await self._io.datasync(self._descriptor)

    async def _allocate_zeroes(self, offset: int, length: int, punch: bool) -> bool:
        """Zero by fallocate; False, with nothing changed, where that isn't to be had."""
        if punch and self._punches:
            self._punches = await self._fallocate(FALLOC_PUNCH_HOLE, offset, length)
            if self._punches:
                return True
        if self._zeroes_ranges:
            self._zeroes_ranges = await self._fallocate(FALLOC_ZERO_RANGE, offset, length)
        return self._zeroes_ranges

    async def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        # Whole pages, or the file's end: a read-modify-write has no block in common with it.
        mode |= FALLOC_KEEP_SIZE
        try:
            await self._io.fallocate(self._descriptor, mode, offset, length)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        return True

    async def _write_zero_piece(self, offset: int, length: int) -> None:
        zeroes = _ZEROES[:length]
        if self._direct:
            await self._write_pieces(offset, zeroes, False)
        else:
            await self._io.write(self._descriptor, offset, zeroes, dsync=False)

    # The rest.

    async def flush(self) -> None:
        await self._use(self._io.datasync(self._descriptor))

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Status.DATA)]

    def forget_cache(self, offset: int, length: int) -> None:
        if not self._direct:
            self._task(self._io.call(drop, self._descriptor, offset, length))

    async def warm_from(self, source: Backend, runs: Sequence[tuple[int, int]]) -> int:
        if self._direct or not isinstance(source, DescriptorBackend):
            return 0
        warming = self._task(self._io.call(warm, source._descriptor, self._descriptor, runs))
        source.lend_to(warming)
        return await asyncio.shield(warming)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
            self._closing.add_done_callback(self._ended)
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        while self._is_used():
            if self._tasks:
                await asyncio.wait(set(self._tasks))
            elif self._users:
                self._unused = asyncio.get_running_loop().create_future()
                await self._unused
            else:
                await self._io.settle(self._descriptor)
                await self._io.settle(self._other_descriptor)
        # No await between the look above and this: who comes now finds no number (EBADF).
        numbers = [self._descriptor, self._other_descriptor]
        self._descriptor = self._other_descriptor = -1
        self._carriers.shutdown(wait=False)  # they are idle
        failure = None
        for number in numbers:
            try:
                if number >= 0:
                    await self._io.call(os.close, number)
            except OSError as error:  # a late write error; the number is free all the same
                failure = failure or error
        if failure is not None:
            raise failure

    def _is_used(self) -> bool:
        busy = self._io.is_busy(self._descriptor) or self._io.is_busy(self._other_descriptor)
        return busy or self._users > 0 or bool(self._tasks)

    def _refuse_closed(self) -> None:
        if self._descriptor < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    async def _other(self) -> int:
        """Return the second descriptor, or -1 where this can't be opened with O_DIRECT."""
        if self._other_descriptor < 0 and not self._no_other:
            await self._own(self._open_other())
        return self._other_descriptor

    async def _open_other(self) -> None:
        async with self._other_lock:
            if self._other_descriptor >= 0 or self._no_other:
                return
            try:
                self._other_descriptor = await self._io.call(reopen, self._descriptor)
            except OSError as error:
                if self._direct or error.errno != errno.EINVAL:
                    raise
                self._no_other = True

    _no_other = False  # O_DIRECT was refused

    async def _use(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, which has a descriptor's number; `close` waits until it has ended.

        A cancelled one leaves an operation that the `FileIo` knows, or none at all.
        """
        self._users += 1
        try:
            return await work
        finally:
            self._users -= 1
            if self._unused is not None and not self._users:
                if not self._unused.done():
                    self._unused.set_result(None)
                self._unused = None

    async def _own(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` as a task of this backend: a cancelled caller doesn't stop it half way."""
        return await asyncio.shield(self._task(work))

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self.lend_to(task)
        return task

    def lend_to(self, task: asyncio.Future[Any]) -> None:
        """Have `close` wait for something that uses a descriptor of this."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # an abandoned answer is nobody's unhandled error


def _blocks(offset: int, stop: int, unit: int) -> list[tuple[int, int, bool]]:
    """Cut a range into (offset, length, whole blocks?): edges of less than a block, and pieces."""
    if offset >= stop:
        return []
    start, end = round_up(offset, unit), round_down(stop, unit)
    if start > end:
        return [(offset, stop - offset, False)]
    middle = [(at, count, True) for at, count in split(start, end - start, PIECE_BYTES_MAX)]
    head = [(offset, start - offset, False)] if offset < start else []
    tail = [(end, stop - end, False)] if end < stop else []
    return head + middle + tail
