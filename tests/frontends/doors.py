"""A disk in memory whose requests tests can hold, fail and watch."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Sequence

from mirrord.core.geometry import Extent, Status
from mirrord.nbd.wire import Buffer
from mirrord.storage.completion import Completion

SIZE = 1 << 20
WAIT_S = 20  # for what happens within milliseconds on an idle machine


class Gate:
    """Closed at first. Requests wait before it in the three ways that a disk has."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._completions: list[Completion] = []

    async def wait(self, way: int) -> None:
        """Wait for a future, or for a completion, which may come with a further wait."""
        if way == 0:
            await self._event.wait()
            return
        completion = Completion(asyncio.get_running_loop())
        self._completions.append(completion)
        assert await completion == "open"
        if way == 1:
            completion = Completion(asyncio.get_running_loop())
            asyncio.get_running_loop().call_soon(completion.end, "again")
            assert await completion == "again"
            await asyncio.sleep(0)

    def open(self) -> None:
        """Let all go on."""
        self._event.set()
        for completion in self._completions:
            completion.end("open")


class MemoryDoor:
    """Holds its content in memory. `close_gate` makes requests wait until `open_gate`."""

    name = "disk"

    def __init__(self, size: int = SIZE, *, read_only: bool = False) -> None:
        self.data = bytearray(size)
        self.size = size
        self.read_only = read_only
        self.log: list[tuple[str, int, int, dict[str, bool]]] = []
        self.started: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.running = 0
        self.running_max = 0
        self.errors: dict[str, BaseException] = {}  # by the request's name
        self.short_reads = False
        self.zeroes_only = False  # keep nothing, answer zeroes: for sizes larger than memory
        self._gates: dict[str, Gate] = {}
        self._changed = asyncio.Event()

    def close_gate(self, *names: str) -> None:
        """Make requests of these names wait, from now on."""
        for name in names:
            self._gates[name] = Gate()

    def open_gate(self, *names: str) -> None:
        """Let them go on."""
        for name in names or tuple(self._gates):
            self._gates.pop(name).open()

    async def until(self, *, started: int = 0, ended: int = 0) -> None:
        """Wait until so many requests have begun, or ended."""
        async with asyncio.timeout(WAIT_S):
            while self.started.total() < started or self.ended.total() < ended:
                self._changed.clear()
                await self._changed.wait()

    async def _run(self, name: str, offset: int = 0, length: int = 0, **flags: bool) -> None:
        self.log.append((name, offset, length, flags))
        self.started[name] += 1
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        self._changed.set()
        try:
            if name in self._gates:
                await self._gates[name].wait(self.started.total() % 3)
            if name in self.errors:
                raise self.errors[name]
        finally:
            self.running -= 1
            self.ended[name] += 1
            self._changed.set()

    async def read(self, offset: int, length: int) -> Buffer:
        await self._run("read", offset, length)
        if self.zeroes_only:
            return bytes(length)
        return bytes(self.data[offset : offset + length - self.short_reads])

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        await self._run("write", offset, len(data), fua=fua)
        if not self.zeroes_only:
            self.data[offset : offset + len(data)] = data

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, punch: bool = True, fast: bool = False
    ) -> None:
        await self._run("write_zeroes", offset, length, fua=fua, punch=punch, fast=fast)
        if fast:
            raise OSError(errno.EOPNOTSUPP, "not faster")
        self._erase(offset, length)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self._run("trim", offset, length, fua=fua)
        self._erase(offset, length)

    def _erase(self, offset: int, length: int) -> None:
        if not self.zeroes_only:
            self.data[offset : offset + length] = bytes(length)

    async def flush(self) -> None:
        await self._run("flush")

    async def cache(self, offset: int, length: int) -> None:
        await self._run("cache", offset, length)

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        await self._run("extents", offset, length)
        half = max(length // 2, 1)
        return [
            Extent(offset, half, Status.DATA),
            Extent(offset + half, length - half, Status.HOLE),
        ]

    def dirty_extents(self, offset: int, length: int) -> Sequence[Extent]:
        return [Extent(offset, length, Status.DIRTY)]
