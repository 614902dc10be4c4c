"""The transmission phase at the server: what is taken, what is refused, what is answered."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrord.core.geometry import Extent, Status
from mirrord.errors import ProtocolError
from mirrord.nbd import wire
from mirrord.nbd.session import BATCH_BYTES, SMALL_BYTES, STATUS_COST_BYTES, Session, cost
from tests.nbd.speaking import (
    EXPORT,
    LIMITS,
    NO_LIMIT,
    SIZE,
    Server,
    cut,
    in_transmission,
    put,
    simple,
)

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << n for n in range(5))
READ_ONLY = replace(EXPORT, read_only=True)


def ask(command: int, offset: int = 0, length: int = 0, flag: int = 0, cookie: int = 7) -> bytes:
    """Return a request, and zeroes as the payload of a write."""
    payload = bytes(length) if command == WRITE else b""
    return wire.pack_request(command, cookie, offset, length, flag) + payload


def error_of(server: Server, *, structured: bool) -> int:
    """Return the error of the one reply that was sent."""
    if not structured:
        magic, error, cookie = wire.SIMPLE_REPLY.unpack(server.sent)
        assert (magic, cookie) == (wire.SIMPLE_REPLY_MAGIC, 7)
        return int(error)
    magic, flag, kind, cookie, length = wire.CHUNK.unpack_from(server.sent)
    assert (magic, flag, kind, cookie) == (wire.CHUNK_MAGIC, 1, wire.CHUNK_ERROR, 7)
    assert len(server.sent) == wire.CHUNK.size + length
    error, text_length = wire.ERROR.unpack_from(server.sent, wire.CHUNK.size)
    assert length == wire.ERROR.size + text_length <= 300
    return int(error)


# Valid requests


def test_n3_requests_of_one_receive_are_taken_together_and_cookies_come_back() -> None:
    server = in_transmission(structured=False)
    server.receive(ask(READ, 0, 4, cookie=2**64 - 1) + ask(FLUSH, cookie=0) + ask(READ, 8, 4))
    assert [r.cookie for r in server.taken] == [2**64 - 1, 0, 7]
    assert server.sent == simple(2**64 - 1) + bytes(4) + simple(0) + simple(7) + bytes(4)


def test_n3_duplicate_cookies_are_both_answered() -> None:
    server = in_transmission(structured=False)
    server.receive(ask(FLUSH) * 2)
    assert server.sent == simple(7) * 2


def test_n5_a_structured_read_is_one_final_data_chunk() -> None:
    server = in_transmission()
    server.receive(ask(READ, 512, 16, DF))
    assert server.sent == (
        wire.DATA_CHUNK.pack(wire.CHUNK_MAGIC, 1, wire.CHUNK_OFFSET_DATA, 7, 24, 512) + bytes(16)
    )


@pytest.mark.parametrize("command", [READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS])
def test_n2_fua_is_accepted_on_every_command(command: int) -> None:
    server = in_transmission()
    server.receive(ask(command, 0, 0 if command == FLUSH else 512, FUA))
    assert [(r.command, r.flags) for r in server.taken] == [(command, FUA)]


def test_n8_write_zeroes_takes_its_flags_and_more_than_a_payload() -> None:
    big = replace(EXPORT, size=1 << 40)
    server = in_transmission(export=big)
    server.receive(ask(ZEROES, 0, 2**32 - 1, NO_HOLE | FAST_ZERO | FUA))
    assert server.taken[0].length == 2**32 - 1


def test_the_last_byte_can_be_written_and_read() -> None:
    server = in_transmission(structured=False)
    server.receive(wire.pack_request(WRITE, 7, SIZE - 1, 1) + b"x" + ask(READ, SIZE - 1, 1))
    assert server.sent == simple(7) + simple(7) + b"x"


@pytest.mark.parametrize("length", [1, SMALL_BYTES, SMALL_BYTES + 1, 400_000])
def test_a_payload_belongs_to_its_request(length: int) -> None:
    server = in_transmission()
    for fill in (b"a", b"b"):
        server.receive(wire.pack_request(WRITE, 7, 0, length) + fill * length)
    assert [bytes(r.data) for r in server.taken] == [b"a" * length, b"b" * length]


def test_n13_a_payload_of_32_mib_is_taken() -> None:
    limit = LIMITS.payload_bytes_max
    server = in_transmission(export=replace(EXPORT, size=limit), disk=bytearray(limit))
    server.receive(wire.pack_request(WRITE, 7, 0, limit) + b"x" * limit + ask(READ, 0, limit))
    assert server.disk == b"x" * limit
    assert len(server.sent) == len(simple(7)) + wire.DATA_CHUNK.size + limit


# Refusals


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ask(WRITE, SIZE, 1), wire.ENOSPC),
        (ask(WRITE, SIZE - 1, 2), wire.ENOSPC),
        (ask(ZEROES, SIZE - 1, 2), wire.ENOSPC),
        (ask(READ, SIZE, 1), wire.EINVAL),
        (ask(TRIM, SIZE - 1, 2), wire.EINVAL),
        (ask(CACHE, SIZE - 1, 2), wire.EINVAL),
        (ask(READ, 2**64 - 1, 2), wire.EINVAL),  # wraps around in 64 bits
        (ask(WRITE, 2**64 - 512, 512), wire.ENOSPC),
        (ask(ZEROES, 2**64 - 1, 2**32 - 1), wire.ENOSPC),
        (ask(STATUS, 0, 0), wire.EINVAL),
        (ask(STATUS, SIZE, 1), wire.EINVAL),
        (ask(STATUS, 1, 2**32 - 1), wire.EINVAL),  # CVE-2025-47711
        (ask(8, 0, 512), wire.EINVAL),
        (ask(0xFFFF, 0, 512), wire.EINVAL),
        (ask(READ, 0, 512, NO_HOLE), wire.EINVAL),
        (ask(WRITE, 0, 512, DF), wire.EINVAL),
        (ask(WRITE, 0, 90_000, 1 << 15), wire.EINVAL),
        (ask(TRIM, 0, 512, NO_HOLE), wire.EINVAL),
        (ask(CACHE, 0, 512, REQ_ONE), wire.EINVAL),
        (ask(ZEROES, 0, 512, REQ_ONE), wire.EINVAL),
        (ask(STATUS, 0, 512, DF), wire.EINVAL),
        (ask(FLUSH, 0, 512), wire.EINVAL),
        (ask(FLUSH, 512, 0), wire.EINVAL),
    ],
)
def test_n12_a_bad_request_is_refused_and_both_stay_in_step(
    request_: bytes, error: int, structured: bool
) -> None:
    server = in_transmission(structured=structured)
    server.receive(request_)
    assert server.taken == []
    assert error_of(server, structured=structured) == error
    server.receive(ask(FLUSH))
    assert server.sent.endswith(simple(7))
    assert server.error is None


@pytest.mark.parametrize("command", [WRITE, TRIM, ZEROES])
def test_n12_writing_a_read_only_export_is_not_permitted(command: int) -> None:
    server = in_transmission(export=READ_ONLY, structured=False)
    server.receive(ask(command, 0, 512))
    assert error_of(server, structured=False) == wire.EPERM


def test_n5_df_needs_structured_replies() -> None:
    server = in_transmission(structured=False)
    server.receive(ask(READ, 0, 512, DF))
    assert error_of(server, structured=False) == wire.EINVAL


@pytest.mark.parametrize(("flag", "error"), [(0, wire.EINVAL), (DF, wire.EOVERFLOW)])
def test_n13_a_read_above_the_payload_limit_is_refused(flag: int, error: int) -> None:
    server = in_transmission(export=replace(EXPORT, size=1 << 40))
    server.receive(ask(READ, 0, LIMITS.payload_bytes_max + 1, flag))
    assert error_of(server, structured=True) == error


def test_n13_a_write_above_the_payload_limit_closes() -> None:
    server = in_transmission(export=replace(EXPORT, size=1 << 40))
    server.receive(ask(FLUSH) + wire.pack_request(WRITE, 7, 0, LIMITS.payload_bytes_max + 1))
    assert server.error
    assert server.sent == simple(7)
    assert [r.command for r in server.taken] == [FLUSH]


def test_a_wrong_magic_closes_and_nothing_behind_it_happens() -> None:
    server = in_transmission(structured=False)
    server.receive(ask(FLUSH) + b"x" * 28 + ask(FLUSH))
    assert server.error
    assert server.sent == simple(7)
    assert len(server.taken) == 1


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, ZEROES])
def test_an_empty_request_succeeds_and_does_nothing(command: int) -> None:
    server = in_transmission(structured=False)
    server.receive(ask(command, 512, 0))
    assert server.taken == []
    assert server.sent == simple(7)


def test_n5_an_empty_structured_read_has_no_data_chunk() -> None:
    server = in_transmission()
    server.receive(ask(READ, 512, 0))
    assert server.sent == wire.CHUNK.pack(wire.CHUNK_MAGIC, 1, wire.CHUNK_NONE, 7, 0)


def test_n7_block_status_needs_a_context() -> None:
    server = in_transmission(structured=False)
    server.receive(ask(STATUS, 0, 512))
    assert error_of(server, structured=False) == wire.EINVAL


def test_n14_nothing_behind_a_goodbye_is_looked_at() -> None:
    server = in_transmission(structured=False)
    server.receive(ask(FLUSH) + ask(DISC) + b"anything at all, however long it may be")
    assert server.sent == simple(7)
    assert server.session is not None
    assert server.session.ended
    assert not server.session.mid_request
    assert server.session.take(NO_LIMIT) == []


def test_n15_everything_is_refused_while_stopping() -> None:
    server = in_transmission(structured=False)
    session = server.session
    assert session is not None
    server.receive(wire.pack_request(WRITE, 1, 0, 90_000) + b"x" * 50_000)
    session.stopping = True
    server.receive(b"x" * 40_000 + ask(READ, 0, 512, cookie=2) + ask(WRITE, 0, 512, cookie=3))
    assert server.taken == []
    assert server.sent == b"".join(simple(n, wire.ESHUTDOWN) for n in (1, 2, 3))
    assert (session.in_flight, session.held_bytes) == (0, 0)
    server.receive(ask(DISC))
    assert session.ended


# Limits


def session_of(server: Server) -> Session:
    """Return the session of a server in transmission."""
    assert server.session is not None
    return server.session


def receive_only(server: Server, data: bytes) -> Session:
    """Put bytes into the inbox without taking anything."""
    assert put(server.inbox, data) == len(data)
    return session_of(server)


def test_at_most_64_requests_are_in_flight() -> None:
    session = receive_only(in_transmission(), ask(READ, 0, 512) * 70 + ask(FLUSH) * 2)
    assert len(session.take(NO_LIMIT)) == 64
    assert session.blocked
    assert session.take(NO_LIMIT) == []
    session.done(1, 512)
    assert len(session.take(NO_LIMIT)) == 1
    session.done(64, 64 * 512)
    assert len(session.take(NO_LIMIT)) == 7
    assert (session.in_flight, session.held_bytes, session.requests) == (7, 5 * 512, 72)
    assert not session.blocked


def test_odd_requests_count_too() -> None:
    session = receive_only(in_transmission(), ask(FLUSH) * 70)
    assert len(session.take(NO_LIMIT)) == 64
    assert session.blocked


def test_what_a_session_holds_is_bounded() -> None:
    big = replace(EXPORT, size=1 << 40)
    session = receive_only(in_transmission(export=big), ask(READ, 0, 32 << 20) * 3)
    assert len(session.take(NO_LIMIT)) == 1  # a batch's replies are sent before the next
    assert len(session.take(NO_LIMIT)) == 1
    assert session.blocked
    assert session.take(NO_LIMIT) == []
    assert session.held_bytes == LIMITS.held_bytes_max


def test_replies_are_sent_before_a_batch_gets_too_large() -> None:
    session = receive_only(in_transmission(), ask(READ, 0, 1 << 20) * 20)
    assert len(session.take(NO_LIMIT)) == BATCH_BYTES >> 20
    assert session.blocked


def test_the_owner_bounds_what_a_session_may_hold() -> None:
    session = receive_only(in_transmission(), ask(READ, 0, 512) * 2 + ask(STATUS, 0, 512))
    assert len(session.take(1023)) == 1
    assert session.blocked
    assert len(session.take(1023)) == 1
    assert session.blocked  # block status holds its extents
    assert len(session.take(STATUS_COST_BYTES)) == 1
    assert session.held_bytes == 1024 + STATUS_COST_BYTES


def test_a_large_payload_is_not_received_before_there_is_room() -> None:
    header = wire.pack_request(WRITE, 7, 0, 100_000)
    session = receive_only(in_transmission(), header + bytes(10))
    assert session.take(99_999) == []
    assert session.blocked
    assert not session.mid_request
    assert session.take(100_000) == []
    assert session.mid_request
    assert (session.in_flight, session.held_bytes) == (0, 100_000)
    session.abandon()
    session.abandon()
    assert session.held_bytes == 0


def test_bounded_memory_for_a_header_that_promises_much() -> None:
    """No more than the payload's own memory is reserved, and that once."""
    server = in_transmission(export=replace(EXPORT, size=1 << 40))
    tracemalloc.start()
    server.receive(wire.pack_request(WRITE, 7, 0, 32 << 20) + bytes(100))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < (32 << 20) + (1 << 20)


