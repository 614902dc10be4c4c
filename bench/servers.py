"""The servers that are measured, each on its own copy of nothing: the same raw file in turn."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

READY_S = 10.0
MIRRORD = (sys.executable, "-m", "mirrord")


class MissingPeerError(Exception):
    """A program to compare with isn't installed."""


def need(program: str) -> str:
    """Return where `program` is."""
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
    """A daemon with everything in `folder`; yields its control socket."""
    control = folder / "c.sock"
    command = [*MIRRORD, "daemon", "--state-dir", str(folder / "state")]
    command += ["--runtime-dir", str(folder / "run"), "--socket", str(control)]
    if config is not None:
        command += ["--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as daemon:
        try:
            _wait_for(control)
            yield control
        finally:
            with contextlib.suppress(RuntimeError):  # else it hides what went wrong before
                for name in _disks(control):  # a disk's process would outlive the daemon
                    run(*MIRRORD, "detach", name, "--force", MIRRORD_SOCKET=str(control))
            daemon.terminate()


def attach(control: Path, name: str, disk: Path | str) -> Path:
    """Serve a file, or what an address names, by a running mirrord; return the NBD socket."""
    run(*MIRRORD, "attach", name, disk, MIRRORD_SOCKET=str(control))
    return control.parent / "run" / "nbd" / f"{name}.sock"


@contextlib.contextmanager
def served_by_mirrord(folder: Path, disk: Path) -> Iterator[str]:
    """Yields the URI of the disk."""
    with mirrord(folder) as control:
        yield f"nbd+unix:///disk?socket={attach(control, 'disk', disk)}"


@contextlib.contextmanager
def served_by_qemu(folder: Path, disk: Path) -> Iterator[str]:
    """qemu-storage-daemon with io_uring; yields the URI of the disk."""
    socket = folder / "qsd.sock"
    socket.unlink(missing_ok=True)  # an earlier round's
    command = [need("qemu-storage-daemon"), "--blockdev"]
    command += [f"driver=file,node-name=disk,filename={disk},aio=io_uring"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
    command += ["--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"]
    with subprocess.Popen(command) as server:
        try:
            _wait_for(socket)
            yield f"nbd+unix:///disk?socket={socket}"
        finally:
            server.terminate()


@contextlib.contextmanager
def served_by_nbdkit(folder: Path, disk: Path) -> Iterator[str]:
    """nbdkit's file plugin; yields the URI of the disk."""
    socket = folder / "nbdkit.sock"
    socket.unlink(missing_ok=True)
    command = [need("nbdkit"), "--foreground", "--exit-with-parent"]
    command += ["--unix", str(socket), "file", str(disk)]
    with subprocess.Popen(command) as server:
        try:
            _wait_for(socket)
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.terminate()


def _disks(control: Path) -> list[str]:
    lines = run(*MIRRORD, "ls", MIRRORD_SOCKET=str(control)).splitlines()[1:]
    return [line.split()[0] for line in lines if line.strip()]


def _wait_for(path: Path) -> None:
    give_up = time.monotonic() + READY_S
    while not path.exists():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{path} did not appear within {READY_S:g} s")
        time.sleep(0.02)
