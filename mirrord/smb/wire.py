"""The bytes of SMB 2 and 3 messages that mirrord frames itself: reads, writes, flushes, a few more.

Numbers and layouts are those of [MS-SMB2] (sections given below). Everything is little endian but
the four bytes of length in front of a message (2.1). Negotiation, authentication, tree connects,
creates and set-infos are smbprotocol's business.

Whatever a server sends is checked before it is believed: a reply that contradicts its own length,
its request or the specification is a `ProtocolError`, and the connection is dropped.
"""

from __future__ import annotations

from struct import Struct, error
from typing import Any, Final, NamedTuple

from mirrord.errors import ProtocolError

Bytes = bytes | bytearray | memoryview

SMB2_MAGIC: Final = b"\xfeSMB"
TRANSFORM_MAGIC: Final = b"\xfdSMB"  # an encrypted message
HEADER_BYTES: Final = 64
LENGTH_BYTES: Final = 4
MESSAGE_BYTES_MAX: Final = 0xFFFFFF  # 2.1: the length has three bytes

# Commands (2.2.1.2).
NEGOTIATE: Final = 0
SESSION_SETUP: Final = 1
FLUSH: Final = 7
READ: Final = 8
WRITE: Final = 9
IOCTL: Final = 11
ECHO: Final = 13
OPLOCK_BREAK: Final = 18

# Flags of a header.
FROM_SERVER: Final = 1
ASYNC: Final = 2
SIGNED: Final = 8
REPLAY: Final = 0x20000000  # a request that may have been carried out already

UNSOLICITED: Final = 0xFFFFFFFFFFFFFFFF  # the message id of a break that nobody asked for
CREDIT_BYTES: Final = 64 * 1024  # of payload, that one credit pays for (3.1.5.2)

WRITE_THROUGH: Final = 1  # flag of a WRITE: durable before the reply
READ_UNBUFFERED: Final = 1  # flag of a READ, since 3.0.2: past the server's cache

# FSCTLs ([MS-FSCC] 2.3).
SET_SPARSE: Final = 0x000900C4
SET_ZERO_DATA: Final = 0x000980C8
QUERY_ALLOCATED_RANGES: Final = 0x000940CF
REQUEST_RESUME_KEY: Final = 0x00140078
SRV_COPYCHUNK: Final = 0x001440F2
SRV_COPYCHUNK_WRITE: Final = 0x001480F2
DUPLICATE_EXTENTS: Final = 0x00098344
QUERY_NETWORK_INTERFACES: Final = 0x001401FC

READ_DATA_OFFSET: Final = 80  # where we ask servers to put what was read, and most do

_HEADER = Struct("<4sHHIHHIIQIIQ16s")
_READ = Struct("<HBBIQ16sIIIHHB")
_WRITE = Struct("<HHIQ16sIIHHI")
_FLUSH = Struct("<HHI16s")
_ECHO = Struct("<HH")
_IOCTL = Struct("<HHI16sIIIIIIII")
_LEASE_ACK = Struct("<HHI16sIQ")
_LEASE_BREAK = Struct("<HHI16sII")
_OPLOCK_BREAK = Struct("<HBBI16s")  # and the answer to it
_READ_REPLY = Struct("<HBBII")
_WRITE_REPLY = Struct("<HHI")
_IOCTL_REPLY = Struct("<HHI16sIIII")


class Header(NamedTuple):
    """What a header says that matters here (2.2.1)."""

    charge: int
    status: int  # of a reply; in a request, the channel sequence
    command: int
    credits: int  # granted, or asked for
    flags: int
    next_command: int
    message_id: int
    session_id: int
    signature: bytes


def parse_header(message: Bytes) -> Header:
    """Read the first 64 bytes of a message."""
    try:
        (magic, size, charge, status, command, granted, flags, following, message_id, _, _,
         session_id, signature) = _HEADER.unpack_from(message)  # fmt: skip
    except error as short:
        raise ProtocolError(f"a message of {len(message)} bytes has no header") from short
    if magic != SMB2_MAGIC or size != HEADER_BYTES:
        raise ProtocolError("not an SMB 2 message")
    return Header(
        charge, status, command, granted, flags, following, message_id, session_id, signature
    )


