"""Flushes that overlap something: another flush, a write, a gate, a commit, nobody who waits.

A flush tells of a lost write once, and proves only what had ended before it began.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from mirrord.core.migration import Event, Phase
from mirrord.errors import TargetError
from tests.engine.crashes import SMALL, UNIT, CrashBench
from tests.engine.rules import NEW, NEWER, PATIENT, story, turns
from tests.helpers import eventually_async


async def test_a_flush_whose_gate_timed_out_still_counts(bench: CrashBench) -> None:
    """The target's flush behind the gate outlasts it, and fails when nobody waits for it any more:
    what the target lost by that is copied again."""
    bench.settings = replace(SMALL, gate_s=0.05)
    await bench.begin(verify="none")
    publish = bench.at_target.hang("publish")
    await bench.run_to(publish)
    await bench.write(0, NEW)
    flush = bench.at_target.hang("flush")
    publish.release()
    await flush.wait()
    await eventually_async(lambda: not bench.gate_closed, what="gate open again")
    await bench.target.forget()
    flush.errno = errno.EIO
    flush.release()
    await bench.assert_moved(await bench.finish())
    assert bench.job.gates_missed == 1
    assert "flush of the target failed" in bench.job.migration.tell()


async def test_a_checkpoint_that_fails_behind_the_gate(bench: CrashBench) -> None:
    """Its flush of the target began before the gate, the cutover's own waits behind it and ends
    well: nothing is committed on the strength of that."""
    bench.settings = PATIENT
    await bench.begin(verify="none")
    publish = bench.at_target.hang("publish")
    await bench.run_to(publish)
    await bench.write(0, NEW)
    flush = bench.at_target.hang("flush")
    checkpoint = bench.guest(bench.tracker.checkpoint())
    await flush.wait()
    publish.release()
    await eventually_async(lambda: bench.gate_closed, what="gate closed")
    await turns()
    await bench.target.forget()
    flush.errno = errno.EIO
    flush.release()
    with pytest.raises(TargetError):
        await checkpoint
    await bench.assert_moved(await bench.finish())
    assert Event.TARGET_FAILED in story(bench)


async def test_a_flush_that_has_not_begun_serves_all_who_ask(bench: CrashBench) -> None:
    """Many ask while one is under way: one more is enough for all of them, and a target that
    hangs for an hour has no hundred of them to do when it comes back."""
    await bench.hold_mirroring()
    before = bench.at_target.count("flush")
    flush = bench.at_target.hang("flush")
    first = bench.guest(bench.tracker.flush_target())
    await flush.wait()
    others = [bench.guest(bench.tracker.flush_target()) for _ in range(5)]
    await turns()
    assert bench.at_target.count("flush") == before + 1
    flush.release()
    for one in (first, *others):
        await one
    assert bench.at_target.count("flush") == before + 2


async def test_a_flush_of_the_source_under_way_proves_nothing(bench: CrashBench) -> None:
    """A checkpoint comes while the guest's flush has not ended: the mark stays, because a power
    cut now would take the write from the source alone."""
    await bench.hold_mirroring()
    await bench.checkpoint()
    await bench.write(0, NEW)
    assert bench.marked(0)
    flush = bench.at_source.hang("flush")
    guest = bench.guest(bench.disk.flush())
    await flush.wait()
    await bench.tracker.checkpoint()
    await bench.tracker.checkpoint()
    assert bench.marked(0)
    flush.release()
    await guest
    await bench.tracker.checkpoint()
    assert not bench.marked(0)


async def test_a_flush_of_the_source_proves_nothing_of_later_writes(bench: CrashBench) -> None:
    """A write that ends while the guest's flush is under way is not covered by it."""
    await bench.hold_mirroring()
    await bench.checkpoint()
    flush = bench.at_source.hang("flush")
    guest = bench.guest(bench.disk.flush())
    await flush.wait()
    await bench.write(UNIT, NEW)
    flush.release()
    await guest
    await bench.tracker.checkpoint()
    await bench.tracker.checkpoint()
    assert bench.marked(UNIT)
    await bench.checkpoint()
    assert not bench.marked(UNIT)


async def test_the_sources_failed_flush_is_not_the_targets(bench: CrashBench) -> None:
    """It fails while the commit record is being written: after the pivot the other side is asked,
    which never failed."""
    bench.settings = PATIENT
    await bench.begin(verify="none")
    commit = bench.at_files.hang("write_log:COMMIT")
    await bench.run_to(commit)
    bench.at_source.fail("flush", errno=errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.flush()
    with pytest.raises(OSError, match="an earlier flush failed"):
        await bench.disk.flush()
    commit.release()
    status = await bench.finish()
    assert status.phase is Phase.DONE
    await bench.write(0, NEWER, fua=True)
    await bench.disk.flush()
    await bench.assert_moved(status)
