"""Range locks against the obvious quadratic definition."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mirrord.core.geometry import MIB, TIB
from mirrord.core.ranges import BUCKETS_MAX, RangeLocks, Ticket


def test_ranges_that_only_touch_do_not_conflict() -> None:
    locks = RangeLocks()
    assert locks.acquire(0, 10).granted
    assert locks.acquire(10, 20).granted
    assert len(locks) == 2


def test_overlapping_ranges_are_granted_in_order() -> None:
    locks = RangeLocks()
    first = locks.acquire(0, 10)
    second = locks.acquire(5, 15)
    third = locks.acquire(9, 10)
    assert (first.granted, second.granted, third.granted) == (True, False, False)
    assert locks.release(first) == [second]
    assert locks.release(second) == [third]
    assert locks.release(third) == []
    assert len(locks) == 0


def test_nobody_is_overtaken() -> None:
    locks = RangeLocks()
    held = locks.acquire(0, 10)
    wide = locks.acquire(0, 100)
    late = locks.acquire(50, 60)  # doesn't overlap the holder, but the one that waits
    assert not late.granted
    assert locks.release(held) == [wide]
    assert locks.release(wide) == [late]


def test_one_release_may_grant_several() -> None:
    locks = RangeLocks()
    held = locks.acquire(0, 100)
    waiting = [locks.acquire(start, start + 10) for start in (50, 0, 20)]
    assert locks.release(held) == waiting


def test_cancelling_lets_others_past() -> None:
    locks = RangeLocks()
    held = locks.acquire(0, 10)
    given_up = locks.acquire(0, 100)
    late = locks.acquire(50, 60)
    assert locks.cancel(given_up) == [late]
    assert locks.cancel(given_up) == []
    assert locks.release(held) == []
    assert locks.cancel(late) == []
    assert len(locks) == 0


def test_only_what_is_held_can_be_released() -> None:
    locks = RangeLocks()
    held = locks.acquire(0, 10)
    waiting = locks.acquire(0, 10)
    with pytest.raises(ValueError, match=r"\[0, 10\) waiting> is not held"):
        locks.release(waiting)
    assert repr(held) == "<Ticket [0, 10) granted>"
    locks.release(held)
    with pytest.raises(ValueError, match="over> is not held"):
        locks.release(held)


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="empty range"):
        RangeLocks().acquire(5, 5)


def test_the_whole_disk_can_be_locked() -> None:
    locks = RangeLocks()
    small = locks.acquire(5 * MIB, 6 * MIB)
    whole = locks.acquire(0, TIB)
    later = locks.acquire(TIB // 2, TIB // 2 + 1)
    again = locks.acquire(0, TIB)
    assert (whole.granted, later.granted) == (False, False)
    assert locks.release(small) == [whole]
    assert locks.release(whole) == [later]
    assert locks.release(later) == [again]
    assert locks.release(again) == []


def overlap(one: Ticket, other: Ticket) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


starts = st.one_of(st.integers(0, 40), st.integers(0, 4).map(lambda n: n * MIB - 2 if n else 0))
lengths = st.one_of(
    st.integers(1, 12), st.sampled_from([MIB, MIB + 3, 3 * MIB, (BUCKETS_MAX + 1) * MIB])
)


class LocksMachine(RuleBasedStateMachine):
    """A ticket is granted exactly when no older live one overlaps it."""

    def __init__(self) -> None:
        super().__init__()
        self.locks = RangeLocks()
        self.live: list[Ticket] = []

    @rule(start=starts, length=lengths)
    def acquire(self, start: int, length: int) -> None:
        self.live.append(self.locks.acquire(start, start + length))

    @precondition(lambda self: any(ticket.granted for ticket in self.live))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = [ticket for ticket in self.live if ticket.granted]
        self.leave(data.draw(st.sampled_from(held)), cancel=False)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(self.live)), cancel=True)

    def leave(self, ticket: Ticket, *, cancel: bool) -> None:
        waited = [other for other in self.live if not other.granted and other is not ticket]
        granted = self.locks.cancel(ticket) if cancel else self.locks.release(ticket)
        self.live.remove(ticket)
        assert granted == [other for other in waited if other.granted]  # each told, oldest first
        assert not ticket.granted

    @invariant()
    def agrees(self) -> None:
        assert len(self.locks) == len(self.live)
        for index, ticket in enumerate(self.live):
            blocked = any(overlap(ticket, older) for older in self.live[:index])
            assert ticket.granted == (not blocked)

    def teardown(self) -> None:
        """Nobody starves: releasing the holders, whoever they are, comes to everybody."""
        while self.live:
            held = [ticket for ticket in self.live if ticket.granted]
            assert held, "all wait for one another"
            self.leave(held[-1], cancel=False)
        assert not self.locks._buckets
        assert not self.locks._wide


TestRangeLocks = LocksMachine.TestCase
TestRangeLocks.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
