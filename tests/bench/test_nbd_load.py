"""A load can't make itself and its server wait for each other."""

from __future__ import annotations

import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import nbd_load
from tests.nbd_writer import BLOCK_BYTES

SIZE = 1 << 20
ROOM_BYTES = 4608  # for answers: the least that the kernel gives
LOAD_S = 0.5


def serve(listener: socket.socket) -> None:
    """Answer each write before the next one is read, as a server with one thread does."""
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as reader:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM_BYTES)
        connection.sendall(struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3))
        reader.read(4)
        (length,) = struct.unpack(">12xI", reader.read(16))
        reader.read(length)
        info = struct.pack(">HQH", 0, SIZE, 1)
        for kind, data in ((3, info), (1, b"")):
            connection.sendall(struct.pack(">QIII", 0x3E889045565A9, 7, kind, len(data)) + data)
        while header := reader.read(28):
            (cookie,) = struct.unpack_from(">8xQ", header)
            reader.read(BLOCK_BYTES)
            connection.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie))


@pytest.fixture
def server() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(folder, "nbd.sock"))
        listener.bind(path)
        listener.listen(1)
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield path


def test_a_load_that_is_late_takes_answers_while_it_sends(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_load, "told_to_end", lambda: False)
    load = nbd_load.Load(server, "disk", reads=0.0, seed=1)
    nbd_load.open_loop(load, 1e6, time.perf_counter() + LOAD_S)  # always late
    load.finish()
    assert len(load.measured) > nbd_load.IN_FLIGHT_MAX
    assert load.in_flight == 0
    load.close()
