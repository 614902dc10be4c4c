"""What a job does in each phase: one coroutine a phase, which ends in the event that leads on.

An activity may be cancelled at any await but within the commit (`cutover`): it leaves workers to
end by themselves, and the next activity finds everything in the maps. It may raise SourceError
and TargetError; `meaning` says which event they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from errno import ENOTCONN, ESTALE, ETIMEDOUT
from typing import TYPE_CHECKING, Any

from mirrord.core.geometry import Status
from mirrord.core.migration import Event, Phase
from mirrord.core.pacing import PASS_MIN_S, Rates, pass_pays
from mirrord.core.units import format_bytes
from mirrord.engine.copier import AWAY, DENIED, NO_SPACE
from mirrord.engine.cutover import Cutover
from mirrord.errors import SideError, SourceError, TargetError

if TYPE_CHECKING:
    from mirrord.engine.job import Job

Outcome = tuple[Event, str]

# Where so many chunks fewer are left than at its last trouble, a target is not failing "in a row".
PROGRESS_CHUNKS = 16


async def copying(job: Job) -> Outcome:
    """Make the bulk pass over everything that is data."""
    await job.disk.settle()  # writes that began before they were followed
    if not job.progress.scanned:
        await _scan(job)
    if job.request.mode == "mirror":
        return Event.MIRROR_CHOSEN, "mirroring from the start, as asked"
    job.sample()  # a rate needs two
    await _walk(job)
    job.progress.passes = max(1, job.progress.passes)  # the bulk pass of an empty disk counts
    return Event.PASS_ENDED, f"the bulk pass copied {format_bytes(job.copier.copied_bytes)}"


async def catching_up(job: Job) -> Outcome:
    """Make a pass over what was written meanwhile, or choose to mirror."""
    await job.disk.settle()
    job.sample()
    remaining = job.bitmap.remaining()
    copy_rate, dirty_rate = job.rates.copy, job.rates.dirty
    if copy_rate:
        pays, why = pass_pays(remaining, copy_rate, dirty_rate)
    else:  # after a restart, or a bulk pass too short to measure
        pays, why = True, f"{format_bytes(remaining)} to copy at a rate not known yet"
    if job.request.mode == "mirror":
        return Event.MIRROR_CHOSEN, "mirroring, as asked"
    if remaining == 0:
        return Event.MIRROR_CHOSEN, "nothing is left to copy"
    if not pays and (job.request.mode == "auto" or remaining < copy_rate * PASS_MIN_S):
        return Event.MIRROR_CHOSEN, why
    if not pays:
        job.reason = f"will not finish by passes alone: {why}"
    await _walk(job)
    return Event.PASS_ENDED, f"pass {job.progress.passes} began with {why}"


async def mirroring(job: Job) -> Outcome:
    """Send writes to both sides and copy the rest, until both are equal."""
    assert job.tracker is not None
    if job.held and job.tracker.mirroring:
        await job.cutover_wanted.wait()
    job.held = False
    mirror = job.tracker.start_mirroring()
    await job.disk.settle()
    mirror.settled = True
    while job.bitmap.todo() or job.copier.in_flight_bytes:
        await _walk(job)
    return Event.SYNCED, "both sides are equal, every write goes to both"


async def verifying(job: Job) -> Outcome:
    """Compare; a mismatch is copied again once."""
    if job.request.verify != "none":
        verdict = await job.verifier.run()
        if verdict.mismatches:
            assert job.tracker is not None
            job.verified = False
            # A mirrored write that is under way must not drop these marks at its end.
            job.tracker.stop_mirroring()
            for offset in verdict.mismatches:
                length = min(job.settings.chunk_bytes, job.bitmap.size - offset)
                job.bitmap.mark(offset, length)
            if job.mismatched:
                return Event.ABORTED, f"the target differs again: {verdict.reason}"
            job.mismatched = True
            return Event.MISMATCH_FOUND, f"copying again: {verdict.reason}"
        job.verified = True
        job.reason = verdict.reason
    if job.request.cutover == "manual" and not job.cutover_wanted.is_set():
        job.held = True
        job.attempts = 0
        return Event.CUTOVER_HELD, "in step with the source; waiting for `mirrord cutover`"
    return Event.VERIFIED, job.reason if job.verified else "verification was not asked for"


async def cutting_over(job: Job) -> Outcome:
    """Try the cutover once."""
    assert job.tracker is not None
    await job.housekeeping.check_unchanged()
    job.sample()
    job.cutover_attempt = Cutover(
        job.disk, job.tracker, job.ledger, job.target_place, job.request.job_id,
        job.settings, job.around.clock,
    )  # fmt: skip
    try:
        event, reason = await job.cutover_attempt.run(
            {**job.progress.summary(), "verified": job.verified, "at_s": job.around.wall()},
            lambda: job.interrupt.pending(job.migration),
        )
    finally:
        if job.cutover_attempt.withdrawable:
            await _withdraw(job)
    if job.cutover_attempt.pause_s is not None:
        job.pause_s = max(job.pause_s or 0.0, job.cutover_attempt.pause_s)
    if event is Event.GATE_TIMED_OUT:
        await _rest(job)
    job.former = job.cutover_attempt.former
    return event, reason


async def _rest(job: Job) -> None:
    """Let the guest write for a while before the next gate: longer each time, and in any case
    so long that gates take at most a fifth of its time."""
    job.gates_missed += 1
    doubled = job.settings.retry_first_s * 2 ** min(job.gates_missed - 1, 16)
    held_s = (job.cutover_attempt and job.cutover_attempt.pause_s) or 0.0
    await asyncio.sleep(max(min(doubled, job.settings.retry_max_s), 4 * held_s))


async def retiring(job: Job) -> Outcome:
    """Delete the source, after the commit point."""
    text = await job.retirement.run(job.former, job.source_identity, job.target_identity)
    return Event.SOURCE_RETIRED, text


async def paused(job: Job) -> Outcome:
    """Wait for the operator, or for space."""
    job.copier.stop()
    while job.space_wanted and not job.pause_wished and not job.resumed.is_set():
        await _wait(job.resumed, job.settings.space_probe_s)
        if job.resumed.is_set():
            break
        trouble = await _try(job)
        if trouble is not None:
            job.reason = str(trouble)
        elif not job.pause_wished:
            return _back(job, "there is space again")
    if job.space_wanted and job.pause_wished:
        job.reason = "the operator paused it"
    await job.resumed.wait()
    return _back(job, "the operator resumed it")


async def degraded(job: Job) -> Outcome:
    """Try a failing target again, with growing delays; not for ever, if that leads nowhere."""
    before, job.left_at_trouble = job.left_at_trouble, job.bitmap.remaining()
    if job.left_at_trouble < before - PROGRESS_CHUNKS * job.settings.chunk_bytes:
        job.attempts = job.delays = 0
    elif job.migration.story[-1].event is Event.TARGET_AWAY:
        job.attempts = max(0, job.attempts - 1)
    if job.around.clock() - job.working_since_s > job.settings.retry_max_s:
        job.delays = 0
    while job.attempts < job.settings.target_attempts_max:
        job.attempts += 1
        job.delays += 1
        await _wait(job.resumed, _backoff_s(job))
        job.resumed.clear()
        copied_before = job.copier.copied_bytes
        trouble = await _try(job)
        if trouble is None:
            return _back(job, "the target works again")
        if trouble.errno == ENOTCONN and job.copier.copied_bytes > copied_before:
            job.delays = 0  # it is there: its first flush tells what it may have forgotten (R13)
        job.reason = str(trouble)
        if trouble.errno in NO_SPACE:
            return meaning(trouble)
        if trouble.errno in DENIED:
            return Event.PAUSE_REQUESTED, f"the target is denied: {trouble}"
        if trouble.errno in AWAY:
            job.attempts = max(0, job.attempts - 1)
    return Event.PAUSE_REQUESTED, f"{job.attempts} attempts failed, the last: {job.reason}"


async def _walk(job: Job) -> None:
    """Make a pass; returns only when it came to its end. One that found nothing isn't counted."""
    copied_before = job.copier.copied_bytes
    while not await job.copier.walk():
        if job.cutover_wanted.is_set() and job.migration.phase is Phase.CATCHING_UP:
            return
        # A worker reported trouble, which interrupts this activity; or `stop` raced with it.
        await asyncio.sleep(0)
    job.progress.passes += job.copier.copied_bytes > copied_before
    job.sample()


