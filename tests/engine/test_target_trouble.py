"""Trouble with either side: what the guest and the operator see of it.

By number: 8 and 9 (no space), 10 and 13 (source errors), 11 and 12 (target errors), 14 (a target
that hangs). From 18 on: `test_files_changed`.
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest

from mirrord.core.migration import Event, Phase
from tests.engine import phases
from tests.engine.crashes import SIZE, SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER
from tests.helpers import eventually_async

NEW = b"\x99" * 4096
WRITING = ("write", "write_zeroes")
NO_SPACE = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]


def entered(bench: CrashBench) -> list[Phase]:
    return [step.phase for step in bench.job.migration.story]


def told(bench: CrashBench) -> list[Event | None]:
    return [step.event for step in bench.job.migration.story]


# 8 and 9: no space


@pytest.mark.fault(8)
@pytest.mark.parametrize("number", NO_SPACE, ids=errno.errorcode.get)
async def test_8_no_space_while_copying(bench: CrashBench, number: int) -> None:
    """Paused with its reason; the guest notices nothing; it goes on by itself."""
    await bench.begin()
    full = bench.at_target.fail(*WRITING, errno=number, at=5, times=FOR_EVER)
    await bench.run_to_phase(Phase.PAUSED)
    assert bench.job.status().reason.startswith("no space at the target: write to the target")
    for chunk in range(3):
        await bench.write(chunk * UNIT, NEW)
    await bench.disk.flush()
    attempts = full.seen
    await eventually_async(lambda: full.seen > attempts, what="another attempt")
    assert bench.job.status().phase is Phase.PAUSED
    full.release()
    await bench.assert_moved(await bench.finish())
    assert "there is space again" in bench.job.migration.tell()


@pytest.mark.fault(9)
@pytest.mark.parametrize("number", NO_SPACE, ids=errno.errorcode.get)
async def test_9_no_space_while_mirroring(bench: CrashBench, number: int) -> None:
    """The guest's write is answered from the source; writes are followed until there is space."""
    await bench.hold_mirroring()
    full = bench.at_target.fail(*WRITING, errno=number, times=FOR_EVER)
    await bench.write(0, NEW)
    assert not bench.tracker.mirroring
    await bench.run_to_phase(Phase.PAUSED)
    await bench.write(UNIT, NEW)
    assert bench.tracker.bitmap.remaining() >= 2 * len(NEW)
    full.release()
    await bench.assert_moved(await bench.cut_over())


async def test_a_copy_beside_the_loop_that_fails_is_done_again_through_it(
    on_files: CrashBench,
) -> None:
    """Once: nobody needs to know. The digests are those of the second try."""
    await on_files.begin(verify="full")
    failed = on_files.at_target.fail("write", errno=errno.EIO, at=3, after=True)
    await on_files.assert_moved(await on_files.finish())
    assert failed.reached.is_set()
    assert Phase.DEGRADED not in entered(on_files)


@pytest.mark.parametrize("side", ["source", "target"])
async def test_whose_fault_a_copy_beside_the_loop_is(on_files: CrashBench, side: str) -> None:
    """The second try tells: the target's is waited out, the source's ends the job."""
    await on_files.begin(verify="full")
    at, what = (on_files.at_source, "read") if side == "source" else (on_files.at_target, "write")
    at.fail(what, errno=errno.EIO, times=2, within=range(2 * UNIT, 3 * UNIT))
    status = await on_files.finish()
    assert status.phase is (Phase.FAILED if side == "source" else Phase.DONE)
    assert (Phase.DEGRADED in entered(on_files)) == (side == "target")


@pytest.mark.fault(8)
async def test_8_no_space_below(on_files: CrashBench) -> None:
    """The same where the kernel copies from file to file."""
    bench = on_files
    await bench.begin(verify="none")
    full = bench.at_target.fail("copy_from", errno=errno.ENOSPC, times=2)
    await bench.run_to_phase(Phase.PAUSED)
    full.release()
    await bench.assert_moved(await bench.finish())


# 10 and 13: source errors (C20 and R9 have more)


@pytest.mark.fault(10)
@pytest.mark.parametrize("operation", ["read", "extents"])
async def test_10_the_source_cannot_be_read(bench: CrashBench, operation: str) -> None:
    bad = range(6 * UNIT, 7 * UNIT)
    await bench.begin()
    bench.at_source.fail(operation, errno=errno.EIO, times=FOR_EVER, within=bad)
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert f"at offset {6 * UNIT}" in status.reason
    assert bench.names() == ["source"]
    assert bench.disk.backend is bench.source


@pytest.mark.fault(10)
async def test_10_the_extents_of_the_whole_source_cannot_be_read(bench: CrashBench) -> None:
    await bench.begin()
    bench.at_source.fail("extents", errno=errno.EIO)
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "extents of the source failed" in status.reason