def pack_header(
    command: int,
    *,
    charge: int,
    credits: int,
    message_id: int,
    tree_id: int,
    session_id: int,
    sequence: int,
    flags: int = 0,
) -> bytes:
    """Return the header of a request. `sequence` is the channel sequence (2.2.1.2)."""
    return _HEADER.pack(
        SMB2_MAGIC, HEADER_BYTES, charge, sequence, command, credits, flags, 0, message_id, 0,
        tree_id, session_id, b"",
    )  # fmt: skip


def charge_of(payload_bytes: int) -> int:
    """Return how many credits a request of so many bytes costs, in either direction (3.2.4.1.5)."""
    return (payload_bytes - 1) // CREDIT_BYTES + 1 if payload_bytes else 1


# Bodies of requests.


def read_body(file_id: bytes, offset: int, length: int, flags: int = 0) -> bytes:
    """Return a READ request (2.2.19), which has one byte of buffer at its end."""
    return _READ.pack(49, READ_DATA_OFFSET, flags, length, offset, file_id, 0, 0, 0, 0, 0, 0)


def write_body(file_id: bytes, offset: int, length: int, flags: int = 0) -> bytes:
    """Return a WRITE request (2.2.21); the data follow it."""
    return _WRITE.pack(49, HEADER_BYTES + 48, length, offset, file_id, 0, 0, 0, 0, flags)


def flush_body(file_id: bytes) -> bytes:
    """Return a FLUSH request (2.2.17)."""
    return _FLUSH.pack(24, 0, 0, file_id)


def echo_body() -> bytes:
    """Return an ECHO request (2.2.28)."""
    return _ECHO.pack(4, 0)


def ioctl_body(file_id: bytes, code: int, given: bytes, output_bytes_max: int) -> bytes:
    """Return an IOCTL request of a file system control (2.2.31)."""
    head = _IOCTL.pack(
        57, 0, code, file_id, HEADER_BYTES + 56, len(given), 0, 0, 0, output_bytes_max, 1, 0
    )
    return head + given


def lease_ack_body(lease_key: bytes, state: int) -> bytes:
    """Return the answer to a lease break that wants one (2.2.24.2)."""
    return _LEASE_ACK.pack(36, 0, 0, lease_key, state, 0)


def oplock_ack_body(file_id: bytes, level: int) -> bytes:
    """Return the answer to an oplock break (2.2.24.1)."""
    return _OPLOCK_BREAK.pack(24, level, 0, 0, file_id)


_FILE_ID_AT: Final = {READ: 16, WRITE: 16, FLUSH: 8, IOCTL: 8}


def file_id_of(command: int, body: bytes) -> bytes:
    """Return which file a request of ours is about; none for what is about no file."""
    at = _FILE_ID_AT.get(command)
    return b"" if at is None else body[at : at + 16]


# Replies. Each takes the message from its header on.


def read_reply(message: Bytes, length_max: int) -> memoryview:
    """Return what a READ reply brought (2.2.20): fewer bytes at the end of the file."""
    _size, data_at, _, length, _ = _unpack(_READ_REPLY, message, 17)
    if length > length_max:
        raise ProtocolError(f"a read of {length_max} bytes brought {length}")
    return _slice(message, data_at, length, READ_DATA_OFFSET)


def write_reply(message: Bytes) -> int:
    """Return how many bytes a WRITE wrote (2.2.22)."""
    _size, _, count = _unpack(_WRITE_REPLY, message, 17)
    return int(count)


def empty_reply(message: Bytes) -> None:
    """Check a reply of FLUSH or ECHO (2.2.18, 2.2.29)."""
    _unpack(_ECHO, message, 4)


def ioctl_reply(message: Bytes, length_max: int) -> bytes:
    """Return the output of an IOCTL (2.2.32)."""
    *_, output_at, length = _unpack(_IOCTL_REPLY, message, 49)
    if length > length_max:
        raise ProtocolError(f"an ioctl with {length_max} bytes of room brought {length}")
    return bytes(_slice(message, output_at, length, HEADER_BYTES + 48))


class Break(NamedTuple):
    """A server takes back a lease (`key`: the lease's) or an oplock (`key`: the file's id)."""

    lease: bool
    key: bytes
    state: int  # what is left: a lease state, or an oplock level
    wants_ack: bool


def parse_break(message: Bytes) -> Break:
    """Read a break notification (2.2.23)."""
    if message[HEADER_BYTES : HEADER_BYTES + 2] == b"\x2c\0":
        _, _epoch, flags, key, _current, state = _unpack(_LEASE_BREAK, message, 44)
        return Break(True, key, state, bool(flags & 1))
    _, level, _, _, file_id = _unpack(_OPLOCK_BREAK, message, 24)
    return Break(False, file_id, level, True)


