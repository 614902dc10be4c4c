"""The dirty bitmap, against a model that is too simple to be wrong."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mirrord.core.bitmap import (
    BITMAP_MAX_BYTES,
    DirtyBitmap,
    bitmap_bytes_for,
    granularity_for,
)
from mirrord.core.geometry import KIB, MIB, TIB

BLOCK = 4 * KIB
BLOCKS = 37
SIZE = (BLOCKS - 1) * BLOCK + 512  # the last block is short


def fresh(size: int = SIZE) -> DirtyBitmap:
    return DirtyBitmap(size, bytearray(bitmap_bytes_for(size)))


# -- sizes


@pytest.mark.parametrize(
    ("size", "granularity", "bitmap_bytes"),
    [
        (1, 4 * KIB, 1),
        (32 * KIB, 4 * KIB, 1),
        (32 * KIB + 1, 4 * KIB, 2),
        (TIB, 4 * KIB, 32 * MIB),
        (TIB + 1, 8 * KIB, 16 * MIB + 1),
        (16 * TIB, 64 * KIB, 32 * MIB),
    ],
)
def test_granularity_grows_with_the_disk(size: int, granularity: int, bitmap_bytes: int) -> None:
    assert granularity_for(size) == granularity
    assert bitmap_bytes_for(size) == bitmap_bytes


@given(st.integers(1, 1 << 62))
def test_a_bitmap_covers_the_disk_and_stays_small(size: int) -> None:
    assert bitmap_bytes_for(size) <= BITMAP_MAX_BYTES
    assert bitmap_bytes_for(size) * 8 * granularity_for(size) >= size


def test_a_bitmap_needs_a_disk_and_room() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        DirtyBitmap(0, bytearray(8))
    with pytest.raises(ValueError, match="needs 2 bytes"):
        DirtyBitmap(33 * KIB, bytearray(1))


# -- the dirty bitmap, by example


def test_a_new_bitmap_believes_its_buffer() -> None:
    buffer = bytearray(b"\xff" * 8)
    bitmap = DirtyBitmap(SIZE, memoryview(buffer))
    assert bitmap.remaining() == bitmap.todo() == SIZE
    bitmap.clear()
    assert buffer == bytes(5) + b"\xff" * 3  # what is behind the bitmap is someone else's
    bitmap.mark(BLOCK, 1)
    assert buffer[0] == 0b10
    assert DirtyBitmap(SIZE, buffer).take(0, MIB) == (BLOCK, BLOCK)


def test_taking_walks_over_runs_in_pieces() -> None:
    bitmap = fresh()
    bitmap.mark(BLOCK + 100, 3 * BLOCK)
    assert bitmap.take(0, 2 * BLOCK) == (BLOCK, 2 * BLOCK)
    assert bitmap.take(3 * BLOCK, 1) == (3 * BLOCK, BLOCK)  # at least one block
    assert bitmap.take(4 * BLOCK, MIB) == (4 * BLOCK, BLOCK)
    assert bitmap.take(5 * BLOCK, MIB) is None
    bitmap.mark(0, 1)
    assert bitmap.take(BLOCK, MIB) is None  # behind the cursor
    assert bitmap.remaining() == 5 * BLOCK
    assert bitmap.todo() == BLOCK


def test_a_chunk_is_taken_with_all_its_runs() -> None:
    bitmap = fresh()
    for block in (1, 2, 5, 7, 8, 9, BLOCKS - 1):
        bitmap.mark(block * BLOCK, 1)
    chunk = 8 * BLOCK
    assert bitmap.take_chunk(2 * BLOCK, chunk, 9) == [
        (2 * BLOCK, BLOCK), (5 * BLOCK, BLOCK), (7 * BLOCK, BLOCK)
    ]  # fmt: skip
    assert bitmap.take_chunk(0, chunk, 9) == [(BLOCK, BLOCK)]
    assert bitmap.take_chunk(0, chunk, 9) == [(8 * BLOCK, 2 * BLOCK)]
    assert bitmap.take_chunk(10 * BLOCK, chunk, 9) == [((BLOCKS - 1) * BLOCK, 512)]
    assert bitmap.take_chunk(0, chunk, 9) == []
    assert bitmap.todo() == 0


@settings(max_examples=1000)
@given(
    st.sets(st.integers(0, BLOCKS - 1)),
    st.integers(0, BLOCKS),
    st.integers(1, 9).map(lambda blocks: blocks * BLOCK),
    st.integers(1, 4),
)
def test_a_chunk_is_taken_as_a_simple_model_says(
    blocks: set[int], cursor: int, chunk_bytes: int, runs_max: int
) -> None:
    bitmap = fresh()
    for block in blocks:
        bitmap.mark(block * BLOCK, 1)
    ahead = sorted(block for block in blocks if block >= cursor)
    expected: list[tuple[int, int]] = []
    for block in ahead:
        offset, length = block * BLOCK, min(BLOCK, SIZE - block * BLOCK)
        if offset // chunk_bytes != ahead[0] * BLOCK // chunk_bytes:
            break
        if expected and sum(expected[-1]) == offset:
            expected[-1] = (expected[-1][0], expected[-1][1] + length)
        elif len(expected) == runs_max:
            break
        else:
            expected.append((offset, length))
    before = bitmap.todo()
    taken = bitmap.take_chunk(cursor * BLOCK, chunk_bytes, runs_max)
    assert taken == expected
    assert bitmap.todo() == before - sum(length for _, length in taken)


def test_the_last_block_may_be_short() -> None:
    bitmap = fresh()
    bitmap.mark(SIZE - 1, 1)
    assert bitmap.remaining() == 512
    assert bitmap.take(0, MIB) == (SIZE - 512, 512)
    bitmap.mark(0, 1)
    assert bitmap.take(SIZE, MIB) is None
    bitmap.copied(SIZE - 512, 512)
    assert bitmap.remaining() == BLOCK


def test_a_write_during_a_copy_stays_dirty() -> None:
    bitmap = fresh()
    bitmap.mark_all()
    assert bitmap.take(0, 4 * BLOCK) == (0, 4 * BLOCK)
    bitmap.mark(BLOCK, BLOCK)
    bitmap.copied(0, 4 * BLOCK, keep=[(2 * BLOCK + 5, 1), (9 * BLOCK, BLOCK)])
    assert bitmap.runs(0, 4 * BLOCK) == [
        (0, BLOCK, False), (BLOCK, 2 * BLOCK, True), (3 * BLOCK, BLOCK, False)
    ]  # fmt: skip
    assert bitmap.take(0, MIB)[0] == BLOCK  # type: ignore[index]
    bitmap.validate()


def test_what_is_taken_once_more_is_copied_with_what_was_written_meanwhile() -> None:
    bitmap = fresh()
    bitmap.mark_all()
    assert bitmap.take(0, 4 * BLOCK) == (0, 4 * BLOCK)
    bitmap.mark(BLOCK, BLOCK)
    bitmap.retake(0, 4 * BLOCK)
    bitmap.validate()
    bitmap.copied(0, 4 * BLOCK)
    assert bitmap.clean(0, 4 * BLOCK)
    assert bitmap.todo() == bitmap.remaining() == SIZE - 4 * BLOCK


def test_a_copy_of_part_of_a_block_cleans_nothing() -> None:
    bitmap = fresh()
    bitmap.mark_all()
    bitmap.take(0, MIB)
    bitmap.copied(1, BLOCK)
    assert bitmap.remaining() == SIZE


def test_a_mirrored_write_of_part_of_a_block_cleans_only_what_was_clean() -> None:
    bitmap = fresh()
    bitmap.mark(0, 1)
    for offset in (0, 2 * BLOCK):
        was_clean = bitmap.clean(offset, 512)
        bitmap.hold(offset, 512)
        bitmap.unmark(offset, 512, was_clean=was_clean)
    assert bitmap.runs(0, 3 * BLOCK) == [(0, BLOCK, True), (BLOCK, 2 * BLOCK, False)]
    bitmap.unmark(0, 512)
    assert bitmap.dirty()
    bitmap.unmark(0, BLOCK)
    assert not bitmap.dirty()


def test_what_is_held_is_dirty_but_not_to_copy() -> None:
    bitmap = fresh()
    bitmap.hold(BLOCK, BLOCK)
    assert bitmap.dirty()
    assert bitmap.take(0, MIB) is None
    bitmap.mark(BLOCK, BLOCK)
    assert bitmap.take(0, MIB) == (BLOCK, BLOCK)


def test_runs_are_clipped_and_may_stop_early() -> None:
    bitmap = fresh()
    bitmap.mark(BLOCK, BLOCK)
    assert bitmap.runs(BLOCK - 7, 10) == [(BLOCK - 7, 7, False), (BLOCK, 3, True)]
    assert bitmap.runs(0, SIZE, runs_max=2) == [(0, BLOCK, False), (BLOCK, BLOCK, True)]


def test_regions_are_clipped_to_the_disk() -> None:
    bitmap = fresh()
    bitmap.mark(SIZE - 1, 1)
    assert not bitmap.region_dirty(0, 16 * BLOCK)
    assert bitmap.region_dirty(2, 16 * BLOCK)


def test_dirtied_bytes_counts_what_must_be_copied_again() -> None:
    bitmap = fresh()
    bitmap.mark(0, BLOCK)
    bitmap.mark(0, BLOCK)
    assert bitmap.dirtied_bytes == BLOCK
    bitmap.mark(0, 3 * BLOCK)
    assert bitmap.dirtied_bytes == 3 * BLOCK
    bitmap.take(0, MIB)
    bitmap.mark(0, 1)
    assert bitmap.dirtied_bytes == 4 * BLOCK
    bitmap.put_back(0, 3 * BLOCK)
    assert bitmap.dirtied_bytes == 4 * BLOCK


# -- the dirty bitmap, as a machine

ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda pair: (pair[0], min(pair[1], SIZE - pair[0]))
)
block_ranges = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 8)).map(
    lambda pair: (pair[0] * BLOCK, min(pair[1] * BLOCK, SIZE - pair[0] * BLOCK))
)
some_ranges = st.one_of(ranges, block_ranges)


def touched(offset: int, length: int) -> set[int]:
    return set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))


def inside(offset: int, length: int) -> set[int]:
    end = offset + length
    return {
        block
        for block in range(BLOCKS)
        if block * BLOCK >= offset and min(SIZE, (block + 1) * BLOCK) <= end
    }


class BitmapMachine(RuleBasedStateMachine):
    """`DirtyBitmap` against two sets of block numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = bytearray(bitmap_bytes_for(SIZE))
        self.bitmap = DirtyBitmap(SIZE, self.buffer)
        self.mapped: set[int] = set()
        self.todo: set[int] = set()

    @rule(where=some_ranges)
    def mark(self, where: tuple[int, int]) -> None:
        before = self.bitmap.dirtied_bytes
        self.bitmap.mark(*where)
        assert self.bitmap.dirtied_bytes - before == BLOCK * len(touched(*where) - self.todo)
        self.mapped |= touched(*where)
        self.todo |= touched(*where)

    @rule(where=some_ranges)
    def hold(self, where: tuple[int, int]) -> None:
        self.bitmap.hold(*where)
        self.mapped |= touched(*where)

    @rule(where=some_ranges, was_clean=st.booleans())
    def unmark(self, where: tuple[int, int], was_clean: bool) -> None:
        self.bitmap.unmark(*where, was_clean=was_clean)
        blocks = touched(*where) if was_clean else inside(*where)
        self.mapped -= blocks
        self.todo -= blocks

    @rule(cursor=st.integers(0, BLOCKS), length_max=st.integers(1, 9 * BLOCK))
    def take(self, cursor: int, length_max: int) -> None:
        taken = self.bitmap.take(min(SIZE, cursor * BLOCK), length_max)
        ahead = sorted(block for block in self.todo if block >= cursor)
        if taken is None:
            assert not ahead
            return
        offset, length = taken
        blocks = touched(offset, length)
        assert inside(offset, length) == blocks
        assert min(blocks) == ahead[0]
        assert blocks <= self.todo
        assert len(blocks) == 1 or length <= length_max
        full = len(blocks) == max(1, length_max // BLOCK)
        assert full or max(blocks) + 1 not in self.todo
        self.todo -= blocks

    @rule(where=some_ranges)
    def put_back(self, where: tuple[int, int]) -> None:
        self.bitmap.put_back(*where)
        self.mapped |= touched(*where)
        self.todo |= touched(*where)

    @rule(where=some_ranges)
    def retake(self, where: tuple[int, int]) -> None:
        self.bitmap.retake(*where)
        self.todo -= inside(*where)

    @rule(where=some_ranges, keep=st.lists(some_ranges, max_size=3))
    def copied(self, where: tuple[int, int], keep: list[tuple[int, int]]) -> None:
        blocks = inside(*where)
        stay = (self.todo | set[int]().union(*(touched(*kept) for kept in keep))) & blocks
        self.bitmap.copied(*where, keep)
        # What the caller keeps was marked by it, so it is mapped anyway: no bit is ever added.
        self.mapped -= blocks - stay

    @rule()
    def mark_all(self) -> None:
        self.bitmap.mark_all()
        self.mapped = set(range(BLOCKS))
        self.todo = set(range(BLOCKS))

    @rule()
    def clear(self) -> None:
        self.bitmap.clear()
        self.mapped.clear()
        self.todo.clear()

    @rule(blocks=st.sets(st.integers(0, BLOCKS - 1), max_size=8))
    def reset(self, blocks: set[int]) -> None:
        self.bitmap.reset([(block * BLOCK, 1) for block in sorted(blocks)])
        self.mapped = set(blocks)
        self.todo = set(blocks)

    @rule()
    def kill(self) -> None:
        self.bitmap = DirtyBitmap(SIZE, self.buffer)
        self.todo = set(self.mapped)

    @rule(where=some_ranges)
    def runs(self, where: tuple[int, int]) -> None:
        runs = self.bitmap.runs(*where)
        assert runs[0][0] == where[0]
        assert sum(length for _, length, _ in runs) == where[1]
        for (offset, length, dirty), (after, _, other) in pairwise(runs):
            assert after == offset + length
            assert other != dirty
        for offset, length, dirty in runs:
            assert touched(offset, length) & self.mapped == (
                touched(offset, length) if dirty else set()
            )

    @rule(where=some_ranges)
    def clean(self, where: tuple[int, int]) -> None:
        assert self.bitmap.clean(*where) == (not touched(*where) & self.mapped)

    @rule(region_blocks=st.sampled_from([0.5, 1, 2, 4, 64]))
    def clean_regions(self, region_blocks: float) -> None:
        region_bytes = int(region_blocks * BLOCK)
        clean = self.bitmap.clean_regions(region_bytes)
        assert len(clean) == -(-SIZE // region_bytes)
        for region, is_clean in enumerate(clean):
            assert is_clean != self.bitmap.region_dirty(region, region_bytes)

    @invariant()
    def agrees(self) -> None:
        self.bitmap.validate()
        assert self.bitmap.dirty() == bool(self.mapped)
        for count, blocks in (
            (self.bitmap.remaining(), self.mapped),
            (self.bitmap.todo(), self.todo),
        ):
            assert count == sum(512 if block == BLOCKS - 1 else BLOCK for block in blocks)


TestDirtyBitmap = BitmapMachine.TestCase
TestDirtyBitmap.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
