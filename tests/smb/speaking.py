"""A server's side of SMB by hand: what the tests of the protocol modules say, and how they hear.

Signing and encrypting are smbprotocol's (`Peer`), headers and bodies are packed here: nothing of
what is tested is used to test it.
"""

from __future__ import annotations

from struct import Struct
from types import SimpleNamespace
from typing import NamedTuple

from smbprotocol.connection import Connection, Dialects, SMB2TransformHeader

from mirrord.smb import status, wire
from mirrord.smb.channel import Allocate, Channel, Reply, plain_memory
from mirrord.smb.lanes import Request
from mirrord.smb.seal import Encrypted, Encryption, Seal, Signed, Signing, Unsealed

SESSION = 0x1122334455667788
SIGNING_KEY = bytes(range(16))
CLIENT_KEY, SERVER_KEY = bytes(range(32, 64)), bytes(range(64, 96))
FILE = b"0123456789abcdef"
HEADER = Struct("<4sHHIHHIIQIIQ16s")
ERROR_BODY = b"\x09" + bytes(8)  # 2.2.2

Kind = Signing | Encryption | None
KINDS: list[Kind] = [None, *Signing, *Encryption]


def name_of(kind: Kind) -> str:
    """Return the name of a test with it."""
    return kind.name if kind is not None else "none"


class Peer:
    """The other end of a seal."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._keys = SimpleNamespace(
            session_id=SESSION,
            encryption_key=_key_of(kind, SERVER_KEY),
            decryption_key=_key_of(kind, CLIENT_KEY),
        )
        made = self._connection = Connection.__new__(Connection)
        made.dialect = Dialects.SMB_3_1_1
        made.signing_algorithm_id = made.cipher_id = kind
        made.session_table = {SESSION: self._keys}

    def signature(self, message: bytes, *, server: bool) -> bytes:
        """Return what smbprotocol would sign a message with."""
        _, _, _, _, command, _, _, _, message_id, *_ = HEADER.unpack_from(message)
        made = self._connection._generate_signature(
            message, SIGNING_KEY, message_id, server, command
        )
        return bytes(made)

    def open(self, message: bytes) -> bytes:
        """Return a client's message, verified, as it was before it was sealed."""
        if isinstance(self.kind, Encryption):
            transform = SMB2TransformHeader()
            transform.unpack(message)
            return bytes(self._connection._decrypt(transform))
        if self.kind is not None:
            assert message[16] & wire.SIGNED
            assert message[48:64] == self.signature(message, server=False)
        return message

    def close(self, message: bytes) -> bytes:
        """Seal a server's message, or a whole compound of them where that is encrypted."""
        if isinstance(self.kind, Encryption):
            return bytes(self._connection._encrypt(message, self._keys).pack())
        if self.kind is not None:
            message = message[:16] + bytes([message[16] | wire.SIGNED]) + message[17:]
            return message[:48] + self.signature(message, server=True) + message[64:]
        return message


def _key_of(kind: Kind, key: bytes) -> bytes:
    return key if kind in (Encryption.AES_256_CCM, Encryption.AES_256_GCM) else key[:16]


def seal_of(kind: Kind, connection: int = 1) -> Seal:
    """Return the client's side."""
    if isinstance(kind, Encryption):
        keys = _key_of(kind, CLIENT_KEY), _key_of(kind, SERVER_KEY)
        return Encrypted(kind, *keys, SESSION, connection)
    return Unsealed() if kind is None else Signed(kind, SIGNING_KEY)


class Asked(NamedTuple):
    """A request as a server sees it."""

    command: int
    message_id: int
    charge: int
    credits: int
    sequence: int
    tree_id: int
    session_id: int
    body: bytes
    flags: int = 0


def parse(message: bytes) -> Asked:
    """Read a client's message."""
    (magic, size, charge, sequence, command, credits, flags, following, message_id, _, tree_id,
     session_id, _) = HEADER.unpack_from(message)  # fmt: skip
    assert (magic, size, following) == (b"\xfeSMB", 64, 0)
    assert not flags & wire.FROM_SERVER
    rest = message[64:]
    return Asked(command, message_id, charge, credits, sequence, tree_id, session_id, rest, flags)


