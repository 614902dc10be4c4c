"""The cutover: the one durable step after which the target is the truth.

    prepare   flush the target, publish the final name   may fail, may take long
    gate      new mutations wait, reads go on
    drain     every mutation in flight ends
    check     nothing dirty, still mirroring, nobody wants to leave
    flush     the target: everything the guest was ever promised is durable there
    COMMIT    one durable record
    pivot     the door points at the target; the gate opens

Crash points: before COMMIT is durable the source is the truth and both sides are equal or the
bitmap knows better (rows C7, C8, C9); after it the target is (C10). From the append of COMMIT to
the pivot no guest write is admitted, so no target-only write exists before COMMIT is durable (R7).

When the append takes longer than the gate may be closed, or fails so that its outcome is unknown
(R15), the gate opens in strict mirroring: each write reaches both sides or fails, a flush makes
both durable, and so either record on storage is true. Only a record that is known to be durable
ends that: the late COMMIT, or an ABORT. Until then the target-only gate is not opened.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from mirrord.core.journal import Kind, Payload, State
from mirrord.core.migration import Event
from mirrord.engine.disk import READ_UNIT_BYTES, Disk
from mirrord.engine.ledger import Ledger
from mirrord.engine.settings import EngineSettings
from mirrord.engine.tracking import WriteTracker
from mirrord.errors import TargetError
from mirrord.storage.backend import Backend, Place

_log = logging.getLogger("mirrord.engine")

Outcome = tuple[Event, str]

# Flushes before the gate, each with less to do than the one before; a target that is still slow
# after so many is tried behind the gate all the same, which then may time out.
FLUSHES_MAX = 3

# So much of what the guest reads is looked for in the source's cache at a time.
WARM_UNITS = 64


class Cutover:
    """One attempt. `committing` is True while nobody may interrupt it."""

    def __init__(
        self,
        disk: Disk,
        tracker: WriteTracker,
        ledger: Ledger,
        place: Place,
        job_id: str,
        settings: EngineSettings,
        clock: Callable[[], float],
    ) -> None:
        self.committing = False
        self.aborted = False  # ABORT is durable
        self.former: Backend | None = None  # the source, once pivoted
        self.pause_s: float | None = None
        self._disk = disk
        self._tracker = tracker
        self._ledger = ledger
        self._place = place
        self._job_id = job_id
        self._settings = settings
        self._clock = clock

    @property
    def withdrawable(self) -> bool:
        """Whether no commit record can be on storage, so that the target may be renamed back.

        Not after an ABORT either: it is discarded then, and nothing may come between.
        """
        return not self.committing and not self.aborted

    async def run(self, payload: Payload, wants_to_leave: Callable[[], bool]) -> Outcome:
        """Cut over, and say what came of it: committed, gate timed out, or aborted.

        Raises TargetError when the target fails before the commit; the gate is open again then.
        Cancelling is safe as long as `committing` is False.
        """
        refused = await self._prepare()
        if refused is not None:
            return refused
        self._disk.close_gate()
        closed_s = self._clock()
        try:
            missed = await self._quiesce()
            if missed is None and wants_to_leave():
                missed = "the operator asked for something else"
            if missed is not None:
                return Event.GATE_TIMED_OUT, missed
            self.committing = True  # no await since the last check
            commit = asyncio.ensure_future(self._ledger.append(Kind.COMMIT, payload))
            left_s = max(0.0, self._settings.gate_s - (self._clock() - closed_s))
            await asyncio.wait((commit,), timeout=left_s)
            if commit.done() and commit.exception() is None:
                self.former = self._disk.pivot(self._tracker.target)
        finally:
            self._tracker.strict = self.committing and self.former is None
            self.pause_s = self._clock() - closed_s
            self._disk.open_gate()
        if self.former is None:
            return await self._decide_late(commit)
        return self._committed()

    def _committed(self) -> Outcome:
        pause_ms = (self.pause_s or 0.0) * 1000
        return Event.COMMITTED, f"the guest waited at most {pause_ms:.1f} ms"

    async def _decide_late(self, commit: asyncio.Future[None]) -> Outcome:
        """Go on with the gate open, both sides equal, until the record's outcome is known."""
        try:
            await commit
        except OSError as error:
            return await self._abort_durably(error)
        await self._pivot_late()
        return self._committed()

    async def _pivot_late(self) -> None:
        """Pivot although writes went on since the flush behind the gate.

        A write that failed by its budget may have a leg under way, which must not land after the
        pivot; and what a flush promised meanwhile must be durable on the target. There is no way
        back any more: a target that hangs keeps the disk here, in strict mode.
        """
        while True:
            await self._tracker.asked_so_far()  # not what a guest asks next: it may never pause
            await self._tracker.flush_for_pivot()  # the one behind the gate has less to do
            self._disk.close_gate()
            closed_s = self._clock()
            try:
                await self._disk.settle()
                if not self._tracker.target_busy:
                    believed = await self._tracker.flush_for_pivot()
                    self.former = self._disk.pivot(self._tracker.target)
                    self._disk.flush_failed = not believed
                    self._tracker.strict = False
                    return
            finally:
                self.pause_s = max(self.pause_s or 0.0, self._clock() - closed_s)
                self._disk.open_gate()

    async def _prepare(self) -> Outcome | None:
        """Do everything that can fail or wait, so that the gate is closed for almost nothing."""
        await self._warm()
        for _ in range(FLUSHES_MAX):
            began_s = self._clock()
            await self._tracker.flush_target()
            if self._clock() - began_s < self._settings.gate_s / 2:
                break  # the flush behind the gate will have less to do
        try:
            await self._place.publish(self._job_id)
        except FileNotFoundError:
            why = "leads nowhere: somebody removed the target, or its folder"
            return Event.ABORTED, f"{self._place.location} {why}"
        except FileExistsError:
            return Event.ABORTED, f"something else took the target's name: {self._place.location}"
        except OSError as error:
            raise TargetError(error, "giving the target its name failed") from error
        try:
            doubt = await self._place.confirm(self._job_id, self._tracker.target.identity)
        except OSError as error:
            raise TargetError(error, "looking at the target's name failed") from error
        return None if doubt is None else (Event.ABORTED, doubt)

    async def _warm(self) -> None:
        """Read into the target's cache what the guest reads and has in the source's: the copy is
        not there, and the guest would find everything it works with slow. Once a move."""
        until_s = self._clock() + self._settings.warm_s
        tracker = self._tracker
        left_bytes = 0 if tracker.warmed else self._settings.warm_bytes
        tracker.warmed = True
        unit, size = READ_UNIT_BYTES, self._disk.size
        read = self._disk.read_units.search(1)
        runs = ((index * unit, min(unit, size - index * unit)) for index in read)
        while left_bytes > 0 and self._clock() < until_s:
            some = list(itertools.islice(runs, WARM_UNITS))
            if not some:
                break
            warming = tracker.target.warm_from(tracker.source, some)
            try:
                left_bytes -= await tracker.asked(warming)
            except OSError as error:  # the guest's own read of it may still succeed
                _log.info("not warmed error=%s", error)
                break

    async def _quiesce(self) -> str | None:
        """Drain, check and flush behind the closed gate; return why it didn't work out."""
        limit_s = self._settings.gate_s
        what = "writes in flight"
        try:
            async with asyncio.timeout(limit_s):
                await self._disk.settle()
                what = "the target's last flush"
                if self._tracker.bitmap.dirty() or not self._tracker.mirroring:
                    return "a write was not mirrored"
                await self._tracker.flush_target()
        except TimeoutError:
            return f"{what} did not end within {limit_s:g} s"
        return None

    async def _abort_durably(self, error: OSError) -> Outcome:
        """Keep both sides equal until it is durably known that this move did not happen."""
        delay_s = self._settings.retry_first_s
        reason = f"the commit record could not be made durable ({error})"
        while True:
            try:
                if self._ledger.outcome.state is State.PREPARED:
                    await self._ledger.append(Kind.ABORT, {"reason": reason})
            except OSError:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, self._settings.retry_max_s)
            else:
                self._tracker.strict = self.committing = False
                self.aborted = True
                return Event.ABORTED, reason
