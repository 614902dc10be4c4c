"""Durable marks that several wait for, when one of them goes away."""

from __future__ import annotations

import asyncio

import pytest

from tests.engine.crashes import UNIT, CrashBench
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
