"""Pause, resume, cancel, cutover and limit: at any moment of any phase, and where they are refused.

The job is held in a phase by a side that doesn't answer (`phases`); the command comes then.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mirrord.core.geometry import KIB, MIB
from mirrord.core.migration import Phase
from mirrord.core.pacing import BURST_BYTES, DEBT_MAX_S
from mirrord.errors import RefusedError
from tests.engine import phases
from tests.engine.crashes import UNIT, CrashBench
from tests.engine.faults import DEADLINE_S
from tests.engine.phases import COMMITTED, HELD, REVERSIBLE, Hold
from tests.helpers import eventually_async

NEW = b"\x77" * 4096
CANCEL_S = 5  # what fault 14 allows, with a target that never answers
in_each_phase = pytest.mark.parametrize("hold", REVERSIBLE, ids=lambda hold: hold.__name__)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[CrashBench]:
    made = CrashBench(tmp_path, settings=HELD)
    yield made
    await made.close()


async def refusal(bench: CrashBench, verb: str) -> RefusedError:
    """Give a command that must be refused."""

    def changeable() -> object:
        status = bench.job.status()
        return status.phase, status.limit, bench.job.request, bench.records()

    before = changeable()
    with pytest.raises(RefusedError) as caught:
        await getattr(bench.job, verb)(*((5 * MIB,) if verb == "limit" else ()))
    assert changeable() == before
    assert "\n" not in str(caught.value)
    return caught.value


@in_each_phase
async def test_pause_and_resume(bench: CrashBench, hold: Hold) -> None:
    release = await hold(bench)
    if hold is phases.paused:
        assert "it is paused already" in str(await refusal(bench, "pause"))
    else:
        await bench.job.pause()
        await bench.run_to_phase(Phase.PAUSED)
    assert bench.job.status().phase is Phase.PAUSED
    bench.at_source.heal()
    await bench.write(UNIT, NEW)  # the guest goes on
    release()
    before = bench.job.copier.copied_bytes
    await bench.job.resume()
    bench.job.cutover_wanted.set()
    status = await bench.finish()
    assert bench.job.copier.copied_bytes >= before
    await bench.assert_moved(status)


@in_each_phase
async def test_cancel(bench: CrashBench, hold: Hold) -> None:
    """The side that doesn't answer is not released: the job must end nevertheless."""
    await hold(bench)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await bench.job.cancel()
    if hold is phases.at_the_gate:  # the guest's write is one that waits for the source
        await asyncio.sleep(0)
        bench.at_source.heal()
    status = await bench.finish()
    assert loop.time() - began_s < CANCEL_S
    assert status.phase is Phase.CANCELLED
    assert status.reason.startswith("the operator cancelled it")
    assert bench.records()[-2:] == ["ABORT", "DONE"]
    assert bench.names() == ["source"]
    await bench.write(UNIT, NEW)
    await bench.disk.flush()
    assert await bench.content() == bytes(bench.expected)
    bench.at_target.heal()


@in_each_phase
async def test_cutover(bench: CrashBench, hold: Hold) -> None:
    """Only asks for it to come as soon as both sides are equal; a pause goes on."""
    release = await hold(bench)
    await bench.job.cutover()
    assert bench.job.request.mode == "mirror"
    if hold is phases.paused:
        await asyncio.sleep(0)
        assert bench.job.status().phase is Phase.PAUSED
    release()
    await bench.assert_moved(await bench.finish())


@in_each_phase
async def test_limit(bench: CrashBench, hold: Hold) -> None:
    release = await hold(bench)
    await bench.job.limit(64 * MIB)
    assert bench.job.status().limit == 64 * MIB
    release()
    bench.job.cutover_wanted.set()
    await bench.assert_moved(await bench.finish())


@pytest.mark.parametrize("hold", COMMITTED, ids=lambda hold: hold.__name__)
@pytest.mark.parametrize("verb", ["pause", "resume", "cancel", "cutover", "limit"])
async def test_past_the_commit_point_everything_is_refused(
    bench: CrashBench, hold: Hold, verb: str
) -> None:
    release = await hold(bench)
    if hold is phases.ended:
        with pytest.raises(RefusedError) as caught:
            await getattr(bench.job, verb)(*((1,) if verb == "limit" else ()))
        assert caught.value.code == "wrong-phase"
        return
    assert (await refusal(bench, verb)).code == "wrong-phase"
    release()
    await bench.assert_moved(await bench.finish())


@pytest.mark.parametrize(
    "hold",
    [hold for hold in REVERSIBLE if hold not in (phases.paused, phases.out_of_space,
                                                 phases.degraded)],
    ids=lambda hold: hold.__name__,
)  # fmt: skip
async def test_resume_of_what_is_not_paused_is_refused(bench: CrashBench, hold: Hold) -> None:
    release = await hold(bench)
    refused = await refusal(bench, "resume")
    assert refused.code == "wrong-phase"
    assert f"it is {bench.job.status().phase.value}, not paused" in str(refused)
    release()
    bench.job.cutover_wanted.set()
    await bench.assert_moved(await bench.finish())


