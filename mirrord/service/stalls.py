"""Notices that a disk's guests wait and nothing ends: storage that hangs gives no error."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from mirrord.service.logs import fields

LOOK_S = 1.0
STALL_S = 5.0  # less is storage that is slow, or a cutover

log = logging.getLogger(__name__)


class Server(Protocol):
    """What is watched."""

    @property
    def waiting(self) -> int:
        """Requests that came and have no answer."""

    @property
    def ended(self) -> int:
        """Requests that ended so far."""


class StallWatch:
    """`stalled_s` is for how long requests have waited while none of them ended."""

    def __init__(self, disk: str, server: Server) -> None:
        self.stalled_s = 0.0
        self._disk = disk
        self._server = server
        self._ended = -1
        self._since_s = 0.0

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self.look(loop.time())
            await asyncio.sleep(LOOK_S)

    def look(self, now_s: float) -> None:
        """Look whether something has ended since the last look, or nothing waits."""
        ended, waiting = self._server.ended, self._server.waiting
        before_s = self.stalled_s
        if ended == self._ended and waiting:
            self.stalled_s = now_s - self._since_s
        else:
            self._ended, self._since_s, self.stalled_s = ended, now_s, 0.0
        if before_s < STALL_S <= self.stalled_s:
            log.info("storage does not answer %s", fields(disk=self._disk, waiting=waiting))
        elif self.stalled_s < STALL_S <= before_s:
            log.info("storage answers again %s", fields(disk=self._disk, after_s=round(before_s)))


def reason_of_start(taking_s: float) -> str | None:
    """Say that a move takes long to begin, if it does: it opens its target first."""
    if taking_s < STALL_S:
        return None
    return f"it has been starting for {taking_s:.0f} s: the storage of its target may hang"


def reason(stalled_s: float) -> str | None:
    """Say that a disk is stalled, if it is."""
    if stalled_s < STALL_S:
        return None
    return f"its guests have had no answer for {stalled_s:.0f} s: its storage may hang"
