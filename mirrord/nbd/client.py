"""The client's end of NBD, handshake and transmission, without a socket. Pure.

For the demo's writer, for tests, and for a disk that lies on another NBD server. The server is
not trusted: what it sends is checked against what was asked, memory is bounded by what was asked,
and whatever is wrong raises ProtocolError (libnbd was taken over by a server in 2019; sizes above
2^63 and lying chunks were CVE-2023-5215 and CVE-2023-5871).

No TLS: a server that insists on it refuses the export.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from mirrord.core.geometry import KIB
from mirrord.core.inbox import Inbox
from mirrord.errors import ProtocolError
from mirrord.nbd import wire
from mirrord.nbd.wire import Buffer

SIZE_MAX: Final = (1 << 63) - 1  # the largest offset a file can have
OPTION_REPLY_BYTES_MAX: Final = 64 * KIB  # names are 4 KiB at most
OPTION_REPLIES_MAX: Final = 256  # in one handshake; a dozen is usual
TEXT_MAX: Final = 4096  # the protocol's limit of a string
STATUS_BYTES_MAX: Final = 4 + (8 << 20)  # 2^20 extents: the protocol's limit
CHUNKS_MAX: Final = 4096  # of data in one reply; a server has no reason for more

Extents = list[tuple[int, int]]  # (length, flags of the context)


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What the server said about the export."""

    size: int
    flags: int
    block_bytes: tuple[int, int, int] = (1, 4096, 32 << 20)  # minimum, preferred, largest payload


@dataclass(slots=True)
class Reply:
    """The answer to one request. `error` is an NBD error, 0 for success."""

    cookie: int
    error: int = 0
    text: str = ""
    data: bytearray | None = None  # of a read
    extents: dict[str, Extents] = field(default_factory=dict)  # of block status, by context


@dataclass(slots=True)
class _Pending:
    """A request without its answer, and what has come of it."""

    command: int
    offset: int
    length: int
    reply: Reply
    ranges: list[tuple[int, int]] = field(default_factory=list)  # (start, stop) read, sorted
    left: int = 0  # bytes of a read that are still missing


