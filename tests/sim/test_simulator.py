"""Tests of the simulator itself: it is deterministic, it forgets, it notices."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from mirrord.engine.disk import Disk
from mirrord.storage.backend import Capabilities
from tests.sim.checker import Checker
from tests.sim.disk import BLOCK, SimBackend, SimDirectory, SimFile
from tests.sim.guest import Guest
from tests.sim.loop import DeadlockError, HaltedError, LivelockError, SimLoop, elapse
from tests.sim.store import Sheet
from tests.sim.world import CrashPlan, Fault, World

ABLE = Capabilities(True, True, True, True)


def make_world(seed: int = 1) -> World:
    world = World(random.Random(seed))
    world.boot(SimLoop(random.Random(seed)), None)
    return world


def make_backend(world: World, blocks: int = 6) -> SimBackend:
    return SimBackend(world, SimFile(world, 1, blocks * BLOCK), "source", ABLE)


class TestLoop:
    def test_runs_what_asyncio_offers(self) -> None:
        async def main() -> list[str]:
            heard: list[str] = []
            queue: asyncio.Queue[int] = asyncio.Queue()
            lock, event = asyncio.Lock(), asyncio.Event()

            async def producer() -> None:
                for number in range(3):
                    await elapse(1)
                    async with lock:
                        await queue.put(number)
                event.set()

            async def slept() -> str:
                await elapse(9)
                return "slept"

            async with asyncio.TaskGroup() as group:
                group.create_task(producer())
                for _ in range(3):
                    heard.append(str(await queue.get()))
            async with asyncio.timeout(5):
                await event.wait()
            try:
                await asyncio.wait_for(asyncio.get_running_loop().create_future(), 60)
            except TimeoutError:
                heard.append("timeout")
            sleeper = asyncio.create_task(asyncio.wait_for(slept(), 60))
            try:
                async with asyncio.timeout(1):
                    await asyncio.shield(sleeper)
            except TimeoutError:
                heard.append(await sleeper)
            return heard

        loop = SimLoop(random.Random(3))
        assert loop.run(main()) == ["0", "1", "2", "timeout", "slept"]
        assert loop.time() == pytest.approx(3 + 60 + 9)
        assert loop.alive() == []

    def test_order_depends_on_the_seed_alone(self) -> None:
        def order(seed: int, fair: bool = False) -> list[int]:
            heard: list[int] = []

            async def one(number: int) -> None:
                await asyncio.sleep(0)
                heard.append(number)

            async def main() -> None:
                await asyncio.gather(*(one(number) for number in range(8)))

            SimLoop(random.Random(seed), fair=fair).run(main())
            return heard

        assert order(1) == order(1)
        assert len({tuple(order(seed)) for seed in range(20)}) > 10
        assert order(1, fair=True) == list(range(8))

    def test_deadlock_tells_who_waits_where(self) -> None:
        async def waits_for_ever() -> None:
            await asyncio.Event().wait()

        with pytest.raises(DeadlockError, match="waits_for_ever"):
            SimLoop(random.Random(1)).run(waits_for_ever())

    def test_livelock_ends(self) -> None:
        async def turns() -> None:
            while True:  # noqa: ASYNC110
                await asyncio.sleep(0)

        with pytest.raises(LivelockError, match="turns"):
            SimLoop(random.Random(1)).run(turns(), steps_max=1000)

    def test_abandon_closes_even_those_who_refuse(self) -> None:
        closed: list[str] = []

        async def stubborn() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                closed.append("stubborn")
                await elapse(1)

        async def main() -> None:
            task = asyncio.create_task(stubborn())
            await elapse(1)
            loop.halt()
            await task

        loop = SimLoop(random.Random(1))
        with pytest.raises(HaltedError):
            loop.run(main())
        loop.abandon()
        assert closed == ["stubborn"]
        assert loop.errors == []


class TestFile:
    def test_unsynced_writes_are_kept_or_lost_block_by_block(self) -> None:
        left = set()
        for seed in range(60):
            world = make_world(seed)
            backend = make_backend(world)

            async def write(backend: SimBackend = backend) -> None:
                await backend.write(0, b"a" * BLOCK)
                await backend.flush()
                await backend.write(0, b"b" * BLOCK)
                await backend.write(0, b"c" * 2 * BLOCK)

            world.loop.run(write())
            world.crash(power=True)
            left.add(bytes(backend.file.view[: 2 * BLOCK : BLOCK]))
        assert left == {b"a\0", b"b\0", b"c\0", b"ac", b"bc", b"cc"}

    def test_a_kill_loses_nothing_that_was_answered(self) -> None:
        world = make_world()
        backend = make_backend(world)
        world.loop.run(backend.write(BLOCK, b"x" * BLOCK))
        world.crash(power=False)
        assert backend.file.block(1) == b"x" * BLOCK

    def test_fua_is_durable(self) -> None:
        for seed in range(20):
            world = make_world(seed)
            backend = make_backend(world)
            world.loop.run(backend.write(0, b"f" * BLOCK, fua=True))
            world.crash(power=True)
            assert backend.file.block(0) == b"f" * BLOCK

    def test_a_failed_flush_lies_the_second_time(self) -> None:
        lost = 0
        for seed in range(20):
            world = make_world(seed)
            backend = make_backend(world)
            world.faults.append(Fault("source", "flush", 1))

            async def write(backend: SimBackend = backend) -> None:
                await backend.write(0, b"x" * BLOCK)
                with pytest.raises(OSError, match="Input/output"):
                    await backend.flush()
                await backend.flush()

            world.loop.run(write())
            assert backend.file.block(0) == b"x" * BLOCK
            world.crash(power=True)
            lost += backend.file.block(0) != b"x" * BLOCK
        assert 5 < lost < 20

    def test_what_is_in_flight_at_a_crash_lands_or_not(self) -> None:
        left = set()
        for seed in range(300):
            world = make_world(seed)
            backend = make_backend(world)
            world.plan = CrashPlan(False, seed % 4 + 1)

            async def write(backend: SimBackend = backend) -> None:
                tasks = [
                    asyncio.create_task(backend.write(offset * BLOCK, data * BLOCK))
                    for offset, data in ((0, b"xx"), (3, b"y"))
                ]
                await asyncio.wait(tasks)

            with pytest.raises(HaltedError):
                world.loop.run(write())
            world.loop.abandon()
            left.add(bytes(backend.file.view[: 4 * BLOCK : BLOCK]))
        assert {b"\0\0\0\0", b"xx\0\0", b"x\0\0\0", b"\0x\0y"} <= left

    def test_cancelling_abandons_the_answer_not_the_write(self) -> None:
        world = make_world(5)
        backend = make_backend(world)

        async def write() -> None:
            task = asyncio.create_task(backend.write(0, b"x" * BLOCK))
            while not backend.busy:  # noqa: ASYNC110
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
            await backend.close()

        world.loop.run(write())
        assert backend.file.block(0) == b"x" * BLOCK

    def test_use_after_close_is_a_violation(self) -> None:
        world = make_world()
        backend = make_backend(world)

        async def misuse() -> None:
            await backend.close()
            await backend.flush()

        with pytest.raises(HaltedError):
            world.loop.run(misuse())
        assert world.violation == "source: flush after close"


class TestNames:
    def test_each_change_is_durable_by_sync_or_by_luck(self) -> None:
        left = set()
        for seed in range(60):
            world = make_world(seed)
            directory = SimDirectory(world)
            one, two = (SimFile(world, number, BLOCK) for number in (1, 2))
            directory.change(None, "one", one)
            directory.sync()
            directory.change("one", "moved", one)
            directory.change(None, "two", two)
            directory.change("moved", None, one)
            world.crash(power=True)
            left.add(tuple(sorted(directory.names)))
        assert left == {
            (), ("one",), ("moved",), ("two",), ("one", "two"), ("moved", "two"),
        }  # fmt: skip


class TestSheet:
    def test_what_is_not_durable_is_kept_lost_or_torn(self) -> None:
        left = set()
        for seed in range(100):
            world = make_world(seed)
            sheet = Sheet(world, bytes(4), 1)
            sheet.put(0, b"old!")
            sheet.sync(world.tick())
            sheet.put(0, b"NEW?")
            sheet.lose()
            left.add(bytes(sheet.view))
        assert {b"old!", b"NEW?", b"NEd!", b"olW!"} <= left

    def test_a_failed_sync_loses_it_without_a_word(self) -> None:
        left = set()
        for seed in range(20):
            sheet = Sheet(make_world(seed), bytes(4), 1)
            sheet.put(0, b"gone")
            sheet.sync_failed()
            sheet.sync(sheet.world.tick())
            assert bytes(sheet.view) == b"gone"
            sheet.lose()
            left.add(bytes(sheet.view))
        assert left == {b"gone", bytes(4)}


class TestChecker:
    def make(self) -> tuple[World, Checker]:
        world = make_world()
        return world, Checker(world, bytes(2 * BLOCK))

    def reads(self, checker: Checker, data: bytes) -> str | None:
        checker.end_read(checker.begin_read(0, BLOCK), data)
        return checker.world.violation

    def test_an_acknowledged_write_must_be_read(self) -> None:
        _, checker = self.make()
        checker.end_write(checker.begin_write(0, b"a" * BLOCK))
        assert self.reads(checker, b"a" * BLOCK) is None
        assert "block 0" in str(self.reads(checker, bytes(BLOCK)))

    def test_overlapping_writes_may_end_either_way_but_not_go_back(self) -> None:
        _, checker = self.make()
        one = checker.begin_write(0, b"a" * BLOCK)
        two = checker.begin_write(0, b"b" * BLOCK)
        checker.end_write(one)
        checker.end_write(two)
        assert self.reads(checker, b"a" * BLOCK) is None
        assert self.reads(checker, b"b" * BLOCK) is not None

    def test_a_kill_keeps_what_was_acknowledged(self) -> None:
        _, checker = self.make()
        checker.end_write(checker.begin_write(0, b"a" * BLOCK))
        checker.begin_write(0, b"b" * BLOCK)
        checker.crash(power=False)
        assert checker.check(b"b" * BLOCK + bytes(BLOCK), "kill") is None
        assert checker.check(b"a" * BLOCK + bytes(BLOCK), "kill") is None
        assert checker.check(bytes(2 * BLOCK), "kill") is not None
        assert self.reads(checker, b"a" * BLOCK) is None
        assert self.reads(checker, b"b" * BLOCK) is not None  # went back

    def test_a_power_cut_keeps_what_was_flushed(self) -> None:
        _, checker = self.make()
        checker.end_write(checker.begin_write(0, b"a" * BLOCK))
        flush = checker.begin_flush()
        checker.end_write(checker.begin_write(0, b"b" * BLOCK))
        checker.end_flush(flush)
        checker.crash(power=True)
        assert checker.check(b"b" * BLOCK + bytes(BLOCK), "cut") is None
        assert checker.check(b"a" * BLOCK + bytes(BLOCK), "cut") is None
        assert checker.check(bytes(2 * BLOCK), "cut") is not None

    def test_what_survived_a_power_cut_survives_the_next(self) -> None:
        _, checker = self.make()
        checker.end_write(checker.begin_write(0, b"a" * BLOCK))
        checker.crash(power=True)
        assert self.reads(checker, b"a" * BLOCK) is None
        checker.crash(power=True)
        assert checker.check(bytes(2 * BLOCK), "cut") is not None

    def test_what_was_read_before_its_answer_survives_a_kill_only(self) -> None:
        for power in (False, True):
            _, checker = self.make()
            checker.begin_write(0, b"a" * BLOCK)
            assert self.reads(checker, b"a" * BLOCK) is None
            checker.crash(power)
            assert (checker.check(bytes(2 * BLOCK), "crash") is None) is power


def live(seed: int, spoil: Callable[[Disk], None] | None = None) -> World:
    """Let guests use a disk through crashes; return the world with its violation, if any."""
    rng = random.Random(seed)
    world = World(rng)
    file = SimFile(world, 1, rng.randrange(2, 9) * BLOCK)
    checker = Checker(world, bytes(file.view))
    world.eager["source"] = rng.choice((0.0, 0.5))
    guest = Guest(
        world, checker, rng, requests=rng.randrange(10, 60), depth=rng.randrange(1, 6),
        think_s=rng.choice((0, 0.01)), hot=0.5, slow=lambda _: None, failed=lambda *_: None,
    )  # fmt: skip
    lives = rng.randrange(1, 4)
    for life in range(lives):
        plan = CrashPlan(rng.random() < 0.5, rng.randrange(1, 80)) if life < lives - 1 else None
        loop = SimLoop(rng)
        world.boot(loop, plan)
        disk = Disk("disk", SimBackend(world, file, "source", ABLE))
        if spoil is not None:
            spoil(disk)

        async def use(disk: Disk = disk) -> None:
            await guest.read_all(disk)
            await guest.run(disk)
            await guest.read_all(disk)

        try:
            loop.run(use())
        except HaltedError:
            loop.abandon()
            if world.violation is not None:
                return world
            checker.crash(world.boots > checker_boots(checker))
            set_checker_boots(checker, world.boots)
            if (wrong := checker.check(bytes(file.view), "after the crash")) is not None:
                world.violation = wrong
                return world
    return world


def checker_boots(checker: Checker) -> int:
    return getattr(checker, "boots", 1)


def set_checker_boots(checker: Checker, boots: int) -> None:
    checker.boots = boots  # type: ignore[attr-defined]


class TestGuests:
    def test_an_honest_disk_passes(self) -> None:
        for seed in range(300):
            world = live(seed)
            assert world.violation is None, f"seed {seed}\n{world.story()}"

    def test_the_same_seed_tells_the_same_story(self) -> None:
        for seed in range(5):
            assert live(seed).story(10_000) == live(seed).story(10_000)

    @pytest.mark.parametrize("lie", ["flush", "write", "read"])
    def test_a_lying_disk_is_found(self, lie: str) -> None:
        def spoil(disk: Disk) -> None:
            honest = getattr(disk.backend, lie)

            async def lies(*arguments: Any, **options: Any) -> Any:
                if lie == "flush":
                    return None
                if lie == "write":
                    asyncio.get_running_loop().create_task(honest(*arguments, **options))
                    return None
                data = bytes(await honest(*arguments))
                return data[:-1] + bytes([data[-1] ^ (len(data) > 3 * BLOCK)])

            setattr(disk.backend, lie, lies)

        assert any(live(seed, spoil).violation is not None for seed in range(100))
