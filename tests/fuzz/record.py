"""Record seeds from real sessions into `seeds/`: python -m tests.fuzz.record

A daemon serves and moves a small disk; QEMU's and libnbd's clients use it, and the command line
steers it, through sockets that listen in. What the daemon wrote into its state directory is kept
as well. The files are small and in the repository, so that a run needs none of this.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.daemon import Daemon
from tests.fuzz.targets import SEEDS

SIZE = 1 << 20
SEED_BYTES_MAX = 16 << 10
PIECES = b"\xff"  # in large ones: the first byte of such a seed


@contextlib.contextmanager
def listened_to(path: str) -> Iterator[tuple[str, list[bytes]]]:
    """Yield a socket that leads to the one at `path`, and what is said on each connection."""
    said: list[bytes] = []
    threads: list[threading.Thread] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.heard")
        listener.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = listener.accept()[0]
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(path)
                    said.append(b"")
                    start(pump, client, server, len(said) - 1)
                    start(pump, server, client, None)

        def pump(source: socket.socket, target: socket.socket, number: int | None) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    if number is not None:
                        said[number] += data
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        def start(function: object, *arguments: object) -> None:
            threads.append(threading.Thread(target=function, args=arguments, daemon=True))
            threads[-1].start()

        start(accept)
        yield f"{path}.heard", said
    Path(f"{path}.heard").unlink()


def keep(target: str, name: str, data: bytes) -> None:
    """Write one seed."""
    folder = SEEDS / target
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.bin").write_bytes(data[:SEED_BYTES_MAX])


def record_nbd(path: str) -> None:
    """Keep what clients say: `disk` is the name that the target's server has, too."""
    with listened_to(path) as (heard, said):
        uri = f"nbd+unix:///disk?socket={heard}"
        for words in (
            ["qemu-io", "-f", "raw", "-d", "unmap", uri, "-c", "write -P 7 3 600",
             "-c", "read 0 1k", "-c", "write -z 4k 8k", "-c", "discard 8k 4k", "-c", "flush"],
            ["nbdinfo", "--map", uri], ["nbdinfo", "--list", uri], ["nbdinfo", "--size", uri],
            ["qemu-img", "map", "-f", "raw", uri],
        ):  # fmt: skip
            subprocess.run(words, check=True, capture_output=True, timeout=30)
    for number, data in enumerate(said):
        keep("nbd_server", f"session-{number}", PIECES + data)


def record_control(daemon: Daemon, target: Path) -> str:
    """Keep what the command line asks; move the disk to `target` meanwhile, return the job."""
    with listened_to(str(daemon.socket)) as (heard, said):
        daemon.socket = Path(heard)
        job = daemon.move("disk", target)
        daemon.wait("disk")
        for words in (["ls"], ["show", "disk"], ["jobs", "disk"], ["job", job]):
            daemon.json(*words)
        for words in (["limit", "disk", "1M"], ["cancel", "disk"], ["detach", "nope"]):
            daemon.run(*words)
        daemon.socket = Path(heard.removesuffix(".heard"))
    for number, data in enumerate(dict.fromkeys(said)):
        keep("control_http", f"command-{number}", data)
    return job


def main() -> None:
    """Replace all recorded seeds."""
    shutil.rmtree(SEEDS, ignore_errors=True)
    SEEDS.mkdir()
    daemon = Daemon()
    try:
        disk = daemon.root / "disk.raw"
        disk.write_bytes(os.urandom(SIZE // 2).ljust(SIZE, b"\0"))
        daemon.start()
        record_nbd(daemon.attach("disk", disk))
        job = record_control(daemon, daemon.root / "moved.raw")
        folder = daemon.state / "jobs" / job
        keep("journal_bytes", "move", (folder / "log").read_bytes().rstrip(b"\0"))
        for path in (folder / "job.json", folder / "ended.json",
                     daemon.state / "disks" / "disk" / "disk.json"):  # fmt: skip
            keep("state_file", path.stem, path.read_bytes())
    finally:
        daemon.close()


if __name__ == "__main__":
    main()
