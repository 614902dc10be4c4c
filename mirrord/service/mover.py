"""One disk and its moves inside the disk process: opens, recovers, starts, steers, remembers.

This is where records and locations become places, stores and jobs of the engine, and where the
engine's status becomes what users see. At most one job runs at a time. A job's own failure is its
outcome; an exception out of one is a bug, and ends the process: the next one recovers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import gc
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import msgspec

import mirrord
from mirrord.control.messages import DiskStatus, Job, Share
from mirrord.core.journal import Authority
from mirrord.engine import recovery
from mirrord.engine.disk import Disk
from mirrord.engine.job import Job as EngineJob
from mirrord.engine.recovery import Places
from mirrord.engine.request import JobRequest, dirty_bytes_for
from mirrord.engine.settings import EngineSettings
from mirrord.engine.surroundings import Surroundings
from mirrord.errors import DamagedError, MirrordError, RefusedError
from mirrord.service import history, logs, state
from mirrord.service.logs import Fields, fields
from mirrord.service.places import PlaceFactory, is_share
from mirrord.service.shares import ShareConfig
from mirrord.service.state import Directories, DiskRecord, JobRecord
from mirrord.storage.backend import Backend, Cache, Identity, Place
from mirrord.storage.job_files import JobFiles, read_boot_id
from mirrord.storage.memory_pool import give_freed_memory_back

log = logging.getLogger(__name__)

# A verb answers once it has taken effect, or after this: a target that hangs delays its end.
VERB_SETTLES_S = 4.0
# Guests wait while leftovers of a start are removed; they may lie on a server that is away.
DISCARD_S = 2.0
TIDY_S = 0.5  # after a job's end: its last tasks have ended, too
# Of the formats of images that are told by their first bytes (qemu, block/*.c: `*_probe`).
IMAGE_MAGICS = {b"QFI\xfb": "qcow2", b"KDMV": "VMDK", b"vhdxfile": "VHDX", b"conectix": "VHD"}
IMAGE_HEAD_BYTES = 512
# How a verb shows: the phases of which one is reached, or left.
_EFFECT: dict[str, Callable[[Job], bool]] = {
    "pause": lambda job: job.ended_already or job.phase == "paused",
    "resume": lambda job: job.phase not in ("paused", "degraded"),
    "cancel": lambda job: job.ended_already,
    "cutover": lambda job: job.phase != "mirroring",
    "limit": lambda job: True,
}


class Mover:
    """The disk and its job. `open`, then `run` as a task of the process; `close` at the end."""

    disk: Disk

    def __init__(
        self,
        record: DiskRecord,
        directories: Directories,
        *,
        on_change: Callable[[Job], None],
        settings: EngineSettings | None = None,
        shares: Mapping[str, ShareConfig] | None = None,
    ) -> None:
        self._record = record
        self._directories = directories
        self._on_change = on_change
        self._settings = settings or EngineSettings()
        self._cache = Cache(record.cache)
        self._places = PlaceFactory(shares)
        self._place: Place
        self._placed: Backend | None = None  # what `_place` names: a switch runs ahead of it
        self._job: EngineJob | None = None
        self._job_record: JobRecord | None = None
        self._last: Job | None = None  # the last one that ended
        self._group: asyncio.TaskGroup | None = None
        self._running = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._changed = asyncio.Event()
        self._late: list[asyncio.Task[None]] = []
        self._told_more = asyncio.Event()  # the job's story is longer than what is written down

    @property
    def location(self) -> str:
        """Where the disk's bytes are now."""
        return self._place.location

    @property
    def moving(self) -> bool:
        return not self._idle.is_set()

    def job(self) -> Job | None:
        """Return the running job, else the last one that ended since this process started."""
        if self._job is not None and self._job_record is not None:
            return history.told(self._job_record, self._job.status().summary())
        return self._last

    def _about(self) -> Fields:
        """Return what each log line about the job says."""
        job = self.job()
        if job is None:
            return fields(disk=self._record.name)
        return fields(job=job.id, disk=job.disk, phase=job.phase)

    # Opening, and what a crash left.

    async def open(self) -> None:
        """Open the disk; an unfinished job is recovered first. Raises MirrordError, OSError."""
        unfinished, unborn = await asyncio.to_thread(self._find_jobs)
        if unfinished is not None:
            await self._recover(unfinished)
        else:
            self._place = await self._places.ready(
                self._record.location, self._record.size, self._record.root
            )
            backend = await self._place.open(read_only=self._record.read_only, cache=self._cache)
            try:
                self._refuse_another(self.location, backend.identity)
                if not self._record.boot:  # it was never served
                    await _refuse_image(self.location, backend)
            except BaseException:
                await backend.close()
                raise
            self.disk = Disk(self._record.name, backend, read_only=self._record.read_only)
            self._placed = backend
        for record in unborn:  # C0: what a start that came to no record may have left
            try:
                async with asyncio.timeout(DISCARD_S):
                    await (await self._target_of(record)).discard(record.id)
            except (MirrordError, OSError, TimeoutError) as error:
                about = fields(job=record.id, disk=record.disk, phase="queued", error=error)
                log.warning("part left over %s", about)

    def _refuse_another(self, location: str, found: Identity) -> None:
        if not self._is_what_was_served(found):
            raise RefusedError(
                "disk-replaced",
                f"{location} is not what disk {self._record.name} was served from: put that back, "
                "or, to serve what is there, detach the disk and attach it again",
            )

    def _is_what_was_served(self, found: Identity) -> bool:
        """Tell whether this may be what the record knows. It may have grown while unserved.

        Over a boot a file is believed: not every file system (FUSE) numbers it as before. Over a
        mount, its birth tells as well as its number.
        """
        known, boot = self._record.identity, self._record.boot
        same_boot = bool(boot) and boot == read_boot_id()
        if known is None or (known.kind == "file" and not same_boot):
            return True
        born_so = known.kind == found.kind == "file" and known.born_ns == found.born_ns != 0
        known = dataclasses.replace(known, size=found.size)
        return born_so or known.is_still(found, same_boot=same_boot)

    def record(self) -> DiskRecord:
        """Return the disk's record as it has to be now."""
        return msgspec.structs.replace(
            self._record, location=self.location, identity=self.identity, boot=read_boot_id()
        )

    @property
    def identity(self) -> Identity | None:
        """What lies at `location`; None on a share, whose server tells of another.

        None as well in the moment between a move's switch and `location` saying so.
        """
        known = self._placed is self.disk.backend and not is_share(self.location)
        return self.disk.backend.identity if known else None

    def _find_jobs(self) -> tuple[JobRecord | None, list[JobRecord]]:
        """Return the disk's unfinished job, and those that never came to their first record."""
        unfinished: list[JobRecord] = []
        unborn: list[JobRecord] = []
        for job_id in self._directories.job_ids():
            try:
                entry = history.read_job(self._directories, job_id)
            except DamagedError:
                if history.concerns(self._directories, job_id, self._record):
                    raise
                continue
            if entry.record.disk == self._record.name:
                if entry.standing == "unfinished":
                    unfinished.append(entry.record)
                elif entry.standing == "queued":
                    unborn.append(entry.record)
        if len(unfinished) > 1:
            ids = ", ".join(each.id for each in unfinished)
            raise DamagedError(f"disk {self._record.name} has several unfinished jobs: {ids}")
        return (unfinished[0] if unfinished else None), unborn

    async def _recover(self, record: JobRecord) -> None:
        directory = self._directories.job(record.id)
        outcome = await asyncio.to_thread(history.read_outcome, directory / "log")
        assert outcome.prep is not None  # or the job would not count as unfinished
        size: int = outcome.prep["source"]["size"]
        story = await asyncio.to_thread(history.read_story, directory)
        phase = story[-1].phase.value if story else "queued"
        logs.concern(record.id, phase)
        store = await self._store(record.id, size)
        places = await self._both(record, size)
        if outcome.authority is Authority.SOURCE:
            await self._refuse_another_source(places.source)
        recovered = await recovery.recover(
            self._record.name, places, store, _request(record), self._surroundings(record)
        )
        self.disk = recovered.disk
        committed = recovered.location == places.target.location
        self._place = places.target if committed else places.source
        self._placed = self.disk.backend
        if recovered.job is None:
            await store.close()
            ended = await asyncio.to_thread(history.read_job, self._directories, record.id)
            self._last = ended.job
            return
        log.info("recovered %s", fields(job=record.id, disk=record.disk, phase=phase))
        recovered.job.migration.story = story
        self._job, self._job_record = recovered.job, record
        self._idle.clear()

    async def _refuse_another_source(self, source: Place) -> None:
        """Refuse a source that was replaced, and leave all as it is: the target may be all we have.

        What else is wrong with it, recovery says.
        """
        if is_share(source.location):
            return
        try:
            backend = await source.open(read_only=True, cache=self._cache)
        except (MirrordError, OSError):
            return
        try:
            self._refuse_another(source.location, backend.identity)
        finally:
            await backend.close()

    async def _store(self, job_id: str, size: int) -> JobFiles:
        return await JobFiles.open(
            self._directories.job(job_id),
            size,
            read_boot_id(),
            dirty_bytes=dirty_bytes_for(size),
            region_bytes=self._settings.region_bytes,
        )

    async def _both(self, record: JobRecord, size: int) -> Places:
        source = await self._places.ready(record.source, size, record.source_root)
        return Places(source, await self._target_of(record, size), self._cache)

    async def _target_of(self, record: JobRecord, size: int | None = None) -> Place:
        return await self._places.ready(record.target, size, record.target_root)

    def _surroundings(self, record: JobRecord) -> Surroundings:
        return Surroundings(
            wall=time.time,
            moved=partial(self._moved, record.target_root),
            adopt=self._adopt,
            changed=self._job_changed,
            settings=self._settings,
            clock=time.monotonic,
        )

    # Running.

    async def run(self) -> None:
        """Run the recovered job and every later one, until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            if self._job is not None and self._job_record is not None:
                group.create_task(self._run_job(self._job, self._job_record))
            self._running.set()
            try:
                await asyncio.Event().wait()
            finally:
                self._group = None  # it takes no more tasks

    async def _run_job(self, job: EngineJob, record: JobRecord) -> None:
        keeping = asyncio.create_task(self._keep_story(job, record))
        try:
            status = await job.run()
        finally:
            keeping.cancel()
        self._last = history.told(record, status.summary())
        self._job = self._job_record = None
        self._idle.set()
        self._changed.set()
        self._on_change(self._last)
        asyncio.get_running_loop().call_later(TIDY_S, _tidy)

    async def _keep_story(self, job: EngineJob, record: JobRecord) -> None:
        """Write the story down at each change, beside the job: its state directory may hang."""
        directory = self._directories.job(record.id)
        while True:
            await self._told_more.wait()
            self._told_more.clear()
            try:
                await asyncio.to_thread(history.write_story, directory, tuple(job.migration.story))
            except OSError as error:
                log.info("story not kept %s %s", self._about(), fields(error=error))

    def _adopt(self, work: Coroutine[Any, Any, None]) -> None:
        harmless = _harmless(work, self._about())
        if self._group is not None:
            self._group.create_task(harmless)
        else:  # the process ends, and may end before this does
            self._late.append(asyncio.create_task(harmless))

    def _job_changed(self, job: EngineJob) -> None:
        record = self._job_record
        if record is not None and job is self._job:
            shown = history.told(record, job.status().summary())
            logs.concern(record.id, shown.phase)
            self._on_change(shown)
            self._changed.set()
            if not shown.ended_already:  # else the journal has it
                self._told_more.set()

    async def _moved(self, root: str | None, location: str) -> None:
        """Make it durable that the disk is at `location` now, and show it."""
        self._place = await self._places.ready(location, self.disk.size, root)
        self._placed = self.disk.backend
        self._record = msgspec.structs.replace(self.record(), size=self.disk.size, root=root)
        path = self._directories.disk(self._record.name) / "disk.json"
        await asyncio.to_thread(state.write_record, path, self._record)

    async def close(self, flush_s: float) -> None:
        """Make the guest's writes durable as well as that goes in `flush_s`."""
        try:
            async with asyncio.timeout(flush_s):
                await self.disk.flush()
        except (TimeoutError, OSError) as error:
            why = str(error) or f"no answer within {flush_s:g} s"
            log.error("last flush failed %s", fields(disk=self._record.name, error=why))
        if is_share(self._place.location):  # the server would keep our handle for minutes
            try:
                async with asyncio.timeout(flush_s):
                    await self.disk.backend.close()
            except (TimeoutError, OSError) as error:
                log.info("handle not closed %s", fields(disk=self._record.name, error=error))

    # What the daemon asks.

    async def check(self, record: JobRecord) -> JobRecord:
        """Refuse what can't be moved there; return the record with both ends as they are."""
        target = await self._target_of(record)
        await recovery.check(self.disk, target, _request(record))
        return msgspec.structs.replace(
            record,
            source=self._place.location,
            source_root=self._record.root,
            target=target.location,
        )

    async def start(self, record: JobRecord) -> Job:
        """Begin a move; its first record is durable on return. Raises RefusedError, OSError."""
        await self._running.wait()
        if self.moving and self._job is not None and not self._job.status().ended_s:
            raise RefusedError("job-running", f"disk {self._record.name} is being moved already")
        await self._idle.wait()
        self._idle.clear()
        try:
            logs.concern(record.id, "queued")
            store = await self._store(record.id, self.disk.size)
            try:
                job = await recovery.start(
                    self.disk,
                    Places(self._place, await self._target_of(record), self._cache),
                    store,
                    _request(record),
                    self._surroundings(record),
                )
            except BaseException:
                await store.close()
                raise
        except BaseException:
            self._idle.set()
            raise
        self._job, self._job_record = job, record
        if self._group is None:  # this process ends: what has begun is the next one's
            raise RefusedError("disk-restarted", f"the process of disk {record.disk} ends")
        self._group.create_task(self._run_job(job, record))
        await self._shows(lambda shown: shown.phase != "queued")
        shown = self.job()
        assert shown is not None
        return shown

    async def steer(self, verb: str, job_id: str, limit: int | None) -> Job:
        """Pause, resume, cancel, cut over or limit; return the job once that shows."""
        job, record = self._job, self._job_record
        if job is None or record is None or record.id != job_id:
            raise RefusedError(
                "wrong-phase", f"job {job_id} is not running, so it can't be told to {verb}"
            )
        if verb == "limit":
            await job.limit(limit or 0)
        else:
            await {
                "pause": job.pause,
                "resume": job.resume,
                "cancel": job.cancel,
                "cutover": job.cutover,
            }[verb]()
        await self._shows(_EFFECT[verb])
        shown = self.job()
        assert shown is not None
        return shown

    async def _shows(self, effect: Callable[[Job], bool]) -> None:
        try:
            async with asyncio.timeout(VERB_SETTLES_S):
                while (job := self.job()) is not None and not effect(job):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.info("verb takes long %s", self._about())

    def status(self, clients: int) -> DiskStatus:
        """Return what the daemon shows."""
        identity = self.identity
        return DiskStatus(
            version=mirrord.__version__,
            name=self._record.name,
            location=self.location,
            size=self.disk.size,
            read_only=self.disk.read_only,
            cache=self._record.cache,
            clients=clients,
            job=self.job(),
            share=_share(self.disk.backend),
            opened=(identity.device, identity.inode) if identity else None,
            target_share=_share(self._target()),
        )

    def _target(self) -> Backend | None:
        """Return the target of the running job, before its commit."""
        tracker = self._job.tracker if self._job is not None else None
        if tracker is None or tracker.target is self.disk.backend:
            return None
        return tracker.target


