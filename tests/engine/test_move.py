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


async def test_what_the_guest_used_is_warmed_on_the_target_before_the_cutover(
    tmp_path: Path,
) -> None:
    unit = 1 << 20
    bench = Bench(tmp_path, 16 * unit + 513)
    disk = await bench.open()
    await Writer(disk, seed=3).fill()
    job = await bench.start(cutover="manual")
    assert job.tracker is not None
    warmed: list[tuple[int, int]] = []

    async def warm(offset: int, length: int) -> None:
        assert disk.backend is not job.tracker.target
        warmed.append((offset, length))

    job.tracker.target.warm = warm  # type: ignore[method-assign]
    await disk.read(2 * unit - 1, 2)
    await disk.write(7 * unit, b"x")
    await disk.read(16 * unit + 512, 1)
    await job.cutover()
    assert (await finish(job)).phase is Phase.DONE
    assert warmed == [(unit, unit), (2 * unit, unit), (7 * unit, unit), (16 * unit, 513)]
    await disk.read(5 * unit, 1)  # nobody follows any more


async def test_no_more_is_warmed_than_the_limit(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 4 << 20)
    disk = await bench.open()
    job = await bench.start(cutover="manual")
    assert job.tracker is not None
    await disk.read(0, 4 << 20)
    warmed: list[int] = []

    async def warm(offset: int, length: int) -> None:
        warmed.append(length)

    job.tracker.target.warm = warm  # type: ignore[method-assign]
    await job.tracker.warm_target((3 << 20) - 1)
    assert sum(warmed) == 2 << 20
    await job.cutover()
    await finish(job)
