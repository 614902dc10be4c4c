"""A hostile NBD client, and what a disk process may cost while it is at work.

`Attacked` is a real disk process. `check` ends an attack: the process is the same one, its memory
was below 256 MiB at its peak, its descriptors are as many as before, and a guest that worked on
the disk all the time waited at most `WAIT_S`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mirrord.nbd import wire
from tests.daemon import Daemon
from tests.helpers import eventually
from tests.nbd.speaking import flags, go
from tests.nbd_probe import Probe
from tests.nbd_writer import BLOCK_BYTES, Client

MIB = 1 << 20
SIZE = 1 << 40
MEMORY_BYTES_MAX = 256 * MIB
# Far above what is seen (0.03 s): attack, guest and process share two cores with the suite.
WAIT_S = 5.0
ANSWER_S = 0.5  # long enough for an answer, short for one that never comes
ENTERED_BYTES = (
    wire.GREETING.size
    + 3 * wire.OPTION_REPLY.size
    + wire.EXPORT_INFO.size
    + wire.BLOCK_SIZE_INFO.size
)


class Attacked:
    """Disk `vm` of 1 TiB, its process, and connections to it."""

    def __init__(self, folder: Path, config: str = "") -> None:
        self.daemon = Daemon(config)
        self.disk = folder / "vm.raw"
        with self.disk.open("wb") as file:
            file.truncate(SIZE)
        self.daemon.start()
        self.path = self.daemon.attach("vm", self.disk)
        self.pid = self.daemon.disk_pid("vm")
        Client(self.path, "vm").close()
        self._sockets: list[socket.socket] = []

    def connect(self) -> socket.socket:
        """Return a connection whose sends and receives give up after a moment."""
        connection = socket.socket(socket.AF_UNIX)
        self._sockets.append(connection)
        connection.connect(self.path)
        connection.settimeout(ANSWER_S)
        return connection

    def say(self, data: bytes) -> socket.socket:
        """Return a connection on which the client flags and `data` were sent."""
        connection = self.connect()
        push(connection, flags() + data)
        return connection

    def enter(self) -> socket.socket:
        """Return a connection in transmission, with simple replies.

        Those who have just left may still have requests in flight, and so their places.
        """

        def attempt() -> socket.socket | None:
            connection = self.say(go(b"vm"))
            connection.settimeout(10)
            head = take(connection, wire.GREETING.size + wire.OPTION_REPLY.size)
            *_, kind, _ = wire.OPTION_REPLY.unpack(head[wire.GREETING.size :])
            if kind & wire.REP_ERROR:
                connection.close()
                return None
            take(connection, ENTERED_BYTES - len(head))
            connection.settimeout(ANSWER_S)
            return connection

        return eventually(attempt, what="there is room for a client")

    def leave(self) -> None:
        """Close every connection."""
        for connection in self._sockets:
            connection.close()
        self._sockets.clear()

    def descriptors(self) -> int:
        """Return how many descriptors the process has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory_bytes(self) -> int:
        """Return the most memory that the process had since `forget_memory`."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")

    def forget_memory(self) -> None:
        """Begin to look for the peak anew (proc(5): clear_refs)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    @contextmanager
    def check(self) -> Iterator[Probe]:
        """Let a guest work during an attack, and look at what it cost."""
        before = self.descriptors()
        self.forget_memory()
        with Probe(self.path, first=SIZE // 2 // BLOCK_BYTES) as guest:
            yield guest
            guest.wait(3)
            self.leave()
            guest.wait(3)
        eventually(lambda: self.descriptors() <= before, what="descriptors are closed")
        assert self.daemon.find_disk_pid("vm") == self.pid, "the process died"
        assert self.memory_bytes() < MEMORY_BYTES_MAX
        assert guest.worst_s < WAIT_S
        assert not guest.errors, guest.errors

    def close(self) -> None:
        """End everything; assert that nothing unforeseen was logged."""
        unannounced = self.daemon.unannounced()
        self.leave()
        self.daemon.close()
        self.disk.unlink()
        assert not unannounced, unannounced


def push(connection: socket.socket, data: bytes) -> None:
    """Send as much as the server takes."""
    with suppress(OSError):
        connection.sendall(data)


def take(connection: socket.socket, length: int) -> bytes:
    """Receive exactly so many bytes."""
    data = b""
    while len(data) < length:
        received = connection.recv(length - len(data))
        if not received:
            raise ConnectionError("the server closed the connection")
        data += received
    return data


def rest(connection: socket.socket, deadline_s: float = 10) -> bytes:
    """Return what comes until the server closes the connection, which it has to do."""
    connection.settimeout(deadline_s)
    data = b""
    with suppress(ConnectionError):
        while received := connection.recv(1 << 16):
            data += received
    return data


def option_replies(connection: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """Return kind and data of the next replies in a handshake, the greeting first left out."""
    connection.settimeout(10)
    replies = []
    for _ in range(count):
        head = take(connection, wire.OPTION_REPLY.size)
        magic, _, kind, length = wire.OPTION_REPLY.unpack(head)
        assert magic == wire.OPTION_REPLY_MAGIC
        replies.append((kind, take(connection, length)))
    return replies


def is_open(connection: socket.socket) -> bool:
    """Tell whether the server has left the connection open, reading what it sent."""
    connection.settimeout(ANSWER_S)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return True
    except ConnectionError:
        return False
    return False
