"""How much one worker of the copier takes."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from mirrord.core.migration import Phase
from mirrord.engine.copier import (
    PIECE_CHUNKS_MAX,
    PIECE_SPAN_CHUNKS_MAX,
    WORKERS_MAX,
    WORKERS_MIRRORING_MAX,
)
from mirrord.engine.recovery import Places
from mirrord.storage.descriptor import DescriptorBackend
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import open_io
from tests.engine.crashes import SMALL, CrashBench
from tests.engine.harness import QUICK, Bench, finish

UNIT = 64 * 1024
CHUNKS = 400
SETTINGS = replace(QUICK, chunk_bytes=UNIT, zero_bytes=4096, region_bytes=MIB, piece_s=3600.0)
Pieces = list[list[tuple[int, int]]]
Move = Callable[..., "object"]


@pytest.fixture
async def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that moves a disk with some data chunks, and tells what workers took."""
    pieces: Pieces = []
    honest = DescriptorBackend.carry_from

    async def noted(self, source, runs, hasher, watch):
        pieces.append(list(runs))
        return await honest(self, source, runs, hasher, watch)

    monkeypatch.setattr(DescriptorBackend, "carry_from", noted)
    io = open_io()

    async def move(chunks: list[int], **options: object) -> Pieces:
        source, target = tmp_path / "source.raw", tmp_path / "target.raw"
        content = bytearray(CHUNKS * UNIT)
        for chunk in chunks:
            content[chunk * UNIT : (chunk + 1) * UNIT] = bytes([chunk % 255 + 1]) * UNIT
        with source.open("wb") as file:
            file.truncate(len(content))
            for chunk in chunks:
                file.seek(chunk * UNIT)
                file.write(content[chunk * UNIT : (chunk + 1) * UNIT])
        places = Places(FilePlace(str(source), io), FilePlace(str(target), io))
        settings = options.pop("settings", SETTINGS)
        bench = Bench(tmp_path, len(content), settings=settings, places=places)
        disk = await bench.open()
        job = await bench.start(**options)
        status = await finish(job)
        assert status.phase is Phase.DONE, status
        assert status.verified == (options.get("verify") != "none")
        assert target.read_bytes() == content
        await disk.backend.close()
        return pieces

    yield move
    await io.close()


def chunks_of(piece: list[tuple[int, int]]) -> int:
    return sum(length for _, length in piece) // UNIT


@pytest.mark.parametrize("verify", ["none", "full"])
async def test_a_worker_takes_many_chunks_once_they_are_known_to_be_quick(moved, verify) -> None:
    pieces = await moved(list(range(CHUNKS)), verify=verify)
    sizes = [chunks_of(piece) for piece in pieces]
    assert sizes[0] == 1
    assert max(sizes) == PIECE_CHUNKS_MAX
    assert sum(sizes) == CHUNKS
    assert max(len(piece) for piece in pieces) == 1, "neighbours are one run"


async def test_what_lies_far_apart_is_taken_apart(moved) -> None:
    near = list(range(0, 200, 2))
    far = [near[-1] + PIECE_SPAN_CHUNKS_MAX + 1, near[-1] + 2 * PIECE_SPAN_CHUNKS_MAX + 2]
    pieces = await moved([*near, *far])
    spans = [piece[-1][0] - piece[0][0] for piece in pieces]
    assert UNIT < max(spans) <= PIECE_SPAN_CHUNKS_MAX * UNIT
    assert [[(chunk * UNIT, UNIT)] for chunk in far] == pieces[-2:]
    assert sum(map(chunks_of, pieces)) == len(near) + 2


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "mirror"},  # a guest's mirrored write waits for the piece
        {"limit": 1 << 40},
        {"settings": replace(SETTINGS, piece_s=0.0)},
    ],
    ids=["mirroring", "limited", "slow"],
)
async def test_a_worker_takes_one_chunk(moved, options) -> None:
    pieces = await moved(list(range(CHUNKS)), **options)
    assert {chunks_of(piece) for piece in pieces} == {1}


@pytest.mark.parametrize("mode", ["mirror", "copy"])
async def test_few_workers_copy_at_a_time_while_a_guest_waits_for_the_target(
    moved, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """And as many otherwise as gain something: for many the target takes as long as for one."""
    answer_delay_s = 0.002
    at_once = [0]
    honest = DescriptorBackend.carry_from

    async def slowly(self, *args):
        at_once.append(at_once[-1] + 1)
        await asyncio.sleep(answer_delay_s)
        found = await honest(self, *args)
        at_once.append(at_once[-1] - 1)
        return found

    monkeypatch.setattr(DescriptorBackend, "carry_from", slowly)
    await moved(list(range(CHUNKS)), mode=mode, settings=replace(SETTINGS, piece_s=0.0))
    if mode == "mirror":
        assert max(at_once) == WORKERS_MIRRORING_MAX
    else:
        assert 2 * WORKERS_MIRRORING_MAX < max(at_once) <= WORKERS_MAX


@pytest.fixture
async def held(on_files: CrashBench) -> CrashBench:
    """A move that is copied, mirrors, and waits."""
    on_files.settings = SMALL
    await on_files.hold_mirroring(verify="full")
    return on_files


@pytest.mark.parametrize("gap", [1, 3])
async def test_a_piece_of_several_chunks_is_one_as_regards_its_rules(
    held: CrashBench, gap: int
) -> None:
    """Its lock spans them all, each is forgotten, taken again, written and equal by itself."""
    job, unit = held.job, SMALL.chunk_bytes
    tracker, copier = job.tracker, job.copier
    runs = [(0, unit), (gap * unit, unit)]
    for run in runs:
        tracker.bitmap.mark(*run)
    assert [tracker.bitmap.take(at, unit) for at, _ in runs] == runs
    tracker._target_unflushed.clear()
    tracker.digests.set(gap, 12345)
    copier._stopped = False
    reading = held.at_source.hang("read")
    worker = asyncio.ensure_future(copier._work(runs))
    await reading.wait()
    tracker.bitmap.mark(gap * unit, 1)  # an unmirrored write, say, that came behind the lock
    ahead = tracker.locks.acquire_within((gap + 1) * unit - 1, (gap + 1) * unit, 0.05)
    assert await ahead is None, "the last block is the worker's"
    reading.release()
    await worker
    assert tracker._target_unflushed.bits[tracker.regions(0, unit)].all()
    assert tracker._target_unflushed.bits[tracker.regions(gap * unit, unit)].all()
    assert tracker.digests.get(gap) != 12345
    assert tracker.bitmap.clean(0, unit)
    assert not tracker.bitmap.clean(gap * unit, 1)
    await held.assert_moved(await held.cut_over())


async def test_a_piece_that_the_loop_has_to_copy_is_read_chunk_by_chunk(
    moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many workers may have a piece when a target fails: their memory is what is bounded."""
    lengths: list[int] = []
    carried = 0
    honest, read_once = DescriptorBackend.carry_from, DescriptorBackend.read_once

    async def failing(self, source, runs, hasher, watch):
        nonlocal carried
        carried += 1
        if sum(length for _, length in runs) > UNIT and carried % 2:
            raise OSError(errno.EIO, "of the test")
        return await honest(self, source, runs, hasher, watch)

    async def noted(self, offset, length):
        lengths.append(length)
        return await read_once(self, offset, length)

    monkeypatch.setattr(DescriptorBackend, "carry_from", failing)
    monkeypatch.setattr(DescriptorBackend, "read_once", noted)
    await moved(list(range(CHUNKS)))
    assert lengths
    assert max(lengths) == UNIT
