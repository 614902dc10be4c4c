"""The rules R1 to R8 of the protocol, one by one: each test fails when its rule is taken out.

What was broken to see that stands in each docstring after "Broken:". A rule's part that lies in
the storage (R6, R12, R17) is also tested with the storage. R9 to R18: `test_rules_late`.
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest

from mirrord.core.migration import Event, Phase
from mirrord.errors import TargetError
from tests.engine.crashes import SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER, Rule
from tests.engine.rules import NEW, NEWER, PATIENT, hold, in_both_phases, story, turns
from tests.helpers import eventually_async

# R1: marked durably before the source is written


@in_both_phases
async def test_r1_the_source_waits_for_the_durable_mark(bench: CrashBench, phase: str) -> None:
    """Only the first write of a clean region pays. Broken: `WriteTracker._ensure` returns at
    once; `Intents._write` writes without `durable`."""
    await hold(bench, phase)
    assert not bench.marked(0)
    rule = bench.at_files.hang("write_map:durable")
    first = bench.guest(bench.write(0, NEW))
    await rule.wait()
    await turns()
    assert bench.at_source.count("write") == 0
    assert not first.done()
    rule.release()
    await first
    assert bench.trace.index("files.write_map:durable") < bench.trace.index("+source.write")
    await bench.write(8192, NEW)
    assert bench.at_files.count("write_map:durable") == 1


@in_both_phases
async def test_r1_a_map_that_cannot_be_written_ends_the_job(bench: CrashBench, phase: str) -> None:
    """ABORT is durable before the source is written. Broken: `_give_up` doesn't record."""
    await hold(bench, phase)
    bench.at_files.fail("write_map", errno=errno.EIO, times=FOR_EVER)
    await bench.write(0, NEW)
    assert bench.trace.index("files.write_log:ABORT") < bench.trace.index("+source.write")
    bench.at_target.heal()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "the intent map can't be written" in status.reason
    assert await bench.content() == bytes(bench.expected)


@in_both_phases
async def test_r1_with_no_durable_state_the_write_fails(bench: CrashBench, phase: str) -> None:
    """Neither the mark nor ABORT can be written: the guest is told, the source is not touched.
    Broken: `_give_up` swallows the error."""
    await hold(bench, phase)
    bench.at_files.fail("write_map", "write_log", errno=errno.EIO, times=FOR_EVER)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await bench.write(0, NEW)
    assert caught.value.errno == errno.EIO
    assert bench.at_source.count("write") == 0


# R2: cleared only when both sides are equal, durably


async def test_r2_a_chunk_copied_during_the_flush_stays_marked(bench: CrashBench) -> None:
    """Broken: `checkpoint` looks what is equal after the flush instead of before."""
    copying = await bench.hold_copying(16, cutover="manual")
    flush = bench.at_target.hang("flush")
    checkpoint = bench.guest(bench.checkpoint())
    await flush.wait()
    copying.release()
    await eventually_async(lambda: not bench.job.bitmap.dirty())
    flush.release()
    await checkpoint
    assert not bench.marked(15 * UNIT)
    assert bench.marked(16 * UNIT)


async def test_r2_nothing_is_cleared_when_the_flush_fails(bench: CrashBench) -> None:
    """Broken: `checkpoint` clears before the flush."""
    await bench.hold_mirroring()
    bench.at_target.fail("flush", errno=errno.EIO)
    with pytest.raises(TargetError):
        await bench.checkpoint()
    assert bench.marked(0)
    assert bench.at_files.count("write_map:lazy") == 0


@in_both_phases
async def test_r2_a_write_in_flight_keeps_the_mark(bench: CrashBench, phase: str) -> None:
    """Also one that began while the target was flushed. Broken: `checkpoint` doesn't look again
    after the flush, at the bitmap or at what is hot."""
    if phase == "mirrored":
        await bench.hold_mirroring()
    else:
        await bench.hold_copying(16, cutover="manual")
    flush = bench.at_target.hang("flush")
    checkpoint = bench.guest(bench.checkpoint())
    await flush.wait()
    rule = bench.at_source.hang("write")
    writing = bench.guest(bench.write(0, NEWER))
    await rule.wait()
    flush.release()
    await checkpoint
    assert bench.marked(0)
    rule.release()
    await writing


async def test_r2_what_the_source_may_forget_stays_marked(bench: CrashBench) -> None:
    """The target has the write durably, the source has not: after a power cut they would differ.
    Broken: `checkpoint` doesn't ask for `_source_unflushed`."""
    await bench.hold_mirroring()
    await bench.checkpoint()
    await bench.write(0, NEW)
    await bench.tracker.checkpoint()
    await bench.tracker.checkpoint()
    assert bench.marked(0)
    await bench.kill(power=True)  # the guest was promised nothing: either content will do
    bench.expected[: len(NEW)] = bench.shelf_content("source")[: len(NEW)]
    await bench.recovered()
    await bench.assert_moved(await bench.cut_over())


