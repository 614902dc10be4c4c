"""A commit record whose write takes longer than the gate may be closed, and then succeeds.

The gate opens in strict mirroring (rule R15): both sides or none, whatever the record becomes.
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest

from mirrord.core.migration import Phase
from tests.engine.crashes import SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER, Rule
from tests.helpers import eventually_async

NEW = b"\x3c" * 4096
HASTY = replace(SMALL, gate_s=0.05, target_budget_s=0.1)


async def late(bench: CrashBench, *, after: bool = False, budget_s: float = 0.1) -> Rule:
    """Have the commit record's write hang until the gate is open again."""
    bench.settings = replace(HASTY, target_budget_s=budget_s)
    await bench.begin(verify="none")
    commit = bench.at_files.hang("write_log:COMMIT", after=after)
    await bench.run_to(commit)
    await eventually_async(lambda: not bench.gate_closed, what="gate open")
    return commit


async def test_writes_go_to_both_sides_until_the_record_is_durable(bench: CrashBench) -> None:
    commit = await late(bench)
    assert bench.disk.backend is bench.source
    await bench.write(0, NEW)
    await bench.write(UNIT, NEW, fua=True)
    await bench.disk.write_zeroes(2 * UNIT, UNIT)
    await bench.disk.trim(3 * UNIT, UNIT, fua=True)
    bench.expected[2 * UNIT : 4 * UNIT] = bytes(2 * UNIT)
    flushes = bench.at_target.count("flush")
    await bench.disk.flush()
    assert bench.at_target.count("flush") == flushes + 1
    one, other = await bench.both()
    assert one == other == bytes(bench.expected)
    commit.release()
    status = await bench.finish()
    assert status.pause_ms is not None
    assert bench.tracker.strict is False
    await bench.assert_moved(status)


@pytest.mark.parametrize("durable", [False, True], ids=["no-record", "record"])
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power-cut"])
async def test_a_crash_meanwhile(bench: CrashBench, durable: bool, power: bool) -> None:
    """What the guest was promised is on the side that the record, if it is there, names."""
    await late(bench, after=durable)
    await bench.write(0, NEW)
    await bench.disk.flush()
    await bench.write(UNIT, NEW, fua=True)
    await bench.kill(power=power)
    found = await bench.recovered()
    assert found.location == ("mem:target" if durable else "mem:source")
    assert await bench.content() == bytes(bench.expected)
    await bench.assert_moved(await bench.finish())


async def test_the_record_fails_at_last(bench: CrashBench) -> None:
    """ABORT, and the source goes on."""
    bench.settings = HASTY
    await bench.begin(verify="none")
    commit = bench.at_files.hang("write_log:COMMIT")
    await bench.run_to(commit)
    await eventually_async(lambda: not bench.gate_closed, what="gate open")
    bench.at_files.fail("write_log:zeroes", errno=errno.EIO, times=2)
    await bench.write(0, NEW)
    commit.errno = errno.EIO  # when it is released
    commit.release()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert bench.records() == ["PREP", "ABORT", "DONE"]
    assert await bench.content() == bytes(bench.expected)


async def test_a_leg_that_is_late_holds_the_pivot_back(bench: CrashBench) -> None:
    """The guest was told that it failed; landing after the pivot it would undo newer writes."""
    commit = await late(bench)
    leg = bench.at_target.hang("write")
    with pytest.raises(OSError, match="the target failed"):
        await bench.disk.write(0, NEW)
    commit.release()
    await asyncio.wait_for(bench.at_files.settled(), 5)
    await bench.write(UNIT, NEW)
    assert bench.disk.backend is bench.source
    leg.release()
    bench.expected[: len(NEW)] = NEW  # either content would do: the write was not answered well
    await bench.assert_moved(await bench.finish())


async def test_a_guest_that_never_pauses_does_not_hold_the_pivot_back(bench: CrashBench) -> None:
    """There is a write under way at every moment; the gate makes them end."""
    commit = await late(bench, budget_s=60)
    first = bench.at_target.hang("write")
    one = bench.guest(bench.write(0, NEW))
    await first.wait()
    commit.release()
    await asyncio.wait_for(bench.at_files.settled(), 5)
    second = bench.at_target.hang("write")
    other = bench.guest(bench.write(UNIT, NEW))
    await second.wait()
    first.release()
    await one
    await eventually_async(lambda: bench.gate_closed, what="gate closed for the pivot")
    second.release()
    await other
    await bench.assert_moved(await bench.finish())


async def test_a_leg_that_becomes_late_behind_the_gate(bench: CrashBench) -> None:
    """The guest's write was waiting for its mark when the gate closed. The gate opens again."""
    bench.settings = HASTY
    await bench.begin(verify="none")
    publish = bench.at_target.hang("publish")
    await bench.run_to(publish)
    await bench.checkpoint()
    commit = bench.at_files.hang("write_log:COMMIT")
    publish.release()
    await bench.run_to(commit)
    await eventually_async(lambda: not bench.gate_closed, what="gate open")
    mark = bench.at_files.hang("write_map:durable")
    leg = bench.at_target.hang("write")
    guest = bench.guest(bench.disk.write(0, NEW))
    await mark.wait()
    commit.release()
    await eventually_async(lambda: bench.gate_closed, what="gate closed for the pivot")
    mark.release()
    with pytest.raises(OSError, match="the target failed"):
        await guest
    await eventually_async(lambda: not bench.gate_closed, what="gate open again")
    assert bench.disk.backend is bench.source
    leg.release()
    bench.expected[: len(NEW)] = NEW
    await bench.assert_moved(await bench.finish())


async def test_a_target_that_cannot_flush_at_the_late_pivot(bench: CrashBench) -> None:
    """There is no way back, but no flush is believed any more until the disk is opened anew."""
    commit = await late(bench)
    await bench.write(0, NEW)
    failing = bench.at_target.fail("flush", errno=errno.EIO)
    commit.release()
    status = await bench.finish()
    assert status.phase is Phase.DONE
    assert failing.seen == 1
    assert bench.disk.backend is bench.target
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.flush()
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.write(0, NEW, fua=True)
    assert await bench.content() == bytes(bench.expected)


async def test_a_clean_region_is_marked_before_a_strict_write(bench: CrashBench) -> None:
    """Without a durable mark the write fails: were the record lost, nobody would copy it again."""
    bench.settings = HASTY
    await bench.begin(verify="none")
    publish = bench.at_target.hang("publish")
    await bench.run_to(publish)
    await bench.checkpoint()
    commit = bench.at_files.hang("write_log:COMMIT")
    publish.release()
    await bench.run_to(commit)
    await eventually_async(lambda: not bench.gate_closed, what="gate open")
    unwritable = bench.at_files.fail("write_map", errno=errno.EIO, times=FOR_EVER)
    before = bench.at_source.count("write"), bench.at_target.count("write")
    with pytest.raises(OSError, match="the intent map can't be written"):
        await bench.disk.write(0, NEW)
    assert (bench.at_source.count("write"), bench.at_target.count("write")) == before
    unwritable.release()
    await bench.write(0, NEW)
    assert bench.marked(0)
    commit.release()
    await bench.assert_moved(await bench.finish())


async def test_no_command_is_taken_meanwhile(bench: CrashBench) -> None:
    commit = await late(bench)
    for verb in ("pause", "cancel", "cutover"):
        with pytest.raises(Exception, match="there is no way back"):
            await getattr(bench.job, verb)()
    commit.release()
    await bench.assert_moved(await bench.finish())
