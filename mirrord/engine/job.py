"""One move of one disk, from its first record to its last.

A job is a loop: each phase has one activity, an activity ends in an event, the table says which
phase comes next (`core.migration`). An interrupt (an operator's wish, trouble with a side) ends
the activity early, except between the commit record and the pivot. A job that leaves the mirrored
phases follows writes in the bitmap again, so nothing it knew is lost.

Before the commit point a job ends only after ABORT is durable: until then every guest write goes
on being tracked, because a crash would resume the move from the maps (rule R1).

What runs here belongs to the job's task group; what outlives it (closing a target that hangs)
is handed to `adopt`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

from mirrord.core.bitmap import DirtyBitmap
from mirrord.core.geometry import Status
from mirrord.core.journal import Authority, Kind, State
from mirrord.core.migration import (
    MIRRORED,
    MOVES,
    REVERSIBLE,
    TERMINAL,
    Event,
    Migration,
    Phase,
    Step,
)
from mirrord.core.pacing import PASS_MIN_S, Rates, TokenBucket, Window, eta, pass_pays
from mirrord.core.units import format_bytes
from mirrord.engine.copier import NO_SPACE, Copier
from mirrord.engine.cutover import Cutover
from mirrord.engine.digests import Digests
from mirrord.engine.disk import Disk
from mirrord.engine.housekeeping import Housekeeping
from mirrord.engine.intents import Intents
from mirrord.engine.interrupt import Interrupt
from mirrord.engine.ledger import Ledger
from mirrord.engine.request import JobRequest, JobStatus, Progress
from mirrord.engine.retire import Retirement
from mirrord.engine.settings import EngineSettings
from mirrord.engine.store import JobStore
from mirrord.engine.tracking import WriteTracker
from mirrord.engine.verify import Verifier
from mirrord.errors import RefusedError, SideError, SourceError, TargetError
from mirrord.storage.backend import Backend, Identity, Place

Outcome = tuple[Event, str]
_log = logging.getLogger("mirrord.engine")


class Surroundings:
    """What a job is given by the process it runs in.

    `wall` is the clock for people, `moved` makes a new location durable in the registry, `adopt`
    runs a coroutine that may outlive the job, `changed` is called at every change of phase.
    """

    def __init__(
        self,
        *,
        wall: Callable[[], float],
        moved: Callable[[str], Awaitable[None]],
        adopt: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[Job], None] = lambda job: None,
        settings: EngineSettings | None = None,
    ) -> None:
        self.wall = wall
        self.moved = moved
        self.adopt = adopt
        self.changed = changed
        self.settings = settings or EngineSettings()


class Job:
    """A move under way. Made by `engine.recovery`, which also knows what a crash left.

    With `target` None the job was committed before a restart: only the retirement is left.
    """

    def __init__(
        self,
        request: JobRequest,
        disk: Disk,
        places: tuple[Place, Place],
        identities: tuple[Identity, Identity],
        store: JobStore,
        ledger: Ledger,
        around: Surroundings,
        *,
        target: Backend | None,
        bitmap: DirtyBitmap,
        intents: Intents,
        progress: Progress,
    ) -> None:
        self.request = request.changed(ledger.outcome.settings)
        self.migration = Migration()
        self.disk = disk
        self.tracker: WriteTracker | None = None
        self._source_place, self._target_place = places
        self._source_identity, self._target_identity = identities
        self._store = store
        self._ledger = ledger
        self._around = around
        self._settings = around.settings
        self._target = target
        self._bitmap = bitmap
        self._intents = intents
        self._progress = progress
        self._resumed = progress.scanned
        self._helpers: list[asyncio.Task[None]] = []
        self._ending = asyncio.Lock()
        self._interrupt = Interrupt()
        self._resume = asyncio.Event()
        self._cutover_wanted = asyncio.Event()
        if ledger.outcome.settings.get("cutover_wanted"):
            self._cutover_wanted.set()
        self._rates = Rates()
        self._bucket = TokenBucket(self.request.limit, asyncio.get_running_loop().time())
        self._retirement = Retirement(
            self.request, ledger, *places, self._settings, moved=around.moved
        )
        self._cutover: Cutover | None = None
        self._former: Backend | None = None
        self._reason = ""
        self._attempts = 0
        self._space_wanted = False
        self._mismatched = False
        self._verified = False
        self._held = False
        self._pause_s: float | None = None
        self._started_s: float | None = None
        self._ended: JobStatus | None = None

    # What others may ask and tell

    def status(self) -> JobStatus:
        """Return how the job is now. Cheap; callable at any time, also after the end."""
        if self._ended is not None:
            return self._ended
        phase = self.migration.phase
        copier = self._copier if self.tracker is not None else None
        remaining = 0 if phase is Phase.RETIRING else self._bitmap.remaining()
        dirty_rate = 0.0 if phase in MIRRORED else self._rates.dirty
        moving = phase in (Phase.COPYING, Phase.CATCHING_UP, Phase.MIRRORING)
        return JobStatus(
            job_id=self.request.job_id,
            disk=self.request.disk,
            phase=phase,
            source=self.request.source,
            target=self._target_place.location,
            bytes_total=self._progress.bytes_total,
            bytes_copied=self._progress.bytes_copied,
            bytes_remaining=remaining,
            copy_rate=self._rates.copy if copier else None,
            dirty_rate=self._rates.dirty if copier else None,
            eta_s=eta(remaining, self._rates.copy, dirty_rate) if moving else None,
            passes=self._progress.passes,
            pause_ms=None if self._pause_s is None else self._pause_s * 1000,
            verified=self._verified,
            reason=self._retirement.problem or self._reason,
            created_s=self.request.created_s,
            started_s=self._started_s,
            ended_s=None,
            limit=self.request.limit,
            source_kept=self._retirement.kept,
            story=tuple(self.migration.story),
        )

    async def pause(self) -> None:
        """Stop copying until `resume`; the pause is durable. Refused past the commit point."""
        if self.migration.phase is Phase.PAUSED and not self._space_wanted:
            raise self._refusal("pause", "it is paused already")
        self._refuse_unless_reversible("pause")
        await self._set(paused=True)
        self._space_wanted = False
        self._interrupt.request(Event.PAUSE_REQUESTED, "the operator paused it")

    async def resume(self) -> None:
        """Go on after a pause, or try a degraded target again at once."""
        if self.migration.phase not in (Phase.PAUSED, Phase.DEGRADED):
            raise self._refusal("resume", f"it is {self.migration.phase.value}, not paused")
        await self._set(paused=False)
        self._attempts = 0
        self._resume.set()

    async def cancel(self) -> None:
        """End the move; the source stays. Refused past the commit point."""
        self._refuse_unless_reversible("cancel")
        self._interrupt.request(Event.CANCEL_REQUESTED, "the operator cancelled it")

    async def cutover(self) -> None:
        """Cut over as soon as both sides are equal: no more passes, no more waiting."""
        self._refuse_unless_reversible("cutover")
        await self._set(cutover_wanted=True, mode="mirror")
        self._cutover_wanted.set()
        if self.migration.phase is Phase.CATCHING_UP:
            self._copier.stop()

    async def limit(self, rate: int) -> None:
        """Change the bandwidth limit (bytes a second, 0 is none) from now on."""
        self._refuse_unless_reversible("limit")
        await self._set(limit=rate)
        self._bucket.set_rate(rate, asyncio.get_running_loop().time())
        self._copier.wake()

    # The life of a job

    async def run(self) -> JobStatus:
        """Run until the job has ended. Cancelling leaves everything for a recovery to go on."""
        self._started_s = self._around.wall()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                if self._target is not None:
                    self._follow(self._target)
                await self._climb()
        except* Exception as group:
            await self._survive(group)
        assert self._ended is not None
        return self._ended

    async def _survive(self, bug: ExceptionGroup[Exception]) -> None:
        """A bug of ours ends the move, not the guest's disk, if the source is still the truth."""
        _log.error("end job=%s error=%r", self.request.job_id, bug.exceptions[0], exc_info=bug)
        if self._ledger.outcome.authority is Authority.TARGET or self.tracker is None:
            raise bug
        self.tracker.stop_mirroring()
        reason = f"internal error: {bug.exceptions[0]!r}"
        await self._abort(Event.ABORTED, reason, Phase.FAILED)
        self._enter(Event.ABORTED, reason)
        await self._store.close()

    def _follow(self, target: Backend) -> None:
        """Begin to follow the guest's writes. No await: the first write sees all of it."""
        settings = self._settings
        digests = Digests(self._bitmap.size, settings.chunk_bytes)
        self.tracker = WriteTracker(
            self.disk.backend, target, self._bitmap, self._intents, digests, settings, self._tasks,
            report=self._trouble, give_up=self._give_up, charge=self._charge,
        )  # fmt: skip
        self._copier = Copier(
            self.tracker, settings, Window(settings.chunk_bytes), self._bucket, self._tasks,
            in_process=self.request.verify == "full", report=self._trouble,
        )  # fmt: skip
        self._verifier = Verifier(self.tracker, settings)
        self._copied_before = self._progress.bytes_copied
        self._housekeeping = Housekeeping(self.tracker, self._copier, settings, self._trouble)
        self.disk.follow(self.tracker)

    async def _climb(self) -> None:
        first = self._first_event()
        self._enter(*first)
        if self.tracker is not None:
            loops = [*self._housekeeping.loops(), self._sampling()]
            self._helpers = [self._tasks.create_task(loop) for loop in loops]
        if self._ledger.outcome.settings.get("paused") and self.tracker is not None:
            self._interrupt.request(Event.PAUSE_REQUESTED, "it was paused before the restart")
        while (phase := self.migration.phase) not in TERMINAL:
            event, reason = await self._perform(phase)
            after = MOVES[phase].get(event)
            if after in (Phase.CANCELLED, Phase.FAILED):
                await self._abort(event, reason, after)
            elif after is Phase.DONE:
                self._ended = await self._conclude(event, reason, after)
            self._enter(event, reason)
        await self._store.close()

    def _first_event(self) -> Outcome:
        outcome = self._ledger.outcome
        if outcome.authority is Authority.TARGET:
            return Event.COMMITTED, "the commit record was found after a restart"
        if not self._resumed:
            return Event.STARTED, "nothing was copied yet"
        remaining = self._bitmap.remaining()
        of = f" of {format_bytes(self._progress.bytes_total)}" if self._progress.bytes_total else ""
        return Event.RESUMED, f"resumed after a restart: {format_bytes(remaining)}{of} are left"

    def _enter(self, event: Event, reason: str) -> None:
        phase = self.migration.handle(event, reason, self._around.wall())
        self._reason = reason
        if self.tracker is not None and phase not in MIRRORED and phase is not Phase.RETIRING:
            self.tracker.stop_mirroring()
        if self.tracker is not None:
            self._housekeeping.checkpoints = phase is not Phase.CUTTING_OVER
        if phase not in REVERSIBLE:
            for helper in self._helpers:
                helper.cancel()
        self._around.changed(self)

    async def _perform(self, phase: Phase) -> Outcome:
        """Run the phase's activity until it ends or is interrupted."""
        activity = self._tasks.create_task(self._guarded(_ACTIVITIES[phase](self)))
        try:
            while not activity.done():
                if self._interrupt.pending(self.migration) and not self._committing:
                    return await self._leave(activity)
                waiting = self._tasks.create_task(self._interrupt.wait())
                await asyncio.wait((activity, waiting), return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                if self._committing:
                    await asyncio.wait((activity,))
            return activity.result()
        finally:
            activity.cancel()

    async def _leave(self, activity: asyncio.Task[Outcome]) -> Outcome:
        """End an activity; what its workers have in flight ends by itself."""
        if self.tracker is not None:
            self._copier.stop()
        activity.cancel()
        await asyncio.wait((activity,))
        if not activity.cancelled():
            return activity.result()  # it ended in the same moment: that comes first
        return self._interrupt.take()

    async def _guarded(self, activity: Coroutine[Any, Any, Outcome]) -> Outcome:
        """Turn trouble with a side into the event that it means."""
        try:
            return await activity
        except (SourceError, TargetError) as error:
            return _meaning(error)

    @property
    def _committing(self) -> bool:
        return self._cutover is not None and self._cutover.committing

    # The activities

    async def _copying(self) -> Outcome:
        await self.disk.settle()  # writes that began before they were followed
        if not self._progress.scanned:
            await self._scan()
        if self.request.mode == "mirror":
            return Event.MIRROR_CHOSEN, "mirroring from the start, as asked"
        await self._walk()
        return Event.PASS_ENDED, f"the bulk pass copied {format_bytes(self._copier.copied_bytes)}"

    async def _catching_up(self) -> Outcome:
        await self.disk.settle()
        self._sample()
        remaining = self._bitmap.remaining()
        copy_rate, dirty_rate = self._rates.copy, self._rates.dirty
        pays, why = pass_pays(remaining, copy_rate, dirty_rate)
        if self.request.mode == "mirror":
            return Event.MIRROR_CHOSEN, "mirroring, as asked"
        if remaining == 0:
            return Event.MIRROR_CHOSEN, "nothing is left to copy"
        if not pays and (self.request.mode == "auto" or remaining < copy_rate * PASS_MIN_S):
            return Event.MIRROR_CHOSEN, why
        if not pays:
            self._reason = f"will not finish by passes alone: {why}"
        await self._walk()
        return Event.PASS_ENDED, f"pass {self._progress.passes} began with {why}"

    async def _mirroring(self) -> Outcome:
        assert self.tracker is not None
        if self._held and self.tracker.mirroring:
            await self._cutover_wanted.wait()
        self._held = False
        mirror = self.tracker.start_mirroring()
        await self.disk.settle()
        mirror.settled = True
        while self._bitmap.todo() or self._copier.in_flight_bytes:
            await self._walk()
        return Event.SYNCED, "both sides are equal, every write goes to both"

    async def _verifying(self) -> Outcome:
        if self.request.verify != "none":
            verdict = await self._verifier.run()
            if verdict.mismatches:
                for offset in verdict.mismatches:
                    length = min(self._settings.chunk_bytes, self._bitmap.size - offset)
                    self._bitmap.mark(offset, length)
                if self._mismatched:
                    return Event.ABORTED, f"the target differs again: {verdict.reason}"
                self._mismatched = True
                return Event.MISMATCH_FOUND, f"copying again: {verdict.reason}"
            self._verified = True
            self._reason = verdict.reason
        if self.request.cutover == "manual" and not self._cutover_wanted.is_set():
            self._held = True
            return Event.CUTOVER_HELD, "in step with the source; waiting for `mirrord cutover`"
        return Event.VERIFIED, self._reason if self._verified else "verification was not asked for"

    async def _cutting_over(self) -> Outcome:
        assert self.tracker is not None
        await self._housekeeping.check_unchanged()
        self._cutover = Cutover(
            self.disk, self.tracker, self._ledger, self._target_place, self.request.job_id,
            self._settings,
        )  # fmt: skip
        committed = False
        try:
            event, reason = await self._cutover.run(
                {"at_s": self._around.wall()}, lambda: self._interrupt.pending(self.migration)
            )
            committed = event is Event.COMMITTED
        finally:
            if not committed:
                self._cutover.committing = False
                await self._withdraw()
        if self._cutover.pause_s is not None:
            self._pause_s = max(self._pause_s or 0.0, self._cutover.pause_s)
        if event is Event.GATE_TIMED_OUT:
            await asyncio.sleep(self._backoff_s())
        self._former = self._cutover.former
        return event, reason

    async def _retiring(self) -> Outcome:
        text = await self._retirement.run(
            self._former, self._source_identity, self._target_identity
        )
        return Event.SOURCE_RETIRED, text

    async def _paused(self) -> Outcome:
        self._resume.clear()
        self._copier.stop()
        while self._space_wanted:
            try:
                async with asyncio.timeout(self._settings.space_probe_s):
                    await self._resume.wait()
            except TimeoutError:
                pass
            if self._resume.is_set() or await self._works_again():
                self._space_wanted = False
                return self._back("there is space again")
        await self._resume.wait()
        return self._back("the operator resumed it")

    async def _degraded(self) -> Outcome:
        self._resume.clear()
        self._attempts += 1
        if self._attempts > self._settings.target_attempts_max:
            attempts = self._settings.target_attempts_max
            return Event.PAUSE_REQUESTED, f"{attempts} attempts failed, the last: {self._reason}"
        while True:
            try:
                async with asyncio.timeout(self._backoff_s()):
                    await self._resume.wait()
            except TimeoutError:
                pass
            if await self._works_again():
                return self._back("the target works again")
            self._resume.clear()

    # Their parts

    async def _walk(self) -> None:
        """Make a pass; returns only when it came to its end."""
        while not await self._copier.walk():
            if self._cutover_wanted.is_set() and self.migration.phase is Phase.CATCHING_UP:
                return
            # A worker reported trouble, which interrupts this activity; or `stop` raced with it.
            await asyncio.sleep(0)
        self._attempts = 0
        self._progress.passes += 1
        self._sample()

    async def _scan(self) -> None:
        """Mark what is data. The guest's own writes are marked by themselves meanwhile."""
        assert self.tracker is not None
        source, target = self.tracker.source, self.tracker.target
        offset = 0
        while offset < source.size:
            length = min(self._settings.scan_bytes, source.size - offset)
            if not target.capabilities.starts_zeroed:
                self._bitmap.put_back(offset, length)
                offset += length
                await asyncio.sleep(0)
                continue
            try:
                extents = await source.extents(offset, length)
            except OSError as error:
                raise SourceError(error, "extents of the source failed", offset) from error
            for extent in extents:
                if extent.status is Status.DATA:
                    self._bitmap.put_back(extent.offset, extent.length)
                offset = extent.end
        self._progress.bytes_total = self._bitmap.remaining()
        self._progress.scanned = True
        self._progress.save()

    async def _works_again(self) -> bool:
        """Try the target with one piece and a flush."""
        assert self.tracker is not None
        try:
            async with asyncio.timeout(self._settings.target_stall_s):
                await self._copier.drained()
                await self._copier.try_one()
                await self.tracker.flush_target()
        except TimeoutError:
            self._reason = "the target does not answer"
            return False
        except TargetError as error:
            self._reason = str(error)
            self._space_wanted = error.errno in NO_SPACE
            return False
        return True

    def _back(self, reason: str) -> Outcome:
        """Return the event that leads out of a pause."""
        in_bulk = self._progress.passes == 0
        return (Event.RESUMED_IN_BULK if in_bulk else Event.RESUMED), reason

    def _backoff_s(self) -> float:
        doubled: float = self._settings.retry_first_s * 2 ** max(0, self._attempts - 1)
        return min(doubled, self._settings.retry_max_s)

    async def _withdraw(self) -> None:
        """Take the target's final name back. If that fails, recovery and publish know both."""
        try:
            await self._target_place.withdraw(self.request.job_id)
        except OSError as error:
            self._reason = f"the target kept its final name: {error}"

    async def _sampling(self) -> None:
        while True:
            await asyncio.sleep(self._settings.sample_s)
            self._sample()

    def _sample(self) -> None:
        assert self.tracker is not None
        copied = self._copier.copied_bytes
        self._progress.bytes_copied = self._copied_before + copied + self.tracker.mirrored_bytes
        self._progress.save()
        now_s = asyncio.get_running_loop().time()
        self._rates.sample(copied, self._bitmap.dirtied_bytes, now_s)

    # Trouble, and the end

    def _trouble(self, error: SideError) -> None:
        if self.migration.phase not in (Phase.PAUSED, Phase.DEGRADED):
            self._interrupt.request(*_meaning(error))
            self._space_wanted = isinstance(error, TargetError) and error.errno in NO_SPACE
        elif isinstance(error, SourceError):
            self._interrupt.request(*_meaning(error))

    def _charge(self, length: int) -> None:
        self._bucket.charge(length, asyncio.get_running_loop().time())

    async def _give_up(self, error: OSError) -> None:
        """Abort because the intent map can't be written; raise if that can't be recorded."""
        assert self.tracker is not None
        reason = f"the intent map can't be written: {error}"
        await self._record_abort(reason)
        self.tracker.abandoned = True
        self._interrupt.request(Event.ABORTED, reason)

    async def _abort(self, event: Event, reason: str, after: Phase) -> None:
        """End before the commit point: ABORT durable, then stop following, then clean up."""
        delay_s = self._settings.retry_first_s
        while True:
            try:
                await self._record_abort(reason, cancelled=after is Phase.CANCELLED)
                break
            except OSError as error:
                self._reason = f"waiting for the state directory: {error}"
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, self._settings.retry_max_s)
        assert self.tracker is not None
        self._sample()
        self.disk.follow(None)
        self.tracker.stop_mirroring()
        self._copier.abandon()
        await self.disk.settle()
        try:
            await self._target_place.discard(self.request.job_id)
        except OSError as error:
            reason = f"{reason}; the target {self._target_place.location} is left over ({error})"
        self._around.adopt(self.tracker.target.close())
        self._ended = await self._conclude(event, reason, after)

    async def _record_abort(self, reason: str, *, cancelled: bool = False) -> None:
        """Make ABORT durable, once. Raises `OSError` when that is not known."""
        async with self._ending:
            if self._ledger.outcome.state is State.PREPARED:
                payload = {"reason": reason, "cancelled": cancelled}
                await self._ledger.append(Kind.ABORT, payload)

    async def _conclude(self, event: Event, reason: str, after: Phase) -> JobStatus:
        """Make the summary durable and return it."""
        now_s = self._around.wall()
        step = Step(now_s, after, event, reason)
        ended = replace(
            self.status(),
            phase=after,
            reason=reason,
            ended_s=now_s,
            eta_s=None,
            story=(*self.migration.story, step),
        )
        await self._retirement.record(Kind.DONE, ended.summary())
        return ended

    async def _set(self, **settings: object) -> None:
        """Make an operator's setting durable, and remember it."""
        merged = {**self._ledger.outcome.settings, **settings}
        try:
            await self._ledger.append(Kind.SET, merged)
        except OSError as error:
            raise RefusedError("state-error", f"the journal can't be written: {error}") from error
        self.request = self.request.changed(merged)

    def _refuse_unless_reversible(self, verb: str) -> None:
        if self._committing or not self.migration.allows(Event.CANCEL_REQUESTED):
            raise self._refusal(verb, f"it is {self.migration.phase.value}: there is no way back")

    def _refusal(self, verb: str, why: str) -> RefusedError:
        return RefusedError("wrong-phase", f"can't {verb} the move of {self.request.disk}: {why}")


def _meaning(error: SideError) -> Outcome:
    if isinstance(error, SourceError):
        return Event.ABORTED, str(error)
    if error.errno in NO_SPACE:
        return Event.SPACE_EXHAUSTED, f"no space at the target: {error}"
    return Event.TARGET_FAILED, str(error)


_ACTIVITIES: dict[Phase, Callable[[Job], Coroutine[Any, Any, Outcome]]] = {
    Phase.COPYING: Job._copying,
    Phase.CATCHING_UP: Job._catching_up,
    Phase.MIRRORING: Job._mirroring,
    Phase.VERIFYING: Job._verifying,
    Phase.CUTTING_OVER: Job._cutting_over,
    Phase.RETIRING: Job._retiring,
    Phase.PAUSED: Job._paused,
    Phase.DEGRADED: Job._degraded,
}
