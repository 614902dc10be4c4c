"""The server's half of the handshake: from the greeting to what both sides agreed on. Pure.

Fixed newstyle without TLS. Whatever a client sends is answered or ends its connection; nothing
is opened and no session exists before `agreed` is set. Names are compared as bytes and never
echoed. The bytes behind the last option stay in the inbox: they are requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from mirrord.core.inbox import Inbox
from mirrord.errors import ProtocolError
from mirrord.nbd import wire
from mirrord.nbd.limits import Limits

PREFERRED_BLOCK_BYTES: Final = 4096  # a page, and the granularity of the dirty bitmap
CONTEXT_IDS: Final = {wire.CONTEXT_ALLOCATION: 1, wire.CONTEXT_DIRTY: 2}

_COMMON_FLAGS: Final = (
    wire.FLAG_HAS_FLAGS
    | wire.FLAG_SEND_FLUSH
    | wire.FLAG_SEND_FUA
    | wire.FLAG_SEND_CACHE
    | wire.FLAG_CAN_MULTI_CONN  # one door for all connections: a flush covers every one
)
_WRITE_FLAGS: Final = wire.FLAG_SEND_TRIM | wire.FLAG_SEND_WRITE_ZEROES | wire.FLAG_SEND_FAST_ZERO


@dataclass(frozen=True, slots=True)
class Export:
    """A disk as offered: the empty name means it too."""

    name: str
    size: int
    read_only: bool = False
    description: str = ""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the session is to speak."""

    structured: bool
    contexts: tuple[str, ...]  # selected for block status, in the order of their ids


class _MalformedError(Exception):
    """An option whose data doesn't add up: the client is told so and may go on."""


