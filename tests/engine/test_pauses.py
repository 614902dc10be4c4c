"""Pauses and their ends: who paused it, who may end that, and what is counted meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from dataclasses import replace
from pathlib import Path

import pytest

from mirrord.core.migration import Event, Phase
from mirrord.engine.activities import ACTIVITIES, Outcome
from mirrord.engine.job import Job
from tests.engine import phases
from tests.engine.crashes import SMALL, UNIT, CrashBench
from tests.engine.phases import HELD
from tests.engine.rules import story, turns
from tests.helpers import eventually_async


async def test_a_flush_that_tells_of_no_space(bench: CrashBench) -> None:
    """As with delayed allocation. Nobody need say that there is space again."""
    await bench.begin()
    bench.at_target.fail("flush", errno=errno.ENOSPC)
    status = await bench.finish()
    assert Event.SPACE_EXHAUSTED in story(bench)
    await bench.assert_moved(status)


async def test_another_error_beside_no_space(bench: CrashBench) -> None:
    """Two chunks fail before the job has looked. The pause is for space, and is ended by space."""
    await bench.begin()
    full = bench.at_target.hang("write", within=range(UNIT))
    broken = bench.at_target.hang("write", within=range(UNIT, 2 * UNIT))
    await bench.run_to(full)
    await bench.run_to(broken)
    full.errno, broken.errno = errno.ENOSPC, errno.EIO
    full.release()
    broken.release()
    status = await bench.finish()
    assert Event.SPACE_EXHAUSTED in story(bench)
    await bench.assert_moved(status)


async def test_the_operators_pause_outlasts_the_one_for_space(bench: CrashBench) -> None:
    """The job is looking for space when the operator pauses it: what it finds changes nothing."""
    bench.settings = HELD
    release = await phases.out_of_space(bench)
    flushes = bench.at_target.count("flush")
    looking = bench.at_target.hang("flush")
    release()
    await looking.wait()
    await bench.job.pause()
    looking.release()
    await eventually_async(lambda: bench.trace.count("target.flush") > flushes, what="space")
    await turns()
    assert bench.job.status().phase is Phase.PAUSED
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())


async def test_rates_begin_anew_after_a_pause(bench: CrashBench) -> None:
    """The copy rate fell to nothing while nothing was copied: no pass would seem to pay."""
    bench.settings = HELD
    bulk = await bench.hold_copying(16)
    bench.job.rates.copy, bench.job.rates.dirty = 1.0, 1e9
    await bench.write(0, phases.NEW)
    await bench.job.pause()
    await bench.run_to_phase(Phase.PAUSED)
    bulk.release()
    again = bench.at_target.hang("write", within=range(UNIT))
    await bench.job.resume()
    await bench.run_to(again)
    assert (bench.job.rates.copy, bench.job.rates.dirty) == (0.0, 0.0)
    again.release()
    await bench.assert_moved(await bench.finish())


async def test_errors_far_apart_are_not_in_a_row(tmp_path: Path) -> None:
    """Four hiccups in a long pass, each with an attempt that fails: as many failed attempts as
    would pause the job, had nothing been copied between them."""
    settings = replace(SMALL, target_attempts_max=3)
    content = random.Random(2).randbytes(160 * UNIT)
    bench = CrashBench(tmp_path, len(content), settings=settings, content=content)
    await bench.begin(verify="none")
    hiccups = [
        bench.at_target.fail(
            "write", errno=errno.EIO, times=2, within=range(chunk * UNIT, (chunk + 1) * UNIT)
        )
        for chunk in (5, 50, 95, 140)
    ]
    status = await bench.finish()
    assert [hiccup.seen > 2 for hiccup in hiccups] == [True] * 4
    assert story(bench).count(Event.TARGET_FAILED) == 4
    assert Event.PAUSE_REQUESTED not in story(bench)
    await bench.assert_moved(status)
    await bench.close()


async def test_what_ends_at_the_same_moment_comes_first(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass came to its end although the operator cancelled just then: that is told, and the
    wish is still heard."""
    honest, begun = ACTIVITIES[Phase.COPYING], asyncio.Event()

    async def copying(job: Job) -> Outcome:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return await honest(job)

    monkeypatch.setitem(ACTIVITIES, Phase.COPYING, copying)
    await bench.begin()
    bench.run()
    await begun.wait()
    await bench.job.cancel()
    assert (await bench.finish()).phase is Phase.CANCELLED
    assert story(bench) == [Event.STARTED, Event.PASS_ENDED, Event.CANCEL_REQUESTED]
    assert bench.names() == ["source"]
