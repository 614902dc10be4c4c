"""After the commit point: remember where the disk is, delete the source, close the journal.

The order is the whole point (rules R8, R16; rows C10 to C16): the target is confirmed by its name,
the registry is told, the source is renamed aside and its deletion recorded, then it is unlinked,
then DONE. Every step may be repeated after a crash. Whatever goes wrong with the source leaves it
where it is and is a remark, never an error of the data path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mirrord.core.journal import Kind, Payload
from mirrord.engine.ledger import Ledger
from mirrord.engine.request import JobRequest
from mirrord.engine.settings import EngineSettings
from mirrord.storage.backend import Backend, Identity, Place


class Retirement:
    """The end of a committed job. `problem` says what it is waiting for, if anything."""

    def __init__(
        self,
        request: JobRequest,
        ledger: Ledger,
        source_place: Place,
        target_place: Place,
        settings: EngineSettings,
        *,
        moved: Callable[[str], Awaitable[None]],
    ) -> None:
        self.problem: str | None = None
        self.kept: str | None = None
        self._request = request
        self._ledger = ledger
        self._source_place = source_place
        self._target_place = target_place
        self._settings = settings
        self._moved = moved

    async def run(self, former: Backend | None, source: Identity, target: Identity) -> str:
        """Retire the source and return one line about it. `former` is the still open source.

        Goes on trying while the state directory can't be written: the target is the truth
        already, and DONE has to become durable before the job's files may be forgotten.
        """
        await self._insist(lambda: self._moved(self._target_place.location), "the registry")
        self.kept = await self._close(former) or await self._retire(source, target)
        if self.kept is None and source.kind != "block":
            return f"deleted the source {self._request.source}"
        if self.kept is None and self._request.wipe:
            return f"overwrote the source {self._request.source} with zeroes and released it"
        if self.kept is None:
            return f"released the source {self._request.source}, which keeps its old content"
        return f"kept the source {self._request.source}: {self.kept}"

    async def record(self, kind: Kind, payload: Payload) -> None:
        """Append a record, however long it takes."""
        await self._insist(lambda: self._ledger.append(kind, payload), "the journal")

    async def _close(self, former: Backend | None) -> str | None:
        """Close the source; storage may tell of late errors only now (close(2) on NFS)."""
        try:
            if former is not None:
                await former.close()
        except OSError as error:
            return f"closing it failed ({error})"
        return None

    async def _retire(self, source: Identity, target: Identity) -> str | None:
        if self._request.keep_source:
            return "as asked"
        job_id = self._request.job_id
        try:
            doubt = await self._target_place.confirm(job_id, target)
            if doubt is not None:
                return doubt
            if self._ledger.outcome.retired is None:
                kept = await self._source_place.retire(job_id, source, wipe=self._request.wipe)
                if kept is not None:
                    return kept
                await self.record(Kind.RETIRED, {})
            await self._source_place.delete_retired(job_id, source)
        except OSError as error:
            return f"it could not be deleted ({error})"
        return None

    async def _insist(self, attempt: Callable[[], Awaitable[None]], what: str) -> None:
        delay_s = self._settings.retry_first_s
        while True:
            try:
                await attempt()
            except OSError as error:
                self.problem = f"{what} can't be written: {error}"
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, self._settings.retry_max_s)
            else:
                self.problem = None
                return
