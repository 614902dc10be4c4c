"""The target's halves of mirrored writes: begun together with the source's, ended on their own.

A leg that a backend can begin by itself (`Backend.begin_write`) has no task, no timer and no
future unless somebody waits for it: at queue depth 16 those took two fifths of a mirrored write's
time in this program. One timer wakes whoever has waited too long, wherever the leg is by then.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from errno import EIO, ETIMEDOUT
from typing import Any

from mirrord.engine.mutation import Mutation
from mirrord.storage.backend import Backend
from mirrord.storage.completion import Completion


class Leg:
    """One mutation's way to the target. `error` says how it ended, once it is `done`."""

    __slots__ = ("_after", "_legs", "_waiter", "done", "error", "mutation", "until_s")

    def __init__(self, legs: Legs, mutation: Mutation) -> None:
        self.mutation = mutation
        self.done = False
        self.error: OSError | None = None
        self.until_s = math.inf  # when whoever waits gives up
        self._legs = legs
        self._waiter: Completion | None = None
        self._after: Callable[[], None] | None = None

    def ended(self, error: OSError | None) -> None:
        """Note the end, and let others go on: who waits, else who comes afterwards."""
        self.done, self.error = True, error
        self._legs.forget(self, error)
        self.wake()
        if self._after is not None:
            self._after()

    def afterwards(self, action: Callable[[], None]) -> None:
        """Have `action` called at the end, or now if it is done."""
        if self.done:
            action()
        else:
            self._after = action

    async def outcome(self, until_s: float) -> OSError | None:
        """Return what came of it: None for good, ETIMEDOUT when it isn't known by `until_s`."""
        if not self.done:
            self._waiter = Completion(self._legs.loop)
            self.until_s = until_s
            self._legs.watch(until_s)
            try:
                await self._waiter
            finally:
                self._waiter = None
                self.until_s = math.inf
        return self.error if self.done else late(self._legs.budget_s)

    def wake(self) -> None:
        """Let whoever waits look again."""
        if self._waiter is not None:
            self._waiter.end(None)


class Legs:
    """Every leg of one job that has begun and not ended.

    `arrived` is told of each that ended well, before anybody who waits for it. What began ends
    here, whoever is cancelled.
    """

    def __init__(
        self, target: Backend, budget_s: float, *, arrived: Callable[[Mutation], None]
    ) -> None:
        self.budget_s = budget_s  # seconds that a guest waits for the target, at most
        self.loop = asyncio.get_running_loop()
        self._target = target
        self._arrived = arrived
        self._live: set[Leg] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_end: asyncio.Future[None] | None = None  # if somebody waits for it
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf

    def __len__(self) -> int:
        """Return how many are under way."""
        return len(self._live)

    def begin(self, mutation: Mutation) -> Leg:
        """Begin the mutation on the target, with no durability of its own (R10)."""
        leg = Leg(self, mutation)
        if not mutation.begin_mirror(self._target, leg.ended):
            self._run(leg, mutation.mirror(self._target))
        self._live.add(leg)
        return leg

    async def these_ended(self) -> None:
        """Return once those have ended that are under way now, whatever began since."""
        these = frozenset(self._live)
        while not these.isdisjoint(self._live):
            if self._next_end is None:
                self._next_end = self.loop.create_future()
            await asyncio.shield(self._next_end)

    # For the legs.

    def forget(self, leg: Leg, error: OSError | None) -> None:
        """Note that a leg has ended."""
        self._live.discard(leg)
        if error is None:
            self._arrived(leg.mutation)
        if self._next_end is not None:
            self._next_end.set_result(None)
            self._next_end = None

    def watch(self, until_s: float) -> None:
        """Look at `until_s`, or before, whether somebody waits for too long."""
        if until_s < self._timer_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_s = until_s
            self._timer = self.loop.call_at(until_s, self._look)

    # Inside

    def _look(self) -> None:
        self._timer, self._timer_s = None, math.inf
        now_s = self.loop.time()
        next_s = math.inf
        for leg in tuple(self._live):
            if leg.until_s <= now_s:
                leg.wake()
            else:
                next_s = min(next_s, leg.until_s)
        if next_s < math.inf:
            self.watch(next_s)

    def _run(self, leg: Leg, work: Coroutine[Any, Any, None]) -> None:
        """Have a task do what the target can't begin by itself."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            error = OSError(EIO, "the job ended") if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, OSError):
                error = OSError(EIO, f"a defect: {error!r}")
            leg.ended(error)

        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)


def late(limit_s: float) -> OSError:
    """Return what is said of a target that didn't answer in time."""
    return OSError(ETIMEDOUT, f"the target did not answer within {limit_s:g} s")
