"""The client's end: against our own server byte by byte, and against servers that lie."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrord.errors import ProtocolError
from mirrord.nbd import wire
from mirrord.nbd.client import CHUNKS_MAX, ClientSession, Reply
from tests.nbd.speaking import SIZE, Server, cut, simple

DONE = wire.CHUNK_FLAG_DONE
CONTEXTS = (wire.CONTEXT_ALLOCATION, wire.CONTEXT_DIRTY)


def feed(client: ClientSession, data: bytes) -> list[Reply]:
    """Receive all of `data`."""
    found = []
    while data:
        buffer = client.buffer()
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        data = data[count:]
        found += client.received(count)
    return found


def outgoing(client: ClientSession) -> bytes:
    """Return what the client wants to send, and empty it."""
    data = b"".join(client.outgoing)
    client.outgoing.clear()
    return data


def talk(client: ClientSession, server: Server) -> list[Reply]:
    """Carry bytes both ways until both are silent."""
    found = []
    while True:
        sent, server.sent = server.sent, b""
        found += feed(client, sent)
        data = outgoing(client)
        if not data and not sent:
            return found
        server.receive(data)


def connected(*, structured: bool = True) -> tuple[ClientSession, Server]:
    """Return a client in transmission, and its server."""
    client, server = ClientSession("disk", structured=structured, contexts=CONTEXTS), Server()
    assert talk(client, server) == []
    assert client.info is not None
    return client, server


def chunk(kind: int, payload: bytes = b"", *, cookie: int = 1, flag: int = DONE) -> bytes:
    """Return a chunk as a server sends it."""
    return wire.CHUNK.pack(wire.CHUNK_MAGIC, flag, kind, cookie, len(payload)) + payload


def data_chunk(offset: int, data: bytes, *, flag: int = DONE) -> bytes:
    """Return a chunk of a read's data."""
    return chunk(wire.CHUNK_OFFSET_DATA, offset.to_bytes(8, "big") + data, flag=flag)


def error_chunk(error: int, text: bytes = b"", *, flag: int = DONE, more: bytes = b"") -> bytes:
    """Return an error chunk."""
    payload = wire.ERROR.pack(error, len(text)) + text + more
    return chunk(wire.CHUNK_ERROR, payload, flag=flag)


# With our own server


@pytest.mark.parametrize("structured", [True, False])
def test_it_agrees_with_our_server_and_reads_what_it_wrote(structured: bool) -> None:
    client, server = connected(structured=structured)
    assert client.info is not None
    assert (client.info.size, client.info.block_bytes) == (SIZE, (1, 4096, 32 << 20))
    assert client.structured is structured
    assert list(client.contexts.values()) == (list(CONTEXTS) if structured else [])
    written = client.write(100, b"x" * 300_000, flags=wire.CMD_FLAG_FUA)
    read = client.read(90, 300_020)
    flushed = client.command(wire.CMD_FLUSH)
    empty = client.read(0, 0)
    assert client.in_flight == 4
    replies = {reply.cookie: reply for reply in talk(client, server)}
    assert replies[read].data == bytes(10) + b"x" * 300_000 + bytes(10)
    assert not any(replies[cookie].error for cookie in (written, flushed, empty))
    assert client.in_flight == 0


@pytest.mark.parametrize("structured", [True, False])
def test_an_error_comes_back_with_its_text(structured: bool) -> None:
    client, server = connected(structured=structured)
    client.read(SIZE, 1)
    (reply,) = talk(client, server)
    assert (reply.error, reply.data) == (wire.EINVAL, None)
    assert bool(reply.text) is structured


def test_block_status_has_every_context() -> None:
    client, server = connected()
    client.command(wire.CMD_BLOCK_STATUS, 512, 4096)
    (reply,) = talk(client, server)
    assert reply.extents == {name: [(4096, 0)] for name in CONTEXTS}


def test_an_unknown_export_is_refused() -> None:
    client, server = ClientSession("nothing"), Server()
    talk(client, server)
    assert client.refused
    assert client.info is None


def test_goodbye_ends_the_session() -> None:
    client, server = connected()
    client.disconnect()
    talk(client, server)
    assert server.over


