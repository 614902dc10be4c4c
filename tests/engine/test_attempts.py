"""Attempts at a target in trouble: what they ask, how many there are, what is believed after them.

The numbers are those of `test_target_trouble`.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from mirrord.core.migration import Event, Phase
from mirrord.storage.backend import Buffer
from tests.engine import phases
from tests.engine.crashes import SIZE, SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER
from tests.engine.rules import turns
from tests.helpers import eventually_async

NEW = b"\x99" * 4096
WRITING = ("write", "write_zeroes")


def told(bench: CrashBench) -> list[Event | None]:
    return [step.event for step in bench.job.migration.story]


@pytest.mark.fault(8)
async def test_8_space_for_what_a_guest_rewrites_is_no_space(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target has that already. What failed is tried, and it is told what that says."""
    await bench.begin()
    honest = bench.target.inner.write
    number, refused = errno.ENOSPC, 0

    async def write(offset: int, data: Buffer, *, fua: bool = False) -> None:
        nonlocal refused
        if offset >= 10 * UNIT:
            refused += 1
            raise OSError(number, "no more")
        await honest(offset, data, fua=fua)

    monkeypatch.setattr(bench.target.inner, "write", write)
    await bench.run_to_phase(Phase.PAUSED)
    await bench.write(0, NEW)
    looked = refused
    await eventually_async(lambda: refused >= looked + 3, what="attempts")
    assert told(bench) == [Event.STARTED, Event.SPACE_EXHAUSTED]
    assert "No space" in bench.job.status().reason or "no more" in bench.job.status().reason
    number = errno.EIO
    await eventually_async(lambda: "no space" not in bench.job.status().reason, what="told")
    assert bench.job.migration.phase is Phase.PAUSED
    monkeypatch.undo()
    await bench.assert_moved(await bench.finish())


