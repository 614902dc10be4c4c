"""The asyncio client: several requests in flight, errors, and coming back after a break."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path

import pytest

from mirrord.core.geometry import Extent, Status
from mirrord.errors import RefusedError
from mirrord.frontends.nbd_client import NbdClient
from mirrord.frontends.nbd_server import NbdServer
from mirrord.nbd import wire
from tests.frontends.conftest import Serve
from tests.frontends.doors import SIZE, MemoryDoor
from tests.helpers import eventually_async

RECONNECT_S = 20


@pytest.mark.parametrize("structured", [True, False])
async def test_it_does_what_it_is_asked(serve: Serve, structured: bool) -> None:
    serving = await serve()
    async with await NbdClient.connect(serving.path, "disk", structured=structured) as client:
        assert (client.size, client.read_only) == (SIZE, False)
        for length in (1, 4096, 100_000, 700_000):
            data = os.urandom(length)
            await client.write(77, data, fua=True)
            assert await client.read(77, length) == data
        await client.flush()
        await client.zero(0, 4096, punch=False)
        await client.trim(4096, 4096)
        await client.cache(0, 4096)
        assert await client.read(0, 8192) == bytes(8192)
        with pytest.raises(OSError, match=r"\w") as failed:
            await client.zero(0, 512, fast=True)
        assert failed.value.errno == errno.EOPNOTSUPP
        with pytest.raises(OSError, match=r"\w") as failed:
            await client.write(SIZE, b"x")
        assert failed.value.errno == errno.ENOSPC


async def test_it_tells_what_the_disk_holds(serve: Serve) -> None:
    serving = await serve()
    async with await NbdClient.connect(serving.path) as client:
        assert await client.block_status(512, 1024) == [
            Extent(512, 512, Status.DATA),
            Extent(1024, 512, Status.HOLE),
        ]
        dirty = await client.block_status(0, 1024, wire.CONTEXT_DIRTY)
        assert dirty == [Extent(0, 1024, Status.DIRTY)]


async def test_many_requests_are_in_flight_and_end_in_any_order(serve: Serve) -> None:
    serving = await serve()
    async with await NbdClient.connect(serving.path) as client:
        serving.door.close_gate("write")
        write = asyncio.create_task(client.write(0, b"x" * 4096))
        await serving.door.until(started=1)
        reads = await asyncio.gather(*(client.read(n * 4096, 4096) for n in range(200)))
        assert all(data == bytes(4096) for data in reads)
        assert not write.done()
        serving.door.open_gate()
        await write


async def test_a_call_may_be_cancelled(serve: Serve) -> None:
    serving = await serve()
    async with await NbdClient.connect(serving.path) as client:
        serving.door.close_gate("write")
        write = asyncio.create_task(client.write(0, b"x"))
        await serving.door.until(started=1)
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
        serving.door.open_gate()
        await serving.door.until(ended=1)
        assert await client.read(0, 1) == b"x"


async def test_an_unknown_export_is_refused(serve: Serve) -> None:
    serving = await serve(MemoryDoor(read_only=True))
    with pytest.raises(RefusedError):
        await NbdClient.connect(serving.path, "other")
    async with await NbdClient.connect(serving.path) as client:
        assert client.read_only
        with pytest.raises(PermissionError):
            await client.write(0, b"x")


async def test_nobody_there_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await NbdClient.connect(tmp_path / "nothing")


async def test_without_reconnection_a_lost_server_fails_everything(serve: Serve) -> None:
    serving = await serve()
    client = await NbdClient.connect(serving.path)
    serving.door.close_gate("read")
    read = asyncio.create_task(client.read(0, 1))
    await serving.door.until(started=1)
    for connection in list(serving.server._connections):
        connection.abort()
    with pytest.raises(ConnectionResetError):
        await read
    with pytest.raises(ConnectionResetError):
        await client.flush()
    await client.close()
    await client.close()


async def test_with_reconnection_its_caller_notices_nothing(tmp_path: Path) -> None:
    """The server goes and another comes: what had no answer is sent again."""
    path, door = str(tmp_path / "nbd.sock"), MemoryDoor()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(8)
        first = NbdServer(door)
        await first.serve(listener)
        client = await NbdClient.connect(path, reconnect_s=RECONNECT_S)
        door.close_gate("write")
        writes = [asyncio.create_task(client.write(n * 512, b"x" * 512)) for n in range(4)]
        await door.until(started=4)
        for connection in list(first._connections):
            connection.abort()  # as a kill would
        await eventually_async(lambda: client.reconnects == 1)
        assert door.started.total() == 4  # its second connection waits for the first one's writes
        door.open_gate()
        await asyncio.gather(*writes)
        assert door.started.total() == 8
        assert await first.stop(5, coming_back=True)
        read = asyncio.create_task(client.read(0, 2048))
        second = NbdServer(door)
        await second.serve(listener)
        assert await read == b"x" * 2048
        assert client.reconnects == 2
        await client.close()
        assert await second.stop(5)


async def test_a_server_that_stays_away_fails_in_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "nbd.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(8)
    server = NbdServer(MemoryDoor())
    await server.serve(listener)
    client = await NbdClient.connect(path, reconnect_s=0.2)
    await server.stop(5)
    listener.close()
    with pytest.raises(ConnectionResetError):
        await client.read(0, 512)
    await client.close()


async def test_a_server_that_breaks_the_protocol_is_left(tmp_path: Path) -> None:
    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()

    path = str(tmp_path / "liar.sock")
    async with await asyncio.start_unix_server(lie, path):
        with pytest.raises(ConnectionResetError, match="not an NBD server"):
            await NbdClient.connect(path)
