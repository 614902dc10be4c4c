"""The demo's guest: writes numbered blocks over NBD all the time, and remembers each of them.

Each 4 KiB block holds its own number and that of its last write, so what is found later says
exactly what is missing. Lanes write disjoint blocks, so that no two writes in flight overlap.
"""

from __future__ import annotations

import asyncio
import random
import struct
import time
from pathlib import Path

from mirrord.frontends.nbd_client import NbdClient

BLOCK_BYTES = 4096
LANES = 4  # writes in flight: a modest guest
PAUSE_S = 0.002  # between two writes of a lane: some 2,000 a second, a busy virtual machine
FLUSH_EVERY = 64  # writes, as file systems do with their journals
RECONNECT_S = 30.0
FILL_BLOCKS = 256  # written at once when the disk is made

_NUMBERS = struct.Struct("<QQ")


def content(block: int, sequence: int) -> bytes:
    """Return a block's content after write `sequence`; 0 is the content before any."""
    return _NUMBERS.pack(block, sequence) * (BLOCK_BYTES // _NUMBERS.size)


def make_disk(path: Path, size: int, filled: int) -> None:
    """Make a disk of `size` bytes of which the first `filled` are data and the rest a hole."""
    with path.open("xb") as file:
        file.truncate(size)
        for first in range(0, filled // BLOCK_BYTES, FILL_BLOCKS):
            file.write(b"".join(content(first + n, 0) for n in range(FILL_BLOCKS)))


class Guest:
    """Writes until `stop`."""

    def __init__(self, socket: Path, name: str) -> None:
        self.writes = 0
        self.longest_s = 0.0
        self.written: dict[int, int] = {}  # block to its last acknowledged write
        self._socket = socket
        self._name = name
        self._stopping = False
        self._client: NbdClient
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connect and begin to write."""
        self._client = await NbdClient.connect(self._socket, self._name, reconnect_s=RECONNECT_S)
        self._tasks = [asyncio.create_task(self._lane(lane)) for lane in range(LANES)]

    async def stop(self) -> None:
        """Finish what is in flight, flush, disconnect. Raises OSError if any write failed."""
        self._stopping = True
        try:
            await asyncio.gather(*self._tasks)
            await self._client.flush()
        finally:
            for task in self._tasks:
                task.cancel()
            await self._client.close()

    async def _lane(self, lane: int) -> None:
        chance = random.Random(lane)
        rows = self._client.size // BLOCK_BYTES // LANES
        for sequence in range(1, 1 << 62):
            if self._stopping:
                return
            block = chance.randrange(rows) * LANES + lane
            began_s = time.monotonic()
            await self._client.write(block * BLOCK_BYTES, content(block, sequence))
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            self.written[block] = sequence
            self.writes += 1
            if sequence % FLUSH_EVERY == 0:
                await self._client.flush()
            await asyncio.sleep(PAUSE_S)


def find_differences(path: Path, size: int, filled: int, written: dict[int, int]) -> list[int]:
    """Return the blocks of the file that don't hold what was written last."""
    wrong = []
    zeroes = bytes(BLOCK_BYTES)
    with path.open("rb") as file:
        for block in range(size // BLOCK_BYTES):
            sequence = written.get(block)
            if sequence is not None:
                expected = content(block, sequence)
            else:
                expected = content(block, 0) if block * BLOCK_BYTES < filled else zeroes
            if file.read(BLOCK_BYTES) != expected:
                wrong.append(block)
        if file.read(1):
            wrong.append(size // BLOCK_BYTES)
    return wrong
