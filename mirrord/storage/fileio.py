"""How file operations run without blocking the event loop: the interface, and threads.

`FileIo` is what the backends over a descriptor use. `uring.UringIo` implements it with io_uring,
`ThreadIo` here with a pool of threads, for systems that forbid io_uring. Both keep these rules:

* An operation that was started ends by itself. Cancelling the coroutine that waits abandons the
  answer; the memory of the operation stays alive until the kernel is done with it.
* Reads and writes are whole: short ones are continued, one that moves nothing is EIO.
* `settle` waits for what is in flight on a descriptor; only then may it be closed.

Direct operations (O_DIRECT) need aligned memory. Small ones and writes of anything that could
change go through `BufferPool`, copied once, so that pinned memory is bounded. Larger reads get a
buffer of their own, page-aligned (`new_aligned`), which is the answer; when such an answer is
written again, it isn't copied at all. Buffered operations go straight into or out of `bytes`
objects, which nobody can change and which the operation keeps alive.
"""

from __future__ import annotations

import asyncio
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from mirrord.storage import durable
from mirrord.storage.backend import Buffer
from mirrord.storage.memory_pool import (
    POOLED_READ_BYTES_MAX,
    BufferPool,
    Slot,
    aligned_address,
    constant,
    new_aligned,
    writable,
)

P = ParamSpec("P")
T = TypeVar("T")

# Threads of the fallback. Each carries one operation; the prototype's 16 gave half of io_uring's
# rate, more gave nothing on two cores.
THREADS_MAX = 16

# Threads for what has no asynchronous form (lseek, ioctl, copy_file_range, renames).
CALL_THREADS_MAX = 4


