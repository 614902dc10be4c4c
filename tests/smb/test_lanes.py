"""What goes next on a connection, and how much of a copy is on its way at a time."""

from __future__ import annotations

from collections import deque

import pytest

from mirrord.core.geometry import MIB
from mirrord.smb import wire
from mirrord.smb.lanes import (
    BULK_BYTES_BESIDE_SMALL,
    BULK_BYTES_MAX,
    COPY_PIECE_BYTES,
    SMALL_BYTES_MAX,
    Lanes,
    Request,
)
from tests.smb.test_channel import control as control_message


def small() -> Request:
    """A guest's small read."""
    return Request(wire.READ, b"", payload_bytes=4096)


def bulk(length: int = MIB) -> Request:
    """A guest's large one."""
    return Request(wire.READ, b"", payload_bytes=length)


def copy(length: int = COPY_PIECE_BYTES) -> Request:
    """A piece of a copy."""
    return Request(wire.WRITE, b"", payload_bytes=length, copying_bytes=length)


def inside(length: int = COPY_PIECE_BYTES) -> Request:
    """A piece that the server copies by itself."""
    return Request(wire.IOCTL, b"", copying_bytes=length)


def control() -> Request:
    """One of smbprotocol's."""
    request = Request(wire.IOCTL, control_message())
    request.control = wire.parse_header(request.body)
    request.payload_bytes = MIB
    return request


def waiting(*requests: Request) -> Lanes:
    """Return lanes in which those wait."""
    lanes = Lanes()
    for request in requests:
        lanes.add(request)
    return lanes


def take_all(lanes: Lanes) -> list[Request]:
    """Take what may go now."""
    taken = []
    while (request := lanes.first()) is not None:
        lanes.take(request)
        taken.append(request)
    return taken


def test_control_then_small_ones_then_bulk_and_copies_in_turn() -> None:
    requests = [copy(), copy(), bulk(), bulk(), small(), control()]
    lanes = waiting(*requests)
    assert len(lanes) == 6
    one, other, first, second, guest, asked = requests
    order = take_all(waiting(*requests[:4]))
    assert order == [one, first, other, second]
    assert take_all(lanes)[:2] == [asked, guest]


def test_so_much_of_a_copy_is_in_flight_at_first() -> None:
    lanes = waiting(*(copy() for _ in range(9)))
    flying = take_all(lanes)
    assert len(flying) == 2
    lanes.answered(flying[0], 1.0)
    assert len(take_all(lanes)) == 1
    assert len(lanes) == 6


def test_what_the_server_copies_counts_by_what_it_copies() -> None:
    lanes = waiting(*(inside(2 * COPY_PIECE_BYTES) for _ in range(3)))
    (flying,) = take_all(lanes)
    assert lanes.first() is None
    lanes.answered(flying, 1.0)
    assert len(take_all(lanes)) == 1


def test_a_guests_bulk_does_not_wait_for_copies() -> None:
    lanes = waiting(*(copy() for _ in range(9)))
    take_all(lanes)
    for _ in range(9):
        lanes.add(bulk())
    assert len(take_all(lanes)) == 4  # 4 MiB in all, of which half is the copy's
    assert lanes.first() is None


def test_all_bulk_is_little_beside_small_requests() -> None:
    lanes = waiting(small(), bulk(BULK_BYTES_BESIDE_SMALL), copy())
    assert [each.payload_bytes for each in take_all(lanes)] == [4096, COPY_PIECE_BYTES, 512 << 10]
    lanes.add(bulk())
    assert lanes.beside_small
    assert lanes.first() is None


def run(lanes: Lanes, server: float, link_s: float, rounds: int = 400) -> float:
    """Copy through a server that does one piece after another; return the bytes a second.

    `server` is what it does in a second, `link_s` how long a piece is on its way besides.
    """
    now_s, busy_until_s, moved = 0.0, 0.0, 0
    answers = deque[tuple[float, Request]]()
    for _ in range(8):
        lanes.add(copy())
    for _ in range(rounds):
        for request in take_all(lanes):
            request.sent_s = now_s
            busy_until_s = max(busy_until_s, now_s + link_s / 2) + COPY_PIECE_BYTES / server
            answers.append((busy_until_s + link_s / 2, request))
            lanes.add(copy())
        now_s, request = answers.popleft()
        moved += request.copying_bytes
        lanes.answered(request, now_s)
    return moved / now_s


@pytest.mark.parametrize("server", [100e6, 1e9])
def test_little_is_queued_where_answers_are_quick(server: float) -> None:
    lanes = Lanes()
    assert run(lanes, server, 200e-6) > 0.8 * server
    assert lanes.window.bytes <= 3 * COPY_PIECE_BYTES


def test_much_is_on_its_way_where_that_is_long() -> None:
    lanes = Lanes()
    assert run(lanes, 1e9, 4e-3, 4000) > 0.6e9
    assert lanes.window.bytes > 8 * COPY_PIECE_BYTES
    assert lanes.window.bytes <= BULK_BYTES_MAX


def test_a_window_that_is_never_full_does_not_grow() -> None:
    lanes = Lanes()
    for at in range(100):
        lanes.add(copy())
        (request,) = take_all(lanes)
        request.sent_s = at
        lanes.answered(request, at + 0.001)
    assert lanes.window.bytes == 2 * COPY_PIECE_BYTES


def test_a_flush_holds_no_bulk_back() -> None:
    lanes = waiting(Request(wire.FLUSH, b""))
    take_all(lanes)
    assert not lanes.beside_small


def test_small_answers_change_nothing() -> None:
    lanes = waiting(small())
    (request,) = take_all(lanes)
    lanes.answered(request, 1.0)
    assert lanes.beside_small


@pytest.mark.parametrize("make", [small, bulk, copy, inside, control])
def test_what_waits_can_be_withdrawn(make: object) -> None:
    assert callable(make)
    request, other = make(), make()
    lanes = waiting(request, other)
    assert lanes.withdraw(request)
    assert not lanes.withdraw(request)
    assert take_all(lanes) == [other]


def test_what_is_too_large_is_taken_out() -> None:
    large = [bulk(), copy(), copy()]
    kept = [inside(), small(), copy(SMALL_BYTES_MAX)]
    lanes = waiting(*large, *kept)
    assert lanes.clear_large() == large
    assert set(lanes.clear()) == set(kept)
    assert len(lanes) == 0
