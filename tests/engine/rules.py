"""What the tests of the rules share: contents, and ways to bring a job to where they hold."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from mirrord.core.migration import Event
from tests.engine.crashes import SMALL, CrashBench

NEW = b"\xa5" * 4096
NEWER = b"\x5a" * 4096
PATIENT = replace(SMALL, target_budget_s=8.0, target_stall_s=8.0, gate_s=8.0)


async def turns(count: int = 30) -> None:
    """Let everything go on that can: for what must not happen, and so can't be waited for."""
    for _ in range(count):
        await asyncio.sleep(0)


async def hold(bench: CrashBench, phase: str) -> None:
    """Bring the job to where writes are followed, or mirrored, with all regions unmarked."""
    if phase == "mirrored":
        await bench.hold_mirroring()
    else:
        await bench.hold_copying(16, cutover="manual")
    await bench.checkpoint()


def story(bench: CrashBench) -> list[Event]:
    return [step.event for step in bench.job.migration.story]


in_both_phases = pytest.mark.parametrize("phase", ["followed", "mirrored"])
