"""One connection: greeting, requests and replies, smbprotocol's messages, breaks, the end."""

from __future__ import annotations

import weakref

import pytest

from mirrord.errors import ProtocolError
from mirrord.smb import status, wire
from mirrord.smb.channel import ANSWERS_MAX, BREAKS_MAX, GREETING_BYTES_MAX, Channel
from mirrord.smb.seal import Encryption
from tests.smb.speaking import (
    FILE,
    HEADER,
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
    split,
    started,
    write,
    write_body,
)  # fmt: skip

every_kind = pytest.mark.parametrize("kind", KINDS, ids=name_of)
FLUSHED = b"\4\0\0\0"


def control(command: int = 17, *, message_id: int = 7, charge: int = 1, credits: int = 1) -> bytes:
    """Return a message of smbprotocol's, signed by it."""
    return HEADER.pack(
        b"\xfeSMB", 64, charge, 0, command, credits, wire.SIGNED, 0, message_id, 0, 5, SESSION,
        b"s" * 16,
    ) + b"what smbprotocol asks for"  # fmt: skip


# The greeting


def test_a_greeting_passes_unchanged_and_its_ids_are_used_up() -> None:
    channel = Channel()
    asked = [answer(wire.NEGOTIATE, 0, flags=0), control(wire.SESSION_SETUP, message_id=1)]
    heard = [
        answer(wire.NEGOTIATE, 0, credits=3),
        answer(wire.SESSION_SETUP, 1, status=status.PENDING, credits=0),
        answer(wire.SESSION_SETUP, 1, status=status.MORE_PROCESSING_REQUIRED, credits=8),
    ]
    for message in asked:
        channel.greet(message)
    channel.submit(read())
    channel.pump(0)
    channel.keep_alive(0)
    assert split(b"".join(channel.outgoing)) == asked
    channel.outgoing.clear()
    assert feed(channel, framed(*heard), step=7) == []
    assert channel.greeting == heard
    assert (channel.in_flight, channel.waiting, channel.sequence) == (0, 1, 0)

    channel.start(seal_of(None), SESSION, piece_bytes=1 << 20, multi_credit=True)
    for _ in range(20):
        channel.submit(read())
    channel.pump(0)
    assert [asked.message_id for asked in said(channel)] == list(range(2, 12))  # 1 + 3 + 8 - 2


def test_a_greeting_of_several_credits_uses_up_as_many_ids() -> None:
    channel = Channel()
    channel.greet(control(wire.SESSION_SETUP, message_id=4, charge=3))
    channel.greet(control(wire.SESSION_SETUP, message_id=2, charge=0))
    channel.outgoing.clear()
    channel.start(seal_of(None), SESSION, piece_bytes=1 << 20, multi_credit=True)
    channel.submit(read())
    with pytest.raises(ProtocolError, match="0 credits in all"):
        channel.pump(0)

    channel = Channel()
    channel.greet(control(wire.SESSION_SETUP, message_id=4, charge=3))
    channel.outgoing.clear()
    feed(channel, framed(answer(wire.SESSION_SETUP, 4, credits=9)))
    channel.start(seal_of(None), SESSION, piece_bytes=1 << 20, multi_credit=True)
    channel.submit(read())
    channel.pump(0)
    assert [asked.message_id for asked in said(channel)] == [7]


def test_before_authentication_a_server_is_short() -> None:
    channel = Channel()
    channel.greet(control(wire.NEGOTIATE))
    longest = answer(wire.NEGOTIATE, 0, bytes(GREETING_BYTES_MAX - 64))
    feed(channel, framed(longest))
    assert channel.greeting == [longest]
    with pytest.raises(ProtocolError, match="message of 65537 bytes"):
        feed(channel, framed(longest + b"x"))


def test_before_authentication_a_server_speaks_when_asked() -> None:
    channel = Channel()
    with pytest.raises(ProtocolError, match="without being asked"):
        feed(channel, framed(answer(wire.NEGOTIATE, 0)))
    channel = Channel()
    channel.greet(control(wire.NEGOTIATE))
    for _ in range(ANSWERS_MAX):
        feed(channel, framed(answer(wire.NEGOTIATE, 0)))
    with pytest.raises(ProtocolError, match="without being asked"):
        feed(channel, framed(answer(wire.NEGOTIATE, 0)))
    assert len(channel.greeting) == ANSWERS_MAX


def test_what_is_no_smb_is_no_greeting() -> None:
    channel = Channel()
    channel.greet(control(wire.NEGOTIATE))
    with pytest.raises(ProtocolError, match="not an SMB 2 message"):
        feed(channel, framed(b"\xffSMB" + bytes(100)))