def split(data: bytes) -> list[bytes]:
    """Cut what was sent into its messages."""
    found, at = [], 0
    while at < len(data):
        start, at = at + 4, at + 4 + int.from_bytes(data[at : at + 4], "big")
        assert at <= len(data)
        found.append(data[start:at])
    return found


def framed(*messages: bytes) -> bytes:
    """Return messages as they go over the wire."""
    return b"".join(len(message).to_bytes(4, "big") + message for message in messages)


def said(channel: Channel, peer: Peer | None = None) -> list[Asked]:
    """Return what a channel wants to send, and empty it."""
    data = b"".join(channel.outgoing)
    channel.outgoing.clear()
    return [parse((peer or Peer(None)).open(message)) for message in split(data)]


def answer(
    command: int,
    message_id: int,
    body: bytes = ERROR_BODY,
    *,
    status: int = status.SUCCESS,
    credits: int = 1,
    flags: int = wire.FROM_SERVER,
    following: int = 0,
) -> bytes:
    """Return a reply that is not sealed."""
    return HEADER.pack(
        b"\xfeSMB", 64, 1, status, command, credits, flags, following, message_id, 0, 0, SESSION,
        b"",
    ) + body  # fmt: skip


def compound(*replies: bytes) -> list[bytes]:
    """Return the parts of a compound: each but the last padded, and saying where the next is."""
    parts = []
    for one in replies[:-1]:
        padded = one + bytes(-len(one) % 8)
        parts.append(padded[:20] + len(padded).to_bytes(4, "little") + padded[24:])
    return [*parts, replies[-1]]


def read_body(data: bytes) -> bytes:
    """Return the body of a reply to READ."""
    return Struct("<HBBIII").pack(17, 80, 0, len(data), 0, 0) + data


def write_body(count: int) -> bytes:
    """Return the body of a reply to WRITE."""
    return Struct("<HHIIHH").pack(17, 0, count, 0, 0, 0)


def lease_break(key: bytes = FILE, state: int = 3, *, wants_ack: bool = True) -> bytes:
    """Return a lease break that nobody asked for."""
    body = Struct("<HHI16sIIIII").pack(44, 0, int(wants_ack), key, 7, state, 0, 0, 0)
    return answer(wire.OPLOCK_BREAK, wire.UNSOLICITED, body, credits=0)


def feed(channel: Channel, data: bytes, now_s: float = 0.0, step: int = 1 << 30) -> list[Reply]:
    """Receive all of `data`, at most `step` bytes at a time."""
    replies, at = [], 0
    while at < len(data):
        buffer = channel.inbox.buffer()
        count = min(len(buffer), len(data) - at, step)
        buffer[:count] = data[at : at + count]
        at += count
        replies += channel.received(count, now_s)
    return replies


def started(
    kind: Kind = None,
    *,
    credits: int = 64,
    piece_bytes: int = 1 << 20,
    multi_credit: bool = True,
    allocate: Allocate = plain_memory,
) -> Channel:
    """Return a channel that smbprotocol has negotiated on, with so many credits left."""
    channel = Channel(allocate)
    channel.greet(answer(wire.NEGOTIATE, 0, flags=0))
    channel.outgoing.clear()
    feed(channel, framed(answer(wire.NEGOTIATE, 0, credits=credits)))
    channel.greeting.clear()
    seal = seal_of(kind)
    channel.start(seal, SESSION, piece_bytes=piece_bytes, multi_credit=multi_credit)
    return channel


def read(length: int = 4096, offset: int = 0) -> Request:
    """Return a request to read."""
    body = wire.read_body(FILE, offset, length)
    return Request(wire.READ, body, tree_id=5, payload_bytes=length)


def write(data: bytes, offset: int = 0) -> Request:
    """Return a request to write."""
    body = wire.write_body(FILE, offset, len(data))
    return Request(wire.WRITE, body, tree_id=5, data=data, payload_bytes=len(data))
