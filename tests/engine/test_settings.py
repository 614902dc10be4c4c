"""What the operator sets while a job runs, and how it is kept."""

from __future__ import annotations

import asyncio

from mirrord.core.geometry import MIB
from mirrord.core.migration import Phase
from tests.engine import phases
from tests.engine.crashes import CrashBench
from tests.engine.phases import HELD


async def test_two_settings_at_once_are_both_kept(bench: CrashBench) -> None:
    """The second comes while the first is being written: neither record undoes the other."""
    bench.settings = HELD
    release = await phases.copying(bench)
    record = bench.at_files.hang("write_log:SET")
    limit = bench.guest(bench.job.limit(64 * MIB))
    await record.wait()
    pause = bench.guest(bench.job.pause())
    await asyncio.sleep(0)
    record.release()
    await asyncio.gather(limit, pause)
    release()
    await bench.kill()
    await bench.recovered()
    await bench.run_to_phase(Phase.PAUSED)
    assert bench.job.status().limit == 64 * MIB
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())


async def test_a_setting_that_changes_nothing_is_not_written(bench: CrashBench) -> None:
    """The journal has room for some 190."""
    bench.settings = HELD
    release = await phases.copying(bench)
    for _ in range(3):
        await bench.job.limit(64 * MIB)
    assert bench.records() == ["PREP", "SET"]
    release()
    await bench.assert_moved(await bench.finish())
