"""The rings: full, overfull, interrupted, abandoned; and the pool of buffers."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from mirrord.core.geometry import KIB, MIB
from mirrord.storage import uring
from mirrord.storage.completion import Completion
from mirrord.storage.fileio import FileIo, ThreadIo, open_io
from mirrord.storage.memory_pool import BufferPool
from mirrord.storage.uring import Ring, UringIo
from tests.helpers import require_io_uring
from tests.storage.conformance import pattern
from tests.storage.places import make_file

DEADLINE_S = 30
SIZE = 4 * MIB


@pytest.fixture
def descriptor(tmp_path: Path):
    """A file with a pattern, open past the page cache."""
    path = make_file(tmp_path / "file", pattern(SIZE))
    opened = os.open(path, os.O_RDWR | os.O_DIRECT)
    yield opened
    os.close(opened)


@pytest.fixture
async def small() -> AsyncIterator[UringIo]:
    """A ring of four entries, so eight operations in flight."""
    require_io_uring()
    io = UringIo(entries=4)
    yield io
    await io.close()


def by_hand(work: Coroutine[Any, Any, None]) -> None:
    """Run what waits for nothing but completions as a frontend does."""
    try:
        waits_for = work.send(None)
    except StopIteration:
        return
    assert type(waits_for) is Completion
    waits_for.then = partial(by_hand, work)


class TestRing:
    """What the kernel and this module agree on."""

    async def test_more_operations_than_the_rings_hold(self, small, descriptor) -> None:
        chance = random.Random(1)
        offsets = [chance.randrange(SIZE // 4096) * 4096 for _ in range(1000)]
        async with asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(
                *(small.read_direct(descriptor, offset, 4096) for offset in offsets)
            )
        expected = pattern(SIZE)
        for offset, answer in zip(offsets, answers, strict=True):
            assert answer == expected[offset : offset + 4096]
        assert small.pool.free_count == BufferPool().free_count

    async def test_a_busy_kernel_is_asked_again(self, small, descriptor, monkeypatch) -> None:
        real = small._ring.submit
        refusals = [errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOMEM] * 3

        def refuse_first() -> None:
            if refusals:
                code = refusals.pop()
                raise OSError(code, os.strerror(code))
            real()

        monkeypatch.setattr(small._ring, "submit", refuse_first)
        async with asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(
                *(small.read_direct(descriptor, at * 4096, 4096) for at in range(40))
            )
        assert b"".join(answers) == pattern(SIZE)[: 40 * 4096]
        assert not refusals

    async def test_who_goes_on_by_hand_overtakes_nobody(self, small, descriptor) -> None:
        ended: list[str] = []

        async def chain() -> None:
            for at in range(50):
                await small.read_direct(descriptor, at * 4096, 4096)
            ended.append("chain")

        for _ in range(8):  # as many as may be in flight
            by_hand(chain())
        async with asyncio.timeout(DEADLINE_S):
            await small.read_direct(descriptor, 0, 4096)
            ended.append("late")
            await small.settle(descriptor)
        assert ended[0] == "late"

    @pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
    async def test_one_who_fails_going_on_costs_nobody_an_answer(
        self, small, descriptor, error, monkeypatch
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        told: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        real, held = small._ring.reap, []

        def reap() -> list[tuple[int, int, int]]:
            held.extend(real())
            all_of_them = sorted(held) if len(held) == 5 else []  # as they were started
            del held[: len(all_of_them)]
            return all_of_them

        monkeypatch.setattr(small._ring, "reap", reap)  # all at once
        small.read_direct(descriptor, 0, 4096).send(None).then = fail
        assert small.begin_write(descriptor, 0, b"unaligned", fail)
        reads = (small.read_direct(descriptor, at * 4096, 4096) for at in range(3))
        async with asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(*reads)
        loop.set_exception_handler(None)
        assert b"".join(answers) == pattern(SIZE)[: 3 * 4096]
        assert [type(one) for one in told] == [error, error]
        assert small._in_flight == 0

    async def test_a_partial_submission_goes_on(self, small, descriptor, monkeypatch) -> None:
        """The kernel may take fewer entries than it was given."""
        real = uring._enter
        monkeypatch.setattr(
            uring, "_enter", lambda number, fd, count, *rest: real(number, fd, min(count, 1), *rest)
        )
        async with asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(
                *(small.read_direct(descriptor, at * 4096, 4096) for at in range(20))
            )
        assert b"".join(answers) == pattern(SIZE)[: 20 * 4096]

    async def test_interrupted_and_short_operations_are_continued(
        self, small, descriptor, tmp_path, monkeypatch
    ) -> None:
        cached = os.open(tmp_path / "file", os.O_RDWR)
        real = small._ring.reap
        results = iter([-errno.EINTR, -errno.EAGAIN, 512, 512])

        def reap() -> list[tuple[int, int, int]]:
            return [(key, next(results, result), flags) for key, result, flags in real()]

        monkeypatch.setattr(small._ring, "reap", reap)
        assert await small.read_direct(descriptor, 0, 4096) == pattern(SIZE)[:4096]
        for change in (
            lambda: small.write_direct(descriptor, 4096, b"d" * 4096, dsync=False),
            lambda: small.write(cached, 8192, b"c" * 4096, dsync=True),
        ):
            results = iter([-errno.EAGAIN, 512, 1024])
            await change()
        results = iter([100, -errno.EINTR, 1000])
        assert bytes(await small.read(cached, 4096, 8192)) == b"d" * 4096 + b"c" * 4096
        os.close(cached)

    async def test_a_begun_write_goes_on_and_tells_how_it_ended(
        self, small, descriptor, tmp_path, monkeypatch
    ) -> None:
        cached = os.open(tmp_path / "file", os.O_RDWR)
        real = small._ring.reap
        results: Iterator[int] = iter(())

        def reap() -> list[tuple[int, int, int]]:
            return [(key, next(results, result), flags) for key, result, flags in real()]

        monkeypatch.setattr(small._ring, "reap", reap)
        told: asyncio.Queue[OSError | None] = asyncio.Queue()
        for wanted, number in (
            ([-errno.EAGAIN, 512, 1024, -errno.EINTR], None),
            ([1000, -errno.ENOSPC], errno.ENOSPC),
            ([0], errno.EIO),
            ([-errno.EAGAIN] * 100, errno.EAGAIN),
        ):
            data = os.urandom(4096)
            results = iter(wanted)
            assert small.begin_write(cached, 4096, data, told.put_nowait)
            error = await asyncio.wait_for(told.get(), DEADLINE_S)
            assert (error and error.errno) == number
            assert told.empty()
            if number is None:
                assert os.pread(cached, 4096, 4096) == data
        results = iter(())
        many = [os.urandom(512) for _ in range(100)]  # more than the rings hold
        for at, data in enumerate(many):
            small.begin_write(cached, at * 512, data, told.put_nowait)
        for _ in many:
            assert await asyncio.wait_for(told.get(), DEADLINE_S) is None
        assert os.pread(cached, 51200, 0) == b"".join(many)
        os.close(cached)

    async def test_endless_interruption_is_an_error(self, small, descriptor, monkeypatch) -> None:
        real = small._ring.reap
        monkeypatch.setattr(
            small._ring, "reap", lambda: [(key, -errno.EAGAIN, 0) for key, _, _ in real()]
        )
        for attempt in (
            small.read_direct(descriptor, 0, 4096),
            small.write_direct(descriptor, 0, bytes(4096), dsync=False),
            small.fallocate(descriptor, 1, 0, 4096),
        ):
            with pytest.raises(BlockingIOError):
                await attempt

    async def test_a_failed_sync_is_not_tried_again(self, small, descriptor, monkeypatch) -> None:
        real = small._ring.reap
        results = iter([-errno.EIO])
        monkeypatch.setattr(
            small._ring, "reap", lambda: [(key, next(results), 0) for key, _, _ in real()]
        )
        with pytest.raises(OSError, match="Input/output error"):
            await small.datasync(descriptor)

    async def test_old_and_forbidding_kernels_are_refused(self, monkeypatch) -> None:
        require_io_uring()
        monkeypatch.setattr(uring, "_FEATURES", 1 << 31)
        with pytest.raises(OSError, match=r"5\.6"):
            Ring()

    def test_uvloop_watches_it_too(self, tmp_path) -> None:
        require_io_uring()
        path = make_file(tmp_path / "file", pattern(SIZE))

        async def main() -> bytes:
            io = UringIo()
            opened = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                return await io.read_direct(opened, 4096, 8192)
            finally:
                await io.close()
                os.close(opened)

        assert uvloop.run(main()) == pattern(SIZE)[4096:12288]


class TestBothWays:
    """What io_uring and threads have in common."""

    async def test_failures_are_os_errors(self, io: FileIo, tmp_path) -> None:
        path = make_file(tmp_path / "file", bytes(4096))
        opened = os.open(path, os.O_RDONLY)
        with pytest.raises(OSError, match="Bad file") as caught:
            await io.write(opened, 0, b"x", dsync=False)
        assert caught.value.errno == errno.EBADF
        with pytest.raises(OSError, match="shorter") as caught:
            await io.read(opened, 4000, 200)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="Bad file"):
            await io.fallocate(opened, 0, 0, 4096)
        os.close(opened)
        with pytest.raises(OSError, match="Bad file"):
            await io.datasync(opened)

    async def test_abandoned_operations_give_their_buffers_back(
        self, io: FileIo, descriptor
    ) -> None:
        tasks = [
            asyncio.create_task(io.read_direct(descriptor, at % 4 * MIB, MIB)) for at in range(50)
        ]  # most wait for a buffer
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*tasks, return_exceptions=True)
            while io.is_busy(descriptor):
                await io.settle(descriptor)
        assert io.pool.free_count == BufferPool().free_count

    async def test_settling_does_not_wait_for_what_comes_later(
        self, io: FileIo, descriptor
    ) -> None:
        going = True

        async def keep_reading() -> None:
            while going:
                await io.read_direct(descriptor, 0, 64 * KIB)

        readers = [asyncio.create_task(keep_reading()) for _ in range(3)]
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(20):
                await io.settle(descriptor)
                await io.read_direct(descriptor, 0, 4096)
            going = False
            await asyncio.gather(*readers)

    async def test_a_call_that_was_abandoned_is_waited_for(self, io: FileIo) -> None:
        import threading

        ended, may_end = threading.Event(), threading.Event()

        def work() -> None:
            may_end.wait(DEADLINE_S)
            ended.set()
            raise ValueError("nobody's")

        task = asyncio.create_task(io.call(work))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        may_end.set()
        await io.close()
        assert ended.is_set()

    async def test_closing_twice(self, io: FileIo, descriptor) -> None:
        await io.read_direct(descriptor, 0, 4096)
        await io.close()
        await io.close()


class TestPool:
    """Bounded, aligned, fair."""

    def test_slots_are_aligned_and_apart(self) -> None:
        pool = BufferPool(((4096, 2), (8192, 1)))
        slots = [pool.take(1), pool.take(4096), pool.take(4097)]
        assert all(slot and slot.address % 4096 == 0 for slot in slots)
        for number, slot in enumerate(slots):
            slot.view[:] = bytes([number]) * len(slot.view)
        assert [slot.view[0] for slot in slots] == [0, 1, 2]
        assert pool.take(8192) is None
        with pytest.raises(ValueError, match="8193"):
            pool.take(8193)

    async def test_who_waits_longest_is_next_and_nobody_overtakes(self) -> None:
        pool = BufferPool(((4096, 1),))
        slot = pool.take(1)
        order = []

        async def wait(number: int) -> None:
            mine = await pool.wait(1)
            order.append(number)
            assert pool.take(1) is None
            await asyncio.sleep(0)
            pool.give(mine)

        tasks = [asyncio.create_task(wait(number)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        pool.give(slot)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 2, 3]
        assert pool.free_count == 1

    async def test_a_slot_handed_to_a_cancelled_waiter_comes_back(self) -> None:
        pool = BufferPool(((4096, 1),))
        slot = pool.take(1)
        task = asyncio.create_task(pool.wait(1))
        await asyncio.sleep(0)
        pool.give(slot)
        task.cancel()  # in the same instant
        await asyncio.gather(task, return_exceptions=True)
        assert pool.free_count == 1


class TestChoice:
    """Which way is taken."""

    async def test_threads_where_io_uring_is_forbidden(self, monkeypatch) -> None:
        def forbidden(*_: object) -> None:
            raise PermissionError(errno.EPERM, "forbidden")

        monkeypatch.setattr(uring, "_set_up", forbidden)
        io = open_io()
        assert isinstance(io, ThreadIo)
        await io.close()
        with pytest.raises(PermissionError):
            open_io("io_uring")

    async def test_by_name(self) -> None:
        require_io_uring()
        for name in ("io_uring", "threads"):
            io = open_io(name)
            assert io.name == name
            await io.close()
