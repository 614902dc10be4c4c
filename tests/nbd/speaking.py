"""Speaking NBD by hand: what the tests of the protocol modules send, and how bytes are cut.

`Server` drives handshake and session as a connection does, without one: it answers each request
from a small disk in memory as soon as it is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mirrord.core.geometry import Extent, Status
from mirrord.core.inbox import Inbox
from mirrord.errors import ProtocolError
from mirrord.nbd import wire
from mirrord.nbd.handshake import Export, Handshake
from mirrord.nbd.limits import Limits
from mirrord.nbd.session import Request, Session, cost

SIZE = 1 << 20
EXPORT = Export("disk", SIZE, description="a test disk")
LIMITS = Limits()
NO_LIMIT = 1 << 40


def flags(value: int = 3) -> bytes:
    """Return the client flags."""
    return wire.CLIENT_FLAGS.pack(value)


def go(name: bytes = b"disk", infos: Sequence[int] = (), option: int = wire.OPT_GO) -> bytes:
    """Return GO or INFO."""
    wanted = b"".join(map(wire.U16.pack, infos))
    return wire.pack_option(option, wire.pack_string(name) + wire.U16.pack(len(infos)) + wanted)


def contexts(
    queries: Sequence[bytes], name: bytes = b"disk", option: int = wire.OPT_SET_META_CONTEXT
) -> bytes:
    """Return SET_META_CONTEXT or LIST_META_CONTEXT."""
    data = wire.pack_string(name) + wire.U32.pack(len(queries))
    return wire.pack_option(option, data + b"".join(map(wire.pack_string, queries)))


STRUCTURED = wire.pack_option(wire.OPT_STRUCTURED_REPLY)


def put(inbox: Inbox, data: bytes) -> int:
    """Receive as much of `data` as the inbox takes at once; return how much."""
    buffer = inbox.buffer()
    count = min(len(buffer), len(data))
    buffer[:count] = data[:count]
    inbox.received(count)
    return count


def cut(data: bytes, sizes: Iterable[int]) -> list[bytes]:
    """Cut `data` into pieces of these sizes, and one of what is left."""
    pieces, at = [], 0
    for size in sizes:
        if at < len(data):
            pieces.append(data[at : at + size])
            at += size
    return [*pieces, data[at:]] if at < len(data) else pieces


@dataclass
class Server:
    """A connection without a socket."""

    export: Export = EXPORT
    limits: Limits = LIMITS
    disk: bytearray = field(default_factory=lambda: bytearray(SIZE))
    sent: bytes = b""
    taken: list[Request] = field(default_factory=list)
    error: ProtocolError | None = None
    session: Session | None = None

    def __post_init__(self) -> None:
        self.inbox = Inbox()
        self.handshake = Handshake(self.export, self.inbox, self.limits)
        self._collect(self.handshake.outgoing)

    def receive(self, data: bytes) -> None:
        """Receive all of `data`, in as many steps as the inbox wants."""
        while data and self.error is None and not self.over:
            data = data[put(self.inbox, data) :]
            try:
                self._advance()
            except ProtocolError as error:
                self.error = error

    @property
    def over(self) -> bool:
        """Tell whether the client said goodbye."""
        return self.handshake.ended or (self.session is not None and self.session.ended)

    def _advance(self) -> None:
        if self.session is None:
            try:
                self.handshake.advance()
            finally:
                self._collect(self.handshake.outgoing)
            if self.handshake.agreed is None:
                return
            self.session = Session(self.export, self.handshake.agreed, self.inbox, self.limits)
        try:
            while (requests := self.session.take(NO_LIMIT)) or self.session.blocked:
                for request in requests:
                    self._answer(self.session, request)
        finally:
            self._collect(self.session.outgoing)

    def _answer(self, session: Session, request: Request) -> None:
        self.taken.append(request)
        stop = request.offset + request.length
        if request.command == wire.CMD_WRITE:
            self.disk[request.offset : stop] = request.data
            session.answer(request.cookie)
        elif request.command == wire.CMD_READ:
            data = bytes(self.disk[request.offset : stop])
            session.answer_read(request.cookie, request.offset, data)
        elif request.command == wire.CMD_BLOCK_STATUS:
            extents = [Extent(request.offset, request.length, Status.DATA)]
            session.answer_status(request, dict.fromkeys(session.contexts, extents))
        else:
            session.answer(request.cookie)
        session.done(1, cost(request))

    def _collect(self, outgoing: list[bytes] | list[wire.Buffer]) -> None:
        self.sent += b"".join(outgoing)
        outgoing.clear()

    def option_replies(self) -> list[tuple[int, int, bytes]]:
        """Return the option replies that were sent: option, reply, data."""
        found, at = [], wire.GREETING.size
        while at < len(self.sent):
            magic, option, reply, length = wire.OPTION_REPLY.unpack_from(self.sent, at)
            if magic != wire.OPTION_REPLY_MAGIC:
                break
            at += wire.OPTION_REPLY.size
            found.append((option, reply, self.sent[at : at + length]))
            at += length
        return found


def in_transmission(*, structured: bool = True, **changes: object) -> Server:
    """Return a server past its handshake, whose `sent` is empty."""
    server = Server(**changes)  # type: ignore[arg-type]
    name = wire.CONTEXT_ALLOCATION.encode()
    selected = contexts([name, wire.CONTEXT_DIRTY.encode()]) if structured else b""
    server.receive(flags() + (STRUCTURED if structured else b"") + selected + go())
    assert server.session is not None
    server.sent = b""
    return server


def simple(cookie: int, error: int = 0) -> bytes:
    """Return a simple reply."""
    return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, cookie)