def _share(backend: Backend | None) -> Share | None:
    facts = None if backend is None else backend.facts()
    return None if facts is None else msgspec.convert(facts, type=Share)


async def _refuse_image(location: str, backend: Backend) -> None:
    """Refuse a file that is an image of another format: a guest would write over its tables."""
    head = bytes(await backend.read(0, min(IMAGE_HEAD_BYTES, backend.size)))
    for magic, kind in IMAGE_MAGICS.items():
        if head.startswith(magic):
            raise RefusedError(
                "not-raw",
                f"{location} is a {kind} image, not raw: make it one by 'qemu-img convert -O raw', "
                "and attach that",
            )


def _tidy() -> None:
    """Let go of an ended job. Cycles hold its files, and the source's folder, which may lie on what
    is to be unmounted now."""
    gc.collect()
    give_freed_memory_back()


async def _harmless(work: Coroutine[Any, Any, None], about: Fields) -> None:
    """Run what may outlive its job; closing a target that failed may well fail."""
    try:
        await work
    except OSError as error:
        log.warning("clean-up failed %s %s", about, fields(error=error))


def _request(record: JobRecord) -> JobRequest:
    return JobRequest(
        job_id=record.id,
        disk=record.disk,
        source=record.source,
        target=record.target,
        keep_source=record.keep_source,
        verify=record.verify,
        limit=record.limit or 0,
        mode=record.mode,
        cutover=record.cutover,
        force=record.force,
        wipe=record.wipe,
        created_s=datetime.datetime.fromisoformat(record.created).timestamp(),
    )
