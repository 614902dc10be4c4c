"""Strict mirroring: from a commit record whose outcome is not known to the one that is.

Each write reaches both sides or fails, a flush makes both durable. What a crash finds meanwhile
is in `test_rules_late` (R15), a record that is only late in `test_late_commit`.
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest

from mirrord.core.migration import Phase
from mirrord.errors import TargetError
from tests.engine.crashes import SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER, Rule
from tests.engine.rules import NEW, NEWER, turns
from tests.helpers import eventually_async

HASTY = replace(SMALL, gate_s=0.05, target_budget_s=5.0)


async def doubt(bench: CrashBench) -> Rule:
    """Have the commit record's write hang until the gate is open again, and strict mode on."""
    bench.settings = HASTY
    await bench.begin(verify="none")
    commit = bench.at_files.hang("write_log:COMMIT")
    await bench.run_to(commit)
    await eventually_async(lambda: bench.tracker.strict and not bench.gate_closed)
    return commit


@pytest.mark.parametrize("slow", ["source", "target"])
async def test_overlapping_writes_reach_both_sides_in_one_order(
    bench: CrashBench, slow: str
) -> None:
    """One side has the first write, the other not yet: the second waits for both."""
    commit = await doubt(bench)
    at_slow = bench.at_source if slow == "source" else bench.at_target
    rule = at_slow.hang("write")
    first = bench.guest(bench.disk.write(0, NEW))
    await rule.wait()
    await turns()
    second = bench.guest(bench.write(0, NEWER))
    beside = bench.guest(bench.write(UNIT, NEW))
    await beside
    assert not second.done()
    rule.release()
    await asyncio.gather(first, second)
    assert [side[: len(NEWER)] for side in await bench.both()] == [NEWER, NEWER]
    commit.release()
    await bench.assert_moved(await bench.finish())


async def test_the_targets_failed_flush_is_not_the_sources(bench: CrashBench) -> None:
    """The guest's flush fails because the target's did. After the ABORT the source alone counts,
    which never failed."""
    commit = await doubt(bench)
    bench.at_target.fail("flush", errno=errno.EIO)
    with pytest.raises(OSError, match="the flush of the target failed"):
        await bench.disk.flush()
    commit.errno = errno.EIO
    commit.release()
    assert (await bench.finish()).phase is Phase.FAILED
    await bench.write(0, NEW, fua=True)
    await bench.disk.flush()
    assert await bench.content() == bytes(bench.expected)


async def test_the_targets_failed_flush_is_remembered_over_the_pivot(bench: CrashBench) -> None:
    """The guest was told once. The next flush would succeed although a write is lost: none is
    believed until the disk is opened anew."""
    commit = await doubt(bench)
    await bench.write(0, NEW)
    bench.at_target.fail("flush", errno=errno.EIO)
    with pytest.raises(OSError, match="the flush of the target failed"):
        await bench.disk.flush()
    commit.release()
    assert (await bench.finish()).phase is Phase.DONE
    assert bench.disk.backend is bench.target
    with pytest.raises(OSError, match="an earlier flush failed"):
        await bench.disk.flush()


@pytest.mark.parametrize("whose", ["a FUA write's", "a checkpoint's"])
async def test_any_failed_flush_of_the_target_is_remembered(bench: CrashBench, whose: str) -> None:
    """What it lost is what an earlier write brought, which a guest's next flush would promise."""
    commit = await doubt(bench)
    await bench.write(0, NEW)
    bench.at_target.fail("flush", errno=errno.EIO)
    if whose == "a FUA write's":
        with pytest.raises(OSError, match="the flush of the target failed"):
            await bench.disk.write(UNIT, NEW, fua=True)
    else:
        with pytest.raises(TargetError):
            await bench.tracker.flush_target()
    with pytest.raises(OSError, match="an earlier flush of the target failed"):
        await bench.disk.flush()
    with pytest.raises(OSError, match="an earlier flush of the target failed"):
        await bench.disk.write(UNIT, NEW, fua=True)
    await bench.disk.write(UNIT, NEW)
    commit.release()
    assert (await bench.finish()).phase is Phase.DONE
    with pytest.raises(OSError, match="an earlier flush failed"):
        await bench.disk.flush()


@pytest.mark.parametrize("outcome", ["committed", "aborted"])
async def test_a_fua_write_waits_no_longer_than_its_budget(bench: CrashBench, outcome: str) -> None:
    """Else the gate would wait for it, and with the gate the whole guest, or the job's end."""
    commit = await doubt(bench)
    bench.tracker._settings = replace(HASTY, target_budget_s=0.1)
    hanging = bench.at_target.hang("flush", times=FOR_EVER)
    guests = [bench.guest(bench.disk.write(UNIT * n, NEW, fua=True)) for n in range(3)]
    await hanging.wait()
    if outcome == "aborted":
        commit.errno = errno.EIO
    commit.release()
    for guest in guests:
        with pytest.raises(OSError, match="the commit is unknown"):
            await guest
    await asyncio.wait_for(bench.disk.write(0, NEW), 1)
    hanging.release()
    phase = (await bench.finish()).phase
    assert phase is (Phase.DONE if outcome == "committed" else Phase.FAILED)


