"""A line: one TCP connection of a session, between a socket and the protocol's `Channel`.

smbprotocol negotiates and authenticates through it, in a thread of its own, believing that it has
its `Tcp`; from `Line.start` on all requests are the channel's. A line that is lost, for whatever
reason, is lost for good: everything unanswered is handed to its owner, which may ask another line.

Deadlines: nothing heard for `silence_s` while something is asked (half way an ECHO makes sure that
a server which is only slow says something), or one request unanswered for `request_s`, or for
`pending_s` when the server has said that it is at it.

Threads: smbprotocol's sends come from a thread, and its worker waits for messages in one; both
meet the loop only in `call_soon_threadsafe` and a queue. Everything else here is the loop's.
"""

from __future__ import annotations

import asyncio
import errno
import queue
import socket
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, cast

from mirrord.core.geometry import KIB
from mirrord.errors import ProtocolError
from mirrord.smb import status as st
from mirrord.smb import wire
from mirrord.smb.channel import Channel, Reply
from mirrord.smb.lanes import Request
from mirrord.smb.seal import Seal
from mirrord.storage.backend import Buffer
from mirrord.storage.memory_pool import new_aligned, writable
from mirrord.storage.remote import LostError
from mirrord.storage.smb.work import from_thread

JOIN_BYTES: Final = 64 * KIB  # up to this one copy beats many vectors
LOOP_S: Final = 30.0  # that the loop may be busy with other things
# The server still works on what a lost line asked before: a repetition is asked again so often.
REPLAY_S: Final = 0.05
REPLAYS_MAX: Final = 200
UNSENT_HIGH: Final = 256 * KIB  # no more is sealed while so much is unsent: small ones go first


@dataclass(frozen=True, slots=True)
class LineSettings:
    """Deadlines of a line, in seconds."""

    connect_s: float = 10.0
    silence_s: float = 10.0
    request_s: float = 60.0
    pending_s: float = 300.0
    idle_s: float = 60.0  # an ECHO so often: Windows ends idle sessions after 15 minutes
    check_s: float = 0.5
    restore_s: float = 1.0  # until a lost line of several is replaced, the first time


def _memory(length: int) -> tuple[Buffer, memoryview]:
    """Return memory for a payload that nobody can change once it is filled."""
    memory, address = new_aligned(length)
    return memory, writable(address, length)


class Line(asyncio.BufferedProtocol):
    """One connection. `on_lost` gets the reason and every unanswered request, once; `on_held` one
    that has to be asked once more: it was not done, since its sequence is an old one by now, or
    since the server is still at what came before it."""

    def __init__(
        self,
        settings: LineSettings,
        *,
        on_lost: Callable[[Line, LostError, list[Request]], None],
        on_break: Callable[[Line, wire.Break], None],
        on_held: Callable[[Request], None],
    ) -> None:
        self.channel = Channel(_memory)
        self.why: LostError | None = None  # it was lost
        self.greetings: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # for smbprotocol's worker
        self._settings = settings
        self._on_lost = on_lost
        self._on_break = on_break
        self._on_held = on_held
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._planned = False
        self._greeted_s: float | None = None  # when smbprotocol asked what is not answered yet
        self._congested = False
        self._echoed = False
        self._timer: asyncio.TimerHandle | None = None

    # For the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=UNSENT_HIGH, low=UNSENT_HIGH // 4)
        _keep_alive(transport.get_extra_info("socket"), self._settings.silence_s)
        self.channel.heard_s = monotonic()  # not the loop's clock: uvloop's counts milliseconds
        self._timer = self._loop.call_later(self._settings.check_s, self._check)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.channel.inbox.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        channel = self.channel
        try:
            replies = channel.received(nbytes, monotonic())
        except ProtocolError as error:
            self.lose(f"the server broke the protocol: {error}")
            return
        for message in channel.greeting:
            self.greetings.put(message)
            self._greeted_s = None
        channel.greeting.clear()
        for reply in replies:
            self._answer(reply)
        if channel.breaks:
            breaks, channel.breaks = channel.breaks, []
            for broken in breaks:
                self._on_break(self, broken)
        if channel.waiting:
            self._soon()

    def eof_received(self) -> bool:
        self.lose("the server closed the connection")
        return False

    def pause_writing(self) -> None:
        self._congested = True

    def resume_writing(self) -> None:
        self._congested = False
        self._soon()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(f"the connection broke: {exc}" if exc else "the connection was closed")

    # For the session. All on the loop.

    def start(self, seal: Seal, session_id: int, *, piece_bytes: int, multi_credit: bool) -> None:
        """Take the connection over from smbprotocol (`Channel.start`)."""
        self.channel.start(seal, session_id, piece_bytes=piece_bytes, multi_credit=multi_credit)
        self._greeted_s = None

    def ask(self, request: Request) -> asyncio.Future[Reply]:
        """Send a request; the future gets its reply, whatever its status.

        Its owner sees to the future when the line is lost.
        """
        answer: asyncio.Future[Reply] = self._loop.create_future()
        request.owner = answer
        self.submit(request)
        return answer

    def submit(self, request: Request) -> None:
        """Send a request, again perhaps."""
        self.channel.submit(request)
        self._soon()

    def acknowledge(self, broken: wire.Break, tree_id: int) -> None:
        """Agree to a break."""
        self.channel.acknowledge(broken, tree_id)
        self._soon()

    def greet(self, message: bytes) -> None:
        """Send a message of smbprotocol's: as it is, or by the channel once that has begun."""
        if self.why is not None:
            return
        if self.channel.seal is None:
            self.channel.greet(message)
            self._greeted_s = monotonic()
        else:
            self.channel.control(message)
        self._soon()

    def lose(self, why: str) -> None:
        """End the line. Idempotent."""
        if self.why is not None:
            return
        self.why = LostError(why)
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        self.greetings.put(b"")  # smbprotocol takes it for the end
        self._on_lost(self, self.why, self.channel.lost())

    # Inside.

    def _soon(self) -> None:
        """Send at the end of this turn of the loop: what comes together leaves together."""
        if not self._planned:
            self._planned = True
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        self._planned = False
        channel, transport = self.channel, self._transport
        if self.why is not None or transport is None:
            return
        if not self._congested:
            try:
                channel.pump(monotonic())
            except ProtocolError as error:
                self.lose(str(error))
                return
        if channel.refused:
            refused, channel.refused = channel.refused, []
            for request in refused:
                fail(request, TooLargeError())
        outgoing = channel.outgoing
        if outgoing:
            channel.outgoing = []
            if sum(map(len, outgoing)) <= JOIN_BYTES:
                transport.write(b"".join(outgoing))
            else:
                transport.writelines(outgoing)

    def _answer(self, reply: Reply) -> None:
        request = reply.request
        if request.control is not None:
            self.greetings.put(bytes(reply.message))
        elif request.owner is not None:
            stale = request.sequence != self.channel.sequence or request.replays > 0
            if reply.status == st.FILE_NOT_AVAILABLE and stale and request.replays < REPLAYS_MAX:
                self._loop.call_later(REPLAY_S, self._on_held, request)
            else:
                _settle(request, reply)

    def _check(self) -> None:
        """Look at the deadlines."""
        channel, settings = self.channel, self._settings
        now_s = monotonic()
        since_s = self._asked_s()
        if channel.seal is not None:
            limits = ((settings.request_s, False), (settings.pending_s, True))
            for limit_s, pending in limits:
                oldest_s = channel.oldest_s(pending=pending)
                if oldest_s is not None and now_s - oldest_s > limit_s:
                    self.lose(f"the server has not answered a request for {limit_s:g} s")
                    return
        if since_s is not None and now_s - since_s > settings.silence_s:
            self.lose(f"the server has said nothing for {settings.silence_s:g} s")
            return
        self._echo(now_s - (channel.heard_s if since_s is None else since_s), since_s is not None)
        self._timer = self._loop.call_later(settings.check_s, self._check)

    def _asked_s(self) -> float | None:
        """Return since when an answer is missing and nothing was heard; None: nothing is asked."""
        channel = self.channel
        sent = (channel.oldest_s(pending=False), channel.oldest_s(pending=True), self._greeted_s)
        asked = [sent_s for sent_s in sent if sent_s is not None]
        return max(channel.heard_s, min(asked)) if asked else None

    def _echo(self, quiet_s: float, asked: bool) -> None:
        settings = self._settings
        limit_s = settings.silence_s / 2 if asked else settings.idle_s
        if quiet_s <= limit_s:
            self._echoed = False
        elif not self._echoed:
            self._echoed = True
            self.channel.keep_alive(monotonic())
            self._soon()


