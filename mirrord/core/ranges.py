"""Locks on ranges of a disk, first come, first served. Pure: who waits is the engine's business.

Copier and mirrored writes exclude each other per range, and overlapping writes in flight reach
both sides in one order (rules R4 and R18). A lock that waits holds back every later one that
overlaps it, so nobody is ever overtaken and nobody starves.

Invariants: of two overlapping tickets at most one is granted; the granted one is the older; a
ticket is granted exactly when no older live ticket overlaps it. As waiting only goes from younger
to older tickets, there is no deadlock, however tickets overlap, as long as a holder doesn't
acquire a second one.

Cost: tickets are found by the 1 MiB buckets that they touch, so a small range looks only at its
neighbours and not at everything in flight.
"""

from __future__ import annotations

from collections.abc import Iterable

BUCKET_SHIFT = 20  # 1 MiB: a guest's request touches one or two, a copied chunk at most five
BUCKETS_MAX = 64  # a wider ticket (a trim of the whole disk) is kept aside and checked by all


class Ticket:
    """A place in the queue for [start, stop). Yours when `granted`; give it back in any case."""

    __slots__ = ("_ahead", "_behind", "_live", "granted", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.granted = False
        self._ahead = 0  # older live tickets that overlap
        self._behind: list[Ticket] = []  # younger ones that overlap, oldest first
        self._live = True

    def __repr__(self) -> str:
        state = "granted" if self.granted else "waiting" if self._live else "over"
        return f"<Ticket [{self.start}, {self.stop}) {state}>"


class RangeLocks:
    """The queue of all tickets of one disk."""

    def __init__(self) -> None:
        self._buckets: dict[int, list[Ticket]] = {}
        self._wide: list[Ticket] = []
        self._live: dict[Ticket, None] = {}  # in order of age

    def __len__(self) -> int:
        """Return how many tickets are granted or waiting."""
        return len(self._live)

    def acquire(self, start: int, stop: int) -> Ticket:
        """Queue for [start, stop), which has at least one byte. Look at `granted` for the answer;
        if it is False, `release` or `cancel` of another ticket will return this one."""
        if start >= stop:
            raise ValueError(f"[{start}, {stop}) is an empty range")
        ticket = Ticket(start, stop)
        first = start >> BUCKET_SHIFT
        last = (stop - 1) >> BUCKET_SHIFT
        for other in self._near(first, last):
            if other.start < stop and start < other.stop:
                other._behind.append(ticket)
                ticket._ahead += 1
        if last - first >= BUCKETS_MAX:
            self._wide.append(ticket)
        else:
            for bucket in range(first, last + 1):
                self._buckets.setdefault(bucket, []).append(ticket)
        self._live[ticket] = None
        ticket.granted = ticket._ahead == 0
        return ticket

    def release(self, ticket: Ticket) -> list[Ticket]:
        """Give a granted ticket back; return those that are granted by it, oldest first."""
        if not ticket.granted:
            raise ValueError(f"{ticket!r} is not held")
        return self._leave(ticket)

    def cancel(self, ticket: Ticket) -> list[Ticket]:
        """Stop waiting. As `release` if it was granted meanwhile; nothing if it is over."""
        return self._leave(ticket) if ticket._live else []

    def _near(self, first: int, last: int) -> Iterable[Ticket]:
        """Return every live ticket that could overlap these buckets, each once."""
        if last - first >= BUCKETS_MAX:
            return self._live
        if first == last and not self._wide:
            return self._buckets.get(first, ())
        near = dict.fromkeys(self._wide)
        for bucket in range(first, last + 1):
            near.update(dict.fromkeys(self._buckets.get(bucket, ())))
        return near

    def _leave(self, ticket: Ticket) -> list[Ticket]:
        del self._live[ticket]
        ticket._live = ticket.granted = False
        first = ticket.start >> BUCKET_SHIFT
        last = (ticket.stop - 1) >> BUCKET_SHIFT
        if last - first >= BUCKETS_MAX:
            self._wide.remove(ticket)
        else:
            for bucket in range(first, last + 1):
                tickets = self._buckets[bucket]
                tickets.remove(ticket)
                if not tickets:
                    del self._buckets[bucket]
        granted = []
        for other in ticket._behind:
            if other._live:
                other._ahead -= 1
                if other._ahead == 0:
                    other.granted = True
                    granted.append(other)
        ticket._behind.clear()
        return granted
