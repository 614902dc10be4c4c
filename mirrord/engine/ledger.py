"""The journal while a job runs: one writer, and the log as it is known to be durable."""

from __future__ import annotations

import asyncio

from mirrord.core.journal import Kind, Log, Outcome, Payload, append, fold
from mirrord.engine.store import JobStore


class Ledger:
    """Appends decisions to a job's journal, one at a time.

    After a failed append the log is as before it, but the storage may have the record, or a part
    of it (rule R15). The next append durably zeroes its place first: a record written over
    another could be torn into a mixture, which would be damage.
    """

    def __init__(self, store: JobStore, log: Log | None = None) -> None:
        self.log = log or Log()
        self._store = store
        self._writing = asyncio.Lock()
        self._unknown_bytes = 0  # what a failed append may have left behind the log

    @property
    def outcome(self) -> Outcome:
        """What the durable records mean."""
        return fold(self.log.records)

    async def append(self, kind: Kind, payload: Payload) -> None:
        """Append a record; it is durable on return.

        Raises `OSError` when that is not known. Cancellation is ignored until it is decided:
        nobody may act on half a decision.
        """
        async with self._writing:
            data, after = append(self.log, kind, payload)
            write = asyncio.ensure_future(self._write(data))
            cancelled: asyncio.CancelledError | None = None
            while not write.done():
                try:
                    await asyncio.shield(write)
                except asyncio.CancelledError as error:
                    if write.cancelled():
                        raise
                    cancelled = error
                except OSError:
                    break
            write.result()
            self.log = after
            if cancelled is not None:
                raise cancelled

    async def _write(self, data: bytes) -> None:
        if self._unknown_bytes:
            await self._store.write_log(self.log.end, bytes(self._unknown_bytes))
        self._unknown_bytes = max(self._unknown_bytes, len(data))
        await self._store.write_log(self.log.end, data)
        self._unknown_bytes = 0