# Requests and replies


@every_kind
def test_a_repetition_says_that_it_is_one(kind: Kind) -> None:
    channel, peer = started(kind), Peer(kind)
    first, again = read(4096), read(4096)
    again.replays = 1
    channel.submit(first)
    channel.submit(again)
    channel.pump(0)
    flags = [message.flags & wire.REPLAY for message in said(channel, peer)]
    assert flags == [0, wire.REPLAY]


@every_kind
def test_requests_are_numbered_and_sealed_and_replies_are_matched(kind: Kind) -> None:
    channel, peer = started(kind), Peer(kind)
    channel.sequence = 0xFFFE
    requests = [read(4096), write(b"data" * 20), write(memoryview(b"x" * 200_000))]
    for request in requests:
        channel.submit(request)
    assert (channel.in_flight, channel.waiting) == (0, 3)
    channel.pump(0)
    first, second, third = said(channel, peer)
    assert (channel.in_flight, channel.waiting) == (3, 0)
    assert (first.command, first.message_id, first.charge) == (wire.READ, 1, 1)
    assert (first.tree_id, first.session_id, first.sequence) == (5, SESSION, 0xFFFE)
    assert first.body == requests[0].body
    assert (second.command, second.message_id, second.charge) == (wire.WRITE, 2, 1)
    assert second.body == requests[1].body + b"data" * 20
    assert (third.message_id, third.charge) == (3, 4)
    assert third.body == requests[2].body + b"x" * 200_000

    replies = feed(channel, framed(
        peer.close(answer(wire.WRITE, 3, write_body(200_000))),
        peer.close(answer(wire.READ, 1, read_body(b"r" * 4096))),
        peer.close(answer(wire.WRITE, 2, status=status.DISK_FULL)),
    ))  # fmt: skip
    assert [reply.request for reply in replies] == [requests[2], requests[0], requests[1]]
    assert [reply.status for reply in replies] == [0, 0, status.DISK_FULL]
    assert wire.write_reply(replies[0].message) == 200_000
    assert wire.read_reply(replies[1].message, 4096) == b"r" * 4096
    assert channel.in_flight == 0


def test_without_multi_credit_requests_cost_one_and_say_none() -> None:
    channel = started(multi_credit=False)
    channel.submit(write(b"x" * 200_000))
    channel.submit(write(b"x"))
    channel.pump(0)
    assert [(one.message_id, one.charge) for one in said(channel)] == [(1, 0), (2, 0)]


@every_kind
def test_a_compound_answers_several_requests(kind: Kind) -> None:
    channel, peer = started(kind), Peer(kind)
    for request in (read(3), write(b"w"), read(5)):
        channel.submit(request)
    channel.pump(0)
    said(channel, peer)
    parts = compound(
        answer(wire.READ, 3, read_body(b"later")),
        answer(wire.WRITE, 2, write_body(1)),
        answer(wire.READ, 1, read_body(b"abc")),
    )
    if isinstance(kind, Encryption):
        message = peer.close(b"".join(parts))
    else:
        message = b"".join(map(peer.close, parts))
    replies = feed(channel, framed(message))
    assert [reply.request.payload_bytes for reply in replies] == [5, 1, 3]
    assert wire.read_reply(replies[0].message, 5) == b"later"
    assert wire.read_reply(replies[2].message, 3) == b"abc"


@pytest.mark.parametrize("following", [8, 63, 65, 71, 400, 1 << 31])
def test_a_compound_that_leads_nowhere_is_refused(following: int) -> None:
    channel = started()
    channel.submit(read(5))
    channel.pump(0)
    with pytest.raises(ProtocolError):
        feed(channel, framed(answer(wire.READ, 1, read_body(b"later" * 20), following=following)))


def test_a_part_of_a_compound_that_is_shorter_than_a_header_is_refused() -> None:
    channel = started()
    channel.submit(read(5))
    channel.pump(0)
    inner = answer(wire.READ, 1, read_body(b"later"))
    outer = answer(wire.READ, 1, b"", following=48)[:48]
    with pytest.raises(ProtocolError, match="48 bytes has no header"):
        feed(channel, framed(outer + inner))


@pytest.mark.parametrize(
    "reply",
    [
        answer(wire.READ, 2),  # of no request
        answer(wire.READ, 0),  # of the greeting's
        answer(wire.WRITE, 1),  # of another command
        answer(wire.READ, 1, flags=0),  # a request
        answer(wire.OPLOCK_BREAK, 1),
        lease_break()[:90],
        answer(wire.READ, 1)[:60],
        b"",
        b"\xfdSMB" + bytes(200),
        b"\xfcSMB" + bytes(200),
    ],
)
def test_an_answer_to_nothing_is_refused(reply: bytes) -> None:
    channel = started()
    channel.submit(read())
    channel.pump(0)
    with pytest.raises(ProtocolError):
        feed(channel, framed(reply))


