"""Seals against smbprotocol's own signing and encrypting, and against whoever changes a message."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrord.errors import ProtocolError
from mirrord.smb import status, wire
from mirrord.smb.seal import JOIN_BYTES_MAX, Encryption, Nonces, Signing
from tests.smb.speaking import (
    KINDS,
    SESSION,
    Kind,
    Peer,
    answer,
    lease_break,
    name_of,
    read_body,
    seal_of,
    split,
    write_body,
)  # fmt: skip

DATA = [b"", b"x", b"0123456789" * 7, b"abcd" * JOIN_BYTES_MAX]
BUFFERS = [bytes, bytearray, memoryview]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=name_of)
signing = pytest.mark.parametrize("kind", list(Signing), ids=name_of)
encryption = pytest.mark.parametrize("kind", list(Encryption), ids=name_of)


def head_of(message_id: int = 7) -> bytes:
    """Return a request's header and body."""
    return wire.pack_header(
        wire.WRITE, charge=1, credits=1, message_id=message_id, tree_id=3, session_id=SESSION,
        sequence=2,
    ) + b"a body of some bytes"  # fmt: skip


def flips(message: bytes) -> Iterator[bytes]:
    """Return the message with each of its bits turned over."""
    for bit in range(len(message) * 8):
        changed = bytearray(message)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@every_kind
@pytest.mark.parametrize("data", DATA, ids=len)
@pytest.mark.parametrize("buffer", BUFFERS)
def test_smbprotocol_opens_what_is_sent(kind: Kind, data: bytes, buffer: type) -> None:
    parts = seal_of(kind).close(head_of(), buffer(data))
    (message,) = split(b"".join(parts))
    opened = Peer(kind).open(message)
    if isinstance(kind, Signing):
        assert opened[16] == wire.SIGNED
        opened = opened[:16] + b"\0" + opened[17:48] + bytes(16) + opened[64:]
    assert opened == head_of() + data


@every_kind
@pytest.mark.parametrize("data", DATA, ids=len)
@pytest.mark.parametrize("buffer", BUFFERS)
def test_what_smbprotocol_sends_is_opened(kind: Kind, data: bytes, buffer: type) -> None:
    made = answer(wire.READ, 7, read_body(data))
    opened = seal_of(kind).open(buffer(Peer(kind).close(made)))
    assert bytes(opened[64:]) == read_body(data)
    assert bytes(opened[24:32]) == made[24:32]


@pytest.mark.parametrize("kind", [None, *Signing], ids=name_of)
@pytest.mark.parametrize("data", DATA, ids=len)
def test_a_read_may_come_in_two_parts(kind: Kind, data: bytes) -> None:
    seal = seal_of(kind)
    assert seal.splits
    message = Peer(kind).close(answer(wire.READ, 7, read_body(data)))
    seal.open_read(message[:80], bytearray(message[80:]))
    if kind is None:
        return
    with pytest.raises(ProtocolError, match="wrong signature"):
        seal.open_read(message[:80], bytearray(message[80:] + b"y"))
    with pytest.raises(ProtocolError, match="unsigned"):
        seal.open_read(answer(wire.READ, 7, read_body(b"")), data)


@encryption
def test_an_encrypted_read_never_comes_in_two_parts(kind: Kind) -> None:
    seal = seal_of(kind)
    assert not seal.splits
    with pytest.raises(ProtocolError):
        seal.open_read(answer(wire.READ, 7, read_body(b"")), b"")


@pytest.mark.parametrize("kind", [*Signing, *Encryption], ids=name_of)
def test_each_flipped_bit_is_noticed(kind: Kind) -> None:
    seal = seal_of(kind)
    message = Peer(kind).close(answer(wire.WRITE, 7, write_body(4096)))
    for changed in flips(message):
        with pytest.raises(ProtocolError):
            seal.open(changed)
    seal.open(message)


@signing
def test_each_flipped_bit_of_a_split_read_is_noticed(kind: Kind) -> None:
    seal = seal_of(kind)
    message = Peer(kind).close(answer(wire.READ, 7, read_body(b"data")))
    for changed in flips(message):
        with pytest.raises(ProtocolError):
            seal.open_read(changed[:80], changed[80:])


@pytest.mark.parametrize("kind", [*Signing, *Encryption], ids=name_of)
def test_a_flipped_bit_of_a_long_message_is_noticed(kind: Kind) -> None:
    seal = seal_of(kind)
    message = Peer(kind).close(answer(wire.READ, 7, read_body(bytes(2 * JOIN_BYTES_MAX))))
    for at in (0, 70, 1000, JOIN_BYTES_MAX, len(message) - 1):
        changed = bytearray(message)
        changed[at] ^= 1
        with pytest.raises(ProtocolError):
            seal.open(changed)


@pytest.mark.parametrize("kind", [*Signing, *Encryption], ids=name_of)
def test_a_message_cut_short_or_made_longer_is_noticed(kind: Kind) -> None:
    seal = seal_of(kind)
    message = Peer(kind).close(answer(wire.WRITE, 7, write_body(4096)))
    for length in range(len(message)):
        with pytest.raises(ProtocolError):
            seal.open(message[:length])
    with pytest.raises(ProtocolError):
        seal.open(message + b"\0")