class FileIo(ABC):
    """Runs operations on descriptors beside the event loop. Bound to the loop of its first use."""

    name: str  # io_uring or threads

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._calls: set[asyncio.Future[Any]] = set()

    @abstractmethod
    async def read(self, descriptor: int, offset: int, length: int, *, flags: int = 0) -> Buffer:
        """Read exactly `length` bytes through the page cache. `flags`: RWF_* of preadv2(2)."""

    @abstractmethod
    async def write(
        self, descriptor: int, offset: int, data: Buffer, *, dsync: bool, flags: int = 0
    ) -> None:
        """Write all of `data` through the page cache; durable on return with `dsync`.

        `flags`: more RWF_* of pwritev2(2).

        `data` that isn't `bytes` is copied first, so that an abandoned write stays what it was.
        """

    def begin_write(
        self, descriptor: int, offset: int, data: Buffer, ended: Callable[[OSError | None], None]
    ) -> bool:
        """Begin a write through the page cache; `Backend.begin_write` says what `ended` is."""
        return False

    @abstractmethod
    async def read_direct(self, descriptor: int, offset: int, length: int) -> Buffer:
        """Read aligned `length` bytes at an aligned offset."""

    @abstractmethod
    async def write_direct(
        self, descriptor: int, offset: int, data: Buffer, *, dsync: bool
    ) -> None:
        """Write aligned `data` at an aligned offset.

        At most `PIECE_BYTES_MAX` of it, or any length of what `aligned_address` knows.
        """

    @abstractmethod
    async def datasync(self, descriptor: int) -> None:
        """fdatasync(2)."""

    @abstractmethod
    async def fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""

    @abstractmethod
    async def settle(self, descriptor: int) -> None:
        """Wait for every operation now in flight on `descriptor`, abandoned ones included."""

    @abstractmethod
    def is_busy(self, descriptor: int) -> bool:
        """Tell whether an operation is in flight on `descriptor`."""

    def submit(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Start a blocking function in a thread. Who awaits the future has to shield it."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(CALL_THREADS_MAX, "mirrord-call")
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))
        self._calls.add(future)
        future.add_done_callback(self._called)
        return future

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking function in a thread. Cancelling abandons the answer, not the call."""
        return await asyncio.shield(self.submit(function, *args, **kwargs))

    async def take(self, opening: asyncio.Future[T], release: Callable[[T], object]) -> T:
        """Return what a submitted function opens; if the caller is cancelled, `release` gets it.

        That runs in a thread, and `settle_calls` waits for it.
        """

        def ended(_: asyncio.Future[T]) -> None:
            if not opening.cancelled() and opening.exception() is None:
                self.submit(release, opening.result())

        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            if opening.done():
                ended(opening)
            else:
                opening.add_done_callback(ended)
            raise

    def _called(self, future: asyncio.Future[T]) -> None:
        self._calls.discard(future)
        if not future.cancelled():
            future.exception()  # an abandoned answer is nobody's unhandled error

    async def settle_calls(self) -> None:
        """Wait for the functions that `call` started."""
        while self._calls:
            await asyncio.wait(set(self._calls))

    async def close(self) -> None:
        """Wait for everything in flight and release what this holds. Idempotent."""
        await self.settle_calls()
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = None


class ThreadIo(FileIo):
    """Every operation is a blocking call in one of a few threads."""

    name = "threads"

    def __init__(self) -> None:
        super().__init__()
        self.pool = BufferPool()
        self._workers = ThreadPoolExecutor(THREADS_MAX, "mirrord-io")
        self._in_flight: dict[asyncio.Future[Any], int] = {}

    async def read(self, descriptor: int, offset: int, length: int, *, flags: int = 0) -> Buffer:
        data, address = new_aligned(length)
        view = writable(address, length)
        await self._run(descriptor, lambda: _read_whole(descriptor, view, offset, flags))
        return data

    async def write(
        self, descriptor: int, offset: int, data: Buffer, *, dsync: bool, flags: int = 0
    ) -> None:
        view = memoryview(constant(data))
        flags |= os.RWF_DSYNC if dsync else 0
        await self._run(descriptor, lambda: _write_whole(descriptor, view, offset, flags))

    async def read_direct(self, descriptor: int, offset: int, length: int) -> Buffer:
        if length > POOLED_READ_BYTES_MAX:
            return await self.read(descriptor, offset, length)
        slot = self.pool.take(length) or await self.pool.wait(length)
        view = slot.view[:length]

        def work() -> bytes:
            _read_whole(descriptor, view, offset)
            return view.tobytes()

        return await self._run(descriptor, work, slot)

    async def write_direct(
        self, descriptor: int, offset: int, data: Buffer, *, dsync: bool
    ) -> None:
        length = len(data)
        if aligned_address(data):
            await self.write(descriptor, offset, data, dsync=dsync)
            return
        slot = self.pool.take(length) or await self.pool.wait(length)
        view = slot.view[:length]
        view[:] = data
        flags = os.RWF_DSYNC if dsync else 0
        await self._run(descriptor, lambda: _write_whole(descriptor, view, offset, flags), slot)

    async def datasync(self, descriptor: int) -> None:
        if descriptor < 0:  # a closed disk's: os.fdatasync would call that a ValueError
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        await self._run(descriptor, lambda: os.fdatasync(descriptor))

    async def fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> None:
        await self._run(descriptor, lambda: durable.fallocate(descriptor, mode, offset, length))

    async def settle(self, descriptor: int) -> None:
        waiting = [future for future, user in self._in_flight.items() if user == descriptor]
        if waiting:
            await asyncio.wait(waiting)

    def is_busy(self, descriptor: int) -> bool:
        return descriptor in self._in_flight.values()

    async def close(self) -> None:
        if self._in_flight:
            await asyncio.wait(set(self._in_flight))
        self._workers.shutdown()
        await super().close()

    async def _run(self, descriptor: int, work: Callable[[], T], slot: Slot | None = None) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.run_in_executor(self._workers, work)
        self._in_flight[future] = descriptor

        def ended(_: asyncio.Future[T]) -> None:
            del self._in_flight[future]
            if slot is not None:
                self.pool.give(slot)
            future.exception()  # an abandoned answer is nobody's unhandled error

        future.add_done_callback(ended)
        return await asyncio.shield(future)


async def outcome(work: Future[T], *lend_to: Callable[[asyncio.Future[T]], None]) -> T:
    """Return what a thread comes to. Each of `lend_to` is told what its descriptor waits for.

    A caller that is cancelled stops what no thread has begun; the rest ends by itself.
    """
    working = asyncio.wrap_future(work)
    for lend in lend_to:
        lend(working)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        work.cancel()
        raise


def open_io(choice: str = "auto") -> FileIo:
    """Return the way to do file operations: `auto`, `io_uring` or `threads`.

    `auto` is io_uring, or threads where this system forbids it.

    Raises:
        OSError: `io_uring` was asked for and isn't to be had.
    """
    from mirrord.storage.uring import UringIo  # it imports this module

    if choice != "threads":
        try:
            return UringIo()
        except OSError:
            if choice == "io_uring":
                raise
    return ThreadIo()


def _read_whole(descriptor: int, view: memoryview, offset: int, flags: int = 0) -> None:
    while view:
        done = os.preadv(descriptor, [view], offset, flags)
        if done == 0:
            raise OSError(errno.EIO, "nothing was moved: it is shorter now")
        view, offset = view[done:], offset + done


def _write_whole(descriptor: int, view: memoryview, offset: int, flags: int) -> None:
    while view:
        done = os.pwritev(descriptor, [view], offset, flags)
        if done == 0:
            raise OSError(errno.EIO, "nothing was moved")
        view, offset = view[done:], offset + done


async def all_of(pieces: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Run the pieces side by side; return or raise only when every one has ended."""
    results = await asyncio.gather(*pieces, return_exceptions=True)
    answers: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        answers.append(result)
    return answers