def test_a_request_is_answered_once() -> None:
    channel = started()
    channel.submit(read(2))
    channel.pump(0)
    reply = framed(answer(wire.READ, 1, read_body(b"ab")))
    assert len(feed(channel, reply)) == 1
    with pytest.raises(ProtocolError, match="no request of ours: 1"):
        feed(channel, reply)


def test_what_takes_long_is_pending_until_it_is_answered() -> None:
    channel = started()
    request, other = read(2), read(2)
    channel.submit(request)
    channel.pump(3.0)
    channel.submit(other)
    channel.pump(4.0)
    assert channel.oldest_s(pending=False) == 3.0
    assert channel.oldest_s(pending=True) is None
    interim = answer(wire.READ, 1, status=status.PENDING, flags=wire.FROM_SERVER | wire.ASYNC)
    assert feed(channel, framed(interim, interim)) == []
    assert request.pending
    assert channel.in_flight == 2
    assert channel.oldest_s(pending=False) == 4.0
    assert channel.oldest_s(pending=True) == 3.0
    (reply,) = feed(channel, framed(answer(wire.READ, 1, read_body(b"ab"), credits=0)))
    assert reply.request is request

    again = started()
    again.submit(request)
    again.pump(9.0)
    assert not request.pending
    assert again.oldest_s(pending=False) == 9.0


def test_a_message_that_nobody_waits_for_is_dropped() -> None:
    channel = started()
    assert feed(channel, framed(answer(wire.READ, wire.UNSOLICITED))) == []
    assert channel.breaks == []


# smbprotocol's own messages


@every_kind
def test_control_messages_are_renumbered_and_given_back(kind: Kind) -> None:
    channel, peer = started(kind), Peer(kind)
    channel.sequence = 3
    channel.submit(read())
    channel.control(control(message_id=900, charge=2, credits=500))
    channel.control(control(message_id=901, charge=0, credits=0))
    channel.pump(0)
    first, second, third = said(channel, peer)
    assert (first.command, first.message_id, first.charge, first.sequence) == (17, 1, 2, 3)
    assert (first.credits, first.session_id, first.tree_id) == (500, SESSION, 5)
    assert first.body == b"what smbprotocol asks for"
    assert (second.message_id, second.charge) == (3, 0)
    assert second.credits >= 1
    assert (third.command, third.message_id) == (wire.READ, 4)

    pending = answer(17, 1, status=status.PENDING, credits=2)
    assert feed(channel, framed(peer.close(pending))) == []
    replies = feed(channel, framed(
        peer.close(answer(17, 3, b"done", credits=70)),
        peer.close(answer(17, 1, status=status.ACCESS_DENIED, credits=0)),
    ))  # fmt: skip
    for reply, message_id, credits in zip(replies, (901, 900), (1, 2), strict=True):
        assert reply.request.control is not None
        assert reply.message[:4] == b"\xfeSMB"
        given = wire.parse_header(reply.message)
        assert (given.message_id, given.credits, given.command) == (message_id, credits, 17)
        assert not given.flags & wire.SIGNED
        assert given.signature == bytes(16)
    assert replies[0].message[64:] == b"done"
    assert replies[1].status == wire.parse_header(replies[1].message).status
    assert replies[1].status == status.ACCESS_DENIED


def test_a_control_reply_out_of_a_compound_stands_alone() -> None:
    channel = started()
    channel.control(control(message_id=900))
    channel.submit(read(2))
    channel.pump(0)
    parts = compound(answer(17, 1, b"done"), answer(wire.READ, 2, read_body(b"ab")))
    first, second = feed(channel, framed(b"".join(parts)))
    assert wire.parse_header(first.message).next_command == 0
    assert wire.read_reply(second.message, 2) == b"ab"


def test_smbprotocols_own_echo_is_answered() -> None:
    channel = started()
    channel.control(control(wire.ECHO, message_id=900))
    channel.pump(0)
    (reply,) = feed(channel, framed(answer(wire.ECHO, 1, FLUSHED)))
    assert wire.parse_header(reply.message).message_id == 900


# Breaks