@pytest.mark.parametrize("kind", [*Signing, *Encryption], ids=name_of)
def test_our_own_message_sent_back_is_noticed(kind: Kind) -> None:
    """The nonce, or the key, says the direction; plain signatures leave it to the flag."""
    (mine,) = split(b"".join(seal_of(kind).close(head_of())))
    if isinstance(kind, Signing) and kind != Signing.AES_GMAC:
        assert not seal_of(kind).open(mine)[16] & wire.FROM_SERVER
        return
    with pytest.raises(ProtocolError):
        seal_of(kind).open(mine)


@signing
def test_an_unsigned_answer_on_a_signed_session_is_refused(kind: Kind) -> None:
    with pytest.raises(ProtocolError, match="unsigned"):
        seal_of(kind).open(answer(wire.READ, 7, read_body(b"evil")))


@signing
@pytest.mark.parametrize("flags", [wire.FROM_SERVER, wire.FROM_SERVER | wire.SIGNED])
def test_interim_answers_and_breaks_pass_a_signed_session(kind: Kind, flags: int) -> None:
    """The signature of an interim answer is skipped even where there seems to be one."""
    seal = seal_of(kind)
    interim = answer(wire.READ, 7, status=status.PENDING, flags=flags)
    assert seal.open(interim) == interim
    assert seal.open(lease_break()) == lease_break()


@signing
def test_an_encrypted_message_on_a_signed_session_is_refused(kind: Kind) -> None:
    message = Peer(Encryption.AES_128_GCM).close(answer(wire.READ, 7))
    for seal in (seal_of(kind), seal_of(None)):
        with pytest.raises(ProtocolError):
            seal.open(message)


@encryption
def test_a_plain_answer_on_an_encrypted_session_is_refused(kind: Kind) -> None:
    seal = seal_of(kind)
    for message in (
        answer(wire.READ, 7, read_body(b"evil")),
        Peer(Signing.AES_GMAC).close(answer(wire.READ, 7)),
        answer(wire.READ, 7, status=status.PENDING),
        answer(wire.OPLOCK_BREAK, 7),
        answer(wire.READ, wire.UNSOLICITED),
    ):
        with pytest.raises(ProtocolError, match="plain answer"):
            seal.open(message)


@encryption
def test_a_lease_break_comes_in_plain_or_encrypted(kind: Kind) -> None:
    """Samba's belong to no session, and so no key is theirs."""
    assert seal_of(kind).open(lease_break()) == lease_break()
    assert seal_of(kind).open(Peer(kind).close(lease_break())) == lease_break()


@encryption
@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (36, (81).to_bytes(4, "little"), "were encrypted"),
        (36, (79).to_bytes(4, "little"), "were encrypted"),
        (42, b"\0\0", "another session"),
        (42, b"\3\0", "another session"),
        (44, bytes(8), "another session"),
    ],
)
def test_a_transform_header_that_lies_is_refused(
    kind: Kind, at: int, value: bytes, says: str
) -> None:
    message = Peer(kind).close(answer(wire.WRITE, 7, write_body(4096)))
    with pytest.raises(ProtocolError, match=says):
        seal_of(kind).open(message[:at] + value + message[at + len(value) :])


@encryption
def test_an_encrypted_message_without_room_for_a_header_is_refused(kind: Kind) -> None:
    message = Peer(kind).close(answer(wire.WRITE, 7)[:63])
    with pytest.raises(ProtocolError, match="encrypted message of 115 bytes"):
        seal_of(kind).open(message)


@encryption
def test_messages_of_all_connections_have_nonces_of_their_own(kind: Encryption) -> None:
    size = 12 if kind in (Encryption.AES_128_GCM, Encryption.AES_256_GCM) else 11
    seen = set()
    for connection in (1, 2, 255, 256, 70_000):
        seal = seal_of(kind, connection)
        for data in (b"", b"x", bytes(2 * JOIN_BYTES_MAX), b"y"):
            (message,) = split(b"".join(seal.close(head_of(), data)))
            Peer(kind).open(message)
            assert message[20 + size : 36] == bytes(16 - size)
            seen.add(message[20 : 20 + size])
    assert len(seen) == 20


@given(
    st.sampled_from([11, 12]),
    st.dictionaries(st.integers(0, (1 << 24) - 1), st.integers(0, 40), max_size=6),
)
def test_nonces_never_repeat(size: int, connections: dict[int, int]) -> None:
    taken = []
    for connection, count in connections.items():
        nonces = Nonces(connection, size)
        taken += [(connection, nonces.take()) for _ in range(count)]
    assert len({nonce for _, nonce in taken}) == len(taken)
    for connection, nonce in taken:
        assert len(nonce) == size
        assert int.from_bytes(nonce[: size - 8], "little") == connection


def test_a_connection_too_many_gets_no_nonce_of_another() -> None:
    with pytest.raises(OverflowError):
        Nonces(1 << 24, 11)
    with pytest.raises(OverflowError):
        Nonces(1 << 32, 12)


def test_what_show_calls_them() -> None:
    assert [seal_of(kind).name for kind in KINDS] == [
        "none", "HMAC-SHA256", "AES-CMAC", "AES-GMAC", "AES-128-CCM", "AES-128-GCM", "AES-256-CCM",
        "AES-256-GCM",
    ]  # fmt: skip
