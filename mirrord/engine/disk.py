"""The door: every request of every guest goes through one `Disk`.

It knows where the bytes are now (`backend`), whether a job follows the writes (`tracker`), and
whether the gate is closed. It does not know phases: a job opens and closes, sets and pivots.

Interleavings that matter:

* A mutation passes the gate, joins the present generation and goes on without an await, so
  "passed the gate" and "counted as in flight" are one instant. `settle` starts a new generation
  and waits for the old ones: what it returns after is every mutation that began before it.
* Reads never wait for the gate. One that began before the pivot may answer from the source; the
  source is closed only after such reads (a backend's `close` waits for them).
* `pivot` and `follow` have no await: no request sees half of them.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from typing import Protocol

from bitarray import bitarray

from mirrord.core.geometry import KIB, Extent, Status
from mirrord.engine.mutation import Mutation, Trim, Write, Zeroes
from mirrord.storage.backend import Backend, Buffer, UnreachableError

# A bit each says what was read: two MiB of memory for each TiB that a guest has read.
READ_UNIT_BYTES = 64 * KIB


class OtherSideError(OSError):
    """A request failed, though the authoritative side is well: no reason to doubt its flushes."""


class Tracker(Protocol):
    """What a job adds to a guest's requests while it runs."""

    async def mutate(self, mutation: Mutation) -> None:
        """Carry the mutation out, and remember it."""

    async def flush(self) -> None:
        """Make the guest's completed writes durable where they count."""

    def dirty_extents(self, offset: int, length: int) -> list[Extent]:
        """Return DIRTY and CLEAN extents of the range, for `mirrord:dirty`."""


class _Generation:
    """The mutations that began between two `settle`s."""

    __slots__ = ("count", "ended")

    def __init__(self) -> None:
        self.count = 0
        self.ended: asyncio.Event | None = None


