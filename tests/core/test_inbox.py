"""The inbox: bytes come out in order, however they came in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mirrord.core.inbox import INBOX_BYTES, SPARE_BYTES, Inbox
from tests.nbd.speaking import cut, put


def test_it_starts_anew_when_all_was_read() -> None:
    inbox = Inbox()
    put(inbox, b"abc")
    inbox.start = inbox.end
    assert len(inbox.buffer()) == INBOX_BYTES
    assert (inbox.start, inbox.end) == (0, 0)


def test_what_is_unread_moves_to_the_front_when_room_gets_scarce() -> None:
    inbox = Inbox(SPARE_BYTES + 100)
    put(inbox, bytes(100) + b"abc")
    inbox.start = 100
    assert len(inbox.buffer()) == SPARE_BYTES + 97
    assert bytes(inbox.data[inbox.start : inbox.end]) == b"abc"


def test_unread_bytes_at_the_front_stay_where_they_are() -> None:
    inbox = Inbox(SPARE_BYTES + 2)
    put(inbox, b"abc")
    assert len(inbox.buffer()) == SPARE_BYTES - 1
    assert inbox.start == 0


def test_a_payload_that_has_come_is_copied_at_once() -> None:
    inbox = Inbox()
    put(inbox, b"abcdef")
    target = bytearray(4)
    assert inbox.fill(memoryview(target))
    assert (bytes(target), inbox.start, inbox.waiting) == (b"abcd", 4, False)


def test_the_rest_of_a_payload_is_received_in_place() -> None:
    inbox = Inbox()
    put(inbox, b"abc")
    target = bytearray(5)
    assert not inbox.fill(memoryview(target))
    assert inbox.waiting
    assert len(inbox.buffer()) == 2
    put(inbox, b"d")
    assert inbox.waiting
    assert put(inbox, b"ef") == 1
    assert not inbox.waiting
    assert bytes(target) == b"abcde"


def test_a_payload_let_go_is_not_kept_in_memory() -> None:
    inbox = Inbox()
    put(inbox, b"abc")
    target = bytearray(5)
    with memoryview(target) as view:
        inbox.fill(view[:])
    inbox.let_go()
    assert not inbox.waiting
    target.append(0)  # raises while somebody has a view of it


def test_discarded_bytes_are_gone_and_the_next_ones_are_not() -> None:
    inbox = Inbox()
    put(inbox, b"ab")
    assert not inbox.discard(5)
    put(inbox, b"c")
    assert inbox.waiting
    put(inbox, b"deXY")
    assert not inbox.waiting
    assert bytes(inbox.data[inbox.start : inbox.end]) == b"XY"
    assert inbox.discard(1)


@given(st.binary(max_size=400), st.lists(st.integers(1, 90), max_size=30), st.data())
def test_every_byte_comes_out_once_and_in_order(
    data: bytes, sizes: list[int], choose: st.DataObject
) -> None:
    """Any mix of filling, in any cut, sees the stream as it was sent."""
    inbox, filled, waited_for = Inbox(), b"", bytearray()
    for piece in cut(data, sizes):
        rest = piece
        while rest:
            rest = rest[put(inbox, rest) :]
            while not inbox.waiting and (waited_for or inbox.start < inbox.end):
                filled, waited_for = filled + waited_for, bytearray()
                target = bytearray(choose.draw(st.integers(1, 60)))
                if inbox.fill(memoryview(target)):
                    filled += target
                else:
                    waited_for = target
    assert data.startswith(filled)
    assert len(data) - len(filled) <= 60
