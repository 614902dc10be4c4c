"""A coroutine whose first step was taken by hand is carried on as if it had been awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any

import pytest

from mirrord.frontends.door import carry_on


async def hand_over(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Take the first step by hand, then give the rest to a task."""
    waits_for = work.send(None)

    async def rest() -> Any:
        return await carry_on(work, waits_for)

    return asyncio.create_task(rest())


async def test_results_and_further_waits_pass_through() -> None:
    futures = [asyncio.get_running_loop().create_future() for _ in range(3)]

    async def work() -> list[int]:
        await asyncio.sleep(0)  # yields nothing but its turn
        return [await future for future in futures]

    task = await hand_over(work())
    for number, future in enumerate(futures):
        future.set_result(number)
        await asyncio.sleep(0)
    assert await task == [0, 1, 2]


async def test_a_future_that_is_done_already_is_fine() -> None:
    future = asyncio.get_running_loop().create_future()

    async def work() -> int:
        return int(await future)

    waiting = work()
    waits_for = waiting.send(None)
    future.set_result(7)
    assert await asyncio.create_task(_await(waiting, waits_for)) == 7


async def _await(work: Coroutine[Any, Any, int], waits_for: Any) -> int:
    return await carry_on(work, waits_for)


async def test_errors_pass_through_both_ways() -> None:
    future = asyncio.get_running_loop().create_future()

    async def work() -> None:
        try:
            await future
        except OSError as error:
            raise ValueError("from the work") from error

    task = await hand_over(work())
    future.set_exception(OSError("from the future"))
    with pytest.raises(ValueError, match="from the work"):
        await task


async def test_a_cancellation_reaches_the_work_which_may_go_on() -> None:
    loop = asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()

    async def work() -> str:
        try:
            await first
        except asyncio.CancelledError:
            return str(await second)
        return "not cancelled"

    task = await hand_over(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    second.set_result("went on")
    assert await task == "went on"


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
