"""Clients that mean harm: each gets one error or is hung up on, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mirrord.control import server
from mirrord.control.server import BODY_BYTES_MAX, CONNECTIONS_MAX, USER_CONNECTIONS_MAX
from mirrord.control.sockets import Peer
from tests.control.serving import Served, serving

HEAD = b"POST /v1/disks HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /v1/disks HTTP/1.1\r\nHost: x\r\n"
IDLE_S = 0.4


async def is_served(served: Served) -> None:
    """Fail unless an honest client gets its answer at once."""
    async with asyncio.timeout(5):
        assert (await served.ask("GET", "/v1/disks"))[0] == 200


async def answer_to(served: Served, data: bytes) -> tuple[bytes, bytes]:
    """Send that; return the head and the body of the answer, before the server hangs up."""
    reader, writer = await asyncio.open_unix_connection(served.path, limit=1 << 20)
    writer.write(data)
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        body = await reader.readexactly(length)
    writer.close()
    return head, body


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",  # TLS
        b"GET\r\n\r\n",
        b"GET /v1/disks HTTP/9.9\r\n\r\n",
        b"GET /v1/disks HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /v1/di\x00sks HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/disks HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        HEAD + b"Content-Length: -1\r\n\r\n{}",
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        GET + b"X: " + b"x" * 9000 + b"\r\n\r\n",
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n",
        GET + b"".join(b"X%d: 1\r\n" % n for n in range(200)) + b"\r\n",
    ],
)
async def test_what_is_no_http(
    served: Served, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head, body = await answer_to(served, data)
    assert b" 400 Bad Request\r\n" in head
    assert b"Content-Type: application/json" in head
    problem = json.loads(body)
    assert problem["code"] == "usage"
    assert "\n" not in problem["message"]
    assert len(problem["message"]) < 300, "it is no echo"
    assert not served.api.asked
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    await is_served(served)


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 999999999999\r\n\r\n" + b"x" * 2 * BODY_BYTES_MAX,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
        b"8000\r\n" + b"x" * 0x8000 + b"\r\n8000\r\n" + b"x" * 0x8000 + b"\r\n",
        HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (
            len(bomb := gzip.compress(bytes(8 << 20))), bomb),
        HEAD + b"Content-Length: 65000\r\n\r\n" + b"[" * 65000,  # nested too deep
    ],
    ids=["declared", "chunked", "gzip", "deep"],
)  # fmt: skip
async def test_a_body_that_means_harm(served: Served, data: bytes) -> None:
    head, body = await answer_to(served, data)
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(body)["code"] == "usage"
    assert not served.api.asked
    await is_served(served)


@pytest.fixture
async def hasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """Serve with little patience."""
    monkeypatch.setattr(server, "IDLE_S", IDLE_S)
    monkeypatch.setattr(server, "BODY_DEADLINE_S", IDLE_S)
    async with serving(tmp_path / "h.sock") as one:
        yield one


@pytest.mark.parametrize(
    ("begun", "told"),
    [(b"GET /", b""), (HEAD + b"Content-Length: 9999\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n")],
    ids=["head", "body"],
)
async def test_a_client_that_sends_a_byte_at_a_time(
    hasty: Served, begun: bytes, told: bytes
) -> None:
    """It is given up however busy it looks, and nobody waits for it."""
    reader, writer = await asyncio.open_unix_connection(hasty.path)
    writer.write(begun)

    drip_delay_s = IDLE_S / 20

    async def drip() -> None:
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(drip_delay_s)

    dripping = asyncio.create_task(drip())
    await is_served(hasty)
    async with asyncio.timeout(10 * IDLE_S):
        try:
            line = await reader.readline()
        except ConnectionError:  # hung up on while there was something to read
            line = b""
        assert line == told
    dripping.cancel()
    writer.close()
    assert [asked for asked in hasty.api.asked if asked != ("disks",)] == []


async def test_clients_that_leave_in_the_middle(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    whole = HEAD + b'Content-Length: 30\r\n\r\n{"name": "vm", "location": "/"}'
    for cut in range(0, len(whole) - 1, 7):
        _, writer = await asyncio.open_unix_connection(served.path)
        writer.write(whole[:cut])
        writer.close()
        await writer.wait_closed()
    await is_served(served)
    assert served.api.asked == [("disks",)]
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.parametrize("first", ["/v1/events", "/v1/disks"])
async def test_a_client_that_only_asks(served: Served, first: str) -> None:
    """Requests behind one without an end, or answers that nobody reads, stop being taken."""
    asking = socket.socket(socket.AF_UNIX)
    asking.setblocking(False)
    asking.connect(str(served.path))
    one = b"GET /v1/disks HTTP/1.1\r\nHost: x\r\n\r\n"
    asking.send(f"GET {first} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    sent, stuck = 0, 0
    while stuck < 10 and sent < 8 << 20:
        try:
            sent += asking.send(one * 1000)
            stuck = 0
        except BlockingIOError:
            stuck += 1
            await is_served(served)
    assert sent < 4 << 20, "it is all taken, into memory"
    asking.close()
    await is_served(served)


def by_address(connection: socket.socket) -> Peer:
    """Take a client's address, `\\0UID-N`, for its user."""
    name: bytes = connection.getpeername()
    uid = int(name[1:].partition(b"-")[0]) if name else 0
    return Peer(1, uid, frozenset())


@pytest.fixture
async def connect(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[int], bytes]]:
    """Connect as a user, and return what comes of it at once: nothing, or a refusal."""
    monkeypatch.setattr(server, "peer", by_address)
    opened: list[asyncio.StreamWriter] = []

    async def connect_as(uid: int) -> bytes:
        one = socket.socket(socket.AF_UNIX)
        one.bind(f"\0{uid}-{id(served)}-{len(opened)}")
        one.connect(str(served.path))
        one.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=one)
        opened.append(writer)
        writer.write(GET + b"\r\n")
        async with asyncio.timeout(5):
            return await reader.readline()

    yield connect_as
    for writer in opened:
        writer.close()


async def test_a_user_has_so_many_connections(served: Served, connect: Callable) -> None:
    for _ in range(USER_CONNECTIONS_MAX):
        assert await connect(1000) == b"HTTP/1.1 200 OK\r\n"
    assert await connect(1000) == b"HTTP/1.1 503 Service Unavailable\r\n"
    assert await connect(1001) == b"HTTP/1.1 200 OK\r\n"
    await is_served(served)


async def test_all_users_together_leave_room_for_root(served: Served, connect: Callable) -> None:
    for number in range(CONNECTIONS_MAX):
        assert await connect(1000 + number) == b"HTTP/1.1 200 OK\r\n"
    assert await connect(5000) == b"HTTP/1.1 503 Service Unavailable\r\n"
    await is_served(served)


async def test_too_many_connections_of_root(
    served: Served, connect: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 1)
    assert await connect(0) == b"HTTP/1.1 200 OK\r\n"
    status, problem = await served.ask("GET", "/v1/disks")
    assert (status, problem["code"]) == (503, "busy")
    assert await connect(1000) == b"HTTP/1.1 200 OK\r\n"


async def test_what_was_closed_makes_room(
    served: Served, connect: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 1)
    await is_served(served)
    async with asyncio.timeout(5):
        while (await served.ask("GET", "/v1/disks"))[0] != 200:
            pass
