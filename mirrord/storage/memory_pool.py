"""Memory for operations of the kernel: aligned, alive until it is done, and bounded.

Two kinds: slots out of one mapping, for what is copied anyway, and page-aligned `bytes` that a
read fills and returns. `bytes`, because nobody can change them: an operation whose caller was
cancelled goes on with what it was given. The addresses come from CPython's C interface.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
from collections import deque

from mirrord.core.geometry import KIB, MIB
from mirrord.storage.backend import Buffer

# Alignment that satisfies every device and the page cache.
PAGE_BYTES = 4 * KIB

# Sizes of pool slots and how many of each: 128 small ones for random guest I/O (two clients at
# queue depth 64), 64 KiB ones for a guest's usual larger requests, 1 MiB ones for copying with
# both sides direct. 17 MiB of address space; memory only where it was used.
SLOTS = ((4 * KIB, 128), (64 * KIB, 64), (MIB, 12))
PIECE_BYTES_MAX = SLOTS[-1][0]

# Above this a read gets a buffer of its own: the allocation costs less than the copy.
POOLED_READ_BYTES_MAX = SLOTS[1][0]

# O_DIRECT wants memory aligned to the device's block at most; new_aligned gives whole pages.
_MEMORY_UNIT_BYTES = 4 * KIB


# glibc gives large buffers back to the kernel at once, and gets them again a moment later: a
# quarter of a copy's processor time, 1,217 page faults for each MiB written to a share. Both limits
# or neither: one alone turns off what glibc adapts.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_BYTES = 32 * MIB
KEPT_BYTES = 16 * MIB


class _PyBuffer(ctypes.Structure):
    """Py_buffer of the C interface (PEP 3118)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
_bytes_address = ctypes.pythonapi.PyBytes_AsString
_bytes_address.restype = ctypes.c_void_p
_bytes_address.argtypes = [ctypes.py_object]
_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.restype = None
_release_buffer.argtypes = [ctypes.c_void_p]


class Slot:
    """A page-aligned buffer out of the pool."""

    __slots__ = ("address", "kind", "view")

    def __init__(self, view: memoryview, address: int, kind: int) -> None:
        self.view = view
        self.address = address
        self.kind = kind


class BufferPool:
    """Aligned buffers out of one mapping; who finds none free waits, first come first served."""

    def __init__(self, slots: tuple[tuple[int, int], ...] = SLOTS) -> None:
        self.sizes = [size for size, _ in slots]
        self._memory = mmap.mmap(-1, sum(size * count for size, count in slots))
        view = memoryview(self._memory)
        base = address_of(self._memory)
        self._free: list[list[Slot]] = []
        self._waiters: list[deque[asyncio.Future[Slot]]] = [deque() for _ in slots]
        at = 0
        for kind, (size, count) in enumerate(slots):
            free = []
            for _ in range(count):
                free.append(Slot(view[at : at + size], base + at, kind))
                at += size
            self._free.append(free)

    def take(self, length: int) -> Slot | None:
        """Return a free slot of at least `length` bytes, or None: then `wait`.

        None too while others wait for one of that size, so nobody overtakes.
        """
        for kind, size in enumerate(self.sizes):
            if length <= size:
                free = self._free[kind]
                return free.pop() if free and not self._waiters[kind] else None
        raise ValueError(f"no slot holds {length} bytes")

    async def wait(self, length: int) -> Slot:
        """Return a slot of at least `length` bytes, when it is this waiter's turn."""
        kind = next(kind for kind, size in enumerate(self.sizes) if length <= size)
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiters[kind].append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(future.result())  # it was handed over in the instant of the cancel
            raise

    def give(self, slot: Slot) -> None:
        """Return a slot; the longest waiter gets it."""
        waiters = self._waiters[slot.kind]
        while waiters:
            future = waiters.popleft()
            if not future.done():
                future.set_result(slot)
                return
        self._free[slot.kind].append(slot)

    @property
    def free_count(self) -> int:
        """Slots that nobody uses."""
        return sum(map(len, self._free))


def new_aligned(length: int) -> tuple[Buffer, int]:
    """Return `length` bytes that hold anything yet, and their page-aligned address.

    What is returned can't be changed from Python. The kernel, or `writable`, fills it before
    anyone sees it; it must be kept alive until then. Small ones are plain `bytes`, not aligned.
    """
    if length <= POOLED_READ_BYTES_MAX:
        plain: bytes = _new_bytes(None, length)
        return plain, _bytes_address(plain)
    whole: bytes = _new_bytes(None, length + _MEMORY_UNIT_BYTES)
    base: int = _bytes_address(whole)
    skipped = -base % _MEMORY_UNIT_BYTES
    return memoryview(whole)[skipped : skipped + length], base + skipped


def writable(address: int, length: int) -> memoryview:
    """Return a view to fill what `new_aligned` made. It keeps nothing alive."""
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")


def constant(data: Buffer) -> Buffer:
    """Return `data` if nobody can change it, else a copy: `bytes`, or a view of some."""
    if type(data) is bytes:
        return data
    if type(data) is memoryview and type(data.obj) is bytes and data.c_contiguous:
        return data
    return bytes(data)


def constant_address(data: Buffer) -> int:
    """Return where the memory of what `constant` returned lies, as long as that is alive."""
    if type(data) is bytes:
        address: int = _bytes_address(data)
        return address
    found = _PyBuffer()
    _get_buffer(data, ctypes.byref(found), 0)  # PyBUF_SIMPLE
    address = found.buf or 0
    _release_buffer(ctypes.byref(found))
    return address


def aligned_address(data: Buffer) -> int:
    """Return the address of large data that can go to the device as it is, else 0.

    That is what a read of more than `POOLED_READ_BYTES_MAX` returned: constant and aligned.
    """
    if (
        type(data) is not memoryview
        or type(data.obj) is not bytes
        or data.nbytes <= POOLED_READ_BYTES_MAX
        or not data.c_contiguous
    ):
        return 0
    address = constant_address(data)
    return 0 if address % _MEMORY_UNIT_BYTES else address


def address_of(memory: mmap.mmap) -> int:
    """Return where a mapping lies; good for as long as it is open."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def keep_freed_memory(limit: int = KEPT_BYTES) -> None:
    """Keep up to `limit` bytes of what large buffers leave in this process, for the next ones.

    `give_freed_memory_back` gives away what is kept at that moment.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, limit)


def give_freed_memory_back() -> None:
    """Give the kernel back what `keep_freed_memory` kept: nobody needs buffers for a while.

    Takes some 100 us for each MiB.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)
