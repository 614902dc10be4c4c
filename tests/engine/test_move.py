"""A move from its first to its last record, with a guest that writes meanwhile."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirrord.core.geometry import MIB
from mirrord.core.migration import Phase
from mirrord.engine.cutover import WARM_UNITS
from mirrord.engine.disk import READ_UNIT_BYTES
from mirrord.storage.backend import Backend
from tests.engine.harness import QUICK, Bench, Writer, finish
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


async def test_what_the_guest_uses_is_warmed_on_the_target_before_the_cutover(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, 16 * MIB + 513)
    disk = await bench.open()
    await disk.read(2 * MIB - 1, 2)  # what it did before the move counts
    job = await bench.start(cutover="manual")
    assert job.tracker is not None
    warmed: list[tuple[int, int]] = []

    async def warm(source: Backend, runs: Sequence[tuple[int, int]]) -> int:
        assert source is disk.backend
        warmed.extend(runs)
        return MIB

    job.tracker.target.warm_from = warm  # type: ignore[method-assign]
    await disk.write(7 * MIB, b"x")  # into the cache of both sides, if anybody reads it
    await disk.read(16 * MIB + 512, 1)
    await job.cutover()
    assert (await finish(job)).phase is Phase.DONE
    unit = READ_UNIT_BYTES
    assert warmed == [(2 * MIB - unit, unit), (2 * MIB, unit), (16 * MIB, 513)]


@pytest.mark.parametrize(
    ("answer", "settings", "times"),
    [
        (WARM_UNITS * READ_UNIT_BYTES, {"warm_bytes": 9 * MIB}, 3),
        (0, {"warm_bytes": 9 * MIB}, 4),  # nothing was cached
        (MIB, {"warm_s": -1}, 0),
        (OSError(errno.EIO, "bad sector"), {}, 1),
    ],
)
async def test_no_more_is_warmed_than_helps(
    tmp_path: Path, answer: int | OSError, settings: dict[str, Any], times: int
) -> None:
    """The move goes on in any case."""
    bench = Bench(tmp_path, 16 * MIB, settings=replace(QUICK, **settings))
    disk = await bench.open()
    job = await bench.start(cutover="manual")
    assert job.tracker is not None
    await disk.read(0, 16 * MIB)
    asked = 0

    async def warm(source: Backend, runs: Sequence[tuple[int, int]]) -> int:
        nonlocal asked
        asked += 1
        if isinstance(answer, OSError):
            raise answer
        return answer

    job.tracker.target.warm_from = warm  # type: ignore[method-assign]
    await job.cutover()
    assert (await finish(job)).phase is Phase.DONE
    assert asked == times