def asking_much() -> tuple[ClientSession, Server]:
    """Return a client with four questions, and the server that answers them."""
    client, server = connected()
    client.read(0, 5000)
    client.write(7, b"abc")
    client.command(wire.CMD_BLOCK_STATUS, 0, 4096)
    client.read(SIZE, 1)
    server.receive(outgoing(client))
    return client, server


@settings(max_examples=50)
@given(st.lists(st.integers(1, 60), max_size=60))
def test_answers_cut_anyhow_are_the_same(sizes: list[int]) -> None:
    client, server = asking_much()
    other, _ = asking_much()
    whole = feed(client, server.sent)
    pieces = [reply for piece in cut(server.sent, sizes) for reply in feed(other, piece)]
    assert pieces == whole
    assert len(whole) == 4


@given(st.lists(st.integers(1, 30), max_size=60))
def test_a_handshake_cut_anyhow_is_the_same(sizes: list[int]) -> None:
    said = GREETING + GRANTED + wire.pack_option_reply(CONTEXT, wire.REP_ACK) + EXPORT + ACK
    client = ClientSession("disk")
    for piece in cut(said, [1, *sizes]):
        assert client.info is None
        feed(client, piece)
    assert client.info is not None


# Servers without structured replies, without contexts, with other manners

GREETING = wire.GREETING.pack(wire.GREETING_MAGIC, wire.OPTION_MAGIC, 3)
GO, STRUCTURED, CONTEXT = wire.OPT_GO, wire.OPT_STRUCTURED_REPLY, wire.OPT_SET_META_CONTEXT
EXPORT = wire.pack_option_reply(GO, wire.REP_INFO, wire.EXPORT_INFO.pack(0, SIZE, 1))
ACK = wire.pack_option_reply(GO, wire.REP_ACK)
UNSUP = wire.pack_option_reply(STRUCTURED, wire.REP_ERR_UNSUP, b"no")
GRANTED = wire.pack_option_reply(STRUCTURED, wire.REP_ACK)


def test_a_server_without_structured_replies_is_used_without() -> None:
    client = ClientSession("disk")
    feed(client, GREETING + UNSUP + EXPORT + ACK)
    assert client.info is not None
    assert not client.structured
    assert wire.pack_option(CONTEXT) not in outgoing(client)


def test_a_server_without_contexts_is_used_without() -> None:
    client = ClientSession("disk")
    name = b"\0\0\0\1" + CONTEXTS[0].encode()
    given_then_refused = wire.pack_option_reply(
        CONTEXT, wire.REP_META_CONTEXT, name
    ) + wire.pack_option_reply(CONTEXT, wire.REP_ERR_INVALID)
    feed(client, GREETING + GRANTED + given_then_refused + EXPORT + ACK)
    assert client.info is not None
    assert client.contexts == {}


def test_no_contexts_are_asked_for_when_none_are_wanted() -> None:
    client = ClientSession("disk", contexts=())
    unknown = wire.pack_option_reply(GO, wire.REP_INFO, b"\0\x09more")
    feed(client, GREETING + GRANTED + unknown + EXPORT + ACK)
    assert client.info is not None


def test_a_refusal_without_text_has_its_number() -> None:
    client = ClientSession("disk", structured=False)
    feed(client, GREETING + wire.pack_option_reply(GO, wire.REP_ERR_UNKNOWN) + b"more")
    assert client.refused == "error 6"


