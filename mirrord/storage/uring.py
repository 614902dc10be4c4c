"""io_uring driven through ctypes, no compiled part: what would block runs in the kernel.

`Ring` is the shared memory and its counters, `UringIo` makes the interface of `fileio` of it:

* Operations of one loop iteration go to the kernel in one io_uring_enter(2), through call_soon;
  but at once if it has none of ours.
* The loop watches the ring's own descriptor, readable while there are completions. Whoever waits
  for one may go on at once, and may start more (`Completion`).
* The rings can't overflow: at most as many operations are in flight as the completion ring has
  entries, later ones wait in a queue here, first come first served; a full submission ring is
  handed over at once.
* The memory of an operation (a pool slot or a `bytes` object) belongs to its entry in `_pending`
  until the completion arrives, whatever becomes of the coroutine that waits.

The kernel itself decides how an operation runs: at once (page cache), by the device's interrupt
(O_DIRECT), or in one of its worker threads. See io_uring(7), io_uring_setup(2),
io_uring_enter(2).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import platform
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from mirrord.storage.backend import Buffer
from mirrord.storage.completion import Completion
from mirrord.storage.durable import check
from mirrord.storage.fileio import FileIo
from mirrord.storage.memory_pool import (
    POOLED_READ_BYTES_MAX,
    BufferPool,
    Slot,
    aligned_address,
    constant,
    constant_address,
    new_aligned,
)

_SYS_SETUP, _SYS_ENTER = 425, 426  # the same on every machine
_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000
_SETUP_CLAMP, _SETUP_COOP_TASKRUN = 1 << 4, 1 << 8
_FEATURE_SINGLE_MMAP, _FEATURE_NODROP = 1 << 0, 1 << 1
_FEATURE_RW_CUR_POS = 1 << 3  # Linux 5.6, as are all operations used here
_FEATURES = _FEATURE_SINGLE_MMAP | _FEATURE_NODROP | _FEATURE_RW_CUR_POS

_OP_FSYNC, _OP_FALLOCATE, _OP_READ, _OP_WRITE = 3, 17, 22, 23
_FSYNC_DATASYNC = 1

# Entries of the submission ring; the completion ring has twice as many, and that is the limit of
# operations in flight: four clients at queue depth 64. The rings take 36 KiB.
ENTRIES = 128

# A submission that the kernel had no memory for is tried again this much later.
_RETRY_DELAY_S = 0.001

# How often EINTR or EAGAIN of one operation is answered by another try.
_TRIES_MAX = 16

# What io_uring_enter(2) says when it took nothing, and may take it later. ENOMEM is not in its
# manual page: a thread's first call allocates.
_BUSY = (errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOMEM)

_COUNTER_MASK = 0xFFFFFFFF

_SYSCALL = ctypes.CDLL(None, use_errno=True)


def _syscall(*argument_types: type) -> Any:
    function = _SYSCALL["syscall"]  # a fresh object each time, so each may have its own types
    function.restype = ctypes.c_long
    function.argtypes = [ctypes.c_long, *argument_types]
    return function


_setup = _syscall(ctypes.c_uint, ctypes.c_void_p)
_enter = _syscall(
    ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t
)


class Ring:
    """The submission and completion rings: memory shared with the kernel, and nothing more."""

    _pack = struct.Struct("<BBHiQQIIQQQQ").pack_into
    _unpack = struct.Struct("<QiI").unpack_from

    def __init__(self, entries: int = ENTRIES) -> None:
        """Set the rings up.

        Raises:
            OSError: EPERM or ENOSYS where io_uring is forbidden or unknown, ENOTSUP where the
                kernel is older than 5.6, ENOMEM at the limit of locked memory.
        """
        self.fd, parameters = _set_up(entries)
        sq_entries, self.in_flight_max = struct.unpack_from("<2I", parameters, 0)
        self.entries: int = sq_entries
        _, sq_tail, _, _, _, _, sq_array, _ = struct.unpack_from("<8I", parameters, 40)
        cq_head, cq_tail, _, _, _, cqes, _, _ = struct.unpack_from("<8I", parameters, 80)
        size = max(sq_array + sq_entries * 4, cqes + self.in_flight_max * 16)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        try:
            self._rings = mmap.mmap(self.fd, size, flags=flags, offset=_OFF_SQ_RING)
            self._sqes = mmap.mmap(self.fd, sq_entries * 64, flags=flags, offset=_OFF_SQES)
        except OSError:
            os.close(self.fd)
            raise
        self._memory = memoryview(self._rings)
        self._words = self._memory[: size // 4 * 4].cast("I")
        self._completions = self._memory[cqes : cqes + self.in_flight_max * 16]
        self._sq_tail_at, self._cq_head_at, self._cq_tail_at = (
            sq_tail // 4, cq_head // 4, cq_tail // 4,
        )  # fmt: skip
        self._sq_mask, self._cq_mask = sq_entries - 1, self.in_flight_max - 1
        for index in range(sq_entries):
            self._words[sq_array // 4 + index] = index
        self._tail = self._head = 0
        self.queued = 0
        # x86 orders loads by itself; elsewhere a lock's acquire orders the ring's tail before
        # the entries that it announces.
        self._fence = None if platform.machine() == "x86_64" else threading.Lock()

    def prepare(
        self, operation: int, descriptor: int, offset: int, address: int, length: int, flags: int,
        key: int,
    ) -> None:  # fmt: skip
        """Queue one operation; there must be room: `queued` < `entries`.

        The memory at `address` must stay alive until the completion with `key` was reaped.
        """
        at = (self._tail & self._sq_mask) * 64
        self._pack(
            self._sqes, at, operation, 0, 0, descriptor, offset, address, length, flags, key,
            0, 0, 0,
        )  # fmt: skip
        self._tail = (self._tail + 1) & _COUNTER_MASK
        self.queued += 1

    def submit(self) -> None:
        """Hand the queued operations over; `queued` says how many the kernel didn't take.

        Raises:
            OSError: one of `_BUSY`: nothing was taken, try again later.
        """
        self._words[self._sq_tail_at] = self._tail
        self.queued -= check(_enter(_SYS_ENTER, self.fd, self.queued, 0, 0, None, 0))

    def reap(self) -> list[tuple[int, int, int]]:
        """Return (key, result, flags) of every completion that has arrived."""
        tail = self._words[self._cq_tail_at]
        if self._fence is not None:
            with self._fence:
                pass
        done = []
        head = self._head
        while head != tail:
            done.append(self._unpack(self._completions, (head & self._cq_mask) * 16))
            head = (head + 1) & _COUNTER_MASK
        if done:
            self._head = self._words[self._cq_head_at] = head
        return done

    def close(self) -> None:
        """Release the rings. Nothing may be in flight."""
        self._completions.release()
        self._words.release()
        self._memory.release()
        self._sqes.close()
        self._rings.close()
        os.close(self.fd)


def _set_up(entries: int) -> tuple[int, bytes]:
    """Return the ring's descriptor and the kernel's `struct io_uring_params`."""
    # Cooperative task running (Linux 5.19) spares an interrupt for each completion.
    for flags in (_SETUP_CLAMP | _SETUP_COOP_TASKRUN, _SETUP_CLAMP):
        parameters = ctypes.create_string_buffer(struct.pack("<8x I 108x", flags), 120)
        try:
            descriptor = check(_setup(_SYS_SETUP, entries, parameters))
            break
        except OSError as error:
            if error.errno != errno.EINVAL or flags == _SETUP_CLAMP:
                raise
    (features,) = struct.unpack_from("<I", parameters.raw, 20)
    if features & _FEATURES != _FEATURES:
        os.close(descriptor)
        raise OSError(errno.ENOTSUP, "io_uring of Linux 5.6 or later is needed")
    return descriptor, parameters.raw


class _Begun:
    """Takes a future's place for a write that nobody awaits: it is told, and goes on if short."""

    __slots__ = ("address", "descriptor", "ended", "io", "keep", "length", "offset", "tries")

    def __init__(
        self, io: UringIo, descriptor: int, offset: int, keep: Buffer,
        ended: Callable[[OSError | None], None],
    ) -> None:  # fmt: skip
        self.io = io
        self.descriptor = descriptor
        self.offset = offset
        self.address = constant_address(keep)
        self.length = len(keep)
        self.keep = keep
        self.ended = ended
        self.tries = 0

    def go_on(self) -> None:
        """Start, or start the rest."""
        self.io._start(
            _OP_WRITE, self.descriptor, self.offset, self.address, self.length, 0,
            keep=self.keep, tell=self,
        )  # fmt: skip

    def end(self, result: int | bytes) -> None:
        """Take the kernel's result. What `ended` raises is told to the loop, as a callback's."""
        try:
            self._end(result)
        except (Exception, asyncio.CancelledError) as error:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "telling of a write's end failed", "exception": error}
            )

    def _end(self, result: int | bytes) -> None:
        if result == self.length:
            self.ended(None)
            return
        try:
            moved = _progress(cast(int, result), self.tries)
        except OSError as error:
            self.ended(error)
            return
        self.tries += 1
        self.offset, self.address, self.length = (
            self.offset + moved, self.address + moved, self.length - moved,
        )  # fmt: skip
        self.go_on()


