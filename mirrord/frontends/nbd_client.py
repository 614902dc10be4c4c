"""An NBD client over a unix socket: what the demo's writer and the tests use as their guest.

Several requests may be in flight: each call sends its own and waits for its own answer, in
whatever order the answers come. With `reconnect_s` a lost connection is made again, and what had
no answer is sent once more, as QEMU does with `reconnect-delay`; so a write may happen twice, with
the same data, before its answer.
"""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import dataclass, field
from typing import Final, cast

from mirrord.core.geometry import Extent, Status
from mirrord.errors import ProtocolError, RefusedError
from mirrord.nbd import wire
from mirrord.nbd.client import ClientSession, ExportInfo, Reply
from mirrord.nbd.wire import Buffer

CONNECT_S: Final = 10.0  # for connect and handshake: a server that is there needs milliseconds
RETRY_S: Final = 0.05  # between attempts to connect again: a restart takes about half a second
CONTEXTS: Final = (wire.CONTEXT_ALLOCATION, wire.CONTEXT_DIRTY)


@dataclass(slots=True, eq=False)
class _Call:
    """One request: it is sent again, under a new cookie, on each new connection."""

    command: int
    offset: int
    length: int
    data: Buffer
    flags: int
    answer: asyncio.Future[Reply] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class _Link(asyncio.BufferedProtocol):
    """One connection: it ends with `lost`, never with an exception of its own."""

    def __init__(self, export: str, structured: bool) -> None:
        loop = asyncio.get_running_loop()
        self.session = ClientSession(export, structured=structured, contexts=CONTEXTS)
        self.calls: dict[int, _Call] = {}
        self.ready: asyncio.Future[ExportInfo] = loop.create_future()
        self.lost: asyncio.Future[OSError] = loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._trouble: ProtocolError | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.session.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        session = self.session
        try:
            replies = session.received(nbytes)
        except ProtocolError as error:
            self._trouble = error
            self.close()
            return
        for reply in replies:
            answer = self.calls.pop(reply.cookie).answer
            if not answer.done():  # its caller may have been cancelled
                answer.set_result(reply)
        if session.outgoing:
            self._send()
        if not self.ready.done():
            if session.refused is not None:
                self.ready.set_exception(RefusedError("nbd-refused", session.refused))
                self.close()
            elif session.info is not None:
                self.ready.set_result(session.info)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        reason = str(self._trouble or exc or "the server closed the connection")
        error = ConnectionResetError(errno.ECONNRESET, reason)
        if not self.ready.done():
            self.ready.set_exception(error)
        self.lost.set_result(error)

    def issue(self, call: _Call) -> None:
        """Send a request, and remember who asked."""
        session = self.session
        if call.command == wire.CMD_WRITE:
            cookie = session.write(call.offset, call.data, flags=call.flags)
        elif call.command == wire.CMD_READ:
            cookie = session.read(call.offset, call.length, flags=call.flags)
        else:
            cookie = session.command(call.command, call.offset, call.length, flags=call.flags)
        self.calls[cookie] = call
        self._send()

    def _send(self) -> None:
        if self._transport is not None:
            self._transport.writelines(self.session.outgoing)
        self.session.outgoing.clear()

    def goodbye(self) -> None:
        """Tell the server that nothing more comes."""
        self.session.disconnect()
        self._send()
        self.close()

    def close(self) -> None:
        """Close once all is sent."""
        if self._transport is not None:
            self._transport.close()