# Block status (N7)


def status_chunks(server: Server) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Return the chunks that were sent: flags, context, descriptors."""
    chunks, at = [], 0
    while at < len(server.sent):
        magic, flag, kind, cookie, length = wire.CHUNK.unpack_from(server.sent, at)
        assert (magic, kind, cookie) == (wire.CHUNK_MAGIC, wire.CHUNK_BLOCK_STATUS, 7)
        payload = server.sent[at + wire.CHUNK.size :][:length]
        descriptors = list(wire.DESCRIPTOR.iter_unpack(payload[4:]))
        chunks.append((flag, int.from_bytes(payload[:4], "big"), descriptors))
        at += wire.CHUNK.size + length
    return chunks


def status_of(
    extents: list[Extent], *, flag: int = 0, length: int = 1000, server: Server | None = None
) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Ask for the status of `length` bytes and answer with `extents` and a dirty block."""
    server = server or in_transmission()
    session = receive_only(server, ask(STATUS, 0, length, flag))
    (request,) = session.take(NO_LIMIT)
    dirty = [Extent(0, 10, Status.DIRTY), Extent(10, length, Status.CLEAN)]
    session.answer_status(request, {wire.CONTEXT_ALLOCATION: extents, wire.CONTEXT_DIRTY: dirty})
    server.sent = b"".join(session.outgoing)
    return status_chunks(server)


