"""A server that means harm, or is none: nothing hangs, grows, stays behind, or tells a secret."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import socket
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from mirrord.core.geometry import KIB
from mirrord.smb import status as st
from mirrord.smb import wire
from mirrord.smb.channel import BREAKS_MAX, Reply
from mirrord.smb.lanes import Request
from mirrord.smb.seal import Signed, Signing, Unsealed
from mirrord.storage.backend import UnreachableError
from mirrord.storage.remote import DeniedError, LostError
from mirrord.storage.smb import server as server_module
from mirrord.storage.smb.line import Line
from tests.helpers import eventually_async
from tests.samba import Samba
from tests.storage.shares import QUICK, Login, MakeClient, Words
from tests.storage.shares import make_client as make_client
from tests.tcp_proxy import Proxy

SECRET = "hunter2-and-more"
SHORT = replace(QUICK, connect_s=1.0, silence_s=0.5, request_s=1.0, pending_s=1.5, check_s=0.05)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def framed(message: bytes) -> bytes:
    """Return a message as it is on the wire."""
    return len(message).to_bytes(4, "big") + message


def answer(message_id: int, *, command: int = wire.NEGOTIATE, body: bytes = b"") -> bytes:
    """Return an answer of a server."""
    head = bytearray(
        wire.pack_header(
            command, charge=1, credits=10, message_id=message_id, tree_id=0, session_id=0,
            sequence=0,
        )
    )  # fmt: skip
    head[16] |= wire.FROM_SERVER
    return bytes(head) + body


def smb_threads() -> list[str]:
    """Return the threads that connections have."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name == "smb" or name.startswith("msg_worker")]


