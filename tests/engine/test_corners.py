"""Moments that take some arranging: two things that happen between two steps of one another."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest

from mirrord.core.geometry import Status
from mirrord.core.migration import Event, Phase
from mirrord.engine.cutover import FLUSHES_MAX, Cutover
from tests.engine import phases
from tests.engine.crashes import SIZE, SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER, FaultyBackend
from tests.helpers import eventually_async

NEW = b"\x18" * 4096


async def test_block_status_while_copying(bench: CrashBench) -> None:
    """Dirty is what may differ."""
    rule = await bench.hold_copying(5)
    await bench.write(0, NEW)
    found = bench.disk.dirty_extents(0, SIZE)
    dirty = [(extent.offset, extent.length) for extent in found if extent.status is Status.DIRTY]
    assert dirty == [(0, len(NEW)), (5 * UNIT, UNIT)]
    assert sum(extent.length for extent in found) == SIZE
    rule.release()
    await bench.assert_moved(await bench.finish())


async def test_a_wish_to_leave_just_before_the_commit(bench: CrashBench) -> None:
    """Everything was ready: the gate opens again, and nothing was recorded."""
    await bench.hold_mirroring()
    job = bench.job
    attempt = Cutover(
        bench.disk, bench.tracker, job.ledger, bench.target_place, bench.request.job_id,
        bench.settings, job.around.clock,
    )  # fmt: skip
    event, reason = await attempt.run({}, lambda: True)
    assert (event, reason) == (Event.GATE_TIMED_OUT, "the operator asked for something else")
    assert not bench.gate_closed
    assert attempt.withdrawable
    assert bench.records() == ["PREP"]
    await bench.write(0, NEW)
    await bench.assert_moved(await bench.cut_over())


async def test_a_slow_flush_is_repeated_before_the_gate(bench: CrashBench) -> None:
    """So that the one behind it has less to do; but not for ever."""
    await bench.hold_mirroring()
    settings = replace(SMALL, gate_s=0.0)
    attempt = Cutover(
        bench.disk, bench.tracker, bench.job.ledger, bench.target_place, bench.request.job_id,
        settings, bench.job.around.clock,
    )  # fmt: skip
    before = bench.at_target.count("flush")
    event, _ = await attempt.run({}, lambda: True)
    assert event is Event.GATE_TIMED_OUT
    assert bench.at_target.count("flush") - before >= FLUSHES_MAX
    await bench.assert_moved(await bench.cut_over())


async def test_mirroring_ends_while_a_write_waits_for_its_mark(bench: CrashBench) -> None:
    """It goes on as one that is followed, and is copied later."""
    await bench.hold_mirroring()
    await bench.checkpoint()
    mark = bench.at_files.hang("write_map:durable")
    guest = bench.guest(bench.write(0, NEW))
    await mark.wait()
    bench.tracker.stop_mirroring()
    mark.release()
    await guest
    assert not bench.tracker.bitmap.clean(0, len(NEW))
    assert (await bench.both())[1][: len(NEW)] != NEW
    await bench.job.cutover()
    await bench.assert_moved(await bench.finish())


async def test_a_write_after_the_job_gave_up(bench: CrashBench) -> None:
    """ABORT is durable: no mark is needed any more, and none could be written."""
    release = await phases.copying(bench)
    await bench.checkpoint()
    await bench.at_files.settled()
    bench.at_files.fail("write_map", errno=errno.EIO, times=FOR_EVER)
    done = bench.at_files.hang("write_log:DONE")
    await asyncio.gather(*(bench.write(chunk * UNIT, NEW) for chunk in range(4)))
    assert bench.tracker.abandoned
    await bench.write(7 * UNIT, NEW)
    assert bench.log().records[-1].kind.name == "ABORT"
    done.release()
    release()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert await bench.content() == bytes(bench.expected)


async def test_a_guest_writes_where_verification_looks(bench: CrashBench) -> None:
    """The comparison says nothing then; the chunk is looked at again."""
    await bench.begin()
    reading = bench.at_target.hang("read_stored", times=FOR_EVER)
    await bench.run_to(reading)
    await bench.write(0, NEW)
    await bench.write(16 * UNIT, NEW[:513])
    reading.release()
    status = await bench.finish()
    assert status.verified
    assert Event.MISMATCH_FOUND not in [step.event for step in status.story]
    await bench.assert_moved(status)


async def test_a_dirty_chunk_is_not_compared(bench: CrashBench) -> None:
    """It will be copied again."""
    await bench.begin()
    reading = bench.at_target.hang("read_stored", times=FOR_EVER)
    await bench.run_to(reading)
    bench.tracker.bitmap.mark(16 * UNIT, 1)
    reading.release()
    status = await bench.finish()
    assert "a write was not mirrored" in bench.job.migration.tell()
    await bench.assert_moved(status)


async def test_verification_without_extents_reads(bench: CrashBench) -> None:
    """After a restart there are no digests; a source that can't tell its holes is read."""
    await bench.hold_mirroring()
    await bench.kill()
    await bench.recovered()
    bench.at_source.fail("extents", errno=errno.EIO, times=FOR_EVER)
    await bench.job.cutover()
    status = await bench.finish()
    assert status.verified
    await bench.assert_moved(status)


