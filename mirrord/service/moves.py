"""All moves of one daemon: asked for, queued, started, followed, ended, remembered.

What runs is known by the disk processes and what ended by the journals; here is the list that
joins them, and the decision what starts next (`scheduler`). A job moves one way:

    queued ──started by its disk's process──▸ unfinished ──▸ ended
       └──cancelled, or refused at its start──▸ ended

Interleavings: a disk and its target are reserved (`_moves[id]`, with `starting` set so that
nobody else starts it) before the first await of a request; a job that is `starting` belongs to
the one coroutine that set it. A process that dies during a start leaves the answer to the journal
(`_reread`): with a record the move goes on by itself, without one it is queued still.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import time
import uuid
from collections.abc import Callable
from functools import partial

import msgspec

from mirrord.control.messages import DiskStatus, Job, LimitRequest, MoveRequest, PhaseName
from mirrord.errors import DamagedError, MirrordError, RefusedError
from mirrord.service import history, scheduler, stalls, state
from mirrord.service.config import Config
from mirrord.service.logs import Fields, fields
from mirrord.service.looks import Looks
from mirrord.service.notify import Notifier
from mirrord.service.state import Directories, JobRecord
from mirrord.service.supervisor import DiskProcess

log = logging.getLogger(__name__)

VERBS = {
    "pause": "be paused",
    "resume": "be resumed",
    "cancel": "be cancelled",
    "cutover": "be cut over",
    "limit": "be limited",
}


Covers = Callable[[str], bool]  # whether somebody may see a disk, by its name


class Move:
    """One job as the daemon knows it."""

    def __init__(self, record: JobRecord, job: Job, standing: history.Standing) -> None:
        self.record = record
        self.job = job
        self.standing = standing
        self.starting = False
        self.start_s = time.monotonic()  # when it was asked for, or begun later

    def about(self, **more: object) -> Fields:
        """Return what each log line about a job says, and `more`."""
        return fields(job=self.job.id, disk=self.job.disk, phase=self.job.phase, **more)


class Moves:
    """The jobs. `process_of` returns a disk's process, or raises RefusedError without one."""

    def __init__(
        self,
        config: Config,
        directories: Directories,
        group: asyncio.TaskGroup,
        process_of: Callable[[str], DiskProcess],
        looks: Looks,
    ) -> None:
        self._config = config
        self._directories = directories
        self._group = group
        self._process_of = process_of
        self._looks = looks
        self._moves: dict[str, Move] = {}
        self._damaged: dict[str, DamagedError] = {}
        self._news = asyncio.Event()
        self._look: asyncio.Task[None] | None = None
        self._notifier = Notifier(config, group)
        self._stopped = False

    def stop(self) -> None:
        """Start nothing more, and note nothing: the next daemon does."""
        self._stopped = True

    async def changed(self, disk: str | None, within_s: float) -> list[Job]:
        """Return what `jobs` does when one has changed its phase, or after `within_s`.

        All who wait share one look at the disk processes.
        """
        if self._stopped:
            await asyncio.sleep(within_s)
            return self._listed(disk)
        if self._look is None or self._look.done():
            self._look = self._group.create_task(self._next_look(within_s), name="look at moves")
        await asyncio.wait([self._look])
        return self._listed(disk)

    async def _next_look(self, within_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._news.wait()
        await self._refresh_running()

    def _tell(self) -> None:
        """Wake those who wait for a change now."""
        self._news.set()
        self._news = asyncio.Event()

    async def load(self) -> None:
        """Read every job. One that is damaged is told of when asked for, and stops nobody."""
        for job_id in self._directories.job_ids():
            try:
                entry = await asyncio.to_thread(history.read_job, self._directories, job_id)
            except DamagedError as error:
                self._damaged[job_id] = error
                log.error("job damaged %s", fields(job=job_id, reason=error))
                continue
            move = self._moves[job_id] = Move(entry.record, entry.job, entry.standing)
            if entry.standing == "ended" and not entry.recorded:  # while no daemon was there
                self._record_end(move)
            elif entry.standing == "ended" and history.is_untold(self._directories, job_id):
                self._notify(move)

    async def jobs(self, disk: str | None) -> list[Job]:
        """Return all jobs, or a disk's, newest first."""
        await self._refresh_running()
        return self._listed(disk)

    def _listed(self, disk: str | None) -> list[Job]:
        chosen = [m for m in self._moves.values() if disk in (None, m.record.disk)]
        chosen.sort(key=lambda move: move.record.created, reverse=True)
        return [self._shown(move) for move in chosen]

    async def job(self, job_id: str, covers: Covers | None = None) -> Job:
        """Return one job, by its id or a beginning of it.

        For who may see some disks alone, it is a beginning among the jobs of those. Raises
        RefusedError (`unknown-job`, `ambiguous-job`), DamagedError.
        """
        move = self._move(job_id, covers)
        await self._refresh(move)
        return self._shown(move)

    def _move(self, job_id: str, covers: Covers | None = None) -> Move:
        exact = self._moves.get(job_id)
        if exact is not None:
            return exact
        matching: list[Move | DamagedError] = [
            move
            for known, move in self._moves.items()
            if known.startswith(job_id) and (covers is None or covers(move.record.disk))
        ]
        if covers is None:  # whose a damaged one is, nobody knows
            matching += [why for known, why in self._damaged.items() if known.startswith(job_id)]
        if not matching:
            raise RefusedError("unknown-job", f"there is no job {job_id}; see 'mirrord jobs'")
        if len(matching) > 1:
            raise RefusedError(
                "ambiguous-job", f"{len(matching)} jobs begin with {job_id}; give more of the id"
            )
        if isinstance(matching[0], DamagedError):
            raise matching[0]
        return matching[0]

    def _shown(self, move: Move) -> Job:
        if move.standing != "queued":
            return move.job
        if move.starting:
            reason = stalls.reason_of_start(time.monotonic() - move.start_s)
        else:
            running = [each.record.disk for each in self._running()]
            reason = scheduler.waits_for(move.record.disk, running, self._config.max_moves)
        return msgspec.structs.replace(move.job, reason=reason)

    async def _refresh_running(self) -> None:
        await asyncio.gather(*(self._refresh(move) for move in self._running()))

    async def _refresh(self, move: Move) -> None:
        if move.standing != "unfinished":
            return
        try:
            process = self._process_of(move.record.disk)
        except RefusedError:
            return
        status = await process.refresh()
        if status is not None and status.job is not None:
            self.job_changed(status.job)

    def unfinished_moves(self) -> list[Move]:
        """Return the moves that are queued or run."""
        return [move for move in self._moves.values() if move.standing != "ended"]

    def unfinished(self, disk: str) -> Move | None:
        """Return the move of a disk that is queued or runs."""
        return next((m for m in self.unfinished_moves() if m.record.disk == disk), None)

    def _running(self) -> list[Move]:
        return [m for m in self.unfinished_moves() if m.standing == "unfinished" or m.starting]

    async def move(
        self, disk: str, ends: tuple[str, str], request: MoveRequest, root: str | None = None
    ) -> Job:
        """Ask for a move, of both `ends` as they are known yet, to below `root` if that is given.

        Raises RefusedError; then nothing has changed.
        """
        process = self._process_of(disk)
        if process.outdated:
            raise RefusedError(
                "disk-outdated",
                f"disk {disk} is served by a process of another version of mirrord; replace it "
                f"first: 'mirrord upgrade {disk}'",
            )
        self._refuse_second(disk)
        move = self._reserve(disk, ends, request, root)
        job_id = move.record.id
        try:
            move.record = await process.call(
                "check_move", JobRecord, record=msgspec.to_builtins(move.record)
            )
            move.job = move.record.as_job()
            await self._refuse_taken(move)
            await asyncio.to_thread(self._write_job, move.record)
            about = fields(job=job_id, disk=disk, phase="queued", target=move.record.target)
            log.info("move asked for %s", about)
            move.starting = False
            if job_id in self._startable():
                move.starting = True
                await self._start(move)
                move.starting = False
        except BaseException:  # still `starting`: nobody else begins it while it is forgotten
            self._moves.pop(job_id, None)
            await asyncio.shield(asyncio.to_thread(self._forget, job_id))
            self.kick()
            raise
        self.kick()
        return self._shown(move)

    def _reserve(
        self, disk: str, ends: tuple[str, str], request: MoveRequest, root: str | None
    ) -> Move:
        """Take the disk for a new job, which doesn't exist in the state directory yet."""
        source, target = ends
        record = JobRecord(
            id=str(uuid.uuid4()),
            disk=disk,
            source=source,
            target=target,
            created=now(),
            keep_source=request.keep_source,
            wipe=request.wipe,
            force=request.force,
            verify=request.verify or self._config.verify,
            limit=request.limit,
            mode=request.mode,
            cutover=request.cutover,
            target_root=root,
        )
        move = self._moves[record.id] = Move(record, record.as_job(), "queued")
        move.starting = True  # nobody else starts it
        return move

    def _refuse_second(self, disk: str) -> None:
        running = self.unfinished(disk)
        if running is not None:
            raise RefusedError(
                "job-running",
                f"disk {disk} is being moved already (job {running.record.id}, "
                f"{running.job.phase}); wait for it or cancel it",
            )

    async def _refuse_taken(self, asked: Move) -> None:
        target, root = asked.record.target, asked.record.target_root
        others = [move.record for move in self.unfinished_moves() if move is not asked]
        same = await self._looks.first_same(target, [other.target for other in others], root)
        if same is not None:
            which = f"disk {others[same].disk}" if root is None else "another disk"
            raise RefusedError(
                "target-in-use",
                f"{target} is the target of the unfinished move of {which}; choose another",
            )

    def _write_job(self, record: JobRecord) -> None:
        directory = self._directories.job(record.id)
        state.make_directory(directory)
        state.write_record(directory / "job.json", record)

    def _forget(self, job_id: str) -> None:
        if self._directories.job(job_id).exists():
            state.forget_job(self._directories, job_id)

    async def _start(self, move: Move) -> None:
        """Have the disk's process begin. Raises RefusedError when it can't."""
        try:
            process = self._process_of(move.record.disk)
            job = await process.call("move", Job, job_id=move.record.id)
            move.standing = "unfinished"
            self.job_changed(job)
        except RefusedError as error:
            if error.code != "disk-restarted":
                raise
            await self._reread(move)

    async def _reread(self, move: Move) -> None:
        """Let the journal say how a job stands whose process has died."""
        entry = await asyncio.to_thread(history.read_job, self._directories, move.record.id)
        if entry.standing == "unfinished":
            move.standing = "unfinished"  # its process will tell more than the journal does
        elif move.standing != "ended":
            move.standing, move.job = entry.standing, entry.job
            if move.standing == "ended":
                self._record_end(move)
                self.kick()

    def _startable(self) -> list[str]:
        queued = sorted(
            (m for m in self.unfinished_moves() if m.standing == "queued" and not m.starting),
            key=lambda move: move.record.created,
        )
        return scheduler.startable(
            [(move.record.id, move.record.disk) for move in queued],
            [move.record.disk for move in self._running()],
            self._config.max_moves,
        )

    def kick(self) -> None:
        """Start what may start now."""
        if self._stopped:
            return
        for job_id in self._startable():
            move = self._moves[job_id]
            try:
                process = self._process_of(move.record.disk)
            except RefusedError:
                continue  # a refused disk: its move stays queued and says so
            if process.serving and not process.outdated:  # else it waits for the upgrade
                move.starting, move.start_s = True, time.monotonic()
                self._group.create_task(self._start_queued(move), name=f"start {job_id}")

    async def _start_queued(self, move: Move) -> None:
        try:
            await self._start(move)
        except (MirrordError, OSError) as error:
            if getattr(error, "code", None) in ("disk-not-serving", "disk-stuck"):
                log.warning("move waits %s", move.about(reason=error))
                return
            self.conclude(move, "failed", str(error))
        finally:
            move.starting = False
            self.kick()

    def disk_ready(self, status: DiskStatus) -> None:
        """A process has come up: it knows what has become of its disk's job."""
        if self._stopped:
            return
        if status.job is not None:
            self.job_changed(status.job)
        known = None if status.job is None else status.job.id
        for move in self.unfinished_moves():
            forgotten = move.record.disk == status.name and move.record.id != known
            if forgotten and move.standing == "unfinished":
                self._group.create_task(self._look_up(move), name=f"look up {move.record.id}")
        self.kick()

    async def _look_up(self, move: Move) -> None:
        """A process doesn't know a job of its disk: it ended while this daemon was away."""
        try:
            await self._reread(move)
        except MirrordError as error:
            self._damaged[move.record.id] = DamagedError(str(error))
            log.error("job damaged %s", move.about(reason=error))

    def job_changed(self, job: Job) -> None:
        """Take over what a disk process says about its job."""
        move = self._moves.get(job.id)
        if move is None or move.standing == "ended" or self._stopped:
            return
        changed = job.phase != move.job.phase
        move.job = job
        if changed:
            log.info("job changed %s", move.about())
            self._tell()
        move.standing = "unfinished"
        if job.ended_already:
            move.standing = "ended"
            self._record_end(move)
            self.kick()

    def _record_end(self, move: Move) -> None:
        """Write the outcome down for the next daemon. Failing is harmless: the journal has it."""
        try:
            self._write_end(move.job)
            self._notify(move)  # what isn't written down, the next daemon tells
            ended = [each.job for each in self._moves.values() if each.standing == "ended"]
            keep, days = self._config.keep_jobs, self._config.keep_jobs_days
            for job_id in history.drop_old(self._directories, ended, keep, days):
                del self._moves[job_id]
        except (OSError, MirrordError) as error:
            log.warning("outcome not written %s", move.about(error=error))

    def _write_end(self, job: Job) -> None:
        if self._notifier.wants(job):
            history.note_untold(self._directories, job.id)
        history.write_ended(self._directories, job)

    def _notify(self, move: Move) -> None:
        if not self._stopped:  # else the next daemon tells
            self._notifier.ended(move.job, partial(self._note_told, move))

    def _note_told(self, move: Move) -> None:
        try:
            history.note_told(self._directories, move.job.id)
        except OSError as error:
            log.warning("a program may be told twice %s", move.about(error=error))

    def conclude(self, move: Move, phase: PhaseName, reason: str) -> None:
        """End a job that no disk process will end."""
        move.job = history.concluded(move.job, phase, reason, now())
        move.standing = "ended"
        log.info("job changed %s", move.about(reason=reason))
        self._record_end(move)
        self._tell()
        self.kick()

    async def steer(self, job_id: str, verb: str) -> Job:
        """Pause, resume, cancel or cut over. Raises RefusedError (`wrong-phase`)."""
        move = self._move(job_id)
        await self._refresh(move)
        self._refuse_ended(move, verb)
        if move.standing == "queued" and not move.starting:
            if verb != "cancel":
                raise RefusedError(
                    "wrong-phase",
                    f"the move of disk {move.record.disk} is queued and has not begun; only "
                    "cancel is possible before it starts",
                )
            await self._cancel_queued(move)
            return move.job
        return await self._ask(move, verb)

    async def _cancel_queued(self, move: Move) -> None:
        """Cancel what has no journal yet: only what is written down lasts. Raises RefusedError."""
        reason = "cancelled before it began"
        move.starting = True  # nobody begins it meanwhile
        try:
            ended = history.concluded(move.job, "cancelled", reason, now())
            await asyncio.to_thread(self._write_end, ended)
        except OSError as error:
            asyncio.get_running_loop().call_soon(self.kick)  # others may have waited for its place
            raise RefusedError(
                "state-unwritable",
                f"the end of job {move.job.id} can't be written to the state directory "
                f"({error.strerror}): it stays queued; free some space there, then cancel again",
            ) from error
        finally:
            move.starting = False
        self.conclude(move, "cancelled", reason)

    async def limit(self, job_id: str, request: LimitRequest) -> Job:
        """Change the bandwidth limit of an unfinished job."""
        move = self._move(job_id)
        await self._refresh(move)
        self._refuse_ended(move, "limit")
        if move.standing == "queued" and not move.starting:
            move.record = msgspec.structs.replace(move.record, limit=request.limit)
            move.job = move.record.as_job()
            await asyncio.to_thread(
                state.write_record, self._directories.job(move.record.id) / "job.json", move.record
            )
            return self._shown(move)
        return await self._ask(move, "limit", limit=request.limit)

    def _refuse_ended(self, move: Move, verb: str) -> None:
        if move.standing == "ended":
            raise RefusedError(
                "wrong-phase",
                f"job {move.record.id} of disk {move.record.disk} is {move.job.phase}: "
                f"it can no longer {VERBS[verb]}",
            )

    async def _ask(self, move: Move, verb: str, **params: int | None) -> Job:
        process = self._process_of(move.record.disk)
        job = await process.call(verb, Job, job_id=move.record.id, **params)
        self.job_changed(job)
        return self._shown(move)


def now() -> str:
    """Return the time as users see it: RFC 3339, UTC, microseconds (jobs are ordered by it)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
