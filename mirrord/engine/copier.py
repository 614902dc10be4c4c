"""The copier: walks over the dirty bitmap and makes the target equal, chunk by chunk.

One walker takes what is to be copied, a chunk or some in order, and starts a worker for it; the
window bounds the bytes in flight. A worker knows the digests of the chunks that it copied whole.
Workers belong to the job's task group, not to the walker: a pass that is interrupted leaves its
workers to finish, and they hold their locks until they have.

A worker, and why nothing is lost at any of its awaits: it holds the range lock, so no mirrored
write is under way in the range; an unmirrored one may be, and marks its blocks again when it
ends, or stands in `in_flight` when the worker looks. The mapped bits are dropped in one stretch
without an await after the target's last write has ended, if the target is still trusted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, ENOTCONN, EPROTONOSUPPORT, ETIMEDOUT

from mirrord.core.geometry import Extent, Status, merge, runs_of, split
from mirrord.core.pacing import TokenBucket, Window
from mirrord.engine.digests import ChunkHasher
from mirrord.engine.settings import EngineSettings
from mirrord.engine.tracking import WriteTracker
from mirrord.errors import SideError, SourceError, TargetError
from mirrord.storage.backend import Buffer

# (offset, length) of what one worker copies, in order.
Runs = list[tuple[int, int]]

# More are another worker's. Only where one call takes them all (`carry_from`).
RUNS_MAX = 64

# What one worker takes at most, and how far it reaches (`EngineSettings.piece_s`).
PIECE_CHUNKS_MAX = 16
PIECE_SPAN_CHUNKS_MAX = 64

# Workers at a time. The window alone lets thousands of them go after a guest's small writes, and
# the guest waits behind their answers: p99 was 0.3 s for a file and 0.8 s for a share. Fewer while
# it waits for the same target. As mirroring begins under 1,500 writes a second, p99 is 3 ms for a
# file and 7 for a share; with 16 workers it was 11 and 15. It takes about as long, a second; under
# 3,000 writes a second longer, for a file 2.4 to 3.5 s instead of 1.6.
WORKERS_MAX = 64
WORKERS_MIRRORING_MAX = 4

NO_SPACE = frozenset({ENOSPC, EDQUOT, EFBIG})
# It may be back in an hour: that is no reason to give up.
AWAY = frozenset({ETIMEDOUT, ENOTCONN})
# Somebody has to do something first: a password, a right.
DENIED = frozenset({EACCES, EPROTONOSUPPORT})


class Copier:
    """Copies what the bitmap says.

    `digests` are taken of what is copied, for which every byte comes through this process;
    otherwise, or where a server can copy between two of its files, the backends are asked to copy
    by themselves first.
    """

    def __init__(
        self,
        tracker: WriteTracker,
        settings: EngineSettings,
        window: Window,
        bucket: TokenBucket,
        share: TokenBucket,
        *,
        digests: bool,
        report: Callable[[SideError], None],
        clock: Callable[[], float],
    ) -> None:
        self.tasks: asyncio.TaskGroup  # the job's, once it runs
        self.copied_bytes = 0  # everything made equal, zeroes and recopies included
        self.moved_bytes = 0  # of that, data that was written; the rest was zeroes
        self._tracker = tracker
        self._settings = settings
        self._window = window
        self._bucket = bucket
        self._share = share  # what copying gets however much the guest writes, or no move would end
        below = not digests or tracker.target.copies_from(tracker.source)
        self._in_process = not below  # where that doesn't work, it becomes true
        self._digests = digests
        self._runs_max = RUNS_MAX
        self._report = report
        self._clock = clock
        self._zeroes = bytes(settings.zero_bytes)
        self.trouble: SideError | None = None  # the last one that a worker met
        self._workers: dict[asyncio.Task[None], int] = {}
        self._waiting_bytes = 0
        self._stopped = True
        self._changed = asyncio.Event()  # a worker ended, the limit changed, or stop

    @property
    def taken_bytes(self) -> int:
        """Bytes that left the bitmap's `todo`: in flight, or waiting for their place."""
        return self.in_flight_bytes + self._waiting_bytes

    @property
    def in_flight_bytes(self) -> int:
        """Bytes taken by workers that have not ended."""
        return sum(self._workers.values())

    def stop(self) -> None:
        """Start no more workers; those that run go on."""
        self._stopped = True
        self._changed.set()

    def wake(self) -> None:
        """Look at the limit again: it was changed."""
        self._changed.set()

    def abandon(self) -> None:
        """Cancel the workers: the target is given up and will be discarded."""
        self.stop()
        for worker in self._workers:
            worker.cancel()

    async def try_one(self) -> None:
        """Copy one chunk, to see whether the target works again; raise the trouble if not.

        That of the last trouble, if it is known: a full target has space for blocks that it has,
        and for one more. The worker is one like the others: cancelling this leaves it to end by
        itself.
        """
        bitmap, chunk_bytes = self._tracker.bitmap, self._settings.chunk_bytes
        failed_at = (self.trouble and self.trouble.offset) or 0
        runs = bitmap.take_chunk(failed_at, chunk_bytes, self._runs_max)
        runs = runs or bitmap.take_chunk(0, chunk_bytes, self._runs_max)
        if not runs:
            return
        self.trouble = None
        worker = self._start(runs)
        await asyncio.wait((worker,))
        if self.trouble is not None:
            raise self.trouble

    async def walk(self) -> bool:
        """Make one pass over the bitmap; True when it came to the end with every worker ended.

        False when `stop` was called, or a worker reported trouble, which stops the walk too.
        """
        self._stopped = False
        # A worker that an earlier pass left may have read a block before the guest wrote it. It
        # would call the block clean although this pass has taken it again.
        await self.drained()
        cursor = 0
        bitmap = self._tracker.bitmap
        while not self._stopped:
            runs = self._take(cursor)
            if not runs:
                break
            cursor = _end(runs)
            self._waiting_bytes = _bytes_in(runs)
            admitted = False
            try:
                admitted = await self._admit(self._waiting_bytes)
            finally:
                self._waiting_bytes = 0
                if not admitted:
                    for run in runs:
                        bitmap.put_back(*run)
            if not admitted:
                break
            self._start(runs)
        await self.drained()
        return not self._stopped

    def _take(self, cursor: int) -> Runs:
        """Take what the next worker copies, of one chunk or of some.

        Of one while mirroring, as mirrored writes wait for the lock; under a limit, which wants
        small steps; and where copies go through the loop.
        """
        bitmap, chunk_bytes = self._tracker.bitmap, self._settings.chunk_bytes
        runs = bitmap.take_chunk(cursor, chunk_bytes, self._runs_max)
        chunks = min(PIECE_CHUNKS_MAX, int(self._settings.piece_s / self._window.latency_s))
        if self._tracker.mirroring or self._bucket.rate_bytes_s or self._runs_max == 1:
            chunks = 1
        while runs and chunks > 1 and len(runs) < self._runs_max:
            more = bitmap.take_chunk(_end(runs), chunk_bytes, self._runs_max - len(runs))
            if not more or more[-1][0] - runs[0][0] > PIECE_SPAN_CHUNKS_MAX * chunk_bytes:
                for run in more:
                    bitmap.put_back(*run)
                break
            if more[0][0] == _end(runs):
                offset, length = runs.pop()
                more[0] = (offset, length + more[0][1])
            runs += more
            chunks -= 1
        return runs

    async def drained(self) -> None:
        """Return once no worker is left."""
        while self._workers:
            self._changed.clear()
            await self._changed.wait()

    async def _admit(self, length: int) -> bool:
        """Wait for a place in the window and for the limit; False when stopped meanwhile."""
        loop = asyncio.get_running_loop()
        while not self._stopped:
            self._changed.clear()
            busy = sum(map(self._at_once, self._workers.values()))
            if busy and (busy + self._at_once(length) > self._window.bytes or self._crowded()):
                await self._changed.wait()
                continue
            now_s = self._clock()
            delay_s = min(self._bucket.delay_s(length, now_s), self._share.delay_s(length, now_s))
            if delay_s <= 0:
                self._bucket.charge(length, now_s)
                self._share.charge(length, now_s)
                return True
            timer = loop.call_later(delay_s, self._changed.set)
            try:
                await self._changed.wait()
            finally:
                timer.cancel()
        return False

    def _at_once(self, length: int) -> int:
        """Return how much of what a worker has is in flight: it copies one chunk after another."""
        return min(length, self._settings.chunk_bytes)

    def _crowded(self) -> bool:
        """Tell whether a guest's request would have to wait behind too many workers."""
        most = WORKERS_MIRRORING_MAX if self._tracker.mirroring else WORKERS_MAX
        return len(self._workers) >= most

    def _start(self, runs: Runs) -> asyncio.Task[None]:
        worker = self.tasks.create_task(self._work(runs))
        self._workers[worker] = _bytes_in(runs)
        worker.add_done_callback(self._ended)
        return worker

    def _ended(self, worker: asyncio.Task[None]) -> None:
        del self._workers[worker]
        self._changed.set()

    async def _work(self, runs: Runs) -> None:
        tracker = self._tracker
        bitmap = tracker.bitmap
        equal = False
        ticket = None
        try:
            ticket = await tracker.locks.acquire(*self._locked(runs))
            # Mirrored writes that came before us in the queue marked the range again; what they
            # wrote is read below. Without this a block that is never idle would never be clean.
            for run in runs:
                bitmap.retake(*run)
            generation = tracker.generation
            started_s = self._clock()
            digests = await self._copy(runs)
            # no await below: what is decided here is what a kill finds
            length = _bytes_in(runs)
            now_s = self._clock()
            chunks = max(1.0, length / self._settings.chunk_bytes)
            self._window.completed(self._at_once(length), (now_s - started_s) / chunks, now_s)
            for run in runs:
                tracker.target_wrote(*run)
            if tracker.generation == generation:
                start, end = runs[0][0], _end(runs)
                in_flight = [
                    (at, size) for at, size in tracker.in_flight() if at < end and start < at + size
                ]
                for run in runs:
                    bitmap.copied(*run, in_flight)
                equal = True
                self.copied_bytes += length
                self._remember(runs, digests)
        except (SourceError, TargetError) as error:
            self.trouble = error
            self.stop()
            self._report(error)
        finally:
            if not equal:
                for run in runs:
                    bitmap.put_back(*run)
            if ticket is not None:
                tracker.locks.release(ticket)

    def _locked(self, runs: Runs) -> tuple[int, int]:
        start, end = runs[0][0], _end(runs)
        return start, max(end, start + self._tracker.bitmap.granularity)

    def _remember(self, runs: Runs, found: dict[int, int]) -> None:
        digests = self._tracker.digests
        for run in runs:
            digests.forget(*run)
        for index, digest in found.items():
            if self._tracker.bitmap.clean(*digests.range_of(index)):
                digests.set(index, digest)

    def _hasher(self, runs: Runs) -> ChunkHasher | None:
        """Return a new one if digests are wanted and some chunk is copied whole."""
        hasher = ChunkHasher(self._tracker.digests, runs)
        return hasher if self._digests and hasher.wanted else None

    async def _copy(self, runs: Runs) -> dict[int, int]:
        """Make the runs equal; return the digests of chunks that are wanted and to be had."""
        if not self._in_process and await self._copied_below(runs):
            return {}
        hasher = self._hasher(runs)
        if not await self._carried(runs, hasher):
            hasher = self._hasher(runs)  # what failed may have fed the first
            for run in runs:
                await self._copy_here(*run, hasher)
        return {} if hasher is None else hasher.found

    async def _carried(self, runs: Runs, hasher: ChunkHasher | None) -> bool:
        """Have the target copy beside this loop; False where it doesn't or can't."""
        source, target = self._tracker.source, self._tracker.target
        try:
            with self._tracker.watch() as watch:
                moved = await target.carry_from(source, runs, hasher, watch)
        except OSError:
            return False  # which side failed can't be told from here: reading the source will tell
        if moved is None:
            self._runs_max = 1  # through the loop they would wait for each other, under one lock
            return False
        self.moved_bytes += moved
        return True

    async def _copy_here(self, offset: int, length: int, hasher: ChunkHasher | None) -> None:
        """Read, hash and write one run, at most a chunk of it at a time."""
        for extent in await self._extents(offset, length):
            if extent.status is Status.DATA:
                for at, count in split(extent.offset, extent.length, self._settings.chunk_bytes):
                    try:
                        data = await self._tracker.source.read_once(at, count)
                    except OSError as error:
                        raise SourceError(error, "read of the source failed", at) from error
                    if hasher is not None:
                        hasher.update(data)
                    await self._write(at, data)
            else:
                await self._write_zeroes(extent.offset, extent.length)
                if hasher is not None:
                    for _, part in split(0, extent.length, len(self._zeroes)):
                        hasher.update(memoryview(self._zeroes)[:part])

    async def _copied_below(self, runs: Runs) -> bool:
        """Have the backends copy; False when something could not be copied so."""
        for extent in [extent for run in runs for extent in await self._extents(*run)]:
            if extent.status is not Status.DATA:
                await self._write_zeroes(extent.offset, extent.length)
                continue
            try:
                done = await self._tracker.asked(
                    self._tracker.target.copy_from(
                        self._tracker.source, extent.offset, extent.length
                    )
                )
            except OSError as error:
                # Which side failed can't be told from here: reading the source will tell.
                if error.errno in NO_SPACE or error.errno in AWAY:
                    raise TargetError(error, "copy to the target failed", extent.offset) from error
                done = False
            if not done:
                self._in_process = True  # not here, so nowhere: ask no more
                return False
        return True

    async def _extents(self, offset: int, length: int) -> list[Extent]:
        """Return the source's extents of the whole range, clipped to it."""
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            try:
                extents = await self._tracker.source.extents(offset, end - offset)
            except OSError as error:
                raise SourceError(error, "extents of the source failed", offset) from error
            for extent in extents:
                stop = min(extent.end, end)
                found.append(Extent(extent.offset, stop - extent.offset, extent.status))
                offset = stop
        return merge(found)

    async def _write(self, offset: int, data: Buffer) -> None:
        """Write the data, but its zeroes as zeroes, so that sparse stays sparse."""
        view = memoryview(data)
        for start, length, is_zero in runs_of(view, len(self._zeroes)):
            if is_zero:
                await self._write_zeroes(offset + start, length)
            else:
                try:
                    await self._tracker.asked(
                        self._tracker.target.write_once(
                            offset + start, view[start : start + length]
                        )
                    )
                except OSError as error:
                    raise TargetError(error, "write to the target failed", offset) from error
                self.moved_bytes += length

    async def _write_zeroes(self, offset: int, length: int) -> None:
        try:
            await self._tracker.asked(self._tracker.target.write_zeroes(offset, length))
        except OSError as error:
            raise TargetError(error, "zeroing of the target failed", offset) from error


def _end(runs: Runs) -> int:
    return sum(runs[-1])


def _bytes_in(runs: Runs) -> int:
    return sum(length for _, length in runs)
