"""The journal while a job runs: one writer, and the log as it is known to be durable."""

from __future__ import annotations

import asyncio

from mirrord.core.journal import Kind, Log, Outcome, Payload, append, fold
from mirrord.engine.store import JobStore


class Ledger:
    """Appends decisions to a job's journal, one at a time.

    After a failed append the log is as before it: the next append goes to the same place under
    the same number and replaces whatever the storage may have of the failed one (rule R15).
    """

    def __init__(self, store: JobStore, log: Log | None = None) -> None:
        self.log = log or Log()
        self._store = store
        self._writing = asyncio.Lock()

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
            write = asyncio.ensure_future(self._store.write_log(self.log.end, data))
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
