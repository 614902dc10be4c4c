"""The arithmetic of ranges."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from mirrord.core.geometry import Extent, Status, merge, round_down, round_up, runs_of, split

offsets = st.integers(0, 1 << 62)
units = st.integers(1, 1 << 40)


@given(offsets, units)
def test_rounding_finds_the_next_multiple(value: int, unit: int) -> None:
    down, up = round_down(value, unit), round_up(value, unit)
    assert down % unit == up % unit == 0
    assert down <= value <= up
    assert up - down == (0 if value % unit == 0 else unit)


@given(st.integers(0, 1000), st.integers(0, 300), st.integers(1, 70))
def test_pieces_cover_the_range_and_cross_no_multiple(offset: int, length: int, unit: int) -> None:
    pieces = list(split(offset, length, unit))
    covered = [byte for start, size in pieces for byte in range(start, start + size)]
    assert covered == list(range(offset, offset + length))
    for start, size in pieces:
        assert size > 0
        assert start // unit == (start + size - 1) // unit
    assert len(pieces) <= length // unit + 2


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(Status)), max_size=20))
def test_merged_extents_say_the_same_with_fewer(parts: list[tuple[int, Status]]) -> None:
    extents = []
    offset = 0
    for length, status in parts:
        extents.append(Extent(offset, length, status))
        offset += length
    merged = merge(extents)

    def statuses(some: list[Extent]) -> list[Status]:
        return [one.status for one in some for _ in range(one.offset, one.end)]

    assert statuses(merged) == statuses(extents)
    assert all(one.length > 0 for one in merged)
    for one, other in pairwise(merged):
        assert one.end == other.offset
        assert one.status is not other.status


def test_extents_with_a_gap_stay_apart() -> None:
    apart = [Extent(0, 4, Status.DATA), Extent(8, 4, Status.DATA)]
    assert merge(apart) == apart


@given(
    st.lists(st.tuples(st.sampled_from((b"\0", b"\0\1", b"x")), st.integers(1, 9))),
    st.integers(1, 8),
)
def test_runs_cover_the_data_and_tell_zeroes_by_whole_units(
    parts: list[tuple[bytes, int]], unit: int
) -> None:
    data = b"".join(part * count for part, count in parts)
    runs = runs_of(memoryview(data), unit)
    assert [run.start for run in runs] == list(accumulate((r.length for r in runs), initial=0))[:-1]
    assert sum(run.length for run in runs) == len(data)
    for run in runs:
        units = [data[at : at + unit] for at in range(run.start, run.start + run.length, unit)]
        assert run.start % unit == 0
        assert all(any(part) != run.is_zero for part in units)
    assert all(one.is_zero != next_one.is_zero for one, next_one in pairwise(runs))
