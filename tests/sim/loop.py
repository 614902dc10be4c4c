"""An event loop in which one seed decides everything. No threads, no sockets, no real clock.

It is enough of asyncio for tasks, TaskGroup, timeout, Event, Lock, Queue, shield, wait_for and
call_later. What is ready runs in a random order: code that works only in asyncio's first-in
first-out order is found out. (`fair` gives asyncio's own order, for the rest of the seeds.)

The clock jumps to the next timer when nothing is ready, so a simulated hour costs nothing. When
nothing is ready and no timer is armed, everything waits for ever: `DeadlockError`. When the loop
takes more steps than any run needs, it turns in a circle: `LivelockError`.

A crash is `halt`: the loop stops after the callback that is running, and `abandon` then throws
the tasks away. Their `finally` blocks run while they are closed, as Python insists; whoever has
effects on the simulated world must have none once the world is dead (see `world.World.dead`).
"""

from __future__ import annotations

import asyncio
import heapq
import random
from asyncio import events
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")

STEPS_MAX = 300_000  # a whole run takes 2,000 to 20,000


class DeadlockError(Exception):
    """Nothing is ready and no timer is armed: every task waits for ever."""


class LivelockError(Exception):
    """The loop turns and turns and nothing ends."""


class HaltedError(Exception):
    """The simulated process died while `run` was running."""


class SimLoop(asyncio.AbstractEventLoop):
    """A deterministic event loop; `run` takes the place of `asyncio.run`."""

    def __init__(
        self, rng: random.Random, *, start_s: float = 0.0, fair: bool = False, end_s: float = 1e9
    ) -> None:
        self._random = rng.random
        self._fair = fair
        self._now_s = start_s
        self._end_s = end_s
        self._ready: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._sequence = 0
        self._tasks: list[asyncio.Task[Any]] = []
        self.steps = 0
        self.halted = False
        self.errors: list[str] = []

    def time(self) -> float:
        return self._now_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return events._get_running_loop() is self

    def is_closed(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.append(task)
        if len(self._tasks) > 256:  # forget the ended ones now and then
            self._tasks = [task for task in self._tasks if not task.done()]
        return task

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nothing to do: a cancelled timer is dropped when its turn comes."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        raise AssertionError("threads are not simulated")

    def run(self, main: Coroutine[Any, Any, T], *, steps_max: int = STEPS_MAX) -> T:
        """Run until `main` ends, and return its result.

        Raises HaltedError when `halt` was called meanwhile, DeadlockError, LivelockError, and
        what `main` raises.
        """
        events._set_running_loop(self)
        try:
            task = self.create_task(main, name="main")
            steps_max += self.steps
            while not task.done():
                self._step()
                if self.halted:
                    raise HaltedError
                if self.steps > steps_max or self._now_s > self._end_s:
                    raise LivelockError(f"{self.steps} steps, {self._now_s:.0f} s: {self.stacks()}")
            return task.result()
        finally:
            events._set_running_loop(None)

    def halt(self) -> None:
        """Stop for ever after the callback that is running: the process has died."""
        self.halted = True

    def abandon(self) -> None:
        """Throw away all tasks that have not ended. Nothing runs in this loop any more."""
        self.halted = True
        self._ready.clear()
        self._timers.clear()
        around = asyncio._get_running_loop()
        # What the dying begin (`shield` of a close) is begun here, and thrown away as well; without
        # a loop that runs asyncio would make them a real one, which nobody closes.
        asyncio._set_running_loop(self)
        try:
            while self._tasks:
                task = self._tasks.pop()
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    close(task.get_coro())
        finally:
            asyncio._set_running_loop(around)
        self._ready.clear()
        self._timers.clear()

    def alive(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that have not ended."""
        return [task for task in self._tasks if not task.done()]

    def stacks(self) -> str:
        """Return where every task that has not ended waits."""
        return "; ".join(f"{task.get_name()}: {_where(task.get_coro())}" for task in self.alive())

    def _step(self) -> None:
        self.steps += 1
        timers, ready = self._timers, self._ready
        while timers and (timers[0][0] <= self._now_s or timers[0][2].cancelled()):
            timer = heapq.heappop(timers)[2]
            if not timer.cancelled():
                ready.append(timer)
        if not ready:
            if not timers:
                raise DeadlockError(self.stacks())
            self._now_s = timers[0][0]
            return
        if self._fair:
            handle = ready.pop(0)
        else:
            index = int(self._random() * len(ready))
            ready[index], ready[-1] = ready[-1], ready[index]
            handle = ready.pop()
        if not handle.cancelled():
            handle._run()


async def elapse(duration_s: float) -> None:
    """Let virtual time pass; it costs none."""
    loop = asyncio.get_running_loop()
    passed = loop.create_future()
    timer = loop.call_later(duration_s, lambda: passed.done() or passed.set_result(None))
    try:
        await passed
    finally:
        timer.cancel()


def close(coroutine: Any) -> None:
    """Close a coroutine, whatever it does about it."""
    for _ in range(20):  # a `finally` that awaits refuses to be closed; it gives up in the end
        try:
            coroutine.close()
            return
        except BaseException:  # the dead raise what they like
            continue


def _where(coroutine: Any) -> str:
    """Return the innermost lines of a suspended coroutine."""
    lines = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None:
            lines.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    return " > ".join(lines[-5:])