@pytest.mark.parametrize("verb", ["pause", "resume", "cutover", "limit"])
async def test_a_command_that_cannot_be_made_durable_changes_nothing(
    bench: CrashBench, verb: str
) -> None:
    release = await (phases.paused if verb == "resume" else phases.copying)(bench)
    bench.at_files.fail("write_log:SET", errno=errno.EIO)
    phase = bench.job.status().phase
    assert (await refusal(bench, verb)).code == "state-error"
    await asyncio.sleep(0)
    assert bench.job.status().phase is phase
    bench.at_files.heal()
    release()
    await bench.assert_moved(await bench.finish())


async def test_resume_tries_a_degraded_target_at_once(bench: CrashBench) -> None:
    bench.settings = replace(HELD, retry_first_s=1000.0)
    await bench.begin()
    rule = bench.at_target.fail("write", "flush", errno=errno.EIO, at=4, times=1 << 30)
    await bench.run_to_phase(Phase.DEGRADED)
    rule.release()
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())


async def test_cancel_twice(bench: CrashBench) -> None:
    await phases.copying(bench)
    await bench.job.cancel()
    await bench.job.cancel()
    assert (await bench.finish()).phase is Phase.CANCELLED
    with pytest.raises(RefusedError):
        await bench.job.cancel()
    bench.at_target.heal()


async def test_an_operator_who_comes_while_the_job_ends_is_refused(bench: CrashBench) -> None:
    """ABORT is in the journal already, but not yet in the phase."""
    await phases.copying(bench)
    rule = bench.at_target.hang("discard")
    await bench.job.cancel()
    await bench.run_to(rule)
    refused = await refusal(bench, "pause")
    assert refused.code == "wrong-phase"
    bench.at_target.heal()
    assert (await bench.finish()).phase is Phase.CANCELLED


# Settings survive a kill


async def test_a_pause_survives_a_kill(bench: CrashBench) -> None:
    await phases.paused(bench)
    await bench.kill()
    await bench.recovered()
    await bench.run_to_phase(Phase.PAUSED)
    assert bench.at_target.count("write") == 0
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())


async def test_a_resume_survives_a_kill(bench: CrashBench) -> None:
    release = await phases.paused(bench)
    await bench.job.resume()
    await bench.kill()
    release()
    await bench.assert_moved(await bench.resume())


async def test_a_limit_survives_a_kill(bench: CrashBench) -> None:
    await phases.copying(bench)
    await bench.job.limit(64 * MIB)
    await bench.job.limit(32 * MIB)
    await bench.kill()
    await bench.recovered()
    assert bench.job.status().limit == 32 * MIB
    await bench.assert_moved(await bench.finish())


async def test_a_cutover_survives_a_kill(bench: CrashBench) -> None:
    """The job was told to wait for the operator, and the operator came before the crash."""
    rule = await bench.hold_copying(5, cutover="manual")
    await bench.job.cutover()
    rule.release()
    await bench.kill()
    await bench.assert_moved(await bench.resume())


# The limit


async def test_a_changed_limit_acts_at_once(tmp_path: Path) -> None:
    """At first the move would take an hour, but for what may come in a burst."""
    bench = CrashBench(tmp_path, BURST_BYTES + 8 * UNIT, settings=HELD)
    await bench.begin(limit=KIB)
    bench.run()
    await eventually_async(lambda: bench.job.copier.copied_bytes >= BURST_BYTES)
    assert bench.job.status().bytes_remaining > 0
    await bench.job.limit(0)
    await bench.assert_moved(await bench.finish())
    await bench.close()


async def test_a_lower_limit_acts_at_once(tmp_path: Path) -> None:
    bench = CrashBench(tmp_path, BURST_BYTES + 8 * UNIT, settings=HELD)
    await bench.begin()
    rule = bench.at_target.hang("write", at=2, times=1 << 30)
    await bench.run_to(rule)
    await bench.job.limit(KIB)
    rule.release()
    await eventually_async(lambda: bench.job.copier.copied_bytes >= BURST_BYTES)
    await eventually_async(lambda: bench.job.copier.in_flight_bytes == 0)
    assert bench.job.status().bytes_remaining > 0
    await bench.job.limit(0)
    await bench.assert_moved(await bench.finish())
    await bench.close()


async def test_the_limit_counts_mirrored_bytes(tmp_path: Path) -> None:
    """They never hold the guest up, but what it writes is missing to the copier: the burst that
    it would have had is gone."""
    bench = CrashBench(tmp_path, BURST_BYTES + 8 * UNIT, settings=HELD)
    rule = await bench.hold_copying(8, mode="mirror")
    await bench.job.limit(KIB)
    for chunk in range(6):
        await asyncio.wait_for(bench.write(chunk * UNIT, NEW * 16), DEADLINE_S)
    assert bench.tracker.mirrored_bytes == 6 * UNIT
    # The debt is bounded, or a busy guest would starve the copier.
    assert bench.job._bucket.delay_s(1, bench.job.around.clock()) > DEBT_MAX_S / 2
    await bench.job.limit(0)
    rule.release()
    await bench.assert_moved(await bench.finish())
    await bench.close()
