"""A completion is a future in a task, and goes on at once by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mirrord.storage.completion import Completion


@pytest.fixture
async def completion() -> Completion:
    return Completion(asyncio.get_running_loop())


async def double(completion: Completion) -> int:
    return 2 * int(await completion)


async def test_a_task_awaits_it_as_any_future(completion: Completion) -> None:
    task = asyncio.create_task(double(completion))
    await asyncio.sleep(0)
    completion.end(21)
    assert not task.done()
    assert await task == 42
    assert await completion == 21


async def test_by_hand_it_goes_on_at_once(completion: Completion) -> None:
    work = double(completion)
    waits_for: Any = work.send(None)
    assert waits_for is completion
    ended: list[int] = []

    def go_on() -> None:
        with pytest.raises(StopIteration) as stop:
            work.send(None)
        ended.append(stop.value.value)

    completion.then = go_on
    completion.end(21)
    assert ended == [42]


async def test_nobody_is_told_when_who_waited_was_cancelled(completion: Completion) -> None:
    task = asyncio.create_task(double(completion))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    completion.then = lambda: pytest.fail("told")
    completion.end(21)
    assert completion.cancelled()


async def test_what_going_on_raises_is_told_to_the_loop(completion: Completion) -> None:
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context))
    completion.then = lambda: 1 // 0
    completion.end(None)
    loop.set_exception_handler(None)
    assert [type(context["exception"]) for context in told] == [ZeroDivisionError]