@pytest.mark.parametrize(
    "said",
    [
        b"x" * 18,
        wire.GREETING.pack(wire.GREETING_MAGIC, 0x00420281861253, 3),  # oldstyle
        wire.GREETING.pack(wire.GREETING_MAGIC, wire.OPTION_MAGIC, 0),
        GREETING + b"x" * 20,
        GREETING + ACK,  # to an option that was not sent: CVE-2021-20286
        GREETING + wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, STRUCTURED, 1, 2**32 - 1),
        GREETING + wire.pack_option_reply(STRUCTURED, wire.REP_SERVER),
        GREETING + GRANTED + wire.pack_option_reply(CONTEXT, wire.REP_META_CONTEXT, b"\0\0\0"),
        GREETING + GRANTED + wire.pack_option_reply(CONTEXT, wire.REP_META_CONTEXT, b"\0\0\0\1x"),
        GREETING
        + GRANTED
        + wire.pack_option_reply(CONTEXT, wire.REP_META_CONTEXT, b"\0\0\0\1base:allocation") * 2,
        GREETING + UNSUP + ACK,  # without the size
        GREETING + UNSUP + wire.pack_option_reply(GO, wire.REP_SERVER),
        GREETING + UNSUP + wire.pack_option_reply(GO, wire.REP_INFO, b"\0"),
        GREETING + UNSUP + wire.pack_option_reply(GO, wire.REP_INFO, b"\0\0short"),
        GREETING
        + UNSUP
        + wire.pack_option_reply(GO, wire.REP_INFO, wire.EXPORT_INFO.pack(0, 2**63, 1)),
        GREETING
        + UNSUP
        + wire.pack_option_reply(GO, wire.REP_INFO, wire.BLOCK_SIZE_INFO.pack(3, 3, 4096, 4096)),
        GREETING + UNSUP + wire.pack_option_reply(GO, wire.REP_INFO, b"\0\7") * 300,
    ],
)
def test_cve_2023_5215_a_server_that_lies_in_the_handshake(said: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(ClientSession("disk"), said)


# Servers that lie in their replies


def asking(*, structured: bool = True, command: int = wire.CMD_READ) -> ClientSession:
    """Return a client that waits for 100 bytes from offset 1000, under cookie 1."""
    client, _ = connected(structured=structured)
    if command == wire.CMD_READ:
        client.read(1000, 100)
    else:
        client.command(command, 1000, 100)
    return client


def test_data_may_come_in_pieces_in_any_order_and_with_holes() -> None:
    client = asking()
    hole = chunk(wire.CHUNK_OFFSET_HOLE, wire.HOLE.pack(1060, 10), flag=0)
    (reply,) = feed(
        client,
        data_chunk(1070, b"c" * 30, flag=0)
        + data_chunk(1000, b"a" * 60, flag=0)
        + hole
        + chunk(wire.CHUNK_NONE),
    )
    assert reply.data == b"a" * 60 + bytes(10) + b"c" * 30


def test_an_error_after_data_is_an_error() -> None:
    (reply,) = feed(asking(), data_chunk(1000, b"a" * 100, flag=0) + error_chunk(5, b"broken"))
    assert (reply.error, reply.text, reply.data) == (5, "broken", None)


def test_the_first_error_counts_and_an_unknown_error_is_one() -> None:
    unknown = chunk(0x8000 | 99, wire.ERROR.pack(22, 0) + bytes(8))
    (reply,) = feed(asking(), error_chunk(28, flag=0, more=bytes(8)) + unknown)
    assert reply.error == 28


@pytest.mark.parametrize(
    "said",
    [
        b"x" * 20,
        simple(99),
        simple(1),  # to a read, after structured replies were agreed on
        chunk(wire.CHUNK_NONE, cookie=99),
        chunk(wire.CHUNK_NONE),  # done, but nothing came
        chunk(wire.CHUNK_NONE, flag=0),
        chunk(wire.CHUNK_NONE, b"x"),
        chunk(42, b"x"),
        data_chunk(1000, b""),
        data_chunk(999, b"x"),
        data_chunk(1099, b"xx"),
        data_chunk(1000, b"x" * 101),
        data_chunk(1000, b"x" * 99),  # done too early
        data_chunk(1000, b"xx", flag=0) + data_chunk(1001, b"x"),
        data_chunk(1010, b"xx", flag=0) + data_chunk(1005, b"x" * 6),
        wire.DATA_CHUNK.pack(wire.CHUNK_MAGIC, 0, wire.CHUNK_OFFSET_DATA, 1, 2**32 - 1, 1000),
        chunk(wire.CHUNK_OFFSET_HOLE, wire.HOLE.pack(1000, 0)),
        chunk(wire.CHUNK_OFFSET_HOLE, wire.HOLE.pack(1000, 2**32 - 1)),
        chunk(wire.CHUNK_OFFSET_HOLE, b"short"),
        chunk(wire.CHUNK_ERROR, b"short"),
        error_chunk(0),
        chunk(wire.CHUNK_ERROR, wire.ERROR.pack(5, 9)),
        wire.CHUNK.pack(wire.CHUNK_MAGIC, 0, wire.CHUNK_ERROR, 1, 2**32 - 1),
        chunk(wire.CHUNK_BLOCK_STATUS, bytes(4) + wire.DESCRIPTOR.pack(1, 0)),
        wire.CHUNK.pack(wire.CHUNK_MAGIC, 0, wire.CHUNK_BLOCK_STATUS, 1, 2**32 - 4),
    ],
)
def test_cve_2017_2630_a_server_that_lies_about_a_read(said: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(asking(), said)


def status_chunk(context: int, *extents: tuple[int, int], flag: int = DONE) -> bytes:
    """Return a chunk of block status."""
    payload = context.to_bytes(4, "big") + b"".join(wire.DESCRIPTOR.pack(*e) for e in extents)
    return chunk(wire.CHUNK_BLOCK_STATUS, payload, flag=flag)


def test_an_extent_past_the_request_is_cut() -> None:
    said = status_chunk(1, (60, 3), (2**32 - 1, 0), flag=0) + status_chunk(2, (100, 1))
    (reply,) = feed(asking(command=wire.CMD_BLOCK_STATUS), said)
    assert reply.extents == {CONTEXTS[0]: [(60, 3), (40, 0)], CONTEXTS[1]: [(100, 1)]}


@pytest.mark.parametrize(
    "said",
    [
        simple(1),
        status_chunk(1, (100, 0)),  # done, and one context is missing
        status_chunk(9, (100, 0)),
        status_chunk(1, (100, 0), flag=0) + status_chunk(1, (100, 0)),
        status_chunk(1, (0, 0)),
        status_chunk(1, (100, 0), (1, 0)),
        status_chunk(1),
        data_chunk(1000, b"x"),
        chunk(wire.CHUNK_OFFSET_HOLE, wire.HOLE.pack(1000, 10)),
    ],
)
def test_cve_2023_5871_a_server_that_lies_about_block_status(said: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(asking(command=wire.CMD_BLOCK_STATUS), said)


def test_chunks_without_structured_replies_are_wrong() -> None:
    with pytest.raises(ProtocolError):
        feed(asking(structured=False), chunk(wire.CHUNK_NONE))


def test_more_chunks_than_any_server_needs_are_refused() -> None:
    client, _ = connected()
    client.read(0, 100_000)
    said = b"".join(data_chunk(n * 2, b"x", flag=0) for n in range(CHUNKS_MAX + 1))
    with pytest.raises(ProtocolError):
        feed(client, said)


def test_block_status_refused_simply_is_an_error() -> None:
    (reply,) = feed(asking(command=wire.CMD_BLOCK_STATUS), simple(1, wire.EINVAL))
    assert reply.error == wire.EINVAL


ANSWERS = (
    data_chunk(1000, b"a" * 60, flag=0)
    + chunk(wire.CHUNK_OFFSET_HOLE, wire.HOLE.pack(1060, 40), flag=0)
    + error_chunk(5, b"text")
)


@settings(max_examples=150)
@given(st.integers(0, len(ANSWERS)), st.binary(min_size=1, max_size=30))
def test_garbage_from_a_server_is_a_protocol_error_and_nothing_else(
    at: int, garbage: bytes
) -> None:
    client = asking()
    tracemalloc.start()
    try:
        feed(client, ANSWERS[:at] + garbage + ANSWERS[at + len(garbage) :])
    except ProtocolError:
        pass
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 10 << 20


@given(st.integers(0, 400), st.binary(min_size=1, max_size=30))
def test_garbage_in_a_handshake_is_a_protocol_error_and_nothing_else(
    at: int, garbage: bytes
) -> None:
    said = GREETING + GRANTED + wire.pack_option_reply(CONTEXT, wire.REP_ACK) + EXPORT + ACK
    try:
        feed(ClientSession("disk"), said[:at] + garbage + said[at + len(garbage) :])
    except ProtocolError:
        pass