async def _scan(job: Job) -> None:
    """Mark what is data. The guest's own writes are marked by themselves meanwhile."""
    assert job.tracker is not None
    source, target = job.tracker.source, job.tracker.target
    offset = 0
    while offset < source.size:
        length = min(job.settings.scan_bytes, source.size - offset)
        if not target.capabilities.starts_zeroed:
            job.bitmap.put_back(offset, length)
            offset += length
            await asyncio.sleep(0)
            continue
        try:
            extents = await source.extents(offset, length)
        except OSError as error:
            raise SourceError(error, "extents of the source failed", offset) from error
        for extent in extents:
            if extent.status is Status.DATA:
                job.bitmap.put_back(extent.offset, extent.length)
            offset = extent.end
    job.progress.bytes_total = job.bitmap.remaining()
    job.progress.scanned = job.tracker.scanned = True
    job.progress.save()


async def _try(job: Job) -> TargetError | None:
    """Try the target with one piece and a flush; return what is wrong with it still.

    Raises TargetError when somebody changed its size: no later attempt makes it whole.
    """
    assert job.tracker is not None
    limit_s = job.settings.target_stall_s
    try:
        async with asyncio.timeout(limit_s):
            await job.copier.drained()
            await job.copier.try_one()
            await job.tracker.flush_target()
            await job.housekeeping.check_target()
    except TimeoutError:
        error = OSError(ETIMEDOUT, f"no answer for {limit_s:g} s")
        return TargetError(error, "the target does not answer")
    except TargetError as error:
        if error.errno == ESTALE:
            raise
        return error
    return None