@pytest.mark.fault(10)
async def test_10_the_source_cannot_be_read_while_verifying(bench: CrashBench) -> None:
    """After a restart there are no digests: both sides are read."""
    await bench.hold_mirroring()
    await bench.kill()
    await bench.recovered()
    bench.at_source.fail("read", errno=errno.EIO, times=FOR_EVER)
    await bench.job.cutover()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "read of the source failed at offset" in status.reason


@pytest.mark.fault(10)
@pytest.mark.parametrize("phase", ["followed", "mirrored"])
async def test_10_a_guest_write_that_the_source_refuses(bench: CrashBench, phase: str) -> None:
    """Only the guest is told. The blocks may differ now, so they are copied again."""
    if phase == "mirrored":
        await bench.hold_mirroring()
    else:
        rule = await bench.hold_copying(16, cutover="manual")
    bench.at_source.fail("write", errno=errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.write(0, NEW)
    assert not bench.tracker.bitmap.clean(0, len(NEW))
    if phase == "followed":
        rule.release()
    await bench.assert_moved(await bench.cut_over())


@pytest.mark.fault(13)
@pytest.mark.parametrize("hold", [phases.copying, phases.catching_up, phases.mirroring,
                                  phases.held, phases.verifying, phases.paused],
                         ids=lambda hold: hold.__name__)  # fmt: skip
async def test_13_the_source_cannot_be_flushed(bench: CrashBench, hold: phases.Hold) -> None:
    """EIO to the guest, the job fails, nothing is deleted."""
    await hold(bench)
    bench.at_source.fail("flush", errno=errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.flush()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "flush of the source failed" in status.reason
    assert bench.names() == ["source"]
    bench.at_target.heal()


@pytest.mark.fault(13)
async def test_13_the_first_flush_of_the_source_fails(bench: CrashBench) -> None:
    """The job's own, of what was written before it began."""
    await bench.begin()
    bench.at_source.fail("flush", errno=errno.EIO)
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.flush()


# 11 and 12: target errors


@pytest.mark.fault(11)
@pytest.mark.parametrize("operation", ["write", "flush", "publish", "read_stored"])
async def test_11_an_error_once_is_made_good(bench: CrashBench, operation: str) -> None:
    await bench.begin()
    bench.at_target.fail(operation, errno=errno.EIO)
    status = await bench.finish()
    assert Phase.DEGRADED in entered(bench)
    await bench.assert_moved(status)


@pytest.mark.fault(11)
@pytest.mark.parametrize("operations", [WRITING, ("flush",)], ids=["write", "flush"])
async def test_11_a_sticky_error_pauses_the_job(
    bench: CrashBench, operations: tuple[str, ...]
) -> None:
    """After some attempts in a row, with the reason; an operator who resumes it is believed."""
    bench.settings = replace(SMALL, target_attempts_max=3)
    await bench.begin()
    broken = bench.at_target.fail(*operations, errno=errno.EIO, at=3, times=FOR_EVER)
    if operations == ("flush",):
        broken.at = 1
    await bench.run_to_phase(Phase.PAUSED)
    assert bench.job.status().reason.startswith("3 attempts failed, the last: ")
    await bench.write(0, NEW)
    await bench.disk.flush()
    await bench.job.resume()
    await eventually_async(lambda: entered(bench).count(Phase.DEGRADED) == 2)
    await bench.run_to_phase(Phase.PAUSED)
    broken.release()
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())


@pytest.mark.fault(12)
@pytest.mark.parametrize("forgets", [False, True])
async def test_12_a_flush_that_fails_once(bench: CrashBench, forgets: bool) -> None:
    """Whatever the target forgot then, the last comparison finds both sides equal."""
    await bench.begin()
    bench.run()
    flush = bench.at_target.fail("flush", errno=errno.EIO)
    await flush.wait()
    if forgets:
        await bench.target.forget()
    status = await bench.finish()
    assert status.verified
    await bench.assert_moved(status)


@pytest.mark.fault(12)
async def test_12_a_flush_that_lies_is_found_by_verification(bench: CrashBench) -> None:
    """The target claims to have everything and has not: it is copied again, once."""
    await bench.begin()
    rule = bench.at_target.hang("read_stored", times=FOR_EVER)
    await bench.run_to(rule)
    await bench.target.inner.write(3 * UNIT, NEW)
    rule.release()
    status = await bench.finish()
    assert Event.MISMATCH_FOUND in [step.event for step in bench.job.migration.story]
    assert f"the first at offset {3 * UNIT}" in bench.job.migration.tell()
    await bench.assert_moved(status)


@pytest.mark.fault(12)
async def test_12_a_target_that_differs_again_is_given_up(bench: CrashBench) -> None:
    await bench.begin()
    for _ in range(2):
        reading = bench.at_target.hang("read_stored", times=FOR_EVER)
        await bench.run_to(reading)
        await bench.target.inner.write(16 * UNIT, NEW[:512])
        copying_again = bench.at_target.hang("write", within=range(16 * UNIT, SIZE))
        reading.release()
        if Event.MISMATCH_FOUND not in [step.event for step in bench.job.migration.story]:
            await bench.run_to(copying_again)
        copying_again.release()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "the target differs again" in status.reason
    assert bench.names() == ["source"]


async def test_what_differs_is_copied_again_though_a_guest_writes_there(bench: CrashBench) -> None:
    """Its mirrored write began before the chunk was to be copied, and ends after."""
    await bench.begin()
    first = bench.at_target.hang("read_stored")
    await bench.run_to(first)
    await bench.target.inner.write(3 * UNIT + 2048, NEW[:512])
    reading = bench.at_target.hang("read_stored", within=range(16 * UNIT, SIZE))
    first.release()
    await bench.run_to(reading)
    writing = bench.at_source.hang("write")
    guest = bench.guest(bench.write(3 * UNIT, NEW[:512]))
    await bench.run_to(writing)
    reading.release()
    await eventually_async(lambda: Event.MISMATCH_FOUND in told(bench))
    writing.release()
    await guest
    await bench.assert_moved(await bench.finish())
    assert told(bench).count(Event.MISMATCH_FOUND) == 1


@pytest.mark.parametrize(
    ("number", "phase"),
    [
        (errno.EIO, Phase.DEGRADED),
        (errno.EACCES, Phase.PAUSED),
        (errno.ENOSPC, Phase.PAUSED),
    ],
    ids=["failed", "denied", "full"],
)
async def test_a_target_that_was_in_trouble_is_verified_anew(
    bench: CrashBench, number: int, phase: Phase
) -> None:
    """What it had may have suffered: here, a chunk that had been verified."""
    await bench.hold_mirroring(verify="full")
    failing = bench.at_target.fail(*WRITING, "flush", errno=number, times=FOR_EVER)
    await bench.write(0, NEW)
    await bench.run_to_phase(phase)
    assert not bench.job.status().verified
    await bench.target.inner.write(3 * UNIT, NEW)
    failing.release()
    if number == errno.EACCES:
        await bench.job.resume()
    await bench.assert_moved(await bench.cut_over())
    assert Event.MISMATCH_FOUND in told(bench)


# 14: a target that hangs for ever


@pytest.mark.fault(14)
@pytest.mark.parametrize("operation", ["write", "flush", "read_stored", "extents"])
async def test_14_a_target_that_hangs_while_copying(bench: CrashBench, operation: str) -> None:
    """Degraded, and the guest waits for nothing."""
    bench.settings = replace(SMALL, target_stall_s=0.1, flush_stall_s=0.1, drain_s=0.1)
    await bench.begin()
    bench.at_target.hang(operation, times=FOR_EVER)
    await bench.run_to_phase(Phase.DEGRADED)
    assert "answer" in bench.job.status().reason
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for chunk in range(17):
        await bench.write(chunk * UNIT, NEW[:512])
    await bench.disk.flush()
    assert loop.time() - began_s < SMALL.target_budget_s + 2
    await bench.job.cancel()
    began_s = loop.time()
    status = await bench.finish()
    assert loop.time() - began_s < 5
    assert status.phase is Phase.CANCELLED
    assert await bench.content() == bytes(bench.expected)


@pytest.mark.fault(14)
async def test_14_many_guests_wait_for_a_target_that_hangs_once(bench: CrashBench) -> None:
    """All of them at most the budget, and together."""
    await bench.hold_mirroring()
    bench.at_target.hang(*WRITING, "flush", times=FOR_EVER)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await asyncio.gather(*(bench.write(chunk * UNIT, NEW) for chunk in range(16)))
    assert loop.time() - began_s < SMALL.target_budget_s + 2
    await bench.run_to_phase(Phase.DEGRADED)
    bench.at_target.heal()
    await bench.assert_moved(await bench.cut_over())


@pytest.mark.fault(14)
async def test_14_a_target_that_comes_back(bench: CrashBench) -> None:
    """However long it took: a target that hangs is no reason to give up."""
    bench.settings = replace(SMALL, target_stall_s=0.05, target_attempts_max=1)
    await bench.begin()
    rule = bench.at_target.hang("write", at=3)
    await bench.run_to(rule)
    await bench.run_to_phase(Phase.DEGRADED)
    await eventually_async(lambda: "answer" in bench.job.status().reason)
    rule.release()
    await bench.assert_moved(await bench.finish())


@pytest.mark.fault(14)
async def test_14_a_target_that_cannot_be_closed(bench: CrashBench) -> None:
    """The job ends; closing goes on by itself."""
    bench.settings = replace(SMALL, target_stall_s=0.1, drain_s=0.1)
    await phases.copying(bench)
    await bench.job.cancel()
    assert (await bench.finish()).phase is Phase.CANCELLED
    assert bench.adopted
    assert not all(task.done() for task in bench.adopted)
    bench.at_target.heal()
    await asyncio.gather(*bench.adopted)