def test_n7_one_chunk_a_context_and_the_last_is_final() -> None:
    extents = [
        Extent(0, 100, Status.DATA),
        Extent(100, 50, Status.DATA),
        Extent(150, 50, Status.ZERO),
        Extent(200, 5000, Status.HOLE),
    ]
    assert status_of(extents) == [
        (0, 1, [(150, 0), (50, 2), (800, 3)]),
        (1, 2, [(10, 1), (990, 0)]),
    ]


def test_n7_req_one_gets_one_extent_within_the_request() -> None:
    extents = [Extent(0, 100, Status.DATA), Extent(100, 900, Status.ZERO)]
    assert status_of(extents, flag=REQ_ONE) == [(0, 1, [(100, 0)]), (1, 2, [(10, 1)])]
    assert status_of([Extent(0, 5000, Status.ZERO)], flag=REQ_ONE)[0] == (0, 1, [(1000, 2)])


def test_n7_no_extents_mean_data() -> None:
    assert status_of([])[0] == (0, 1, [(1000, 0)])


def test_n7_extents_past_the_request_are_left_out() -> None:
    extents = [Extent(0, 1000, Status.DATA), Extent(1000, 10, Status.ZERO)]
    assert status_of(extents)[0] == (0, 1, [(1000, 0)])