@pytest.mark.fault(14)
async def test_14_a_target_too_slow_for_a_guest_is_tried_less_and_less_often(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt succeeds, and each mirrored write costs its guest the budget once more."""
    bench.settings = replace(SMALL, target_budget_s=0.02, retry_first_s=0.02, retry_max_s=60)
    await bench.begin(cutover="manual")
    target, answer_delay_s = bench.target, 0.05
    stalls: list[float] = []
    late: list[asyncio.Task[None]] = []

    def begin_write(offset: int, data: Buffer, ended: Callable[[object], None]) -> bool:
        stalls.append(asyncio.get_running_loop().time())
        late.append(asyncio.create_task(write_late(offset, bytes(data), ended)))
        return True

    async def write_late(offset: int, data: bytes, ended: Callable[[object], None]) -> None:
        await asyncio.sleep(answer_delay_s)
        await target.write(offset, data)
        ended(None)

    monkeypatch.setattr(target, "begin_write", begin_write)
    bench.run()
    while len(stalls) < 6:
        await bench.write(0, NEW)
        await asyncio.sleep(0)
    gaps = [after - before for before, after in pairwise(stalls)]
    assert gaps[-1] > min(gaps) + 0.15, gaps
    assert Phase.PAUSED not in [step.phase for step in bench.job.migration.story]


@pytest.mark.fault(11)
async def test_11_a_target_that_never_can_be_read_pauses_the_job(bench: CrashBench) -> None:
    """It takes every write, so an attempt seems to succeed. A resume begins to count anew."""
    bench.settings = replace(SMALL, target_attempts_max=3)
    await bench.begin()
    broken = bench.at_target.fail("read_stored", errno=errno.EIO, at=7, times=FOR_EVER)
    for count in (1, 2):
        await bench.run_to_phase(Phase.PAUSED)
        reason = bench.job.status().reason
        assert reason.startswith("3 attempts failed, the last: reading the target back failed")
        assert told(bench).count(Event.TARGET_FAILED) == 4 * count
        if count == 1:
            await bench.job.resume()
            await eventually_async(lambda: told(bench).count(Event.TARGET_FAILED) > 4)
    broken.release()
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())


@pytest.mark.fault(11)
async def test_11_readings_that_fail_far_apart_are_not_in_a_row(bench: CrashBench) -> None:
    bench.settings = replace(SMALL, target_attempts_max=2)
    await bench.begin(cutover="manual")
    for _ in range(3):
        broken = bench.at_target.fail("read_stored", errno=errno.EIO)
        await bench.run_to(broken)
        await eventually_async(lambda: bench.job.held, what="in step again")
        full = bench.at_target.fail(*WRITING, errno=errno.ENOSPC)
        await bench.write(0, NEW)
        await bench.run_to(full)
    assert Event.PAUSE_REQUESTED not in told(bench)
    await bench.assert_moved(await bench.cut_over())


@pytest.mark.fault(11)
async def test_11_readings_of_a_target_that_is_away_are_not_counted(bench: CrashBench) -> None:
    bench.settings = replace(SMALL, target_attempts_max=2)
    await bench.begin()
    bench.at_target.fail("read_stored", errno=errno.ENOTCONN, times=4)
    for number in range(2, 12, 2):  # the first flush after each loss (rule R13)
        bench.at_target.fail("flush", errno=errno.ENOTCONN, at=number)
    await bench.assert_moved(await bench.finish())
    assert told(bench).count(Event.TARGET_AWAY) > 4
    assert Event.PAUSE_REQUESTED not in told(bench)


@pytest.mark.fault(11)
@pytest.mark.parametrize("checkpoints", [False, True])
async def test_11_a_sector_that_no_flush_gets_to_disk_pauses_the_job(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch, checkpoints: bool
) -> None:
    """The cache takes its write, and each flush tells of it once: then the next one is good."""
    quick = replace(SMALL, target_attempts_max=3)
    bench.settings = replace(quick, checkpoint_s=0.01, sample_s=0.01) if checkpoints else quick
    await bench.begin()
    target = bench.target
    honest_write, honest_flush = target.write, target.flush
    bad = False

    async def write(offset: int, data: Buffer, *, fua: bool = False) -> None:
        nonlocal bad
        bad |= offset == 7 * UNIT
        await honest_write(offset, data, fua=fua)

    async def flush() -> None:
        nonlocal bad
        was_bad, bad = bad, False
        if was_bad:
            raise OSError(errno.EIO, "bad sector")
        await honest_flush()

    monkeypatch.setattr(target, "write", write)
    monkeypatch.setattr(target, "flush", flush)
    slow = bench.at_target.delay("write", seconds=0.005)
    await bench.run_to_phase(Phase.PAUSED)
    slow.release()
    reason = bench.job.status().reason
    assert reason.startswith("3 attempts failed, the last: flush of the target failed"), reason
    await turns()
    assert bench.job.migration.phase is Phase.PAUSED
    monkeypatch.undo()
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())


@pytest.mark.fault(11)
@pytest.mark.parametrize("hold", [phases.degraded, phases.out_of_space, phases.paused],
                         ids=lambda hold: hold.__name__)  # fmt: skip
async def test_11_a_source_that_hangs_doesnt_make_the_target_fail(
    bench: CrashBench, hold: phases.Hold
) -> None:
    bench.settings = replace(SMALL, target_stall_s=0.2)
    release = await hold(bench)
    looking = bench.at_source.hang("check_unchanged", times=FOR_EVER)
    release()
    await bench.run_to_phase(Phase.CUTTING_OVER)
    looking.release()
    await bench.assert_moved(await bench.finish())


@pytest.mark.parametrize("by", ["attempts", "operator"])
async def test_what_was_verified_before_a_pause_is_verified_anew(
    bench: CrashBench, by: str
) -> None:
    """The operator repaired the target meanwhile, and damaged what had been verified."""
    bench.settings = replace(phases.HELD, target_attempts_max=1)
    await bench.begin()
    last = range(15 * UNIT, SIZE)
    if by == "attempts":
        broken = bench.at_target.fail("read_stored", errno=errno.EIO, within=last, times=FOR_EVER)
    else:
        broken = bench.at_target.hang("read_stored", within=last)
        await bench.run_to(broken)
        await bench.job.pause()
    await bench.run_to_phase(Phase.PAUSED)
    assert bench.tracker.digests.unverified() < bench.tracker.digests.count
    await bench.target.inner.write(0, NEW)
    broken.release()
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())
    assert Event.MISMATCH_FOUND in told(bench)


@pytest.mark.fault(14)
async def test_14_a_target_that_hangs_is_asked_one_thing_at_a_time(bench: CrashBench) -> None:
    """Each attempt that looked at it would keep a thread, and the source needs them, too."""
    bench.settings = replace(SMALL, target_stall_s=0.05, flush_stall_s=0.05, drain_s=0.05)
    await bench.begin(cutover="manual")
    hangs = bench.at_target.hang("write", "flush", "check_unchanged", at=5, times=FOR_EVER)
    await bench.run_to_phase(Phase.DEGRADED)
    asked = hangs.seen
    for _ in range(4):
        bench.job.reason = "not tried yet"
        await bench.job.resume()
        await eventually_async(lambda: bench.job.reason != "not tried yet", what="an attempt")
    assert "does not answer" in bench.job.reason
    assert hangs.seen <= asked + 1
    hangs.release()
    await bench.assert_moved(await bench.cut_over())


@pytest.mark.fault(8)
async def test_8_space_for_a_block_is_no_space(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that went on for it would pause again at once, every few seconds."""
    await bench.begin()
    honest = bench.target.inner.write
    refused: list[int] = []

    async def write(offset: int, data: Buffer, *, fua: bool = False) -> None:
        if len(data) > 4096:
            refused.append(offset)
            raise OSError(errno.ENOSPC, "full")
        await honest(offset, data, fua=fua)

    monkeypatch.setattr(bench.target.inner, "write", write)
    await bench.run_to_phase(Phase.PAUSED)
    looked = len(refused)
    await eventually_async(lambda: len(refused) >= looked + 3, what="attempts")
    assert told(bench) == [Event.STARTED, Event.SPACE_EXHAUSTED]
    monkeypatch.undo()
    await bench.assert_moved(await bench.finish())


async def test_delays_begin_anew_once_it_has_worked_for_a_while(bench: CrashBench) -> None:
    """Of a job that is held in step nothing is left to copy, so no progress is seen."""
    bench.settings = replace(SMALL, retry_first_s=0.01, retry_max_s=0.1)
    await bench.begin(cutover="manual")
    bench.run()
    clock = asyncio.get_running_loop().time
    for count in range(1, 5):
        await eventually_async(lambda: bench.job.held, what="in step again")
        calm_until_s = clock() + 0.2
        await eventually_async(lambda until_s=calm_until_s: clock() > until_s)
        lost = bench.at_target.fail("write", errno=errno.ENOTCONN)
        await bench.write(0, NEW)
        await bench.run_to(lost)
        await eventually_async(lambda n=count: told(bench).count(Event.RESUMED) == n, what="back")
        assert bench.job.delays == 1
    await bench.assert_moved(await bench.cut_over())


async def test_no_second_delay_for_what_a_target_tells_that_is_back(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first flush after an outage says that something may be forgotten (rule R13)."""
    bench.settings = replace(SMALL, retry_first_s=0.01, retry_max_s=60)
    await bench.begin()
    away = bench.at_target.fail("write", errno=errno.ENOTCONN, times=FOR_EVER)
    await bench.run_to_phase(Phase.DEGRADED)
    await eventually_async(lambda: bench.job.delays > 4, what="delays that grow")
    first = bench.at_target.fail("flush", errno=errno.ENOTCONN)
    away.release()
    await bench.run_to(first)
    await eventually_async(lambda: bench.job.delays <= 1, what="delays anew")
    await bench.assert_moved(await bench.finish())


async def test_what_the_operator_pauses_says_so_though_it_waited_for_space(
    bench: CrashBench,
) -> None:
    release = await phases.out_of_space(bench)
    await bench.job.pause()
    await eventually_async(lambda: bench.job.status().reason == "the operator paused it", what="it")
    release()
    await turns()
    assert bench.job.migration.phase is Phase.PAUSED
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())
