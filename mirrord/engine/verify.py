"""Verification: the target is read back and compared, chunk by chunk, while the guest goes on.

A chunk whose digest was taken when it was copied needs only the target's bytes; any other is
compared by reading both sides. Holes on both sides are equal without a read.

No lock is held while reading, so that no guest waits for it. Instead the chunk's digest is the
witness: a mirrored write takes it away, under its range lock, before either leg starts. A chunk
without a digest gets a mark in its place, set under the range lock, when no write is under way.
If digest or mark is still there after reading, nothing was written and the comparison holds; else
the chunk counts as written meanwhile.

A chunk that the guest writes to after it was compared is compared again, in a later pass. A guest
that never stops writing to some chunks would keep that going for ever, so there are at most
`verify_passes_max` passes; what is left then is reported, and was written by mirrored writes that
both sides confirmed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from mirrord.core.geometry import Extent, Status
from mirrord.engine.digests import COMPARING, Digests
from mirrord.engine.settings import EngineSettings
from mirrord.engine.tracking import WriteTracker
from mirrord.errors import SourceError, TargetError
from mirrord.storage.backend import Backend


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification found: offsets of chunks that differ, and what could not settle."""

    mismatches: tuple[int, ...]
    chunks: int
    unsettled: int

    @property
    def reason(self) -> str:
        """Return one line for the job's story."""
        if self.mismatches:
            found = ", ".join(str(offset) for offset in self.mismatches[:3])
            return f"{len(self.mismatches)} chunks differ, the first at offset {found}"
        busy = f"; {self.unsettled} are still being written by the guest" if self.unsettled else ""
        return f"{self.chunks} chunks are equal on both sides{busy}"


class Verifier:
    """Compares source and target for one job."""

    def __init__(self, tracker: WriteTracker, settings: EngineSettings) -> None:
        self.verified_bytes = 0
        self._tracker = tracker
        self._settings = settings

    async def run(self) -> Verdict:
        """Compare every chunk that was not compared since it was written.

        Needs mirroring to be on and the bitmap clean. Raises SourceError and TargetError when a
        side can't be read. Stops early, with what it found, at the first mismatches.
        """
        digests = self._tracker.digests
        chunks = 0
        for _ in range(self._settings.verify_passes_max):
            if not digests.unverified():
                break
            # A clean cache: what is read past it is what is stored.
            await self._tracker.flush_target()
            mismatches, compared = await self._walk()
            chunks += compared
            if mismatches:
                return Verdict(tuple(mismatches), chunks, digests.unverified())
        return Verdict((), chunks, digests.unverified())

    async def _walk(self) -> tuple[list[int], int]:
        mismatches: list[int] = []
        compared = cursor = 0
        width = self._settings.verify_width

        async def worker() -> None:
            nonlocal compared, cursor
            while not mismatches:
                index = self._tracker.digests.next_unverified(cursor)
                if index < 0:
                    return
                cursor = index + 1
                if not await self._chunk(index):
                    mismatches.append(self._tracker.digests.range_of(index)[0])
                compared += 1

        trouble: Exception | None = None
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(width):
                    workers.create_task(worker())
        except* (SourceError, TargetError) as group:
            trouble = group.exceptions[0]
        # Not raised above: Python 3.11.2 (Debian 12) wraps what is raised inside `except*`.
        if trouble is not None:
            raise trouble
        return sorted(mismatches), compared

    async def _chunk(self, index: int) -> bool:
        """Compare one chunk; False only if it differs although nothing wrote to it meanwhile."""
        digests = self._tracker.digests
        offset, length = digests.range_of(index)
        witness = digests.get(index) or await self._mark(index)
        if not self._tracker.bitmap.clean(offset, length):
            return True
        if witness == COMPARING:
            equal = await self._compare(offset, length)
        else:
            equal = Digests.of(xxh3_64_intdigest(await self._stored(offset, length))) == witness
        # no await below
        if digests.get(index) != witness or not self._tracker.bitmap.clean(offset, length):
            return True
        if equal:
            digests.verified(index)
            self.verified_bytes += length
        return equal

    async def _mark(self, index: int) -> int:
        """Put a mark where a digest would be, at a moment when no mirrored write is under way."""
        digests = self._tracker.digests
        offset, length = digests.range_of(index)
        ticket = await self._tracker.locks.acquire(offset, offset + length)
        digests.compare(index)
        self._tracker.locks.release(ticket)
        return COMPARING

    async def _stored(self, offset: int, length: int) -> bytes | bytearray | memoryview:
        try:
            return await self._tracker.asked(self._tracker.target.read_stored(offset, length))
        except OSError as error:
            raise TargetError(error, "reading the target back failed", offset) from error

    async def _compare(self, offset: int, length: int) -> bool:
        source, target = self._tracker.source, self._tracker.target
        if await _all_hole(source, offset, length) and await _all_hole(target, offset, length):
            return True
        stored = await self._stored(offset, length)
        try:
            data = await source.read_once(offset, length)
        except OSError as error:
            raise SourceError(error, "read of the source failed", offset) from error
        return bytes(stored) == bytes(data)


async def _all_hole(backend: Backend, offset: int, length: int) -> bool:
    try:
        extents: list[Extent] = await backend.extents(offset, length)
    except OSError:
        return False  # not known to be a hole: reading it will tell what is wrong
    first = extents[0]
    return first.status is Status.HOLE and first.end >= offset + length
