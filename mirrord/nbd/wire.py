"""NBD on the wire: its numbers, its layouts, and what an errno becomes. Data and packing only.

Source: the protocol document of the NBD project, doc/proto.md; everything is big-endian.
Constants are plain integers, since the hot loops compare them.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import Final

Buffer = bytes | bytearray | memoryview

# Handshake: greeting, client flags, options.
GREETING_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1
HANDSHAKE_FLAGS: Final = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERROR: Final = 1 << 31  # this bit set: an error, its data is text for a human
REP_ERR_UNSUP: Final = REP_ERROR | 1
REP_ERR_POLICY: Final = REP_ERROR | 2
REP_ERR_INVALID: Final = REP_ERROR | 3
REP_ERR_UNKNOWN: Final = REP_ERROR | 6
REP_ERR_SHUTDOWN: Final = REP_ERROR | 7
REP_ERR_TOO_BIG: Final = REP_ERROR | 9

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

CONTEXT_ALLOCATION: Final = "base:allocation"
CONTEXT_DIRTY: Final = "mirrord:dirty"
STATE_HOLE: Final = 1 << 0  # base:allocation
STATE_ZERO: Final = 1 << 1
STATE_DIRTY: Final = 1 << 0  # mirrord:dirty

# Transmission flags: what the export can do.
FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11

# Transmission: commands, their flags, reply chunks.
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4

CHUNK_FLAG_DONE: Final = 1 << 0
CHUNK_NONE: Final = 0
CHUNK_OFFSET_DATA: Final = 1
CHUNK_OFFSET_HOLE: Final = 2
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_IS_ERROR: Final = 1 << 15
CHUNK_ERROR: Final = CHUNK_IS_ERROR | 1
CHUNK_ERROR_OFFSET: Final = CHUNK_IS_ERROR | 2

# Layouts.
GREETING: Final = Struct(">QQH")  # magic, option magic, handshake flags
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")  # magic, option, length of its data
OPTION_REPLY: Final = Struct(">QIII")  # magic, option, reply type, length of its data
OLD_EXPORT: Final = Struct(">QH")  # answer to EXPORT_NAME: size, transmission flags
OLD_EXPORT_ZEROES: Final = bytes(124)  # follows it unless both sides said NO_ZEROES
EXPORT_INFO: Final = Struct(">HQH")  # INFO_EXPORT, size, transmission flags
BLOCK_SIZE_INFO: Final = Struct(">HIII")  # INFO_BLOCK_SIZE, minimum, preferred, largest payload
U16: Final = Struct(">H")
U32: Final = Struct(">I")
REQUEST: Final = Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie
CHUNK: Final = Struct(">IHHQI")  # magic, flags, type, cookie, length of its payload
DATA_CHUNK: Final = Struct(">IHHQIQ")  # the same, then the offset of the data that follows
HOLE: Final = Struct(">QI")  # offset, length
ERROR: Final = Struct(">IH")  # error, length of the text that follows
DESCRIPTOR: Final = Struct(">II")  # one extent: length, flags of its context

TEXT_BYTES_MAX: Final = 256  # of an error text; the protocol's "SHOULD", and CVE-2020-10761

EPERM: Final = 1
EIO: Final = 5
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

# The only errors NBD knows. ENOTSUP is an answer to FAST_ZERO alone, EOVERFLOW to DF alone, and
# ENOMEM "SHOULD NOT" be sent at all: what isn't listed becomes EIO.
_ERRORS: Final = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.EINVAL: EINVAL,
    errno.EOPNOTSUPP: EINVAL,
    errno.EOVERFLOW: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.ESHUTDOWN: ESHUTDOWN,
}


def to_wire(number: int | None, flags: int = 0) -> int:
    """Return the NBD error for an errno; `flags` are those of the command that failed."""
    if number == errno.EOPNOTSUPP and flags & CMD_FLAG_FAST_ZERO:
        return ENOTSUP
    return _ERRORS.get(number or EIO, EIO)


_ERRNOS: Final = {
    EPERM: errno.EPERM,
    EINVAL: errno.EINVAL,
    ENOSPC: errno.ENOSPC,
    EOVERFLOW: errno.EOVERFLOW,
    ENOTSUP: errno.EOPNOTSUPP,
    ESHUTDOWN: errno.ESHUTDOWN,
}


def from_wire(error: int) -> int:
    """Return this system's errno for an NBD error; what NBD doesn't define becomes EIO."""
    return _ERRNOS.get(error, errno.EIO)


def pack_option(option: int, data: bytes = b"") -> bytes:
    """Return an option as a client sends it."""
    return OPTION.pack(OPTION_MAGIC, option, len(data)) + data


def pack_option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """Return a server's reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def pack_string(text: bytes) -> bytes:
    """Return a string with its length before it."""
    return U32.pack(len(text)) + text


def pack_request(command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    """Return a request's header; a write's payload follows it."""
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def pack_error(cookie: int, error: int, text: str) -> bytes:
    """Return the one chunk of a structured reply that failed."""
    data = text.encode()[:TEXT_BYTES_MAX]
    head = CHUNK.pack(CHUNK_MAGIC, CHUNK_FLAG_DONE, CHUNK_ERROR, cookie, ERROR.size + len(data))
    return head + ERROR.pack(error, len(data)) + data