def _unpack(layout: Struct, message: Bytes, size: int) -> tuple[Any, ...]:
    """Read the fixed part of a body, whose first field names its size."""
    try:
        fields = layout.unpack_from(message, HEADER_BYTES)
    except error as short:
        raise ProtocolError(f"a reply of {len(message)} bytes is too short") from short
    if fields[0] != size:
        raise ProtocolError(f"a reply says {fields[0]} where {size} belongs")
    return fields


def _slice(message: Bytes, start: int, length: int, start_min: int) -> memoryview:
    """Return what follows the fixed part; of nothing, the place means nothing (3.2.5.14)."""
    if length and not start_min <= start <= len(message) - length:
        raise ProtocolError(f"{length} bytes at {start} are not in a reply of {len(message)}")
    return memoryview(message)[start : start + length]


# Changes of messages that smbprotocol made or waits for.


def patched(message: Bytes, message_id: int, credits: int, sequence: int | None = None) -> bytes:
    """Return a message with another message id and other credits, alone and without its signature:
    a request is sealed after this, a reply was verified before.

    A request is given its channel sequence, where a reply has its status."""
    (magic, size, charge, status, command, _, flags, _, _, reserved, tree_id,
     session_id, _) = _HEADER.unpack_from(message)  # fmt: skip
    head = _HEADER.pack(
        magic, size, charge, status if sequence is None else sequence, command, credits,
        flags & ~SIGNED, 0, message_id, reserved, tree_id, session_id, b"",
    )  # fmt: skip
    return head + memoryview(message)[HEADER_BYTES:]


def frame(*parts: Bytes) -> list[Bytes]:
    """Return a message as it goes onto the wire: its length, then itself."""
    length = sum(map(len, parts))
    if length > MESSAGE_BYTES_MAX:
        raise ValueError(f"a message of {length} bytes is longer than any may be")
    return [length.to_bytes(LENGTH_BYTES, "big"), *parts]


# FSCTL payloads ([MS-FSCC] 2.3).

_PAIR = Struct("<QQ")


def zero_data(offset: int, length: int) -> bytes:
    """Return FILE_ZERO_DATA_INFORMATION: the range to be zeroed."""
    return _PAIR.pack(offset, offset + length)


def ranges_query(offset: int, length: int) -> bytes:
    """Return FILE_ALLOCATED_RANGE_BUFFER: the range that is asked about."""
    return _PAIR.pack(offset, length)


def parse_ranges(output: bytes) -> list[tuple[int, int]]:
    """Return (offset, length) of the allocated ranges, in the order of the answer."""
    if len(output) % _PAIR.size:
        raise ProtocolError(f"{len(output)} bytes are no list of ranges")
    return list(_PAIR.iter_unpack(output))


def copy_chunks(resume_key: bytes, chunks: list[tuple[int, int, int]]) -> bytes:
    """Return SRV_COPYCHUNK_COPY ([MS-SMB2] 2.2.31.1) of (source offset, target offset, length)."""
    parts = [resume_key, len(chunks).to_bytes(4, "little"), bytes(4)]
    parts += [_CHUNK.pack(source, target, length, 0) for source, target, length in chunks]
    return b"".join(parts)


_CHUNK = Struct("<QQII")
_COPIED = Struct("<III")


def parse_copied(output: bytes) -> tuple[int, int, int]:
    """Return (chunks written, bytes of a chunk written in part, bytes in total) (2.2.32.1).

    With STATUS_INVALID_PARAMETER they are the server's limits: chunks, bytes a chunk, bytes in all.
    """
    if len(output) < _COPIED.size:
        raise ProtocolError(f"{len(output)} bytes are no answer to a copy")
    chunks, part, total = _COPIED.unpack_from(output)
    return chunks, part, total


def parse_resume_key(output: bytes) -> bytes:
    """Return the key by which a file is named as the source of a copy (2.2.32.3)."""
    if len(output) < 24:
        raise ProtocolError(f"{len(output)} bytes are no resume key")
    return bytes(output[:24])


_DUPLICATE = Struct("<16sQQQ")


def duplicate_extents(file_id: bytes, source: int, target: int, length: int) -> bytes:
    """Return DUPLICATE_EXTENTS_DATA ([MS-FSCC] 2.3.7)."""
    return _DUPLICATE.pack(file_id, source, target, length)
