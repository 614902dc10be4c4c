"""What a disk behind a connection remembers: changes to repeat, and proof of what was durable.

Pure, but for `apply` and `ChangeLocks`, which wait. `steady` says what all this is for.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from xxhash import xxh3_64_intdigest

from mirrord.core.geometry import KIB, MIB, split
from mirrord.core.ranges import RangeLocks, Ticket
from mirrord.storage.backend import Buffer
from mirrord.storage.remote import LostError, RemoteFile

SAMPLES_MAX: Final = 128  # of what was flushed: a quarter of a second to read back, at worst
SAMPLE_BYTES_MAX: Final = 64 * KIB
ZERO_PIECE_BYTES: Final = MIB
REPEATED_AT_ONCE: Final = 32
_ZEROES = bytes(ZERO_PIECE_BYTES)


class Change:
    """A change of a range, which may be repeated. `data` None makes zeroes."""

    __slots__ = (
        "acknowledged", "again", "copying", "data", "fua", "landed", "length", "offset", "punch",
        "refused", "sent", "whole",
    )  # fmt: skip

    def __init__(
        self,
        offset: int,
        length: int,
        data: Buffer | None,
        *,
        fua: bool,
        punch: bool = True,
        copying: bool = False,
    ) -> None:
        self.offset = offset
        self.length = length
        self.data = data
        self.fua = fua
        self.punch = punch
        self.copying = copying  # for a move
        self.whole = self  # what it is a part of
        self.sent = False  # the server may have heard of it
        self.acknowledged = False  # the guest was told that it is done
        self.refused: OSError | None = None  # by the server, when the replay repeated it
        self.landed = False  # the replay has repeated it
        self.again = True  # a replay repeats it: not when the server has said no

    def part(self, start: int, stop: int) -> Change:
        """Return what it does to a range inside its own."""
        if (start, stop) == (self.offset, self.offset + self.length):
            return self
        at = start - self.offset
        data = None if self.data is None else memoryview(self.data)[at : at + stop - start]
        part = Change(start, stop - start, data, fua=self.fua, punch=self.punch)
        part.whole = self.whole
        return part

    @property
    def cost(self) -> int:
        return (0 if self.data is None else self.length) + 256


def latest(changes: Sequence[Change]) -> list[Change]:
    """Cut away from each change what a later one covers, and leave out what is not to be repeated.

    What is left doesn't overlap. To repeat the changes as they were would put old content over
    newer, and if we died just then it would stay so.
    """
    left: list[Change] = []
    starts: list[int] = []  # what later changes cover: disjoint ranges, in order
    stops: list[int] = []
    for change in reversed(changes):
        if not change.again:
            continue
        at = start = change.offset
        stop = end = change.offset + change.length
        first, last = bisect_left(stops, start), bisect_right(starts, end)
        for begin, finish in zip(starts[first:last], stops[first:last], strict=True):
            if at < begin:
                left.append(change.part(at, begin))
            at = max(at, finish)
        if at < end:
            left.append(change.part(at, end))
        if first < last:
            start, stop = min(start, starts[first]), max(stop, stops[last - 1])
        starts[first:last], stops[first:last] = [start], [stop]
    return left


class Kept:
    """Acknowledged changes that no flush has covered, in order. Pure."""

    def __init__(self) -> None:
        self.bytes = 0
        self._changes: deque[Change] = deque()
        self._dropped = 0  # how many left at the front since the beginning

    def __len__(self) -> int:
        return len(self._changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self._changes)

    def add(self, change: Change) -> None:
        """Keep an acknowledged change."""
        self._changes.append(change)
        self.bytes += change.cost

    def mark(self) -> int:
        """Return a mark behind everything that is kept now, before a flush begins."""
        return self._dropped + len(self._changes)

    def drop(self, mark: int) -> list[Change]:
        """Forget what lies before the mark: it is durable. Return it, oldest first."""
        gone = []
        while self._dropped < mark and self._changes:
            change = self._changes.popleft()
            self.bytes -= change.cost
            self._dropped += 1
            gone.append(change)
        return gone


class Samples:
    """Digests of ranges whose durable content is known: one in each 64 KiB, at most. Pure."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int, int]] = {}  # unit -> offset, length, digest

    def learn(self, offset: int, data: Buffer) -> None:
        """Remember what is durable at a range, if it lies in one unit."""
        unit = offset // SAMPLE_BYTES_MAX
        if (offset + len(data) - 1) // SAMPLE_BYTES_MAX != unit:
            return
        self._known.pop(unit, None)
        if len(self._known) >= SAMPLES_MAX:
            del self._known[next(iter(self._known))]
        self._known[unit] = offset, len(data), xxh3_64_intdigest(data)

    def forget(self, offset: int, length: int) -> None:
        """Know nothing of a range any more: it is being changed."""
        first, last = offset // SAMPLE_BYTES_MAX, (offset + length - 1) // SAMPLE_BYTES_MAX
        if last - first < SAMPLES_MAX:
            for unit in range(first, last + 1):
                self._known.pop(unit, None)
        else:
            for unit in [unit for unit in self._known if first <= unit <= last]:
                del self._known[unit]

    def all(self) -> list[tuple[int, int, int]]:
        """Return (offset, length, digest) of each."""
        return list(self._known.values())


