"""qemu-storage-daemon's control interface, as much of it as a blockdev-mirror needs."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.servers import served_by_qemu

ANSWER_S = 30.0
JOB = "mirror"


class Qmp:
    """One connection. Events that come between answers are kept."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_S)
        self._socket.connect(str(path))
        self._came = b""
        self._events: list[dict[str, Any]] = []
        self._next()  # its greeting
        self.ask("qmp_capabilities")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its answer.

        Raises:
            RuntimeError: It was refused.
        """
        asked = json.dumps({"execute": command, "arguments": arguments})
        self._socket.settimeout(ANSWER_S)
        self._socket.sendall(asked.encode() + b"\n")
        while True:
            told = self._next()
            if "error" in told:
                raise RuntimeError(f"{command}: {told['error']['desc']}")
            if "return" in told:
                return told["return"]
            self._events.append(told)

    def wait_for(self, event: str, until_s: float) -> dict[str, Any] | None:
        """Return the next event of a name, or None when it doesn't come until then."""
        while True:
            for number, told in enumerate(self._events):
                if told.get("event") == event:
                    del self._events[: number + 1]
                    return told
            self._socket.settimeout(max(0.01, until_s - time.monotonic()))
            try:
                self._events.append(self._next())
            except TimeoutError:
                return None

    def _next(self) -> dict[str, Any]:
        while b"\n" not in self._came:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("qemu-storage-daemon closed its control socket")
            self._came += data
        line, self._came = self._came.split(b"\n", 1)
        told: dict[str, Any] = json.loads(line)
        return told


@contextlib.contextmanager
def qemu(folder: Path, disk: Path) -> Iterator[tuple[Qmp, Path]]:
    """A qemu-storage-daemon that exports a disk as `disk0`; yields it and its NBD socket."""
    path = folder / "qmp.sock"
    with served_by_qemu(folder, [disk], qmp=path):
        qmp = Qmp(path)
        try:
            yield qmp, folder / "qsd.sock"
        finally:
            qmp.close()


def mirror(qmp: Qmp, target: Path, size: int, mode: str, give_up_s: float, speed: int = 0) -> float:
    """Move the disk to a new file, and return the seconds until the export is on it.

    Given up after `give_up_s` it is infinite, and the disk stays where it was.
    """
    with target.open("wb") as file:
        file.truncate(size)
    qmp.ask(
        "blockdev-add", driver="file", filename=str(target), aio="io_uring",
        **{"node-name": "target"},
    )  # fmt: skip
    began = time.monotonic()
    qmp.ask(
        "blockdev-mirror", device="disk0", target="target", sync="full", speed=speed,
        **{"job-id": JOB, "copy-mode": mode},
    )  # fmt: skip
    if qmp.wait_for("BLOCK_JOB_READY", began + give_up_s) is not None:
        qmp.ask("job-complete", id=JOB)
        ended = qmp.wait_for("BLOCK_JOB_COMPLETED", began + give_up_s)
        if ended is not None:
            if "error" in ended["data"]:
                raise RuntimeError(f"blockdev-mirror: {ended['data']['error']}")
            return time.monotonic() - began
    with contextlib.suppress(RuntimeError):  # it has just completed: too late is too late
        qmp.ask("block-job-cancel", device=JOB, force=True)
    return math.inf
