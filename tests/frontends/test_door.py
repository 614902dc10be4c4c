"""Requests that were started by hand go on in a task as if they had been awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from mirrord.frontends.door import carry_on


async def finish(rest: Awaitable[int]) -> int:
    return await rest


async def test_several_requests_may_wait_for_one_future() -> None:
    shared: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def work(number: int) -> int:
        return number + await shared

    rests = []
    for number in range(3):
        request = work(number)
        rests.append(carry_on(request, request.send(None)))
    tasks = [asyncio.create_task(finish(rest)) for rest in rests]
    waiting = asyncio.create_task(work(3))  # one that was never started by hand
    await asyncio.sleep(0)
    shared.set_result(10)
    assert await asyncio.gather(*tasks, waiting) == [10, 11, 12, 13]


async def test_a_bare_yield_waits_for_nothing() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    request = work()
    assert await finish(carry_on(request, request.send(None))) == 7
