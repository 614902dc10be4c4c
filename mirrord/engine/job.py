"""One move of one disk, from its first record to its last.

A job is a loop: each phase has one activity, an activity ends in an event, the table says which
phase comes next (`core.migration`). An interrupt (an operator's wish, trouble with a side) ends
the activity early, except between the commit record and the pivot. A job that leaves the mirrored
phases follows writes in the bitmap again, so nothing it knew is lost.

Before the commit point a job ends only after ABORT is durable: until then every guest write goes
on being tracked, because a crash would resume the move from the maps (rule R1).

What outlives the job's task group (closing a target that hangs) is handed to `adopt`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import replace
from errno import ETIMEDOUT
from typing import Any

from mirrord.core.bitmap import DirtyBitmap
from mirrord.core.journal import Authority, Kind, State
from mirrord.core.migration import (
    COUNTED,
    MIRRORED,
    MOVES,
    REVERSIBLE,
    TERMINAL,
    Event,
    Migration,
    Phase,
    Step,
)
from mirrord.core.pacing import Rates, TokenBucket, Window, eta, share_of
from mirrord.core.units import format_bytes
from mirrord.engine.activities import ACTIVITIES, Outcome, meaning
from mirrord.engine.copier import Copier
from mirrord.engine.cutover import Cutover
from mirrord.engine.digests import Digests
from mirrord.engine.disk import Disk
from mirrord.engine.housekeeping import Housekeeping
from mirrord.engine.intents import Intents
from mirrord.engine.interrupt import Interrupt
from mirrord.engine.ledger import Ledger
from mirrord.engine.request import JobRequest, JobStatus, Progress
from mirrord.engine.retire import Retirement
from mirrord.engine.store import JobStore
from mirrord.engine.surroundings import Surroundings, outlive
from mirrord.engine.tracking import WriteTracker
from mirrord.engine.verify import Verifier
from mirrord.errors import DamagedError, RefusedError, SideError, SourceError, TargetError
from mirrord.storage.backend import Backend, Identity, Place

_log = logging.getLogger("mirrord.engine")


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
        self._source_place, self.target_place = places
        self.source_identity, self.target_identity = identities
        self._store = store
        self.ledger = ledger
        self.around = around
        chunk_bytes = max(around.settings.chunk_bytes, bitmap.granularity)
        self.settings = replace(around.settings, chunk_bytes=chunk_bytes)
        self.bitmap = bitmap
        self._intents = intents
        self.progress = progress
        self._was_scanned = progress.scanned
        self._helpers: list[asyncio.Task[None]] = []
        self._ending = asyncio.Lock()
        self._steering = asyncio.Lock()
        self._operator_settings = dict(ledger.outcome.settings)
        self.interrupt = Interrupt()
        self.resumed = asyncio.Event()
        self.cutover_wanted = asyncio.Event()
        if ledger.outcome.settings.get("cutover_wanted"):
            self.cutover_wanted.set()
        self.rates = Rates()
        self._bucket = TokenBucket(self.request.limit, around.clock())
        self._share = TokenBucket(share_of(self.request.limit), around.clock())
        self.retirement = Retirement(
            self.request, ledger, *places, self.settings, moved=around.moved
        )
        self.cutover_attempt: Cutover | None = None
        self.former: Backend | None = None
        self.reason = ""
        # At a target in trouble: attempts in a row that led nowhere, and how often the delay grew.
        self.attempts = self.delays = 0
        self.working_since_s = 0.0  # by `around.clock`: when it last came out of trouble
        self.left_at_trouble = 0  # bytes that were to be copied at its last trouble
        self.gates_missed = 0
        self.space_wanted = False
        self.mismatched = False
        self.verified = bool((ledger.outcome.commit or {}).get("verified"))
        self.held = False
        self.pause_s: float | None = None
        self._started_s: float | None = None
        self._ended: JobStatus | None = None
        if target is not None:
            self._follow(target)

    # What others may ask and tell

    def status(self) -> JobStatus:
        """Return how the job is now. Cheap; callable at any time, also after the end."""
        if self._ended is not None:
            return self._ended
        phase = self.migration.phase
        copier = self.copier if self.tracker is not None else None
        remaining = self._remaining(copier) if phase is not Phase.RETIRING else 0
        dirty_rate, limit = 0.0 if phase in MIRRORED else self.rates.dirty, self.request.limit
        known = self.progress.scanned or phase is Phase.RETIRING
        moving = known and phase in COUNTED
        return JobStatus(
            job_id=self.request.job_id,
            disk=self.request.disk,
            phase=phase,
            source=self.request.source,
            target=self.target_place.location,
            bytes_total=self.progress.bytes_total if known else self.disk.size,
            bytes_copied=self.progress.bytes_copied,
            bytes_remaining=remaining,
            copy_rate=self.rates.copy if copier else None,
            dirty_rate=self.rates.dirty if copier else None,
            eta_s=eta(remaining, self.rates.copy, dirty_rate, limit) if moving else None,
            passes=self.progress.passes,
            pause_ms=None if self.pause_s is None else self.pause_s * 1000,
            verified=self.verified,
            reason=self.retirement.problem or self.reason,
            created_s=self.request.created_s,
            started_s=self._started_s,
            ended_s=None,
            limit=self.request.limit,
            source_kept=self.retirement.kept,
            story=tuple(self.migration.story),
        )

    def _remaining(self, copier: Copier | None) -> int:
        """Bytes to copy and being copied; a mirrored write in flight is neither."""
        if self.tracker is None:
            return 0  # committed before a restart
        if not self.progress.scanned:
            return self.disk.size  # what of it is data is not known yet
        differ = self.bitmap.remaining()
        return min(differ, self.bitmap.todo() + copier.taken_bytes) if copier else differ

    async def pause(self) -> None:
        """Stop copying until `resume`; the pause is durable. Refused past the commit point."""
        if self.migration.phase is Phase.PAUSED and self.pause_wished:
            raise self._refusal("pause", "it is paused already")
        self._refuse_unless_reversible("pause")
        await self._set(paused=True)
        self.interrupt.request(Event.PAUSE_REQUESTED, "the operator paused it")

    async def resume(self) -> None:
        """Go on after a pause, or try a degraded target again at once."""
        if self.migration.phase not in (Phase.PAUSED, Phase.DEGRADED):
            raise self._refusal("resume", f"it is {self.migration.phase.value}, not paused")
        await self._set(paused=False)
        self.attempts = self.delays = 0
        self.resumed.set()

    @property
    def pause_wished(self) -> bool:
        """Whether the operator wants the job paused, by what is durable."""
        return bool(self._operator_settings.get("paused"))

    async def cancel(self) -> None:
        """End the move; the source stays. Refused past the commit point."""
        self._refuse_unless_reversible("cancel")
        self.interrupt.request(Event.CANCEL_REQUESTED, "the operator cancelled it")

    async def cutover(self) -> None:
        """Cut over as soon as both sides are equal: no more passes, no more waiting."""
        self._refuse_unless_reversible("cutover")
        await self._set(cutover_wanted=True, mode="mirror")
        self.cutover_wanted.set()
        if self.migration.phase is Phase.CATCHING_UP:
            self.copier.stop()

    async def limit(self, rate: int) -> None:
        """Change the bandwidth limit (bytes a second, 0 is none) from now on."""
        self._refuse_unless_reversible("limit")
        await self._set(limit=rate)
        self._bucket.set_rate(rate, self.around.clock())
        self._share.set_rate(share_of(rate), self.around.clock())
        if self.tracker is not None:
            self.copier.wake()

    # The life of a job

    async def run(self) -> JobStatus:
        """Run until the job has ended. Cancelling leaves everything for a recovery to go on."""
        self._started_s = self.around.wall()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                if self.tracker is not None:
                    self.copier.tasks = tasks
                await self._climb()
        except* Exception as group:
            await self._survive(group)
        assert self._ended is not None
        return self._ended

    async def _survive(self, bug: ExceptionGroup[Exception]) -> None:
        """A bug of ours ends the move, not the guest's disk, if the source is still the truth."""
        _log.error("end job=%s error=%r", self.request.job_id, bug.exceptions[0], exc_info=bug)
        if self.ledger.outcome.authority is Authority.TARGET or self.tracker is None:
            raise bug
        self.tracker.stop_mirroring()
        reason = f"internal error: {bug.exceptions[0]!r}"
        await self._abort(Event.ABORTED, reason, Phase.FAILED)
        self._enter(Event.ABORTED, reason)
        await self._store.close()

    def _follow(self, target: Backend) -> None:
        """Begin to follow the guest's writes.

        At once, not when the job runs: after a recovery the first guest may come before that.
        """
        settings = self.settings
        digests = Digests(self.bitmap.size, settings.chunk_bytes)
        self.tracker = WriteTracker(
            self.disk.backend, target, self.bitmap, self._intents, digests, settings,
            report=self._trouble, give_up=self._give_up, charge=self._charge,
        )  # fmt: skip
        self.copier = Copier(
            self.tracker, settings, Window(settings.chunk_bytes), self._bucket, self._share,
            digests=self.request.verify == "full", report=self._trouble, clock=self.around.clock,
        )  # fmt: skip
        self.verifier = Verifier(self.disk, self.tracker, settings)
        self._copied_before = self.progress.bytes_copied
        self.housekeeping = Housekeeping(self.tracker, settings, self._trouble)
        self.tracker.scanned = self.progress.scanned
        self.disk.follow(self.tracker)

    async def _climb(self) -> None:
        self._enter(*self._first_event())
        if self.tracker is not None:
            loops = [*self.housekeeping.loops(), self._sampling(), self._flush_source(self.tracker)]
            self._helpers = [self._tasks.create_task(loop) for loop in loops]
        if self.pause_wished and self.tracker is not None:
            self.interrupt.request(Event.PAUSE_REQUESTED, "it was paused before the restart")
        while (phase := self.migration.phase) not in TERMINAL:
            event, reason = await self._perform(phase)
            after = MOVES[phase].get(event)
            if after in (Phase.CANCELLED, Phase.FAILED):
                self.sample()
                await self._abort(event, reason, after)
            elif after is Phase.DONE:
                self._ended = await self._conclude(event, reason, after)
            self._enter(event, reason)
        await self._store.close()

    async def _flush_source(self, tracker: WriteTracker) -> None:
        """Make durable what was written before; `WriteTracker.checkpoint` says why.

        A failure is the door's to remember, and the tracker's to report: the job fails by it.
        """
        await self.disk.settle()
        flush = asyncio.ensure_future(self.disk.flush())
        try:
            await asyncio.shield(flush)
        except asyncio.CancelledError:
            self.around.adopt(outlive(flush))
            raise
        except OSError as error:
            self._trouble(SourceError(error, "flush of the source failed"))
        else:
            tracker.source_flushed = True

    def _first_event(self) -> Outcome:
        outcome = self.ledger.outcome
        if outcome.authority is Authority.TARGET:
            return Event.COMMITTED, "the commit record was found after a restart"
        if not self._was_scanned:
            return Event.STARTED, "nothing was copied yet"
        remaining = self.bitmap.remaining()
        of = f" of {format_bytes(self.progress.bytes_total)}" if self.progress.bytes_total else ""
        event = Event.RESUMED if self.progress.passes else Event.RESUMED_IN_BULK
        return event, f"resumed after a restart: {format_bytes(remaining)}{of} are left"

    def _enter(self, event: Event, reason: str) -> None:
        phase = self.migration.handle(event, reason, self.around.wall())
        self.reason = reason
        if phase in (Phase.PAUSED, Phase.DEGRADED):
            self.resumed.clear()
            self.verified = False
            self.space_wanted = event is Event.SPACE_EXHAUSTED
        if self.tracker is not None and phase not in MIRRORED and phase is not Phase.RETIRING:
            self.tracker.stop_mirroring()
        if self.tracker is not None:
            self.housekeeping.checkpoints = phase is not Phase.CUTTING_OVER
        if phase not in REVERSIBLE:
            self._stop_helpers()
        self._predict()
        self.around.changed(self)

    def _stop_helpers(self) -> None:
        for helper in self._helpers:
            helper.cancel()

    async def _perform(self, phase: Phase) -> Outcome:
        """Run the phase's activity until it ends or is interrupted."""
        # Not one of the group's: it may have to be left behind when a name hangs.
        activity = asyncio.ensure_future(self._guarded(phase))
        try:
            while not activity.done():
                if self.interrupt.pending(self.migration) and not self._committing:
                    return await self._leave(activity)
                waiting = self._tasks.create_task(self.interrupt.wait())
                await asyncio.wait((activity, waiting), return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                if self._committing:
                    await asyncio.wait((activity,))
            return activity.result()
        finally:
            if not activity.done():
                activity.cancel()

    async def _leave(self, activity: asyncio.Task[Outcome]) -> Outcome:
        """End an activity; what its workers have in flight ends by itself."""
        if self.tracker is not None:
            self.copier.stop()
        activity.cancel()
        await asyncio.wait((activity,), timeout=self.settings.drain_s)
        if not activity.done():
            self.around.adopt(outlive(activity))
        elif not activity.cancelled():
            return activity.result()  # it ended in the same moment: that comes first
        return self.interrupt.take()

    async def _guarded(self, phase: Phase) -> Outcome:
        """Run the phase's activity; turn trouble with a side into the event that it means."""
        try:
            return await ACTIVITIES[phase](self)
        except (SourceError, TargetError) as error:
            return meaning(error)

    @property
    def _committing(self) -> bool:
        return self.cutover_attempt is not None and self.cutover_attempt.committing

    async def _sampling(self) -> None:
        while True:
            await asyncio.sleep(self.settings.sample_s)
            self.sample()
            if self._predict():
                self.around.changed(self)

    def _predict(self) -> bool:
        """Note how long the present pass will take, once that can be told; True if it was now."""
        if self.held or self.migration.phase not in COUNTED or not self.rates.copy:
            return False
        left_s = self._remaining(self.copier) / self.rates.copy
        return self.migration.predict(left_s, self.around.wall())

    def sample(self) -> None:
        """Measure the rates, and put the counters where a kill doesn't reach them."""
        assert self.tracker is not None
        copied = self.copier.copied_bytes
        self.progress.bytes_copied = self._copied_before + copied
        self.progress.save()
        self.rates.sample(copied, self.bitmap.dirtied_bytes, self.around.clock())

    # Trouble, and the end

    def _trouble(self, error: SideError) -> None:
        waiting = self.migration.phase in (Phase.PAUSED, Phase.DEGRADED)
        if isinstance(error, SourceError) or not waiting:
            self.interrupt.request(*meaning(error))

    def _charge(self, length: int) -> None:
        self._bucket.charge(length, self.around.clock())

    async def _give_up(self, error: OSError) -> None:
        """Abort because the intent map can't be written; raise if that can't be recorded."""
        assert self.tracker is not None
        reason = f"the intent map can't be written: {error}"
        await self._record_abort(reason)
        self.tracker.abandoned = True
        self.interrupt.request(Event.ABORTED, reason)

    async def _abort(self, event: Event, reason: str, after: Phase) -> None:
        """End before the commit point: ABORT durable, then stop following, then clean up."""
        delay_s = self.settings.retry_first_s
        while True:
            try:
                await self._record_abort(reason, cancelled=after is Phase.CANCELLED)
                break
            except OSError as error:
                self.reason = f"waiting for the state directory: {error}"
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, self.settings.retry_max_s)
        assert self.tracker is not None
        self._stop_helpers()
        self.disk.follow(None)
        self.tracker.stop_mirroring()
        self.copier.abandon()
        await self.disk.settle()
        try:
            await self._within_drain(self.target_place.discard(self.request.job_id))
        except OSError as error:
            reason += f"; {self.request.left_over(self.target_place.location, error)}"
        self.around.adopt(self.tracker.close_target())
        self._ended = await self._conclude(event, reason, after)

    async def _within_drain(self, work: Coroutine[Any, Any, None]) -> None:
        """Await work on names, but not for ever: it goes on alone when the place hangs."""
        task = asyncio.ensure_future(work)
        await asyncio.wait((task,), timeout=self.settings.drain_s)
        if not task.done():
            self.around.adopt(outlive(task))
            raise OSError(ETIMEDOUT, "it does not answer")
        task.result()

    async def _record_abort(self, reason: str, *, cancelled: bool = False) -> None:
        """Make ABORT durable, once. Raises `OSError` when that is not known."""
        async with self._ending:
            if self.ledger.outcome.state is State.PREPARED:
                payload = {"reason": reason, "cancelled": cancelled}
                await self.ledger.append(Kind.ABORT, payload)

    async def _conclude(self, event: Event, reason: str, after: Phase) -> JobStatus:
        """Make the summary durable and return it."""
        now_s = self.around.wall()
        step = Step(now_s, after, event, reason)
        ended = replace(
            self.status(),
            phase=after,
            reason=reason,
            ended_s=now_s,
            eta_s=None,
            story=(*self.migration.story, step),
        )
        await self.retirement.record(Kind.DONE, ended.summary())
        return ended

    async def _set(self, **settings: object) -> None:
        """Make an operator's setting durable, and remember it.

        After some 190 changes the journal has no more room: from then on they count, but a
        restart forgets them. Refusing would leave a paused job that nobody can resume.
        """
        async with self._steering:
            merged = {**self._operator_settings, **settings}
            if merged != self._operator_settings:
                await self._record_settings(merged)
            self._operator_settings = merged
            self.request = self.request.changed(merged)

    async def _record_settings(self, merged: dict[str, object]) -> None:
        try:
            await self.ledger.append(Kind.SET, merged)
        except DamagedError as error:  # the job's end is in the journal, but not yet in the phase
            raise self._refusal("steer", "it is just ending") from error
        except RefusedError as error:
            _log.warning("set job=%s durable=no error=%s", self.request.job_id, error)
        except OSError as error:
            raise RefusedError("state-error", f"the journal can't be written: {error}") from error

    def _refuse_unless_reversible(self, verb: str) -> None:
        if self._committing or not self.migration.allows(Event.CANCEL_REQUESTED):
            raise self._refusal(verb, f"it is {self.migration.phase.value}: there is no way back")

    def _refusal(self, verb: str, why: str) -> RefusedError:
        return RefusedError("wrong-phase", f"can't {verb} the move of {self.request.disk}: {why}")
