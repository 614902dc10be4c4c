"""Simulated files and directories that forget what was not made durable, and the backend on them.

A file is a row of blocks. Each block has what the platter holds and the versions written since:
a power cut leaves any one of them, block by block. A flush makes the versions durable that were
written before it began. A flush that fails takes the versions away from the list of what is to
be written, as Linux does: the cache goes on showing them until it forgets them, and the next
flush succeeds without having written anything ("fsyncgate").
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence

from xxhash import xxh3_64_intdigest

from mirrord.core.geometry import Extent, Status, merge
from mirrord.storage.backend import Backend, Buffer, Capabilities, Hasher, Identity, Watch
from tests.helpers import tell_the_end
from tests.sim.loop import elapse
from tests.sim.world import World

BLOCK = 8  # bytes that are written or lost as one: a sector, in small


class SimFile:
    """An inode: content, cached and durable."""

    def __init__(self, world: World, inode: int, size: int, content: bytes | None = None) -> None:
        self.world = world
        self.inode = inode
        self.size = size
        self.view = bytearray(content or bytes(size))  # what a reader sees
        self.platter = bytearray(self.view)  # what a power cut leaves at least
        self.versions: dict[int, list[tuple[int, bytes]]] = {}
        self.forgettable: set[int] = set()  # a failed flush lost these; the cache still has them
        self.allocated: set[int] = {b for b in range(self.blocks) if any(self.block(b))}
        self.unseen_in = 0  # the life in which a flush failed and nobody was told yet
        self.open_in: dict[SimBackend, int] = {}  # who has it open, in which life
        world.survivors.append(self)

    @property
    def blocks(self) -> int:
        return -(-self.size // BLOCK)

    def block(self, index: int) -> bytes:
        return bytes(self.view[index * BLOCK : (index + 1) * BLOCK])

    def put(self, index: int, data: bytes) -> None:
        """Write one block into the cache."""
        start = index * BLOCK
        self.view[start : start + len(data)] = data
        self.versions.setdefault(index, []).append((self.world.tick(), data))
        self.forgettable.discard(index)

    def sync(self, tick: int, only: range | None = None) -> None:
        """Make durable what was written before `tick`."""
        for index in list(self.versions) if only is None else only:
            kept = []
            for written, data in self.versions.pop(index, ()):
                if written <= tick:
                    self.platter[index * BLOCK : index * BLOCK + len(data)] = data
                else:
                    kept.append((written, data))
            if kept:
                self.versions[index] = kept

    def sync_failed(self, tick: int) -> None:
        """Some blocks reach the platter, the others are forgotten, and nobody will know."""
        self.world.flush_failed(self)
        self.unseen_in = self.world.life
        for index in list(self.versions):
            kept = []
            lands = self.world.random() < 0.3
            for written, data in self.versions.pop(index):
                if written > tick:
                    kept.append((written, data))
                elif lands:
                    self.platter[index * BLOCK : index * BLOCK + len(data)] = data
            if kept:
                self.versions[index] = kept
            elif not lands:
                self.forgettable.add(index)

    def told(self) -> None:
        if not self.world.dead:
            self.unseen_in = 0

    def forget(self) -> None:
        """The cache drops some of what a failed flush has lost: the old content is back."""
        for index in list(self.forgettable):
            if self.world.random() < 0.3:
                self.drop(index)

    def drop(self, index: int) -> None:
        start = index * BLOCK
        self.view[start : start + BLOCK] = self.platter[start : start + BLOCK]
        self.forgettable.discard(index)

    def crash(self, power: bool) -> None:
        self.open_in.clear()
        if not power:
            return
        rng = self.world.rng
        for index, versions in self.versions.items():
            pick = rng.randrange(len(versions) + 1)
            if pick:
                data = versions[pick - 1][1]
                self.platter[index * BLOCK : index * BLOCK + len(data)] = data
        self.versions.clear()
        self.forgettable.clear()
        self.unseen_in = 0
        self.view[:] = self.platter


class SimDirectory:
    """Names of files. Each change becomes durable with `sync`, or by luck."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.names: dict[str, SimFile] = {}
        self._durable: dict[str, SimFile] = {}
        self._changes: list[tuple[str | None, str | None, SimFile]] = []  # from, to, file
        world.survivors.append(self)

    def change(self, old: str | None, new: str | None, file: SimFile) -> None:
        """Create (`old` None), remove (`new` None) or rename; one atomic step."""
        if old is not None:
            del self.names[old]
        if new is not None:
            self.names[new] = file
        self._changes.append((old, new, file))

    def sync(self) -> None:
        self._durable = dict(self.names)
        self._changes.clear()

    def durable(self) -> dict[str, SimFile]:
        return self._durable

    def crash(self, power: bool) -> None:
        if not power:
            return
        for old, new, file in self._changes:
            if self.world.random() < 0.5:
                continue
            if old is not None:
                if self._durable.get(old) is not file:
                    continue
                del self._durable[old]
            if new is not None:
                self._durable[new] = file
        self._changes.clear()
        self.names = dict(self._durable)


