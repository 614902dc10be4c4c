"""Copies through the page cache: what they leave there, and those that run beside the loop."""

from __future__ import annotations

import asyncio
import errno
import functools
import math
import os
import threading
from pathlib import Path

import pytest
from xxhash import xxh3_64, xxh3_64_intdigest

from mirrord.core.geometry import KIB, MIB, Extent, Status
from mirrord.storage import durable
from mirrord.storage.backend import Cache, Watch
from mirrord.storage.carrying import (
    CARRY_THREADS_MAX,
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
)
from mirrord.storage.file import FileBackend
from mirrord.storage.fileio import FileIo
from mirrord.storage.page_cache import BEHIND_MAX
from tests.helpers import eventually_async
from tests.storage.conformance import pattern
from tests.storage.places import allocated_bytes, make_file, resident_pages
from tests.storage.test_file import leave_free, open_file

PAGE = 4096

COPIED = 20 * MIB  # more than is dropped late, and two of it fit the small file systems


def never() -> Watch:
    """Return a watch that has nothing overdue."""
    return Watch(math.inf, lambda: 0)


def linux() -> tuple[int, ...]:
    """Return the kernel's version."""
    return tuple(int(part) for part in os.uname().release.split(".")[:2])


async def write_once(source: FileBackend, target: FileBackend, offset: int) -> None:
    """Copy a piece through the loop."""
    await target.write_once(offset, await source.read_once(offset, MIB))


async def carry(source: FileBackend, target: FileBackend, offset: int) -> None:
    """Copy a piece beside it."""
    assert await target.carry_from(source, [(offset, MIB)], None, never()) == MIB


