"""Closing a disk: whoever has its descriptor's number in hand is waited for.

A number that was closed is the next open file's. An operation that comes too late would read or
write that one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from mirrord.core.geometry import KIB, MIB
from mirrord.storage import descriptor
from mirrord.storage.backend import Cache
from mirrord.storage.file import FileBackend
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import FileIo
from mirrord.storage.memory_pool import BufferPool
from tests.storage.conformance import pattern
from tests.storage.places import make_file, open_names

DEADLINE_S = 30
SIZE = 64 * KIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk."""
    return make_file(tmp_path / "disk", pattern(SIZE))


async def open_file(path: Path, io: FileIo, cache: Cache = Cache.WRITEBACK) -> FileBackend:
    """Open a file as a disk."""
    opened = await FilePlace(str(path), io).open(cache=cache)
    assert isinstance(opened, FileBackend)
    return opened


async def give_it_time() -> None:
    """Let everything go on that can: calls in threads, completions, and the loop."""
    for _ in range(100):
        await asyncio.to_thread(os.getpid)  # not by the `FileIo`, whose calls may be waited for


async def waits(closing: asyncio.Task[None]) -> bool:
    """Tell whether a `close` has to wait for something."""
    await give_it_time()
    return not closing.done()


class TestBuffers:
    """All buffers of a size are in use: direct operations wait for one."""

    @pytest.fixture
    async def backend(self, path: Path, io: FileIo) -> FileBackend:
        io.pool = BufferPool(((4096, 1), (64 * KIB, 1), (MIB, 1)))
        return await open_file(path, io, Cache.DIRECT)

    @pytest.mark.parametrize("what", ["read", "read_stored", "write", "edge"])
    async def test_who_waits_for_one_is_waited_for(self, path, io, backend, what) -> None:
        slot = io.pool.take(4096)
        work = {
            "read": lambda: backend.read(4096, 4096),
            "read_stored": lambda: backend.read_stored(4000, 90),
            "write": lambda: backend.write(4096, b"X" * 4096),
            "edge": lambda: backend.write(4100, b"X" * 10),
        }[what]()
        operation = asyncio.create_task(work)
        await asyncio.sleep(0)
        closing = asyncio.create_task(backend.close())
        assert await waits(closing)
        io.pool.give(slot)
        async with asyncio.timeout(DEADLINE_S):
            answer = await operation
            await closing
        before = pattern(SIZE)
        expected = {
            "read": before[4096:8192],
            "read_stored": before[4000:4090],
            "write": before[:4096] + b"X" * 4096 + before[8192:],
            "edge": before[:4100] + b"X" * 10 + before[4110:],
        }[what]
        assert (bytes(answer) if what.startswith("read") else path.read_bytes()) == expected

    @pytest.mark.parametrize("what", ["read", "write"])
    async def test_who_gave_up_waiting_is_not(self, path, io, backend, what) -> None:
        slot = io.pool.take(4096)
        work = backend.read(0, 4096) if what == "read" else backend.write(0, b"X" * 4096)
        operation = asyncio.create_task(work)
        await asyncio.sleep(0)
        operation.cancel()
        async with asyncio.timeout(DEADLINE_S):
            await backend.close()
        await asyncio.gather(operation, return_exceptions=True)
        io.pool.give(slot)
        await give_it_time()
        assert path.read_bytes() == pattern(SIZE)
        assert io.pool.free_count == 3

    async def test_who_waits_for_a_read_modify_write_is_waited_for(self, path, io, backend) -> None:
        await backend._edges.acquire()
        operation = asyncio.create_task(backend.write(0, b"X" * 4096))
        await asyncio.sleep(0)
        closing = asyncio.create_task(backend.close())
        assert await waits(closing)
        backend._edges.release()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(operation, closing)
        assert path.read_bytes() == b"X" * 4096 + pattern(SIZE)[4096:]

    async def test_who_comes_later_finds_nothing(self, io, backend) -> None:
        await backend.close()
        for late in (backend.read(0, 4096), backend.write(0, bytes(4096)), backend.flush()):
            with pytest.raises(OSError, match="Bad file"):
                await late


class TestCalls:
    """What runs in threads, its caller long gone."""

    async def test_an_abandoned_copy_holds_both_sides(self, tmp_path, path, some_io) -> None:
        source = await open_file(path, some_io)
        target = await open_file(make_file(tmp_path / "target", b"", SIZE), some_io)
        target._has_server = True  # so that something is copied below, on any file system
        begun, may_end = threading.Event(), threading.Event()
        real = target._copy_below

        def slow(*arguments: object) -> bool:
            begun.set()
            may_end.wait(DEADLINE_S)
            return real(*arguments)

        target._copy_below = slow
        copying = asyncio.create_task(target.copy_from(source, 0, SIZE))
        await some_io.call(begun.wait, DEADLINE_S)
        copying.cancel()
        closings = [asyncio.create_task(side.close()) for side in (source, target)]
        assert await waits(closings[0])
        assert await waits(closings[1])
        may_end.set()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*closings)
        assert (tmp_path / "target").read_bytes() == pattern(SIZE)

    async def test_what_hangs_elsewhere_holds_nothing_up(self, path, some_io) -> None:
        """A target whose server is gone must not keep the source open."""
        backend = await open_file(path, some_io)
        may_end = threading.Event()
        elsewhere = asyncio.create_task(some_io.call(may_end.wait, DEADLINE_S))
        await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_S):
            await backend.close()
        assert not elsewhere.done()
        may_end.set()
        await elsewhere

    async def test_a_second_descriptor_that_nobody_waits_for_is_closed(
        self, path, some_io, monkeypatch
    ) -> None:
        backend = await open_file(path, some_io)
        begun, may_end = threading.Event(), threading.Event()
        real = descriptor.reopen

        def slow(number: int) -> int:
            begun.set()
            may_end.wait(DEADLINE_S)
            return real(number)

        monkeypatch.setattr(descriptor, "reopen", slow)
        reading = asyncio.create_task(backend.read_stored(0, 4096))
        await some_io.call(begun.wait, DEADLINE_S)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        may_end.set()
        async with asyncio.timeout(DEADLINE_S):
            await backend.close()
        assert str(path) not in open_names()


@pytest.mark.parametrize("failing", [0, 1])
async def test_both_descriptors_are_closed_even_if_one_fails(
    path, some_io, monkeypatch, failing
) -> None:
    """close(2) tells of late write errors (NFS, quotas), having closed."""
    backend = await open_file(path, some_io)
    await backend.read_stored(0, 4096)
    numbers = (backend._descriptor, backend._other_descriptor)
    assert min(numbers) >= 0
    closed = []
    real = os.close

    def close(number: int) -> None:
        real(number)
        closed.append(number)
        if number == numbers[failing]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", close)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            await backend.close()
    assert closed == list(numbers)
