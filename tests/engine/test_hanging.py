"""Sides that hang: who notices, who needn't wait, and what counts when they come back."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest

from mirrord.core.migration import Event, Phase
from mirrord.engine.locks import Locks
from tests.engine import phases
from tests.engine.crashes import SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER
from tests.engine.rules import NEW, story
from tests.helpers import eventually_async


async def test_a_copy_made_below_that_hangs_is_noticed(bench: CrashBench) -> None:
    """Without digests the backends copy by themselves; a target that hangs then is one."""
    bench.settings = replace(SMALL, target_stall_s=0.05, drain_s=0.05)
    await bench.begin(verify="none")
    copying = bench.at_target.hang("copy_from", times=FOR_EVER)
    await bench.run_to_phase(Phase.DEGRADED)
    assert "the target does not answer" in bench.job.migration.tell()
    copying.release()
    await bench.assert_moved(await bench.finish())


@pytest.mark.parametrize(("side", "named"), [("source", False), ("target", True)])
async def test_only_a_silent_target_is_called_one(
    on_files: CrashBench, side: str, named: bool
) -> None:
    """Copies beside the loop use both sides, and a source may be slow."""
    bench = on_files
    bench.settings = replace(SMALL, target_stall_s=0.05, drain_s=0.05)
    await bench.begin(verify="full")
    faults = bench.at_source if side == "source" else bench.at_target
    hanging = faults.hang("read" if side == "source" else "write")
    await bench.run_to(hanging)
    silence_pause_s = 4 * bench.settings.target_stall_s
    await asyncio.sleep(silence_pause_s)
    assert (bench.job.migration.phase is Phase.DEGRADED) == named
    hanging.release()
    await bench.assert_moved(await bench.finish())


async def test_cancel_does_not_wait_for_the_sources_first_flush(bench: CrashBench) -> None:
    """Tens of gigabytes in the source's cache take minutes; the job goes on beside that."""
    flush = bench.at_source.hang("flush")
    release = await phases.copying(bench)
    await flush.wait()
    await bench.job.cancel()
    assert (await bench.finish()).phase is Phase.CANCELLED
    release()
    flush.release()
    await bench.write(UNIT, NEW)
    assert await bench.content() == bytes(bench.expected)


async def test_a_target_that_hung_has_all_its_attempts_left(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It didn't answer for as many attempts as would pause the job, then comes back with one
    error: that is the first in the row."""
    bench.settings = replace(SMALL, target_stall_s=0.02, flush_stall_s=0.02, target_attempts_max=2)
    await bench.begin(verify="none")
    hanging = bench.at_target.hang("write", at=3)
    honest, attempts = bench.job.copier.drained, 0

    async def drained() -> None:
        nonlocal attempts
        attempts += bench.job.migration.phase is Phase.DEGRADED
        await honest()

    monkeypatch.setattr(bench.job.copier, "drained", drained)
    await bench.run_to(hanging)
    await eventually_async(lambda: attempts > 3, what="attempts")
    error = bench.at_target.fail("flush", errno=errno.EIO)
    hanging.release()
    await bench.assert_moved(await bench.finish())
    assert error.reached.is_set()
    assert Event.PAUSE_REQUESTED not in story(bench)


async def test_a_lock_granted_at_the_last_moment() -> None:
    """Its time is over when it has just been given: whoever waits has it."""
    locks = Locks()
    first = await locks.acquire(0, 8)
    waiting = asyncio.ensure_future(locks.acquire_within(0, 8, limit_s=60))
    await asyncio.sleep(0)
    (ticket,) = locks._waiting
    locks.release(first)
    locks._give_up(ticket)
    assert await waiting is ticket
    locks.release(ticket)
    assert await locks.acquire_within(0, 8, limit_s=60) is not None
