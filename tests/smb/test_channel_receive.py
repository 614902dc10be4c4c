"""Receiving: bytes cut anyhow, long reads into memory of their own, servers that lie."""

from __future__ import annotations

import tracemalloc
from struct import Struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrord.core.inbox import INBOX_BYTES
from mirrord.errors import ProtocolError
from mirrord.smb import status, wire
from mirrord.smb.channel import OVERHEAD_BYTES_MAX, Channel, Reply
from mirrord.smb.seal import Encryption, Signing
from tests.smb.speaking import (
    KINDS,
    SESSION,
    Kind,
    Peer,
    answer,
    compound,
    feed,
    framed,
    lease_break,
    name_of,
    read,
    read_body,
    said,
    seal_of,
    started,
    write,
    write_body,
)  # fmt: skip
from tests.smb.test_channel import FLUSHED, control

MIB = 1 << 20
LONG = 300 * 1024  # more than an inbox takes as a whole
PIECE = MIB
PATTERN = b"".join(Struct("<I").pack(n) for n in range(LONG // 4 + 1))
SPLITTING = pytest.mark.parametrize("kind", [None, *Signing], ids=name_of)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=name_of)


class Memory:
    """Counts what is allocated."""

    def __init__(self) -> None:
        self.made: list[bytearray] = []

    def __call__(self, length: int) -> tuple[bytearray, memoryview]:
        self.made.append(bytearray(length))
        return self.made[-1], memoryview(self.made[-1])


def pattern(length: int) -> bytes:
    """Return bytes that are another sequence at each place."""
    return PATTERN[:length]


def asking(
    kind: Kind = None, lengths: tuple[int, ...] = (LONG,), **options: object
) -> tuple[Channel, Peer]:
    """Return a channel with reads in flight, their ids from 1 on, and its server."""
    channel = started(kind, credits=2000, piece_bytes=PIECE, **options)  # type: ignore[arg-type]
    for length in lengths:
        channel.submit(read(length))
        channel.pump(0)
    said(channel, Peer(kind))
    return channel, Peer(kind)


def what_was_read(replies: list[Reply]) -> list[bytes]:
    """Return what replies brought, either way."""
    found: list[bytes] = []
    for reply in replies:
        data = reply.payload
        if data is None:
            data = wire.read_reply(reply.message, reply.request.payload_bytes)
        found.append(bytes(data))
    return found


# However the bytes come


def conversation(kind: Kind) -> tuple[Channel, bytes, list[bytes]]:
    """Return a channel, what its server says, and what was read."""
    lengths = (LONG, LONG, 200 * 1024, 100, 4096, 9)
    channel, peer = asking(kind, lengths)
    ids = (1, 6, 11, 15, 16, 17)
    answered = [4, 0, 5, 2, 1, 3]
    datas = [pattern(lengths[n]) for n in answered]
    datas[4] = pattern(LONG - 7)
    replies = [
        peer.close(answer(wire.READ, ids[n], read_body(data)))
        for n, data in zip(answered, datas, strict=True)
    ]
    replies.insert(2, peer.close(lease_break()))
    replies.insert(4, peer.close(answer(wire.READ, ids[1], status=status.PENDING)))
    return channel, framed(*replies), datas


@every_kind
@pytest.mark.parametrize("step", [1 << 30, 64 * 1024, 1447, 83])
def test_bytes_cut_evenly_are_the_same(kind: Kind, step: int) -> None:
    channel, data, datas = conversation(kind)
    assert what_was_read(feed(channel, data, step=step)) == datas
    assert len(channel.breaks) == 1


@pytest.mark.parametrize("kind", [None, Signing.AES_GMAC, Encryption.AES_128_GCM], ids=name_of)
def test_byte_by_byte_is_the_same(kind: Kind) -> None:
    channel, peer = asking(kind, (200 * 1024, 5))
    datas = [pattern(200 * 1024), b"later"]
    data = framed(
        peer.close(answer(wire.READ, 1, read_body(datas[0]))),
        peer.close(answer(wire.READ, 5, read_body(datas[1]))),
    )
    found = []
    for at in range(len(data)):
        channel.inbox.buffer()[0] = data[at]
        found += channel.received(1, 0)
    assert what_was_read(found) == datas


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(1, 200_000), max_size=40))
def test_bytes_cut_anyhow_are_the_same(kind: Kind, sizes: list[int]) -> None:
    channel, data, datas = conversation(kind)
    found = []
    for size in sizes:
        found += feed(channel, data[:size])
        data = data[size:]
    assert what_was_read(found + feed(channel, data)) == datas


