"""The simulated files of one job: journal, intent map, dirty map.

What is durable when is what `engine.store.JobStore` says, and not a bit more. `SimFiles` is
what outlives the process, `SimStore` is how one process has it open.

* journal: a write is in the cache, then durable. A power cut between keeps it, loses it or tears
  it (any of its words). A failed `write_log` may have left it durable, in the
  cache (seen by the next process of this boot), or nowhere.
* intent map: the same, byte by byte (a byte stands for a page).
* dirty map: shared memory. A kill leaves it as it was at that instant; a power cut leaves an
  old state, zeroes or garbage. It is of this boot only once somebody has vouched for it.
"""

from __future__ import annotations

import errno
import os

from mirrord.core import journal
from mirrord.core.journal import Kind
from mirrord.engine.store import JobStore
from tests.sim.world import World

NO_BOOT = 0
KIND_AT = 8  # where a journal record has its kind


class Sheet:
    """A small file with a cache: what is seen, what is durable, what waits between."""

    def __init__(self, world: World, content: bytes, unit: int) -> None:
        self.world = world
        self.view = bytearray(content)
        self.durable = bytearray(content)
        self.unit = unit
        self.waiting: list[tuple[int, int, bytes]] = []  # tick, offset, data

    def put(self, offset: int, data: bytes) -> None:
        if offset < 0 or offset + len(data) > len(self.view):
            self.world.violate(f"write outside a preallocated file: {offset}+{len(data)}")
            return
        self.view[offset : offset + len(data)] = data
        self.waiting.append((self.world.tick(), offset, data))

    def sync(self, tick: int) -> None:
        for written, offset, data in self.waiting:
            if written <= tick:
                self.durable[offset : offset + len(data)] = data
        self.waiting = [entry for entry in self.waiting if entry[0] > tick]

    def sync_failed(self) -> None:
        """Some reached the platter; the others Linux forgets, and the cache still shows them."""
        if self.world.random() < 0.5:
            for _, offset, data in self.waiting:
                self.durable[offset : offset + len(data)] = data
        self.waiting = []

    def lose(self) -> None:
        """Keep, lose or tear what was not durable."""
        rng = self.world.rng
        for _, offset, data in self.waiting:
            fate = rng.random()
            if fate < 0.3:
                stop = len(data)
            elif fate < 0.6:
                stop = 0
            elif fate < 0.8:
                stop = rng.randrange(-(-len(data) // self.unit) + 1) * self.unit
            else:
                for at in range(0, len(data), self.unit):
                    if rng.random() < 0.5:
                        word = data[at : at + self.unit]
                        self.durable[offset + at : offset + at + len(word)] = word
                continue
            part = data[:stop]
            self.durable[offset : offset + len(part)] = part
        self.waiting.clear()
        self.view[:] = self.durable


class SimFiles:
    """A job's files, across lives."""

    def __init__(self, world: World, job_id: str, dirty_bytes: int) -> None:
        self.world = world
        self.job_id = job_id
        self.log: Sheet | None = None
        self.map: Sheet | None = None
        self.dirty = bytearray(dirty_bytes)
        self.boot = NO_BOOT  # on which the memory was last vouched for
        self._old_dirty = bytes(dirty_bytes)
        self.kinds: set[Kind] = set()  # of the records that anybody tried to write
        self.map_lost = False  # row C23: the map can't be read any more
        world.survivors.append(self)

    def crash(self, power: bool) -> None:
        rng = self.world.rng
        frozen = bytearray(self.dirty)  # the dead process may go on writing into the old one
        self.dirty = frozen
        if not power:
            self._old_dirty = bytes(frozen)
            return
        for sheet in (self.log, self.map):
            if sheet is not None:
                sheet.lose()
        fate = rng.random()
        if fate < 0.3:
            self.dirty = bytearray(self._old_dirty)
        elif fate < 0.6:
            self.dirty = bytearray(len(frozen))
        elif fate < 0.9:
            self.dirty = bytearray(rng.randbytes(len(frozen)))
        if self.map is not None and rng.random() < 0.02:
            self.map_lost = True


class SimStore(JobStore):
    """The files, open in one process."""

    def __init__(self, files: SimFiles) -> None:
        self.files = files
        self.world = files.world
        self.job_id = files.job_id
        self.same_boot = files.boot == files.world.boots
        if not self.same_boot:  # not believed, and so not to be believed by the next process
            files.dirty[:] = b"\xff" * len(files.dirty)
            files.boot = 0
        self.dirty = memoryview(files.dirty)

    def vouch(self) -> None:
        if not self.world.dead:
            self.files.boot = self.world.boots

    async def create(self, map_bytes: bytes) -> None:
        files = self.files

        def preallocate() -> None:
            files.log = Sheet(self.world, bytes(journal.CAPACITY_BYTES), journal.WORD_BYTES)
            files.map = Sheet(self.world, map_bytes, 1)

        await self.world.call("store", "create", [preallocate], failed=lambda: None)

    async def read_log(self) -> bytes:
        log = self.files.log
        if log is None:
            return b""

        def secure() -> None:
            log.durable[:] = log.view
            log.waiting.clear()

        await self.world.call("store", "read_log", [secure], failed=lambda: None)
        return bytes(log.view)

    async def write_log(self, offset: int, data: bytes) -> None:
        for kind in Kind:
            if kind.value == data[KIND_AT : KIND_AT + 4]:
                self.files.kinds.add(kind)
                self.world.tell("record", kind.name)
        await self._write("write_log", self._sheet(self.files.log), offset, data, durable=True)

    async def read_map(self) -> bytes | None:
        sheet = self.files.map
        if sheet is None or self.files.map_lost:
            return None

        def secure() -> None:
            sheet.durable[:] = sheet.view
            sheet.waiting.clear()

        await self.world.call("store", "read_map", [secure], failed=lambda: None)
        return bytes(sheet.view)

    async def write_map(self, offset: int, data: bytes, *, durable: bool) -> None:
        await self._write("write_map", self._sheet(self.files.map), offset, data, durable=durable)

    async def close(self) -> None:
        self.dirty = memoryview(bytearray(len(self.dirty)))

    async def _write(
        self, operation: str, sheet: Sheet, offset: int, data: bytes, *, durable: bool
    ) -> None:
        data = bytes(data)
        await self.world.call(
            "store", operation, [lambda: sheet.put(offset, data)], told=(offset, len(data))
        )
        if durable:
            tick = self.world.tick()
            await self.world.call(
                "store",
                f"sync_{operation}",
                [lambda: sheet.sync(tick)],
                failed=sheet.sync_failed,
            )

    def _sheet(self, sheet: Sheet | None) -> Sheet:
        if sheet is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return sheet
