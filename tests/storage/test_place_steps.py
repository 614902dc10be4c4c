"""The steps of a file's place: one after another, abandoned or not; patient; after a crash."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirrord.core.geometry import MIB
from mirrord.errors import RefusedError
from mirrord.storage import durable
from mirrord.storage.backend import Cache, Identity
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import FileIo
from tests.storage.conformance import pattern
from tests.storage.places import make_file, open_names

JOB = "0d4fbd9c-7a52-4f7c-9d2b-5e1c8f6a3b71"
PART = f".target.mirrord-{JOB}.part"
SIZE = MIB
DEADLINE_S = 30


@pytest.fixture
async def source(tmp_path: Path, some_io: FileIo):
    """The disk, open."""
    path = make_file(tmp_path / "source", pattern(SIZE))
    opened = await FilePlace(str(path), some_io).open()
    yield opened
    await opened.close()


@pytest.fixture
def place(tmp_path: Path, some_io: FileIo) -> FilePlace:
    """Where it shall go."""
    return FilePlace(str(tmp_path / "target"), some_io)


class Held:
    """Holds the next call of a function in its thread, until it is let go."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.real = real

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self.begun.is_set():
            self.begun.set()
            assert self.may_end.wait(DEADLINE_S)
        return self.real(*arguments, **named)


