"""Copying between two descriptors in a thread: read, hash, write, with one buffer a thread.

The buffer stays warm in the processor's cache and is never given back, the loop sees one call a
chunk instead of its bytes, and none of the system calls holds the interpreter. A 1 GiB copy takes
0.6 s of processor time this way, and 1.5 s through the loop.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64

from mirrord.core.geometry import KIB, MIB, Extent, Run, Status, runs_of, split
from mirrord.storage import durable
from mirrord.storage.holes import find_extents

BUFFER_BYTES = MIB

# Runs of zeroes are found in units of the usual largest block of file systems.
ZERO_BYTES = 64 * KIB

# Copied data from this size on leaves the page cache by itself; less is what a guest just wrote.
ONCE_BYTES_MIN = 64 * KIB

# So many copied pieces are handed to the storage before the first of them is dropped: by then it is
# stored, and can be.
BEHIND_MAX = 16

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 0x01, 0x02

# linux/fs.h since Linux 6.14: start storing at once, and drop the pages afterwards.
_RWF_DONTCACHE = 0x80

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_buffers = threading.local()
_ZEROES = bytes(BUFFER_BYTES)


class Wake:
    """What copying leaves behind in the page cache of one file: nothing, where that can be had.

    `flags` go with preadv2(2) and pwritev2(2): RWF_DONTCACHE until the kernel or the file system
    doesn't know it. Then `hand_on` does it, if `by_hand`. May be used from any thread.
    """

    def __init__(self, descriptor: int, *, cached: bool, by_hand: bool) -> None:
        self._descriptor = descriptor
        self.flags = _RWF_DONTCACHE if cached else 0
        self._by_hand = cached and by_hand
        self._written: deque[tuple[int, int]] = deque()  # handed on, and not dropped yet

    def do_without(self, flags: int, error: OSError) -> None:
        """Take the error of an operation with these flags for their being unknown, or raise it."""
        if not flags or error.errno not in _UNSUPPORTED:
            raise error
        self.flags = 0

    @property
    def hands_on(self) -> bool:
        """Whether `hand_on` has something to do."""
        return self._by_hand and not self.flags

    def hand_on(self, offset: int, length: int) -> None:
        """Begin to store what was just written, and drop what is stored by now. Blocks.

        POSIX_FADV_DONTNEED does both: it begins to store dirty pages and drops clean ones.
        """
        if not self.hands_on:
            return
        self._written.append((offset, length))
        pieces = [(offset, length)]
        if len(self._written) > BEHIND_MAX:
            pieces.append(self._written.popleft())
        for piece in pieces:
            os.posix_fadvise(self._descriptor, *piece, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class Side:
    """One of two files that go through the page cache."""

    descriptor: int
    wake: Wake
    punches: bool = False  # zeroes become holes of the target; else they are written
    has_holes: bool = False  # the source may have some, and tells


def carry(
    source: Side, target: Side, runs: Sequence[tuple[int, int]], hasher: xxh3_64 | None
) -> int:
    """Make (offset, length) of the target equal to the source's; return how much wasn't zeroes.

    Blocks. Every byte goes to `hasher`, in order; after an error it has had some of them.

    Raises:
        OSError: either side's; EIO too where the source has become shorter.
    """
    moved = 0
    for offset, length in runs:
        end = offset + length
        while offset < end:
            extents = _extents(source, offset, end)
            for extent in extents:
                for at, count in split(extent.offset, extent.length, BUFFER_BYTES):
                    if extent.status is Status.DATA:
                        moved += _carry_data(source, target, at, count, hasher)
                    else:
                        _carry_hole(target, at, count, hasher)
            offset = extents[-1].end
    return moved


def _extents(source: Side, offset: int, end: int) -> list[Extent]:
    if not source.has_holes:
        return [Extent(offset, end - offset, Status.DATA)]
    if os.fstat(source.descriptor).st_size < end:  # else what is gone would be a hole
        raise OSError(errno.EIO, "the source is shorter now")
    return find_extents(source.descriptor, offset, end)


def _carry_hole(target: Side, offset: int, length: int, hasher: xxh3_64 | None) -> None:
    zeroes = memoryview(_ZEROES)[:length]
    if hasher is not None:
        hasher.update(zeroes)
    _put(target, offset, zeroes, [Run(0, length, True)])


def _carry_data(
    source: Side, target: Side, offset: int, length: int, hasher: xxh3_64 | None
) -> int:
    view = _buffer()[:length]
    _whole(os.preadv, source, offset, view)
    if hasher is not None:
        hasher.update(view)
    runs = runs_of(view, ZERO_BYTES)
    _put(target, offset, view, runs)
    if length >= ONCE_BYTES_MIN:
        target.wake.hand_on(offset, length)
    return sum(run.length for run in runs if not run.is_zero)


def _put(target: Side, offset: int, view: memoryview, runs: list[Run]) -> None:
    for start, length, is_zero in runs:
        if is_zero and target.punches:
            mode = FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE
            durable.fallocate(target.descriptor, mode, offset + start, length)
        else:
            _whole(os.pwritev, target, offset + start, view[start : start + length])


def _whole(move: Callable[..., int], side: Side, offset: int, view: memoryview) -> None:
    """Read or write until all is done."""
    once = len(view) >= ONCE_BYTES_MIN
    while view:
        flags = side.wake.flags if once else 0
        try:
            done = move(side.descriptor, (view,), offset, flags)
        except OSError as error:
            side.wake.do_without(flags, error)
            continue
        if done == 0:
            raise OSError(errno.EIO, "nothing was moved: it is shorter now")
        view, offset = view[done:], offset + done


def _buffer() -> memoryview:
    """Return this thread's buffer, page-aligned."""
    if not hasattr(_buffers, "view"):
        _buffers.view = memoryview(mmap.mmap(-1, BUFFER_BYTES))
    view: memoryview = _buffers.view
    return view