async def test_trouble_that_turns_out_to_be_no_space(bench: CrashBench) -> None:
    """Degraded by one error, the next attempt says what it is."""
    await bench.begin()
    bench.at_target.fail("write", errno=errno.EIO, at=3, times=2)  # as many as are in flight
    full = bench.at_target.fail("write", errno=errno.ENOSPC, at=5, times=FOR_EVER)
    await bench.run_to_phase(Phase.PAUSED)
    assert "no space at the target" in bench.job.status().reason
    assert Phase.DEGRADED in [step.phase for step in bench.job.migration.story]
    full.release()
    await bench.assert_moved(await bench.finish())


async def test_attempts_that_hang_are_not_counted(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that hangs may come back in an hour."""
    bench.settings = replace(SMALL, target_stall_s=0.02, flush_stall_s=0.02, target_attempts_max=2)
    await bench.begin()
    hanging = bench.at_target.hang("write", at=3)
    await bench.run_to(hanging)
    honest, attempts = bench.job.copier.drained, 0

    async def drained() -> None:
        nonlocal attempts
        attempts += 1
        await honest()

    monkeypatch.setattr(bench.job.copier, "drained", drained)
    await eventually_async(lambda: attempts > 4)
    assert "no answer for" in bench.job.status().reason
    assert bench.job.status().phase is Phase.DEGRADED
    hanging.release()
    await bench.assert_moved(await bench.finish())


async def test_a_checkpoint_that_fails_degrades_the_job(bench: CrashBench) -> None:
    bench.settings = replace(SMALL, checkpoint_s=0.01, sample_s=0.005)
    await bench.hold_mirroring()
    broken = bench.at_target.fail("flush", errno=errno.EIO)
    await broken.wait()
    await bench.write(0, NEW)
    await eventually_async(lambda: "flush of the target failed" in bench.job.migration.tell())
    await bench.assert_moved(await bench.cut_over())


async def test_a_failed_strict_write_poisons_no_flush(bench: CrashBench) -> None:
    """It was the target's error, not one of the source that the guest is promised things by."""
    bench.settings = replace(SMALL, gate_s=0.05, target_budget_s=0.1)
    await bench.begin(verify="none")
    commit = bench.at_files.hang("write_log:COMMIT")
    await bench.run_to(commit)
    await eventually_async(lambda: not bench.gate_closed)
    bench.at_target.fail("write", errno=errno.EIO)
    with pytest.raises(OSError, match="the target failed"):
        await bench.disk.write(0, NEW, fua=True)
    await bench.write(0, NEW, fua=True)
    await bench.disk.flush()
    commit.release()
    await bench.assert_moved(await bench.finish())


@pytest.mark.parametrize("junk", [6, 10], ids=["one chunk of a hole", "a hole of one chunk"])
async def test_a_hole_of_the_source_is_one_of_the_target_or_is_found(
    bench: CrashBench, junk: int
) -> None:
    """Nothing was copied there, so nothing else would notice what the target has."""
    held = bench.shelf.get("source")
    assert held is not None
    for chunk in (4, 5, 6, 7, 10):
        del held.blocks[chunk]
        bench.expected[chunk * UNIT : (chunk + 1) * UNIT] = bytes(UNIT)
    copying = await bench.hold_copying(0)
    target = bench.tracker.target
    assert isinstance(target, FaultyBackend)
    await target.inner.write(junk * UNIT + 100, b"junk")
    copying.release()
    status = await bench.finish()
    assert Event.MISMATCH_FOUND in [step.event for step in status.story]
    await bench.assert_moved(status)
