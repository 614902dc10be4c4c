"""Guests that write while nobody expects it: before the job runs, and always to one block."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mirrord.core.geometry import MIB
from mirrord.core.migration import Phase
from mirrord.core.pacing import BURST_BYTES
from tests.engine.crashes import UNIT, CrashBench
from tests.engine.faults import DEADLINE_S
from tests.engine.rules import NEW, NEWER, PATIENT, turns
from tests.helpers import eventually_async


async def test_a_write_between_recovery_and_run(bench: CrashBench) -> None:
    """Both sides were equal before the crash. The disk is served before the job runs, and a guest
    is quicker: its write is moved like any other."""
    await bench.hold_mirroring(verify="none")
    await bench.checkpoint()
    await bench.kill()
    await bench.recovered()
    await bench.write(0, NEW)
    assert not bench.tracker.bitmap.clean(0, len(NEW))
    await bench.assert_moved(await bench.cut_over())


async def test_a_write_between_start_and_run(bench: CrashBench) -> None:
    """A hole when the target was made, data when the job looks."""
    await bench.begin(verify="none")
    await bench.write(UNIT, NEW)
    assert bench.marked(UNIT)
    await bench.assert_moved(await bench.finish())


async def test_a_block_that_is_never_idle_gets_clean(bench: CrashBench) -> None:
    """A mirrored write is under way in a dirty block, the copier waits behind it. When the write
    ends it marks the block once more; the copier, which reads only then, copies that too."""
    bench.settings = PATIENT
    rule = await bench.hold_copying(16, mode="mirror", cutover="manual", verify="none")
    assert bench.job.migration.phase is Phase.MIRRORING
    bench.tracker.bitmap.mark(0, 1)
    leg = bench.at_target.hang("write", within=range(UNIT))
    ahead = bench.guest(bench.write(0, NEW[:512]))
    await leg.wait()
    before = bench.job.copier.copied_bytes
    rule.release()
    await eventually_async(
        lambda: bench.job.copier.copied_bytes > before and bench.job.copier.in_flight_bytes > 0,
        what="the copier waits for the block",
    )
    before = bench.job.copier.copied_bytes
    behind = bench.guest(bench.write(512, NEWER[:512]))
    await turns()
    leg.release()
    await ahead
    await behind
    await eventually_async(lambda: bench.job.held, what="both sides equal")
    assert bench.job.copier.copied_bytes - before == bench.job.bitmap.granularity
    await bench.assert_moved(await bench.cut_over())


async def test_a_guest_above_the_limit_does_not_starve_the_copier(tmp_path: Path) -> None:
    """What it writes is mirrored at once and takes all of the limit, and more: the copier goes on
    with its share."""
    bench = CrashBench(tmp_path, BURST_BYTES + 8 * UNIT, settings=PATIENT)
    await bench.begin(limit=8 * MIB, mode="mirror", verify="none")
    bench.run()
    await bench.run_to_phase(Phase.MIRRORING)
    deadline_s = asyncio.get_running_loop().time() + DEADLINE_S
    while bench.job.migration.phase is Phase.MIRRORING:
        await bench.write(0, NEW * 16)
        await asyncio.sleep(0)
        assert asyncio.get_running_loop().time() < deadline_s, bench.told()
    await bench.assert_moved(await bench.finish())
    await bench.close()


async def test_a_worker_that_a_pause_left_calls_nothing_clean_that_was_taken_again(
    bench: CrashBench,
) -> None:
    """It read the block before the guest wrote it, and its own write is still to come."""
    held = await bench.hold_copying(chunk=1)
    await bench.job.pause()
    await bench.run_to_phase(Phase.PAUSED)
    await bench.write(UNIT, NEW)
    await bench.job.resume()
    await bench.run_to_phase(Phase.COPYING)
    taken = bench.tracker.bitmap.todo()
    await turns()
    assert taken == bench.tracker.bitmap.todo() >= len(NEW), "taken while the old worker runs"
    held.release()
    await bench.assert_moved(await bench.finish())