class Handshake:
    """Parse options from `inbox`, put answers into `outgoing`.

    `outgoing` starts with the greeting; the owner sends and empties it after every call, also
    after one that raised. `full` and `stopping` are the owner's: no room for another client, and
    the server is going down.
    """

    def __init__(self, export: Export, inbox: Inbox, limits: Limits) -> None:
        self.agreed: Agreed | None = None
        self.ended = False  # the client said ABORT: send what is outgoing, then close
        self.full = False
        self.stopping = False
        greeting = wire.GREETING.pack(wire.GREETING_MAGIC, wire.OPTION_MAGIC, wire.HANDSHAKE_FLAGS)
        self.outgoing: list[bytes] = [greeting]
        self._export = export
        self._name = export.name.encode()
        self._inbox = inbox
        self._limits = limits
        self._client_flags: int | None = None
        self._options = 0
        self._structured = False
        self._contexts: tuple[str, ...] = ()
        self._option = 0  # the one being answered

    def advance(self) -> None:
        """Handle every whole option in the inbox, until agreed or ended.

        Raises: ProtocolError when the connection must be closed.
        """
        while self.agreed is None and not self.ended and self._step():
            pass

    def _step(self) -> bool:
        inbox = self._inbox
        have = inbox.end - inbox.start
        if self._client_flags is None:
            if have < wire.CLIENT_FLAGS.size:
                return False
            (flags,) = wire.CLIENT_FLAGS.unpack_from(inbox.data, inbox.start)
            if flags & ~wire.HANDSHAKE_FLAGS:
                raise ProtocolError(f"unknown client flags {flags:#x}")
            self._client_flags = flags
            inbox.start += wire.CLIENT_FLAGS.size
            return True
        if have < wire.OPTION.size:
            return False
        magic, option, length = wire.OPTION.unpack_from(inbox.data, inbox.start)
        if magic != wire.OPTION_MAGIC:
            raise ProtocolError(f"an option starts with {magic:#x}")
        if length > self._limits.option_bytes_max:
            raise ProtocolError(f"an option of {length} bytes")
        if have < wire.OPTION.size + length:
            return False
        self._options += 1
        if self._options > self._limits.options_max:
            raise ProtocolError(f"more than {self._limits.options_max} options")
        start = inbox.start + wire.OPTION.size
        inbox.start = start + length
        self._answer(option, bytes(inbox.data[start : start + length]))
        return True

    def _answer(self, option: int, data: bytes) -> None:
        self._option = option
        handler = _HANDLERS.get(option)
        if self.stopping and option not in (wire.OPT_ABORT, wire.OPT_EXPORT_NAME):
            self._reply(wire.REP_ERR_SHUTDOWN, b"the server is stopping")
        elif handler is None:
            self._reply(wire.REP_ERR_UNSUP, b"unknown option")
        else:
            try:
                handler(self, data)
            except _MalformedError as error:
                self._reply(wire.REP_ERR_INVALID, str(error).encode())

    def _reply(self, reply: int, data: bytes = b"") -> None:
        self.outgoing.append(wire.pack_option_reply(self._option, reply, data))

    def _is_ours(self, name: bytes) -> bool:
        return name in (b"", self._name)

    def _transmission_flags(self) -> int:
        flags = _COMMON_FLAGS
        flags |= wire.FLAG_READ_ONLY if self._export.read_only else _WRITE_FLAGS
        return flags | (wire.FLAG_SEND_DF if self._structured else 0)

    # One method an option.

    def _export_name(self, name: bytes) -> None:
        """It has no error replies: what can't be granted ends the connection."""
        if len(name) > self._limits.name_bytes_max:
            raise ProtocolError(f"an export name of {len(name)} bytes")
        if not self._is_ours(name):
            raise ProtocolError("unknown export")
        if self.full or self.stopping:
            raise ProtocolError("no room for another client")
        self.outgoing.append(wire.OLD_EXPORT.pack(self._export.size, self._transmission_flags()))
        if not (self._client_flags or 0) & wire.FLAG_NO_ZEROES:
            self.outgoing.append(wire.OLD_EXPORT_ZEROES)
        self.agreed = Agreed(self._structured, self._contexts)

    def _abort(self, data: bytes) -> None:
        self._reply(wire.REP_ACK)
        self.ended = True

    def _list(self, data: bytes) -> None:
        _expect_empty(data)
        self._reply(wire.REP_SERVER, wire.pack_string(self._name))
        self._reply(wire.REP_ACK)

    def _start_tls(self, data: bytes) -> None:
        self._reply(wire.REP_ERR_POLICY, b"no TLS on this socket")

    def _structured_reply(self, data: bytes) -> None:
        _expect_empty(data)
        self._structured = True
        self._reply(wire.REP_ACK)

    def _info(self, data: bytes) -> None:
        if self._describe(data):
            self._reply(wire.REP_ACK)

    def _go(self, data: bytes) -> None:
        if self.full:
            self._reply(wire.REP_ERR_POLICY, b"too many clients use this export")
        elif self._describe(data):
            self._reply(wire.REP_ACK)
            self.agreed = Agreed(self._structured, self._contexts)

    def _describe(self, data: bytes) -> bool:
        """Send the information about the export that `data` names; False when there is none."""
        name, at = self._string(data, 0)
        wanted = self._wanted(data, at)
        if not self._is_ours(name):
            self._reply(wire.REP_ERR_UNKNOWN, b"no export of this name")
            return False
        size, payload = self._export.size, self._limits.payload_bytes_max
        info = wire.EXPORT_INFO.pack(wire.INFO_EXPORT, size, self._transmission_flags())
        self._reply(wire.REP_INFO, info)
        sizes = wire.BLOCK_SIZE_INFO.pack(wire.INFO_BLOCK_SIZE, 1, PREFERRED_BLOCK_BYTES, payload)
        self._reply(wire.REP_INFO, sizes)
        if wire.INFO_NAME in wanted:
            self._reply(wire.REP_INFO, wire.U16.pack(wire.INFO_NAME) + self._name)
        if wire.INFO_DESCRIPTION in wanted and self._export.description:
            text = self._export.description.encode()[: self._limits.name_bytes_max]
            self._reply(wire.REP_INFO, wire.U16.pack(wire.INFO_DESCRIPTION) + text)
        return True

    def _wanted(self, data: bytes, at: int) -> set[int]:
        if len(data) < at + wire.U16.size:
            raise _MalformedError("the count of information requests is missing")
        (count,) = wire.U16.unpack_from(data, at)
        rest = data[at + wire.U16.size :]
        if len(rest) != count * wire.U16.size:
            raise _MalformedError("the count of information requests is wrong")
        return {number for (number,) in wire.U16.iter_unpack(rest)}

    def _string(self, data: bytes, at: int) -> tuple[bytes, int]:
        """Return the string at `at` and where the next thing starts."""
        if len(data) < at + wire.U32.size:
            raise _MalformedError("a length is missing")
        (length,) = wire.U32.unpack_from(data, at)
        at += wire.U32.size
        if length > self._limits.name_bytes_max:
            raise _MalformedError("a string is longer than 4096 bytes")
        if len(data) < at + length:
            raise _MalformedError("a string is longer than the option")
        return data[at : at + length], at + length

    # Metadata contexts.

    def _list_contexts(self, data: bytes) -> None:
        queries = self._queries(data)
        if queries is None:
            return
        for context in CONTEXT_IDS:
            namespace = context.split(":")[0].encode() + b":"
            if not queries or context.encode() in queries or namespace in queries:
                self._reply(wire.REP_META_CONTEXT, wire.U32.pack(0) + context.encode())
        self._reply(wire.REP_ACK)

    def _set_contexts(self, data: bytes) -> None:
        self._contexts = ()  # also when this option fails
        queries = self._queries(data)
        if queries is None:
            return
        self._contexts = tuple(name for name in CONTEXT_IDS if name.encode() in queries)
        for name in self._contexts:
            number = wire.U32.pack(CONTEXT_IDS[name])
            self._reply(wire.REP_META_CONTEXT, number + name.encode())
        self._reply(wire.REP_ACK)

    def _queries(self, data: bytes) -> set[bytes] | None:
        """Return the queries of a context option; None when it was answered with an error."""
        if not self._structured:
            raise _MalformedError("structured replies come first")
        name, at = self._string(data, 0)
        if len(data) < at + wire.U32.size:
            raise _MalformedError("the count of queries is missing")
        (count,) = wire.U32.unpack_from(data, at)
        at += wire.U32.size
        if count > self._limits.contexts_max:
            self._reply(wire.REP_ERR_TOO_BIG, b"too many queries")
            return None
        queries = set()
        for _ in range(count):
            query, at = self._string(data, at)
            queries.add(query)
        if at != len(data):
            raise _MalformedError("bytes behind the last query")
        if not self._is_ours(name):
            self._reply(wire.REP_ERR_UNKNOWN, b"no export of this name")
            return None
        return queries


def _expect_empty(data: bytes) -> None:
    if data:
        raise _MalformedError("this option has no data")


_HANDLERS: Final[Mapping[int, Callable[[Handshake, bytes], None]]] = {
    wire.OPT_EXPORT_NAME: Handshake._export_name,
    wire.OPT_ABORT: Handshake._abort,
    wire.OPT_LIST: Handshake._list,
    wire.OPT_STARTTLS: Handshake._start_tls,
    wire.OPT_INFO: Handshake._info,
    wire.OPT_GO: Handshake._go,
    wire.OPT_STRUCTURED_REPLY: Handshake._structured_reply,
    wire.OPT_LIST_META_CONTEXT: Handshake._list_contexts,
    wire.OPT_SET_META_CONTEXT: Handshake._set_contexts,
}
