"""What a frontend needs of a disk. `engine.disk.Disk` is the real one; tests bring their own.

Frontends check a request before it gets here: its range lies inside the disk and isn't empty.
A failure is an `OSError` with an errno, and nothing else.

A frontend starts each of these coroutines by hand, outside any task. One that waits for a
`Completion` goes on by hand, too; only one that waits for anything else becomes a task. So before
that, none may use `asyncio.current_task` or `asyncio.timeout`. Once started, one runs to its end,
whether or not its client is still there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine, Generator, Sequence
from types import coroutine
from typing import Any, Protocol, TypeVar

from mirrord.core.geometry import Extent

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class Door(Protocol):
    """The one way of a guest's request into a disk."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def read_only(self) -> bool: ...

    def read(self, offset: int, length: int) -> Coroutine[Any, Any, Buffer]:
        """Return exactly `length` bytes that never change afterwards."""

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> Coroutine[Any, Any, None]:
        """Write `data`, which doesn't change before this returns; durable then with `fua`."""

    def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, punch: bool = True, fast: bool = False
    ) -> Coroutine[Any, Any, None]:
        """Make the range read as zeroes; ENOTSUP at once with `fast` where writing is as fast."""

    def trim(self, offset: int, length: int, *, fua: bool = False) -> Coroutine[Any, Any, None]:
        """Give the range's storage back."""

    def flush(self) -> Coroutine[Any, Any, None]:
        """Make every write that completed before this call durable."""

    def cache(self, offset: int, length: int) -> Coroutine[Any, Any, None]:
        """Hint: the range will be read soon."""

    def extents(self, offset: int, length: int) -> Coroutine[Any, Any, Sequence[Extent]]:
        """Return extents (DATA, ZERO, HOLE) from `offset` on; they may stop early."""

    def dirty_extents(self, offset: int, length: int) -> Sequence[Extent]:
        """Return extents (DIRTY, CLEAN) from `offset` on; they may stop early."""


def carry_on(work: Coroutine[Any, Any, T], waits_for: Any) -> Awaitable[T]:
    """Return what awaits the rest of `work`, whose first step was taken by hand just now.

    `waits_for` is what that step yielded. Several requests may wait for one future; it is marked
    as yielded only between a yield and the task that sees it (`_asyncio_future_blocking`, part
    of the protocol between futures and tasks), so the mark is taken off until a task asks.
    """
    if waits_for is not None:  # a bare yield, as of `sleep(0)`, waits for nothing
        waits_for._asyncio_future_blocking = False
    return _rest(work, waits_for)


@coroutine
def _rest(work: Coroutine[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """Yield the future again, now to the task that awaits this; then pass everything on, a
    cancellation too, as `await work` would have done."""
    if waits_for is not None:
        waits_for._asyncio_future_blocking = True
    while True:
        thrown: BaseException | None = None
        try:
            yield waits_for
        except BaseException as error:
            thrown = error
        try:
            waits_for = work.send(None) if thrown is None else work.throw(thrown)
        except StopIteration as stop:
            result: T = stop.value
            return result
