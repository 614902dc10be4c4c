"""Durable marks that several wait for, when one of them goes away."""

from __future__ import annotations

import asyncio

import pytest

from mirrord.engine import tracking
from tests.engine.crashes import UNIT, CrashBench
from tests.engine.faults import FOR_EVER
from tests.engine.rules import NEW, PATIENT, turns


async def test_a_checkpoint_that_is_cancelled_leaves_the_guests(bench: CrashBench) -> None:
    """It waits for the map's write that two guests wait for, when the job ends it."""
    bench.settings = PATIENT
    await bench.hold_mirroring()
    await bench.checkpoint()
    mark = bench.at_files.hang("write_map:durable")
    guests = [bench.guest(bench.write(n * UNIT, NEW)) for n in range(2)]
    await mark.wait()
    checkpoint = bench.guest(bench.tracker.checkpoint())
    await turns()
    checkpoint.cancel()
    await asyncio.wait((checkpoint,))
    assert checkpoint.cancelled()
    mark.release()
    await asyncio.gather(*guests)
    assert bench.marked(0)
    assert bench.marked(UNIT)
    await bench.assert_moved(await bench.cut_over())


@pytest.mark.parametrize("gone", [1, 2], ids=["second", "third"])
async def test_a_waiting_guest_that_is_gone_leaves_the_others(bench: CrashBench, gone: int) -> None:
    """Of three in the same write of the map, one that did not begin it is cancelled."""
    bench.settings = PATIENT
    await bench.hold_mirroring()
    await bench.checkpoint()
    intents = bench.tracker.intents
    mark = bench.at_files.hang("write_map:durable")
    waiting = [bench.guest(intents.ensure(n * UNIT, 1)) for n in range(3)]
    await mark.wait()
    await turns()
    waiting[gone].cancel()
    await asyncio.wait((waiting[gone],))
    mark.release()
    del waiting[gone]
    await asyncio.gather(*waiting)
    assert intents.marked(0, 1)
    await bench.assert_moved(await bench.cut_over())


async def test_a_trim_over_very_many_runs_is_looked_at_as_one(bench: CrashBench) -> None:
    """A million runs would stop the loop for half a second; what was equal is copied again."""
    bench.settings = PATIENT
    await bench.hold_mirroring()
    tracker = bench.tracker
    held = bench.at_target.hang("write", times=FOR_EVER)  # so that the copier clears nothing
    unit = tracker.bitmap.granularity
    for number in range(0, 6, 2):
        tracker.bitmap.mark(number * unit, unit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "RUNS_MAX", 4)
        await bench.disk.trim(0, 6 * unit)
    bench.expected[: 6 * unit] = bytes(6 * unit)
    assert [run[2] for run in tracker.bitmap.runs(0, 6 * unit)] == [True]
    held.release()
    await bench.assert_moved(await bench.cut_over())


async def test_what_was_equal_stays_equal_beside_what_was_not(bench: CrashBench) -> None:
    bench.settings = PATIENT
    await bench.hold_mirroring()
    tracker = bench.tracker
    held = bench.at_target.hang("write", within=range(1), times=FOR_EVER)
    unit = tracker.bitmap.granularity
    tracker.bitmap.mark(unit, unit)
    await bench.disk.trim(0, 3 * unit)
    bench.expected[: 3 * unit] = bytes(3 * unit)
    dirty = [run[2] for run in tracker.bitmap.runs(0, 3 * unit)]
    assert dirty == [False, True, False]
    held.release()
    await bench.assert_moved(await bench.cut_over())
