"""Hostile clients against a server process: it lives, stays small, and serves others meanwhile.

Each abuse runs while a guest reads; afterwards the process's memory (its peak) is below 256 MiB
and its descriptors are as many as before.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mirrord.nbd import wire
from tests.helpers import eventually
from tests.nbd.speaking import STRUCTURED, contexts, flags, go
from tests.nbd_writer import Client

MIB = 1 << 20
SIZE = 1 << 40
MEMORY_BYTES_MAX = 256 * MIB
READ, WRITE, DISC, FLUSH = range(4)
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Target:
    """The server process, and a guest that must not notice anything."""

    path: str
    pid: int
    guest: Client
    sockets: list[socket.socket] = field(default_factory=list)

    def connect(self) -> socket.socket:
        """Return a connection whose sends and receives give up after a moment."""
        connection = socket.socket(socket.AF_UNIX)
        self.sockets.append(connection)
        connection.connect(self.path)
        connection.settimeout(0.5)  # long enough for an answer, short for one that never comes
        return connection

    def enter(self) -> socket.socket:
        """Return a connection in transmission, with simple replies."""
        connection = self.connect()
        connection.sendall(flags() + go())
        expected = wire.GREETING.size + 3 * wire.OPTION_REPLY.size
        expected += wire.EXPORT_INFO.size + wire.BLOCK_SIZE_INFO.size
        while expected:
            expected -= len(connection.recv(expected))
        return connection

    def check_guest(self) -> None:
        """Assert that the guest is served."""
        assert self.guest.read(0, 4096) == bytes(4096)

    def descriptors(self) -> int:
        """Return how many descriptors the server has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory_bytes(self) -> int:
        """Return the most memory the server ever had."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")

    def leave(self) -> None:
        """Close every connection but the guest's."""
        for connection in self.sockets:
            connection.close()
        self.sockets.clear()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    """Serve a disk of 1 TiB from a process; check it after the abuse."""
    path = str(tmp_path / "nbd.sock")
    command = [sys.executable, "-m", "tests.frontends.serving", path, str(SIZE)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            warm_up = Client(path, "disk")
            warm_up.close()
            one = Target(path, process.pid, Client(path, "disk"))
            before = one.descriptors()
            yield one
            one.check_guest()
            one.leave()
            eventually(lambda: one.descriptors() <= before, what="descriptors are closed")
            assert one.memory_bytes() < MEMORY_BYTES_MAX
            one.guest.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


def push(connection: socket.socket, data: bytes) -> None:
    """Send as much as the server takes."""
    with suppress(OSError):
        connection.sendall(data)


def idle_handshakes(target: Target) -> None:
    for _ in range(300):
        target.connect()


def half_handshakes(target: Target) -> None:
    for _ in range(90):
        push(target.connect(), flags() + STRUCTURED * 3 + wire.OPTION.pack(wire.OPTION_MAGIC, 7, 9))


def huge_options(target: Target) -> None:
    for _ in range(90):
        connection = target.connect()
        push(connection, flags() + wire.OPTION.pack(wire.OPTION_MAGIC, 99, 64 << 10))
        push(connection, bytes(65_000))


def option_floods(target: Target) -> None:
    for _ in range(20):
        push(target.connect(), flags() + contexts([b"a:" + b"x" * 1000] * 32) * 100)


def unread_replies(target: Target) -> None:
    """What made another server abort: replies nobody reads, then gone."""
    for _ in range(15):
        request = wire.pack_request(READ, 7, 0, MIB)
        push(target.enter(), request * 500)


def unread_large_replies(target: Target) -> None:
    for _ in range(15):
        push(target.enter(), wire.pack_request(READ, 7, 0, 32 * MIB) * 64)


def unfinished_payloads(target: Target) -> None:
    """32 MiB each, but for the last byte."""
    payload = bytes(32 * MIB - 1)
    for _ in range(15):
        push(target.enter(), wire.pack_request(WRITE, 7, 0, 32 * MIB) + payload)


def unread_refusals(target: Target) -> None:
    for _ in range(15):
        push(target.enter(), wire.pack_request(99, 7, 0, 0) * 500_000)


def block_status_floods(target: Target) -> None:
    names = [wire.CONTEXT_ALLOCATION.encode(), wire.CONTEXT_DIRTY.encode()]
    for _ in range(15):
        connection = target.connect()
        push(connection, flags() + STRUCTURED + contexts(names) + go())
        push(connection, wire.pack_request(7, 7, 0, 2**32 - 1) * 20_000)


def lengths_that_lie(target: Target) -> None:
    for command in range(10):
        for length in (2**31, 2**32 - 1):
            for offset in (0, SIZE, 2**64 - 1):
                push(target.enter(), wire.pack_request(command, 7, offset, length) * 10)
        target.leave()


def garbage(target: Target) -> None:
    chance = random.Random(27)
    for _ in range(40):
        push(target.connect(), chance.randbytes(5000))
        push(target.connect(), flags() + b"IHAVEOPT" + chance.randbytes(3000))
        push(target.enter(), chance.randbytes(5000))
        header = struct.pack(">IHH", wire.REQUEST_MAGIC, chance.getrandbits(5), chance.randrange(9))
        push(target.enter(), (header + chance.randbytes(20)) * 100)
        target.leave()


def a_goodbye_then_more(target: Target) -> None:
    for _ in range(15):
        push(target.enter(), wire.pack_request(DISC, 0, 0, 0) + bytes(MIB))


def cut_everywhere(target: Target) -> None:
    """A session that ends after each of its bytes."""
    talk = flags() + wire.pack_option(wire.OPT_LIST) + STRUCTURED + go()
    talk += wire.pack_request(WRITE, 1, 0, 64) + bytes(64) + wire.pack_request(READ, 2, 0, 64)
    for length in range(len(talk)):
        push(target.connect(), talk[:length])
        target.leave()


@pytest.mark.parametrize(
    "abuse",
    [
        idle_handshakes,
        half_handshakes,
        huge_options,
        option_floods,
        unread_replies,
        unread_large_replies,
        unfinished_payloads,
        unread_refusals,
        block_status_floods,
        lengths_that_lie,
        garbage,
        a_goodbye_then_more,
        cut_everywhere,
    ],
)
def test_case_27_an_abuse_costs_nothing_but_itself(
    target: Target, abuse: Callable[[Target], None]
) -> None:
    abuse(target)
    target.check_guest()


def test_cve_2015_0847_signals_end_it_in_order(target: Target) -> None:
    """With clients in every state a SIGTERM ends the process by itself (the fixture asks)."""
    target.connect()
    push(target.enter(), wire.pack_request(WRITE, 7, 0, MIB) + bytes(100))
