"""Tests of the simulated servers: what each kind of loss takes, and what it leaves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from mirrord.storage.backend import UnreachableError
from mirrord.storage.remote import LostError, SteadySettings
from tests.sim.disk import BLOCK
from tests.sim.loop import HaltedError, SimLoop, elapse
from tests.sim.remote import Loss, ServedDirectory, ServedFile, SimDoor, SimServer, SimShare
from tests.sim.test_simulator import ABLE
from tests.sim.world import World

OLD, NEW = b"old-----", b"new-----"


class Bench:
    """A server with one file of four blocks, a place and a door to it."""

    def __init__(self, seed: int, *losses: Loss) -> None:
        self.world = World(random.Random(seed))
        self.heard: list[str] = []
        self.server = SimServer(
            self.world,
            list(losses),
            SteadySettings(),
            lambda file, loss: self.heard.append(loss.kind),
        )
        self.file = ServedFile(self.server, 1, 4 * BLOCK, OLD * 4)
        names = ServedDirectory(self.world)
        names.names["disk"] = self.file
        self.place = SimShare(self.server, names, "disk", "source", ABLE, committed=lambda: False)
        self.door = SimDoor(self.place)
        self.loop = SimLoop(random.Random(seed))
        self.world.boot(self.loop, None)

    def run(self, main: Callable[[Bench], Awaitable[None]]) -> None:
        async def whole() -> None:
            self.server.boot()
            await main(self)

        self.loop.run(whole())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("kind", "left"), [("cut", {NEW}), ("killed", {NEW}), ("reboot", {OLD, NEW})]
)
def test_only_a_reboot_forgets_what_was_answered(kind: str, left: set[bytes], seed: int) -> None:
    async def main(bench: Bench) -> None:
        remote = bench.server.open(bench.file, "source", ABLE)
        await remote.write(0, NEW)
        await remote.flush()
        await remote.write(BLOCK, NEW)
        bench.server.losses[0].at_s = 0.0
        bench.server.boot()
        await elapse(0.01)
        assert bench.heard == [kind]
        assert bytes(bench.file.view[:BLOCK]) == NEW, "it was flushed"
        assert bytes(bench.file.view[BLOCK : 2 * BLOCK]) in left
        with pytest.raises(LostError):
            await remote.read(0, BLOCK)

    Bench(seed, Loss(kind, 0.0)).run(main)


def test_a_reboot_does_forget_now_and_then() -> None:
    found = set()

    async def main(bench: Bench) -> None:
        remote = bench.server.open(bench.file, "source", ABLE)
        await remote.write(0, NEW)
        bench.file.reboot()
        found.add(bytes(bench.file.view[:BLOCK]))

    for seed in range(20):
        Bench(seed).run(main)
    assert found == {OLD, NEW}


@pytest.mark.parametrize("kind", ["cut", "killed", "reboot"])
def test_what_is_in_flight_never_lands_after_the_file_is_open_again(kind: str) -> None:
    landed = set()

    async def main(bench: Bench) -> None:
        former = bench.server.open(bench.file, "source", ABLE)
        write = asyncio.ensure_future(former.write(0, NEW * 2))
        await elapse(0.0001)
        remote = await bench.door.reopen(former)
        before = bytes(bench.file.view)
        (outcome,) = await asyncio.gather(write, return_exceptions=True)
        if not isinstance(outcome, LostError):
            return  # it was answered in time
        await elapse(1)
        assert bytes(bench.file.view) == before
        landed.add(before[: 2 * BLOCK])
        await remote.close()

    for seed in range(60):
        bench = Bench(seed, Loss(kind, 0.0, at_s=0.0001))
        bench.world.slow = {"source": 3.0}
        bench.run(main)
    assert OLD * 2 in landed
    assert len(landed) > 1


@pytest.mark.parametrize("keeps", [False, True])
def test_a_handle_is_kept_over_a_cut_only(keeps: bool) -> None:
    async def main(bench: Bench) -> None:
        former = bench.server.open(bench.file, "source", ABLE)
        await elapse(0.01)
        remote = await bench.door.reopen(former)
        assert remote.kept == (keeps and bench.heard == ["cut"])

    for kind in ("cut", "killed", "reboot"):
        Bench(1, Loss(kind, 0.0, keeps=keeps, at_s=0.005)).run(main)


def test_nobody_is_there_while_it_is_away() -> None:
    async def main(bench: Bench) -> None:
        former = bench.server.open(bench.file, "source", ABLE)
        await elapse(0.01)
        with pytest.raises(LostError):
            await bench.door.reopen(former)
        with pytest.raises(UnreachableError):
            await bench.place.open()
        assert ("source-place", "open") in bench.world.faults_hit
        await elapse(10)
        await bench.door.reopen(former)

    Bench(1, Loss("cut", 5.0, at_s=0.0)).run(main)


def test_a_power_cut_of_our_host_is_not_the_servers() -> None:
    async def main(bench: Bench) -> None:
        remote = bench.server.open(bench.file, "source", ABLE)
        await remote.write(0, NEW)
        bench.world.crash(power=True)

    for seed in range(10):
        bench = Bench(seed)
        with pytest.raises(HaltedError):
            bench.run(main)
        assert bytes(bench.file.view[:BLOCK]) == NEW
        assert bench.file.exposed, "nobody keeps it any more"
        assert not bench.file.open_in
