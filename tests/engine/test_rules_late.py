"""The rules R9 to R18 of the protocol; told in `test_rules`, which has R1 to R8."""

from __future__ import annotations

import asyncio
import errno
import resource

import pytest

from mirrord.core.journal import Authority, parse
from mirrord.core.migration import Event, Phase
from mirrord.errors import RefusedError, TargetError
from tests.engine.crashes import SIZE, SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER
from tests.engine.rules import NEW, NEWER, PATIENT, story, turns
from tests.helpers import eventually_async

# R9: a failed flush is never retried as if harmless


async def test_r9_a_failed_flush_of_the_target_has_everything_written_again(
    bench: CrashBench,
) -> None:
    """The page cache forgets what it could not write, and the next flush succeeds. Broken:
    `distrust_target` marks nothing."""
    await bench.hold_mirroring(verify="none")
    await bench.checkpoint()
    await bench.write(3 * UNIT, NEW)
    await bench.disk.flush()
    bench.at_target.fail("flush", errno=errno.EIO)
    with pytest.raises(TargetError):
        await bench.tracker.checkpoint()
    await bench.target.forget()
    assert not bench.tracker.mirroring
    assert bench.tracker.bitmap.remaining() == UNIT
    await bench.assert_moved(await bench.cut_over())


async def test_r9_a_failed_flush_of_the_source_ends_the_move(bench: CrashBench) -> None:
    """The guest is told, now and at every later flush; nothing is deleted. Broken: `Disk.flush`
    doesn't remember; `WriteTracker.flush` doesn't report."""
    await bench.hold_mirroring()
    await bench.write(0, NEW)
    bench.at_source.fail("flush", errno=errno.EIO)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            await bench.disk.flush()
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.write(0, NEWER, fua=True)
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "flush of the source failed" in status.reason
    assert bench.names() == ["source"]
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.flush()
    await bench.write(0, NEWER)  # without a promise it still works
    assert await bench.content() == bytes(bench.expected)


