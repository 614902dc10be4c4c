"""The daemon: one a state directory. It joins configuration, registry and control socket.

It may die at any time and come back: disk processes go on serving, moves go on, and the next
daemon finds them again (`supervisor`). So its end, asked for or not, stops nobody's disk; `detach`
does that. What it holds alone, two locks and the control socket, is gone with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from mirrord.control.messages import Problem
from mirrord.control.server import ControlServer, turn_away
from mirrord.control.sockets import Access, check_socket_path, is_answered, listen, remove_socket
from mirrord.errors import MirrordError, NoDaemonError, RefusedError
from mirrord.service import logs, state, systemd
from mirrord.service.config import Config, default_runtime_dir, default_state_dir
from mirrord.service.gate import Gate
from mirrord.service.grants import Right
from mirrord.service.logs import fields
from mirrord.service.registry import Registry
from mirrord.service.state import Directories

log = logging.getLogger(__name__)


def run(read: Callable[[], Config]) -> int:
    """Run the daemon as `read` says until SIGTERM or SIGINT, and return its exit code.

    Raises MirrordError when it can't start; then it has changed nothing that is another's.
    """
    manager = systemd.Systemd()
    try:
        return _run(read(), manager)
    except MirrordError as error:
        _turn_clients_away(manager.listener(), error)
        raise


def _turn_clients_away(listener: socket.socket | None, error: MirrordError) -> None:
    """Tell clients that wait at systemd's socket why; else it would start us for them again."""
    if listener is None:
        return
    problem = Problem(NoDaemonError.code, f"the daemon does not start: {error}")
    with listener, contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = listener.accept()
            turn_away(connection, problem)


def _run(config: Config, manager: systemd.Systemd) -> int:
    logs.set_up("daemon", config.log_level)
    _take_descriptors()
    directories = Directories(
        Path(config.state_dir or default_state_dir()).absolute(),
        Path(config.runtime_dir or default_runtime_dir()).absolute(),
    )
    address = Path(config.socket or directories.runtime / "control.sock").absolute()
    check_socket_path(address)
    config.nbd_access()  # a group that doesn't exist, before a disk needs it
    rights = config.rights()
    state.prepare(directories)
    locks = [_lock(directories.state, "state"), _lock(directories.runtime, "runtime")]
    try:
        inherited = manager.listener()
        listener = inherited or claim(address, config.control_access())
        try:
            asyncio.run(_serve(config, rights, directories, address, listener, manager))
        finally:
            listener.close()
            if inherited is None:
                remove_socket(address)
    finally:
        for lock in locks:
            os.close(lock)
    return 0


def _lock(directory: Path, kind: str) -> int:
    try:
        lock = state.take_lock(directory / "lock")
    except OSError as error:
        raise RefusedError(
            f"{kind}-unwritable", f"can't lock {directory / 'lock'}: {error.strerror}"
        ) from error
    if lock is None:
        raise RefusedError(
            "daemon-running",
            f"another daemon uses the {kind} directory {directory}; stop it, "
            f"or give this one a --{kind}-dir of its own",
        )
    return lock


def claim(address: Path, access: Access) -> socket.socket:
    """Listen at `address`, unless a living daemon does. What a dead one left is replaced.

    The directory's flock makes looking and replacing one step among daemons.
    """
    try:
        address.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        directory = os.open(address.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RefusedError(
            "socket-unusable", f"can't use the socket path {address}: {error.strerror}"
        ) from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        _refuse_taken(address)
        return listen(address, access)
    except OSError as error:
        raise RefusedError(
            "socket-unusable", f"can't listen at {address}: {error.strerror}"
        ) from error
    finally:
        os.close(directory)


def _refuse_taken(address: Path) -> None:
    try:
        status = address.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise RefusedError(
            "socket-unusable", f"{address} exists and is not a socket; give another --socket"
        )
    if is_answered(address):
        raise RefusedError(
            "daemon-running",
            f"another daemon answers at {address}; stop it, or give this one another --socket",
        )


def _take_descriptors() -> None:
    """Allow as many descriptors as this user may have: a disk takes three of them here."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve(
    config: Config,
    rights: tuple[Right, ...],
    directories: Directories,
    address: Path,
    listener: socket.socket,
    manager: systemd.Systemd,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        async with asyncio.TaskGroup() as group:
            registry = Registry(config, directories, group)
            server = ControlServer(Gate(registry, rights), listener)
            await registry.load()
            await server.start(group)
            manager.notify("READY=1")
            if manager.watchdog_s is not None:
                group.create_task(_live(manager, manager.watchdog_s), name="watchdog")
            print(f"ready socket={address}", file=sys.stderr, flush=True)
            await stop.wait()
            log.info("stopping; disks stay served")
            registry.stop()
            manager.notify("STOPPING=1")
            await server.close()
            raise _StoppedError
    except* _StoppedError:
        pass


async def _live(manager: systemd.Systemd, interval_s: float) -> None:
    """Tell that the loop turns, twice as often as it is wanted: a daemon that hangs is replaced."""
    while True:
        try:
            manager.notify("WATCHDOG=1")
        except OSError as error:
            log.warning("watchdog not told %s", fields(error=error))
        await asyncio.sleep(interval_s / 2)


class _StoppedError(Exception):
    """Ends the group: its tasks are cancelled, which leaves the disk processes alone."""
