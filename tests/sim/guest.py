"""Guests that overlap themselves, and ask as a frontend does."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from mirrord.core.geometry import Extent, Status
from mirrord.frontends.door import carry_on
from mirrord.storage.backend import UnreachableError
from mirrord.storage.completion import Completion
from tests.sim.checker import Checker
from tests.sim.disk import BLOCK
from tests.sim.loop import close, elapse
from tests.sim.world import World

DATA = Status.DATA


class Door(Protocol):
    """What a guest talks to."""

    size: int

    async def read(self, offset: int, length: int) -> Any: ...
    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None: ...
    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        punch: bool = True,
        fast: bool = False,
    ) -> None: ...
    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None: ...
    async def flush(self) -> None: ...
    async def extents(self, offset: int, length: int) -> list[Extent]: ...
    def dirty_extents(self, offset: int, length: int) -> list[Extent]: ...


class Guest:
    """A program inside the virtual machine, with `depth` requests in flight.

    It survives the death of the disk process as a machine with a reconnecting client does.
    """

    def __init__(
        self,
        world: World,
        checker: Checker,
        rng: random.Random,
        *,
        requests: int,
        depth: int,
        think_s: float,
        hot: float,
        late: bool = False,
        slow: Callable[[float], None],
        failed: Callable[[str, OSError, float], None],
    ) -> None:
        self.world = world
        self.checker = checker
        self.rng = rng
        self.requests = requests
        self.depth = depth
        self.think_s = think_s
        self.hot = hot  # share of the requests that go to the first blocks
        self.late = late  # waits for the end of the job
        self.slow = slow  # told how long each request took, in seconds
        self.failed = failed  # told of each request that failed, and how long that took

    async def run(self, door: Door) -> None:
        """Send the requests that are left."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self.depth):
                group.create_task(self._work(door), name="guest")

    async def read_all(self, door: Door) -> None:
        """Look at the whole disk, as a machine does that comes back."""
        await self._read(door, 0, door.size)

    async def _work(self, door: Door) -> None:
        rng = self.rng
        while self.requests > 0:
            self.requests -= 1
            began_s = self.world.loop.time()
            await self._request(door)
            self.slow(self.world.loop.time() - began_s)
            if self.think_s:
                await elapse(self.think_s * rng.random() * 2)

    async def _request(self, door: Door) -> None:
        rng = self.rng
        blocks = len(self.checker.now)
        first = rng.randrange(min(3, blocks) if rng.random() < self.hot else blocks)
        length = rng.choice((1, 1, 1, 2, 2, 3, 5, 9))
        offset = first * BLOCK
        length = min(length * BLOCK, door.size - offset)
        what = rng.random()
        if what < 0.55:
            await self._write(door, offset, length, fua=rng.random() < 0.15)
        elif what < 0.70:
            await self._zero(door, offset, length)
        elif what < 0.85:
            await self._flush(door)
        elif what < 0.97:
            await self._read(door, offset, length)
        else:
            await self._extents(door, offset, length)

    async def _write(self, door: Door, offset: int, length: int, *, fua: bool) -> None:
        number = self.world.tick() << 8
        data = b"".join(
            struct.pack("<Q", number | i)[: min(BLOCK, length - i * BLOCK)]
            for i in range(-(-length // BLOCK))
        )
        await self._change(door.write(offset, data, fua=fua), offset, data, fua)

    async def _zero(self, door: Door, offset: int, length: int) -> None:
        fua = self.rng.random() < 0.1
        if self.rng.random() < 0.5:
            request = door.trim(offset, length, fua=fua)
        else:
            request = door.write_zeroes(offset, length, fua=fua, punch=self.rng.random() < 0.7)
        await self._change(request, offset, bytes(length), fua)

    async def _change(
        self, request: Coroutine[Any, Any, None], offset: int, data: bytes, fua: bool
    ) -> None:
        world = self.world
        began_s = world.loop.time()
        values = self.checker.begin_write(offset, data)
        world.tell("guest >", request.__name__, offset, len(data), data[:BLOCK].hex(), "FUA" * fua)
        try:
            await eager(request)
        except OSError as error:
            self._failed(error, f"{request.__name__} {offset}+{len(data)}", began_s)
            if not world.dead:
                self.checker.fail_write(values)
        else:
            if not world.dead:
                world.tell("guest <", request.__name__, offset, len(data), data[:BLOCK].hex())
                self.checker.end_write(values, fua=fua)

    async def _flush(self, door: Door) -> None:
        began_s = self.world.loop.time()
        flush = self.checker.begin_flush()
        self.world.tell("guest > flush")
        try:
            await eager(door.flush())
        except OSError as error:
            self._failed(error, "flush", began_s)
            # A storage that was not reached lost nothing.
            if not self.world.dead and not isinstance(error, UnreachableError):
                self.checker.flush_failed()
        else:
            if not self.world.dead:
                self.world.tell("guest < flush")
                self.checker.end_flush(flush)

    async def _read(self, door: Door, offset: int, length: int) -> None:
        began_s = self.world.loop.time()
        read = self.checker.begin_read(offset, length)
        try:
            data = await eager(door.read(offset, length))
        except OSError as error:
            self._failed(error, "read", began_s)
            self.checker.end_read(read, None)
        else:
            if not self.world.dead:
                self.checker.end_read(read, bytes(data))

    async def _extents(self, door: Door, offset: int, length: int) -> None:
        """Ask for both kinds of block status."""
        began_s = self.world.loop.time()
        read = self.checker.begin_read(offset, length)
        try:
            found = await eager(door.extents(offset, length))
        except OSError as error:
            self._failed(error, "extents", began_s)
            self.checker.end_read(read, None)
        else:
            if self.world.dead:
                return
            stop = offset + length
            zero = [(e.offset, min(e.end, stop) - e.offset) for e in found if e.status is not DATA]
            self.checker.end_extents(read, zero)
            dirty = door.dirty_extents(offset, length)
            if not dirty or dirty[0].offset != offset or dirty[-1].end > stop:
                self.world.violate(f"dirty extents of {offset}+{length} are {dirty}")

    def _failed(self, error: OSError, doing: str, began_s: float) -> None:
        if not self.world.dead:
            self.world.tell("guest < error", doing, error)
            self.failed(doing, error, self.world.loop.time() - began_s)


async def eager(request: Coroutine[Any, Any, Any]) -> Any:
    """Run a request as a frontend does: by hand and outside of any task, as long as it waits for
    nothing but completions. What needs a task there (`asyncio.timeout`) fails; the rest goes on in
    a task.
    """
    loop = asyncio.get_running_loop()
    answer = loop.create_future()

    def step() -> None:
        if answer.done():  # its guest is dead
            return
        try:
            waits_for = request.send(None)
        except StopIteration as stop:
            answer.set_result(stop.value)
        except Exception as error:
            answer.set_exception(error)
        else:
            if type(waits_for) is Completion:
                waits_for.then = step
                return
            task = loop.create_task(_finish(carry_on(request, waits_for)), name="request")
            task.add_done_callback(lambda task: _pass_on(task, answer))

    loop.call_soon(step)
    try:
        return await answer
    finally:
        if not answer.done():
            close(request)


async def _finish(rest: Awaitable[Any]) -> Any:
    return await rest


def _pass_on(task: asyncio.Task[Any], answer: asyncio.Future[Any]) -> None:
    if task.cancelled():
        answer.cancel()
    elif task.exception() is not None:
        answer.set_exception(task.exception())  # type: ignore[arg-type]
    else:
        answer.set_result(task.result())
