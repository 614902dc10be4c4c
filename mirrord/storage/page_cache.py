"""What passes through the page cache of this machine, and what stays there.

A copy should leave it as it was, so that the guest's data is not thrown out for it (`Wake`). After
a cutover the guest should find on the target what it had on the source (`warm`). All of it blocks.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Sequence

from mirrord.core.geometry import MIB, round_up

BUFFER_BYTES = MIB

# So many copied pieces are handed to the storage before the first of them is dropped: by then it is
# stored, and can be.
BEHIND_MAX = 16

# linux/fs.h since Linux 6.14: start storing at once, and drop the pages afterwards.
_RWF_DONTCACHE = 0x80

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_MAP_FAILED = ctypes.c_void_p(-1).value
_buffers = threading.local()

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap, _mincore = _libc.mmap, _libc.munmap, _libc.mincore
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_longlong),
]
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


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


def drop(descriptor: int, offset: int, length: int) -> None:
    """Give clean pages back."""
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def warm(source: int, target: int, runs: Sequence[tuple[int, int]]) -> int:
    """Read into the cache, of the target, each run of which it has some page of the source.

    Return how many bytes that was. POSIX_FADV_WILLNEED would do without a buffer, but reads no more
    than one request's worth.
    """
    warmed = 0
    for offset, length in runs:
        if 1 in resident(source, offset, length):
            warmed += os.preadv(target, (thread_buffer()[:length],), offset)
    return warmed


def resident(descriptor: int, offset: int, length: int) -> bytes:
    """Return a byte for each page of the range, whose offset is a page's: is it cached (0 or 1)?

    By mincore(2). A file that may be written tells the truth; of another everything is 1.
    """
    address = _mmap(None, length, 0, mmap.MAP_SHARED, descriptor, offset)
    if address == _MAP_FAILED:
        raise _error()
    try:
        states = ctypes.create_string_buffer(round_up(length, mmap.PAGESIZE) // mmap.PAGESIZE)
        if _mincore(address, length, states) < 0:
            raise _error()
        return bytes(state & 1 for state in states.raw)  # the other bits are reserved
    finally:
        _munmap(address, length)


def reopen(descriptor: int) -> int:
    """Open the same file in the other cache mode, for the same access."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    kept = flags & os.O_ACCMODE | os.O_CLOEXEC
    return os.open(f"/proc/self/fd/{descriptor}", kept | (flags ^ os.O_DIRECT) & os.O_DIRECT)


def thread_buffer() -> memoryview:
    """Return this thread's buffer of `BUFFER_BYTES`, page-aligned."""
    if not hasattr(_buffers, "view"):
        _buffers.view = memoryview(mmap.mmap(-1, BUFFER_BYTES))
    view: memoryview = _buffers.view
    return view


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