# R3: dirty also after the write


async def write_under_the_copier(bench: CrashBench) -> Rule:
    """Have a guest's write hang at the source while its block is copied as it was before."""
    await bench.begin(cutover="manual")
    copying = bench.at_target.hang("write", within=range(UNIT))
    await bench.run_to(copying)
    writing = bench.at_source.hang("write")
    bench.guest(bench.write(9 * UNIT, NEW))
    await writing.wait()
    copying.release()
    await eventually_async(lambda: bench.job.bitmap.remaining() == len(NEW), what="copied")
    await bench.job.copier.drained()
    return writing


async def test_r3_a_write_during_the_copy_of_its_block_is_copied(bench: CrashBench) -> None:
    """Broken: no second `mark` in `_follow`."""
    writing = await write_under_the_copier(bench)
    assert (await bench.both())[1][9 * UNIT : 9 * UNIT + len(NEW)] != NEW
    assert bench.job.bitmap.todo() == 0
    writing.release()
    await eventually_async(lambda: bench.job.held)
    await bench.assert_moved(await bench.cut_over())


async def test_r3_a_kill_during_such_a_write(bench: CrashBench) -> None:
    """The source has it, the target a copy from before, nobody was answered: the block must still
    be marked. Broken: `in_flight` is empty."""
    await write_under_the_copier(bench)
    await bench.source.inner.write(9 * UNIT, NEW)
    await bench.kill()
    bench.expected[9 * UNIT : 9 * UNIT + len(NEW)] = NEW
    await bench.recovered()
    await bench.assert_moved(await bench.cut_over())


# R4: copier and mirrored writes exclude each other


async def test_r4_a_mirrored_write_waits_for_the_copy_of_its_block(bench: CrashBench) -> None:
    """Else the copier's older data would land on top. Broken: `Locks.acquire_within` grants."""
    bench.settings = PATIENT
    copying = await bench.hold_copying(5, mode="mirror", cutover="manual", verify="none")
    assert bench.tracker.mirroring
    guest = bench.guest(bench.write(5 * UNIT, NEW))
    await turns()
    assert not guest.done()
    assert bench.at_source.count("write") == 0
    copying.release()
    await guest
    assert (await bench.both())[1][5 * UNIT : 5 * UNIT + len(NEW)] == NEW
    await bench.assert_moved(await bench.cut_over())


async def test_r4_the_copier_waits_for_a_late_leg(bench: CrashBench) -> None:
    """A mirrored write gave up its target's leg; until that has ended nothing else may go there.
    Broken: `_mirrored` releases its lock at once."""
    await bench.hold_mirroring(verify="none")
    leg = bench.at_target.hang("write")
    await bench.write(0, NEW)  # answered from the source when the budget is over
    await bench.write(0, NEWER)
    await eventually_async(
        lambda: (bench.job.attempts > 0 and bench.job.copier.in_flight_bytes > 0)
        or bench.job.migration.phase not in (Phase.MIRRORING, Phase.DEGRADED)
    )  # fmt: skip
    await turns()
    assert bench.at_target.count("write") == 1 + 17  # the bulk pass's, and the leg
    leg.release()
    status = await bench.cut_over()
    assert status.phase is Phase.DONE
    assert await bench.content() == bytes(bench.expected)


async def test_r4_overlapping_writes_reach_both_sides_in_one_order(bench: CrashBench) -> None:
    """First come, first served, over all connections. Broken: `Locks.acquire_within` grants."""
    bench.settings = PATIENT
    await bench.hold_mirroring(verify="none")
    leg = bench.at_target.hang("write", at=1)
    one = bench.guest(bench.write(0, NEW))
    await leg.wait()
    other = bench.guest(bench.write(0, NEWER))
    beside = bench.guest(bench.write(UNIT, NEW))
    await beside
    assert not other.done()
    leg.release()
    await asyncio.gather(one, other)
    assert [side[: len(NEW)] for side in await bench.both()] == [NEWER, NEWER]


# R5: gate, drain, nothing dirty, target flushed


async def write_into_the_gate(bench: CrashBench) -> tuple[asyncio.Task[None], Rule]:
    """Have a guest's write under way, which the source doesn't answer, when the gate closes."""
    await bench.begin(verify="none")
    publish = bench.at_target.hang("publish")
    await bench.run_to(publish)
    writing = bench.at_source.hang("write")
    before = bench.guest(bench.write(0, NEW))
    await writing.wait()
    publish.release()
    await eventually_async(lambda: bench.gate_closed, what="gate closed")
    return before, writing