@pytest.mark.parametrize("copy", [write_once, carry])
@pytest.mark.parametrize("by_hand", [False, True], ids=["by the kernel", "by hand"])
async def test_what_is_copied_leaves_the_page_cache_as_it_was(
    system: tuple[str, Path], some_io: FileIo, by_hand: bool, copy
) -> None:
    kind, where = system
    path, moved = make_file(where / "disk", pattern(COPIED)), where / "moved"
    source = await open_file(path, some_io)
    target = await open_file(make_file(moved, b"", COPIED), some_io)
    if by_hand:
        target._wake.flags = 0
    await source.flush()
    os.posix_fadvise(source._descriptor, 0, COPIED, os.POSIX_FADV_DONTNEED)
    await source.read(0, MIB)
    for offset in range(0, COPIED, MIB):
        await copy(source, target, offset)
        await target.flush()
    read, written = resident_pages(path), resident_pages(moved)
    assert bytes(await target.read_stored(0, COPIED)) == pattern(COPIED)
    drops = bool(source._wake.flags), bool(target._wake.flags)
    await source.close()
    await target.close()
    known = kind in ("ext4", "xfs") and linux() >= (6, 14)
    assert drops == (known, known and not by_hand)
    if known:
        assert MIB // PAGE <= read < COPIED // 2 // PAGE  # what is ahead of a read comes too
    if kind != "tmpfs":
        assert written <= (0 if drops[1] else (BEHIND_MAX + 1) * MIB // PAGE)


@pytest.mark.parametrize("copy", [write_once, carry])
async def test_many_at_a_time_find_out_together_what_is_unknown(
    system: tuple[str, Path], some_io: FileIo, copy
) -> None:
    _, where = system
    source = await open_file(make_file(where / "disk", pattern(8 * MIB)), some_io)
    target = await open_file(make_file(where / "moved", b"", 8 * MIB), some_io)
    async with asyncio.TaskGroup() as pieces:
        for offset in range(0, 8 * MIB, MIB):
            pieces.create_task(copy(source, target, offset))
    assert bytes(await target.read(0, 8 * MIB)) == pattern(8 * MIB)
    await source.close()
    await target.close()


@pytest.fixture
async def sides(tmp_path: Path, some_io: FileIo):
    """A source of data, zeroes, data and a short tail, and a target full of something else."""
    content = pattern(MIB) + bytes(MIB) + pattern(MIB, 2) + b"tail"
    source = await open_file(make_file(tmp_path / "source", content), some_io)
    target = await open_file(make_file(tmp_path / "target", pattern(len(content), 3)), some_io)
    yield content, source, target
    await source.close()
    await target.close()


@pytest.mark.parametrize(("punches", "ranges"), [(True, True), (False, True), (False, False)])
async def test_zeroes_are_left_to_the_storage_and_everything_is_hashed(
    sides, tmp_path, monkeypatch, punches, ranges
) -> None:
    content, source, target = sides
    target._punches, target._zeroes_ranges = punches, ranges
    modes = []
    fallocate = durable.fallocate

    def noted(descriptor: int, mode: int, offset: int, length: int) -> None:
        modes.append(mode)
        fallocate(descriptor, mode, offset, length)

    monkeypatch.setattr(durable, "fallocate", noted)
    hasher = xxh3_64()
    moved = await target.carry_from(source, [(0, len(content))], hasher, never())
    assert moved == len(content) - MIB
    assert hasher.intdigest() == xxh3_64_intdigest(content)
    assert (tmp_path / "target").read_bytes() == content
    await target.flush()
    assert (allocated_bytes(tmp_path / "target") < len(content)) == punches
    zeroing = FALLOC_PUNCH_HOLE if punches else FALLOC_ZERO_RANGE
    assert set(modes) == ({FALLOC_KEEP_SIZE | zeroing} if ranges else set())


async def test_zeroes_that_the_storage_would_refuse_are_written(sides, tmp_path) -> None:
    content, source, target = sides
    target._zero_unit = 4 * MIB  # of a block device, say
    assert await target.carry_from(source, [(0, len(content))], None, never()) == len(content) - MIB
    assert (tmp_path / "target").read_bytes() == content
    await target.flush()
    assert allocated_bytes(tmp_path / "target") >= len(content)


async def test_only_the_range_is_touched(sides, tmp_path) -> None:
    content, source, target = sides
    before = (tmp_path / "target").read_bytes()
    offset, length = 100 * KIB, 300 * KIB
    assert await target.carry_from(source, [(offset, length)], None, never()) == length
    after = before[:offset] + content[offset : offset + length] + before[offset + length :]
    assert (tmp_path / "target").read_bytes() == after


async def test_several_runs_are_one_copy(sides, tmp_path) -> None:
    content, source, target = sides
    expected = bytearray((tmp_path / "target").read_bytes())
    runs = [(0, 4 * KIB), (12 * KIB, 8 * KIB), (MIB - KIB, 2 * KIB)]
    hasher = xxh3_64()
    assert await target.carry_from(source, runs, hasher, never()) == 13 * KIB  # 1 KiB are zeroes
    for offset, length in runs:
        expected[offset : offset + length] = content[offset : offset + length]
    assert (tmp_path / "target").read_bytes() == expected
    parts = b"".join(content[offset : offset + length] for offset, length in runs)
    assert hasher.intdigest() == xxh3_64_intdigest(parts)


async def test_direct_sides_are_left_to_the_loop(sides, tmp_path, some_io) -> None:
    content, source, target = sides
    before = (tmp_path / "target").read_bytes()
    direct = await open_file(make_file(tmp_path / "direct", content), some_io, Cache.DIRECT)
    assert await target.carry_from(direct, [(0, MIB)], None, never()) is None
    assert await direct.carry_from(source, [(0, MIB)], None, never()) is None
    await direct.close()
    assert (tmp_path / "target").read_bytes() == before


async def test_a_source_that_became_shorter_is_an_error(sides, tmp_path) -> None:
    _, source, target = sides
    os.truncate(tmp_path / "source", MIB)
    with pytest.raises(OSError, match="shorter") as caught:
        await target.carry_from(source, [(512 * KIB, MIB)], xxh3_64(), never())
    assert caught.value.errno == errno.EIO


async def test_what_is_gone_of_a_source_is_no_hole(sides, tmp_path) -> None:
    _, source, _ = sides
    os.truncate(tmp_path / "source", MIB)
    assert await source.extents(0, MIB) == [Extent(0, MIB, Status.DATA)]
    with pytest.raises(OSError, match="shorter") as caught:
        await source.extents(MIB, MIB)
    assert caught.value.errno == errno.EIO


async def test_a_watch_sees_the_target_and_not_the_source(sides, monkeypatch) -> None:
    content, source, target = sides
    watch = Watch(5, lambda: 1)
    seen: dict[str, set[float]] = {}
    honest = {name: getattr(os, name) for name in ("preadv", "pwritev")}

    def noting(name: str, *args: object) -> int:
        seen.setdefault(name, set()).add(watch.due_s)
        return honest[name](*args)

    for name in honest:
        monkeypatch.setattr(os, name, functools.partial(noting, name))
    await target.carry_from(source, [(0, len(content))], None, watch)
    assert seen == {"preadv": {math.inf}, "pwritev": {6}}
    assert watch.due_s == math.inf


async def test_a_target_that_hangs_holds_up_no_other(
    tmp_path: Path, some_io: FileIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no thread has begun when its move is given up is not begun at all."""
    source = await open_file(make_file(tmp_path / "disk", pattern(8 * MIB)), some_io)
    dead = await open_file(make_file(tmp_path / "dead", b"", 8 * MIB), some_io)
    other = await open_file(make_file(tmp_path / "other", b"", 8 * MIB), some_io)
    alive = threading.Event()
    begun: list[int] = []
    written: list[int] = []
    preadv, pwritev = os.preadv, os.pwritev

    def noted(descriptor: int, buffers: object, offset: int, flags: int) -> int:
        begun.append(offset)
        return preadv(descriptor, buffers, offset, flags)

    def hanging(descriptor: int, buffers: object, offset: int, flags: int) -> int:
        if descriptor == dead._descriptor:
            alive.wait()
            written.append(offset)
        return pwritev(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", noted)
    monkeypatch.setattr(os, "pwritev", hanging)
    carries = [asyncio.create_task(carry(source, dead, at * MIB)) for at in range(6)]
    try:
        await eventually_async(lambda: len(begun) == CARRY_THREADS_MAX)
        await asyncio.wait_for(carry(source, other, 0), 10)
    finally:
        for task in carries:
            task.cancel()
        results = await asyncio.gather(*carries, return_exceptions=True)
        alive.set()
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    for backend in (dead, other, source):
        await backend.close()
    assert sorted(written) == [at * MIB for at in range(CARRY_THREADS_MAX)]


async def test_a_copy_that_nobody_waits_for_stops_soon(
    tmp_path: Path, some_io: FileIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await open_file(make_file(tmp_path / "disk", pattern(16 * MIB)), some_io)
    target = await open_file(make_file(tmp_path / "moved", b"", 16 * MIB), some_io)
    go_on, written, pwritev = threading.Event(), [], os.pwritev

    def slow(descriptor: int, buffers: object, offset: int, flags: int) -> int:
        written.append(offset)
        go_on.wait(10)
        return pwritev(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", slow)
    watch = Watch(math.inf, lambda: 0)
    copying = asyncio.create_task(target.carry_from(source, [(0, 16 * MIB)], None, watch))
    await eventually_async(lambda: written)
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    go_on.set()
    await target.close()
    await source.close()
    assert written == [0]


async def test_after_the_close_there_is_nothing_to_copy(sides, tmp_path, some_io) -> None:
    content, source, _ = sides
    target = await open_file(make_file(tmp_path / "closed", content), some_io)
    await target.close()
    for work in (
        target.carry_from(source, [(0, MIB)], None, never()),
        target.digests_stored([(0, MIB)]),
    ):
        with pytest.raises(OSError, match="Bad file descriptor"):
            await work


async def test_a_full_target_is_an_error(
    system: tuple[str, Path], tmp_path: Path, some_io: FileIo
) -> None:
    _, where = system
    source = await open_file(make_file(tmp_path / "disk", pattern(MIB) * 60), some_io)
    target = await open_file(make_file(where / "target", b"", 60 * MIB), some_io)
    leave_free(where, 40 * MIB)
    with pytest.raises(OSError, match="No space"):
        await target.carry_from(source, [(0, 60 * MIB)], None, never())
    await source.close()
    await target.close()


async def test_what_is_stored_is_hashed_past_the_cache(
    system: tuple[str, Path], some_io: FileIo
) -> None:
    kind, where = system
    content = pattern(3 * MIB + 5)
    path = make_file(where / "disk", content)
    backend = await open_file(path, some_io)
    await backend.flush()
    runs = [(0, MIB), (MIB, 2 * MIB)]
    found = await backend.digests_stored(runs)
    if kind == "tmpfs" and linux() < (6, 6):  # nothing is past it
        assert found is None
    else:
        assert found == [xxh3_64_intdigest(content[at : at + length]) for at, length in runs]
    assert await backend.digests_stored([(3 * MIB, 5)]) is None  # no whole block: read by the page
    await backend.close()


async def test_a_file_that_became_shorter_has_no_digest(sides, tmp_path) -> None:
    _, source, _ = sides
    os.truncate(tmp_path / "source", MIB)
    with pytest.raises(OSError, match="shorter") as caught:
        await source.digests_stored([(0, 2 * MIB)])
    assert caught.value.errno == errno.EIO


async def test_reads_that_come_in_parts_are_hashed_as_a_whole(
    sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, source, _ = sides
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, views, offset, *_: preadv(file, [views[0][:8192]], offset)
    )
    assert await source.digests_stored([(0, MIB)]) == [xxh3_64_intdigest(content[:MIB])]
