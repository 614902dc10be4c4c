"""A served door for each test, under asyncio's own loop and under uvloop."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest_asyncio
import uvloop

from mirrord.frontends.nbd_server import NbdServer
from mirrord.nbd.limits import Limits
from tests.frontends.doors import MemoryDoor
from tests.frontends.raw import Raw
from tests.helpers import eventually_async


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test of this folder under both loops."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@dataclass
class Serving:
    """A server, its door, and where it listens."""

    server: NbdServer
    door: MemoryDoor
    path: str

    async def enter(self, *, structured: bool = False) -> Raw:
        """Return a client in transmission."""
        return await Raw.enter(self.path, structured=structured)

    async def alone(self) -> None:
        """Wait until the server has noticed that its clients have left."""
        await eventually_async(lambda: not self.server.clients, what="the clients are gone")


def sockets() -> int:
    """Return how many sockets this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own descriptor
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


Serve = Callable[..., Awaitable[Serving]]


@pytest_asyncio.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Serve doors that end with the test, and leave no descriptor behind."""
    made: list[tuple[Serving, socket.socket]] = []

    async def start(door: MemoryDoor | None = None, **limits: float) -> Serving:
        path = str(tmp_path / f"{len(made)}.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(64)
        door = door or MemoryDoor()
        server = NbdServer(door, limits=Limits(**limits))  # type: ignore[arg-type]
        await server.serve(listener)
        made.append((Serving(server, door, path), listener))
        return made[-1][0]

    before = sockets()
    yield start
    for serving, listener in made:
        serving.door.open_gate()
        await serving.server.stop(5)
        listener.close()
    await eventually_async(lambda: sockets() <= before, what="all sockets are closed")
