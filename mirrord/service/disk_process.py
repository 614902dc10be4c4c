"""The disk process: one disk, served to guests and moved. The composition root of the data path.

    python -m mirrord.service.disk_process --state D --runtime D --name NAME --listen-fd N …

The daemon starts it with the disk's lock and the guests' listening socket in its hands
(`supervisor`), and may die: nothing here depends on it. It reads its record, goes on with an
unfinished move before anything is served, then serves NBD and the private channel.

    exit 0  detached, or told to end (SIGTERM, SIGINT: guests get ESHUTDOWN; SIGHUP: they get
            nothing and send again to the next process)
    exit 4  it refuses to serve; its report says why
    exit 75 its storage is out of reach; its report says why, and it is to be started again
    other   it died; whoever started it starts another

Only what is needed is imported: an idle disk costs its share of memory on every host.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import uvloop

from mirrord.control.messages import DiskStatus, Job, Problem, Report, RequestCount
from mirrord.errors import MirrordError, RefusedError
from mirrord.frontends.nbd_server import NbdServer
from mirrord.nbd.limits import Limits
from mirrord.service import logs, state
from mirrord.service.channel import ChannelServer, Verb
from mirrord.service.logs import fields
from mirrord.service.mover import Mover
from mirrord.service.places import is_share
from mirrord.service.shares import ShareConfig, decode_shares
from mirrord.service.stalls import StallWatch
from mirrord.service.state import Directories, DiskRecord
from mirrord.storage.backend import UnreachableError
from mirrord.storage.memory_pool import keep_freed_memory
from mirrord.storage.remote import LostError

log = logging.getLogger(__name__)

# Told to end: requests in flight have this long, the last flush and the rest of ten seconds too.
STOP_DEADLINE_S = 7.0
FLUSH_DEADLINE_S = 2.0
# Detaching waits so long for what was written to become durable.
DETACH_FLUSH_S = 5.0
NAME_LOOK_S = 2.0  # at a share, for what lies under the disk's name
# The contract is ten seconds from the signal to the end.
END_DEADLINE_S = 9.5
# A thread of ours that is at Python keeps the loop, and guests, waiting so long at a time: Python's
# 5 ms were 26 ms for one request of a hundred while smbprotocol logs on, this is 12.
SWITCH_S = 0.0005
REFUSED_EXIT_CODE = RefusedError.exit_code
UNREACHABLE_EXIT_CODE = os.EX_TEMPFAIL


# What a disk on a share waits for, once it is attached: our own handle, of a process whose end the
# server has not noticed yet; rights and shares that come back.
NOT_NOW = frozenset({"in-use", "unreadable", "share-denied", "share-missing"})
VERBS = ("pause", "resume", "cancel", "cutover", "limit")


class DiskProcess:
    """One disk, from its record to its end."""

    def __init__(
        self,
        name: str,
        directories: Directories,
        listener: socket.socket,
        limits: Limits,
        shares: dict[str, ShareConfig],
    ) -> None:
        self._name = name
        self._directories = directories
        self._listener = listener
        self._limits = limits
        self._shares = shares
        self._detached = asyncio.Event()
        self._told = asyncio.Queue[signal.Signals | None]()  # to end; None: detached
        self._channel = ChannelServer(
            {
                "status": self._status,
                "check_move": self._check_move,
                "move": self._move,
                "detach": self._detach,
                "has_its_name": self._has_its_name,
                "flush": self._flush_now,
                **{verb: self._steering(verb) for verb in VERBS},
            },
            listener,
        )

    async def open(self) -> None:
        """Open the disk where its bytes are now, with its unfinished move.

        Raises RefusedError, DamagedError, OSError: the disk can't be served.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._told.put_nowait, number)
        self._record = await asyncio.to_thread(self._read_record)
        self._mover = Mover(
            self._record, self._directories, on_change=self._channel.tell, shares=self._shares
        )
        await self._mover.open()
        self._server = NbdServer(self._mover.disk, limits=self._limits)
        self._stalls = StallWatch(self._name, self._server)

    @property
    def on_share(self) -> bool:
        """Whether the disk lies on a share, once its record was read."""
        return is_share(self._record.location)

    def _read_record(self) -> DiskRecord:
        directory = self._directories.disk(self._name)
        try:
            return state.read_record(directory / "disk.json", DiskRecord)
        except FileNotFoundError:
            return state.read_record(directory / "attach.json", DiskRecord)

    def confirm(self) -> None:
        """Make an attach true, now that its disk is open. Durable on return.

        A record of an earlier boot, or of an older version, learns what was opened now, if that
        can be written: guests don't wait for it.
        """
        directory = self._directories.disk(self._name)
        attached = (directory / "disk.json").exists()
        opened = self._mover.record()
        if attached and (opened == self._record or self._mover.moving):
            return  # while it moves the record may be of the source, and the disk in the target
        try:
            state.write_record(directory / "disk.json", opened)
        except (OSError, MirrordError) as error:
            if not attached:
                raise
            log.warning("identity not kept %s", fields(disk=self._name, error=error))
        if not attached:
            (directory / "attach.json").unlink()

    async def serve(self) -> None:
        """Begin to serve guests and the daemon."""
        await self._server.serve(self._listener)
        await self._channel.listen(self._directories.channel(self._name))

    async def run(self) -> None:
        """Serve until told to end, and end in good order."""
        async with asyncio.TaskGroup() as group:
            moving = group.create_task(self._mover.run())
            watching = group.create_task(self._stalls.run())
            waiting = group.create_task(self._detached.wait())
            waiting.add_done_callback(lambda _: self._told.put_nowait(None))
            why = await self._told.get()
            # Whatever hangs then is the next process's affair: recovery knows what to do.
            asyncio.get_running_loop().call_later(END_DEADLINE_S, os._exit, 0)
            log.info("stopping %s", fields(disk=self._name, why=why.name if why else "detach"))
            await self._server.stop(STOP_DEADLINE_S, coming_back=why is signal.SIGHUP)
            moving.cancel()
            watching.cancel()
            waiting.cancel()
        await self._mover.close(FLUSH_DEADLINE_S)
        await self._channel.close(self._directories.channel(self._name))

    # Verbs of the private channel.

    async def _status(self, params: dict[str, Any]) -> DiskStatus:
        counts = self._server.counters.counts()
        return msgspec.structs.replace(
            self._mover.status(len(self._server.clients)),
            stalled_s=self._stalls.stalled_s,
            requests=msgspec.convert(counts, dict[str, RequestCount], from_attributes=True),
        )

    async def _check_move(self, params: dict[str, Any]) -> state.JobRecord:
        record = msgspec.convert(params["record"], type=state.JobRecord)
        return await self._mover.check(record)

    async def _move(self, params: dict[str, Any]) -> Job:
        path = self._directories.job(params["job_id"]) / "job.json"
        record = await asyncio.to_thread(state.read_record, path, state.JobRecord)
        return await self._mover.start(record)

    def _steering(self, verb: str) -> Verb:
        async def steer(params: dict[str, Any]) -> Job:
            return await self._mover.steer(verb, params["job_id"], params.get("limit"))

        return steer

    async def _has_its_name(self, params: dict[str, Any]) -> bool:
        """Tell whether the disk's file on a share still lies there; True where it isn't known."""
        try:
            async with asyncio.timeout(NAME_LOOK_S):
                return await self._mover.disk.backend.has_its_name()
        except (TimeoutError, OSError) as error:
            log.info("name not looked at %s", fields(disk=self._name, error=error))
            return True

    async def _detach(self, params: dict[str, Any]) -> None:
        """Stop serving for good, unless somebody uses the disk."""
        clients = len(self._server.clients)
        if clients and not params.get("force"):
            raise RefusedError(
                "clients-connected",
                f"disk {self._name} has {clients} client{'s' if clients > 1 else ''} connected; "
                "disconnect them first, or use --force",
            )
        if self._mover.moving:
            raise RefusedError(
                "job-running", f"disk {self._name} is being moved; cancel the move first"
            )
        await self._flush(force=bool(params.get("force")))
        await asyncio.to_thread(self._forget)
        self._detached.set()

    async def _flush_now(self, params: dict[str, Any]) -> None:
        """Make durable what was acknowledged: the next process won't have it to repeat."""
        await self._flush(force=False)

    async def _flush(self, *, force: bool) -> None:
        """Make durable what was acknowledged, before the disk is forgotten."""
        share = self._mover.status(0).share
        if share is not None and share.state != "connected" and not share.unflushed_bytes:
            return  # its server is away, and owes nothing
        try:
            async with asyncio.timeout(DETACH_FLUSH_S):
                await self._mover.disk.flush()
        except (TimeoutError, OSError) as error:
            if not force:
                raise RefusedError(
                    "not-flushed",
                    f"what was written to disk {self._name} can't be made durable "
                    f"({str(error) or 'its storage does not answer'}): wait until that is well, "
                    "or give that up with 'mirrord detach --force'",
                ) from error
            why = str(error) or "its storage does not answer"
            log.error("detached unflushed %s", fields(disk=self._name, error=why))

    def _forget(self) -> None:
        directory = self._directories.disk(self._name)
        (directory / "disk.json").unlink()
        state.sync_directory(directory)


