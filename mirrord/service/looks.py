"""Looks at where locations lead, which nobody waits for longer than some seconds.

To look at a path is to ask its storage, and storage may hang. One that does must not hold up what
has nothing to do with it: each look has a thread of its own, and whoever can't look in time goes
on without. Then the lock of a disk's process on its file alone keeps others from opening it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence

from mirrord.service.logs import fields
from mirrord.service.places import Found, find, is_share, same_name

LOOK_DEADLINE_S = 2.0

log = logging.getLogger(__name__)

_Where = tuple[str, str | None]  # a location, and the root that it is looked for below


class Looks:
    """The looks of one daemon. One that hangs is waited for once, and not taken again."""

    def __init__(self) -> None:
        self._pending: dict[_Where, tuple[asyncio.Future[Found | None], float]] = {}

    async def is_at(self, location: str, found: Found) -> bool:
        """Tell whether something is what lies at a path now; it is, where that can't be told."""
        where = (location, None)
        return await self._look(where) == found or where in self._pending

    async def first_same(
        self, wanted: str, others: Sequence[str], root: str | None = None
    ) -> int | None:
        """Return where in `others` the first is that is one thing with `wanted`; None without one.

        They are compared by their texts and by what lies there now; `wanted` is looked for below
        `root`, if that is given. What can't be looked at within `LOOK_DEADLINE_S` counts as
        another thing, with a warning.
        """
        named = next((n for n, other in enumerate(others) if same_name(wanted, other)), None)
        paths = (
            [] if is_share(wanted) else [n for n, each in enumerate(others) if not is_share(each)]
        )
        if named is not None or not paths:
            return named
        wheres: list[_Where] = [(wanted, root), *((others[n], None) for n in paths)]
        mine, *theirs = await asyncio.gather(*map(self._look, wheres))
        if mine is None:
            return None
        return next((n for n, found in zip(paths, theirs, strict=True) if found == mine), None)

    async def _look(self, where: _Where) -> Found | None:
        loop = asyncio.get_running_loop()
        if where not in self._pending:
            # No executor: its threads are few, and waited for at the end. These may stay for ever.
            threading.Thread(target=self._find, args=(where, loop), daemon=True).start()
            self._pending[where] = loop.create_future(), loop.time() + LOOK_DEADLINE_S
        look, due = self._pending[where]
        if loop.time() < due:
            await asyncio.wait([look], timeout=due - loop.time())
            if not look.done():
                log.warning("location hangs %s", fields(location=where[0]))
        return look.result() if look.done() else None

    def _find(self, where: _Where, loop: asyncio.AbstractEventLoop) -> None:
        found = None
        try:
            found = find(*where)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._found, where, found)

    def _found(self, where: _Where, found: Found | None) -> None:
        self._pending.pop(where)[0].set_result(found)