# Long reads


@SPLITTING
def test_a_long_read_goes_straight_into_memory_of_its_own(kind: Kind) -> None:
    memory = Memory()
    channel, peer = asking(kind, allocate=memory)
    data = framed(peer.close(answer(wire.READ, 1, read_body(pattern(LONG)))))
    feed(channel, data[:1000])
    assert [len(one) for one in memory.made] == [LONG]
    buffer = channel.inbox.buffer()
    assert len(buffer) == LONG - (1000 - 84)
    (reply,) = feed(channel, data[1000:])
    assert reply.payload is memory.made[0]
    assert reply.payload == pattern(LONG)
    assert (reply.status, len(memory.made)) == (0, 1)


@SPLITTING
def test_a_long_read_goes_where_its_request_has_room(kind: Kind) -> None:
    memory = Memory()
    channel, peer = asking(kind, allocate=memory)
    whole = bytearray(LONG + 10)
    (request,) = channel._pending.values()
    request.room = (whole, memoryview(whole)[10:])
    (reply,) = feed(channel, framed(peer.close(answer(wire.READ, 1, read_body(pattern(LONG))))))
    assert reply.payload is request.room[1]
    assert bytes(whole[10:]) == pattern(LONG)
    assert memory.made == []


@SPLITTING
@pytest.mark.parametrize("at", [100, LONG])
def test_a_long_read_that_was_changed_is_refused(kind: Kind, at: int) -> None:
    channel, peer = asking(kind)
    data = bytearray(framed(peer.close(answer(wire.READ, 1, read_body(pattern(LONG))))))
    data[at] ^= 1
    if kind is None:
        assert len(feed(channel, bytes(data))) == 1
        return
    with pytest.raises(ProtocolError, match="wrong signature"):
        feed(channel, bytes(data))
    assert len(channel.lost()) == 1


@pytest.mark.parametrize(
    "body",
    [
        Struct("<HBBIII").pack(17, 96, 0, LONG, 0, 0) + bytes(16) + pattern(LONG),
        Struct("<HBBIII").pack(17, 80, 0, LONG, 0, 0) + pattern(LONG) + bytes(8),
        Struct("<HBBIII").pack(17, 80, 0, LONG - 8, 0, 0) + pattern(LONG),
    ],
)
def test_a_long_read_of_another_form_is_taken_as_a_whole(body: bytes) -> None:
    memory = Memory()
    channel, _ = asking(allocate=memory)
    (reply,) = feed(channel, framed(answer(wire.READ, 1, body)))
    assert reply.payload is None
    assert [len(one) for one in memory.made] == [64 + len(body)]
    assert pattern(LONG).startswith(wire.read_reply(reply.message, LONG))


@pytest.mark.parametrize(
    "body",
    [
        Struct("<HBBIII").pack(16, 80, 0, LONG, 0, 0) + pattern(LONG),
        Struct("<HBBIII").pack(273, 80, 0, LONG, 0, 0) + pattern(LONG),
        Struct("<HBBIII").pack(17, 79, 0, LONG, 0, 0) + pattern(LONG),
        Struct("<HBBIII").pack(17, 80, 0, LONG + 1, 0, 0) + pattern(LONG),
        read_body(pattern(LONG + 1)),
    ],
)
def test_a_long_read_that_lies_is_no_payload(body: bytes) -> None:
    channel, _ = asking()
    (reply,) = feed(channel, framed(answer(wire.READ, 1, body)))
    assert reply.payload is None
    with pytest.raises(ProtocolError):
        wire.read_reply(reply.message, LONG)


