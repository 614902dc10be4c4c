"""The NBD server of one disk: it listens, keeps the limits of all connections, and stops.

The listening socket is the caller's (the daemon made it and holds it too, so that a connect waits
while this process restarts): it is accepted from, never closed.

* Past the handshake there are at most `clients_max` connections; when `connections_max` are open
  the one longest in its handshake makes room, so idle strangers can't keep a guest out.
* No descriptor left: accepting pauses; those waiting stay in the socket's queue.
* What connections hold together is bounded (`held_total_bytes_max`); a connection above it isn't
  read any further until others are done, in the order in which they came to wait.
* A request that has started is finished, whatever becomes of its connection (rule R18): its task
  belongs to the server.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final

from mirrord.frontends.counters import Counters
from mirrord.frontends.door import Door
from mirrord.frontends.nbd_connection import Connection
from mirrord.nbd.handshake import Export
from mirrord.nbd.limits import Limits

logger = logging.getLogger(__name__)

ACCEPT_BATCH: Final = 16  # accepted in one go, before others get their turn
ACCEPT_PAUSE_S: Final = 1.0  # after EMFILE: time for something to be closed
_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Client:
    """One connection past its handshake, as shown to an operator."""

    id: int
    requests: int
    in_flight: int
    bytes_in: int
    bytes_out: int


class NbdServer:
    """Serves `door` under its name, and under the empty name.

    All methods belong to one event loop, asyncio's own or uvloop's.
    """

    def __init__(self, door: Door, *, limits: Limits | None = None, description: str = "") -> None:
        self.door = door
        self.limits = limits or Limits()
        self.export = Export(door.name, door.size, door.read_only, description)
        self.counters = Counters()
        self.stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: socket.socket | None = None
        self._accepting = False
        self._resume: asyncio.TimerHandle | None = None
        self._connections: dict[Connection, None] = {}  # oldest first
        self._handshakes: dict[Connection, None] = {}  # oldest first
        self._waiting: dict[Connection, None] = {}  # for room, first come first served
        self._leaving: set[Connection] = set()  # gone, with requests still in flight
        self._held_bytes = 0
        self._waking = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._by_hand = 0  # requests that wait and have no task
        self._changed = asyncio.Event()  # something ended: `stop` looks again
        self._next_id = 1

    # For the owner.

    async def serve(self, listener: socket.socket) -> None:
        """Start accepting from a listening socket, and return."""
        if self._listener is not None:
            raise ValueError("already serving")
        listener.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._accept_more()

    async def stop(self, deadline_s: float, *, coming_back: bool = False) -> bool:
        """Stop accepting, finish what is in flight, refuse the rest, disconnect everybody.

        Requests that come now are answered ESHUTDOWN, so a client knows. With `coming_back` they
        get no answer: a client that reconnects (QEMU's `reconnect-delay`) sends them again to
        the next server, and its guest sees no error.
        Returns False when requests were still in flight or replies unread after `deadline_s`;
        connections are closed nevertheless, and those requests still end by themselves.
        """
        self.stopping = True
        self._stop_accepting()
        for connection in list(self._connections):
            connection.stop(silent=coming_back)
        try:
            async with asyncio.timeout(deadline_s):
                while self._busy():
                    self._changed.clear()
                    await self._changed.wait()
            clean = True
        except TimeoutError:
            clean = False
            logger.warning("stopped in_flight=%d", len(self._tasks) + self._by_hand)
        for connection in list(self._connections):
            connection.abort()
        while self._connections:  # their transports are closed in the next turn of the loop
            self._changed.clear()
            await self._changed.wait()
        return clean

    @property
    def clients(self) -> list[Client]:
        """Those past their handshake and not on their way out, oldest first."""
        return [
            Client(c.id, s.requests, s.in_flight, c.bytes_in, c.bytes_out)
            for c in self._connections
            if (s := c.session) is not None and not s.ended
        ]

    @property
    def waiting(self) -> int:
        """How many requests have come and have no answer yet."""
        return sum(c.session.in_flight for c in self._connections if c.session is not None)

    @property
    def ended(self) -> int:
        """How many requests have ended, of whatever kind."""
        return self.counters.ended

    def _busy(self) -> bool:
        """Tell whether something is in flight or on its way out."""
        for connection in self._connections:
            connection.flush()  # what ended by hand in this turn of the loop is not sent yet
            connection.close_if_done()
        return bool(self._tasks or self._by_hand) or any(c.has_unsent for c in self._connections)

    # Accepting.

    def _accept_more(self) -> None:
        self._resume = None
        if self._listener is not None and self._loop is not None and not self.stopping:
            self._loop.add_reader(self._listener, self._accept)
            self._accepting = True

    def _stop_accepting(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        if self._accepting and self._listener is not None and self._loop is not None:
            self._loop.remove_reader(self._listener)
        self._accepting = False

    def _accept(self) -> None:
        assert self._listener is not None
        assert self._loop is not None
        for _ in range(ACCEPT_BATCH):
            try:
                peer, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_DESCRIPTOR:
                    raise
                logger.warning("paused accepting reason=%s", error.strerror)
                self._stop_accepting()
                self._resume = self._loop.call_later(ACCEPT_PAUSE_S, self._accept_more)
                return
            peer.setblocking(False)
            self._admit(peer)

    def _admit(self, peer: socket.socket) -> None:
        if len(self._connections) >= self.limits.connections_max and self._handshakes:
            oldest = next(iter(self._handshakes))
            self.forget(oldest)  # at once, or the next stranger of a burst would displace it again
            oldest.abort()
        connection = Connection(self, self._next_id)
        self._next_id += 1
        self._connections[connection] = None
        self._handshakes[connection] = None
        self.own(self._connect(connection, peer))

    async def _connect(self, connection: Connection, peer: socket.socket) -> None:
        assert self._loop is not None
        try:
            await self._loop.connect_accepted_socket(lambda: connection, peer)
        except OSError as error:
            logger.info("lost client=%d reason=%s", connection.id, error)
            peer.close()
            self.forget(connection)

    # For its connections.

    def own(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` to its end; it handles its own errors."""
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def waits(self, change: int) -> None:
        """Note that one request more, or less, waits that has no task."""
        self._by_hand += change
        if change < 0:
            self._changed.set()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()
        if not task.cancelled():  # only a loop that is torn down cancels
            task.result()

    @property
    def full(self) -> bool:
        """Tell whether the export has all the clients it may have."""
        return len(self._connections) - len(self._handshakes) >= self.limits.clients_max

    def entered(self, connection: Connection) -> None:
        """Note that a connection's handshake is over."""
        self._handshakes.pop(connection, None)

    @property
    def leaving(self) -> set[Connection]:
        """Those that are gone and have requests in flight. A client that comes back sends its
        requests again and then newer ones, which the old ones must not overtake (rule R18)."""
        return set(self._leaving)

    def leave(self, connection: Connection) -> None:
        """Note that a connection is gone while it has requests in flight."""
        self._leaving.add(connection)

    def settled(self, connection: Connection) -> None:
        """Note that a connection that is gone has nothing in flight any more."""
        if connection in self._leaving:
            self._leaving.discard(connection)
            for other in list(self._connections):
                other.left_behind(connection)

    def forget(self, connection: Connection) -> None:
        """Note that a connection is gone."""
        self._connections.pop(connection, None)
        self._handshakes.pop(connection, None)
        self.queue(connection, waits=False)
        self._changed.set()

    def changed(self) -> None:
        """Note that a connection's replies have gone out."""
        self._changed.set()

    def room(self, connection: Connection) -> int:
        """Return how many bytes more `connection` may hold."""
        room = self.limits.held_total_bytes_max - self._held_bytes
        if self._waiting and connection is not next(iter(self._waiting)):
            room = 0  # what gets free is for the one that waits longest
        return max(room, self.limits.held_allowance_bytes - connection.charged_bytes)

    def charge(self, delta_bytes: int) -> None:
        """Note that a connection holds that much more, or less."""
        self._held_bytes += delta_bytes
        if delta_bytes < 0:
            self._wake_soon()

    def queue(self, connection: Connection, waits: bool) -> None:
        """Put a connection into the queue for room, or take it out."""
        if waits:
            self._waiting.setdefault(connection)
        elif connection in self._waiting:
            del self._waiting[connection]
            self._wake_soon()

    def _wake_soon(self) -> None:
        if self._waiting and not self._waking:
            assert self._loop is not None
            self._waking = True
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        """Let those that wait for room try, until one of them still has too little."""
        self._waking = False
        while self._waiting:
            first = next(iter(self._waiting))
            first.pump()
            if first in self._waiting:
                return