class SimBackend(Backend):
    """A simulated file, opened. `who` is source or target, for faults and crash points."""

    def __init__(self, world: World, file: SimFile, who: str, capabilities: Capabilities) -> None:
        self.world = world
        self.file = file
        self.who = who
        self.size = file.size
        self.capabilities = capabilities
        self.identity = Identity("file", world.boots, file.inode, file.size)
        self.closed = False
        self._calls = 0
        self._carries = world.random() < 0.5
        self._idle: asyncio.Event | None = None
        file.open_in[self] = world.life

    async def read(self, offset: int, length: int) -> Buffer:
        return await self._read(offset, length, "read", stored=False)

    async def digests_stored(self, runs: Sequence[tuple[int, int]]) -> list[int] | None:
        """Half of the time: read one after another."""
        if self.world.random() < 0.5:
            return None
        return [xxh3_64_intdigest(await self.read_stored(*run)) for run in runs]

    async def read_stored(self, offset: int, length: int) -> Buffer:
        return await self._read(offset, length, "read", stored=True)

    async def _read(self, offset: int, length: int, operation: str, *, stored: bool) -> Buffer:
        file, answer = self.file, bytearray(length)
        file.forget()

        def take(start: int, stop: int) -> None:
            # What is not written back yet is in every reader's way, as with Linux's page cache.
            past = stored and start // BLOCK not in file.versions
            seen = file.platter if past else file.view
            answer[start - offset : stop - offset] = seen[start:stop]

        effects = [lambda s=s, e=e: take(s, e) for s, e in self._pieces(offset, length)]
        await self._call(operation, effects, told=(offset, length))
        return bytes(answer)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        file = self.file

        def put(start: int, stop: int) -> None:
            index = start // BLOCK
            block = bytearray(file.block(index))
            at = start - index * BLOCK
            block[at : at + stop - start] = data[start - offset : stop - offset]
            file.put(index, bytes(block))
            file.allocated.add(index)

        effects = [lambda s=s, e=e: put(s, e) for s, e in self._pieces(offset, len(data))]
        await self._call("write", effects, told=(offset, len(data), bytes(data[:BLOCK]).hex()))
        if fua:
            await self._sync(range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)))

    def begin_write(
        self, offset: int, data: Buffer, ended: Callable[[OSError | None], None]
    ) -> bool:
        """Those that carry, as files do, can begin a write by themselves."""
        if self._carries:
            tell_the_end(self.write(offset, bytes(data)), ended)
        return self._carries

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, punch: bool = True, fast: bool = False
    ) -> None:
        if fast and not self.capabilities.fast_zeroes:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        await self._zero("zeroes", offset, length, fua, punch)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self._zero("trim", offset, length, fua, True)

    async def _zero(self, operation: str, offset: int, length: int, fua: bool, punch: bool) -> None:
        file = self.file

        def put(start: int, stop: int) -> None:
            index = start // BLOCK
            block = bytearray(file.block(index))
            at = start - index * BLOCK
            block[at : at + stop - start] = bytes(stop - start)
            file.put(index, bytes(block))
            if punch and not any(block):
                file.allocated.discard(index)
            else:
                file.allocated.add(index)

        effects = [lambda s=s, e=e: put(s, e) for s, e in self._pieces(offset, length)]
        await self._call(operation, effects, told=(offset, length))
        if fua:
            await self._sync(range(offset // BLOCK, -(-(offset + length) // BLOCK)))

    async def flush(self) -> None:
        await self._sync(None)

    async def _sync(self, only: range | None) -> None:
        tick, file = self.world.tick(), self.file
        try:
            await self._call(
                "flush",
                [lambda: file.sync(tick, only)],
                failed=lambda: file.sync_failed(tick),
                told="" if only is None else only,
            )
        except OSError:
            self.world.loop.call_soon(file.told)  # once the caller has acted on it
            raise
        for _ in range(20):  # whoever hears of a failure acts before another hears of a success
            if file.unseen_in != self.world.life:
                break
            await elapse(0)
        if 0 < file.unseen_in < self.world.life:  # Linux tells the next one who opens the file
            file.unseen_in = 0
            raise OSError(errno.EIO, "a flush had failed before this process began")

    async def extents(self, offset: int, length: int) -> list[Extent]:
        found: list[Extent] = []
        file, chance = self.file, self.world.random

        def look() -> None:
            for start, stop in self._pieces(offset, length):
                index = start // BLOCK
                status = Status.DATA
                if not any(file.block(index)) and chance() < 0.9:
                    status = Status.ZERO if index in file.allocated else Status.HOLE
                found.append(Extent(start, stop - start, status))
                if chance() < 0.05:
                    break

        await self._call("extents", [look], told=(offset, length))
        return merge(found)

    async def copy_from(self, source: Backend, offset: int, length: int) -> bool:
        if not isinstance(source, SimBackend) or self.world.random() < 0.5:
            return False
        origin, file = source.file, self.file

        def put(start: int, stop: int) -> None:
            index = start // BLOCK
            block = bytearray(file.block(index))
            at = start - index * BLOCK
            block[at : at + stop - start] = origin.view[start:stop]
            file.put(index, bytes(block))
            file.allocated.add(index)

        effects = [lambda s=s, e=e: put(s, e) for s, e in self._pieces(offset, length)]
        await self._call("write", effects, told=("server-side", offset, length))
        return True

    async def carry_from(
        self,
        source: Backend,
        runs: Sequence[tuple[int, int]],
        hasher: Hasher | None,
        watch: Watch,
    ) -> int | None:
        """Half of the targets: read, hash and write, as one call that may fail in the middle."""
        if not isinstance(source, SimBackend) or not self._carries:
            return None
        for offset, length in runs:
            data = await source.read(offset, length)
            if hasher is not None:
                hasher.update(data)
            with watch:
                await self.write(offset, data)
        return sum(length for _, length in runs)

    @property
    def busy(self) -> bool:
        return self._calls > 0

    async def close(self) -> None:
        self.closed = True
        while self._calls and not self.world.dead:
            self._idle = self._idle or asyncio.Event()
            self._idle.clear()
            await self._idle.wait()
        self.file.open_in.pop(self, None)

    async def _call(
        self,
        operation: str,
        effects: list[Callable[[], None]],
        *,
        failed: Callable[[], None] | None = None,
        told: object = "",
    ) -> None:
        if self.closed:
            self.world.violate(f"{self.who}: {operation} after close")
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        await self.world.call(
            self.who, operation, effects, failed=failed, told=told, owner=self,
            by_hand=self._carries,
        )  # fmt: skip

    def began(self) -> None:
        self._calls += 1

    def ended(self) -> None:
        self._calls -= 1
        if not self._calls and self._idle is not None:
            self._idle.set()

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int]]:
        end = offset + length
        if length <= 0 or offset < 0 or end > self.size:
            self.world.violate(f"{self.who}: range {offset}+{length} outside the disk")
        pieces = []
        while offset < end:
            stop = min(end, offset - offset % BLOCK + BLOCK)
            pieces.append((offset, stop))
            offset = stop
        return pieces