class NbdClient:
    """A connected disk. Made by `connect`; usable as `async with`.

    Failures are `OSError`: the server's errno for a request it refused, ECONNRESET when the
    connection is lost for good. Cancelling a call abandons its answer, not the request.
    """

    def __init__(self, path: str, export: str, structured: bool, reconnect_s: float) -> None:
        self.path = path
        self.export = export
        self.reconnects = 0
        self.info = ExportInfo(0, 0)
        self._structured = structured
        self._reconnect_s = reconnect_s
        self._link: _Link | None = None
        self._waiting: list[_Call] = []  # while there is no connection
        self._closing = False
        self._failed: OSError | None = None
        self._keeper: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls,
        path: str | os.PathLike[str],
        export: str = "",
        *,
        structured: bool = True,
        reconnect_s: float = 0.0,
    ) -> NbdClient:
        """Connect to the export behind a unix socket; the empty name is the server's default.

        `reconnect_s` is how long a lost connection is tried again before its requests fail.
        Raises: OSError when nobody is there, RefusedError when the export isn't given.
        """
        client = cls(os.fspath(path), export, structured, reconnect_s)
        link = await client._open()
        client._link = link
        client._keeper = asyncio.get_running_loop().create_task(client._keep(link))
        return client

    @property
    def size(self) -> int:
        """Return the disk's size in bytes."""
        return self.info.size

    @property
    def read_only(self) -> bool:
        """Tell whether the server refuses writes."""
        return bool(self.info.flags & wire.FLAG_READ_ONLY)

    async def read(self, offset: int, length: int) -> bytearray:
        """Return exactly `length` bytes."""
        reply = await self._call(wire.CMD_READ, offset, length)
        return cast(bytearray, reply.data)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write `data`, which must not change until this returns; durable then with `fua`."""
        await self._call(wire.CMD_WRITE, offset, len(data), data, flags=_fua(fua))

    async def flush(self) -> None:
        """Make all writes that have returned durable."""
        await self._call(wire.CMD_FLUSH)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Give the range's storage back; its content is undefined afterwards."""
        await self._call(wire.CMD_TRIM, offset, length, flags=_fua(fua))

    async def zero(
        self, offset: int, length: int, *, fua: bool = False, punch: bool = True, fast: bool = False
    ) -> None:
        """Make the range read as zeroes."""
        flags = _fua(fua) | (0 if punch else wire.CMD_FLAG_NO_HOLE)
        flags |= wire.CMD_FLAG_FAST_ZERO if fast else 0
        await self._call(wire.CMD_WRITE_ZEROES, offset, length, flags=flags)

    async def cache(self, offset: int, length: int) -> None:
        """Hint: the range will be read soon."""
        await self._call(wire.CMD_CACHE, offset, length)

    async def block_status(
        self, offset: int, length: int, context: str = wire.CONTEXT_ALLOCATION
    ) -> list[Extent]:
        """Return extents from `offset` on; they may stop early, and there is at least one."""
        reply = await self._call(wire.CMD_BLOCK_STATUS, offset, length)
        extents = []
        for count, flags in reply.extents.get(context, [(length, 0)]):
            extents.append(Extent(offset, count, _status(context, flags)))
            offset += count
        return extents

    async def close(self) -> None:
        """Say goodbye and close. What is in flight fails. Idempotent."""
        self._closing = True
        if self._link is not None:
            self._link.goodbye()
        if self._keeper is not None:
            await asyncio.wait([self._keeper])

    async def __aenter__(self) -> NbdClient:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def _call(
        self, command: int, offset: int = 0, length: int = 0, data: Buffer = b"", flags: int = 0
    ) -> Reply:
        if self._failed is not None:
            raise self._failed
        call = _Call(command, offset, length, data, flags)
        if self._link is not None:
            self._link.issue(call)
        else:
            self._waiting.append(call)
        reply = await call.answer
        if reply.error:
            number = wire.from_wire(reply.error)
            raise OSError(number, reply.text or os.strerror(number))
        return reply

    async def _open(self) -> _Link:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_S):
            _, link = await loop.create_unix_connection(
                lambda: _Link(self.export, self._structured), self.path
            )
            try:
                self.info = await link.ready
            except BaseException:
                link.close()
                raise
        return link

    async def _keep(self, link: _Link) -> None:
        """Follow each connection to its end, and make the next one."""
        while True:
            error = await link.lost
            self._link = None
            self._waiting = [*link.calls.values(), *self._waiting]
            again = None if self._closing else await self._reopen()
            if again is None:
                self._fail(error)
                return
            self.reconnects += 1
            self._link = link = again
            waiting, self._waiting = self._waiting, []
            for call in waiting:
                link.issue(call)

    async def _reopen(self) -> _Link | None:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._reconnect_s
        while loop.time() < give_up and not self._closing:
            try:
                return await self._open()
            except (OSError, RefusedError):  # it isn't back yet
                await asyncio.sleep(RETRY_S)
        return None

    def _fail(self, error: OSError) -> None:
        self._failed = error
        for call in self._waiting:
            if not call.answer.done():
                call.answer.set_exception(error)
        self._waiting.clear()


def _fua(wanted: bool) -> int:
    return wire.CMD_FLAG_FUA if wanted else 0


def _status(context: str, flags: int) -> Status:
    if context == wire.CONTEXT_DIRTY:
        return Status.DIRTY if flags & wire.STATE_DIRTY else Status.CLEAN
    if not flags & wire.STATE_ZERO:
        return Status.DATA
    return Status.HOLE if flags & wire.STATE_HOLE else Status.ZERO