def test_long_answers_to_other_things_are_taken_as_a_whole() -> None:
    channel = started(piece_bytes=PIECE)
    channel.submit(write(b"x"))
    channel.control(control(wire.READ, message_id=900, charge=5))
    channel.submit(read(LONG))
    channel.submit(read(LONG))
    channel.pump(0)
    late = answer(wire.READ, 7, read_body(pattern(LONG)), status=status.BUFFER_OVERFLOW)
    parts = compound(answer(wire.READ, 12, read_body(pattern(LONG))), answer(wire.ECHO, 1 << 60))
    ours = answer(wire.READ, 1, read_body(pattern(LONG)))
    longest = answer(wire.WRITE, 6, write_body(1) + bytes(LONG))
    first, second, third = feed(channel, framed(longest, ours, late))
    assert [one.payload for one in (first, second, third)] == [None] * 3
    assert second.message == answer(wire.READ, 900, read_body(pattern(LONG)), credits=5)
    assert third.status == status.BUFFER_OVERFLOW
    with pytest.raises(ProtocolError, match="no request"):
        feed(channel, framed(b"".join(parts)))


def test_a_long_read_that_says_it_is_a_compound_is_one() -> None:
    channel, _ = asking()
    with pytest.raises(ProtocolError, match="not an SMB 2 message"):
        feed(channel, framed(answer(wire.READ, 1, read_body(pattern(LONG)), following=88)))


@SPLITTING
def test_a_long_read_by_no_server_is_refused(kind: Kind) -> None:
    channel, peer = asking(kind)
    with pytest.raises(ProtocolError):
        feed(channel, framed(peer.close(answer(wire.READ, 1, read_body(pattern(LONG)), flags=0))))


@pytest.mark.parametrize("kind", list(Encryption), ids=name_of)
def test_a_long_plain_read_on_an_encrypted_session_is_refused(kind: Kind) -> None:
    channel, _ = asking(kind)
    with pytest.raises(ProtocolError, match="plain answer"):
        feed(channel, framed(answer(wire.READ, 1, read_body(pattern(LONG)))))


# Servers that lie


def test_a_message_is_no_longer_than_a_reply_may_be() -> None:
    memory = Memory()
    channel, _ = asking(allocate=memory)
    limit = PIECE + OVERHEAD_BYTES_MAX
    feed(channel, limit.to_bytes(4, "big") + answer(wire.READ, 2) + bytes(100))
    assert [len(one) for one in memory.made] == [limit]
    for length in (limit + 1, 0xFFFFFF, 0x1000000, 0xFFFFFFFF, 63, 0):
        channel, _ = asking(allocate=memory)
        with pytest.raises(ProtocolError, match=f"message of {length} bytes"):
            feed(channel, length.to_bytes(4, "big"))
    assert len(memory.made) == 1


def test_a_server_that_negotiates_gigabytes_gets_one_message_of_memory() -> None:
    channel = Channel()
    channel.start(seal_of(None), SESSION, piece_bytes=0xFFFFFFFF, multi_credit=True)
    with pytest.raises(ProtocolError, match="message of 16777216 bytes"):
        feed(channel, b"\1\0\0\0")


def test_a_long_message_gets_no_memory_before_its_head_has_come() -> None:
    memory = Memory()
    channel, _ = asking(allocate=memory)
    data = framed(answer(wire.READ, 1, read_body(pattern(LONG))))
    feed(channel, data[:83])
    assert memory.made == []
    feed(channel, data[83:84])
    assert len(memory.made) == 1