class ChangeLocks:
    """Holds overlapping changes apart, first come, first served."""

    def __init__(self) -> None:
        self._ranges = RangeLocks()
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}

    async def acquire(self, offset: int, length: int) -> Ticket:
        """Return once the range is ours."""
        ticket = self._ranges.acquire(offset, offset + length)
        if ticket.granted:
            return ticket
        waiting = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            self._waiting.pop(ticket, None)
            self._grant(self._ranges.cancel(ticket))
            raise
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Give the range back."""
        self._grant(self._ranges.release(ticket))

    def _grant(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._waiting.pop(ticket).set_result(None)


async def apply(file: RemoteFile, change: Change, *, through: bool) -> None:
    """Carry a change out."""
    if change.data is not None:
        await file.write(change.offset, change.data, through=through, copying=change.copying)
        return
    if change.punch and file.capabilities.punches_holes:
        await file.zero(change.offset, change.length)
    else:
        for at, count in split(change.offset, change.length, ZERO_PIECE_BYTES):
            await file.write(at, _ZEROES[:count] if count < ZERO_PIECE_BYTES else _ZEROES)
    if through:
        await file.flush()


async def repeat(file: RemoteFile, kept: Iterable[Change], flying: Sequence[Change]) -> None:
    """Carry out again what a file that was opened again may lack: the newest of each range.

    One that was never acknowledged may be refused: it alone fails, and what it had covered of
    others is carried out after all.
    """
    for change in flying:
        change.sent = True
    asked = -1  # a request that times out meanwhile is no longer among the flying, but kept
    while asked != (now := sum(change.again for change in {*kept, *flying})):
        asked = now
        parts = iter(latest((*kept, *flying)))  # disjoint, so in any order
        workers = (_repeat_some(file, parts) for _ in range(REPEATED_AT_ONCE))
        for end in await asyncio.gather(*workers, return_exceptions=True):
            if end is not None:
                raise end


async def _repeat_some(file: RemoteFile, parts: Iterator[Change]) -> None:
    for part in parts:
        try:
            await _repeat_one(file, part)
        except BaseException:
            for _ in parts:  # the others needn't go on
                pass
            raise


async def _repeat_one(file: RemoteFile, change: Change) -> None:
    try:
        await apply(file, change, through=False)
    except LostError:
        raise
    except OSError as error:
        if change.whole.acknowledged:
            raise
        change.whole.refused = error
        change.whole.again = False


def touched(changes: Iterable[Change], offset: int, length: int) -> bool:
    """Tell whether one of the changes touches the range."""
    end = offset + length
    return any(c.offset < end and offset < c.offset + c.length for c in changes)
