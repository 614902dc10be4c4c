"""What a job is given by the process it runs in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from mirrord.engine.settings import EngineSettings

if TYPE_CHECKING:
    from mirrord.engine.job import Job


class Surroundings:
    """Clocks, settings, and ways out of the job.

    `wall` is the clock for people; `clock` is a fine monotonic one for measuring (the loop's own,
    which is the default, has steps of a millisecond under uvloop); `moved` makes a new location
    durable in the registry, `adopt` runs a coroutine that may outlive the job, `changed` is called
    at every change of phase.
    """

    def __init__(
        self,
        *,
        wall: Callable[[], float],
        moved: Callable[[str], Awaitable[None]],
        adopt: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[Job], None] = lambda job: None,
        settings: EngineSettings | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.wall = wall
        self.clock = clock or asyncio.get_running_loop().time
        self.moved = moved
        self.adopt = adopt
        self.changed = changed
        self.settings = settings or EngineSettings()


async def outlive(task: asyncio.Future[Any]) -> None:
    """Wait for what was left behind; nobody wants its outcome any more."""
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