async def test_r5_the_cutover_drains(bench: CrashBench) -> None:
    """Broken: `_quiesce` doesn't settle; `close_gate` is left out."""
    bench.settings = PATIENT
    before, writing = await write_into_the_gate(bench)
    held = bench.guest(bench.write(UNIT, NEW))
    await turns()
    assert not held.done()
    assert bench.at_source.count("write") == 1
    assert bench.at_files.count("write_log:COMMIT") == 0
    assert bytes(await bench.disk.read(UNIT, 4096)) != NEW  # reads go on
    writing.release()
    await asyncio.gather(before, held)
    status = await bench.finish()
    assert Event.GATE_TIMED_OUT not in story(bench)
    await bench.assert_moved(status)


async def test_r5_a_drain_that_takes_too_long_opens_the_gate(bench: CrashBench) -> None:
    """Broken: `_quiesce` has no time limit."""
    bench.settings = replace(SMALL, gate_s=0.05)
    before, writing = await write_into_the_gate(bench)
    await bench.write(UNIT, NEW)  # held, then let go on
    await eventually_async(lambda: Event.GATE_TIMED_OUT in story(bench))
    assert "did not end within 0.05 s" in bench.job.migration.tell()
    assert not bench.tracker.bitmap.clean(0, 4096)
    writing.release()
    await before
    await bench.assert_moved(await bench.finish())


async def test_r5_no_commit_while_something_is_dirty(bench: CrashBench) -> None:
    """Broken: `_quiesce` doesn't look at the bitmap."""
    await bench.begin()
    publish = bench.at_target.hang("publish")
    await bench.run_to(publish)
    bench.tracker.bitmap.mark(0, 4096)
    publish.release()
    status = await bench.finish()
    assert Event.GATE_TIMED_OUT in story(bench)
    assert "a write was not mirrored" in bench.job.migration.tell()
    await bench.assert_moved(status)


@pytest.mark.parametrize("promise", ["flush", "fua"])
async def test_r5_the_target_is_flushed_behind_the_gate(bench: CrashBench, promise: str) -> None:
    """What the guest was promised is durable at the target before the commit. Broken: `_quiesce`
    doesn't flush."""
    await bench.begin(verify="none")
    publish = bench.at_target.hang("publish")
    await bench.run_to(publish)
    await bench.write(0, NEW, fua=promise == "fua")
    if promise == "flush":
        await bench.disk.flush()
    commit = bench.at_files.hang("write_log:COMMIT", after=True)
    publish.release()
    await bench.run_to(commit)
    await bench.kill(power=True)
    found = await bench.recovered()
    assert found.location == "mem:target"
    assert await bench.content() == bytes(bench.expected)


# R6: the final name before the commit, and before the gate


async def test_r6_the_target_has_its_name_before_the_gate(bench: CrashBench) -> None:
    """So the pause is short. Broken: `_prepare` doesn't publish; the gate is closed before it."""
    await bench.begin()
    publish = bench.at_target.hang("publish")
    await bench.run_to(publish)
    assert not bench.gate_closed
    await bench.write(0, NEW)
    publish.release()
    status = await bench.finish()
    assert bench.trace.index("target.publish") < bench.trace.index("+files.write_log:COMMIT")
    await bench.assert_moved(status)


# R7: no target-only write before the commit is durable


async def test_r7_no_write_is_answered_while_the_commit_is_written(bench: CrashBench) -> None:
    """Broken: `Cutover.run` pivots and opens the gate before the append."""
    await bench.begin()
    commit = bench.at_files.hang("write_log:COMMIT")
    await bench.run_to(commit)
    held = bench.guest(bench.write(0, NEW))
    await turns()
    assert not held.done()
    assert bench.disk.backend is bench.source
    before = bench.at_source.count("write")
    commit.release()
    await held
    assert bench.disk.backend is bench.target
    assert bench.at_source.count("write") == before
    await bench.assert_moved(await bench.finish())


# R8: the source is deleted only after the commit is durable


async def test_r8_the_source_is_not_touched_before_the_commit(bench: CrashBench) -> None:
    """Broken: `Ledger.append` doesn't wait for its write."""
    await bench.begin()
    commit = bench.at_files.hang("write_log:COMMIT")
    await bench.run_to(commit)
    await turns(100)
    assert not {"+source.retire", "+source.delete_retired", "+registry.moved"} & set(bench.trace)
    commit.release()
    await bench.assert_moved(await bench.finish())


async def test_r8_a_source_is_renamed_before_it_is_unlinked(bench: CrashBench) -> None:
    """Broken: `Retirement._retire` doesn't record RETIRED; doesn't confirm the target."""
    await bench.begin()
    status = await bench.finish()
    steps = ["target.confirm", "source.retire", "files.write_log:RETIRED", "source.delete_retired"]
    committed = bench.trace.index("files.write_log:COMMIT")
    found = [step for step in bench.trace[committed:] if step in steps]
    assert found == steps
    await bench.assert_moved(status)