async def _live(options: argparse.Namespace) -> int:
    directories = Directories(options.state, options.runtime)
    limits = Limits(**msgspec.json.decode(options.nbd_limits, type=dict[str, Any]))
    listener = socket.socket(fileno=options.listen_fd)
    process = DiskProcess(options.name, directories, listener, limits, decode_shares(options.smb))
    try:
        await process.open()
        await asyncio.to_thread(process.confirm)
        await process.serve()
    except (UnreachableError, LostError) as error:
        problem = Problem("unreachable", error.strerror or f"disk {options.name} is out of reach")
        log.warning("unreachable %s", fields(disk=options.name, reason=error.strerror))
        _report(options.report_fd, Report(unreachable=problem))
        return UNREACHABLE_EXIT_CODE
    except (MirrordError, OSError) as error:
        problem = _problem(options.name, error)
        if problem.code in NOT_NOW and process.on_share:
            _report(options.report_fd, Report(unreachable=problem))
            return UNREACHABLE_EXIT_CODE
        log.info("refused %s", fields(disk=options.name, reason=problem.message))
        _report(options.report_fd, Report(problem))
        return REFUSED_EXIT_CODE
    gc.freeze()  # what is there now stays: no collection looks at it again while guests wait
    _report(options.report_fd, Report())
    log.info("ready %s", fields(disk=options.name))
    await process.run()
    return 0


def _problem(name: str, error: MirrordError | OSError) -> Problem:
    if isinstance(error, MirrordError):
        return Problem(error.code, str(error))
    return Problem("io-error", f"disk {name} can't be served: {error}")


def _report(descriptor: int, report: Report) -> None:
    """Tell whoever started this process; a daemon that died meanwhile asks by the channel."""
    with contextlib.suppress(BrokenPipeError):
        os.write(descriptor, msgspec.json.encode(report))
    os.close(descriptor)


def main() -> NoReturn:
    """Run a disk process and end; the exit code says whether another should be started."""
    parser = argparse.ArgumentParser(prog="mirrord.service.disk_process", allow_abbrev=False)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--runtime", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--nbd-limits", default="{}")
    parser.add_argument("--smb", default="{}")
    options = parser.parse_args()
    logs.set_up(f"disk/{options.name}", options.log_level)
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        exit_code = 1
        try:
            exit_code = runner.run(_live(options))
        except BaseException:
            log.critical("disk process failed %s", fields(disk=options.name), exc_info=True)
        finally:
            logging.shutdown()
            os._exit(exit_code)  # threads that a dead storage holds would be waited for


if __name__ == "__main__":
    main()
