"""Verification: the target is read back and compared, chunk by chunk, while the guest goes on.

A chunk whose digest was taken when it was copied needs only the target's bytes; any other is
compared by reading both sides. Holes on both sides are equal without a read, and large ones are
found before all else: chunk by chunk, a TiB of them would take a minute.

No lock is held while reading, so that no guest waits for it. Instead the chunk's digest is the
witness: a mirrored write takes it away, under its range lock, before either leg starts. A chunk
without a digest gets a mark in its place, set under the range lock, when no write is under way.
If digest or mark is still there after reading, nothing was written and the comparison holds; else
the chunk counts as written meanwhile.

A chunk that the guest writes to after it was compared is compared again in a later pass, as long as
each pass leaves at most half of what it found: a guest that writes faster than that would be
followed for ever. There are at most `verify_passes_max` passes. What it wrote to during each of
its comparisons is then compared part by part with that part locked, so that nothing is left that
never was; the guest waits for one part at most. How many chunks were written to meanwhile is told:
by mirrored writes, which both sides confirmed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from bitarray import bitarray
from xxhash import xxh3_64_intdigest

from mirrord.core.geometry import KIB, MIB, Extent, Status, split
from mirrord.engine.digests import COMPARING, Digests
from mirrord.engine.disk import Disk
from mirrord.engine.settings import EngineSettings
from mirrord.engine.tracking import WriteTracker
from mirrord.errors import SourceError, TargetError
from mirrord.storage.backend import Backend


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification found: offsets of chunks that differ, else how many all are.

    `written_meanwhile` of them were written to while they were compared or after that.
    """

    mismatches: tuple[int, ...]
    chunks: int
    written_meanwhile: int

    @property
    def reason(self) -> str:
        """Return one line for the job's story."""
        if self.mismatches:
            found = ", ".join(str(offset) for offset in self.mismatches[:3])
            return f"{len(self.mismatches)} chunks differ, the first at offset {found}"
        count = self.written_meanwhile
        busy = f"; the guest wrote to {count} meanwhile" if count else ""
        return f"all {self.chunks} chunks were equal on both sides{busy}"


# Chunks that are compared together: what one call costs, all of them do.
GROUP_CHUNKS_MAX = 8

# So many that differ are looked for, to copy them again; a target with more isn't worth the time.
MISMATCHES_MAX = 64

# A guest's write waits for the comparison of so much at most, and gives up after 2 s. In parts of
# 64 KiB it takes longer: 512 MiB on a share under 3,000 writes a second 10.2 s instead of 6.3.
LOCKED_BYTES_MAX = 256 * KIB

# How much of a hole is compared at once: a guest's write into it leaves so much to the walk.
HOLE_BYTES_MAX = 64 * 1024 * MIB


