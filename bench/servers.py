"""The servers that are measured, each on its own copy of nothing: the same raw file in turn."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import processes
from bench.model import MissingPeerError
from mirrord.control.client import Client
from mirrord.control.messages import AttachRequest
from mirrord.errors import MirrordError

READY_S = 10.0
END_S = 10.0
# -P: what PYTHONPATH names comes before the folder that the benchmark is run in.
MIRRORD = (sys.executable, "-P", "-m", "mirrord")


@dataclass(frozen=True)
class Served:
    """Where a server's disks are reached, and the processes that serve them."""

    uris: list[str]
    pids: list[int]


def need(program: str) -> str:
    """Return where `program` is.

    Raises:
        MissingPeerError: It isn't installed.
    """
    found = shutil.which(program)
    if found is None:
        raise MissingPeerError(program)
    return found


def run(*command: str | Path, **environment: str) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


@contextlib.contextmanager
def mirrord(folder: Path, config: Path | None = None) -> Iterator[Path]:
    """A daemon with everything in `folder`; yields its control socket.

    It is in a session of its own, so that an interrupt from the terminal doesn't end it before
    its disks are detached. Disk processes that are left then are ended. Its state is new: it
    knows no jobs of earlier rounds.
    """
    shutil.rmtree(folder / "state", ignore_errors=True)
    control = folder / "c.sock"
    command = [*MIRRORD, "daemon", "--state-dir", str(folder / "state")]
    command += ["--runtime-dir", str(folder / "run"), "--socket", str(control)]
    if config is not None:
        command += ["--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as daemon:
        try:
            wait_for(control)
            yield control
        finally:
            with contextlib.suppress(MirrordError, OSError):  # else it hides what went wrong before
                _detach_all(control)  # a disk's process would outlive the daemon
            daemon.terminate()
            daemon.wait()
            processes.end(processes.disk_processes(folder))


def attach(control: Path, name: str, disk: Path | str, *, direct: bool = False) -> Path:
    """Serve a file, or what an address names, by a running mirrord; return the NBD socket."""
    with contextlib.closing(Client(control)) as client:
        client.attach(AttachRequest(name, str(disk), cache="direct" if direct else "writeback"))
    return control.parent / "run" / "nbd" / f"{name}.sock"


@contextlib.contextmanager
def served_by_mirrord(
    folder: Path, disks: Sequence[Path], *, direct: bool = False
) -> Iterator[Served]:
    """A daemon, and a process for each disk."""
    with mirrord(folder) as control:
        uris = []
        for number, disk in enumerate(disks):
            socket = attach(control, f"disk{number}", disk, direct=direct)
            uris.append(f"nbd+unix:///disk{number}?socket={socket}")
        yield Served(uris, processes.disk_processes(folder))


@contextlib.contextmanager
def served_by_qemu(
    folder: Path, disks: Sequence[Path], *, direct: bool = False, qmp: Path | None = None
) -> Iterator[Served]:
    """qemu-storage-daemon with io_uring and an export for each disk; with QMP on a socket."""
    socket = folder / "qsd.sock"
    socket.unlink(missing_ok=True)  # an earlier round's
    command = [need("qemu-storage-daemon")]
    command += ["--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=0"]
    for number, disk in enumerate(disks):
        cache = "on" if direct else "off"
        command += ["--blockdev", f"driver=file,node-name=disk{number},filename={disk},"
                    f"aio=io_uring,cache.direct={cache}"]  # fmt: skip
        command += ["--export", f"type=nbd,id=e{number},node-name=disk{number},"
                    f"name=disk{number},writable=on"]  # fmt: skip
    if qmp is not None:
        qmp.unlink(missing_ok=True)
        command += ["--chardev", f"socket,id=qmp,path={qmp},server=on,wait=off"]
        command += ["--monitor", "chardev=qmp"]
    uris = [f"nbd+unix:///disk{number}?socket={socket}" for number in range(len(disks))]
    with _server(command, socket) as pid:
        if qmp is not None:
            wait_for(qmp)
        yield Served(uris, [pid])


@contextlib.contextmanager
def served_by_nbdkit(
    folder: Path, disks: Sequence[Path], *, direct: bool = False
) -> Iterator[Served]:
    """nbdkit's file plugin, a process for each disk; it has no way past the page cache."""
    assert not direct
    with contextlib.ExitStack() as stack:
        uris, pids = [], []
        for number, disk in enumerate(disks):
            socket = folder / f"nbdkit{number}.sock"
            socket.unlink(missing_ok=True)
            command = [need("nbdkit"), "--foreground", "--exit-with-parent"]
            command += ["--unix", str(socket), "file", str(disk)]
            pids.append(stack.enter_context(_server(command, socket)))
            uris.append(f"nbd+unix:///?socket={socket}")
        yield Served(uris, pids)


@contextlib.contextmanager
def _server(command: list[str], socket: Path) -> Iterator[int]:
    with subprocess.Popen(command, start_new_session=True) as server:
        try:
            wait_for(socket)
            yield server.pid
        finally:
            server.terminate()
            try:
                server.wait(END_S)
            except subprocess.TimeoutExpired:  # it is stuck
                server.kill()


def _detach_all(control: Path) -> None:
    with contextlib.closing(Client(control)) as client:
        for disk in client.disks():
            client.detach(disk.name, force=True)


def wait_for(path: Path) -> None:
    """Wait until a path is there."""
    give_up = time.monotonic() + READY_S
    while not path.exists():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{path} did not appear within {READY_S:g} s")
        time.sleep(0.02)
