"""A bench whose process can be killed, and whose machine can lose its power.

A kill: nothing that was under way happens any more, the mapped memory stays as it was at that
instant, every descriptor is closed. A power cut: the boot is another one as well, and both sides
forget what was not flushed. Then `recover` is the next process, with objects of its own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirrord.core.geometry import KIB, MIB
from mirrord.core.journal import Log, parse
from mirrord.core.migration import Phase
from mirrord.engine.job import Job
from mirrord.engine.recovery import Places, Recovered
from mirrord.engine.request import JobStatus
from mirrord.engine.settings import EngineSettings
from mirrord.engine.surroundings import Surroundings
from mirrord.engine.tracking import WriteTracker
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import FileIo
from mirrord.storage.job_files import HEADER_BYTES
from mirrord.storage.memory import MemoryPlace
from tests.engine.faults import DEADLINE_S, Faults, FaultyBackend, FaultyPlace, FaultyStore, Rule
from tests.engine.harness import QUICK, Bench
from tests.helpers import eventually_async

UNIT = 64 * KIB  # chunk and region alike, so that a small disk has many of both
SIZE = MIB + 513  # 17 regions, the last one short
NEVER_S = 1e6
# Checkpoints and looks at the sizes only when a test asks for them.
SMALL = replace(
    QUICK,
    chunk_bytes=UNIT,
    region_bytes=UNIT,
    zero_bytes=4 * KIB,
    piece_s=0,  # faults count chunks
    checkpoint_s=NEVER_S,
    hot_checkpoints=0,
    watch_s=NEVER_S,
)


class CrashBench(Bench):
    """One disk and its job, on real files where `io` is given, else in memory."""

    def __init__(
        self,
        folder: Path,
        size: int = SIZE,
        *,
        io: FileIo | None = None,
        settings: EngineSettings = SMALL,
        content: bytes | None = None,
    ) -> None:
        super().__init__(folder, size, settings=settings)
        self.io = io
        self.trace: list[str] = []
        self.expected = bytearray(random.Random(1).randbytes(size) if content is None else content)
        self.source_path = folder / "old" / "source.raw"
        self.target_path = folder / "new" / "target.raw"
        self.boots = 1
        self.running: asyncio.Task[JobStatus] | None = None
        self._guests: list[asyncio.Task[Any]] = []
        self.files: FaultyStore
        if io is not None:
            self.source_path.parent.mkdir()
            self.target_path.parent.mkdir()
            self.source_path.write_bytes(self.expected)
        else:
            held = self.shelf.get("source")
            assert held is not None
            for start in range(0, size, UNIT):
                held.blocks[start // UNIT] = self.expected[start : start + UNIT].ljust(UNIT, b"\0")
        self._begin_life()

    def _begin_life(self) -> None:
        """Make what a new process makes: places and wrappers that know nothing."""
        self.at_source = Faults("source", self.trace)
        self.at_target = Faults("target", self.trace)
        self.at_files = Faults("files", self.trace)
        self.at_registry = Faults("registry", self.trace)
        source: FilePlace | MemoryPlace
        target: FilePlace | MemoryPlace
        if self.io is not None:
            source = FilePlace(str(self.source_path), self.io)
            target = FilePlace(str(self.target_path), self.io)
        else:
            source = MemoryPlace("source", self.shelf)
            target = MemoryPlace("target", self.shelf)
        self.source_place = FaultyPlace(source, self.at_source, remembering=True)
        self.target_place = FaultyPlace(target, self.at_target, remembering=True)
        self.places = Places(self.source_place, self.target_place)

    @property
    def source(self) -> FaultyBackend:
        """The source's backend."""
        assert self.source_place.backend is not None
        return self.source_place.backend

    @property
    def target(self) -> FaultyBackend:
        """The target's backend."""
        assert self.target_place.backend is not None
        return self.target_place.backend

    async def store(self) -> Any:
        self.files = FaultyStore(await super().store(), self.at_files)
        return self.files

    def around(self) -> Surroundings:
        honest = super().around()

        async def moved(location: str) -> None:
            await self.at_registry.call("moved", lambda: honest.moved(location))

        honest_moved = moved
        return Surroundings(
            wall=honest.wall, moved=honest_moved, adopt=honest.adopt, settings=self.settings
        )

    # A life of the process

    async def begin(self, **options: Any) -> Job:
        """Open the disk and start a move of it."""
        await self.open()
        return await self.start(**options)

    def run(self) -> asyncio.Task[JobStatus]:
        """Run the job beside the test."""
        self.running = asyncio.create_task(self.job.run())
        return self.running

    async def run_to(self, rule: Rule) -> None:
        """Run the job until a call meets the rule."""
        running = self.running or self.run()
        reached = asyncio.ensure_future(rule.reached.wait())
        await asyncio.wait(
            (running, reached), timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
        )
        reached.cancel()
        assert rule.reached.is_set(), self.told()

    async def run_to_phase(self, phase: Phase) -> None:
        """Run the job until it is in a phase."""
        running = self.running or self.run()
        await eventually_async(
            lambda: running.done() or self.job.migration.phase is phase, DEADLINE_S, self.told()
        )
        assert self.job.migration.phase is phase, self.told()

    async def hold_mirroring(self, **options: Any) -> None:
        """Run a job until both sides are equal and it waits for the operator's cutover."""
        await self.begin(cutover="manual", **options)
        self.run()
        await eventually_async(
            lambda: self.job.held and self.job.migration.phase is Phase.MIRRORING, DEADLINE_S
        )

    async def hold_copying(self, chunk: int, **options: Any) -> Rule:
        """Run a job until everything is copied but one chunk, whose write hangs at the target."""
        await self.begin(**options)
        rule = self.at_target.hang("write", within=range(chunk * UNIT, (chunk + 1) * UNIT))
        length = min(UNIT, self.size - chunk * UNIT)
        self.run()
        await eventually_async(
            lambda: rule.reached.is_set() and self.job.status().bytes_remaining == length,
            DEADLINE_S,
        )
        return rule

    async def cut_over(self) -> JobStatus:
        """Have a job that waits for the operator end."""
        running = self.running or self.run()
        await self.job.cutover()
        return await asyncio.wait_for(running, DEADLINE_S)

    def told(self) -> str:
        """Return the job's story, for messages of failed assertions."""
        return f"{self.job.migration.phase}: {self.job.migration.tell()}; {self.trace[-30:]}"

    async def finish(self) -> JobStatus:
        """Run the job to its end."""
        try:
            return await asyncio.wait_for(self.running or self.run(), DEADLINE_S)
        except TimeoutError:
            raise AssertionError(self.told()) from None

    def guest(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Have a guest do something beside the test."""
        task = asyncio.create_task(work)
        self._guests.append(task)
        return task

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Write as a guest, and expect it from the answer on."""
        await self.disk.write(offset, data, fua=fua)
        self.expected[offset : offset + len(data)] = data

    @property
    def tracker(self) -> WriteTracker:
        """The job's tracker."""
        assert self.job.tracker is not None
        return self.job.tracker

    async def checkpoint(self) -> None:
        """Clear the marks of what is equal, as the housekeeping does now and then."""
        await eventually_async(lambda: self.tracker.source_flushed, DEADLINE_S, "source flushed")
        await self.disk.flush()
        await self.tracker.checkpoint()

    def marked(self, offset: int) -> bool:
        """Tell whether the intent map has the region of an offset."""
        return self.tracker.intents.map.wanted(offset // UNIT)

    @property
    def gate_closed(self) -> bool:
        """Whether the guest's writes are held."""
        return self.disk._gate is not None

    # Its end

    async def kill(self, *, power: bool = False) -> None:
        """End the process between two instructions; with `power` the machine as well."""
        dirty = bytes(self.files.dirty)
        for faults in (self.at_source, self.at_target, self.at_files, self.at_registry):
            faults.kill()
        tasks = [*self._guests, *self.adopted, *([self.running] if self.running else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._guests, self.adopted, self.running = [], [], None
        await self.files.inner.close()
        with (self.folder / self.request.job_id / "dirty").open("r+b") as file:
            file.seek(HEADER_BYTES)
            file.write(dirty)
        for place in (self.source_place, self.target_place):
            if place.backend is not None:
                await place.backend.settled_by_kill(forget=power)
        if power:
            self.boots += 1
            self.boot_id = f"boot-{self.boots}"
        self.trace.clear()
        self._begin_life()

    async def recovered(self) -> Recovered:
        """Be the next process: act on what is found."""
        try:
            return await self.recover()
        except BaseException:
            await self.files.close()  # the process ends
            raise

    async def resume(self) -> JobStatus:
        """Be the next process, and finish the job."""
        found = await self.recover()
        assert found.job is not None, "the job has ended already"
        return await self.finish()

    # What is on storage

    def log_path(self) -> Path:
        """Return the journal's path."""
        return self.folder / self.request.job_id / "log"

    def log(self) -> Log:
        """Read the journal as it is on storage."""
        return parse(self.log_path().read_bytes())

    def records(self) -> list[str]:
        """Return the kinds of the journal's records."""
        return [record.kind.name for record in self.log().records]

    def names(self) -> list[str]:
        """Return the names in both directories, jobs' ids left out."""
        found = (
            self.shelf.names()
            if self.io is None
            else [
                path.name
                for folder in (self.source_path.parent, self.target_path.parent)
                for path in folder.iterdir()
            ]
        )
        return sorted(name.replace(self.request.job_id, "JOB") for name in found)

    @property
    def part_path(self) -> Path:
        """Return the path of the target's temporary name."""
        return self.target_path.parent / f".target.raw.mirrord-{self.request.job_id}.part"

    def shelf_content(self, name: str) -> bytes:
        """Return what a disk in memory holds."""
        content = self.shelf.get(name)
        assert content is not None
        blocks = (content.blocks.get(n, bytes(UNIT)) for n in range(-(-self.size // UNIT)))
        return b"".join(bytes(block) for block in blocks)[: self.size]

    async def both(self) -> tuple[bytes, bytes]:
        """Return what both open sides hold now, behind the faults."""
        return (
            bytes(await self.source.inner.read(0, self.size)),
            bytes(await self.target.inner.read(0, self.size)),
        )

    async def assert_moved(self, status: JobStatus) -> None:
        """The move is over: the guest reads what it wrote, from the target alone."""
        assert status.phase is Phase.DONE, self.told()
        assert bytes(await self.disk.read(0, self.size)) == bytes(self.expected)
        assert self.disk.backend is self.target
        assert self.names() == (["target"] if self.io is None else ["target.raw"])
        assert self.records()[-2:] == ["RETIRED", "DONE"]

    async def close(self) -> None:
        """Release everything, at the end of the test."""
        if hasattr(self, "files"):
            await self.kill()
        elif hasattr(self, "disk"):
            await self.disk.backend.close()