async def test_r9_a_failed_fua_write_of_the_source_ends_the_move(bench: CrashBench) -> None:
    """Its flush was one. Broken: `WriteTracker.mutate` doesn't report."""
    await bench.hold_mirroring()
    bench.at_source.fail("write", errno=errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.write(0, NEWER, fua=True)
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "a write to the source that was to be durable failed" in status.reason
    assert bench.names() == ["source"]
    with pytest.raises(OSError, match="an earlier flush failed"):
        await bench.disk.flush()


async def test_a_failed_write_of_the_source_does_not_end_the_move(bench: CrashBench) -> None:
    """Without FUA it is between the guest and its disk; nor does FUA that was not possible."""
    await bench.hold_mirroring()
    bench.at_source.fail("write", errno=errno.EIO)
    bench.at_source.fail("write_zeroes", errno=errno.ENOTSUP)
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.write(0, NEWER)
    with pytest.raises(OSError, match="not supported"):
        await bench.disk.write_zeroes(0, UNIT, fast=True, fua=True)
    await bench.write(0, NEWER, fua=True)
    await bench.assert_moved(await bench.cut_over())


# R10: a flush covers the authoritative side


async def test_r10_a_flush_is_the_sources(bench: CrashBench) -> None:
    """Broken: `WriteTracker.flush` flushes the target; waits for it; `mirror` passes FUA on."""
    await bench.hold_mirroring()
    bench.at_target.hang("flush", times=FOR_EVER)
    flushes = bench.at_source.count("flush")
    await bench.write(0, NEW)
    await asyncio.wait_for(bench.disk.flush(), 5)
    assert bench.at_source.count("flush") == flushes + 1
    await bench.write(0, NEWER, fua=True)
    assert (bench.source.fua_writes, bench.target.fua_writes) == (1, 0)
    await bench.kill(power=True)
    await bench.recovered()
    await bench.assert_moved(await bench.cut_over())


# R11: the maps decide, not memory


@pytest.mark.parametrize("power", [False, True], ids=["dirty bitmap", "intent map"])
async def test_r11_a_restart_goes_on_from_the_map(bench: CrashBench, power: bool) -> None:
    """Broken: `_find_target` clears the bitmap, or believes it after a power cut."""
    await bench.hold_copying(16, cutover="manual")
    await bench.checkpoint()
    await bench.write(0, NEW)
    await bench.disk.flush()
    await bench.kill(power=power)
    found = await bench.recovered()
    assert found.job is not None
    again = UNIT if power else len(NEW)
    assert found.job.status().bytes_remaining == again + SIZE % UNIT
    await bench.assert_moved(await bench.cut_over())


# R12: recovery makes durable what it acts on


async def test_r12_the_journal_comes_first(bench: CrashBench) -> None:
    """Before anything else is opened or renamed; that reading makes durable is tested in C11 and
    with the job's files. Broken: `recover` opens the source first."""
    await bench.begin()
    await bench.run_to(bench.at_target.hang("publish", after=True))
    await bench.kill()
    await bench.recovered()
    assert bench.trace[:2] == ["+files.read_log", "files.read_log"]
    changed = bench.trace.index("+target.withdraw")
    assert bench.trace.index("files.read_map") < bench.trace.index("target.find") < changed


# R13: a target that may have forgotten


async def test_r13_a_copy_across_a_failed_flush_counts_for_nothing(bench: CrashBench) -> None:
    """The chunk's first part is lost with the flush, its last is written later. Broken: `_work`
    doesn't compare the generation."""
    await bench.open()
    await bench.write(5 * UNIT + UNIT // 4, bytes(UNIT // 4))  # so that it is copied in parts
    await bench.start(cutover="manual", verify="none")
    first = bench.at_target.hang("write")
    await bench.run_to(first)
    await bench.tracker.flush_target()  # a good one: from here on each region counts by itself
    first.release()
    last_part = bench.at_target.hang("write", within=range(5 * UNIT + UNIT // 2, 6 * UNIT))
    await bench.run_to(last_part)
    await eventually_async(lambda: bench.tracker.bitmap.remaining() == UNIT)
    flush = bench.at_target.fail("flush", errno=errno.EIO)
    with pytest.raises(TargetError):
        await bench.tracker.flush_target()
    flush.release()
    await bench.target.forget()
    last_part.release()
    await bench.assert_moved(await bench.cut_over())


# R14: the target never costs the guest more than the budget


@pytest.mark.parametrize("how", ["hangs", "fails"])
async def test_r14_a_mirrored_write_is_answered_from_the_source(
    bench: CrashBench, how: str
) -> None:
    """Broken: `Leg.outcome` waits for ever; `_both` raises the target's error."""
    await bench.hold_mirroring()
    if how == "hangs":
        bench.at_target.hang("write")
    else:
        bench.at_target.fail("write", errno=errno.EIO)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await bench.write(0, NEW)
    assert loop.time() - began_s < SMALL.target_budget_s + 2
    assert not bench.tracker.mirroring
    assert not bench.tracker.bitmap.clean(0, len(NEW))
    began_s = loop.time()
    await bench.write(0, NEWER)  # once only: the second one doesn't wait
    assert loop.time() - began_s < SMALL.target_budget_s
    told = Event.TARGET_AWAY if how == "hangs" else Event.TARGET_FAILED
    await eventually_async(lambda: told in story(bench))
    bench.at_target.heal()
    await bench.assert_moved(await bench.cut_over())


async def test_r14_a_write_behind_a_copy_that_hangs(bench: CrashBench) -> None:
    """The copier's lock is the target's, too. Broken: `_mirrored` waits for its lock for ever."""
    copying = await bench.hold_copying(5, mode="mirror", cutover="manual")
    assert bench.tracker.mirroring
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await bench.write(5 * UNIT, NEW)
    assert loop.time() - began_s < SMALL.target_budget_s + 2
    await eventually_async(lambda: Event.TARGET_AWAY in story(bench))
    copying.release()
    await bench.assert_moved(await bench.cut_over())


# R15: a commit whose outcome is not known


async def _unknown_commit(bench: CrashBench, *, written: bool) -> None:
    """Have the commit record's write fail, and the answer to it hang."""
    await bench.begin(verify="none")
    bench.at_files.fail("write_log:COMMIT", errno=errno.EIO, after=written)
    answer = bench.at_files.hang("write_log:zeroes", "write_log:ABORT")
    await bench.run_to(answer)


@pytest.mark.parametrize("written", [False, True], ids=["not-written", "written"])
async def test_r15_both_sides_stay_equal_until_abort_is_durable(
    bench: CrashBench, written: bool
) -> None:
    """Whatever the next process finds is true. Broken: `strict` is never set; `flush` flushes the
    source alone."""
    await _unknown_commit(bench, written=written)
    assert bench.disk.backend is bench.source
    await bench.write(0, NEW)
    await bench.disk.flush()
    flushes = bench.at_target.count("flush")
    await bench.write(UNIT, NEW, fua=True)
    assert bench.source.fua_writes == 1
    assert bench.at_target.count("flush") == flushes + 1
    await bench.kill(power=True)
    found = await bench.recovered()
    assert found.location == ("mem:target" if written else "mem:source")
    assert await bench.content() == bytes(bench.expected)
    await bench.assert_moved(await bench.finish())


async def test_r15_a_side_that_fails_then_fails_the_guest(bench: CrashBench) -> None:
    """Broken: `_strictly` ignores the target's error; `_strict_flush_failed` is forgotten."""
    await _unknown_commit(bench, written=True)
    bench.at_target.fail("write", "flush", errno=errno.EIO)
    with pytest.raises(OSError, match="the target failed"):
        await bench.disk.write(0, NEW)
    bench.at_target.heal()
    bench.at_target.fail("flush", errno=errno.EIO)
    for _ in range(2):  # a retried flush proves nothing
        with pytest.raises(OSError, match=r"error|failed"):
            await bench.disk.flush()


async def test_r15_abort_ends_it(bench: CrashBench) -> None:
    """However long it takes to become durable, the target alone is never served. Broken: the
    error of the append is taken for success."""
    await bench.begin()
    bench.at_files.fail("write_log:COMMIT", errno=errno.EIO, after=True)
    answers = bench.at_files.fail("write_log:zeroes", "write_log:ABORT", errno=errno.EIO, times=3)
    bench.run()
    await answers.wait()
    await bench.write(0, NEW)
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "the commit record could not be made durable" in status.reason
    assert bench.records() == ["PREP", "ABORT", "DONE"]
    assert bench.disk.backend is bench.source
    assert bench.names() == ["source"]
    assert await bench.content() == bytes(bench.expected)


# R16: no automatic way back


@pytest.mark.parametrize("verb", ["cancel", "pause", "cutover", "limit"])
async def test_r16_a_committed_move_cannot_be_taken_back(bench: CrashBench, verb: str) -> None:
    """Broken: `_refuse_unless_reversible` lets everything pass."""
    await bench.begin()
    retire = bench.at_source.hang("retire")
    await bench.run_to(retire)
    arguments = (1,) if verb == "limit" else ()
    with pytest.raises(RefusedError) as caught:
        await getattr(bench.job, verb)(*arguments)
    assert caught.value.code == "wrong-phase"
    retire.release()
    await bench.assert_moved(await bench.finish())


async def test_r16_a_lost_target_is_not_replaced_by_the_source(bench: CrashBench) -> None:
    """C13 has the kinds of loss. Broken: `_recover_committed` opens the source instead."""
    await bench.begin()
    await bench.run_to(bench.at_source.hang("retire"))
    await bench.kill()
    bench.shelf.rename("target", "elsewhere")
    with pytest.raises(RefusedError) as caught:
        await bench.recovered()
    assert caught.value.code == "target-lost"
    assert bench.at_source.count("open") == 0
    assert parse(bench.log_path().read_bytes()).records[-1].kind.name == "COMMIT"
    bench.shelf.rename("elsewhere", "target")
    await bench.recovered()
    assert bench.job.ledger.outcome.authority is Authority.TARGET
    await bench.assert_moved(await bench.finish())


# R17: completed means whole


async def test_r17_a_write_that_was_cut_short_is_not_complete(on_files: CrashBench) -> None:
    """A limit on file sizes first cuts a write short, and then fails it (EFBIG). Broken: a short
    write counts as a whole one, in either of the two ways to write."""
    bench = on_files
    await bench.begin()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - UNIT - 4096 - 1, hard))
    try:
        await bench.run_to_phase(Phase.PAUSED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no space" in bench.job.migration.tell()
    for chunk in (14, 15):  # the first of them was written but for its last bytes
        assert not bench.tracker.bitmap.clean(chunk * UNIT, UNIT)
    await bench.assert_moved(await bench.finish())


# R18: requests of a dead connection


async def test_r18_an_abandoned_mirrored_write_holds_back_a_new_one(bench: CrashBench) -> None:
    """The old connection's write is still on its way to the target. Broken: `_mirrored` releases
    its lock at once."""
    bench.settings = PATIENT
    await bench.hold_mirroring(verify="none")
    leg = bench.at_target.hang("write")
    old = bench.guest(bench.disk.write(0, NEW))
    await leg.wait()
    old.cancel()
    await asyncio.wait((old,))
    new = bench.guest(bench.write(0, NEWER))
    await turns()
    assert bench.at_source.count("write") == 1
    leg.release()
    await new
    assert (await bench.both())[0][: len(NEW)] == NEWER
    await bench.assert_moved(await bench.cut_over())


async def test_r18_a_mirrored_write_still_on_its_way_to_the_source(bench: CrashBench) -> None:
    """The same lock orders them at the source. (Writes that are not mirrored have no lock: there a
    new connection waits for what dead ones have in flight, and is tested with the frontend.)
    Broken: `Locks.acquire_within` grants."""
    bench.settings = PATIENT
    await bench.hold_mirroring(verify="none")
    late = bench.at_source.hang("write")
    old = bench.guest(bench.disk.write(0, NEW))
    await late.wait()
    new = bench.guest(bench.write(0, NEWER))
    await turns()
    late.release()
    await asyncio.gather(old, new)
    assert [side[: len(NEW)] for side in await bench.both()] == [NEWER, NEWER]