async def _wait(event: asyncio.Event, limit_s: float) -> None:
    """Wait for the event, but not longer than `limit_s`."""
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return


def _back(job: Job, reason: str) -> Outcome:
    """Return the event that leads out of a pause.

    Everything is verified anew: what the target had may have suffered meanwhile.
    """
    assert job.tracker is not None
    job.tracker.digests.restart()
    job.working_since_s = job.around.clock()
    job.rates = Rates()  # what was measured before a pause says nothing about after it
    in_bulk = job.progress.passes == 0
    return (Event.RESUMED_IN_BULK if in_bulk else Event.RESUMED), reason


def _backoff_s(job: Job) -> float:
    doubled: float = job.settings.retry_first_s * 2 ** min(job.delays - 1, 16)
    return min(doubled, job.settings.retry_max_s)


async def _withdraw(job: Job) -> None:
    """Take the target's final name back. If that fails, recovery and publish know both."""
    try:
        await job.target_place.withdraw(job.request.job_id)
    except OSError as error:
        job.reason = f"the target kept its final name: {error}"


def meaning(error: SideError) -> Outcome:
    """Return the event that trouble with a side is, and the reason to show."""
    if isinstance(error, SourceError):
        return Event.ABORTED, str(error)
    if error.errno == ESTALE:
        return Event.ABORTED, str(error)
    if error.errno in NO_SPACE:
        return Event.SPACE_EXHAUSTED, f"no space at the target: {error}"
    return (Event.TARGET_AWAY if error.errno in AWAY else Event.TARGET_FAILED), str(error)


ACTIVITIES: dict[Phase, Callable[[Job], Coroutine[Any, Any, Outcome]]] = {
    Phase.COPYING: copying,
    Phase.CATCHING_UP: catching_up,
    Phase.MIRRORING: mirroring,
    Phase.VERIFYING: verifying,
    Phase.CUTTING_OVER: cutting_over,
    Phase.RETIRING: retiring,
    Phase.PAUSED: paused,
    Phase.DEGRADED: degraded,
}