def test_n7_at_most_4096_extents() -> None:
    statuses = (Status.DATA, Status.ZERO)
    extents = [Extent(n * 10, 10, statuses[n % 2]) for n in range(5000)]
    assert len(status_of(extents, length=50_000)[0][2]) == 4096


def test_cve_2025_47711_status_of_the_largest_length() -> None:
    server = in_transmission(export=replace(EXPORT, size=1 << 40))
    extents = [Extent(0, 1 << 40, Status.HOLE)]
    chunks = status_of(extents, length=2**32 - 1, server=server)
    assert chunks[0] == (0, 1, [(2**32 - 1, 3)])


def test_n10_cache_is_advice_and_may_cost_no_more_than_a_read() -> None:
    server = in_transmission(export=replace(EXPORT, size=1 << 40))
    server.receive(ask(CACHE, 512, 2**32 - 1))
    assert [(r.offset, r.length, cost(r)) for r in server.taken] == [(512, 32 << 20, 32 << 20)]


# Any cut of the bytes

TALK = (
    ask(READ, 0, 512, cookie=1)
    + wire.pack_request(WRITE, 2, 100, 50) + b"w" * 50
    + ask(WRITE, SIZE, 3000, cookie=3)
    + ask(WRITE, 0, 3, cookie=4, flag=1 << 9)
    + wire.pack_request(WRITE, 5, 200, SMALL_BYTES + 5) + b"W" * (SMALL_BYTES + 5)
    + ask(99, 1, 2, cookie=6)
    + ask(STATUS, 0, 4096, cookie=7)
    + ask(READ, 0, 0, cookie=8)
    + ask(WRITE, 0, 0, cookie=9)
    + ask(READ, 100, 60, cookie=10)
    + ask(DISC)
)  # fmt: skip