class ClientSession:
    """One connection to an export.

    The owner sends and empties `outgoing`, receives into `buffer()`, and calls `received`, which
    returns the answers that came with it. `info` is set when the handshake is over, `refused`
    when the server doesn't give the export. `structured` and `contexts` are what is asked for,
    and after the handshake what was agreed on.
    """

    def __init__(
        self,
        export: str,
        *,
        structured: bool = True,
        contexts: Sequence[str] = (wire.CONTEXT_ALLOCATION,),
    ) -> None:
        self.outgoing: list[Buffer] = []
        self.info: ExportInfo | None = None
        self.refused: str | None = None
        self.structured = structured
        self.contexts: dict[int, str] = {}  # by the number the server gave it
        self._wanted = tuple(contexts)
        self._export = export.encode()
        self._inbox = Inbox()
        self._step: Callable[[], bool] = self._greeting
        self._option = 0
        self._option_replies = 0
        self._offered: ExportInfo | None = None
        self._block_bytes = (1, 4096, 32 << 20)
        self._pending: dict[int, _Pending] = {}
        self._next_cookie = 1
        self._replies: list[Reply] = []
        self._when_filled: Callable[[], None] | None = None

    @property
    def in_flight(self) -> int:
        """Return how many requests have no answer yet."""
        return len(self._pending)

    def buffer(self) -> memoryview:
        """Return where the next bytes go."""
        return self._inbox.buffer()

    def received(self, count: int) -> list[Reply]:
        """Handle `count` bytes that came; return the answers that are complete now.

        Raises: ProtocolError when the connection must be closed.
        """
        inbox = self._inbox
        inbox.received(count)
        while not inbox.waiting and self.refused is None:
            if self._when_filled is not None:
                then, self._when_filled = self._when_filled, None
                then()
            elif not self._step():
                break
        replies, self._replies = self._replies, []
        return replies

    # Requests. Each returns its cookie.

    def read(self, offset: int, length: int, *, flags: int = 0) -> int:
        """Ask for `length` bytes."""
        pending = self._ask(wire.CMD_READ, offset, length, flags)
        pending.reply.data = bytearray(length)
        pending.left = length
        return pending.reply.cookie

    def write(self, offset: int, data: Buffer, *, flags: int = 0) -> int:
        """Write `data`, which must not change until it is sent."""
        pending = self._ask(wire.CMD_WRITE, offset, len(data), flags)
        self.outgoing.append(data)
        return pending.reply.cookie

    def command(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0) -> int:
        """Send any command without a payload: flush, trim, write zeroes, cache, block status."""
        return self._ask(command, offset, length, flags).reply.cookie

    def disconnect(self) -> None:
        """Say goodbye: the server finishes what is in flight and closes."""
        self.outgoing.append(wire.pack_request(wire.CMD_DISC, 0, 0, 0))

    def _ask(self, command: int, offset: int, length: int, flags: int) -> _Pending:
        cookie = self._next_cookie
        self._next_cookie += 1
        self.outgoing.append(wire.pack_request(command, cookie, offset, length, flags))
        pending = _Pending(command, offset, length, Reply(cookie))
        self._pending[cookie] = pending
        return pending

    # The handshake.

    def _greeting(self) -> bool:
        inbox = self._inbox
        if inbox.end - inbox.start < wire.GREETING.size:
            return False
        magic, option_magic, flags = wire.GREETING.unpack_from(inbox.data, inbox.start)
        inbox.start += wire.GREETING.size
        if (magic, option_magic) != (wire.GREETING_MAGIC, wire.OPTION_MAGIC):
            raise ProtocolError("not an NBD server")
        if not flags & wire.FLAG_FIXED_NEWSTYLE:
            raise ProtocolError("the server knows no options")
        self.outgoing.append(wire.CLIENT_FLAGS.pack(flags & wire.HANDSHAKE_FLAGS))
        self._step = self._option_reply
        if self.structured:
            self._send_option(wire.OPT_STRUCTURED_REPLY)
        else:
            self._go()
        return True

    def _send_option(self, option: int, data: bytes = b"") -> None:
        self._option = option
        self.outgoing.append(wire.pack_option(option, data))

    def _go(self) -> None:
        wanted = wire.U16.pack(1) + wire.U16.pack(wire.INFO_BLOCK_SIZE)
        self._send_option(wire.OPT_GO, wire.pack_string(self._export) + wanted)

    def _set_contexts(self) -> None:
        queries = b"".join(wire.pack_string(name.encode()) for name in self._wanted)
        count = wire.U32.pack(len(self._wanted))
        data = wire.pack_string(self._export) + count + queries
        self._send_option(wire.OPT_SET_META_CONTEXT, data)

    def _option_reply(self) -> bool:
        inbox = self._inbox
        have = inbox.end - inbox.start
        if have < wire.OPTION_REPLY.size:
            return False
        magic, option, kind, length = wire.OPTION_REPLY.unpack_from(inbox.data, inbox.start)
        if magic != wire.OPTION_REPLY_MAGIC or option != self._option:
            raise ProtocolError("not a reply to the option that was sent")
        if length > OPTION_REPLY_BYTES_MAX:
            raise ProtocolError(f"an option reply of {length} bytes")
        if have < wire.OPTION_REPLY.size + length:
            return False
        self._option_replies += 1
        if self._option_replies > OPTION_REPLIES_MAX:
            raise ProtocolError("too many option replies")
        start = inbox.start + wire.OPTION_REPLY.size
        inbox.start = start + length
        data = bytes(inbox.data[start : start + length])
        if option == wire.OPT_GO:
            self._go_replied(kind, data)
        elif kind == wire.REP_META_CONTEXT and option == wire.OPT_SET_META_CONTEXT:
            self._add_context(data)
        elif kind == wire.REP_ACK or kind & wire.REP_ERROR:
            self._option_ended(option, kind == wire.REP_ACK)
        else:
            raise ProtocolError(f"option {option} was answered with {kind:#x}")
        return True

    def _option_ended(self, option: int, granted: bool) -> None:
        if option == wire.OPT_STRUCTURED_REPLY:
            self.structured = granted
            if granted and self._wanted:
                self._set_contexts()
                return
        elif not granted:
            self.contexts.clear()
        self._go()

    def _add_context(self, data: bytes) -> None:
        number = int.from_bytes(data[:4], "big")
        name = data[4:].decode(errors="replace")
        known = number in self.contexts or name in self.contexts.values()
        if len(data) < 4 or name not in self._wanted or known:
            raise ProtocolError("a context that was not asked for")
        self.contexts[number] = name

    def _go_replied(self, kind: int, data: bytes) -> None:
        if kind & wire.REP_ERROR:
            text = data[: wire.TEXT_BYTES_MAX].decode(errors="replace")
            self.refused = text or f"error {kind & ~wire.REP_ERROR}"
        elif kind == wire.REP_INFO:
            self._add_info(data)
        elif kind == wire.REP_ACK and self._offered is not None:
            offered = self._offered
            self.info = ExportInfo(offered.size, offered.flags, self._block_bytes)
            self._step = self._reply
        else:
            raise ProtocolError(f"the export was answered with {kind:#x}")

    def _add_info(self, data: bytes) -> None:
        kind = int.from_bytes(data[:2], "big")
        if len(data) == wire.EXPORT_INFO.size and kind == wire.INFO_EXPORT:
            _, size, flags = wire.EXPORT_INFO.unpack(data)
            if size > SIZE_MAX:
                raise ProtocolError(f"an export of {size} bytes")
            self._offered = ExportInfo(size, flags)
        elif len(data) == wire.BLOCK_SIZE_INFO.size and kind == wire.INFO_BLOCK_SIZE:
            _, least, preferred, most = wire.BLOCK_SIZE_INFO.unpack(data)
            if least < 1 or least & (least - 1) or preferred < least or most < least:
                raise ProtocolError(f"block sizes {least}, {preferred}, {most}")
            self._block_bytes = (least, preferred, most)
        elif len(data) < 2 or kind in (wire.INFO_EXPORT, wire.INFO_BLOCK_SIZE):
            raise ProtocolError("information of a wrong length")

    # Replies.

    def _reply(self) -> bool:
        inbox = self._inbox
        have = inbox.end - inbox.start
        if have < wire.SIMPLE_REPLY.size:
            return False
        magic, error, cookie = wire.SIMPLE_REPLY.unpack_from(inbox.data, inbox.start)
        if magic == wire.SIMPLE_REPLY_MAGIC:
            inbox.start += wire.SIMPLE_REPLY.size
            self._simple(self._find(cookie), error)
            return True
        if magic != wire.CHUNK_MAGIC or not self.structured:
            raise ProtocolError(f"a reply starts with {magic:#x}")
        if have < wire.CHUNK.size:
            return False
        _, flags, kind, cookie, length = wire.CHUNK.unpack_from(inbox.data, inbox.start)
        pending = self._find(cookie)
        done = bool(flags & wire.CHUNK_FLAG_DONE)
        if kind == wire.CHUNK_OFFSET_DATA:
            if have < wire.DATA_CHUNK.size:
                return False
            *_, offset = wire.DATA_CHUNK.unpack_from(inbox.data, inbox.start)
            inbox.start += wire.DATA_CHUNK.size
            target = self._claim(pending, offset, length - 8)
            self._receive(target, lambda: self._end_chunk(pending, done))
            return True
        inbox.start += wire.CHUNK.size
        _check_chunk(kind, length, done)
        payload = bytearray(length)
        self._receive(memoryview(payload), lambda: self._chunk(pending, kind, payload, done))
        return True

    def _receive(self, target: memoryview, then: Callable[[], None]) -> None:
        if self._inbox.fill(target):
            then()
        else:
            self._when_filled = then

    def _find(self, cookie: int) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise ProtocolError("a reply to nothing that was asked")
        return pending

    def _end(self, pending: _Pending) -> None:
        del self._pending[pending.reply.cookie]
        if pending.reply.error:
            pending.reply.data = None
        self._replies.append(pending.reply)

    def _simple(self, pending: _Pending, error: int) -> None:
        reading = pending.command == wire.CMD_READ
        status = pending.command == wire.CMD_BLOCK_STATUS
        if (reading and self.structured) or (status and not error):
            raise ProtocolError("a simple reply where chunks were agreed on")
        pending.reply.error = error
        if reading and not error and pending.length:
            target = self._claim(pending, pending.offset, pending.length)
            self._receive(target, lambda: self._end(pending))
        else:
            self._end(pending)

    def _claim(self, pending: _Pending, offset: int, length: int) -> memoryview:
        """Return where a part of a read's data goes, if it was asked for and came once."""
        start = offset - pending.offset
        data = pending.reply.data
        if data is None or length < 1 or start < 0 or start + length > pending.length:
            raise ProtocolError("data that was not asked for")
        ranges = pending.ranges
        at = bisect(ranges, (start,))
        after = ranges[at][0] if at < len(ranges) else pending.length
        before = ranges[at - 1][1] if at else 0
        if start < before or start + length > after or len(ranges) >= CHUNKS_MAX:
            raise ProtocolError("chunks that overlap, or too many of them")
        ranges.insert(at, (start, start + length))
        pending.left -= length
        return memoryview(data)[start : start + length]

    def _chunk(self, pending: _Pending, kind: int, payload: bytearray, done: bool) -> None:
        if kind & wire.CHUNK_IS_ERROR:
            error, length = wire.ERROR.unpack_from(payload)
            if not error or wire.ERROR.size + length > len(payload):
                raise ProtocolError("an error chunk that contradicts itself")
            if not pending.reply.error:
                text = payload[wire.ERROR.size : wire.ERROR.size + length]
                pending.reply.error, pending.reply.text = error, text.decode(errors="replace")
        elif kind == wire.CHUNK_OFFSET_HOLE:
            offset, length = wire.HOLE.unpack(payload)
            self._claim(pending, offset, length)  # the data is zeroes already
        elif kind == wire.CHUNK_BLOCK_STATUS:
            self._add_extents(pending, payload)
        self._end_chunk(pending, done)

    def _add_extents(self, pending: _Pending, payload: bytearray) -> None:
        (number,) = wire.U32.unpack_from(payload)
        name = self.contexts.get(number)
        found = pending.reply.extents
        if pending.command != wire.CMD_BLOCK_STATUS or name is None or name in found:
            raise ProtocolError("block status that was not asked for")
        left = pending.length
        extents: Extents = []
        for length, flags in wire.DESCRIPTOR.iter_unpack(payload[4:]):
            if not length or not left:
                raise ProtocolError("an empty extent, or one past the request")
            extents.append((min(length, left), flags))  # the last one may reach past it
            left -= extents[-1][0]
        found[name] = extents

    def _end_chunk(self, pending: _Pending, done: bool) -> None:
        if not done:
            return
        reply = pending.reply
        missing = len(reply.extents) < len(self.contexts)
        if pending.command != wire.CMD_BLOCK_STATUS:
            missing = pending.left > 0
        if missing and not reply.error:
            raise ProtocolError("a reply ended before all of it came")
        self._end(pending)


def _check_chunk(kind: int, length: int, done: bool) -> None:
    """Check a chunk's length before memory is reserved for it."""
    if kind & wire.CHUNK_IS_ERROR:
        fits = wire.ERROR.size <= length <= wire.ERROR.size + TEXT_MAX + 8
    elif kind == wire.CHUNK_OFFSET_HOLE:
        fits = length == wire.HOLE.size
    elif kind == wire.CHUNK_BLOCK_STATUS:
        fits = 12 <= length <= STATUS_BYTES_MAX and length % 8 == 4
    else:
        fits = kind == wire.CHUNK_NONE and not length and done
    if not fits:
        raise ProtocolError(f"a chunk of type {kind} with {length} bytes")
