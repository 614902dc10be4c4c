"""A client that sends whatever a test wants, and reads replies one by one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from mirrord.nbd import wire
from tests.frontends.doors import WAIT_S
from tests.nbd.speaking import STRUCTURED, contexts, flags, go


@dataclass(frozen=True)
class Answer:
    """One reply: `data` is a read's, or a chunk's whole payload."""

    cookie: int
    error: int = 0
    data: bytes = b""


class Raw:
    """One connection. Everything that waits has a deadline."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, path: str) -> Raw:
        """Connect, and receive the greeting."""
        client = cls(*await asyncio.open_unix_connection(path))
        try:
            await client.receive(wire.GREETING.size)
        except (EOFError, ConnectionError):
            client.writer.close()
            raise
        return client

    @classmethod
    async def enter(cls, path: str, *, structured: bool = False) -> Raw:
        """Connect and go into transmission."""
        client = await cls.open(path)
        client.writer.write(flags())
        if structured:
            names = [wire.CONTEXT_ALLOCATION.encode(), wire.CONTEXT_DIRTY.encode()]
            client.writer.write(STRUCTURED + contexts(names))
            assert await client.option_reply() == wire.REP_ACK
            for _ in names:
                assert await client.option_reply() == wire.REP_META_CONTEXT
            assert await client.option_reply() == wire.REP_ACK
        client.writer.write(go())
        while (reply := await client.option_reply()) != wire.REP_ACK:
            if reply & wire.REP_ERROR:
                client.close()
                raise PermissionError(reply)
        return client

    async def receive(self, length: int) -> bytes:
        """Return exactly so many bytes; EOFError when the server closes before."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.readexactly(length)

    async def option_reply(self) -> int:
        """Return the kind of the next option reply."""
        head = await self.receive(wire.OPTION_REPLY.size)
        magic, _, kind, length = wire.OPTION_REPLY.unpack(head)
        assert magic == wire.OPTION_REPLY_MAGIC
        await self.receive(length)
        return int(kind)

    def send(
        self, command: int, offset: int = 0, length: int = 0, *, flag: int = 0, cookie: int = 7,
        data: bytes = b"",
    ) -> None:  # fmt: skip
        """Send one request; a write's length is its payload's."""
        length = len(data) or length
        self.writer.write(wire.pack_request(command, cookie, offset, length, flag) + data)

    async def answer(self, read_length: int = 0) -> Answer:
        """Return the next simple reply, with a read's data after it."""
        head = await self.receive(wire.SIMPLE_REPLY.size)
        magic, error, cookie = wire.SIMPLE_REPLY.unpack(head)
        assert magic == wire.SIMPLE_REPLY_MAGIC
        return Answer(cookie, error, b"" if error else await self.receive(read_length))

    async def chunk(self) -> tuple[int, int, bytes]:
        """Return the next chunk: flags, kind, payload."""
        magic, flag, kind, _, length = wire.CHUNK.unpack(await self.receive(wire.CHUNK.size))
        assert magic == wire.CHUNK_MAGIC
        return flag, kind, await self.receive(length)

    async def closed(self) -> bytes:
        """Wait until the server closes; return what it sent before."""
        async with asyncio.timeout(WAIT_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""
            finally:
                self.close()

    def close(self) -> None:
        """Close without a goodbye."""
        self.writer.transport.abort()
