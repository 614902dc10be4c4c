"""A mirrored write's way to the target: how it ends, and who is told when."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

import pytest

from mirrord.core.geometry import MIB
from mirrord.engine.legs import Legs
from mirrord.engine.mutation import Mutation, Trim, Write
from mirrord.storage.memory import MemoryBackend, MemoryPlace, MemoryShelf
from tests.helpers import eventually_async

BUDGET_S = 0.2
WRITE = Write(0, 4, b"data", False)
TRIM = Trim(0, 4096, False)

Ended = Callable[[OSError | None], None]


class Target:
    """A target of which a test says when it answers."""

    def __init__(self, inner: MemoryBackend, *, begins: bool) -> None:
        self.inner = inner
        self.begins = begins
        self.begun: list[Ended] = []
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin_write(self, offset: int, data: object, ended: Ended) -> bool:
        if self.begins:
            self.begun.append(ended)
        return self.begins

    async def write(self, offset: int, data: object, *, fua: bool = False) -> None:
        await asyncio.shield(self.answer)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await asyncio.shield(self.answer)

    def end(self, error: OSError | None = None) -> None:
        """Answer all that was asked."""
        for ended in self.begun:
            ended(error)
        self.begun.clear()
        if error is None:
            self.answer.set_result(None)
        else:
            self.answer.set_exception(error)
            self.answer.exception()


@pytest.fixture(params=["begun", "in a task"])
async def target(request: pytest.FixtureRequest) -> Target:
    shelf = MemoryShelf()
    shelf.add("disk", MIB)
    inner = await MemoryPlace("disk", shelf).open()
    assert isinstance(inner, MemoryBackend)
    return Target(inner, begins=request.param == "begun")


@pytest.fixture
def arrived() -> list[Mutation]:
    return []


@pytest.fixture
async def legs(target: Target, arrived: list[Mutation]) -> Legs:
    return Legs(target, BUDGET_S, arrived=arrived.append)  # type: ignore[arg-type]


def soon(legs: Legs) -> float:
    """Return when a patient guest gives up."""
    return legs.loop.time() + 60


async def test_a_good_end_is_told_to_all(
    target: Target, legs: Legs, arrived: list[Mutation]
) -> None:
    leg = legs.begin(WRITE)
    ended: list[int] = []
    leg.afterwards(lambda: ended.append(len(arrived)))
    waits = asyncio.create_task(leg.outcome(soon(legs)))
    await asyncio.sleep(0)
    assert (len(legs), leg.done, arrived, ended) == (1, False, [], [])
    target.end()
    assert await waits is None
    assert (len(legs), leg.done, arrived, ended) == (0, True, [WRITE], [1])
    leg.afterwards(lambda: ended.append(2))
    assert ended == [1, 2]
    assert await leg.outcome(0) is None


async def test_an_error_is_the_outcome_and_nothing_arrived(
    target: Target, legs: Legs, arrived: list[Mutation]
) -> None:
    leg = legs.begin(WRITE)
    error = OSError(errno.EIO, "broken")
    target.end(error)
    assert await leg.outcome(soon(legs)) is error
    assert not arrived


async def test_who_waits_too_long_is_told_and_the_leg_goes_on(
    target: Target, legs: Legs, arrived: list[Mutation]
) -> None:
    began_s = legs.loop.time()
    late = [legs.begin(WRITE) for _ in range(3)]
    outcomes = await asyncio.gather(
        late[0].outcome(began_s + BUDGET_S),
        late[1].outcome(began_s + BUDGET_S / 4),  # it waited for its lock
        late[2].outcome(began_s),
    )
    waited_s = legs.loop.time() - began_s
    assert BUDGET_S - 0.01 <= waited_s < BUDGET_S + 5
    for outcome in outcomes:
        assert outcome is not None
        assert outcome.errno == errno.ETIMEDOUT
    assert (len(legs), arrived) == (3, [])
    target.end()
    await legs.these_ended()
    assert arrived == [WRITE] * 3
    assert all(leg.done and leg.error is None for leg in late)


async def test_a_cancelled_guest_leaves_its_leg(target: Target, legs: Legs) -> None:
    leg = legs.begin(WRITE)
    guest = asyncio.create_task(leg.outcome(soon(legs)))
    await asyncio.sleep(0)
    guest.cancel()
    await asyncio.gather(guest, return_exceptions=True)
    assert guest.cancelled()
    assert len(legs) == 1
    target.end()
    await legs.these_ended()
    assert leg.done


async def test_all_who_wait_for_the_end_of_these_are_told(target: Target, legs: Legs) -> None:
    await legs.these_ended()
    legs.begin(WRITE)
    legs.begin(TRIM)
    first, second = (asyncio.create_task(legs.these_ended()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    target.end()
    await second
    assert len(legs) == 0
    assert first.cancelled()


async def test_a_job_that_ends_ends_its_tasks_well(target: Target, legs: Legs) -> None:
    leg = legs.begin(TRIM)
    await asyncio.sleep(0)
    for task in legs._tasks:
        task.cancel()
    error = await leg.outcome(soon(legs))
    assert error is not None
    assert "the job ended" in str(error)


async def test_a_defect_of_a_backend_is_an_error(target: Target, legs: Legs) -> None:
    leg = legs.begin(TRIM)
    target.answer.set_exception(ZeroDivisionError("a defect of the test"))
    error = await leg.outcome(soon(legs))
    assert error is not None
    assert "ZeroDivisionError" in str(error)


async def test_no_timer_is_left(target: Target, legs: Legs) -> None:
    leg = legs.begin(WRITE)
    waits = asyncio.create_task(leg.outcome(legs.loop.time() + BUDGET_S))
    await asyncio.sleep(0)
    target.end()
    assert await waits is None
    await eventually_async(lambda: legs._timer is None, what="the timer saw nobody waiting")