async def cancel_inside(io: FileIo, held: Held, work: Any) -> None:
    """Start `work`, and cancel it when it is inside what is held."""
    task = asyncio.create_task(work)
    assert await io.call(held.begun.wait, DEADLINE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class TestCancelled:
    """The thread goes on when its caller is gone."""

    async def test_the_next_step_waits_for_an_abandoned_one(
        self, tmp_path, place, source, some_io, monkeypatch
    ) -> None:
        target = await place.create(JOB, source, cache=Cache.WRITEBACK)
        held = Held(durable.rename_no_replace)
        monkeypatch.setattr(durable, "rename_no_replace", held)
        await cancel_inside(some_io, held, place.publish(JOB))
        withdrawing = asyncio.create_task(place.withdraw(JOB))
        for _ in range(100):  # all the time that it could want
            await asyncio.to_thread(os.getpid)
        assert not withdrawing.done()
        held.may_end.set()
        async with asyncio.timeout(DEADLINE_S):
            await withdrawing
        assert (tmp_path / PART).exists()
        assert not (tmp_path / "target").exists()
        await target.close()

    async def test_a_step_that_was_given_up_while_it_waited_never_runs(
        self, tmp_path, place, source, some_io, monkeypatch
    ) -> None:
        target = await place.create(JOB, source, cache=Cache.WRITEBACK)
        held = Held(durable.sync_directory)
        monkeypatch.setattr(durable, "sync_directory", held)
        withdrawing = asyncio.create_task(place.withdraw(JOB))
        assert await some_io.call(held.begun.wait, DEADLINE_S)
        publishing = asyncio.create_task(place.publish(JOB))
        await asyncio.sleep(0)
        publishing.cancel()
        held.may_end.set()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(withdrawing, publishing, return_exceptions=True)
            await place.withdraw(JOB)
        assert (tmp_path / PART).exists()
        await target.close()

    async def test_a_disk_that_nobody_waits_for_is_closed(
        self, tmp_path, some_io, monkeypatch
    ) -> None:
        path = str(make_file(tmp_path / "disk", pattern(SIZE)))
        held = Held(durable.lock_disk)
        monkeypatch.setattr(durable, "lock_disk", held)
        await cancel_inside(some_io, held, FilePlace(path, some_io).open())
        held.may_end.set()
        async with asyncio.timeout(DEADLINE_S):
            await some_io.settle_calls()
        await (await FilePlace(path, some_io).open()).close()

    async def test_a_target_that_nobody_waits_for_can_be_discarded(
        self, tmp_path, place, source, some_io, monkeypatch
    ) -> None:
        held = Held(durable.lock_disk)
        monkeypatch.setattr(durable, "lock_disk", held)
        await cancel_inside(some_io, held, place.create(JOB, source, cache=Cache.WRITEBACK))
        discarding = asyncio.create_task(place.discard(JOB))
        held.may_end.set()
        async with asyncio.timeout(DEADLINE_S):
            await discarding
            await some_io.settle_calls()
        assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
        assert not [name for name in open_names() if PART in name]

    async def test_what_was_taken_in_the_instant_of_the_cancel_is_released(self, some_io) -> None:
        may_end = threading.Event()
        released = []
        opening = some_io.submit(may_end.wait, DEADLINE_S)
        task = asyncio.create_task(some_io.take(opening, released.append))
        await asyncio.sleep(0)
        opening.add_done_callback(lambda _: task.cancel())  # the answer is on its way by then
        may_end.set()
        await asyncio.gather(task, return_exceptions=True)
        await some_io.settle_calls()
        assert task.cancelled()
        assert released == [True]

    async def test_what_failed_has_nothing_to_release(self, some_io) -> None:
        may_fail = threading.Event()

        def fail() -> None:
            may_fail.wait(DEADLINE_S)
            raise OSError

        released: list[object] = []
        task = asyncio.create_task(some_io.take(some_io.submit(fail), released.append))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        may_fail.set()
        await some_io.settle_calls()
        assert not released


class TestAfterACrash:
    """A place of a new process, that was never asked to create or find anything."""

    @pytest.fixture
    async def identity(self, place: FilePlace, source) -> Identity:
        """What PREP tells of a target that was published when the process died."""
        target = await place.create(JOB, source, cache=Cache.WRITEBACK)
        await place.publish(JOB)
        await target.close()
        return target.identity

    @pytest.mark.parametrize("known", [False, True])
    async def test_a_published_target_is_discarded_when_it_is_known(
        self, tmp_path, some_io, identity, known
    ) -> None:
        again = FilePlace(str(tmp_path / "target"), some_io)
        for _ in range(2):
            await again.discard(JOB, identity if known else None)
        assert (tmp_path / "target").exists() != known

    async def test_another_file_of_its_name_is_not(self, tmp_path, some_io, identity) -> None:
        (tmp_path / "target").rename(tmp_path / "elsewhere")
        make_file(tmp_path / "target", b"", SIZE)
        await FilePlace(str(tmp_path / "target"), some_io).discard(JOB, identity)
        assert (tmp_path / "target").exists()
        assert (tmp_path / "elsewhere").exists()


class TestPatience:
    """A killed process may hold its files a little longer than it lives."""

    @pytest.fixture
    def holder(self, tmp_path: Path) -> int:
        """A descriptor of somebody who has the disk locked."""
        make_file(tmp_path / "disk", pattern(SIZE))
        holder = os.open(tmp_path / "disk", os.O_RDWR)
        assert durable.lock_disk(holder, writing=True)
        return holder

    @pytest.fixture
    def now_s(self, monkeypatch) -> list[float]:
        """A clock that only waiting moves."""
        now = [100.0]

        class Clock:
            monotonic = staticmethod(lambda: now[0])

            @staticmethod
            def sleep(pause_s: float) -> None:
                now[0] += pause_s

        monkeypatch.setattr(durable, "time", Clock)
        return now

    async def test_a_lock_that_goes_away_is_waited_for(
        self, tmp_path, some_io, holder, now_s, monkeypatch
    ) -> None:
        pauses = []

        def sleep(pause_s: float) -> None:
            pauses.append(pause_s)
            if len(pauses) == 3:
                os.close(holder)

        monkeypatch.setattr(durable.time, "sleep", staticmethod(sleep))
        place = FilePlace(str(tmp_path / "disk"), some_io)
        place.patience_s = durable.LOCK_PATIENCE_S
        backend = await place.open()
        assert len(pauses) == 3
        again = await self.found_again(tmp_path, some_io, backend)
        await again.close()

    async def found_again(self, tmp_path, some_io, backend):
        """`find` is as patient."""
        now = threading.Event()
        closing = None
        loop = asyncio.get_running_loop()

        def sleep(_: float) -> None:
            nonlocal closing
            if closing is None:
                closing = asyncio.run_coroutine_threadsafe(backend.close(), loop)
                closing.add_done_callback(lambda _: now.set())
            assert now.wait(DEADLINE_S)

        durable.time.sleep = staticmethod(sleep)
        place = FilePlace(str(tmp_path / "disk"), some_io)
        place.patience_s = durable.LOCK_PATIENCE_S
        found = await place.find(JOB, backend.identity, cache=Cache.WRITEBACK)
        assert found is not None
        return found

    @pytest.mark.parametrize("patience_s", [0.0, durable.LOCK_PATIENCE_S])
    async def test_a_lock_that_stays_is_another_programs(
        self, tmp_path, some_io, holder, now_s, patience_s
    ) -> None:
        place = FilePlace(str(tmp_path / "disk"), some_io)
        place.patience_s = patience_s
        with pytest.raises(RefusedError) as caught:
            await place.open()
        assert caught.value.code == "in-use"
        assert now_s[0] - 100 == pytest.approx(patience_s, abs=0.02)
        os.close(holder)


class TestIdentity:
    """When two are one."""

    FILE = Identity("file", 5, 1000, SIZE, 42)
    DEVICE = Identity("block", 0x810, 0, SIZE, serial="wwid naa.1")

    @pytest.mark.parametrize(
        ("one", "other", "on_this_boot", "over_a_boot"),
        [
            (FILE, Identity("file", 6, 1000, SIZE, 42), True, True),
            (FILE, Identity("file", 6, 1000, SIZE), True, True),
            (FILE, Identity("file", 5, 1000, SIZE, 43), False, False),
            (FILE, Identity("file", 5, 1001, SIZE, 42), False, False),
            (FILE, Identity("file", 5, 1000, SIZE - 1, 42), False, False),
            (FILE, Identity("block", 5, 1000, SIZE, 42), False, False),
            (DEVICE, Identity("block", 0x820, 0, SIZE, serial="wwid naa.1"), True, True),
            (DEVICE, Identity("block", 0x810, 0, SIZE, serial="wwid naa.2"), False, False),
            (DEVICE, Identity("block", 0x810, 0, SIZE), True, True),
            (DEVICE, Identity("block", 0x820, 0, SIZE), False, True),
            (DEVICE, Identity("block", 0x810, 0, SIZE + 1), False, False),
        ],
    )
    def test_they_are_compared_by_what_is_known(
        self, one, other, on_this_boot, over_a_boot
    ) -> None:
        for first, second in ((one, other), (other, one)):
            assert first.is_still(second, same_boot=True) == on_this_boot
            assert first.is_still(second) == over_a_boot

    def test_what_older_journals_tell_is_still_read(self) -> None:
        told = {"kind": "block", "device": 0x810, "inode": 0, "size": SIZE, "born_ns": 0}
        assert Identity(**told) == Identity("block", 0x810, 0, SIZE)