async def test_a_flush_serves_all_fua_writes_that_wait_for_it(bench: CrashBench) -> None:
    """One for each, one after another, would take a deep queue beyond its budget."""
    commit = await doubt(bench)
    before = bench.at_target.count("flush")
    rule = bench.at_target.hang("flush")
    first = bench.guest(bench.disk.flush())
    await rule.wait()
    guests = [bench.guest(bench.disk.write(UNIT * n, NEW, fua=True)) for n in range(5)]
    await turns()
    assert not any(guest.done() for guest in guests)
    rule.release()
    await asyncio.gather(first, *guests)
    assert bench.at_target.count("flush") == before + 2
    commit.release()
    await bench.finish()


async def test_fast_zeroes_are_refused_before_a_side_is_changed(bench: CrashBench) -> None:
    """The source would refuse and change nothing, and the target have zeroes."""
    commit = await doubt(bench)
    await bench.write(0, NEW)
    with pytest.raises(OSError, match="not known") as refused:
        await bench.disk.write_zeroes(0, UNIT, fast=True)
    assert refused.value.errno == errno.ENOTSUP
    commit.release()
    await bench.assert_moved(await bench.finish())


@pytest.mark.parametrize("first", ["a guest's", "a checkpoint's"])
async def test_a_flush_waits_for_one_under_way(bench: CrashBench, first: str) -> None:
    """It would take the place of one that is to fail: a lost page is told of once."""
    commit = await doubt(bench)
    await bench.write(0, NEW)
    rule = bench.at_target.hang("flush")
    begin = bench.disk.flush if first == "a guest's" else bench.tracker.flush_target
    before = bench.guest(begin())
    await rule.wait()
    asked = bench.at_target.count("flush")
    guests = [bench.guest(bench.disk.flush()), bench.guest(bench.disk.write(UNIT, NEW, fua=True))]
    await turns()
    assert bench.at_target.count("flush") == asked
    assert not any(guest.done() for guest in guests)
    rule.errno = errno.EIO
    rule.release()
    with pytest.raises((OSError, TargetError)):
        await before
    for guest in guests:
        with pytest.raises(OSError, match="an earlier flush of the target failed"):
            await guest
    commit.release()
    assert (await bench.finish()).phase is Phase.DONE


@pytest.mark.parametrize("works", [True, False], ids=["works", "fails"])
async def test_a_flush_that_waits_for_the_pivots(bench: CrashBench, works: bool) -> None:
    """The pivot's flush is as good, and a failed one of the disk's own would be no other's."""
    commit = await doubt(bench)
    await bench.write(0, NEW)
    rule = bench.at_target.hang("flush", at=2)  # the first is before the gate closes
    commit.release()
    await rule.wait()
    guest = bench.guest(bench.disk.flush())
    await turns()
    asked = bench.at_target.count("flush")
    if not works:
        rule.errno = errno.EIO
    rule.release()
    if works:
        await guest
        await bench.target.forget()  # what was not flushed
    else:
        with pytest.raises(OSError, match="an earlier flush failed"):
            await guest
    assert bench.at_target.count("flush") == asked
    await bench.assert_moved(await bench.finish())


@pytest.mark.parametrize("works", [True, False], ids=["works", "fails"])
async def test_a_flush_across_the_pivot(bench: CrashBench, works: bool) -> None:
    """It began at the source when both sides counted and ends when the target alone does: it is
    as good as the target's flush at the pivot."""
    commit = await doubt(bench)
    await bench.write(0, NEW)
    flush = bench.at_source.hang("flush")
    guest = bench.guest(bench.disk.flush())
    await flush.wait()
    if not works:
        bench.at_target.fail("flush", errno=errno.EIO)
    commit.release()
    await eventually_async(lambda: bench.disk.backend is bench.target, what="pivot")
    flush.release()
    if works:
        await guest
        await bench.target.forget()  # what was not flushed
    else:
        with pytest.raises(OSError, match="Input/output error"):
            await guest
    await bench.assert_moved(await bench.finish())


async def test_a_flush_across_the_abort(bench: CrashBench) -> None:
    """It began when both sides counted; when it ends the target is closed and not asked."""
    commit = await doubt(bench)
    flush = bench.at_source.hang("flush")
    guest = bench.guest(bench.disk.flush())
    await flush.wait()
    asked = bench.at_target.count("flush")
    commit.errno = errno.EIO
    commit.release()
    assert (await bench.finish()).phase is Phase.FAILED
    flush.release()
    await guest
    assert bench.at_target.count("flush") == asked
    await bench.disk.flush()


async def test_a_job_that_gives_up_meanwhile(bench: CrashBench) -> None:
    """The journal can't be written for a while; then another reason to end the job has its ABORT
    in it first. One is enough."""
    bench.settings = replace(HASTY, retry_first_s=1.0, retry_max_s=1.0)
    await bench.begin(verify="none")
    bench.at_files.fail("write_log:COMMIT", errno=errno.EIO)
    answers = bench.at_files.fail(
        "write_log:zeroes", "write_log:ABORT", errno=errno.EIO, times=FOR_EVER
    )
    await bench.run_to(answers)
    answers.release()
    await bench.job._give_up(OSError(errno.EIO, "the map"))
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "internal error" not in status.reason
    assert bench.records() == ["PREP", "ABORT", "DONE"]
    await bench.write(0, NEW)
    assert await bench.content() == bytes(bench.expected)