@every_kind
def test_a_break_is_told_and_acknowledged(kind: Kind) -> None:
    channel, peer = started(kind), Peer(kind)
    assert feed(channel, framed(lease_break(FILE, 3))) == []
    (broken,) = channel.breaks
    channel.acknowledge(broken, tree_id=9)
    channel.acknowledge(wire.Break(False, FILE, 1, True), tree_id=8)
    channel.pump(0)
    lease, oplock = said(channel, peer)
    assert (lease.command, lease.tree_id, oplock.tree_id) == (wire.OPLOCK_BREAK, 9, 8)
    assert lease.body == wire.lease_ack_body(FILE, 3)
    assert oplock.body == wire.oplock_ack_body(FILE, 1)
    answers = (answer(wire.OPLOCK_BREAK, 1), answer(wire.OPLOCK_BREAK, 2, status=0xC0000001))
    assert feed(channel, framed(*map(peer.close, answers))) == []
    assert channel.in_flight == 0


def test_a_flood_of_breaks_ends_the_connection() -> None:
    channel = started(credits=2)
    for count in range(3 * BREAKS_MAX):  # however many in all, as long as they are agreed on
        feed(channel, framed(lease_break()))
        channel.acknowledge(channel.breaks.pop(), 1)
        channel.pump(0)
        feed(channel, framed(answer(wire.OPLOCK_BREAK, count + 1)))
    said(channel)
    for _ in range(BREAKS_MAX - 1):
        feed(channel, framed(lease_break()))
        channel.acknowledge(channel.breaks.pop(), 1)
    channel.pump(0)
    feed(channel, framed(lease_break()))
    with pytest.raises(ProtocolError, match="leases taken back at once"):
        feed(channel, framed(lease_break()))


# Silence


def test_an_echo_asks_whether_the_server_is_there_and_any_answer_counts() -> None:
    channel = started()
    channel.keep_alive(1.0)
    channel.keep_alive(2.0)
    first, second = said(channel)
    assert (first.command, first.body) == (wire.ECHO, FLUSHED)
    assert (first.message_id, second.message_id) == (1, 2)
    assert channel.in_flight == 2
    expired = answer(wire.ECHO, 2, status=status.NETWORK_SESSION_EXPIRED)
    assert feed(channel, framed(answer(wire.ECHO, 1, FLUSHED), expired), now_s=3.0) == []
    assert channel.in_flight == 0
    assert channel.heard_s == 3.0


def test_an_echo_needs_a_credit() -> None:
    channel = started(credits=1)
    channel.submit(read())
    channel.pump(0)
    channel.keep_alive(0)
    assert [asked.command for asked in said(channel)] == [wire.READ]


def test_silence_begins_where_something_is_asked() -> None:
    channel = started()
    channel.submit(read(2))
    channel.pump(100.0)
    assert channel.heard_s == 100.0
    channel.submit(read(2))
    channel.pump(105.0)
    assert channel.heard_s == 100.0
    feed(channel, framed(answer(wire.READ, 1, read_body(b"ab")))[:10], now_s=107.0)
    assert channel.heard_s == 107.0


# The end


def test_all_that_is_unanswered_is_given_back_in_its_order() -> None:
    channel = started(credits=3)
    requests = [read(), write(b"x"), read(2), read(3), read(1 << 20)]
    for request in requests:
        channel.submit(request)
    channel.pump(0)
    feed(channel, framed(answer(wire.WRITE, 2, write_body(1), credits=0)))
    assert channel.lost() == [requests[0], *requests[2:]]
    assert (channel.in_flight, channel.waiting) == (0, 0)
    assert channel.lost() == []


def test_what_was_answered_in_front_of_garbage_is_not_forgotten() -> None:
    channel = started()
    requests = [read(2), read(2), read(2)]
    for request in requests:
        channel.submit(request)
    channel.pump(0)
    good = answer(wire.READ, 2, read_body(b"ab"))
    with pytest.raises(ProtocolError):
        feed(channel, framed(good, b"\xffSMB" + bytes(60)))
    assert channel.lost() == [requests[1], requests[0], requests[2]]


def test_a_read_that_was_coming_in_is_given_back_without_its_memory() -> None:
    class Memory(bytearray):
        """Can be referred to weakly."""

    def allocate(length: int) -> tuple[Memory, memoryview]:
        made = Memory(length)
        seen.append(weakref.ref(made))
        return made, memoryview(made)

    seen: list[weakref.ref[Memory]] = []
    channel = started(allocate=allocate)
    request = read(1 << 19)
    channel.submit(request)
    channel.pump(0)
    feed(channel, framed(answer(wire.READ, 1, read_body(bytes(1 << 19))))[:-1])
    (memory,) = seen
    assert memory() is not None
    assert channel.lost() == [request]
    assert memory() is None
