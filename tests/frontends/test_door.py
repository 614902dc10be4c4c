"""A coroutine whose first step was taken by hand is carried on as if it had been awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
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
