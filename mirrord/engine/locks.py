"""Range locks to wait on: the pure `RangeLocks` with a future for each ticket that must wait."""

from __future__ import annotations

import asyncio

from mirrord.core.ranges import RangeLocks, Ticket


class Locks:
    """The locks of one job, first come, first served."""

    def __init__(self) -> None:
        self._ranges = RangeLocks()
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}

    async def acquire(self, start: int, stop: int) -> Ticket:
        """Return a granted ticket for [start, stop), in the order of the calls."""
        ticket = self._ranges.acquire(start, stop)
        if not ticket.granted:
            await self._wait(ticket)
        return ticket

    async def acquire_within(self, start: int, stop: int, limit_s: float) -> Ticket | None:
        """Do the same, but give up after `limit_s`: None."""
        ticket = self._ranges.acquire(start, stop)
        if not ticket.granted:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(limit_s, self._give_up, ticket)
            try:
                await self._wait(ticket)
            except TimeoutError:
                return None
            finally:
                timer.cancel()
        return ticket

    async def _wait(self, ticket: Ticket) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = waiting
        try:
            await waiting
        except BaseException:
            self._waiting.pop(ticket, None)
            self._wake(self._ranges.cancel(ticket))
            raise

    def _give_up(self, ticket: Ticket) -> None:
        waiting = self._waiting.get(ticket)
        if waiting is not None and not waiting.done():
            waiting.set_exception(TimeoutError())

    def release(self, ticket: Ticket) -> None:
        """Give the range to whoever waits for it."""
        self._wake(self._ranges.release(ticket))

    def _wake(self, tickets: list[Ticket]) -> None:
        for granted in tickets:
            waiting = self._waiting.pop(granted, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
