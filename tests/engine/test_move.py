"""A move from its first to its last record, with a guest that writes meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mirrord.core.migration import Phase
from tests.engine.harness import Bench, Writer, finish
from tests.helpers import eventually_async

SIZE = (24 << 20) + 513


@pytest.mark.parametrize("mode", ["auto", "passes", "mirror"])
@pytest.mark.parametrize("verify", ["full", "none"])
async def test_move_under_load(tmp_path: Path, mode: str, verify: str) -> None:
    bench = Bench(tmp_path, SIZE)
    disk = await bench.open()
    writer = Writer(disk, seed=1)
    await writer.fill()
    job = await bench.start(mode=mode, verify=verify)
    guest = asyncio.create_task(writer.run())
    status = await finish(job)
    seen = writer.requests
    await eventually_async(lambda: writer.requests > seen)
    writer.stopped = True
    await guest
    assert status.phase is Phase.DONE, status
    assert status.verified == (verify == "full")
    assert await bench.content() == bytes(writer.expected)
    assert bench.moved == ["mem:target"]
    assert bench.shelf.names() == ["target"]
    assert status.bytes_remaining == 0
    assert writer.requests > 100


async def test_a_guest_that_writes_more_than_the_limit_cannot_stop_the_move(tmp_path: Path) -> None:
    """Mirrored bytes count against the limit; a quarter of it is the copier's all the same."""
    bench = Bench(tmp_path, 16 << 20)
    disk = await bench.open()
    writer = Writer(disk, seed=5)
    await writer.fill()
    job = await bench.start(mode="mirror", verify="none", limit=16 << 20)
    guest = asyncio.create_task(writer.run())
    status = await finish(job)
    writer.stopped = True
    await guest
    assert status.phase is Phase.DONE
    assert job.tracker is not None
    assert job.tracker.mirrored_bytes > 16 << 20, "the guest alone used the limit up"