class Disk:
    """A virtual disk: one authoritative backend behind one door.

    Requests are validated by the frontend, which never cancels one: what has begun ends.
    They raise `OSError` with the errno for the guest.
    `size` is the guest's: it stays when the disk moves to a larger device.
    A failed flush is remembered: until the disk is opened anew every later flush and FUA write
    fails with EIO, because a retried flush proves nothing (rule R9). One that the storage was not
    reached for is no such failure.
    """

    def __init__(
        self, name: str, backend: Backend, *, read_only: bool = False, size: int | None = None
    ) -> None:
        self.name = name
        self.size = backend.size if size is None else size
        self.read_only = read_only
        self.backend = backend
        backend.authoritative = True  # this process has no other disk to keep waiting
        self.flush_failed = False
        self.requests = 0  # reads and mutations that began: who changes it is at work
        # What was read since the disk was opened. A private mapping takes memory where it is set.
        map_bytes = max(1, -(-self.size // READ_UNIT_BYTES // 8))
        memory = mmap.mmap(-1, map_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.read_units = bitarray(buffer=memory, endian="little")
        self._tracker: Tracker | None = None
        self._gate: asyncio.Event | None = None
        self._generation = _Generation()
        self._older: list[_Generation] = []

    async def read(self, offset: int, length: int) -> Buffer:
        """Return `length` bytes from the authoritative side."""
        self.requests += 1
        self._note_read(offset, length)
        return await self.backend.read(offset, length)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write all of `data`; with `fua` it is durable on return."""
        await self._mutate(Write(offset, len(data), data, fua))

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, punch: bool = True, fast: bool = False
    ) -> None:
        """Make the range read as zeroes; `Backend.write_zeroes` says what the flags mean."""
        await self._mutate(Zeroes(offset, length, fua, punch, fast))

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Give the range's storage back."""
        await self._mutate(Trim(offset, length, fua))

    async def flush(self) -> None:
        """Make every mutation that was answered before this call durable."""
        self._refuse_after_failed_flush()
        tracker = self._tracker
        backend = self.backend
        try:
            if tracker is None:
                await backend.flush()
            else:
                await tracker.flush()
        except (OtherSideError, UnreachableError):
            raise
        except OSError:
            if backend is self.backend:
                self.flush_failed = True
            raise
        self._refuse_after_failed_flush()  # of either side: a pivot may have come between

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range near. Has no effect that a guest could rely on."""
        self._note_read(offset, length)
        end = offset + length
        while offset < end:
            step = min(end - offset, 1 << 20)  # bounded memory, whatever the guest asks for
            await self.backend.read(offset, step)
            await asyncio.sleep(0)  # others' turn: what the page cache has is read without a wait
            offset += step

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Return what the authoritative side holds; may stop early."""
        return await self.backend.extents(offset, length)

    def dirty_extents(self, offset: int, length: int) -> list[Extent]:
        """Return where source and target may differ; all clean while nothing moves."""
        if self._tracker is None:
            return [Extent(offset, length, Status.CLEAN)]
        return self._tracker.dirty_extents(offset, length)

    # What follows is for the job alone.

    def follow(self, tracker: Tracker | None) -> None:
        """Send every mutation that begins from now on through `tracker`."""
        self._tracker = tracker

    def close_gate(self) -> None:
        """Hold new mutations: they wait, they don't fail. Reads and flushes go on."""
        assert self._gate is None, "the gate is closed already"
        self._gate = asyncio.Event()

    def open_gate(self) -> None:
        """Let the held mutations go on, in the order in which they came."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.set()

    async def settle(self) -> None:
        """Return once every mutation that had begun before this call has ended.

        With the gate closed this is the drain: nothing is in flight on return.
        """
        if self._generation.count:
            self._older.append(self._generation)
            self._generation = _Generation()
        for generation in tuple(self._older):
            if generation.count:
                generation.ended = generation.ended or asyncio.Event()
                await generation.ended.wait()
        self._older = [generation for generation in self._older if generation.count]

    def pivot(self, backend: Backend) -> Backend:
        """Make `backend` the authoritative side, stop following, and return the former one."""
        assert self._gate is not None, "a pivot needs a closed gate"
        former, self.backend = self.backend, backend
        backend.authoritative = True
        self.flush_failed = False  # that was the other side, and it is not asked any more
        self._tracker = None
        return former

    def _note_read(self, offset: int, length: int) -> None:
        first, last = offset // READ_UNIT_BYTES, (offset + length - 1) // READ_UNIT_BYTES
        if first == last:
            self.read_units[first] = 1
        else:
            self.read_units[first : last + 1] = 1

    async def _mutate(self, mutation: Mutation) -> None:
        while self._gate is not None:
            await self._gate.wait()
        self.requests += 1
        generation = self._generation
        generation.count += 1
        try:
            if mutation.fua:
                await self._durably(mutation)
            elif self._tracker is None:
                await mutation.apply(self.backend)
            else:
                await self._tracker.mutate(mutation)
        finally:
            generation.count -= 1
            if generation.ended is not None and not generation.count:
                generation.ended.set()

    async def _durably(self, mutation: Mutation) -> None:
        """Carry out a FUA mutation. Its flush and another's may be answered for each other: the
        kernel reports a lost page once, so after any failure none of them is believed."""
        self._refuse_after_failed_flush()
        backend = self.backend
        try:
            if self._tracker is None:
                await mutation.apply(backend)
            else:
                await self._tracker.mutate(mutation)
        except (OtherSideError, UnreachableError):
            raise
        except OSError as error:
            if backend is self.backend and error.errno != errno.ENOTSUP:
                self.flush_failed = True
            raise
        if backend is self.backend:
            self._refuse_after_failed_flush()

    def _refuse_after_failed_flush(self) -> None:
        if self.flush_failed:
            raise OSError(errno.EIO, os.strerror(errno.EIO) + " (an earlier flush failed)")
