"""What goes on beside a job's activity: checkpoints, and eyes on both sides."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from errno import ESTALE, ETIMEDOUT
from typing import Any

from mirrord.engine.settings import EngineSettings
from mirrord.engine.tracking import WriteTracker
from mirrord.errors import SideError, SourceError, TargetError

_log = logging.getLogger("mirrord.engine")


class Housekeeping:
    """The loops that a job's task group runs. `checkpoints` switches them off for the cutover."""

    def __init__(
        self,
        tracker: WriteTracker,
        settings: EngineSettings,
        report: Callable[[SideError], None],
    ) -> None:
        self.checkpoints = True
        self._tracker = tracker
        self._settings = settings
        self._report = report

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Return the loops to run; they end by being cancelled."""
        return [self._checkpointing(), self._watching()]

    async def check_unchanged(self) -> None:
        """Raise SourceError or TargetError, of errno ESTALE when somebody changed a side's size."""
        await self._check_source()
        await self.check_target()

    async def _check_source(self) -> None:
        try:
            await self._tracker.source.check_unchanged()
        except OSError as error:
            what = "changed size" if error.errno == ESTALE else "can't be looked at"
            raise SourceError(error, f"the source {what}") from error

    async def check_target(self) -> None:
        """Raise TargetError, of errno ESTALE when somebody changed the target's size."""
        try:
            await self._tracker.target.check_unchanged()
        except OSError as error:
            what = "was changed by somebody else" if error.errno == ESTALE else "can't be looked at"
            raise TargetError(error, f"the target {what}") from error

    async def _checkpointing(self) -> None:
        clock = asyncio.get_running_loop().time
        last_s = clock()
        while True:
            await asyncio.sleep(self._settings.sample_s)
            unflushed = self._tracker.unflushed_bytes
            due = clock() - last_s >= self._settings.checkpoint_s
            if not self.checkpoints or not (due or unflushed >= self._settings.checkpoint_bytes):
                continue
            last_s = clock()
            try:
                await self._tracker.checkpoint()
            except TargetError as error:
                self._report(error)
            except OSError as error:
                # The marks stay set on storage: harmless, but an operator should know.
                _log.warning("clear intent-map error=%s", error)

    async def _watching(self) -> None:
        clock = asyncio.get_running_loop().time
        checked_s = clock()
        while True:
            await asyncio.sleep(self._settings.sample_s)
            if self._tracker.overdue:
                error = OSError(ETIMEDOUT, os.strerror(ETIMEDOUT))
                self._report(TargetError(error, "the target does not answer"))
            if clock() - checked_s < self._settings.watch_s:
                continue
            checked_s = clock()
            try:
                await self.check_unchanged()
            except (SourceError, TargetError) as error:
                self._report(error)
