"""Real storage that fails on request: a file, or a block device over it, that the kernel serves.

nbdkit holds the bytes, lets errors through (filter `error`) and stands still (filter `pause`);
qemu-storage-daemon makes a file of it by FUSE, with bad sectors (driver `blkdebug`). That needs
no device mapper. Everything is undone by the context manager that made it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import eventually, require_loop_devices, require_program, require_root

SECTOR_BYTES = 512
RUN_DEADLINE_S = 30
EIO = 5


@dataclass(frozen=True)
class FaultyStorage:
    """One file of a fixed size. `backing` has its bytes, whatever happens to requests."""

    path: Path
    backing: Path
    _control: Path
    _error_file: Path
    _pid_file: Path

    def fail(self) -> None:
        """Let every request for data fail with EIO, until `heal`."""
        self._error_file.touch()

    def hang(self) -> None:
        """Finish what is under way, then answer nothing more, until `heal`."""
        self._say(b"p", b"P")

    @contextmanager
    def away(self) -> Iterator[None]:
        """Answer nothing at all for that long: who only looks at the file waits too."""
        server = int(self._pid_file.read_text())
        os.kill(server, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(server, signal.SIGCONT)

    def heal(self) -> None:
        """Be well again; what hung goes on. Bad sectors stay."""
        self._error_file.unlink(missing_ok=True)
        self._say(b"r", b"R")

    def _say(self, word: bytes, answer: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(RUN_DEADLINE_S)
            control.connect(str(self._control))
            control.sendall(word)
            assert control.recv(1) == answer


@contextmanager
def faulty_file(
    folder: Path, backing: Path, *, bad_sectors: tuple[int, ...] = (), flush_fails: bool = False
) -> Iterator[FaultyStorage]:
    """Serve the bytes of `backing` as a file in `folder`; reads of bad sectors fail with EIO."""
    require_root()  # without it, FUSE needs a program that isn't always there
    nbdkit, daemon = require_program("nbdkit"), require_program("qemu-storage-daemon")
    nbd = folder / "nbdkit.sock"
    pid_file = folder / "qsd.pid"
    storage = FaultyStorage(
        folder / "faulty.raw", backing, folder / "pause.sock", folder / "fail", pid_file
    )
    storage.path.touch()
    rules = [{"iotype": "read", "sector": sector} for sector in bad_sectors]
    rules += [{"iotype": "flush"}] if flush_fails else []
    errors = [{"event": "none", "once": False, "errno": EIO, **rule} for rule in rules]
    node: dict[str, Any] = {"driver": "blkdebug", "node-name": "disk", "image": "bytes"}
    node |= {"inject-error": errors} if errors else {}
    with ExitStack() as stack:
        stack.enter_context(
            _running(
                [nbdkit, "--foreground", "--unix", str(nbd), "--filter=pause", "--filter=error",
                 "file", str(backing), f"pause-control={storage._control}",
                 "error=EIO", "error-rate=1", f"error-file={storage._error_file}"], nbd,
            )
        )  # fmt: skip
        stack.enter_context(
            _running(
                [daemon, "--pidfile", str(pid_file),
                 "--blockdev", f"driver=nbd,node-name=bytes,server.type=unix,server.path={nbd}",
                 "--blockdev", json.dumps(node),
                 "--export", f"fuse,id=f,node-name=disk,mountpoint={storage.path},writable=on"],
                pid_file,
            )
        )  # fmt: skip
        stack.callback(storage.heal)  # first of all: nothing ends that hangs
        yield storage


@contextmanager
def faulty_device(folder: Path, backing: Path) -> Iterator[tuple[str, FaultyStorage]]:
    """Serve the bytes of `backing` as a block device that can be made to fail."""
    require_loop_devices()
    losetup = require_program("losetup")
    with faulty_file(folder, backing) as storage:
        device = _run(losetup, "--find", "--show", str(storage.path))
        try:
            yield device, storage
        finally:
            storage.heal()
            _run(losetup, "--detach", device)


@contextmanager
def small_file_system(where: Path, size_bytes: int) -> Iterator[Path]:
    """Mount an empty file system in memory of that size."""
    require_root()
    where.mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "none", str(where))
    try:
        yield where
    finally:
        _run("umount", "--lazy", str(where))


@contextmanager
def _running(command: list[str], appears: Path) -> Iterator[None]:
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            eventually(lambda: appears.exists() or process.poll() is not None, what=command[0])
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield
        finally:
            process.terminate()
            process.communicate(timeout=RUN_DEADLINE_S)


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=RUN_DEADLINE_S
    )
    return done.stdout.strip()
