"""A disk, a target and a job in a temporary folder, on the real loop with real files."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from mirrord.engine import recovery
from mirrord.engine.disk import Disk
from mirrord.engine.job import Job
from mirrord.engine.recovery import Places, Recovered
from mirrord.engine.request import JobRequest, JobStatus, dirty_bytes_for
from mirrord.engine.settings import EngineSettings
from mirrord.engine.surroundings import Surroundings
from mirrord.storage.backend import Backend, Place
from mirrord.storage.job_files import JobFiles
from mirrord.storage.memory import MemoryPlace, MemoryShelf

QUICK = EngineSettings(
    checkpoint_s=0.05,
    target_budget_s=0.2,
    target_stall_s=0.5,
    gate_s=1.0,
    retry_first_s=0.02,
    retry_max_s=0.1,
    space_probe_s=0.05,
    sample_s=0.02,
    watch_s=0.05,
)
KILLED = (asyncio.CancelledError,)


class Bench:
    """One disk on a shelf of memory disks, or between two `Place`s, and its job's files."""

    def __init__(
        self,
        folder: Path,
        size: int,
        *,
        settings: EngineSettings = QUICK,
        places: Places | None = None,
    ) -> None:
        self.folder = folder
        self.size = size
        self.settings = settings
        self.shelf = MemoryShelf()
        if places is None:
            self.shelf.add("source", size)
            places = Places(MemoryPlace("source", self.shelf), MemoryPlace("target", self.shelf))
        self.places = places
        self.boot_id = "boot-1"
        self.moved: list[str] = []
        self.adopted: list[asyncio.Task[None]] = []
        self.disk: Disk
        self.job: Job
        self.request: JobRequest
        self._numbers = itertools.count(1)

    async def open(self) -> Disk:
        """Open the source as a disk."""
        self.disk = Disk("vm1", await self.places.source.open(cache=self.places.cache))
        return self.disk

    async def start(self, **options: Any) -> Job:
        """Start a job; `run` it yourself."""
        job_id = f"job-{next(self._numbers)}"
        self.request = JobRequest(
            job_id, "vm1", self.places.source.location, self.places.target.location, **options
        )
        self.job = await recovery.start(
            self.disk, self.places, await self.store(), self.request, self.around()
        )
        return self.job

    async def recover(self) -> Recovered:
        """Do what the next process does after a crash."""
        recovered = await recovery.recover(
            "vm1", self.places, await self.store(), self.request, self.around()
        )
        self.disk = recovered.disk
        if recovered.job is not None:
            self.job = recovered.job
        return recovered

    async def store(self) -> JobFiles:
        """Open the job's files."""
        directory = self.folder / self.request.job_id
        directory.mkdir(exist_ok=True)
        return await JobFiles.open(
            directory,
            self.size,
            self.boot_id,
            dirty_bytes=dirty_bytes_for(self.size),
            region_bytes=self.settings.region_bytes,
        )

    def around(self) -> Surroundings:
        """Return the surroundings that remember what the job told them."""

        async def moved(location: str) -> None:
            self.moved.append(location)

        def adopt(work: Coroutine[Any, Any, None]) -> None:
            self.adopted.append(asyncio.create_task(work))

        return Surroundings(wall=time.time, moved=moved, adopt=adopt, settings=self.settings)

    async def content(self, place: Place | None = None) -> bytes:
        """Return the whole disk, or what lies at a place."""
        if place is None:
            return bytes(await self.disk.read(0, self.size))
        backend: Backend = await place.open()
        try:
            return bytes(await backend.read(0, self.size))
        finally:
            await backend.close()


class Writer:
    """A guest that writes, zeroes and trims at random, and knows what must be there."""

    def __init__(self, disk: Disk, seed: int = 0, *, pause_s: float = 0.0) -> None:
        self.disk = disk
        self.random = random.Random(seed)
        self.expected = bytearray(disk.size)
        self.requests = 0
        self.stopped = False
        self.pause_s = pause_s

    async def fill(self) -> None:
        """Write something everywhere but in a few holes."""
        block = 64 << 10
        for offset in range(0, self.disk.size, block):
            length = min(block, self.disk.size - offset)
            if self.random.random() < 0.7:
                await self.write(offset, self.random.randbytes(length))

    async def write(self, offset: int, data: bytes) -> None:
        """Write, and expect it."""
        await self.disk.write(offset, data)
        self.expected[offset : offset + len(data)] = data

    async def run(self) -> None:
        """Write until stopped, a request at a time, through whatever the job does."""
        while not self.stopped:
            offset = self.random.randrange(self.disk.size)
            length = min(self.random.choice((1, 512, 4096, 40000)), self.disk.size - offset)
            kind = self.random.random()
            if kind < 0.8:
                await self.write(offset, self.random.randbytes(length))
            else:
                if kind < 0.9:
                    await self.disk.write_zeroes(offset, length)
                else:
                    await self.disk.trim(offset, length)
                self.expected[offset : offset + length] = bytes(length)
            if kind > 0.97:
                await self.disk.flush()
            self.requests += 1
            await asyncio.sleep(self.pause_s)


async def finish(job: Job, limit_s: float = 20) -> JobStatus:
    """Run a job to its end."""
    return await asyncio.wait_for(job.run(), limit_s)
