"""Data and holes of a file: what is told is so, and a walk through a disk doesn't look twice."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrord.core.geometry import KIB, MIB, Extent, Status
from mirrord.storage import durable
from mirrord.storage.carrying import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from mirrord.storage.holes import EXTENT_PAIRS_MAX, HoleFinder
from mirrord.storage.memory_pool import PAGE_BYTES

SIZE = 4 * MIB
BLOCK = 64 * KIB
PUNCH = FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE
DATA, HOLE = Status.DATA, Status.HOLE


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """Open a file that is one hole."""
    descriptor = os.open(tmp_path / "vm.raw", os.O_RDWR | os.O_CREAT)
    os.truncate(descriptor, SIZE)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gather what is asked of the file system."""
    asked: list[int] = []
    seek = os.lseek

    def counting(descriptor: int, offset: int, whence: int) -> int:
        asked.append(whence)
        return seek(descriptor, offset, whence)

    monkeypatch.setattr(os, "lseek", counting)
    return asked


def test_data_between_holes(file: int) -> None:
    os.pwrite(file, bytes([1]) * BLOCK, BLOCK)
    finder = HoleFinder(file)
    for _ in range(2):  # anew, and of what is remembered
        assert finder.find(0, SIZE) == [
            Extent(0, BLOCK, HOLE), Extent(BLOCK, BLOCK, DATA),
            Extent(2 * BLOCK, SIZE - 2 * BLOCK, HOLE),
        ]  # fmt: skip
        assert finder.find(BLOCK + 1, BLOCK + 9) == [Extent(BLOCK + 1, 8, DATA)]
        assert finder.find(2 * BLOCK - 1, 2 * BLOCK + 1) == [
            Extent(2 * BLOCK - 1, 1, DATA), Extent(2 * BLOCK, 1, HOLE),
        ]  # fmt: skip
        assert finder.find(0, 8) == [Extent(0, 8, HOLE)]
    assert finder.find(8, 8) == []


def test_a_walk_looks_for_the_end_of_data_once(file: int, looks: list[int]) -> None:
    os.pwrite(file, bytes([1]) * SIZE, 0)
    finder = HoleFinder(file)
    for offset in range(0, SIZE, BLOCK):
        assert finder.find(offset, offset + BLOCK) == [Extent(offset, BLOCK, DATA)]
    assert looks.count(os.SEEK_HOLE) == 1


def test_a_hole_of_ones_own_is_told_at_once(file: int, looks: list[int]) -> None:
    os.pwrite(file, bytes([1]) * SIZE, 0)
    finder = HoleFinder(file)
    assert finder.find(0, BLOCK) == [Extent(0, BLOCK, DATA)]
    durable.fallocate(file, PUNCH, 8 * BLOCK, BLOCK)
    finder.known.forget(8 * BLOCK, BLOCK)
    assert [extent.status for extent in finder.find(0, SIZE)] == [DATA, HOLE, DATA]
    durable.fallocate(file, PUNCH, 0, BLOCK)
    finder.known.forget(0, BLOCK)
    assert finder.find(0, 2 * BLOCK) == [Extent(0, BLOCK, HOLE), Extent(BLOCK, BLOCK, DATA)]
    looked = len(looks)
    finder.known.forget(8 * BLOCK, BLOCK)  # elsewhere than what is remembered
    assert finder.find(BLOCK, 2 * BLOCK) == [Extent(BLOCK, BLOCK, DATA)]
    assert len(looks) == looked


def test_a_hole_made_during_the_look_is_not_missed_for_ever(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.pwrite(file, bytes([1]) * SIZE, 0)
    finder = HoleFinder(file)
    seek = os.lseek

    def slow(descriptor: int, offset: int, whence: int) -> int:
        found = seek(descriptor, offset, whence)
        if whence == os.SEEK_HOLE:
            durable.fallocate(file, PUNCH, BLOCK, BLOCK)
            finder.known.forget(BLOCK, BLOCK)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(os, "lseek", slow)
        assert finder.find(0, SIZE)[0] == Extent(0, SIZE, DATA)
    assert finder.find(0, 2 * BLOCK) == [Extent(0, BLOCK, DATA), Extent(BLOCK, BLOCK, HOLE)]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_told_is_so(file: int, seed: int) -> None:
    """Whatever is written, punched and asked for: a hole is one, and data is, for who forgets."""
    chance = random.Random(seed)
    finder = HoleFinder(file)
    blocks = [HOLE] * (SIZE // BLOCK)
    for _ in range(200):
        at = chance.randrange(len(blocks))
        count = chance.randint(1, min(8, len(blocks) - at))
        if chance.random() < 0.3:
            os.pwrite(file, bytes([1]) * count * BLOCK, at * BLOCK)
            blocks[at : at + count] = [DATA] * count
        elif chance.random() < 0.3:
            durable.fallocate(file, PUNCH, at * BLOCK, count * BLOCK)
            finder.known.forget(at * BLOCK, count * BLOCK)
            blocks[at : at + count] = [HOLE] * count
        told = finder.find(at * BLOCK, (at + count) * BLOCK)
        assert told[0].offset == at * BLOCK
        found = [extent.status for extent in told for _ in range(extent.length // BLOCK)]
        assert found == blocks[at : at + count]


def test_many_pieces_are_told_in_parts(file: int) -> None:
    size = (EXTENT_PAIRS_MAX + 8) * 2 * PAGE_BYTES
    os.truncate(file, size)
    for at in range(0, size, 2 * PAGE_BYTES):
        os.pwrite(file, b"1", at)
    finder = HoleFinder(file)
    told = finder.find(0, size)
    assert len(told) == 2 * EXTENT_PAIRS_MAX - 1, "the first hole is missing"
    told += finder.find(told[-1].end, size)
    assert told[-1].end == size
    assert sum(extent.length for extent in told if extent.status is DATA) == size // 2


def test_a_file_that_shrank_or_can_not_tell(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finder = HoleFinder(file)
    with pytest.raises(OSError, match="shorter") as caught:
        finder.find(0, SIZE + 1)
    assert caught.value.errno == errno.EIO

    def unknown(descriptor: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "what is a hole?")

    monkeypatch.setattr(os, "lseek", unknown)
    assert finder.find(0, SIZE) == [Extent(0, SIZE, DATA)]