ANSWERS = [
    answer(wire.READ, 1, read_body(b"x" * 40)),
    answer(wire.WRITE, 2, write_body(20)),
    answer(wire.READ, 3, status=status.PENDING, flags=wire.FROM_SERVER | wire.ASYNC),
    answer(wire.READ, 3, read_body(pattern(LONG)), credits=0xFFFF),
    answer(17, 8, b"done" * 9),  # the long read cost five
    answer(wire.ECHO, 9, FLUSHED),
    lease_break(),
]
HEADS_BYTES = len(framed(*ANSWERS)) - LONG  # all but the long read's data
BEFORE = len(framed(*ANSWERS[:4])) - LONG
VALUES = [0, 1, 8, 63, 64, 65, 0x7F, 0x80, 0xFF, 0xFFFF, 0x103, 0x10000, 0xFFFFFF, 0xFFFFFFFF]
values = st.one_of(st.sampled_from(VALUES), st.integers(0, 0xFFFFFFFF)).map(
    lambda value: value.to_bytes(4, "little")
)
mutations = st.one_of(
    st.tuples(st.integers(0, HEADS_BYTES), st.binary(min_size=1, max_size=30)),
    st.tuples(st.integers(0, HEADS_BYTES // 4).map(lambda n: 4 * n), values),
)


def talked_to(kind: Kind) -> Channel:
    """Return a channel that waits for all of `ANSWERS`."""
    channel = started(kind, credits=2000, piece_bytes=PIECE)
    channel.submit(read(40))
    channel.pump(0)
    channel.submit(write(b"y" * 20))
    channel.pump(0)
    channel.submit(read(LONG))
    channel.pump(0)
    channel.control(control())
    channel.pump(0)
    channel.keep_alive(0)
    return channel


def survives(channel: Channel, data: bytes) -> None:
    """Receive what a hostile server says: it is refused or it isn't, and costs little."""
    asked = channel.in_flight
    replies: list[Reply] = []
    tracemalloc.start()
    try:
        replies = feed(channel, data)
        for reply in replies:
            assert len(reply.message) + len(reply.payload or b"") <= PIECE + OVERHEAD_BYTES_MAX
        channel.pump(0)
    except ProtocolError:
        assert len(channel.lost()) + len(replies) <= asked
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 3 * (PIECE + OVERHEAD_BYTES_MAX) + 2 * len(data) + INBOX_BYTES


def test_the_answers_that_are_changed_below_are_valid() -> None:
    channel = talked_to(None)
    replies = feed(channel, framed(*ANSWERS))
    assert [one.request.command for one in replies] == [wire.READ, wire.WRITE, wire.READ, 17]
    assert channel.in_flight == 0
    assert len(channel.breaks) == 1


@settings(max_examples=400, deadline=None)
@given(st.lists(mutations, min_size=1, max_size=3))
def test_answers_changed_anyhow_are_refused_or_not_and_nothing_else(
    changes: list[tuple[int, bytes]],
) -> None:
    data = bytearray(framed(*ANSWERS))
    for at, value in changes:
        at = at if at < BEFORE else at + LONG
        data[at : at + len(value)] = value
    survives(talked_to(None), bytes(data))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, len(ANSWERS) - 1), max_size=9),
    st.binary(max_size=200),
)
def test_answers_in_any_order_and_number_are_refused_or_not(
    kind: Kind, order: list[int], garbage: bytes
) -> None:
    peer = Peer(kind)
    channel = talked_to(kind)
    said(channel, peer)
    survives(channel, framed(*(peer.close(ANSWERS[n]) for n in order)) + garbage)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.binary(max_size=150), max_size=5), st.binary())
def test_garbage_is_refused(kind: Kind, messages: list[bytes], garbage: bytes) -> None:
    survives(talked_to(kind), framed(*messages) + garbage)
    for magic in (wire.SMB2_MAGIC, wire.TRANSFORM_MAGIC):
        survives(talked_to(kind), framed(*(magic + one for one in messages)) + garbage)
    greeting = Channel()
    greeting.greet(control())
    survives(greeting, framed(*messages) + garbage)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_compounds_cut_anyhow_are_refused_or_not(data: st.DataObject) -> None:
    parts = compound(*(one for one in ANSWERS if len(one) < 1000))
    message = bytearray(b"".join(parts))
    starts = [sum(map(len, parts[:n])) for n in range(len(parts))]
    at = data.draw(st.sampled_from(starts)) + data.draw(st.sampled_from([4, 8, 12, 16, 20, 24, 64]))
    value = data.draw(values)
    message[at : at + 4] = value
    survives(talked_to(None), framed(bytes(message)))


def test_a_message_full_of_breaks_is_little_work() -> None:
    channel = talked_to(None)
    many = [lease_break()] * (PIECE // 112)
    with pytest.raises(ProtocolError, match="at once"):
        feed(channel, framed(b"".join(compound(*many))))
    channel = talked_to(None)
    others = [answer(wire.READ, wire.UNSOLICITED, b"")] * (PIECE // 64)
    assert feed(channel, framed(b"".join(compound(*others)))) == []
