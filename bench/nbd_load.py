"""A paced load over NBD that measures each request, in a process of its own.

    python -m bench.nbd_load SOCKET EXPORT [--rate N] [--reads SHARE] [--closed] [--seconds S]

Open loop by default: a request is due at its time whether or not the earlier ones were answered,
and its latency counts from then, so that a server which stops for a while can't hide it. `--closed`
has one request at a time and counts from when it was sent. It ends after `--seconds`, or when
standard input is closed, and prints JSON: `[[time of day, seconds it took, was it a read], …]`.

It speaks NBD by the tests' own client (`tests/nbd_writer.py`), and leaves nothing to a thread.
Answers are taken while it sends: a server that can't get rid of its answers stops reading, and a
load that only writes then would wait for it forever.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import struct
import sys
import time

from tests.nbd_writer import BLOCK_BYTES, READ, WRITE, Client

IN_FLIGHT_MAX = 512  # beyond it the open loop waits: the server is stuck
ANSWER_S = 20.0
LATE_LOOK = 16  # requests between two looks at answers: each look costs as much as a request
MAGIC = 0x25609513
CHOICES = 4096  # contents to write; enough that none is like its neighbour

Measured = list[tuple[float, float, int]]


class Load:
    """One connection and what is in flight on it."""

    def __init__(self, path: str, export: str, reads: float, seed: int) -> None:
        self._client = Client(path, export)
        self._reads = reads
        self._chance = random.Random(seed)
        self._blocks = self._client.size // BLOCK_BYTES
        self._data = os.urandom(BLOCK_BYTES + CHOICES)
        self._sent: dict[int, tuple[float, int]] = {}
        self._count = 0
        self._socket = self._client._socket
        self._socket.setblocking(False)
        self._came = bytearray()
        self.measured: Measured = []
        self._day_s = time.time() - time.perf_counter()

    @property
    def in_flight(self) -> int:
        """Requests that were sent and not answered."""
        return len(self._sent)

    def send(self, due_s: float) -> None:
        """Send a request that counts from `due_s`."""
        self._count += 1
        chance = self._chance.random
        command = READ if chance() < self._reads else WRITE
        start = int(chance() * CHOICES)
        data = self._data[start : start + BLOCK_BYTES] if command == WRITE else b""
        self._sent[self._count] = due_s, command
        offset = int(chance() * self._blocks) * BLOCK_BYTES
        header = struct.pack(">IHHQQI", MAGIC, 0, command, self._count, offset, BLOCK_BYTES)
        self._push(header + data)

    def _push(self, data: bytes) -> None:
        rest = memoryview(data)
        give_up = time.perf_counter() + ANSWER_S
        while True:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                select.select([self._socket], [self._socket], [], 1.0)
            if not rest:
                return
            self.answered(0)
            if time.perf_counter() > give_up:
                raise TimeoutError("the server doesn't take requests")

    def answered(self, wait_s: float) -> None:
        """Take the answers that come within a while: until then, or the first."""
        if not select.select([self._socket], [], [], max(0.0, wait_s))[0]:
            return
        data = self._socket.recv(1 << 20)
        if not data:
            raise ConnectionError("the server closed the connection")
        now_s = time.perf_counter()
        self._came += data
        at = 0
        while len(self._came) - at >= 16:
            magic, error, cookie = struct.unpack_from(">IIQ", self._came, at)
            if magic != 0x67446698 or error:
                raise OSError(error, f"reply {magic:#x}, error {error}")
            due_s, command = self._sent[cookie]
            size = 16 + (BLOCK_BYTES if command == READ else 0)
            if len(self._came) - at < size:
                break
            at += size
            del self._sent[cookie]
            self.measured.append((self._day_s + now_s, now_s - due_s, command == READ))
        del self._came[:at]

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def finish(self) -> None:
        """Wait for what is in flight."""
        give_up = time.perf_counter() + ANSWER_S
        while self._sent:
            self.answered(1.0)
            if time.perf_counter() > give_up:
                raise TimeoutError(f"{len(self._sent)} requests without an answer")


def told_to_end() -> bool:
    """Tell whether standard input was closed."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def open_loop(load: Load, rate: float, until_s: float) -> None:
    """Send at fixed times, whatever is answered."""
    number, began = 0, time.perf_counter()
    while True:
        due_s = began + number / rate
        while (now_s := time.perf_counter()) < due_s or load.in_flight >= IN_FLIGHT_MAX:
            load.answered(due_s - now_s if now_s < due_s else 1.0)
        if now_s > until_s or (number % 64 == 0 and told_to_end()):
            return
        load.send(due_s)
        number += 1
        if number % LATE_LOOK == 0:
            load.answered(0)  # one that is late never waits for answers above


def closed_loop(load: Load, rate: float, until_s: float) -> None:
    """Send one at a time, not before its time."""
    due_s = time.perf_counter()
    while due_s < until_s and not told_to_end():
        time.sleep(max(0.0, due_s - time.perf_counter()))
        load.send(time.perf_counter())
        while load.in_flight:
            load.answered(ANSWER_S)
        due_s = max(due_s + 1 / rate, time.perf_counter())


def main() -> int:
    """Run one load."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("export")
    parser.add_argument("--rate", type=float, default=3000)
    parser.add_argument("--reads", type=float, default=0.0)
    parser.add_argument("--closed", action="store_true")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    load = Load(asked.socket, asked.export, asked.reads, asked.seed)
    gc.disable()
    loop = closed_loop if asked.closed else open_loop
    print("ready", flush=True)
    loop(load, asked.rate, time.perf_counter() + asked.seconds)
    load.finish()
    json.dump(load.measured, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
