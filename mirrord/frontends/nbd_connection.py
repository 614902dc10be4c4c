"""One NBD connection: between a transport, the protocol and the door.

Every receive brings a batch: its requests are parsed together, each is started by hand at once,
and what ends at once (the page cache had it) is answered with one send. One that waits for a single
`Completion` is carried on by hand when that has come; any other becomes a task. Both are the
server's: when the connection dies they still run to their end, and their answers are dropped.

Reading stops, and the connection stays, while

* requests or bytes in flight are at their limit (`Session.blocked`), or the server's total is;
* the client leaves more than `unread_bytes_max` of replies unread.

Interleavings: `pump` runs from a receive, from the end of a request, from a drained transport,
from the server's queue for room and from its own wish to go on, never inside itself; nothing in it
awaits. It takes one batch (64 requests, 8 MiB) and then lets others have their turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Sequence
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, cast

from mirrord.core.geometry import KIB, Extent
from mirrord.core.inbox import Inbox
from mirrord.errors import ProtocolError
from mirrord.frontends.door import Buffer, carry_on
from mirrord.nbd import wire
from mirrord.nbd.handshake import Handshake
from mirrord.nbd.session import Request, Session, cost
from mirrord.nbd.wire import CMD_FLAG_FUA, CMD_READ, CMD_WRITE
from mirrord.storage.completion import Completion

if TYPE_CHECKING:
    from mirrord.frontends.nbd_server import NbdServer

logger = logging.getLogger(__name__)

JOIN_BYTES: Final = 256 * KIB  # replies up to this are joined: one copy beats many vectors
NOTICE_BYTES: Final = 256 * KIB  # unsent above this is counted, and its end is told to us
CLOSE_S: Final = 10.0  # for a client to read its last replies, after which they are dropped
STALL_STEPS: Final = 4  # the stall is noticed within a quarter of its limit


class Connection(asyncio.BufferedProtocol):
    """What `NbdServer` makes for each client it accepts."""

    def __init__(self, server: NbdServer, number: int) -> None:
        self.id = number
        self.bytes_in = 0
        self.bytes_out = 0
        self.charged_bytes = 0  # what the server counts as held by this connection
        self.session: Session | None = None
        self._behind: set[Connection] = set()  # gone, with requests that must end before ours
        self._server = server
        self._door = server.door
        self._counters = server.counters
        self._limits = server.limits
        self._inbox = Inbox()
        self._handshake = Handshake(server.export, self._inbox, server.limits)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._gone = False  # aborted, or the transport is lost
        self._closing = False
        self._paused = False  # reading
        self._congested = False  # unsent replies above NOTICE_BYTES
        self._work_planned = False
        self._deadline: asyncio.TimerHandle | None = None  # of the handshake, then of closing
        self._stall: asyncio.TimerHandle | None = None
        self._stall_steps = 0
        self._stall_bytes_in = 0

    # For the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._gone:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=NOTICE_BYTES, low=0)
        self._deadline = self._loop.call_later(
            self._limits.handshake_s, self._drop, "handshake too slow"
        )
        self._negotiate()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._inbox.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self.bytes_in += nbytes
        self._inbox.received(nbytes)
        if self.session is not None:
            self.pump()
        else:
            self._negotiate()

    def eof_received(self) -> bool:
        """The client sends nothing more: like DISC, but a handshake simply ends."""
        if self.session is None:
            return False
        self.session.ended = True
        self.session.abandon()
        self._leave()
        self.close_if_done()
        return True

    def pause_writing(self) -> None:
        self._congested = True

    def resume_writing(self) -> None:
        self._congested = False
        self._server.changed()
        if self.session is not None and not self._closing:
            self.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._transport = None
        self._congested = False
        for timer in (self._deadline, self._stall):
            if timer is not None:
                timer.cancel()
        if self.session is not None:
            self.session.abandon()
            self._leave()
            self._account()
            logger.info(
                "left client=%d requests=%d in_flight=%d",
                self.id,
                self.session.requests,
                self.session.in_flight,
            )
        self._server.forget(self)

    # For the server.

    def left_behind(self, gone: Connection) -> None:
        """Note that the last request of a connection that is gone has ended."""
        self._behind.discard(gone)
        if not self._behind and self._paused:
            self.pump()
            self._steer()

    @property
    def has_unsent(self) -> bool:
        """Tell whether replies are on their way out."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def stop(self, *, silent: bool) -> None:
        """Refuse what comes from now on; with `silent` don't even answer it."""
        if self._transport is None or self._closing:
            return
        self._transport.set_write_buffer_limits(high=0)  # tell when all is sent
        self._handshake.stopping = True
        if self.session is None:
            if silent:
                self._close()
        elif silent:
            self.session.ended = True
            self.session.abandon()
            self._steer()
        else:
            self.session.stopping = True
            self.pump()

    def flush(self) -> None:
        """Send the replies of what has ended."""
        session = self.session
        if session is not None and session.outgoing:
            outgoing, session.outgoing = session.outgoing, []
            self._send(outgoing)
        self._account()

    def close_if_done(self) -> None:
        """Close when the client or the server is through and nothing is in flight any more."""
        session = self.session
        if session is not None and session.ended and not session.in_flight:
            self.flush()
            self._close()

    def abort(self) -> None:
        """Close now; replies that are still unsent are dropped."""
        self._gone = True
        if self._transport is not None:
            self._transport.abort()

    def pump(self) -> None:
        """Take and start the requests that have come, one batch of them."""
        session, inbox = self.session, self._inbox
        if session is None or self._closing or self._behind:
            return
        try:
            requests = session.take(self._server.room(self))
        except ProtocolError as error:
            self.flush()
            self._drop(str(error))
            return
        if requests:
            self._start(requests)
        self.flush()
        if requests and session.blocked and self._unread_bytes() < self._limits.unread_bytes_max:
            self._work_soon()
        if (
            session.blocked
            or session.ended
            or self._paused
            or self._congested
            or inbox.start != inbox.end
            or inbox.waiting
        ):
            self._steer()

    # The handshake.

    def _negotiate(self) -> None:
        handshake = self._handshake
        handshake.full = self._server.full
        try:
            handshake.advance()
        except ProtocolError as error:
            self._send(handshake.outgoing)
            self._drop(str(error))
            return
        self._send(handshake.outgoing)
        handshake.outgoing.clear()
        if handshake.ended:
            self._close()
        elif handshake.agreed is not None:
            if self._deadline is not None:
                self._deadline.cancel()
            self.session = Session(self._server.export, handshake.agreed, self._inbox, self._limits)
            self._server.entered(self)
            logger.info("came client=%d structured=%s", self.id, self.session.structured)
            self._behind = self._server.leaving
            if self._behind:
                self._steer()
            else:
                self.pump()

    # Requests.

    def _start(self, requests: list[Request]) -> None:
        """Begin every request; answer those that end at once."""
        session = cast(Session, self.session)
        read, write, moved = self._door.read, self._door.write, self._counters.moved_bytes
        begun_ns = perf_counter_ns()  # they came together, and their answers leave together
        ended: list[int] = []
        freed_bytes = 0
        work: Coroutine[Any, Any, Any]
        for request in requests:
            command, flags, cookie, offset, length, data = request
            if command == CMD_READ:
                work = read(offset, length)
            elif command == CMD_WRITE:
                work = write(offset, data, fua=flags & CMD_FLAG_FUA == CMD_FLAG_FUA)
            else:
                work = self._other(request)
            try:
                waits_for = work.send(None)
            except StopIteration as stop:
                if command == CMD_WRITE:
                    session.answer(cookie)
                    moved[CMD_WRITE] += length
                else:
                    self._answer(request, stop.value)
            except Exception as error:
                self._fail(request, error)
            else:
                self._wait(request, work, waits_for, begun_ns)
                continue
            ended.append(command)
            freed_bytes += length if command <= CMD_WRITE else cost(request)
        if ended:
            self._counters.count(ended, begun_ns)
        session.done(len(ended), freed_bytes)

    def _wait(
        self, request: Request, work: Coroutine[Any, Any, Any], waits_for: Any, begun_ns: int
    ) -> None:
        """Have the rest of a request done when what it waits for has come."""
        if type(waits_for) is Completion:
            self._server.waits(1)
            waits_for.then = partial(self._go_on, request, work, begun_ns)
        else:
            self._server.own(self._finish(request, carry_on(work, waits_for), begun_ns))

    def _go_on(self, request: Request, work: Coroutine[Any, Any, Any], begun_ns: int) -> None:
        """Take the next step by hand."""
        self._server.waits(-1)
        try:
            waits_for = work.send(None)
        except StopIteration as stop:
            self._answer(request, stop.value)
        except Exception as error:
            self._fail(request, error)
        else:
            self._wait(request, work, waits_for, begun_ns)
            return
        self._ended(request, begun_ns)

    async def _finish(self, request: Request, rest: Awaitable[Any], begun_ns: int) -> None:
        try:
            value = await rest
        except Exception as error:
            self._fail(request, error)
        else:
            self._answer(request, value)
        self._ended(request, begun_ns)

    def _ended(self, request: Request, begun_ns: int) -> None:
        session = cast(Session, self.session)
        self._counters.count([request.command], begun_ns)
        session.done(1, cost(request))
        if session.ended and not session.in_flight:
            self._server.settled(self)
        self._work_soon()  # others may end in this turn of the loop

    def _leave(self) -> None:
        """Have those that come now wait for what this connection still has in flight."""
        session = cast(Session, self.session)
        session.ended = True
        if session.in_flight:
            self._server.leave(self)

    def _work_soon(self) -> None:
        if not self._work_planned:
            self._work_planned = True
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        """Send what has ended, and go on with what waits."""
        self._work_planned = False
        session = cast(Session, self.session)
        if self._gone or self._closing:
            session.outgoing.clear()
            self._account()
        elif session.blocked:
            self.pump()
        else:
            self.flush()
            self._steer()

    def _answer(self, request: Request, value: Any) -> None:
        session = cast(Session, self.session)
        if request.command == CMD_READ:
            data = cast(Buffer, value)
            if len(data) != request.length:  # sent as it is, it would be taken for a reply
                raised = RuntimeError(f"read {len(data)} bytes instead of {request.length}")
                self._fail(request, raised)
                return
            session.answer_read(request.cookie, request.offset, data)
        elif request.command == wire.CMD_BLOCK_STATUS:
            session.answer_status(request, cast(dict[str, Sequence[Extent]], value))
        else:
            session.answer(request.cookie)
        self._counters.moved_bytes[request.command] += request.length

    def _fail(self, request: Request, error: Exception) -> None:
        """Answer with the error's errno; anything but an OSError is a defect, told as EIO."""
        number = error.errno if isinstance(error, OSError) else None
        if not isinstance(error, OSError):
            logger.error("failed command=%d", request.command, exc_info=error)
        code = wire.to_wire(number, request.flags)
        if code != wire.ENOTSUP:  # what a fast zero asks for: no failure of the disk's
            self._counters.errors[request.command] += 1
        cast(Session, self.session).answer_error(request.command, request.cookie, code)

    def _other(self, request: Request) -> Coroutine[Any, Any, Any]:
        command, flags, _cookie, offset, length, _data = request
        door, fua = self._door, bool(flags & CMD_FLAG_FUA)
        if command == wire.CMD_FLUSH:
            return door.flush()
        if command == wire.CMD_TRIM:
            return door.trim(offset, length, fua=fua)
        if command == wire.CMD_CACHE:
            return door.cache(offset, length)
        if command == wire.CMD_WRITE_ZEROES:
            punch, fast = not flags & wire.CMD_FLAG_NO_HOLE, bool(flags & wire.CMD_FLAG_FAST_ZERO)
            return door.write_zeroes(offset, length, fua=fua, punch=punch, fast=fast)
        return self._status(offset, length)

    async def _status(self, offset: int, length: int) -> dict[str, Sequence[Extent]]:
        """Return the extents of every context the client selected."""
        found: dict[str, Sequence[Extent]] = {}
        for name in cast(Session, self.session).contexts:
            if name == wire.CONTEXT_ALLOCATION:
                found[name] = await self._door.extents(offset, length)
            else:
                found[name] = self._door.dirty_extents(offset, length)
        return found

    # Sending, and when to read on.

    def _send(self, outgoing: Sequence[Buffer]) -> None:
        transport = self._transport
        if transport is None or self._gone or self._closing or not outgoing:
            return
        size = sum(map(len, outgoing))
        self.bytes_out += size
        if size <= JOIN_BYTES:
            transport.write(b"".join(outgoing))
        else:
            transport.writelines(outgoing)

    def _unread_bytes(self) -> int:
        if not self._congested or self._transport is None:
            return 0
        return self._transport.get_write_buffer_size()

    def _account(self) -> None:
        """Tell the server what this connection holds now."""
        held = self.session.held_bytes if self.session is not None else 0
        if self._congested:
            held += self._unread_bytes()
        if held != self.charged_bytes:
            delta, self.charged_bytes = held - self.charged_bytes, held
            self._server.charge(delta)

    def _steer(self) -> None:
        """Read on or stop reading; watch a request that has come in part; close when through."""
        session, transport = self.session, self._transport
        if session is None or transport is None or self._closing:
            return
        pause = (
            bool(self._behind)
            or session.blocked
            or session.ended
            or self._unread_bytes() >= self._limits.unread_bytes_max
        )
        if pause != self._paused:
            self._paused = pause
            if pause:
                transport.pause_reading()
            else:
                transport.resume_reading()
        own_room = self._limits.held_bytes_max - session.held_bytes
        self._server.queue(self, session.blocked and self._server.room(self) < own_room)
        if session.mid_request and self._stall is None:
            self._watch_stall()
        self.close_if_done()

    def _watch_stall(self) -> None:
        self._stall_steps, self._stall_bytes_in = 0, self.bytes_in
        step_s = self._limits.stall_s / STALL_STEPS
        self._stall = self._loop.call_later(step_s, self._check_stall, step_s)

    def _check_stall(self, step_s: float) -> None:
        session = cast(Session, self.session)
        self._stall = None
        if self._closing or not session.mid_request:
            return
        if self._paused or self.bytes_in != self._stall_bytes_in:
            self._watch_stall()
            return
        self._stall_steps += 1
        if self._stall_steps >= STALL_STEPS:
            self._drop("stalled inside a request")
        else:
            self._stall = self._loop.call_later(step_s, self._check_stall, step_s)

    def _drop(self, reason: str) -> None:
        logger.info("dropped client=%d reason=%s", self.id, reason)
        if self.session is not None:
            self.session.ended = True
        self._close()

    def _close(self) -> None:
        """Close once what was sent has left; a client that doesn't read gets `CLOSE_S` for it."""
        if self._transport is None or self._closing:
            return
        self._closing = True
        self._server.queue(self, waits=False)
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._loop.call_later(CLOSE_S, self.abort)
        self._transport.close()