@contextlib.asynccontextmanager
async def listening(handle: Handler) -> AsyncIterator[int]:
    """Be a server on a loopback port."""
    running: set[asyncio.Task[Any]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        writers.append(writer)
        ends = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            await handle(reader, writer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()  # what is closed but still has bytes to send, too
        await asyncio.sleep(0)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Never answer."""
    await asyncio.Event().wait()


async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close at the first message."""
    await reader.readexactly(4)


def says(*parts: bytes, then: Handler = silent) -> Handler:
    """Answer the first message by these bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(4)
        for part in parts:
            writer.write(part)
        await writer.drain()
        await then(reader, writer)

    return handle


async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer what was asked, again and again."""
    await reader.readexactly(4)
    message = framed(answer(0, body=bytes(60 * KIB)))
    while True:
        writer.write(message)
        await writer.drain()


_chance = random.Random(11)
BEFORE = {
    "silent": silent,
    "closes": closes,
    "garbage": says(_chance.randbytes(4000)),
    "http": says(b"HTTP/1.1 400 Bad Request\r\n\r\n", then=closes),
    "huge": says((1 << 24).to_bytes(4, "big"), bytes(1 << 20)),
    "empty": says(framed(b"")),
    "half": says(framed(answer(0, body=bytes(60)))[:50]),
    "header-only": says(framed(answer(0))),
    "wrong-id": says(framed(answer(77, body=bytes(64)))),
    "zeroes": says(framed(answer(0, body=bytes(400)))),
    "noise": says(framed(answer(0, body=_chance.randbytes(300)))),
    "long-names": says(framed(answer(0, body=b"\xff" * 30_000))),
    "sealed": says(framed(wire.TRANSFORM_MAGIC + bytes(100))),
    "floods": floods,
}


# smbprotocol's own transport believes any length up to 4 GiB, and clears memory for it.
TOO_MUCH_FOR_PLAIN = {"garbage", "http"}


@pytest.mark.parametrize(
    ("kind", "fast"),
    [
        *((kind, True) for kind in BEFORE),
        *((kind, False) for kind in BEFORE if kind not in TOO_MUCH_FOR_PLAIN),
    ],
)
async def test_what_is_no_server_is_given_up_in_time(
    samba: Samba, make_client: MakeClient, monkeypatch: Any, kind: str, fast: bool
) -> None:
    monkeypatch.setattr(server_module, "PATIENCE_S", 0)
    before = len(smb_threads())
    async with listening(BEFORE[kind]) as port:
        login = Login("somebody", Words(SECRET))
        client = make_client(samba, port=port, line=SHORT, fast=fast, login=login)
        with pytest.raises((LostError, DeniedError)) as caught:
            async with asyncio.timeout(20):
                await client.server.session()
        assert f"127.0.0.1:{port}" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
        tell_nothing(caught.value)
        with pytest.raises((UnreachableError, Exception)):
            await client.place("x").open()
    await eventually_async(lambda: len(smb_threads()) <= before, what="its threads end")


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
async def test_a_server_that_falls_silent_while_one_logs_on(
    samba: Samba, make_client: MakeClient, fast: bool
) -> None:
    """It has negotiated, and knows nothing yet."""
    with Proxy(samba.port) as proxy:
        client = make_client(samba, port=proxy.port, line=SHORT, fast=fast)
        real = client.server._login

        def login() -> Any:
            proxy.hold("to_client")
            return real()

        client.server._login = login
        with pytest.raises(LostError, match=f"127.0.0.1:{proxy.port}"):
            async with asyncio.timeout(20):
                await client.server.session()


# After authentication: a line whose peer is the test.


class Peer:
    """The other end of a line."""

    def __init__(self) -> None:
        self.lost: list[tuple[LostError, list[Request]]] = []
        self.held: list[Request] = []
        self.line: Line
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def request(self) -> bytes:
        """Return the next request."""
        length = int.from_bytes(await self.reader.readexactly(4), "big")
        return await self.reader.readexactly(length)

    async def over(self) -> LostError:
        """Wait until the line is lost; return why."""
        await eventually_async(lambda: self.lost, what="the line is lost")
        return self.lost[0][0]


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """A line that has begun, unsealed, and its peer."""
    one = Peer()
    left, right = socket.socketpair()
    loop = asyncio.get_running_loop()
    one.line = Line(
        SHORT,
        on_lost=lambda _, why, requests: one.lost.append((why, requests)),
        on_break=lambda *_: None,
        on_held=lambda request: one.held.append(request),
    )
    await loop.create_connection(lambda: one.line, sock=left)
    one.reader, one.writer = await asyncio.open_connection(sock=right)
    one.line.start(Unsealed(), 7, piece_bytes=256 * KIB, multi_credit=True)
    yield one
    one.line.lose("the end of the test")
    one.writer.close()
    await asyncio.sleep(0)


def read(length: int = 4096) -> Request:
    """Return a read."""
    return Request(wire.READ, wire.read_body(bytes(16), 0, length), payload_bytes=length)


async def ask(peer: Peer, request: Request) -> asyncio.Future[Reply]:
    """Have a line ask, and the peer receive it."""
    asked = peer.line.ask(request)
    await peer.request()
    return asked


@pytest.mark.parametrize(
    "message",
    [
        _chance.randbytes(2000),
        framed(b"short"),
        framed(bytes(64)),
        (0xFFFFFF).to_bytes(4, "big") + bytes(100),
        framed(answer(55, command=wire.READ, body=bytes(16))),
        framed(answer(0, command=wire.WRITE, body=bytes(16))),
        framed(wire.TRANSFORM_MAGIC + bytes(200)),
    ],
    ids=["garbage", "short", "zeroes", "too-long", "wrong-id", "wrong-command", "sealed"],
)
async def test_a_broken_answer_ends_the_line_at_once(peer: Peer, message: bytes) -> None:
    request = read()
    await ask(peer, request)
    peer.writer.write(message)
    why = await peer.over()
    assert "protocol" in str(why)
    assert request in peer.lost[0][1], "whoever waits is told"


async def test_requests_are_timed_more_finely_than_by_the_loop(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop's clock counts milliseconds, of which a server nearby needs half a one."""
    monkeypatch.setattr("mirrord.storage.smb.line.monotonic", lambda: 5.00075)
    request = read()
    await ask(peer, request)
    assert request.sent_s == 5.00075


async def test_an_unsigned_answer_on_a_signed_line_ends_it(peer: Peer) -> None:
    peer.line.channel.seal = Signed(Signing.AES_GMAC, bytes(16))
    await ask(peer, read())
    peer.writer.write(framed(answer(0, command=wire.READ, body=bytes(20))))
    assert "unsigned" in str(await peer.over())


async def test_a_repetition_that_the_server_holds_back_is_asked_again(peer: Peer) -> None:
    """It is still at what a lost line asked; only of a repetition that is no loss."""
    again = read()
    again.replays = 1
    held = bytearray(answer(0, command=wire.READ, body=bytes(9)))
    held[8:12] = st.FILE_NOT_AVAILABLE.to_bytes(4, "little")
    asked = await ask(peer, again)
    peer.writer.write(framed(bytes(held)))
    await eventually_async(lambda: peer.held, what="the owner is asked to repeat it")
    assert peer.held == [again]
    assert not asked.done()
    first = await ask(peer, read())
    held[24] = 1  # its message id
    peer.writer.write(framed(bytes(held)))
    assert (await first).status == st.FILE_NOT_AVAILABLE


@pytest.mark.parametrize("part", [b"", framed(answer(0, command=wire.READ))[:30]])
async def test_silence_and_half_a_message_end_the_line_in_time(peer: Peer, part: bytes) -> None:
    await ask(peer, read())
    peer.writer.write(part)
    assert "said nothing" in str(await peer.over())


async def test_a_server_that_only_pretends_to_work_ends_too(peer: Peer) -> None:
    """It says for ever that it is at it."""
    await ask(peer, read())
    pending = bytearray(answer(0, command=wire.READ, body=bytes(9)))
    pending[8:12] = (0x103).to_bytes(4, "little")
    pending[16] |= wire.ASYNC
    while not peer.lost:
        peer.writer.write(framed(bytes(pending)))
        with contextlib.suppress(ConnectionError):
            await peer.writer.drain()
        await asyncio.sleep(0)
    assert "has not answered" in str(peer.lost[0][0])


async def test_a_server_that_trickles_ends_when_its_time_is_over(peer: Peer) -> None:
    """A byte is news, but no answer."""
    await ask(peer, read())
    whole = framed(answer(0, command=wire.READ, body=bytes(4000)))
    trickle_delay_s = 0.02
    for at in range(len(whole) - 1):
        if peer.lost:
            break
        peer.writer.write(whole[at : at + 1])
        with contextlib.suppress(ConnectionError):
            await peer.writer.drain()
        await asyncio.sleep(trickle_delay_s)
    assert "has not answered" in str(await peer.over())


async def test_a_flood_of_breaks_takes_no_memory(peer: Peer) -> None:
    body = wire.Struct("<HHI16sIIIII").pack(44, 0, 0, bytes(16), 7, 0, 0, 0, 0)
    message = framed(answer(wire.UNSOLICITED, command=wire.OPLOCK_BREAK, body=body))
    with contextlib.suppress(ConnectionError):
        for _ in range(200):
            peer.writer.write(message * 100)
            await peer.writer.drain()
    assert "at once" in str(await peer.over())
    assert len(peer.line.channel.breaks) <= BREAKS_MAX
    assert peer.line.greetings.qsize() <= 1  # that it is over


# Secrets.


def tell_nothing(error: BaseException) -> None:
    """Look for the password in all that a handler of errors could print."""
    seen: list[str] = []
    pending: list[BaseException | None] = [error]
    known: set[int] = set()
    while pending:
        one = pending.pop()
        if one is None or id(one) in known:
            continue
        known.add(id(one))
        pending += [one.__cause__, one.__context__]
        shown = traceback.TracebackException.from_exception(one, capture_locals=True)
        seen += [str(one), repr(one), repr(one.args), "".join(shown.format())]
    for text in seen:
        assert SECRET not in text


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("channels", [1, 2])
async def test_no_password_in_errors_logs_or_objects(
    samba: Samba, make_client: MakeClient, caplog: pytest.LogCaptureFixture, fast: bool,
    channels: int,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    refused = make_client(samba, fast=fast, login=Login(samba.user, Words(SECRET)))
    with pytest.raises(DeniedError) as caught:
        await refused.server.session()
    tell_nothing(caught.value)
    with pytest.raises(Exception, match="wrong user or password") as error:
        await refused.open()
    tell_nothing(error.value)
    samba.put("secret.raw", b"x" * 512)
    client = make_client(samba, fast=fast, channels=channels)
    backend = await client.open("secret.raw")
    password = samba.password
    gc.collect()
    holders = [
        one
        for one in gc.get_objects()
        if type(one) is dict and one is not vars(samba) and "_text" not in one
        if any(value == password for value in one.values() if type(value) is str)
    ]
    assert not holders, "an object keeps the password"
    assert password not in repr(backend.facts())
    with Proxy(samba.port) as proxy:
        other = make_client(samba, fast=fast, port=proxy.port, line=SHORT)
        real = other.server._login

        def cut() -> Any:
            proxy.cut_after(5, "to_server")
            return real()

        other.server._login = cut
        with pytest.raises(LostError) as lost:
            await other.server.session()
    tell_nothing(lost.value)
    for text in (SECRET, password):
        assert text not in caplog.text