class TooLargeError(OSError):
    """The server grants too few credits for a request of this size: ask for less at once."""


def _settle(request: Request, reply: Reply | None = None, error: OSError | None = None) -> None:
    """Answer whoever waits, if somebody does still."""
    answer: asyncio.Future[Reply] = request.owner
    if answer.done():
        return
    if reply is not None:
        answer.set_result(reply)
    elif error is not None:
        answer.set_exception(error)


def fail(request: Request, error: OSError) -> None:
    """Tell whoever waits for a request that there will be no answer."""
    if request.owner is not None:
        _settle(request, error=error)


def _keep_alive(connection: Any, silence_s: float) -> None:
    """Have the kernel notice a peer that is gone, and send small messages at once."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    milliseconds = int(silence_s * 1000)
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(silence_s))),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(silence_s / 3))),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds),
    ):
        connection.setsockopt(level, option, value)


class LineTransport:
    """What smbprotocol takes for its `smbprotocol.transport.Tcp`. Used by its threads."""

    def __init__(self, line_maker: Callable[[], Line], host: str, port: int, timeout_s: float):
        self._line_maker = line_maker
        self._address = (host, port)
        self._timeout_s = timeout_s
        self.line: Line | None = None

    @property
    def connected(self) -> bool:
        return self.line is not None and self.line.why is None

    def connect(self) -> None:
        """Connect. Raises `OSError`."""
        line = self._line_maker()
        self._loop = line._loop

        async def connect() -> None:
            async with asyncio.timeout(self._timeout_s):
                await self._loop.create_connection(lambda: line, *self._address)

        try:
            from_thread(self._loop, connect, self._timeout_s + LOOP_S)
        except TimeoutError as error:
            why = f"no connection within {self._timeout_s:g} s"
            raise TimeoutError(errno.ETIMEDOUT, why) from error
        self.line = line

    def send(self, message: bytes) -> None:
        """Send one message, without waiting."""
        assert self.line is not None
        self._in_loop(self.line.greet, bytes(message))

    def recv(self, timeout: float) -> bytes:
        """Return the next message, or nothing at the end. Deadlines are the line's."""
        assert self.line is not None
        return self.line.greetings.get()

    def close(self) -> None:
        """End the line."""
        if self.line is not None:
            self._in_loop(self.line.lose, "closed")

    def _in_loop(self, work: Callable[[Any], None], argument: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(work, argument)
        except RuntimeError:  # the loop is closed, and so is everything on it
            pass
