"""Offsets, lengths and extents: the arithmetic that everything else agrees on. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


class Status(Enum):
    """What a range of a disk holds."""

    DATA = "data"
    ZERO = "zero"  # allocated, reads as zeroes
    HOLE = "hole"  # no backing storage, reads as zeroes
    DIRTY = "dirty"  # in the bitmap's extents: the source may differ from the target
    CLEAN = "clean"


@dataclass(frozen=True, slots=True)
class Extent:
    """A contiguous range of bytes with one status."""

    offset: int
    length: int
    status: Status

    @property
    def end(self) -> int:
        return self.offset + self.length


def round_down(value: int, unit: int) -> int:
    """Return the largest multiple of `unit` that is not above `value`."""
    return value - value % unit


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def split(offset: int, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) pieces that cover the range and cross no multiple of `unit`."""
    end = offset + length
    while offset < end:
        stop = min(end, round_down(offset, unit) + unit)
        yield offset, stop - offset
        offset = stop


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Join neighbours of one status; extents come in order and touch one another."""
    merged: list[Extent] = []
    for extent in extents:
        if extent.length == 0:
            continue
        last = merged[-1] if merged else None
        if last is not None and last.status is extent.status and last.end == extent.offset:
            merged[-1] = Extent(last.offset, last.length + extent.length, last.status)
        else:
            merged.append(extent)
    return merged


class Run(NamedTuple):
    """A part of some data that is all zeroes, or isn't; `start` counts from its beginning."""

    start: int
    length: int
    is_zero: bool


def runs_of(data: memoryview, unit: int) -> list[Run]:
    """Cut data into runs of units that are all zeroes and runs of others; the last may be short."""
    if len(data) and 0 not in data[::unit].tobytes():  # most data is told from zeroes by it alone
        return [Run(0, len(data), False)]
    runs: list[Run] = []
    zeroes = bytes(unit)
    for start, length in split(0, len(data), unit):
        # One byte first. `bytes` compares by memcmp, a view byte by byte.
        is_zero = data[start] == 0 and bytes(data[start : start + length]) == zeroes[:length]
        last = runs[-1] if runs else None
        if last is not None and last.is_zero == is_zero:
            runs[-1] = Run(last.start, last.length + length, is_zero)
        else:
            runs.append(Run(start, length, is_zero))
    return runs
