"""A TCP proxy between a client and a server, which does to their connections what networks do.

It runs in a thread of its own. What is asked of it has happened when the call returns, or happens
at an exact byte of a stream; so a test need not wait for it. It never reorders.

Bytes are counted for each direction over all connections together.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Direction = Literal["to_server", "to_client"]
Queue = asyncio.Queue[tuple[float, bytes | None]]

CHUNK_BYTES = 256 << 10
QUEUED = 256  # chunks in flight: what a slow network holds
CALL_S = 30
RESET = struct.pack("ii", 1, 0)  # a socket that lingers for no time is reset when it is closed


@dataclass
class Way:
    """One direction: what passed, and what is to happen to it."""

    forwarded: int = 0
    delay_s: float = 0.0
    cut_at: int | None = None
    gently: bool = False
    corrupt: range = range(0)
    flows: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, chunk: bytes) -> tuple[bytes, bool]:
        """Return what of a chunk goes on, and whether the connection ends there."""
        ends = self.cut_at is not None and self.forwarded + len(chunk) >= self.cut_at
        if self.cut_at is not None and ends:
            chunk = chunk[: self.cut_at - self.forwarded]
            self.cut_at = None
        bad = range(
            max(self.corrupt.start, self.forwarded),
            min(self.corrupt.stop, self.forwarded + len(chunk)),
        )
        if bad:
            changed = bytearray(chunk)
            for position in bad:
                changed[position - self.forwarded] ^= 1
            chunk = bytes(changed)
        self.forwarded += len(chunk)
        return chunk, ends


class _Pair:
    """A client's connection and the one to the server behind it, in the proxy's thread."""

    def __init__(self, proxy: Proxy, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._writers = [writer]
        proxy.writers.add(writer)
        self._task = asyncio.current_task()

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Forward both ways until either side ends, or `end` is called."""
        proxy, client = self._proxy, self._writers[0]
        try:
            answers, server = await asyncio.open_connection(
                proxy.server, proxy.server_port, limit=CHUNK_BYTES
            )
        except OSError:
            self.end(gently=False)
            return
        self._writers.append(server)
        proxy.writers.add(server)
        async with asyncio.TaskGroup() as group:
            for name, source, sink in (
                ("to_server", reader, server),
                ("to_client", answers, client),
            ):
                queue: Queue = asyncio.Queue(QUEUED)
                group.create_task(self._receive(proxy.ways[name], source, queue))
                group.create_task(self._send(proxy.ways[name], queue, sink))

    def end(self, *, gently: bool) -> None:
        """Close both connections, or reset them. Idempotent."""
        for writer in self._writers:
            if not gently:
                _reset(writer)
            elif not writer.is_closing():
                try:
                    writer.write_eof()  # what was not read yet would make a reset of it
                    writer.close()
                except OSError:  # the peer was killed
                    _reset(writer)
        self._proxy.pairs.discard(self)
        if self._task is not None:
            self._task.cancel()

    async def _receive(self, way: Way, reader: asyncio.StreamReader, queue: Queue) -> None:
        chunk: bytes | None = b"first"
        while chunk:
            try:
                chunk = await reader.read(CHUNK_BYTES)
            except ConnectionError:
                chunk = None
            await queue.put((asyncio.get_running_loop().time() + way.delay_s, chunk))

    async def _send(self, way: Way, queue: Queue, writer: asyncio.StreamWriter) -> None:
        """Forward chunks; an empty one is the stream's end, None a reset. Those are held, too."""
        while True:
            due, chunk = await queue.get()
            remaining_delay_s = due - asyncio.get_running_loop().time()
            if remaining_delay_s > 0:
                await asyncio.sleep(remaining_delay_s)
            while not way.flows.is_set():
                await way.flows.wait()
            if not chunk:
                self.end(gently=chunk is not None)
                return
            part, ends = way.take(chunk)
            writer.write(part)
            if ends:
                self._proxy.end_all(gently=way.gently)
                return
            try:
                await writer.drain()
            except ConnectionError:
                self.end(gently=False)
                return


def _reset(writer: asyncio.StreamWriter) -> None:
    connected = writer.get_extra_info("socket")
    if connected.fileno() >= 0:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


