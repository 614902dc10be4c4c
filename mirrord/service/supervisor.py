"""One disk's process as the daemon sees it: started, found again, talked to, started again.

The disk's lock file decides who serves it. The daemon takes the lock and hands it to the process
that it starts, so there is no instant at which two could serve; when it is taken, a process from
before the daemon's own restart is alive, and is found again by its private channel. Its end is
known by a pidfd, never by a guess. The guests' listening socket is held here as well: while a
process starts again, connects wait in its backlog instead of failing.

    starting ──ready──▸ serving ──died──▸ starting …         (at once; slower when it keeps dying)
        └──refused──▸ refused       serving ──detach──▸ detached

Crash points: an attach becomes true when the process renames attach.json to disk.json, just
before it says that it is ready; a detach when the process removes disk.json. So what happened is
read from the directory, not remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

import mirrord
from mirrord.control.messages import DiskState, DiskStatus, Job, Problem, Report
from mirrord.control.sockets import Access, dial, listen, peer, remove_socket
from mirrord.core.units import format_duration
from mirrord.errors import MirrordError, RefusedError
from mirrord.service.channel import Channel, ChannelClosedError, fetch_listener, readable
from mirrord.service.logs import fields
from mirrord.service.state import Directories, take_lock

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# A process that served so long did not die of its start: it is started again without delay.
STEADY_S = 10.0
# Delays between starts of one that keeps dying; the first is at once. The last stays.
RESTART_DELAYS_S = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
# How often a process that lives but doesn't answer yet is tried again.
CONNECT_RETRY_S = 0.05
# Status is in the process's memory; one that doesn't answer for so long is stuck.
STATUS_DEADLINE_S = 2.0
# A call waits so long for a process that is being started again: recovery reads two maps.
READY_DEADLINE_S = 10.0
# Moves begin by creating and preallocating a target, detach by a last flush: both touch storage.
CALL_DEADLINE_S = 60.0
# An old process flushes what its guests wrote, a new one reads two maps.
RENEW_DEADLINE_S = 90.0
# As long as our snippets let QEMU try to connect again.
CLIENTS_COME_BACK_S = 300.0
# Handing over a descriptor touches no storage.
LISTENER_DEADLINE_S = 5.0


class _Renewal:
    """A process that is being replaced."""

    def __init__(self, former: int) -> None:
        self.former = former
        self.ended = False  # as it was told: that is no death
        self.over = asyncio.Event()  # another serves, or none will


class DiskProcess:
    """Keeps one disk served. `keep` is its owner task; everything else may be called any time."""

    def __init__(
        self,
        name: str,
        directories: Directories,
        options: list[str],
        *,
        nbd_access: Access,
        on_job: Callable[[Job], None],
        on_ready: Callable[[DiskStatus], None],
    ) -> None:
        self.name = name
        self.state: DiskState = "starting"
        self.reason: str | None = None
        self.problem: Problem | None = None
        self.status: DiskStatus | None = None
        self._silent_since_s = 0.0  # when it was asked first what it has not answered
        self.pid: int | None = None
        self.settled = asyncio.Event()  # serving, refused or detached for the first time
        self._directories = directories
        self._options = options
        self._access = nbd_access
        self._on_job = on_job
        self._on_ready = on_ready
        self._listener: socket.socket | None = None
        self._channel: Channel | None = None
        self._answering = asyncio.Event()
        self._ending = False
        self._renewal: _Renewal | None = None
        self._served = False  # the process of now, to whoever came
        self._left_at_s: float | None = None  # when a process ended that may have had clients

    # For the registry.

    @property
    def serving(self) -> bool:
        return self.state == "serving"

    @property
    def outdated(self) -> bool:
        """Whether the process is of another version than the program on disk.

        It must not begin what it would have to load code for: that would be the other version's.
        """
        return self.status is not None and self.status.version != mirrord.__version__

    @property
    def _attached(self) -> bool:
        """Whether there is such a disk; else it is being attached, or was detached."""
        return (self._directories.disk(self.name) / "disk.json").exists()

    async def call(self, verb: str, answer: type[Answer], **params: Any) -> Answer:
        """Ask the process, waiting a while for one that is being started.

        Raises RefusedError: as the process said it, or `disk-not-serving`, or `disk-restarted`
        (it died meanwhile: whether the request took effect is to be looked up).
        """
        channel = await self._wait_for_channel()
        try:
            return await channel.call(verb, answer, deadline_s=CALL_DEADLINE_S, **params)
        except ChannelClosedError as error:
            raise RefusedError(
                "disk-restarted",
                f"the process of disk {self.name} ended during the request and is being started "
                f"again; look with 'mirrord show {self.name}', then try again",
            ) from error
        except TimeoutError as error:
            raise RefusedError(
                "disk-stuck",
                f"the process of disk {self.name} has not answered for {CALL_DEADLINE_S:.0f} s; "
                "its storage may hang",
            ) from error

    async def _wait_for_channel(self) -> Channel:
        if self.state == "starting":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READY_DEADLINE_S):
                    await self._answering.wait()
        if self._channel is None:
            raise RefusedError(
                "disk-not-serving",
                f"disk {self.name} is {self.state}" + (f": {self.reason}" if self.reason else ""),
            )
        return self._channel

    async def refresh(self) -> DiskStatus | None:
        """Return what the process says about itself now; None: it says nothing.

        What it said last is `status`.
        """
        channel = self._channel
        if channel is None:
            return None
        clock = asyncio.get_running_loop().time
        asked_s = clock()
        try:
            self.status = await channel.call("status", DiskStatus, deadline_s=STATUS_DEADLINE_S)
        except TimeoutError:
            self._silent_since_s = self._silent_since_s or asked_s
            silent_s = clock() - self._silent_since_s
            self.reason = f"its process has not answered for {silent_s:.0f} s: its storage may hang"
            return None
        except ChannelClosedError:
            return None  # it died this instant: `keep` says so
        self._silent_since_s = 0.0
        self.reason = None
        return self.status

    @property
    def stalled_s(self) -> float:
        """For how long guests have had no answer, as far as is known."""
        if self._silent_since_s:
            return asyncio.get_running_loop().time() - self._silent_since_s
        return 0.0 if self.status is None else self.status.stalled_s

    @property
    def awaits_clients(self) -> bool:
        """Whether guests of a process before this one may not have come back yet.

        QEMU connects anew at a guest's next request: an idle one's disk shows no clients. Once a
        guest has asked for anything here, they are taken to be back.
        """
        counts = () if self.status is None else self.status.requests.values()
        if self._left_at_s is None or any(any(each.buckets) for each in counts):
            return False
        return asyncio.get_running_loop().time() - self._left_at_s < CLIENTS_COME_BACK_S

    def end_now(self) -> None:
        """Kill the process and start no other: `keep` returns."""
        self._ending = True
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def renew(self) -> None:
        """Replace the process by a new one, and return when that serves. Moves go on.

        Raises RefusedError: `disk-not-serving`, as the new one refuses, or `disk-stuck`.
        """
        if self.pid is None or not self.serving or self._renewal is not None:
            raise RefusedError(
                "disk-not-serving", f"the process of disk {self.name} is being started already"
            )
        renewal = self._renewal = _Renewal(self.pid)
        try:
            with contextlib.suppress(ProcessLookupError):  # then another is being started
                os.kill(renewal.former, signal.SIGHUP)
            async with asyncio.timeout(RENEW_DEADLINE_S):
                await renewal.over.wait()
        except TimeoutError as error:
            raise RefusedError(
                "disk-stuck",
                f"the process of disk {self.name} has not been replaced within "
                f"{RENEW_DEADLINE_S:.0f} s; its storage may hang",
            ) from error
        finally:
            self._renewal = None
        if self.problem is not None:
            raise RefusedError(self.problem.code, self.problem.message)

    def refuse_awaited(self) -> None:
        """Refuse to take the disk from guests that only seem to have gone."""
        if self.awaits_clients:
            raise RefusedError(
                "clients-awaited",
                f"the process of disk {self.name} was replaced within the last "
                f"{format_duration(CLIENTS_COME_BACK_S)}, and a guest that has the disk may not "
                "have noticed yet: end the guest and wait, or use --force",
            )

    def refuse_owed(self) -> None:
        """Refuse to end a process that alone has what its server may have to be told again."""
        share = None if self.status is None else self.status.share
        if share is not None and share.state != "connected" and share.unflushed_bytes:
            raise RefusedError(
                "not-flushed",
                f"what was written to disk {self.name} can't be made durable "
                f"({share.reason or share.state}): wait until that is well, or give that up with "
                "'mirrord detach --force'",
            )

    async def flush(self) -> None:
        """Have the process make durable what it alone has. Raises RefusedError (`not-flushed`)."""
        self.refuse_owed()
        if self.status is None or self.status.share is None:
            return
        try:
            await self.call("flush", type(None))
        except RefusedError as error:
            if error.code != "unknown-verb":  # of an older version
                raise

    # The owner task.

    async def keep(self) -> None:
        """Keep the disk served until it is detached or refuses. Cancelling leaves it serving."""
        deaths = 0
        loop = asyncio.get_running_loop()
        try:
            while True:
                began = loop.time()
                try:
                    refusal = await self._one_life()
                except (OSError, MirrordError) as error:  # no descriptors, no state directory …
                    log.error("disk process not started %s", fields(disk=self.name, error=error))
                    refusal, self.reason = None, f"its process can't be started: {error}"
                if refusal is not None:
                    return self._refuse(refusal)
                if self._ending or not self._attached:
                    return self._end("detached", None)
                renewed = self._renewal is not None and not self._renewal.ended
                had_clients = self.status is not None and self.status.clients > 0
                if self._served and (had_clients or not renewed):
                    self._left_at_s = loop.time()
                self._served = False
                if self._renewal is not None and renewed:
                    self._renewal.ended = True
                    continue
                deaths = 0 if loop.time() - began > STEADY_S else deaths + 1
                delay_s = RESTART_DELAYS_S[min(max(deaths - 1, 0), len(RESTART_DELAYS_S) - 1)]
                log.warning("restarting disk process %s", fields(disk=self.name, delay_s=delay_s))
                await asyncio.sleep(delay_s)
        finally:
            if self._listener is not None:
                self._listener.close()

    async def _one_life(self) -> Problem | None:
        """Start a process or find the living one, and return after its end: why it refused."""
        lock = take_lock(self._directories.disk_lock(self.name))
        if lock is None:
            pidfd = await self._find_again()
            if pidfd is None:
                return None
            await self._follow(pidfd)
            return None
        try:
            process, report = self._start(lock)
        finally:
            os.close(lock)
        pidfd = os.pidfd_open(process.pid)
        self.pid = process.pid
        try:
            told = await _read_report(report)
            refusal = told.refused
            if told.unreachable is not None:
                refusal = self._not_now(told.unreachable)
        except BaseException:
            os.close(pidfd)
            raise
        if refusal is not None:
            await readable(pidfd)
            os.close(pidfd)
        else:
            await self._follow(pidfd)
        self.pid = None
        log.info("disk process ended %s", fields(disk=self.name, status=process.wait()))
        return refusal

    def _not_now(self, problem: Problem) -> Problem | None:
        """Its storage is away. A disk waits for it; what was just asked for is refused."""
        self.reason = problem.message
        return None if self._attached else problem

    def _start(self, lock: int) -> tuple[subprocess.Popen[bytes], int]:
        """Start a process that holds the lock and listens; return it and its report's pipe."""
        if self._listener is None:
            self._listener = listen(self._directories.nbd_socket(self.name), self._access)
        report, report_writer = os.pipe()
        listener = self._listener.fileno()
        command = [
            *(sys.executable, "-P", "-m", "mirrord.service.disk_process"),
            *("--state", os.fspath(self._directories.state)),
            *("--runtime", os.fspath(self._directories.runtime)),
            *("--name", self.name),
            *("--listen-fd", str(listener), "--report-fd", str(report_writer)),
            *self._options,
        ]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(lock, listener, report_writer),
                start_new_session=True,  # the terminal's Ctrl-C is the daemon's alone
                cwd="/",
            )
        except BaseException:
            os.close(report)
            raise
        finally:
            os.close(report_writer)
        log.info("started disk process %s", fields(disk=self.name, pid=process.pid))
        return process, report

    async def _find_again(self) -> int | None:
        """Find the process that holds the lock; return its pidfd, or None if it has ended."""
        path = self._directories.channel(self.name)
        while True:
            try:
                with dial(path) as connection:
                    pid = peer(connection).pid
                pidfd = os.pidfd_open(pid)
            except OSError:
                lock = take_lock(self._directories.disk_lock(self.name))
                if lock is not None:
                    os.close(lock)
                    return None
                await asyncio.sleep(CONNECT_RETRY_S)
                continue
            try:
                listener = await fetch_listener(path, LISTENER_DEADLINE_S)
            except (OSError, ChannelClosedError, TimeoutError):
                os.close(pidfd)
                await asyncio.sleep(CONNECT_RETRY_S)
                continue
            except BaseException:
                os.close(pidfd)
                raise
            if self._listener is not None:
                self._listener.close()
            self._listener, self.pid = listener, pid
            log.info("found disk process %s", fields(disk=self.name, pid=pid))
            return pidfd

    async def _follow(self, pidfd: int) -> None:
        """Talk to the process until it ends."""
        try:
            async with asyncio.TaskGroup() as group:
                talk = group.create_task(self._talk())
                await readable(pidfd)
                talk.cancel()
        finally:
            os.close(pidfd)

    async def _talk(self) -> None:
        """Keep a channel to the process; another one when the first breaks."""
        path = self._directories.channel(self.name)
        while True:
            try:
                channel = await Channel.connect(path, self._on_job)
            except OSError:
                await asyncio.sleep(CONNECT_RETRY_S)
                continue
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(channel.run())
                    group.create_task(self._greet(channel))
            finally:
                self._channel = None
                self._answering.clear()
                self.state = "starting"
                self.reason = "its process ended and is being started again"
            await asyncio.sleep(CONNECT_RETRY_S)

    async def _greet(self, channel: Channel) -> None:
        try:
            self.status = await channel.call("status", DiskStatus, deadline_s=READY_DEADLINE_S)
        except ChannelClosedError:
            channel.abandon()
            return  # it died this instant: `keep` says so
        except (TimeoutError, MirrordError) as error:
            log.warning("disk process does not answer %s", fields(disk=self.name, error=error))
            channel.abandon()
            return
        self._channel = channel
        self._served = True
        self.state = "serving"
        self.reason = None
        self._answering.set()
        self.settled.set()
        if self._renewal is not None and self.pid != self._renewal.former:
            self._renewal.over.set()
        self._on_ready(self.status)

    def _refuse(self, problem: Problem) -> None:
        self.problem = problem
        level = logging.ERROR if self._attached else logging.INFO  # whoever attaches is told
        log.log(level, "disk refused %s", fields(disk=self.name, reason=problem.message))
        self._end("refused", problem.message)

    def _end(self, state: DiskState, reason: str | None) -> None:
        """Nobody serves the disk any more: guests are told so by a connect that fails."""
        self.state, self.reason = state, reason
        remove_socket(self._directories.nbd_socket(self.name))
        remove_socket(self._directories.channel(self.name))
        self._answering.set()
        self.settled.set()
        if self._renewal is not None:
            self._renewal.over.set()


async def _read_report(pipe: int) -> Report:
    """Return what a starting process reports; an empty report when it died before."""
    data = b""
    try:
        os.set_blocking(pipe, False)
        while True:
            await readable(pipe)
            part = os.read(pipe, 65536)
            if not part:
                break
            data += part
    finally:
        os.close(pipe)
    if not data:
        return Report()
    return msgspec.json.decode(data, type=Report)
