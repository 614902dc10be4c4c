"""Daemon and disk process in one: the real `Moves` over the real `Mover`, without sockets.

What both do with a state directory and a disk, in the order in which they do it, and nothing that
takes half a second. For processes that end with the test, or earlier.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mirrord.control.messages import DiskStatus, Job, MoveRequest
from mirrord.engine.disk import Disk
from mirrord.engine.settings import EngineSettings
from mirrord.errors import MirrordError, RefusedError
from mirrord.service import state
from mirrord.service.config import Config
from mirrord.service.looks import Looks
from mirrord.service.mover import Mover
from mirrord.service.moves import Moves
from mirrord.service.state import Directories, DiskRecord, JobRecord
from mirrord.storage import file_place, uring  # noqa: F401  what `PlaceFactory` imports late
from tests.helpers import POLL_S

Answer = TypeVar("Answer")

DISK = "vm"
END_S = 20  # a move of a small disk takes a fraction of a second


def attach(directories: Directories, location: Path) -> None:
    """Put into the state directory what a successful attach leaves there."""
    state.prepare(directories)
    state.make_directory(directories.disk(DISK))
    record = DiskRecord(DISK, str(location))
    state.write_record(directories.disk(DISK) / "disk.json", record)


class OneProcess:
    """One disk and its moves. Made by `serving`."""

    serving, outdated = True, False  # for `Moves`, to which this is the disk's process

    def __init__(
        self, directories: Directories, group: asyncio.TaskGroup, settings: EngineSettings
    ) -> None:
        self.moves = Moves(Config(), directories, group, lambda _: self, Looks())
        record = state.read_record(directories.disk(DISK) / "disk.json", DiskRecord)
        self._directories = directories
        self._location = record.location
        self._mover = Mover(
            record, directories, on_change=self.moves.job_changed, settings=settings
        )

    async def open(self, group: asyncio.TaskGroup) -> None:
        """Read what is there and open the disk, as a start of both processes does."""
        await self.moves.load()
        await self._mover.open()
        self.running = group.create_task(self._mover.run())

    def begin(self) -> None:
        """Let queued moves begin, now that the disk is served."""
        self.moves.disk_ready(self._mover.status(0))

    @property
    def disk(self) -> Disk:
        """The disk, as its guests see it."""
        return self._mover.disk

    @property
    def location(self) -> str:
        """Where the disk's bytes are."""
        return self._mover.location

    async def refresh(self) -> DiskStatus:
        """As `supervisor.DiskProcess`."""
        return self._mover.status(0)

    async def call(self, verb: str, answer: type[Answer], **params: Any) -> Answer:
        """Answer as the private channel does."""
        try:
            if verb == "check_move":
                record = msgspec.convert(params["record"], type=JobRecord)
                checked = await self._mover.check(record)
                return msgspec.convert(msgspec.to_builtins(checked), type=answer)
            if verb == "move":
                path = self._directories.job(params["job_id"]) / "job.json"
                started: Any = await self._mover.start(state.read_record(path, JobRecord))
                return started
            steered: Any = await self._mover.steer(verb, params["job_id"], params.get("limit"))
            return steered
        except MirrordError as error:
            raise RefusedError(error.code, str(error)) from error
        except OSError as error:
            raise RefusedError("io-error", str(error)) from error

    async def move(self, target: Path, **options: Any) -> Job:
        """Ask for a move."""
        request = MoveRequest(str(target), **options)
        return await self.moves.move(DISK, (self._location, request.target), request)

    async def ended(self, job_id: str) -> Job:
        """Wait for the end of a move, as its users learn it."""
        async with asyncio.timeout(END_S):
            while not (job := await self.moves.job(job_id)).ended_already:
                await self.moves.changed(DISK, POLL_S)
        return job


@contextlib.asynccontextmanager
async def serving(
    directories: Directories, settings: EngineSettings | None = None
) -> AsyncIterator[OneProcess]:
    """Be the next process over a state directory; the disk is open, no queued move has begun."""
    state.prepare(directories)
    state.sweep(directories)
    async with asyncio.TaskGroup() as group:
        process = OneProcess(directories, group, settings or EngineSettings())
        await process.open(group)
        yield process
        process.running.cancel()
