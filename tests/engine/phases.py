"""Ways to hold a job in each of its phases, for commands and trouble that come just then.

Each takes a bench and returns what to call so that the job can go on.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import replace

from mirrord.core.migration import Phase
from tests.engine.crashes import NEVER_S, SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER
from tests.helpers import eventually_async

# Nothing gives up by itself, and no rate is measured, so that a pass over one block seems to pay.
HELD = replace(SMALL, sample_s=NEVER_S, target_budget_s=0.2, drain_s=0.2, gate_s=8.0)

Release = Callable[[], None]
Hold = Callable[[CrashBench], Awaitable[Release]]
NEW = b"\xc3" * 4096


async def copying(bench: CrashBench) -> Release:
    """The bulk pass; a chunk hangs at the target."""
    rule = await bench.hold_copying(5)
    return rule.release


async def catching_up(bench: CrashBench) -> Release:
    """The second pass, over one block, which hangs at the target."""
    bulk = await bench.hold_copying(16)
    await bench.write(0, NEW)
    rule = bench.at_target.hang("write", within=range(UNIT))
    bulk.release()
    await bench.run_to(rule)
    assert bench.job.migration.phase is Phase.CATCHING_UP, bench.told()
    return rule.release


async def mirroring(bench: CrashBench) -> Release:
    """Guest writes go to both sides, a chunk hangs at the target."""
    rule = await bench.hold_copying(5, mode="mirror")
    assert bench.job.migration.phase is Phase.MIRRORING, bench.told()
    return rule.release


async def held(bench: CrashBench) -> Release:
    """In step, waiting for the operator's cutover."""
    await bench.hold_mirroring()

    def release() -> None:
        bench.job.cutover_wanted.set()

    return release


async def verifying(bench: CrashBench) -> Release:
    """A chunk's reading back hangs at the target."""
    await bench.begin()
    rule = bench.at_target.hang("read_stored")
    await bench.run_to(rule)
    assert bench.job.migration.phase is Phase.VERIFYING, bench.told()
    return rule.release


async def preparing(bench: CrashBench) -> Release:
    """The cutover, before the gate: the target's last flush there hangs."""
    await bench.begin(verify="none")
    rule = bench.at_target.hang("publish", after=True)
    await bench.run_to(rule)
    assert bench.job.migration.phase is Phase.CUTTING_OVER, bench.told()
    return rule.release


async def at_the_gate(bench: CrashBench) -> Release:
    """The cutover, behind the closed gate: a guest's write doesn't end."""
    release = await preparing(bench)
    writing = bench.at_source.hang("write")
    bench.guest(bench.write(0, NEW))
    await writing.wait()
    release()
    await eventually_async(lambda: bench.gate_closed)
    return writing.release


async def paused(bench: CrashBench) -> Release:
    """By the operator."""
    release = await copying(bench)
    await bench.job.pause()
    await bench.run_to_phase(Phase.PAUSED)
    release()
    return bench.job.resumed.set


async def out_of_space(bench: CrashBench) -> Release:
    """Paused by itself: the target has no space."""
    await bench.begin()
    rule = bench.at_target.fail("write", errno=errno.ENOSPC, at=4, times=FOR_EVER)
    await bench.run_to_phase(Phase.PAUSED)
    return rule.release


async def degraded(bench: CrashBench) -> Release:
    """The target fails every write and flush."""
    bench.settings = replace(HELD, target_attempts_max=FOR_EVER)
    await bench.begin()
    rule = bench.at_target.fail("write", "flush", errno=errno.EIO, at=4, times=FOR_EVER)
    await bench.run_to_phase(Phase.DEGRADED)
    return rule.release


REVERSIBLE: tuple[Hold, ...] = (
    copying,
    catching_up,
    mirroring,
    held,
    verifying,
    preparing,
    at_the_gate,
    paused,
    out_of_space,
    degraded,
)


async def committing(bench: CrashBench) -> Release:
    """The commit record is being written."""
    await bench.begin()
    rule = bench.at_files.hang("write_log:COMMIT")
    await bench.run_to(rule)
    return rule.release


async def retiring(bench: CrashBench) -> Release:
    """Committed; the source is about to be renamed."""
    await bench.begin()
    rule = bench.at_source.hang("retire")
    await bench.run_to(rule)
    return rule.release


async def ended(bench: CrashBench) -> Release:
    """Done."""
    await bench.begin()
    await bench.finish()
    return lambda: None


COMMITTED: tuple[Hold, ...] = (committing, retiring, ended)
