"""The server's handshake: every option, every refusal, any cut of the bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrord.nbd import wire
from mirrord.nbd.handshake import Agreed, Export
from tests.nbd.speaking import (
    EXPORT,
    LIMITS,
    SIZE,
    STRUCTURED,
    Server,
    contexts,
    cut,
    flags,
    go,
    put,
)

ALLOCATION, DIRTY = wire.CONTEXT_ALLOCATION.encode(), wire.CONTEXT_DIRTY.encode()
LIST_CONTEXTS = wire.OPT_LIST_META_CONTEXT


def after(data: bytes, export: Export = EXPORT, client_flags: int = 3) -> Server:
    """Return a server that received the client flags and `data`."""
    server = Server(export=export)
    server.receive(flags(client_flags) + data)
    return server


def replies(server: Server) -> list[int]:
    """Return the kinds of the option replies that were sent."""
    return [reply for _, reply, _ in server.option_replies()]


def test_n16_the_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    assert Server().sent == b"NBDMAGICIHAVEOPT\0\3"


def test_n16_go_tells_size_flags_and_block_sizes() -> None:
    server = after(go())
    found = server.option_replies()
    assert [reply for _, reply, _ in found] == [wire.REP_INFO, wire.REP_INFO, wire.REP_ACK]
    kind, size, offered = wire.EXPORT_INFO.unpack(found[0][2])
    assert (kind, size) == (wire.INFO_EXPORT, SIZE)
    for flag in (wire.FLAG_SEND_FLUSH, wire.FLAG_SEND_FUA, wire.FLAG_CAN_MULTI_CONN):
        assert offered & flag
    assert not offered & (wire.FLAG_READ_ONLY | wire.FLAG_SEND_DF)
    assert wire.BLOCK_SIZE_INFO.unpack(found[1][2]) == (3, 1, 4096, 32 << 20)
    assert server.handshake.agreed == Agreed(False, ())


def test_n5_df_is_offered_with_structured_replies_only() -> None:
    server = after(STRUCTURED + go())
    _, _, offered = wire.EXPORT_INFO.unpack(server.option_replies()[1][2])
    assert offered & wire.FLAG_SEND_DF
    assert server.handshake.agreed == Agreed(True, ())


def test_a_read_only_export_offers_no_writing() -> None:
    server = after(go(), export=replace(EXPORT, read_only=True))
    _, _, offered = wire.EXPORT_INFO.unpack(server.option_replies()[0][2])
    assert offered & wire.FLAG_READ_ONLY
    assert not offered & (wire.FLAG_SEND_TRIM | wire.FLAG_SEND_WRITE_ZEROES)


def test_n16_info_describes_and_the_handshake_goes_on() -> None:
    wanted = (wire.INFO_NAME, wire.INFO_DESCRIPTION)
    server = after(go(infos=wanted, option=wire.OPT_INFO))
    data = [data for _, _, data in server.option_replies()]
    assert data[2:] == [b"\0\1disk", b"\0\2a test disk", b""]
    assert server.handshake.agreed is None
    server.receive(go(b""))  # the empty name is the same disk
    assert server.handshake.agreed is not None


def test_an_export_without_a_description_says_nothing_about_it() -> None:
    server = after(go(infos=[wire.INFO_DESCRIPTION]), export=replace(EXPORT, description=""))
    assert replies(server) == [wire.REP_INFO, wire.REP_INFO, wire.REP_ACK]


def test_an_unknown_export_is_refused_and_the_client_may_go_on() -> None:
    server = after(go(b"nothing") + go(b"nothing", option=wire.OPT_INFO) + go())
    assert replies(server)[:2] == [wire.REP_ERR_UNKNOWN] * 2
    assert server.handshake.agreed is not None


@pytest.mark.parametrize("zeroes", [True, False])
def test_n17_no_zeroes_is_honoured_for_export_name(zeroes: bool) -> None:
    server = after(wire.pack_option(1, b"disk"), client_flags=1 if zeroes else 3)
    answer = server.sent[wire.GREETING.size :]
    assert len(answer) == 10 + (124 if zeroes else 0)
    assert answer[:8] == SIZE.to_bytes(8, "big")
    assert server.handshake.agreed is not None


def test_n17_unknown_client_flags_close() -> None:
    assert after(go(), client_flags=4 | 3).error


def test_a_client_without_fixed_newstyle_is_served() -> None:
    assert after(wire.pack_option(1, b""), client_flags=0).handshake.agreed is not None


@pytest.mark.parametrize("name", [b"nothing", b"x" * 4097])
def test_export_name_that_can_not_be_granted_closes(name: bytes) -> None:
    assert after(wire.pack_option(wire.OPT_EXPORT_NAME, name)).error


def test_n16_abort_is_acknowledged_and_ends() -> None:
    server = after(wire.pack_option(wire.OPT_ABORT) + go())
    assert replies(server) == [wire.REP_ACK]
    assert server.handshake.ended
    assert server.handshake.agreed is None


def test_n16_list_names_the_disk() -> None:
    server = after(wire.pack_option(wire.OPT_LIST))
    assert server.option_replies() == [
        (wire.OPT_LIST, wire.REP_SERVER, b"\0\0\0\4disk"),
        (wire.OPT_LIST, wire.REP_ACK, b""),
    ]


@pytest.mark.parametrize("option", [wire.OPT_LIST, wire.OPT_STRUCTURED_REPLY])
def test_data_where_there_should_be_none_is_invalid(option: int) -> None:
    server = after(wire.pack_option(option, b"x") + go())
    assert replies(server)[0] == wire.REP_ERR_INVALID
    assert server.handshake.agreed == Agreed(False, ())


def test_n18_starttls_is_refused_by_policy() -> None:
    assert replies(after(wire.pack_option(wire.OPT_STARTTLS))) == [wire.REP_ERR_POLICY]


@pytest.mark.parametrize("option", [0, 4, 8 + 3, 4711, 0xFFFFFFFF])
def test_n16_an_unknown_option_is_unsupported_and_both_stay_in_step(option: int) -> None:
    server = after(wire.pack_option(option, b"x" * 5000) + go())
    assert replies(server)[0] == wire.REP_ERR_UNSUP
    assert server.handshake.agreed is not None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\4dis",
        b"\0\0\0\4disk",
        b"\0\0\0\4disk\0\1",
        b"\0\0\0\4disk\0\1\0\0\0",
        b"\xff\xff\xff\xff" + b"x" * 100,  # CVE-2022-26495: the length plus 1 was 0
        b"\0\0\x10\1" + b"x" * 5000,  # CVE-2017-15118: a name above 4096
    ],
)
def test_cve_2022_26495_a_go_that_does_not_add_up_is_invalid(data: bytes) -> None:
    server = after(wire.pack_option(wire.OPT_GO, data) + go())
    assert replies(server)[0] == wire.REP_ERR_INVALID
    assert server.handshake.agreed is not None


def test_cve_2017_15119_an_option_above_64_kib_closes_at_once() -> None:
    server = after(wire.OPTION.pack(wire.OPTION_MAGIC, 4711, 64 * 1024 + 1))
    assert server.error
    assert not after(wire.pack_option(4711, bytes(64 * 1024))).error


def test_more_than_64_options_close() -> None:
    server = after(STRUCTURED * 64)
    assert not server.error
    server.receive(STRUCTURED)
    assert server.error


def test_a_wrong_magic_closes() -> None:
    assert after(b"IHAVEOPS" + bytes(8)).error


def test_cve_2020_10761_a_refusal_never_echoes_the_name() -> None:
    server = after(go(b"x" * 4096) + wire.pack_option(99, b"y" * 4096))
    assert all(len(data) <= 256 and b"xx" not in data for _, _, data in server.option_replies())


def test_no_room_for_another_client() -> None:
    server = Server()
    server.handshake.full = True
    server.receive(flags() + go() + go(option=wire.OPT_INFO))
    assert replies(server)[0] == wire.REP_ERR_POLICY
    assert replies(server)[-1] == wire.REP_ACK
    server.receive(wire.pack_option(wire.OPT_EXPORT_NAME, b"disk"))
    assert server.error


def test_n15_options_are_refused_while_stopping() -> None:
    server = Server()
    server.handshake.stopping = True
    server.receive(flags() + go() + STRUCTURED + wire.pack_option(wire.OPT_ABORT))
    assert replies(server) == [wire.REP_ERR_SHUTDOWN] * 2 + [wire.REP_ACK]
    other = Server()
    other.handshake.stopping = True
    other.receive(flags() + wire.pack_option(wire.OPT_EXPORT_NAME, b"disk"))
    assert other.error


# Metadata contexts (N7)


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], [ALLOCATION, DIRTY]),
        ([b"base:"], [ALLOCATION]),
        ([b"mirrord:", b"base:"], [ALLOCATION, DIRTY]),
        ([DIRTY], [DIRTY]),
        ([b"qemu:"], []),
    ],
)
def test_n7_contexts_are_listed(queries: list[bytes], found: list[bytes]) -> None:
    server = after(STRUCTURED + contexts(queries, option=LIST_CONTEXTS))
    assert [data[4:] for _, reply, data in server.option_replies()[1:-1]] == found
    assert replies(server)[-1] == wire.REP_ACK


def test_n7_contexts_are_selected_and_the_last_selection_counts() -> None:
    server = after(STRUCTURED + contexts([ALLOCATION, DIRTY, DIRTY, b"what"]))
    assert [data for _, _, data in server.option_replies()[1:]] == [
        b"\0\0\0\1" + ALLOCATION,
        b"\0\0\0\2" + DIRTY,
        b"",
    ]
    server.receive(contexts([DIRTY], name=b"") + go())
    assert server.handshake.agreed == Agreed(True, (wire.CONTEXT_DIRTY,))


def test_n7_a_failed_selection_selects_nothing() -> None:
    selected = STRUCTURED + contexts([ALLOCATION])
    server = after(selected + contexts([ALLOCATION], name=b"other") + go())
    assert server.handshake.agreed == Agreed(True, ())
    assert wire.REP_ERR_UNKNOWN in replies(server)
    listed = after(STRUCTURED + contexts([], name=b"other", option=LIST_CONTEXTS))
    assert replies(listed)[-1] == wire.REP_ERR_UNKNOWN


def test_n7_contexts_need_structured_replies() -> None:
    assert replies(after(contexts([ALLOCATION]))) == [wire.REP_ERR_INVALID]


def test_more_than_32_queries_are_too_many() -> None:
    server = after(STRUCTURED + contexts([b"a:b"] * 33) + contexts([b"a:b"] * 32))
    assert replies(server)[1:] == [wire.REP_ERR_TOO_BIG, wire.REP_ACK]


@pytest.mark.parametrize(
    "data",
    [b"\0\0\0\0", b"\0\0\0\0\0\0\0\1", b"\0\0\0\0\0\0\0\0x", b"\0\0\0\0\0\0\0\1\0\0\0\2a"],
)
def test_a_malformed_context_option_is_invalid(data: bytes) -> None:
    server = after(STRUCTURED + wire.pack_option(wire.OPT_SET_META_CONTEXT, data))
    assert replies(server)[-1] == wire.REP_ERR_INVALID


# Cut anywhere, mixed anyhow

TALK = (
    flags()
    + wire.pack_option(wire.OPT_LIST)
    + wire.pack_option(4711, b"unknown")
    + STRUCTURED
    + contexts([], option=LIST_CONTEXTS)
    + contexts([ALLOCATION, DIRTY])
    + go(b"nothing")
    + go(infos=[wire.INFO_NAME])
)


def test_cve_2017_9524_a_handshake_may_end_after_every_byte() -> None:
    whole = after(TALK[4:])
    for length in range(len(TALK)):
        server = Server()
        server.receive(TALK[:length])
        assert server.error is None
        assert server.handshake.agreed is None
        assert whole.sent.startswith(server.sent)


@given(st.lists(st.integers(1, 40)))
def test_a_handshake_cut_anyhow_has_the_same_outcome(sizes: list[int]) -> None:
    whole, pieces = after(TALK[4:]), Server()
    for piece in cut(TALK, sizes):
        pieces.receive(piece)
    assert pieces.sent == whole.sent
    assert pieces.handshake.agreed == whole.handshake.agreed


@given(st.integers(0, len(TALK) - 1), st.binary(min_size=1, max_size=40))
def test_cve_2013_7441_garbage_is_answered_or_closes_and_nothing_else(
    at: int, garbage: bytes
) -> None:
    server = Server()
    server.receive(TALK[:at] + garbage + TALK[at + len(garbage) :])
    assert len(server.sent) < 64 * 400


def test_bytes_behind_go_are_left_for_the_session() -> None:
    server = Server()
    put(server.inbox, flags() + go() + b"next")
    server.handshake.advance()
    assert server.inbox.data[server.inbox.start : server.inbox.end] == b"next"
    assert LIMITS.name_bytes_max == 4096
