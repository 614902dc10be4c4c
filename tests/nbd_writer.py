"""A writer over NBD that remembers every acknowledged write, and a client small enough to trust.

The client is written for the tests alone, on purpose: it shares no line with mirrord's own. It
speaks fixed newstyle with simple replies over a unix socket.

The writer keeps several requests in flight, never two that overlap. When the connection breaks it
connects again and sends what was not answered once more, as QEMU does with `reconnect-delay`; so
at the end each block holds exactly its last write, and nothing else may be found there.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tests.helpers import eventually

BLOCK_BYTES = 4096
BLOCKS_PER_WRITE_MAX = 8
DEPTH = 4  # requests in flight
ANSWER_S = 30  # a killed disk process is back within one; the rest is for a loaded machine

READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1  # flag: durable before it is answered


class Client:
    """One connection, after its handshake."""

    def __init__(self, path: str, export: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_S)
        self._reader = self._socket.makefile("rb")
        self.size = 0
        try:
            self._socket.connect(path)
            self._greet(export)
        except BaseException:
            self.close()
            raise

    def _greet(self, export: str) -> None:
        """Do the handshake."""
        magic, option_magic, flags = struct.unpack(">8s8sH", self._take(18))
        assert (magic, option_magic) == (b"NBDMAGIC", b"IHAVEOPT")
        assert flags & 3 == 3, "not fixed newstyle"
        name = export.encode()
        body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        go = struct.pack(">I8sII", 3, b"IHAVEOPT", 7, len(body)) + body
        self._socket.sendall(go)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._take(20))
            data = self._take(length)
            if kind == 3 and data[:2] == b"\0\0":  # NBD_REP_INFO, NBD_INFO_EXPORT
                (self.size,) = struct.unpack(">Q", data[2:10])
            elif kind == 1:  # NBD_REP_ACK
                return
            elif kind & 1 << 31:
                raise OSError(f"refused: {kind & 0xFFFF} {data.decode(errors='replace')}")

    def _take(self, length: int) -> bytes:
        data = self._reader.read(length)
        if len(data) != length:
            raise ConnectionError("the server closed the connection")
        return data

    def send(
        self, command: int, cookie: int, offset: int, length: int, data: bytes = b"", flags: int = 0
    ) -> None:
        """Send one request."""
        header = struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)
        self._socket.sendall(header + data)

    def receive(self) -> tuple[int, int]:
        """Return cookie and error of the next simple reply without payload."""
        magic, error, cookie = struct.unpack(">IIQ", self._take(16))
        assert magic == 0x67446698
        return cookie, error

    def read(self, offset: int, length: int) -> bytes:
        """Read a range, with nothing else in flight."""
        self.send(READ, 0, offset, length)
        _, error = self.receive()
        assert error == 0, f"read at {offset}: error {error}"
        return self._take(length)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._reader.close()
        self._socket.close()


@dataclass(frozen=True)
class Request:
    """One write, trim or write-zeroes of whole blocks."""

    cookie: int
    command: int
    block: int
    blocks: int
    flags: int = 0

    def data(self) -> bytes:
        """Return what it writes: each block names itself and the request."""
        if self.command != WRITE:
            return b""
        return b"".join(content(self.block + n, self.cookie) for n in range(self.blocks))

    def overlaps(self, other: Request) -> bool:
        """Tell whether both touch one block."""
        return self.block < other.block + other.blocks and other.block < self.block + self.blocks


def content(block: int, sequence: int) -> bytes:
    """Return a block's content after write `sequence`: both numbers, all over. 0: zeroes."""
    if sequence == 0:
        return bytes(BLOCK_BYTES)
    return struct.pack("<QQ", block, sequence) * (BLOCK_BYTES // 16)


class Writer:
    """Writes until told to stop. `expected` has the last write of each block, 0 for zeroes."""

    def __init__(self, path: str, export: str, seed: int, hot_blocks: int | None = None) -> None:
        self.expected: dict[int, int] = {}
        self.acknowledged = 0
        self.reconnects = 0
        self.trouble: BaseException | None = None
        self._path, self._export = path, export
        self._chance = random.Random(seed)
        self._client = Client(path, export)
        self._blocks = self._client.size // BLOCK_BYTES
        self._hot_blocks = min(hot_blocks or self._blocks, self._blocks)
        self._in_flight: dict[int, Request] = {}
        self._sequence = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to write, in a thread of its own."""
        self._thread.start()

    def wait_acknowledged(self, more: int, deadline_s: float = 30) -> None:
        """Wait until `more` further requests were acknowledged."""
        wanted = self.acknowledged + more
        eventually(
            lambda: self.acknowledged >= wanted or self.trouble,
            deadline_s, f"{more} more acknowledged writes",
        )  # fmt: skip
        self._raise_trouble()

    def stop(self) -> None:
        """Wait for the answers of what is in flight, and end."""
        self._ending.set()
        self._thread.join(timeout=2 * ANSWER_S)
        assert not self._thread.is_alive(), "the writer hangs"
        self._client.close()
        self._raise_trouble()

    def check(self, read: Callable[[int, int], bytes]) -> None:
        """Assert that `read(offset, length)` finds each block's last acknowledged write."""
        lost = [
            block
            for block, sequence in sorted(self.expected.items())
            if read(block * BLOCK_BYTES, BLOCK_BYTES) != content(block, sequence)
        ]
        assert not lost, f"{len(lost)} of {len(self.expected)} blocks are wrong: {lost[:20]}"

    def _raise_trouble(self) -> None:
        if self.trouble is not None:
            raise AssertionError("the writer met an error") from self.trouble

    def _run(self) -> None:
        try:
            while not self._ending.is_set() or self._in_flight:
                try:
                    self._step()
                except OSError:  # a broken connection, or the time is over
                    self._reconnect()
        except BaseException as trouble:
            self.trouble = trouble

    def _step(self) -> None:
        while len(self._in_flight) < DEPTH and not self._ending.is_set():
            request = self._choose()
            if request is None:
                break
            self._in_flight[request.cookie] = request
            self._send(request)
        if self._in_flight:
            self._finish(*self._client.receive())

    def _choose(self) -> Request | None:
        """Return a request that overlaps none in flight, or None after a few attempts."""
        for _ in range(4):
            command = self._chance.choices([WRITE, ZEROES, TRIM], [14, 1, 1])[0]
            blocks = self._chance.randint(1, BLOCKS_PER_WRITE_MAX)
            block = self._chance.randrange(self._hot_blocks - blocks)
            request = Request(self._sequence + 1, command, block, blocks)
            if not any(request.overlaps(other) for other in self._in_flight.values()):
                self._sequence += 1
                return request
        return None

    def _send(self, request: Request) -> None:
        length = request.blocks * BLOCK_BYTES
        offset = request.block * BLOCK_BYTES
        self._client.send(
            request.command, request.cookie, offset, length, request.data(), request.flags
        )

    def _finish(self, cookie: int, error: int) -> None:
        request = self._in_flight.pop(cookie)
        assert error == 0, f"{request}: error {error}"
        sequence = cookie if request.command == WRITE else 0
        for block in range(request.block, request.block + request.blocks):
            self.expected[block] = sequence
        self.acknowledged += 1

    def _reconnect(self) -> None:
        self._client.close()
        self.reconnects += 1
        self._client = eventually(self._connect, ANSWER_S, "the export is back")
        for request in self._in_flight.values():
            self._send(request)

    def _connect(self) -> Client | None:
        try:
            return Client(self._path, self._export)
        except (ConnectionError, FileNotFoundError):
            return None
