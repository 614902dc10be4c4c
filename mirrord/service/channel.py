"""The private channel between the daemon and a disk process: lines of JSON on a unix socket.

The daemon sends `Call`s, the process answers each with a `Reply` of the same id, in any order,
and sends replies without an id as news (a job changed). The channel's end means that the process
died or this daemon did; either side goes on without the other. Descriptors travel by a connection
of their own (`fetch_listener`), because a stream reader would lose them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mirrord.control.messages import Call, Job, Problem, Reply
from mirrord.control.sockets import Access, dial, listen, peer, remove_socket
from mirrord.errors import MirrordError, RefusedError
from mirrord.service.logs import fields
from mirrord.storage.backend import UnreachableError

log = logging.getLogger(__name__)

# A line holds a job with its story (200 steps of some hundred bytes); ten times that is a bug.
LINE_BYTES_MAX = 1 << 20
# More than one connection is a daemon that died and came back; many are a bug.
CONNECTIONS_MAX = 8

Answer = TypeVar("Answer")
Verb = Callable[[dict[str, Any]], Awaitable[Any]]


class ChannelClosedError(Exception):
    """The other end is gone; what was asked may or may not have happened."""


class Channel:
    """The daemon's end. `closed` is set when the other end is gone."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pid: int,
        on_news: Callable[[Job], None],
    ) -> None:
        self.pid = pid
        self.closed = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self._on_news = on_news
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[msgspec.Raw]] = {}

    @classmethod
    async def connect(cls, path: Path, on_news: Callable[[Job], None]) -> Channel:
        """Connect to a disk process. Raises OSError when none listens."""
        connection = dial(path)
        pid = peer(connection).pid
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=LINE_BYTES_MAX)
        return cls(reader, writer, pid, on_news)

    async def run(self) -> None:
        """Read answers until the other end is gone. Whoever connects owns a task for this."""
        try:
            while line := await self._reader.readline():
                self._receive(msgspec.json.decode(line, type=Reply))
        except OSError as error:
            log.info("disk process channel lost %s", fields(pid=self.pid, error=error))
        except (ValueError, msgspec.MsgspecError) as error:
            log.warning("disk process channel broke %s", fields(pid=self.pid, error=error))
        finally:
            self.closed.set()
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ChannelClosedError())
            self._waiting.clear()

    def _receive(self, reply: Reply) -> None:
        if reply.id is None:
            # A turn later, as whoever waits for an answer: all is heard in the order it was said.
            job = msgspec.json.decode(reply.ok, type=Job)
            asyncio.get_running_loop().call_soon(self._on_news, job)
            return
        future = self._waiting.pop(reply.id, None)
        if future is None or future.done():
            return  # whoever asked gave up
        if reply.error is not None:
            future.set_exception(RefusedError(reply.error.code, reply.error.message))
        else:
            future.set_result(reply.ok)

    def abandon(self) -> None:
        """Hang up; `run` ends."""
        self._writer.close()

    async def call(
        self, verb: str, answer: type[Answer], *, deadline_s: float, **params: Any
    ) -> Answer:
        """Ask for `verb` and return its answer.

        Raises RefusedError as the process said it, ChannelClosedError, TimeoutError.
        """
        if self.closed.is_set():
            raise ChannelClosedError
        call_id = next(self._ids)
        future = self._waiting[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(msgspec.json.encode(Call(call_id, verb, params)) + b"\n")
            async with asyncio.timeout(deadline_s):
                return msgspec.json.decode(await future, type=answer)
        finally:
            self._waiting.pop(call_id, None)


async def fetch_listener(path: Path, deadline_s: float) -> socket.socket:
    """Get the guests' listening socket from a disk process that holds it."""
    loop = asyncio.get_running_loop()
    connection = dial(path)
    try:
        async with asyncio.timeout(deadline_s):
            await loop.sock_sendall(connection, msgspec.json.encode(Call(1, "listener")) + b"\n")
            await readable(connection.fileno())
        data, descriptors, _, _ = socket.recv_fds(connection, LINE_BYTES_MAX, 1)
        if not descriptors:
            raise ChannelClosedError(data)
        return socket.socket(fileno=descriptors[0])
    finally:
        connection.close()


async def readable(descriptor: int) -> None:
    """Return once the descriptor has something to read, or its other end is gone."""
    loop = asyncio.get_running_loop()
    arrived = loop.create_future()
    loop.add_reader(descriptor, _settle, arrived)
    try:
        await arrived
    finally:
        loop.remove_reader(descriptor)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _let_go(error: BaseException | None) -> None:
    """Drop what an error's tracebacks hold at once, not at the next garbage collection.

    Their frames hold the directory of a refused target, which keeps it from being unmounted.
    """
    seen: set[int] = set()  # a chain may lead back to itself: `raise error from error`
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _write(writer: asyncio.StreamWriter, line: bytes) -> None:
    """Say something to whoever is still there: a daemon that died concerns no job."""
    if writer.is_closing():
        return
    try:
        writer.write(line)
    except (OSError, RuntimeError) as error:  # uvloop's for a connection that is closed already
        log.info("daemon's channel lost %s", fields(error=error))


class ChannelServer:
    """The disk process's end: answers calls by `verbs`, and tells every connection the news."""

    def __init__(self, verbs: dict[str, Verb], listener: socket.socket) -> None:
        self._verbs = verbs
        self._guest_listener = listener
        self._writers: set[asyncio.StreamWriter] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._server: asyncio.AbstractServer | None = None

    async def listen(self, path: Path) -> None:
        """Serve the socket at `path`, which may have been left by a dead process."""
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listen(path, Access()), limit=LINE_BYTES_MAX
        )

    async def close(self, path: Path) -> None:
        """Stop listening and hang up, after the answers under way."""
        if self._server is not None:
            self._server.close()
        if self._calls:
            await asyncio.wait(self._calls, timeout=1)
        for writer in self._writers:
            writer.close()
        remove_socket(path)

    def tell(self, job: Job) -> None:
        """Send news of a job to whoever is connected."""
        line = msgspec.json.encode(Reply(ok=msgspec.Raw(msgspec.json.encode(job)))) + b"\n"
        for writer in self._writers:
            _write(writer, line)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._writers) >= CONNECTIONS_MAX:
            writer.close()
            return
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                call = msgspec.json.decode(line, type=Call)
                if call.verb == "listener":
                    self._send_listener(writer)
                    continue
                task = asyncio.create_task(self._answer(call, writer))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
        except OSError as error:
            log.info("daemon's channel lost %s", fields(error=error))
        except (ValueError, msgspec.MsgspecError) as error:
            log.warning("daemon's channel broke %s", fields(error=error))
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, call: Call, writer: asyncio.StreamWriter) -> None:
        try:
            verb = self._verbs.get(call.verb)
            if verb is None:
                raise RefusedError("unknown-verb", f"this disk process knows no {call.verb!r}")
            answer = await verb(call.params)
            reply = Reply(call.id, ok=msgspec.Raw(msgspec.json.encode(answer)))
        except MirrordError as error:
            reply = Reply(call.id, error=Problem(error.code, str(error)))
            _let_go(error)
        except UnreachableError as error:
            reply = Reply(call.id, error=Problem("unreachable", error.strerror or str(error)))
        except OSError as error:
            reply = Reply(call.id, error=Problem("io-error", str(error)))
        except Exception as error:
            log.exception("call failed %s", fields(verb=call.verb))
            reply = Reply(call.id, error=Problem("internal", f"{call.verb}: {error!r}"))
        _write(writer, msgspec.json.encode(reply) + b"\n")

    def _send_listener(self, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        with socket.socket(fileno=os.dup(connection.fileno())) as raw:
            socket.send_fds(raw, [b"\n"], [self._guest_listener.fileno()])
