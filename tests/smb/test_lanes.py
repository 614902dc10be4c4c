"""What goes next on a connection, and how much of a copy is on its way at a time."""

from __future__ import annotations

import heapq
import random

import pytest

from mirrord.core.geometry import MIB
from mirrord.core.pacing import CLIMB_FIRST_PIECES
from mirrord.smb import wire
from mirrord.smb.lanes import (
    BULK_BYTES_BESIDE_SMALL,
    BULK_BYTES_MAX,
    COPY_PIECE_BYTES,
    OVERTAKEN_BYTES_MAX,
    SMALL_BYTES_MAX,
    SMALL_REMEMBERED,
    Lanes,
    Request,
)
from tests.smb.test_channel import control as control_message


def small() -> Request:
    """A guest's small read."""
    return Request(wire.READ, b"", payload_bytes=4096)


def bulk(length: int = MIB, file: bytes = b"source") -> Request:
    """A guest's large one."""
    return Request(wire.READ, b"", payload_bytes=length, file=file)


def copy(length: int = COPY_PIECE_BYTES, file: bytes = b"target") -> Request:
    """A piece of a copy."""
    return Request(wire.WRITE, b"", payload_bytes=length, copying_bytes=length, file=file)


def inside(length: int = COPY_PIECE_BYTES) -> Request:
    """A piece that the server copies by itself."""
    return Request(wire.IOCTL, b"", copying_bytes=length, file=b"target")


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


def test_control_then_small_ones_then_a_guests_large_ones_and_copies_in_turn() -> None:
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


@pytest.mark.parametrize("beside", [(), (small(),)], ids=["alone", "beside small ones"])
def test_a_target_that_hangs_holds_up_no_other_file(beside: tuple[Request, ...]) -> None:
    """Neither a guest's large requests nor copies, from the source say, wait for its answers."""
    lanes = waiting(*beside)
    for _ in range(20):
        lanes.add(copy())
        lanes.add(bulk(file=b"target"))  # a guest's, mirrored
    hanging = take_all(lanes)
    for request in (bulk(), copy(file=b"source")):
        lanes.add(request)
        assert lanes.first() is request
        lanes.take(request)
        lanes.answered(request, 1.0)
    for request in hanging[len(beside) :]:
        lanes.answered(request, 60.0)
    assert {request.file for request in take_all(lanes)} == {b"target"}


def test_large_ones_are_little_beside_small_requests() -> None:
    lanes = waiting(small(), *(bulk(BULK_BYTES_BESIDE_SMALL) for _ in range(2)), copy(), copy())
    taken = [each.payload_bytes for each in take_all(lanes)]
    assert taken == [4096, BULK_BYTES_BESIDE_SMALL, COPY_PIECE_BYTES]
    assert lanes.beside_small
    assert len(lanes) == 2


@pytest.mark.parametrize("length", [4096, 16 << 10, SMALL_BYTES_MAX])
def test_copies_are_not_overtaken_for_ever(length: int) -> None:
    """However large small ones are: a server that takes no more has all of a guest's so."""
    lanes = waiting(*(Request(wire.READ, b"", payload_bytes=length) for _ in range(300)))
    lanes.add(copy(SMALL_BYTES_MAX))
    order = take_all(lanes)
    before = next(at for at, request in enumerate(order) if request.copying_bytes)
    assert before == OVERTAKEN_BYTES_MAX // length


def run(
    lanes: Lanes, server: float, link_s: float, rounds: int = 400, spread_s: float = 0.0
) -> float:
    """Copy through a link to a server; return the bytes a second.

    `server` is what passes the link in a second, one piece after another; a piece is on its way
    for `link_s` besides, and at the server, beside others, for `spread_s` on the average.
    """
    now_s, busy_until_s, moved = 0.0, 0.0, 0
    answers: list[tuple[float, int, Request]] = []
    chance = random.Random(1)
    for _ in range(32):
        lanes.add(copy())
    for number in range(rounds):
        for request in take_all(lanes):
            request.sent_s = now_s
            busy_until_s = max(busy_until_s, now_s + link_s / 2) + COPY_PIECE_BYTES / server
            at_s = busy_until_s + link_s / 2
            at_s += chance.expovariate(1 / spread_s) if spread_s else 0.0
            heapq.heappush(answers, (at_s, number * 100 + len(answers), request))
            lanes.add(copy())
        now_s, _, request = heapq.heappop(answers)
        moved += request.copying_bytes
        lanes.answered(request, now_s)
    return moved / now_s


