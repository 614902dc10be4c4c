"""The intent map's way to disk: marked durably before the write, cleared lazily.

Writers of clean regions share one durable write (group commit): whoever comes first writes every
page that has something new, the others wait and look again. Only one write of the map is under
way at a time, and it always carries the present content, so an old page never overtakes a new
one. A mark counts only once a write that contained it is durable (rule R1); a clear needs no
sync, because a stale 1 only costs a copy (rule R2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from mirrord.core.bitmap import IntentMap
from mirrord.engine.store import JobStore


class Intents:
    """The durable intent map of one job."""

    def __init__(self, intent_map: IntentMap, store: JobStore) -> None:
        self.map = intent_map
        self._store = store
        self._writing: asyncio.Future[None] | None = None

    def marked(self, offset: int, length: int) -> bool:
        """Tell whether every region of the range is durably marked."""
        return self.map.marked(offset, length)

    async def ensure(self, offset: int, length: int) -> None:
        """Return once every region of the range is durably marked.

        Raises `OSError` when the map can't be written; then nothing may be written to the source.
        """
        self.map.want(offset, length)
        while not self.map.marked(offset, length):
            await self._write(durable=True)

    async def clear(self, regions: Iterable[int]) -> None:
        """Clear the marks of regions that are equal on both sides and durable on the target.

        They stop counting as marked at once, before the first await.
        """
        for region in regions:
            self.map.clear(region)
        while self._writing is not None:
            await asyncio.shield(self._writing)
        if self.map.cleared_pages():
            await self._write(durable=False)

    async def _write(self, *, durable: bool) -> None:
        if self._writing is not None:
            # Shared by all who wait: one that is cancelled must not cancel it for the others.
            await asyncio.shield(self._writing)
            return
        self._writing = asyncio.get_running_loop().create_future()
        try:
            pages = self.map.pages() if durable else self.map.cleared_pages()
            for offset, data in pages:
                await self._store.write_map(offset, data, durable=durable)
            if durable:
                self.map.made_durable(pages)
            else:
                self.map.written(pages)
        finally:
            writing, self._writing = self._writing, None
            writing.set_result(None)
