"""What a job adds to each guest write: marks, intents, and the mirror.

The order of one write, and why a crash or a neighbour can't hurt between any two steps:

    following (not mirrored)              mirrored
    1 mark both maps' bits                1 range lock (4 KiB blocks, first come first served)
    2 region durably marked (R1)          2 hold the mapped bit (a kill may come)
    3 write to the source                 3 region durably marked (R1)
    4 mark again (R3), answer             4 both legs start; the source's answer counts
                                          5 both done: drop the bit; else mark it
                                          6 unlock once the target's leg has ended (R4), answer

* Between 1 and 4 the copier may take the block, read it half written and finish: step 4 marks it
  again, and until then the write stands in `in_flight`, so the copier leaves the mapped bit alone
  and a kill finds it.
* Mirroring starts while unmirrored writes are in flight. Until those have ended (`settled`) no
  mirrored write drops a bit, since their order on the source against ours is unknown.
* Mirroring ends the same way: a write that began mirrored drops its bit only if the very same
  mirroring is still on, because an unmirrored neighbour may be in the same block.
* A target that fails or takes longer than its budget costs the guest at most that budget, once:
  the write is answered from the source, the block stays marked, mirroring ends (R14). The late leg
  keeps its lock until it has ended (R4), so the copier can't be overtaken by it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from errno import EIO, ENOTSUP
from typing import Any, TypeVar

from bitarray import bitarray

from mirrord.core.bitmap import DirtyBitmap
from mirrord.core.geometry import Extent, Status, round_down, round_up
from mirrord.core.ranges import Ticket
from mirrord.engine.digests import Digests
from mirrord.engine.disk import OtherSideError
from mirrord.engine.intents import Intents
from mirrord.engine.legs import Leg, Legs, late
from mirrord.engine.locks import Locks
from mirrord.engine.mutation import Mutation, Zeroes
from mirrord.engine.settings import EngineSettings
from mirrord.engine.unflushed import Unflushed
from mirrord.errors import SideError, SourceError, TargetError
from mirrord.storage.backend import Backend, UnreachableError, Watch

T = TypeVar("T")

RUNS_MAX = 1024  # of one mirrored write: 0.2 ms; a trim of 4 GiB may have a million
EXTENTS_MAX = 1024  # of one answer about dirty extents: about 2 ms of work


class Mirror:
    """One stretch of mirroring. Its identity tells a write whether it is still the same one."""

    __slots__ = ("settled",)

    def __init__(self) -> None:
        self.settled = False  # every write that began unmirrored has ended


class WriteTracker:
    """Follows a guest's writes for one job; see the module's docstring for the order.

    `report` is told of trouble with either side and returns at once. `give_up` makes an abort of
    the job durable (the intent map can't be written, so the job can't survive a crash).
    `charge` counts mirrored bytes against the job's bandwidth limit.
    """

    def __init__(
        self,
        source: Backend,
        target: Backend,
        bitmap: DirtyBitmap,
        intents: Intents,
        digests: Digests,
        settings: EngineSettings,
        *,
        report: Callable[[SideError], None],
        give_up: Callable[[OSError], Awaitable[None]],
        charge: Callable[[int], None],
    ) -> None:
        self.source = source
        self.target = target
        self.bitmap = bitmap
        self.intents = intents
        self.digests = digests
        self.locks = Locks()
        self._strict_flush_failed = False
        self.strict = False  # the commit's outcome is unknown: both sides or neither (R15)
        self.scanned = False  # the bitmap has everything that was data when the job began
        self.warmed = False  # what the guest uses was read into the target's cache, once
        self.source_flushed = False  # once since the job, or this process, began
        self.abandoned = False  # the job gave up: writes go to the source alone
        self.mirrored_bytes = 0
        self.generation = 0  # grows when the target may have forgotten what it had confirmed
        self._settings = settings
        self._report = report
        self._give_up = give_up
        self._charge = charge
        self._mirror: Mirror | None = None
        self._flushing = asyncio.Lock()
        self._queued_flush: asyncio.Task[None] | None = None
        self._queued_strict_flush: asyncio.Task[None] | None = None  # for FUA writes
        # Flushes that began: whoever is cancelled and whatever ends the job, they go on.
        self._owned: set[asyncio.Task[Any]] = set()
        self._in_flight: dict[int, tuple[int, int]] = {}
        self._next_token = 0
        self._watches: set[Watch] = set()  # one for each question to the target
        self._loop = asyncio.get_running_loop()
        self._legs = Legs(target, settings.target_budget_s, arrived=self._arrived)
        # A process before this one may have written to the target wherever a mark stands.
        self._target_unflushed = Unflushed(intents.map.count, intents.map.marked_bits())
        self._source_unflushed = Unflushed(intents.map.count)
        self._hot = deque([self._none()], maxlen=settings.hot_checkpoints + 1)

    # The guest's side

    async def mutate(self, mutation: Mutation) -> None:
        """Carry a mutation out, on both sides while mirroring."""
        regions = self.regions(mutation.offset, mutation.length)
        self._hot[0][regions] = 1
        mirror = self._mirror
        try:
            if self.strict:
                await self._strictly(mutation)
            elif mirror is None:
                await self._follow(mutation)
            else:
                await self._mirrored(mutation, mirror)
        except (OtherSideError, UnreachableError):
            raise
        except OSError as error:
            if mutation.fua and error.errno != ENOTSUP:  # its flush may be what failed (R9)
                text = "a write to the source that was to be durable failed"
                self._report(SourceError(error, text, mutation.offset))
            raise
        finally:
            self._source_unflushed.wrote(regions)

    async def flush(self) -> None:
        """Make the source durable (R10); both sides while the commit's outcome is unknown."""
        flush = self._source_unflushed.begin()
        good = False
        try:
            await self.source.flush()
            good = True
        except OSError as error:
            self._report(SourceError(error, "flush of the source failed"))
            raise
        finally:
            self._source_unflushed.end(flush, good=good)
        if self.strict:
            await self._flush_strictly()

    def dirty_extents(self, offset: int, length: int) -> list[Extent]:
        """Return where the sides may differ, by the bitmap; may stop early."""
        return [
            Extent(start, size, Status.DIRTY if dirty else Status.CLEAN)
            for start, size, dirty in self.bitmap.runs(offset, length, EXTENTS_MAX)
        ]

    # The job's side

    @property
    def mirroring(self) -> bool:
        """Whether guest writes go to both sides."""
        return self._mirror is not None

    def start_mirroring(self) -> Mirror:
        """Send writes that begin from now on to both sides."""
        self._mirror = self._mirror or Mirror()
        return self._mirror

    def stop_mirroring(self) -> None:
        """Follow writes in the bitmap again. The target's content stays usable."""
        self._mirror = None

    def in_flight(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of the unmirrored writes in flight."""
        return iter(self._in_flight.values())

    def regions(self, offset: int, length: int) -> slice:
        """Return the indices of the regions that the range touches."""
        unit = self._settings.region_bytes
        return slice(offset // unit, (offset + length - 1) // unit + 1)

    @property
    def unflushed_bytes(self) -> int:
        """About how much a flush of the target would have to do: whole regions."""
        return self._target_unflushed.bits.count() * self._settings.region_bytes

    def target_wrote(self, offset: int, length: int) -> None:
        """Remember that a write to the target ended, and isn't durable yet."""
        self._target_unflushed.wrote(self.regions(offset, length))

    async def asked(self, request: Coroutine[Any, Any, T], limit_s: float | None = None) -> T:
        """Await a request to the target; past its limit `overdue` knows of it.

        It is not given up: a slow target may still answer, and what it was asked goes on.
        """
        with self.watch(limit_s) as watch, watch:
            return await request

    @contextlib.contextmanager
    def watch(self, limit_s: float | None = None) -> Iterator[Watch]:
        """Return a watch that `overdue` looks at meanwhile."""
        limit_s = self._settings.target_stall_s if limit_s is None else limit_s
        watch = Watch(limit_s, self._loop.time)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    @property
    def overdue(self) -> bool:
        """Whether the target has not answered something within its limit."""
        now_s = self._loop.time()
        return any(watch.due_s < now_s for watch in self._watches)

    async def flush_target(self) -> None:
        """Make what was written to the target durable.

        A failed flush makes everything written since the last good one dirty again, ends
        mirroring (R9), is reported, and raised as TargetError. One flush at a time: the kernel
        tells of an error once, and it must not be taken for the success of another. So a flush
        that began ends here, with all of this, also when whoever wanted it is cancelled. One
        that has not begun yet serves everybody who asks meanwhile.
        """
        if self._queued_flush is None:
            self._queued_flush = self._own(self._flush_once())
        await asyncio.shield(self._queued_flush)

    async def _flush_once(self) -> None:
        async with self._flushing:
            self._queued_flush = None
            flush = self._target_unflushed.begin()
            good = False
            try:
                await self.asked(self.target.flush(), self._settings.flush_stall_s)
                good = True
            except OSError as error:
                self._strict_flush_failed = self.strict
                self.distrust_target()
                trouble = TargetError(error, "flush of the target failed")
                self._report(trouble)
                raise trouble from error
            finally:
                self._target_unflushed.end(flush, good=good)

    async def checkpoint(self) -> None:
        """Flush the target, then clear the marks of regions that were equal before the flush.

        A region is cleared only if no block of it is marked, nothing was written to it at the
        target since the flush began, no guest wrote to it lately (R2), and the source has made
        durable what the guest wrote to it: else a power cut could take from the source what the
        target keeps, and after the cutover the guest would meet a write that it saw vanish. The
        job flushes the source once at its start, after that the guest's own flushes decide.
        Raises TargetError as `flush_target` does, and `OSError` when the map can't be written.
        """
        equal = self._clearable()
        await self.flush_target()
        # no await below until the regions are cleared in memory
        equal &= self._clearable() & ~self._target_unflushed.bits & ~self._source_unflushed.bits
        for hot in self._hot:
            equal &= ~hot
        self._hot.appendleft(self._none())
        await self.intents.clear(equal.search(1))

    def _clearable(self) -> bitarray:
        """Return the marked regions in which both sides are equal now, by the bitmap."""
        if not (self.scanned and self.source_flushed):
            return self._none()
        clean = self.bitmap.clean_regions(self._settings.region_bytes)
        return clean & self.intents.map.marked_bits()

    def _none(self) -> bitarray:
        """Return a bit for each region, none set."""
        return bitarray(self.intents.map.count, endian="little")

    @property
    def target_busy(self) -> bool:
        """Whether something that was asked of the target on a guest's behalf has not ended."""
        return bool(self._owned) or bool(self._legs)

    async def asked_so_far(self) -> None:
        """Return once what is asked of the target on a guest's behalf now has ended."""
        await self._legs.these_ended()
        if self._owned:
            await asyncio.wait(self._owned)

    async def flush_for_pivot(self) -> bool:
        """Flush the target past all else; False when it can't be believed any more."""
        try:
            await self._flush_strictly()
        except OtherSideError:
            return False
        return True

    async def close_target(self) -> None:
        """Close the target once everything that was asked of it has ended."""
        while self.target_busy:
            await self.asked_so_far()
        await self.target.close()

    def distrust_target(self) -> None:
        """Mark everything that the target has not confirmed as durable (R9, R13)."""
        self.stop_mirroring()
        self.generation += 1
        unit = self._settings.region_bytes
        for region in self._target_unflushed.bits.search(1):
            start = region * unit
            self.bitmap.mark(start, min(unit, self.bitmap.size - start))
        self._target_unflushed.clear()

    # Inside

    async def _follow(self, mutation: Mutation) -> None:
        offset, length = mutation.offset, mutation.length
        self.bitmap.mark(offset, length)
        token = self._next_token
        self._next_token += 1
        self._in_flight[token] = (offset, length)
        try:
            if not self.intents.marked(offset, length):
                await self._ensure(offset, length)
            await mutation.apply(self.source)
        finally:
            self.bitmap.mark(offset, length)
            del self._in_flight[token]

    async def _ensure(self, offset: int, length: int) -> None:
        """Mark the regions durably, or give the job up: then the mark isn't needed."""
        if self.abandoned:
            return
        try:
            await self.intents.ensure(offset, length)
        except OSError as error:
            try:
                await self._give_up(error)
            except OSError as also:
                raise OtherSideError(EIO, "the state directory can't be written") from also

    async def _mirrored(self, mutation: Mutation, mirror: Mirror) -> None:
        unit = self.bitmap.granularity
        start = round_down(mutation.offset, unit)
        length = round_up(mutation.offset + mutation.length, unit) - start
        limit_s = self._settings.target_budget_s  # for lock and leg together
        until_s = self._loop.time() + limit_s
        ticket = await self.locks.acquire_within(start, start + length, limit_s)
        if ticket is None:  # somebody's request to the target hangs in this range
            self._fall_back(late(limit_s), mutation.offset)
            await self._follow(mutation)
            return
        leg: Leg | None = None
        try:
            # The world may have changed while we waited. A digest is forgotten under the lock,
            # so that a comparison under way can't call the chunk verified after this write. (An
            # unmirrored write needs none of this: its blocks are copied again.)
            self.digests.forget(start, length)
            # What was equal stays so, block by block: else the dirt of one would spread.
            known = mirror.settled and self._mirror is mirror
            runs = self.bitmap.runs(start, length, RUNS_MAX) if known else []
            if not runs or runs[-1][0] + runs[-1][1] < start + length:
                runs = [(start, length, True)]
            for at, count, dirty in runs:
                (self.bitmap.mark if dirty else self.bitmap.hold)(at, count)
            try:
                if not self.intents.marked(mutation.offset, mutation.length):
                    await self._ensure(mutation.offset, mutation.length)
                if self._mirror is not mirror:
                    await self._follow(mutation)
                    return
                leg = self._legs.begin(mutation)
                equal = await self._both(mutation, leg, until_s)
            except BaseException:
                self.bitmap.mark(start, length)
                raise
            equal = equal and self._mirror is mirror
            for at, count, dirty in runs:
                (self.bitmap.unmark if equal and not dirty else self.bitmap.mark)(at, count)
        finally:
            self._unlock(ticket, leg)

    async def _both(self, mutation: Mutation, leg: Leg, until_s: float) -> bool:
        """Wait for both legs; True when both sides have the mutation."""
        try:
            await mutation.apply(self.source)
        except OSError:
            await leg.outcome(until_s)
            raise
        error = await leg.outcome(until_s)
        if error is None:
            return True
        self._fall_back(error, mutation.offset)
        return False

    def _fall_back(self, error: OSError, offset: int) -> None:
        self.stop_mirroring()
        self._report(TargetError(error, "mirrored write failed", offset))

    async def _strictly(self, mutation: Mutation) -> None:
        """Have the mutation on both sides, durable where the guest asked for it, or fail it."""
        if isinstance(mutation, Zeroes) and mutation.fast:
            raise OSError(ENOTSUP, "not known before one side is changed")  # the other may refuse
        unit = self.bitmap.granularity
        start = round_down(mutation.offset, unit)
        length = round_up(mutation.offset + mutation.length, unit) - start
        ticket = await self.locks.acquire(start, start + length)
        leg: Leg | None = None
        try:
            self.bitmap.mark(start, length)
            await self._intend_strictly(mutation)
            leg = self._legs.begin(mutation)
            await mutation.apply(self.source)
            until_s = self._loop.time() + self._settings.target_budget_s
            error = await leg.outcome(until_s)
        finally:
            self._unlock(ticket, leg)
        if error is not None:
            raise OtherSideError(EIO, "the target failed, and the commit is unknown") from error
        if mutation.fua:
            await self._flushed_strictly(until_s)

    async def _intend_strictly(self, mutation: Mutation) -> None:
        try:
            if not self.intents.marked(mutation.offset, mutation.length):
                await self.intents.ensure(mutation.offset, mutation.length)
        except OSError as error:
            raise OtherSideError(EIO, "the intent map can't be written") from error

    def _unlock(self, ticket: Ticket, leg: Leg | None) -> None:
        """Give the range back, but not before the target's leg has ended (R4)."""
        if leg is None or leg.done:
            self.locks.release(ticket)
        else:
            leg.afterwards(lambda: self.locks.release(ticket))

    async def _flushed_strictly(self, until_s: float) -> None:
        """Return once the target is durable; fail if it isn't by then, or the gate would wait.

        A flush that has not begun yet serves everybody who asks meanwhile.
        """
        if self._queued_strict_flush is None:
            self._queued_strict_flush = self._own(self._flush_strictly())
        flush = self._queued_strict_flush
        await asyncio.wait((flush,), timeout=max(0.0, until_s - self._loop.time()))
        if not flush.done():
            limit_s = self._settings.target_budget_s
            raise OtherSideError(EIO, "the commit is unknown") from late(limit_s)
        flush.result()

    async def _flush_strictly(self) -> None:
        """Make the target durable, or fail it and every later flush: a retried one proves nothing.

        One at a time, as `flush_target`. If strict mode ended while this waited, the source alone
        counts, or the pivot's flush was as good.
        """
        async with self._flushing:
            self._queued_strict_flush = None
            if not self.strict:
                return
            if self._strict_flush_failed:
                raise OtherSideError(EIO, "an earlier flush of the target failed")
            try:
                await self.target.flush()
            except OSError as error:
                self._strict_flush_failed = True
                raise OtherSideError(EIO, "the flush of the target failed") from error

    def _own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        self._owned.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._owned.discard(task)
        if not task.cancelled():
            task.exception()  # reported already, and raised to whoever still waits

    def _arrived(self, mutation: Mutation) -> None:
        """Note that the target has a mutation."""
        self.target_wrote(mutation.offset, mutation.length)
        self.mirrored_bytes += mutation.length
        self._charge(mutation.length)