def replies(sent: bytes) -> list[bytes]:
    """Return the replies that were sent, sorted: their order means nothing (N3)."""
    found, at = [], 0
    while at < len(sent):
        stop = at + wire.SIMPLE_REPLY.size
        if int.from_bytes(sent[at : at + 4], "big") == wire.CHUNK_MAGIC:
            *_, length = wire.CHUNK.unpack_from(sent, at)
            stop = at + wire.CHUNK.size + length
        found.append(sent[at:stop])
        at = stop
    return sorted(found)


def test_a_session_may_be_cut_after_every_byte() -> None:
    """In one piece, in two at every place: the same requests, the same replies."""
    whole = in_transmission()
    whole.receive(TALK)
    assert [r.cookie for r in whole.taken] == [1, 2, 5, 7, 10]
    for at in [*range(700), *range(700, len(TALK), 97), len(TALK) - 30, len(TALK) - 1]:
        server = in_transmission()
        server.receive(TALK[:at])
        assert set(replies(server.sent)) <= set(replies(whole.sent))
        assert server.taken == whole.taken[: len(server.taken)]
        server.receive(TALK[at:])
        assert replies(server.sent) == replies(whole.sent)
        assert server.taken == whole.taken


@settings(max_examples=60)
@given(st.lists(st.one_of(st.integers(1, 60), st.integers(1, 9000)), max_size=80))
def test_a_session_cut_anyhow_has_the_same_outcome(sizes: list[int]) -> None:
    whole, pieces = in_transmission(), in_transmission()
    whole.receive(TALK)
    for piece in cut(TALK, sizes):
        pieces.receive(piece)
    assert replies(pieces.sent) == replies(whole.sent)
    assert pieces.taken == whole.taken
    assert pieces.disk == whole.disk


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([wire.REQUEST_MAGIC, wire.REQUEST_MAGIC, 1]),
            st.integers(0, 0x1F),
            st.integers(0, 9),
            st.integers(0, 2**64 - 1),
            st.one_of(st.integers(0, SIZE + 9), st.integers(0, 2**64 - 1)),
            st.one_of(st.integers(0, 9000), st.integers(0, 2**32 - 1)),
        ),
        max_size=20,
    ),
    st.binary(max_size=200),
)
def test_cve_2019_14851_odd_requests_in_any_order_are_answered_or_close(
    requests: list[tuple[int, ...]], garbage: bytes
) -> None:
    server = in_transmission()
    for magic, flag, command, cookie, offset, length in requests:
        data = wire.REQUEST.pack(magic, flag, command, cookie, offset, length)
        server.receive(data + (bytes(min(length, 9000)) if command == WRITE else b""))
    server.receive(garbage)
    for request in server.taken:
        assert request.length or request.command == FLUSH
        assert request.offset + request.length <= SIZE
    assert session_of(server).in_flight == 0


def test_the_requests_before_a_violation_come_first() -> None:
    session = receive_only(in_transmission(), ask(READ, 0, 512) + bytes(28))
    assert len(session.take(NO_LIMIT)) == 1
    assert session.blocked
    with pytest.raises(ProtocolError):
        session.take(NO_LIMIT)


def test_a_slow_small_payload_is_mid_request() -> None:
    session = receive_only(in_transmission(), ask(WRITE, 0, 512)[:100])
    assert session.take(NO_LIMIT) == []
    assert session.mid_request
    assert session.held_bytes == 0
