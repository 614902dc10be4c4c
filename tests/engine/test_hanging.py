"""Sides that hang where nobody looks: a copy made below, the source's first flush, its range."""

from __future__ import annotations

from dataclasses import replace

from mirrord.core.migration import Phase
from tests.engine import phases
from tests.engine.crashes import SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER
from tests.engine.rules import NEW


async def test_a_copy_made_below_that_hangs_is_noticed(bench: CrashBench) -> None:
    """Without digests the backends copy by themselves; a target that hangs then is one."""
    bench.settings = replace(SMALL, target_stall_s=0.05, drain_s=0.05)
    await bench.begin(verify="none")
    copying = bench.at_target.hang("copy_from", times=FOR_EVER)
    await bench.run_to_phase(Phase.DEGRADED)
    assert "the target does not answer" in bench.job.migration.tell()
    copying.release()
    await bench.assert_moved(await bench.finish())


async def test_cancel_does_not_wait_for_the_sources_first_flush(bench: CrashBench) -> None:
    """Tens of gigabytes in the source's cache take minutes; the job goes on beside that."""
    flush = bench.at_source.hang("flush")
    release = await phases.copying(bench)
    await flush.wait()
    await bench.job.cancel()
    assert (await bench.finish()).phase is Phase.CANCELLED
    release()
    flush.release()
    await bench.write(UNIT, NEW)
    assert await bench.content() == bytes(bench.expected)
