"""Serve a disk in memory over NBD from a process of its own: for tests that abuse it.

python -m tests.frontends.serving SOCKET SIZE
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

import uvloop

from mirrord.frontends.nbd_server import NbdServer
from tests.frontends.doors import MemoryDoor


async def main(path: str, size: int) -> None:
    """Serve until SIGTERM."""
    door = MemoryDoor(0)
    door.size, door.zeroes_only = size, True
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(128)
    server = NbdServer(door)
    await server.serve(listener)
    print("ready", flush=True)
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    await ending.wait()
    await server.stop(5)


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
