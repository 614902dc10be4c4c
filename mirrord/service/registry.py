"""All disks and all moves of one daemon: what the control interface asks for happens here.

Truth lies elsewhere, in the directories of `state` and in the disk processes; what is kept here
is derived and is built again by `load` after the daemon's restart. Requests of several clients
interleave at every await; these stretches have none, and so decide:

* a name is reserved (`_disks[name]`) before the first await of an attach;
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable

import msgspec

import mirrord
from mirrord.control.messages import (
    AttachRequest,
    CredentialTest,
    CredentialTestRequest,
    Disk,
    DiskStatus,
    Job,
    LimitRequest,
    MoveRequest,
    Service,
    Uris,
)
from mirrord.control.snippets import nbd_uri, snippets
from mirrord.control.sockets import check_socket_path, is_answered
from mirrord.core.units import check_name
from mirrord.errors import DamagedError, MirrordError, RefusedError
from mirrord.service import metrics, share_test, stalls, state
from mirrord.service.config import Config
from mirrord.service.grants import root_of
from mirrord.service.logs import fields
from mirrord.service.looks import Looks
from mirrord.service.moves import Covers, Moves
from mirrord.service.places import Found, check_location
from mirrord.service.state import Directories, DiskRecord
from mirrord.service.supervisor import DiskProcess
from mirrord.service.systemd import granted

log = logging.getLogger(__name__)

# Opening a disk is quick or its storage hangs; then the client learns it, and nothing is left.
ATTACH_DEADLINE_S = 60.0
# Detach flushes what the guest wrote.
DETACH_DEADLINE_S = 60.0
DETACH_FORCED_S = 15.0  # a process that hangs is ended then
# How long a starting daemon waits for its disks before it says that it is ready.
LOAD_DEADLINE_S = 10.0
LOST_LOOK_S = 3.0  # for what lies under a name: the process itself looks for two
# What a process that keeps dying or hangs makes a call end with.
NOT_ANSWERING = ("disk-not-serving", "disk-stuck", "disk-restarted")


class _Attached:
    """One disk as the daemon knows it."""

    def __init__(self, record: DiskRecord | None, process: DiskProcess | None, why: str) -> None:
        self.record = record
        self.process = process
        self.why = why  # why there is no process
        self.task: asyncio.Task[None] | None = None


class Registry:
    """What `gate.View` gives parts of to each peer. All tasks belong to `group`."""

    def __init__(self, config: Config, directories: Directories, group: asyncio.TaskGroup) -> None:
        self._config = config
        self._directories = directories
        self._group = group
        self._disks: dict[str, _Attached] = {}
        self._looks = Looks()
        self._moves = Moves(config, directories, group, self._process_of, self._looks)

    def stop(self) -> None:
        """Begin nothing more: this daemon ends, and the disks stay served."""
        self._moves.stop()

    # Starting.

    async def load(self) -> None:
        """Read the state directory, find or start every disk's process, go on with every move."""
        await asyncio.to_thread(state.sweep, self._directories)
        await self._moves.load()
        for name in self._directories.disk_names():
            self._load_disk(name)
        tasks = [
            self._group.create_task(each.process.settled.wait())
            for each in self._disks.values()
            if each.process is not None
        ]
        if tasks:
            await asyncio.wait(tasks, timeout=LOAD_DEADLINE_S)
            for task in tasks:
                task.cancel()
        self._moves.kick()

    def _load_disk(self, name: str) -> None:
        path = self._directories.disk(name) / "disk.json"
        try:
            record = state.read_record(path, DiskRecord)
            if record.name != name:
                raise DamagedError(f"{path} is damaged: it names disk {record.name}")
        except FileNotFoundError:
            self._load_attach(name)
            return
        except DamagedError as error:
            log.error("disk damaged %s", fields(disk=name, reason=error))
            self._disks[name] = _Attached(None, None, str(error))
            return
        self._keep(name, record)

    def _load_attach(self, name: str) -> None:
        """Go on with an attach that another daemon began: its process is just opening the disk."""
        try:
            path = self._directories.disk(name) / "attach.json"
            record = state.read_record(path, DiskRecord)
        except (FileNotFoundError, DamagedError):
            return  # the sweep would have removed it, but for its lock; the next one does
        attached = self._keep(name, record)
        self._group.create_task(self._finish_attach(attached, name), name=f"attach {name}")

    async def _finish_attach(self, attached: _Attached, name: str) -> None:
        try:
            await self._attach_settled(attached)
        except MirrordError as error:
            log.info("attach refused %s", fields(disk=name, reason=error))
            try:
                await self._undo_attach(attached, name)
            except OSError as failure:
                log.error("attach not undone %s", fields(disk=name, error=failure))

    def _keep(self, name: str, record: DiskRecord) -> _Attached:
        process = DiskProcess(
            name,
            self._directories,
            self._config.disk_options(),
            nbd_access=self._config.nbd_access(),
            on_job=self._moves.job_changed,
            on_ready=self._moves.disk_ready,
        )
        attached = self._disks[name] = _Attached(record, process, "")
        attached.task = self._group.create_task(process.keep(), name=f"disk {name}")
        return attached

    def service(self) -> Service:
        """Return what this daemon is, and where it keeps things."""
        directories = self._directories
        return Service(
            version=mirrord.__version__,
            state_dir=str(directories.state),
            runtime_dir=str(directories.runtime),
            nbd_dir=str(directories.nbd_socket("any").parent),
        )

    # Disks.

    async def disks(self) -> list[Disk]:
        """Return every disk, by name."""
        names = sorted(self._disks)
        found = await asyncio.gather(*(self._describe(name) for name in names))
        return list(found)

    async def disk(self, name: str) -> Disk:
        """Return one disk. Raises RefusedError (`unknown-disk`)."""
        self._attached(name)
        shown = await self._describe(name)
        lost = await self._lost_file(name)
        if lost is None:
            return shown
        reason = f"{lost} was removed or replaced: 'mirrord move {name} TARGET' saves what it had"
        return msgspec.structs.replace(shown, reason=shown.reason or reason)

    def _attached(self, name: str) -> _Attached:
        found = self._disks.get(name)
        if found is None:
            raise RefusedError("unknown-disk", f"there is no disk {name} here; see 'mirrord ls'")
        return found

    async def _describe(self, name: str) -> Disk:
        attached = self._disks[name]
        process = attached.process
        if process is not None:
            await process.refresh()
        status = None if process is None else process.status
        serving = process is not None and process.state == "serving"
        why = attached.why if process is None else process.reason
        if status is not None and serving:
            why = why or stalls.reason(status.stalled_s)
        record = attached.record
        socket = self._directories.nbd_socket(name)
        uri = nbd_uri(name, socket)
        running = self._moves.unfinished(name)
        return Disk(
            name=name,
            state="refused" if process is None else process.state,
            reason=why,
            location=status.location if status else record.location if record else None,
            size=status.size if status else None,
            read_only=record.read_only if record else False,
            cache=record.cache if record else "writeback",
            uris=Uris(nbd=uri),
            clients=status.clients if status and serving else 0,
            job=running.record.id if running else None,
            share=status.share if status and serving else None,
            target_share=status.target_share if status and serving else None,
            version=status.version if status and serving else None,
            snippets=snippets(name, socket, read_only=record.read_only if record else False),
        )

    async def attach(self, request: AttachRequest, root: str | None = None) -> Disk:
        """Serve a location as a disk, one below `root` if that is given, whoever changes names.

        Raises UsageError, RefusedError; then nothing has changed.
        """
        name = check_name(request.name)
        location = self._not_own(check_location(request.location))
        if name in self._disks:
            raise RefusedError(
                "name-in-use", f"there is a disk {name} already; choose another name or detach it"
            )
        for path in (self._directories.nbd_socket(name), self._directories.channel(name)):
            check_socket_path(path)
        record = DiskRecord(name, location, request.cache, request.read_only, root=root)
        attached = self._disks[name] = _Attached(record, None, "it is being attached")
        try:
            await self._refuse_served(record)
            await asyncio.to_thread(self._prepare_attach, record)
            attached = self._keep(name, record)
            with granted():
                await self._attach_settled(attached)
        except BaseException:
            await asyncio.shield(self._undo_attach(attached, name))
            raise
        log.info("attached %s", fields(disk=name, location=location))
        return await self._describe(name)

    def _not_own(self, location: str) -> str:
        """Return a checked location, which must not be among the files that we live by."""
        for code, folder in (
            ("state-directory", self._directories.state),
            ("runtime-directory", self._directories.runtime),
        ):
            own = os.path.realpath(folder)
            if root_of(location, [own]) is not None:
                what = code.replace("-", " ")
                raise RefusedError(code, f"{location} lies in the {what} {own}: name another")
        return location

    async def _refuse_served(self, wanted: DiskRecord) -> None:
        """Refuse a location that is a disk of ours, or will be one: the same file twice.

        Whoever is bound to a root may not be one to know the other disk's name.
        """
        known = []
        for name, location in self._locations():
            if name != wanted.name:
                known.append((location, "is already served as", name))
        for move in self._moves.unfinished_moves():
            record = move.record
            known.append((record.target, "is the target of the unfinished move of", record.disk))
        same = await self._looks.first_same(
            wanted.location, [location for location, _, _ in known], wanted.root
        )
        if same is not None:
            _, what, name = known[same]
            which = f"disk {name}" if wanted.root is None else "another disk"
            raise RefusedError("already-served", f"{wanted.location} {what} {which}")

    def _locations(self) -> list[tuple[str, str]]:
        found = []
        for name, attached in list(self._disks.items()):
            status = attached.process.status if attached.process is not None else None
            if status is not None:
                found.append((name, status.location))
            elif attached.record is not None:
                found.append((name, attached.record.location))
        return found

    def _prepare_attach(self, record: DiskRecord) -> None:
        directory = self._directories.disk(record.name)
        state.make_directory(directory)
        state.write_record(directory / "attach.json", record)

    async def _undo_attach(self, attached: _Attached, name: str) -> None:
        """Leave no trace of an attach that failed; its process has ended before its files go."""
        if attached.process is not None and attached.task is not None:
            attached.process.end_now()
            await asyncio.wait([attached.task], timeout=DETACH_DEADLINE_S)
        await self._forget(name)

    async def _forget(self, name: str) -> None:
        """Remove what is left of a disk that nobody serves."""
        try:
            if self._directories.disk(name).exists():
                await asyncio.to_thread(state.forget_disk, self._directories, name)
        finally:
            self._disks.pop(name, None)

    async def _attach_settled(self, attached: _Attached) -> None:
        process = attached.process
        assert process is not None
        try:
            async with asyncio.timeout(ATTACH_DEADLINE_S):
                await process.settled.wait()
        except TimeoutError as error:
            raise RefusedError(
                "location-hangs",
                f"{attached.record and attached.record.location} can't be opened within "
                f"{ATTACH_DEADLINE_S:.0f} s; its storage hangs",
            ) from error
        if process.problem is not None:
            raise RefusedError(process.problem.code, process.problem.message)
        if process.state == "detached":
            raise MirrordError(
                f"the process of disk {process.name} died while it opened its location; "
                "the daemon's log says why"
            )

    async def detach(self, name: str, *, force: bool) -> Disk:
        """Stop serving a disk. Raises RefusedError (`clients-connected`, `job-running` …)."""
        attached = self._attached(name)
        move = self._moves.unfinished(name)
        process = attached.process
        alive = process is not None and process.state != "refused"
        if move is not None and (alive or not force):
            raise RefusedError(
                "job-running",
                f"disk {name} has an unfinished move, {move.record.id}; "
                + ("wait for it or cancel it first" if alive else "with --force it is given up"),
            )
        shown = await self._describe(name)
        channel = self._directories.channel(name)
        if process is None and await asyncio.to_thread(is_answered, channel):
            raise RefusedError(
                "still-served",
                f"disk {name} is refused, but a process still serves it to its guests: see "
                f"'mirrord show {name}' for what to mend, then restart the daemon",
            )
        if process is not None and alive:
            if not force:
                await self._refuse_lost(name, "its bytes would be gone: {}, or use --force")
                await process.call("status", DiskStatus)  # of a process that is there
                process.refuse_awaited()
            try:
                async with asyncio.timeout(DETACH_FORCED_S if force else None):
                    await process.call("detach", type(None), force=force)
            except RefusedError as error:
                if not force or error.code not in NOT_ANSWERING:
                    raise
                process.end_now()
            except TimeoutError:
                process.end_now()
            await self._ended(attached, name, DETACH_FORCED_S if force else DETACH_DEADLINE_S)
        if move is not None:
            self._moves.conclude(move, "failed", "its disk was detached by force")
        await self._forget(name)
        log.info("detached %s", fields(disk=name))
        return msgspec.structs.replace(shown, state="detached", reason=None, clients=0)

    async def upgrade(self, name: str, *, force: bool) -> Disk:
        """Have a disk served by a process of this version. Raises RefusedError."""
        process = self._process_of(name)
        if process.state == "refused":
            raise RefusedError("disk-not-serving", f"disk {name} is refused: {process.reason}")
        await process.refresh()
        if force or process.status is None or process.outdated:
            await self._refuse_lost(name, "no other process could open its bytes: {}")
            await process.flush()
            await process.renew()
            log.info("upgraded %s", fields(disk=name, version=mirrord.__version__))
        return await self._describe(name)

    async def _refuse_lost(self, name: str, so: str) -> None:
        """Refuse to end the one process that still has a file which was removed or replaced."""
        lost = await self._lost_file(name)
        if lost is not None:
            raise RefusedError(
                "disk-replaced",
                f"{lost}, from which disk {name} is served, was removed or replaced; "
                + so.format(f"save them by 'mirrord move {name} TARGET'"),
            )

    async def _lost_file(self, name: str) -> str | None:
        """Return where a disk's process has something open that lies there no more."""
        process = self._disks[name].process
        status = None if process is None or not process.serving else process.status
        if process is None or status is None:
            return None
        if status.share is not None:
            # It may be of an older version, or stuck: then it isn't known.
            with contextlib.suppress(RefusedError, TimeoutError):
                async with asyncio.timeout(LOST_LOOK_S):
                    there = await process.call("has_its_name", bool)
                return None if there else status.location
        if status.opened is None:
            return None
        there = await self._looks.is_at(status.location, Found(*status.opened))
        return None if there else status.location

    async def _ended(self, attached: _Attached, name: str, limit_s: float) -> None:
        assert attached.task is not None
        done, _ = await asyncio.wait([attached.task], timeout=limit_s)
        if not done:
            self._group.create_task(self._forget_later(attached, name), name=f"forget {name}")
            raise RefusedError(
                "disk-stuck",
                f"disk {name} is closed, but its process can't end: its storage hangs; the disk is "
                "forgotten as soon as it does",
            )

    async def _forget_later(self, attached: _Attached, name: str) -> None:
        assert attached.task is not None
        await asyncio.wait([attached.task])
        if self._disks.get(name) is attached:
            await self._forget(name)
            log.info("detached %s", fields(disk=name))

    def _process_of(self, name: str) -> DiskProcess:
        attached = self._attached(name)
        if attached.process is None:
            raise RefusedError("disk-not-serving", f"disk {name} is refused: {attached.why}")
        return attached.process

    # Moves.

    async def move(self, name: str, request: MoveRequest, root: str | None = None) -> Job:
        """Ask for a move, to below `root` if that is given. Raises UsageError, RefusedError."""
        attached = self._attached(name)
        target = self._not_own(check_location(request.target))
        location = attached.record.location if attached.record else ""
        with granted():
            return await self._moves.move(name, (location, target), request, root)

    async def test_credential(self, request: CredentialTestRequest) -> CredentialTest:
        """Try a share's settings in a process of its own. Raises UsageError, RefusedError."""
        with granted():
            return await share_test.ask(request.location, self._config.smb)

    async def jobs_changed(self, disk: str | None, within_s: float) -> list[Job]:
        """Return what `jobs` does when one has changed its phase, or after `within_s`."""
        found = await self._moves.changed(disk, within_s)
        if disk is not None and not found:
            self._attached(disk)
        return found

    async def metrics(self, shown: Callable[[str], bool]) -> bytes:
        """Return what is counted, in the text format of Prometheus, of the disks to be shown."""
        disks = [disk for disk in await self.disks() if shown(disk.name)]
        jobs = [job for job in await self._moves.jobs(None) if shown(job.disk)]
        processes = {"": metrics.Process(os.getpid())}
        for name, attached in self._disks.items():
            process = attached.process
            if shown(name) and process is not None and process.pid is not None:
                status = process.status
                processes[name] = metrics.Process(
                    process.pid,
                    {} if status is None else status.requests,
                    process.stalled_s,
                )
        return await asyncio.to_thread(metrics.render, disks, jobs, processes)

    async def jobs(self, disk: str | None) -> list[Job]:
        """Return all jobs, or a disk's, newest first."""
        found = await self._moves.jobs(disk)
        if disk is not None and not found:
            self._attached(disk)
        return found

    async def job(self, job_id: str, covers: Covers | None = None) -> Job:
        """Return one job, as `Moves.job` does."""
        return await self._moves.job(job_id, covers)

    async def steer(self, job_id: str, verb: str) -> Job:
        """Pause, resume, cancel or cut over. Raises RefusedError (`wrong-phase`)."""
        return await self._moves.steer(job_id, verb)

    async def limit(self, job_id: str, request: LimitRequest) -> Job:
        """Change the bandwidth limit of an unfinished job."""
        return await self._moves.limit(job_id, request)