# What a started operation owns until its completion: who is told, the descriptor, and its memory:
# a slot to give back, or an object to keep alive. The last says "copy the slot's content out".
_Entry = tuple[Completion | _Begun, int, Slot | None, object, bool]


class UringIo(FileIo):
    """File operations through one io_uring."""

    name = "io_uring"

    def __init__(self, entries: int = ENTRIES, pool: BufferPool | None = None) -> None:
        """Set up the ring. Raises `OSError` as `Ring` does."""
        super().__init__()
        self._ring = Ring(entries)
        self.pool = pool or BufferPool()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: dict[int, _Entry] = {}
        self._backlog: deque[tuple[int, int, int, int, int, int, int]] = deque()
        self._settling: list[asyncio.Future[None]] = []
        self._next_key = 0
        self._in_flight = 0
        self._submit_scheduled = False

    # The interface of `fileio`.

    async def read(self, descriptor: int, offset: int, length: int, *, flags: int = 0) -> Buffer:
        data, address = new_aligned(length)
        done = tries = 0
        while done < length:
            result = await self._start(
                _OP_READ, descriptor, offset + done, address + done, length - done, flags,
                keep=data,
            )  # fmt: skip
            done += _progress(result, tries)
            tries += 1
        return data

    async def write(
        self, descriptor: int, offset: int, data: Buffer, *, dsync: bool, flags: int = 0
    ) -> None:
        whole = constant(data)
        address = constant_address(whole)
        flags |= os.RWF_DSYNC if dsync else 0
        length = len(whole)
        done = tries = 0
        while done < length:
            result = await self._start(
                _OP_WRITE, descriptor, offset + done, address + done, length - done, flags,
                keep=whole,
            )  # fmt: skip
            done += _progress(result, tries)
            tries += 1

    def begin_write(
        self, descriptor: int, offset: int, data: Buffer, ended: Callable[[OSError | None], None]
    ) -> bool:
        _Begun(self, descriptor, offset, constant(data), ended).go_on()
        return True

    async def read_direct(self, descriptor: int, offset: int, length: int) -> Buffer:
        if length > POOLED_READ_BYTES_MAX:
            return await self.read(descriptor, offset, length)
        parts: list[bytes] = []
        tries = 0
        while True:
            slot = self.pool.take(length) or await self.pool.wait(length)
            result = await self._start(
                _OP_READ, descriptor, offset, slot.address, length, 0, slot, copy_out=True
            )
            if type(result) is not bytes:
                _progress(result, tries)
                tries += 1
                continue
            parts.append(result)
            offset, length = offset + len(result), length - len(result)
            if length == 0:
                return result if len(parts) == 1 else b"".join(parts)

    async def write_direct(
        self, descriptor: int, offset: int, data: Buffer, *, dsync: bool
    ) -> None:
        if aligned_address(data):
            await self.write(descriptor, offset, data, dsync=dsync)
            return
        flags = os.RWF_DSYNC if dsync else 0
        tries = 0
        while length := len(data):
            slot = self.pool.take(length) or await self.pool.wait(length)
            slot.view[:length] = data
            result = await self._start(
                _OP_WRITE, descriptor, offset, slot.address, length, flags, slot
            )
            if result == length:
                return
            done = _progress(result, tries)
            tries += 1
            offset, data = offset + done, memoryview(data)[done:]

    async def datasync(self, descriptor: int) -> None:
        result = await self._start(_OP_FSYNC, descriptor, 0, 0, 0, _FSYNC_DATASYNC)
        if result < 0:  # never tried again: a second fsync would lie
            raise OSError(-result, os.strerror(-result))

    async def fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> None:
        tries = 0
        while True:
            result = await self._start(_OP_FALLOCATE, descriptor, offset, length, mode, 0)
            if result == 0:
                return
            _progress(result, tries)
            tries += 1

    async def settle(self, descriptor: int) -> None:
        keys = {key for key, entry in self._pending.items() if entry[1] == descriptor}
        while not keys.isdisjoint(self._pending):
            await self._one_reaped()

    def is_busy(self, descriptor: int) -> bool:
        return any(entry[1] == descriptor for entry in self._pending.values())

    async def close(self) -> None:
        while self._pending:
            await self._one_reaped()
        if not self._closed:
            if self._loop is not None:
                self._loop.remove_reader(self._ring.fd)
            self._ring.close()
            self._closed = True
        await super().close()

    # The shell around the ring. No await below: each function runs to its end undisturbed.

    def _start(
        self, operation: int, descriptor: int, offset: int, address: int, length: int, flags: int,
        slot: Slot | None = None, keep: object = None, copy_out: bool = False,
        tell: _Begun | None = None,
    ) -> Any:  # fmt: skip
        """Start an operation; its result is the kernel's, or the bytes copied out.

        `tell` is told of it; without that, what is returned can be awaited for it.
        """
        loop = self._loop or self._attach()
        completion = tell or Completion(loop)
        key = self._next_key = self._next_key + 1
        self._pending[key] = (completion, descriptor, slot, keep, copy_out)
        if self._in_flight == self._ring.in_flight_max:
            self._backlog.append((operation, descriptor, offset, address, length, flags, key))
            return completion
        if self._ring.queued == self._ring.entries:
            self._submit()
            if self._ring.queued == self._ring.entries:  # the kernel is out of memory just now
                self._backlog.append((operation, descriptor, offset, address, length, flags, key))
                return completion
        self._in_flight += 1
        self._ring.prepare(operation, descriptor, offset, address, length, flags, key)
        if self._in_flight == 1:
            self._submit()  # the kernel has nothing to do: each moment counts
        elif not self._submit_scheduled:
            self._submit_scheduled = True
            loop.call_soon(self._submit_now)
        return completion

    def _attach(self) -> asyncio.AbstractEventLoop:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ring.fd, self._reap)
        return self._loop

    def _submit_now(self) -> None:
        self._submit_scheduled = False
        if not self._closed:
            self._submit()

    def _submit(self) -> None:
        try:
            self._ring.submit()
        except OSError as error:
            if error.errno not in _BUSY:
                raise
        if self._ring.queued and not self._submit_scheduled:
            self._submit_scheduled = True
            assert self._loop is not None
            self._loop.call_later(_RETRY_DELAY_S, self._submit_now)

    def _reap(self) -> None:
        pending, give = self._pending, self.pool.give
        reaped = self._ring.reap()
        self._in_flight -= len(reaped)
        if self._backlog:
            self._go_on()  # before anybody who may start more
        for key, result, _ in reaped:
            completion, _, slot, _, copy_out = pending.pop(key)
            answer: int | bytes = result
            if slot is not None:
                if copy_out and result > 0:
                    answer = slot.view[:result].tobytes()
                give(slot)
            completion.end(answer)
        if self._settling:
            waiters, self._settling = self._settling, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _go_on(self) -> None:
        """Start what had to wait for room."""
        ring, backlog = self._ring, self._backlog
        while backlog and self._in_flight < ring.in_flight_max and ring.queued < ring.entries:
            self._in_flight += 1
            ring.prepare(*backlog.popleft())
        self._submit()

    async def _one_reaped(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settling.append(waiter)
        await waiter


def _progress(result: int, tries: int) -> int:
    """Return how many bytes an operation moved; 0 says that it is worth another try.

    Raises:
        OSError: it failed, or moved nothing (EIO).
    """
    if result > 0:
        return result
    if result in (-errno.EINTR, -errno.EAGAIN) and tries < _TRIES_MAX:
        return 0
    code = -result or errno.EIO
    raise OSError(code, os.strerror(code) if result else "nothing was moved: it is shorter now")