def _bound(port: int) -> socket.socket:
    """Return a socket on a port of 127.0.0.1, which others of this program may bind as well."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", port))
    return one


class Proxy:
    """A listener on 127.0.0.1 that forwards to a port of 127.0.0.1. A context manager."""

    def __init__(self, server_port: int, server: str = "127.0.0.1") -> None:
        self.server, self.server_port = server, server_port
        self.accepted = 0
        # bound but not listening, so that the port stays ours while connections are refused
        self._reserved = _bound(0)
        self.port = int(self._reserved.getsockname()[1])
        self.ways: dict[str, Way] = {"to_server": Way(), "to_client": Way()}
        for way in self.ways.values():
            way.flows.set()
        self.pairs: set[_Pair] = set()
        self.writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp proxy")
        self._thread.start()
        self.accept()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Reset all connections and end the thread. Idempotent."""
        if self._loop.is_closed():
            return
        self.refuse()
        self._call(self._end_tasks)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_S)
        self._loop.close()
        self._reserved.close()

    # -- what passed

    @property
    def connections(self) -> int:
        """Return how many connections are open now."""
        return len(self.pairs)

    def forwarded(self, direction: Direction) -> int:
        """Return how many bytes went in a direction so far."""
        return self.ways[direction].forwarded

    # -- what it does to connections

    def delay(self, delay_s: float, direction: Direction | None = None) -> None:
        """Let what comes from now on take longer, in one direction or each."""

        def change() -> None:
            for way in self._chosen(direction):
                way.delay_s = delay_s

        self._now(change)

    def cut(self) -> None:
        """Reset all connections now. New ones are accepted."""
        self._now(lambda: self.end_all(gently=False))

    def cut_after(self, count: int, direction: Direction, *, gently: bool = False) -> None:
        """Reset all connections when exactly `count` more bytes went in a direction.

        `gently` closes them instead, as a peer that ends does: all those bytes arrive.
        """

        def change() -> None:
            way = self.ways[direction]
            way.cut_at, way.gently = way.forwarded + count, gently

        assert count > 0
        self._now(change)

    def truncate(self, direction: Direction, keep: int = 5) -> None:
        """Forward only the first bytes of what comes next, then close."""
        self.cut_after(keep, direction, gently=True)

    def corrupt(self, direction: Direction, skip: int = 0, count: int = 1) -> None:
        """Flip a bit of each of `count` bytes, after the next `skip` of a direction."""

        def change() -> None:
            way = self.ways[direction]
            way.corrupt = range(way.forwarded + skip, way.forwarded + skip + count)

        self._now(change)

    def hold(self, direction: Direction | None = None) -> None:
        """Forward nothing any more, in one direction or each: accepted, but no answer."""

        def change() -> None:
            for way in self._chosen(direction):
                way.flows.clear()

        self._now(change)

    def release(self) -> None:
        """Forward what was held, and what comes."""

        def change() -> None:
            for way in self.ways.values():
                way.flows.set()

        self._now(change)

    def refuse(self, *, cut: bool = True) -> None:
        """Refuse connections, and reset those that there are."""
        if self._listener is not None:
            self._now(self._listener.close)
            self._listener = None
        if cut:
            self.cut()

    def accept(self) -> None:
        """Accept connections again."""

        async def listen() -> asyncio.Server:
            return await asyncio.start_server(
                self._connected, sock=_bound(self.port), limit=CHUNK_BYTES
            )

        if self._listener is None:
            self._listener = self._call(listen)

    # -- within, in its thread

    def end_all(self, *, gently: bool) -> None:
        """Close or reset all connections."""
        for pair in list(self.pairs):
            pair.end(gently=gently)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        pair = _Pair(self, writer)
        self.pairs.add(pair)
        with contextlib.suppress(asyncio.CancelledError):  # how a pair ends
            await pair.run(reader)

    def _chosen(self, direction: Direction | None) -> list[Way]:
        return list(self.ways.values()) if direction is None else [self.ways[direction]]

    def _now(self, what: Callable[[], object]) -> None:
        async def call() -> None:
            what()
            await asyncio.sleep(0)  # connections are closed in the loop's next round

        self._call(call)

    def _call(self, what: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run_coroutine_threadsafe(what(), self._loop).result(CALL_S)

    async def _end_tasks(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)  # what was just accepted gets its pair
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self.writers:
            writer.transport.abort()  # also what was closed gently and still has bytes to send
        await asyncio.sleep(0)