@pytest.mark.parametrize("server", [100e6, 1e9])
def test_little_is_queued_where_answers_are_quick(server: float) -> None:
    lanes = Lanes()
    assert run(lanes, server, 200e-6) > 0.8 * server
    assert lanes.window.bytes <= 4 * COPY_PIECE_BYTES


@pytest.mark.parametrize(("link_s", "least"), [(4e-3, 0.6e9), (0.6, 4e6)])
def test_much_is_on_its_way_where_that_is_long(link_s: float, least: float) -> None:
    lanes = Lanes()
    assert run(lanes, 1e9, link_s, 4000) > least
    assert lanes.window.bytes > 8 * COPY_PIECE_BYTES
    assert lanes.window.bytes <= BULK_BYTES_MAX


@pytest.mark.parametrize(("spread_s", "least"), [(2e-3, 0.7e9), (8e-3, 0.3e9)])
def test_answers_that_differ_are_not_taken_for_a_queue(spread_s: float, least: float) -> None:
    """A server's disks answer as they like: with 4 MiB in flight 1 GB/s and 0.45."""
    assert run(Lanes(), 1e9, 200e-6, 4000, spread_s=spread_s) > least


@pytest.mark.parametrize("every", [1, SMALL_REMEMBERED + CLIMB_FIRST_PIECES - 1])
def test_what_is_held_back_for_small_ones_tells_nothing(every: int) -> None:
    """A round in which one came is begun anew: here, one piece before its end."""
    lanes, now_s, bounds = Lanes(), 0.0, set[int]()
    for at in range(100 * every):
        lanes.add(copy())
        if at % every == 0:
            lanes.add(small())
            lanes.take(lanes.first() or pytest.fail("nothing may go"))
        lanes.take(request := lanes.first() or pytest.fail("nothing may go"))
        request.sent_s = now_s
        now_s += 0.001
        lanes.answered(request, now_s)
        bounds.add(lanes.window.bytes)
    assert bounds == {2 * COPY_PIECE_BYTES}


def relay(lanes: Lanes, link_s: float, chunks: int, at_once: int) -> float:
    """Copy chunks of four pieces from one file to another of the server; return the bytes a second.

    Each is read before it is written, so that now and then nothing waits in one of the lanes.
    """
    now_s = busy_until_s = 0.0
    answers: list[tuple[float, int, Request]] = []
    left = dict.fromkeys(range(chunks), 8)  # pieces, the first four to be read
    waiting_for = iter(range(chunks))

    def begin(chunk: int, file: bytes) -> None:
        for _ in range(4):
            request = copy(file=file)
            request.owner = chunk
            lanes.add(request)

    for _ in range(at_once):
        begin(next(waiting_for), b"source")
    while left:
        for request in take_all(lanes):
            request.sent_s = now_s
            busy_until_s = max(busy_until_s, now_s + link_s / 2) + COPY_PIECE_BYTES / 2e9
            heapq.heappush(answers, (busy_until_s + link_s / 2, id(request), request))
        now_s, _, request = heapq.heappop(answers)
        lanes.answered(request, now_s)
        chunk = request.owner
        left[chunk] -= 1
        if left[chunk] == 4:
            begin(chunk, b"target")
        elif not left[chunk]:
            del left[chunk]
            if (following := next(waiting_for, None)) is not None:
                begin(following, b"source")
    return chunks * 4 * COPY_PIECE_BYTES / now_s


def test_a_lane_that_is_empty_at_times_keeps_no_copy_small() -> None:
    """With room for 4 MiB in each lane it is 0.59e9."""
    assert relay(Lanes(), 3e-3, 2000, 4) > 0.52e9


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


def test_what_is_too_large_is_taken_out() -> None:
    large = [bulk(), copy(), copy()]
    kept = [inside(), small(), copy(SMALL_BYTES_MAX)]
    lanes = waiting(*large, *kept)
    assert lanes.clear_large() == large
    assert set(lanes.clear()) == set(kept)
    assert len(lanes) == 0
