"""Guests' requests are counted: by kind, by their time, with their bytes and their errors."""

from __future__ import annotations

import asyncio
import errno
from time import perf_counter_ns

import pytest

from mirrord.frontends.counters import KINDS, Counters
from mirrord.nbd import wire
from tests.frontends.conftest import Serve, Serving
from tests.frontends.raw import Raw

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FAST_ZERO = 1 << 4
HELD_S = 0.01
LEAST_S = 0.9 * HELD_S  # loops round their timers
HELD_BITS = 23  # 2**23 ns are 8 ms


def numbers(serving: Serving) -> dict[str, tuple[int, int, int]]:
    """Return the number of requests, the bytes and the errors of each kind."""
    counts = serving.server.counters.counts()
    return {kind: (sum(c.buckets), c.bytes, c.errors) for kind, c in counts.items()}


async def ask(client: Raw, command: int, length: int = 512, **more: int) -> int:
    """Send one request; return the error of its answer."""
    data = b"x" * length if command == WRITE else b""
    client.send(command, 0, length, data=data, **more)
    return (await client.answer(length if command == READ else 0)).error


def hold(serving: Serving, name: str) -> asyncio.Task[None]:
    """Make the next request of that name wait for HELD_S from its beginning."""
    door, before = serving.door, serving.door.started.total()
    door.close_gate(name)

    async def let_go() -> None:
        await door.until(started=before + 1)
        asyncio.get_running_loop().call_later(HELD_S, door.open_gate)

    return asyncio.create_task(let_go())


@pytest.mark.parametrize("gated", [False, True])
async def test_each_kind_is_counted_by_itself(serve: Serve, gated: bool) -> None:
    serving = await serve()
    client = await serving.enter()
    names = ("read", "write", "flush", "trim", "write_zeroes")
    for times, (command, name) in enumerate(
        zip((READ, WRITE, FLUSH, TRIM, ZEROES), names, strict=True), 1
    ):
        for _ in range(times):
            holding = hold(serving, name) if gated else None
            length = 0 if command == FLUSH else 512
            assert await ask(client, command, length) == 0
            assert holding is None or holding.done()
    client.close()
    assert numbers(serving) == {
        "read": (1, 512, 0), "write": (2, 1024, 0), "flush": (3, 0, 0), "trim": (4, 2048, 0),
        "zero": (5, 2560, 0),
    }  # fmt: skip
    for count in serving.server.counters.counts().values():
        times = sum(count.buckets)
        waited_s = LEAST_S * times if gated else 0.0
        assert count.seconds > waited_s, "what it waited for is in it"
        assert not gated or len(count.buckets) > HELD_BITS


async def test_connections_are_counted_together(serve: Serve) -> None:
    serving = await serve()
    for _ in range(2):
        client = await serving.enter()
        assert await ask(client, READ) == 0
        client.close()
        await serving.alone()
    assert numbers(serving)["read"] == (2, 1024, 0)


@pytest.mark.parametrize("gated", [False, True])
async def test_what_fails_is_an_error_and_moves_nothing(serve: Serve, gated: bool) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.errors["write"] = OSError(errno.EIO, "broken")
    holding = hold(serving, "write") if gated else None
    assert await ask(client, WRITE) == wire.EIO
    assert holding is None or holding.done()
    assert numbers(serving)["write"] == (1, 0, 1)
    client.close()


async def test_a_fast_zero_that_is_not_fast_is_no_error(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.errors["write_zeroes"] = OSError(errno.EOPNOTSUPP, "slow")
    assert await ask(client, ZEROES, flag=FAST_ZERO) == wire.ENOTSUP
    assert numbers(serving)["zero"] == (1, 0, 0)
    assert await ask(client, ZEROES) == wire.EINVAL
    assert numbers(serving)["zero"] == (2, 0, 1), "without the flag it is one"
    client.close()


async def test_what_was_never_a_request_of_the_disk_is_not_counted(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    client.send(READ, serving.door.size, 512)
    assert (await client.answer()).error == wire.EINVAL
    assert await ask(client, CACHE) == 0
    assert set(numbers(serving).values()) == {(0, 0, 0)}
    client.close()


def test_a_bucket_is_a_power_of_two_nanoseconds() -> None:
    counters = Counters()
    for spent_ns in (0, 1 << 20, (1 << 30) + 1, 1 << 62):
        counters.count([KINDS["read"]], perf_counter_ns() - spent_ns)
    count = counters.counts()["read"]
    assert sum(count.buckets) == 4
    assert [n for n, found in enumerate(count.buckets) if found][1:] == [21, 31, 63]
    assert count.seconds == pytest.approx(((1 << 20) + (1 << 30) + (1 << 62)) / 1e9)


def test_what_ends_together_is_counted_together() -> None:
    counters = Counters()
    counters.count([READ, WRITE, READ, READ], perf_counter_ns() - (1 << 40))
    counts = counters.counts()
    for kind, times in (("read", 3), ("write", 1), ("flush", 0)):
        assert sum(counts[kind].buckets) == times
        assert counts[kind].seconds == pytest.approx(times * (1 << 40) / 1e9)