class Verifier:
    """Compares source and target of one job, while `disk` serves a guest."""

    def __init__(self, disk: Disk, tracker: WriteTracker, settings: EngineSettings) -> None:
        self.verified_bytes = 0
        self._disk = disk
        self._requests = disk.requests
        self._tracker = tracker
        self._disturbed = bitarray(tracker.digests.count)  # compared, and written to meanwhile
        self._settings = settings

    async def run(self) -> Verdict:
        """Compare every chunk that was not compared since it was written.

        Needs mirroring to be on and the bitmap clean. Raises SourceError and TargetError when a
        side can't be read. Stops early, with what it found, at many mismatches.
        """
        digests = self._tracker.digests
        self._disturbed.setall(0)
        mismatches: list[int] = []
        for number in range(self._settings.verify_passes_max):
            found = digests.unverified()
            if not found or mismatches:
                break
            # A clean cache: what is read past it is what is stored.
            await self._tracker.flush_target()
            if number == 0:
                await self._holes()
            # What was written while its neighbours were read is read alone, which is quicker.
            most = 1 if number else GROUP_CHUNKS_MAX
            mismatches += await self._walk(digests.unverified_bits(), most)
            if digests.unverified() > found // 2:
                break
        if self._disturbed.any() and not mismatches:
            await self._tracker.flush_target()
            for index in list(self._disturbed.search(1)):
                if not await self._equal_in_parts(index):
                    mismatches.append(digests.range_of(index)[0])
        return Verdict(tuple(mismatches), digests.count, digests.unverified())

    async def _holes(self) -> None:
        """Compare what is a large hole on both sides.

        Where a side can't tell, or something is written meanwhile, the walk comes to it.
        """
        source, target = self._tracker.source, self._tracker.target
        least = self._settings.hole_chunks_min * self._settings.chunk_bytes
        for at, count in split(0, source.size, self._settings.scan_bytes):
            for outer in await self._large_holes(target, at, count, least):
                for inner in await self._large_holes(source, outer.offset, outer.length, least):
                    for start, length in split(inner.offset, inner.length, HOLE_BYTES_MAX):
                        await self._hole(start, length)

    async def _hole(self, offset: int, length: int) -> None:
        """Verify the chunks in what has just been a hole on both sides, if it is still one."""
        digests = self._tracker.digests
        chunks = digests.inside(offset, length)
        if not chunks:
            return
        start, end = digests.range_of(chunks[0])[0], sum(digests.range_of(chunks[-1]))
        ticket = await self._tracker.locks.acquire(start, end)
        watched = digests.watch(chunks)
        self._tracker.locks.release(ticket)
        equal = False
        try:
            equal = await self._both_hole(start, end - start)
            # no await below
            equal &= watched.untouched and self._tracker.bitmap.clean(start, end - start)
        finally:
            digests.settle(watched, verified=equal)
        if equal:
            self.verified_bytes += end - start

    async def _walk(self, wanted: bitarray, most: int) -> list[int]:
        """Compare what is wanted, so many chunks at once; return the offsets of what differs."""
        mismatches: list[int] = []
        cursor = 0

        async def compare(group: range) -> None:
            mismatches.extend(await self._chunks(group))

        trouble: Exception | None = None
        busy: set[asyncio.Task[None]] = set()
        width = 1
        try:
            async with asyncio.TaskGroup() as workers:
                while len(mismatches) < MISMATCHES_MAX:
                    group = self._group(wanted, cursor, most)
                    if not group:
                        break
                    cursor = group.stop
                    busy.add(workers.create_task(compare(group)))
                    while len(busy) >= width:
                        _, busy = await asyncio.wait(busy, return_when=asyncio.FIRST_COMPLETED)
                        width = self._width()
        except* (SourceError, TargetError) as group:
            trouble = group.exceptions[0]
        # Not raised above: Python 3.11.2 (Debian 12) wraps what is raised inside `except*`.
        if trouble is not None:
            raise trouble
        return sorted(mismatches)

    def _width(self) -> int:
        """Return how many groups may be compared at a time: one if the guest asked for something
        since the last look, or it would wait behind all of them (medians of moves between files:
        1.9 ms instead of 0.5).
        """
        before, self._requests = self._requests, self._disk.requests
        return 1 if self._requests != before else self._settings.verify_width

    def _group(self, wanted: bitarray, cursor: int, most: int) -> range:
        """Return the next wanted neighbours, at most so many, which have all a digest or none.

        So that a hole, which has none, is looked up at once.
        """
        digests = self._tracker.digests
        first = wanted.find(1, cursor)
        if first < 0:
            return range(0)
        stop = first + 1
        while (
            stop < min(digests.count, first + most)
            and wanted[stop]
            and (digests.get(stop) > COMPARING) == (digests.get(first) > COMPARING)
        ):
            stop += 1
        return range(first, stop)

    async def _chunks(self, group: range) -> list[int]:
        """Return the offsets of chunks that differ although nothing wrote to them meanwhile."""
        digests, bitmap = self._tracker.digests, self._tracker.bitmap
        witnesses: dict[int, int] = {}
        self._disturbed[group.start : group.stop] = 1
        for index in group:
            witness = digests.get(index) or await self._mark(index)
            if bitmap.clean(*digests.range_of(index)):
                witnesses[index] = witness
        equal = await self._have(
            {index: witness for index, witness in witnesses.items() if witness != COMPARING}
        )
        equal |= await self._compare(
            [i for i, witness in witnesses.items() if witness == COMPARING]
        )
        # no await below
        mismatches = []
        for index, witness in witnesses.items():
            offset, length = digests.range_of(index)
            if digests.get(index) != witness or not bitmap.clean(offset, length):
                continue
            self._disturbed[index] = 0
            if index in equal:
                digests.verified(index)
                self.verified_bytes += length
            else:
                mismatches.append(offset)
        return mismatches

    async def _mark(self, index: int) -> int:
        """Put a mark where a digest would be, at a moment when no mirrored write is under way."""
        digests = self._tracker.digests
        offset, length = digests.range_of(index)
        ticket = await self._tracker.locks.acquire(offset, offset + length)
        digests.compare(index)
        self._tracker.locks.release(ticket)
        return COMPARING

    async def _equal_in_parts(self, index: int) -> bool:
        """Compare a chunk part by part, while mirrored writes to that part wait.

        What is written to a part after it was compared is mirrored like any other write.
        """
        bitmap, locks = self._tracker.bitmap, self._tracker.locks
        for offset, length in split(*self._tracker.digests.range_of(index), LOCKED_BYTES_MAX):
            ticket = await locks.acquire(offset, offset + length)
            try:
                equal = await self._same(offset, length) or not bitmap.clean(offset, length)
            finally:
                locks.release(ticket)
            if not equal:
                return False
        return True

    async def _stored(self, offset: int, length: int) -> bytes | bytearray | memoryview:
        try:
            return await self._tracker.asked(self._tracker.target.read_stored(offset, length))
        except OSError as error:
            raise TargetError(error, "reading the target back failed", offset) from error

    async def _have(self, wanted: dict[int, int]) -> set[int]:
        """Return the chunks of which the target has stored what the digest wants."""
        if not wanted:
            return set()
        runs = [self._tracker.digests.range_of(index) for index in wanted]
        try:
            found = await self._tracker.asked(self._tracker.target.digests_stored(runs))
        except OSError as error:
            raise TargetError(error, "reading the target back failed", runs[0][0]) from error
        if found is None:
            found = [xxh3_64_intdigest(await self._stored(*run)) for run in runs]
        digests = zip(wanted, map(Digests.of, found), strict=True)
        return {index for index, digest in digests if digest == wanted[index]}

    async def _compare(self, indices: list[int]) -> set[int]:
        """Return the chunks that hold the same on both sides."""
        if not indices:
            return set()
        runs = {index: self._tracker.digests.range_of(index) for index in indices}
        offset, end = runs[indices[0]][0], sum(runs[indices[-1]])
        if len(indices) > 1 and await self._both_hole(offset, end - offset):
            return set(indices)
        return {index for index, run in runs.items() if await self._same(*run)}

    async def _both_hole(self, offset: int, length: int) -> bool:
        source, target = self._tracker.source, self._tracker.target
        return await self._hole_in(source, offset, length) and await self._hole_in(
            target, offset, length
        )

    async def _same(self, offset: int, length: int) -> bool:
        if await self._both_hole(offset, length):
            return True
        stored = await self._stored(offset, length)
        try:
            data = await self._tracker.source.read_once(offset, length)
        except OSError as error:
            raise SourceError(error, "read of the source failed", offset) from error
        # Comparing bytes would copy both first, which takes twice as long.
        return xxh3_64_intdigest(stored) == xxh3_64_intdigest(data)

    async def _large_holes(
        self, side: Backend, offset: int, length: int, least: int
    ) -> list[Extent]:
        """Return the holes of at least so many bytes, as far as the side can tell."""
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            for extent in await self._extents(side, offset, end - offset):
                stop = min(extent.end, end)
                if extent.status is Status.HOLE and stop - extent.offset >= least:
                    found.append(Extent(extent.offset, stop - extent.offset, Status.HOLE))
                offset = stop
        return found

    async def _hole_in(self, side: Backend, offset: int, length: int) -> bool:
        first = (await self._extents(side, offset, length))[0]
        return first.status is Status.HOLE and first.end >= offset + length

    async def _extents(self, side: Backend, offset: int, length: int) -> list[Extent]:
        """Return what is there; data where the side can't tell: reading tells what is wrong."""
        asking = side.extents(offset, length)
        try:
            if side is self._tracker.target:
                return await self._tracker.asked(asking)
            return await asking
        except OSError:
            return [Extent(offset, length, Status.DATA)]
