"""Why a job should leave what it is doing: an operator's wish, or trouble with a side."""

from __future__ import annotations

import asyncio

from mirrord.core.migration import Event, Migration

# What beats what, when several come before the job has looked.
_URGENCY = (
    Event.TARGET_AWAY,
    Event.TARGET_FAILED,
    Event.SPACE_EXHAUSTED,
    Event.PAUSE_REQUESTED,
    Event.RESUMED,
    Event.CANCEL_REQUESTED,
    Event.ABORTED,
)


class Interrupt:
    """The most urgent reason that nobody has acted on yet."""

    def __init__(self) -> None:
        self._pending: tuple[Event, str] | None = None
        self._raised = asyncio.Event()

    def request(self, event: Event, reason: str) -> None:
        """Ask the job to leave its activity by `event`."""
        present = self._pending
        if present is None or _URGENCY.index(event) > _URGENCY.index(present[0]):
            self._pending = (event, reason)
        self._raised.set()

    def pending(self, migration: Migration) -> bool:
        """Tell whether there is a reason that the present phase allows; drop one it doesn't."""
        if self._pending is not None and not migration.allows(self._pending[0]):
            self._pending = None
        if self._pending is None:
            self._raised.clear()
        return self._pending is not None

    def take(self) -> tuple[Event, str]:
        """Return the reason and forget it."""
        assert self._pending is not None
        taken, self._pending = self._pending, None
        self._raised.clear()
        return taken

    async def wait(self) -> None:
        """Return once there may be a reason."""
        await self._raised.wait()
