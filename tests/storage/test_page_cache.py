"""What a guest has in the page cache of the source, it gets in that of the target."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mirrord.core.geometry import KIB, MIB
from mirrord.storage import page_cache
from mirrord.storage.backend import Cache
from mirrord.storage.fileio import FileIo
from tests.storage.conformance import pattern
from tests.storage.places import make_file
from tests.storage.test_file import open_file

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 8 * MIB + 5 * KIB


def cool(path: Path) -> None:
    """Let the page cache forget a file."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path, offset: int, length: int) -> None:
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(file.fileno(), length, offset)


def cached(path: Path) -> list[int]:
    """Return the numbers of the pages that are in the page cache."""
    with path.open("r+b") as file:
        states = page_cache.resident(file.fileno(), 0, path.stat().st_size)
    return [number for number, state in enumerate(states) if state]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "source", tmp_path / "target"
    for path in paths:
        cool(make_file(path, pattern(SIZE)))
        assert cached(path) == []
    return paths


async def test_only_what_the_source_has_is_warmed(pair: tuple[Path, Path], some_io: FileIo) -> None:
    one, other = pair
    source, target = await open_file(one, some_io), await open_file(other, some_io)
    unit = 64 * KIB
    read(one, unit, PAGE)
    read(one, 5 * MIB + PAGE, 2 * PAGE)
    read(one, SIZE - 1, 1)
    runs = [(offset, min(unit, SIZE - offset)) for offset in range(0, SIZE, unit)]
    assert await target.warm_from(source, runs) == 2 * unit + SIZE % unit
    warm = set(cached(other))
    for offset in (unit, 5 * MIB):
        assert warm.issuperset(range(offset // PAGE, (offset + unit) // PAGE))
    assert SIZE // PAGE in warm
    assert warm.isdisjoint(range(MIB // PAGE, 2 * MIB // PAGE))
    await source.close()
    await target.close()


async def test_a_side_without_a_cache_warms_nothing(
    pair: tuple[Path, Path], some_io: FileIo
) -> None:
    one, other = pair
    cached_side = await open_file(one, some_io)
    direct = await open_file(other, some_io, Cache.DIRECT)
    await cached_side.read(0, MIB)
    assert await direct.warm_from(cached_side, [(0, MIB)]) == 0
    assert cached(other) == []
    cool(one)
    await direct.read(0, MIB)
    assert await cached_side.warm_from(direct, [(0, MIB)]) == 0
    assert cached(one) == []
    await cached_side.close()
    await direct.close()


def test_trouble_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        page_cache.resident(-1, 0, PAGE)
    with make_file(tmp_path / "disk", pattern(PAGE)).open("r+b") as file:
        assert page_cache.resident(file.fileno(), 0, PAGE) == b"\1"
        with pytest.raises(OSError, match="Invalid argument"):
            page_cache.resident(file.fileno(), 1, PAGE)
