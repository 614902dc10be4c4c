"""A control server in this process, for one connection after the other."""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial

from mirrord.control.server import ControlServer, _Connection
from tests.control.serving import FakeApi, FakeGate

ANSWER_S = 5.0
BYTES_MAX = 1 << 20


class _Failures(logging.Handler):
    """Remembers what the server logged as its own failure."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class HttpServer:
    """Serves a fake interface on a loop of its own, started by the first question."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failures = _Failures()

    def ask(self, data: bytes) -> None:
        """Send bytes and an end; assert that what comes back is HTTP, or nothing."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._server = ControlServer(FakeGate(FakeApi()), socket.socket(socket.AF_UNIX))
            self._loop.run_until_complete(self._server._runner.setup())
            logging.getLogger("mirrord.control").addHandler(self._failures)
            logging.getLogger("mirrord.control").propagate = False
        answer = self._loop.run_until_complete(self._ask(data))
        assert answer in (b"",) or answer.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), answer[:100]
        assert not self._failures.lines, self._failures.lines

    async def _ask(self, data: bytes) -> bytes:
        assert self._loop is not None
        server = self._server._runner.server
        assert server is not None
        ours, theirs = socket.socketpair()
        connection = partial(_Connection, server, self._loop)
        await self._loop.connect_accepted_socket(connection, theirs)
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(ANSWER_S):
                writer.write(data)
                writer.write_eof()
                return await reader.read(BYTES_MAX)
        finally:
            writer.close()
