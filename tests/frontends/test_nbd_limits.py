"""Every limit a client meets: it waits, is refused or is dropped, and others go on."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Callable
from typing import Any

import pytest

from mirrord.frontends import nbd_server
from mirrord.nbd import wire
from tests.frontends.conftest import Serve, Serving
from tests.frontends.doors import SIZE, WAIT_S, MemoryDoor
from tests.frontends.raw import Answer, Raw
from tests.helpers import eventually_async
from tests.nbd.speaking import STRUCTURED, flags, go

READ, WRITE, DISC, FLUSH = range(4)
KIB, MIB = 1 << 10, 1 << 20
SOON_S = 0.1  # a deadline that is meant to pass


async def is_served(serving: Serving) -> None:
    """Assert that a new client gets its bytes."""
    client = await serving.enter()
    client.send(READ, 0, 512)
    assert (await client.answer(512)).error == 0
    client.send(DISC)
    assert await client.closed() == b""


# The handshake


async def test_cve_2024_7409_a_handshake_has_a_deadline(serve: Serve) -> None:
    serving = await serve(handshake_s=SOON_S)
    silent, slow = await Raw.open(serving.path), await Raw.open(serving.path)
    slow.writer.write(flags() + STRUCTURED[:10])
    assert await silent.closed() == await slow.closed() == b""


async def test_cve_2024_7409_a_guest_may_idle_for_ever(serve: Serve) -> None:
    serving = await serve(handshake_s=SOON_S, stall_s=SOON_S)
    client = await serving.enter()
    other = await Raw.open(serving.path)
    await other.closed()
    client.send(READ, 0, 4)
    assert (await client.answer(4)).error == 0
    client.close()


async def test_strangers_make_room_for_a_guest(serve: Serve) -> None:
    """Idle handshakes up to the limit: the oldest goes, and a guest is served at once."""
    serving = await serve(connections_max=5)
    guest = await serving.enter()
    strangers = [await Raw.open(serving.path) for _ in range(4)]
    await is_served(serving)
    assert await strangers[0].closed() == b""
    guest.send(READ, 0, 4)
    assert (await guest.answer(4)).error == 0
    for client in (guest, *strangers[1:]):
        client.close()


async def test_300_idle_handshakes_leave_100_connections(serve: Serve) -> None:
    serving = await serve()
    strangers = [await Raw.open(serving.path) for _ in range(300)]
    await is_served(serving)
    open_still = [s for s in strangers if not s.reader.at_eof()]
    assert len(open_still) <= serving.server.limits.connections_max
    for client in strangers:
        client.close()


async def test_an_export_has_16_clients(serve: Serve) -> None:
    serving = await serve()
    clients = [await serving.enter() for _ in range(16)]
    with pytest.raises(PermissionError):
        await serving.enter()
    old = await Raw.open(serving.path)
    old.writer.write(flags() + wire.pack_option(wire.OPT_EXPORT_NAME, b"disk"))
    assert await old.closed() == b""
    clients[0].send(DISC)
    await clients[0].closed()
    await is_served(serving)
    for client in clients:
        client.close()


async def test_cve_2017_15119_an_option_above_64_kib_is_not_waited_for(serve: Serve) -> None:
    serving = await serve()
    client = await Raw.open(serving.path)
    client.writer.write(flags() + wire.OPTION.pack(wire.OPTION_MAGIC, 99, 2**32 - 1))
    assert await client.closed() == b""
    await is_served(serving)


async def test_20000_options_close(serve: Serve) -> None:
    serving = await serve()
    client = await Raw.open(serving.path)
    client.writer.write(flags() + STRUCTURED * 20_000)
    assert len(await client.closed()) <= 64 * wire.OPTION_REPLY.size
    await is_served(serving)


# In flight


async def test_64_requests_are_in_flight_and_the_others_wait(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.close_gate("read")
    for cookie in range(200):
        client.send(READ, 0, 512, cookie=cookie)
    await serving.door.until(started=64)
    other = await serving.enter()
    other.send(FLUSH)
    assert await other.answer() == Answer(7)
    assert serving.door.started["read"] == 64
    serving.door.open_gate()
    assert {(await client.answer(512)).cookie for _ in range(200)} == set(range(200))
    assert serving.door.running_max <= 65
    for each in (client, other):
        each.close()


async def test_what_a_connection_holds_is_bounded(serve: Serve) -> None:
    serving = await serve(MemoryDoor(4 * MIB), held_bytes_max=2 * MIB, payload_bytes_max=MIB)
    client = await serving.enter()
    serving.door.close_gate("write")
    for cookie in range(6):
        client.send(WRITE, 0, cookie=cookie, data=b"x" * MIB)
    await serving.door.until(started=2)
    await is_served(serving)
    assert serving.door.started["write"] == 2
    serving.door.open_gate()
    assert {(await client.answer()).cookie for _ in range(6)} == set(range(6))
    client.close()


async def test_above_the_total_others_go_on_in_small_steps_and_in_turn(serve: Serve) -> None:
    limits = {"held_total_bytes_max": 2 * MIB, "held_allowance_bytes": 64 * KIB}
    serving = await serve(**limits)
    greedy, large, late, small = [await serving.enter() for _ in range(4)]
    serving.door.close_gate("write")
    for cookie in range(4):
        greedy.send(WRITE, 0, cookie=cookie, data=b"x" * (512 * KIB))
    await serving.door.until(started=4)
    large.send(WRITE, 0, data=b"y" * (512 * KIB), cookie=10)
    late.send(WRITE, 0, data=b"z" * (512 * KIB), cookie=11)
    small.send(READ, 0, 64 * KIB)
    assert (await small.answer(64 * KIB)).error == 0
    await eventually_async(lambda: len(serving.server._waiting) == 2, what="both wait")
    assert serving.door.started["write"] == 4
    serving.door.open_gate()
    assert [await large.answer(), await late.answer()] == [Answer(10), Answer(11)]
    for _ in range(4):
        assert (await greedy.answer()).error == 0
    assert serving.server._held_bytes == 0
    for client in (greedy, large, late, small):
        client.close()


async def test_a_client_that_leaves_the_queue_lets_the_next_one_in(serve: Serve) -> None:
    serving = await serve(held_total_bytes_max=MIB, held_allowance_bytes=KIB)
    greedy, gone, next_one = [await serving.enter() for _ in range(3)]
    serving.door.close_gate("write")
    greedy.send(WRITE, 0, data=b"x" * MIB)
    await serving.door.until(started=1)
    gone.send(WRITE, 0, data=b"y" * MIB)
    await eventually_async(lambda: len(serving.server._waiting) == 1, what="one waits")
    next_one.send(WRITE, 0, data=b"z" * MIB)
    await eventually_async(lambda: len(serving.server._waiting) == 2, what="two wait")
    gone.close()
    serving.door.open_gate()
    assert await next_one.answer() == Answer(7)
    await eventually_async(lambda: not serving.server._waiting, what="nobody waits")
    for client in (greedy, next_one):
        client.close()


async def test_n13_a_write_above_32_mib_is_dropped_and_a_read_refused(serve: Serve) -> None:
    door = MemoryDoor()
    door.size = 1 << 40
    serving = await serve(door)
    client = await serving.enter()
    client.send(READ, 0, 32 * MIB + 1)
    assert await client.answer() == Answer(7, wire.EINVAL)
    client.writer.write(wire.pack_request(WRITE, 8, 0, 32 * MIB + 1))
    assert await client.closed() == b""
    assert door.log == []


# Replies nobody reads, payloads that never come


async def test_unread_replies_stop_their_client_and_nobody_else(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    client.writer.transport.pause_reading()
    for cookie in range(60):
        client.send(READ, 0, MIB, cookie=cookie)
    await serving.door.until(started=8)
    await is_served(serving)
    await eventually_async(lambda: serving.server._held_bytes >= 8 * MIB, what="it is full")
    assert serving.door.started["read"] < 20
    assert serving.server._held_bytes < 20 * MIB
    client.writer.transport.resume_reading()
    assert {(await client.answer(MIB)).cookie for _ in range(60)} == set(range(60))
    await eventually_async(lambda: serving.server._held_bytes == 0, what="all is read")
    client.close()


async def test_a_client_that_never_reads_can_be_stopped(
    serve: Serve, expect_log: Callable[..., None]
) -> None:
    expect_log("stopped in_flight=0")
    serving = await serve()
    client = await serving.enter()
    client.writer.transport.pause_reading()
    client.send(READ, 0, MIB)
    await serving.door.until(started=1)
    assert not await serving.server.stop(SOON_S)
    client.close()


@pytest.mark.parametrize("length", [1000, 500_000])
async def test_a_payload_that_stalls_is_dropped_with_nothing_applied(
    serve: Serve, length: int
) -> None:
    serving = await serve(stall_s=SOON_S)
    client = await serving.enter()
    client.writer.write(wire.pack_request(WRITE, 7, 0, length) + b"x" * (length - 1))
    assert await client.closed() == b""
    assert serving.door.log == []
    assert serving.server._held_bytes == 0
    await is_served(serving)


async def test_half_a_request_stalls_too(serve: Serve) -> None:
    serving = await serve(stall_s=SOON_S)
    client = await serving.enter()
    client.writer.write(wire.pack_request(FLUSH, 7, 0, 0)[:20])
    assert await client.closed() == b""


async def test_a_slow_payload_that_comes_is_written(serve: Serve) -> None:
    serving = await serve(stall_s=4 * SOON_S)
    client = await serving.enter()
    client.writer.write(wire.pack_request(WRITE, 7, 0, 40_000))
    loop = asyncio.get_running_loop()
    began, sent = loop.time(), 0
    while loop.time() < began + 6 * SOON_S:
        client.writer.write(b"x" * 1000)
        sent += 1000
        await _pass_time(SOON_S)
    client.writer.write(b"x" * (40_000 - sent))
    assert await client.answer() == Answer(7)
    assert serving.door.data[:40_000] == b"x" * 40_000
    client.close()


async def _pass_time(duration_s: float) -> None:
    """Let time pass that is itself the subject: bytes that come slowly."""
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(duration_s, passed.set)
    await passed.wait()


@pytest.mark.parametrize("length", [1000, 500_000])
async def test_a_client_that_goes_away_inside_a_payload_has_written_nothing(
    serve: Serve, length: int
) -> None:
    serving = await serve()
    client = await serving.enter()
    client.writer.write(wire.pack_request(WRITE, 7, 0, length) + b"x" * (length - 1))
    client.writer.write_eof()
    assert await client.closed() == b""
    await serving.alone()
    assert serving.door.log == []
    assert serving.server._held_bytes == 0


# Descriptors


async def test_without_a_descriptor_accepting_pauses(
    serve: Serve, expect_log: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log("paused accepting")
    monkeypatch.setattr(nbd_server, "ACCEPT_PAUSE_S", 0.05)
    serving = await serve()
    guest = await serving.enter()
    waiting = socket.socket(socket.AF_UNIX)
    waiting.setblocking(False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        _use_up_descriptors(fillers)
        waiting.connect(serving.path)
        await eventually_async(lambda: serving.server._resume is not None, what="it pauses")
        guest.send(READ, 0, 4)
        assert (await guest.answer(4)).error == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)
    reader, writer = await asyncio.open_unix_connection(sock=waiting)
    async with asyncio.timeout(WAIT_S):
        assert await reader.readexactly(wire.GREETING.size)
    writer.close()
    guest.close()


def _use_up_descriptors(fillers: list[int]) -> None:
    while True:
        try:
            fillers.append(os.dup(0))
        except OSError:
            return


async def test_stopping_while_accepting_pauses(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[..., None]
) -> None:
    expect_log("paused accepting")
    serving = await serve()
    listener: Any = serving.server._listener

    class NoDescriptor:
        """A listener that has none to give."""

        def accept(self) -> None:
            raise OSError(24, "Too many open files")

        def fileno(self) -> int:
            return int(listener.fileno())

    monkeypatch.setattr(serving.server, "_listener", NoDescriptor())
    serving.server._accept()
    monkeypatch.setattr(serving.server, "_listener", listener)
    assert serving.server._resume is not None
    assert await serving.server.stop(5)
    assert serving.server._resume.cancelled()
    assert serving.door.size == SIZE


async def test_bytes_behind_a_goodbye_are_not_looked_at(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    client.send(DISC)
    client.writer.write(go() * 1000)
    assert await client.closed() == b""


async def test_a_violation_closes_and_what_had_begun_still_ends(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.close_gate("write")
    client.send(WRITE, 0, data=b"x" * 512)
    client.writer.write(b"?" * 28)
    assert await client.closed() == b""
    serving.door.open_gate()
    await serving.door.until(ended=1)
    assert serving.door.data[:512] == b"x" * 512
    await is_served(serving)


async def test_a_burst_of_strangers_is_thinned_out_before_it_is_greeted(serve: Serve) -> None:
    serving = await serve(connections_max=2)
    burst = [socket.socket(socket.AF_UNIX) for _ in range(12)]
    for stranger in burst:
        stranger.connect(serving.path)  # all of them wait when the server gets its turn
    await is_served(serving)
    assert len(serving.server._connections) <= 2
    for stranger in burst:
        stranger.close()


async def test_a_connection_that_can_not_be_set_up_is_forgotten(serve: Serve) -> None:
    serving = await serve()
    server, loop = serving.server, asyncio.get_running_loop()

    class FullLoop:
        """A loop that can't watch another socket."""

        create_task = staticmethod(loop.create_task)

        async def connect_accepted_socket(self, *_arguments: object) -> None:
            raise OSError(28, "No space left on device")

    server._loop = FullLoop()  # type: ignore[assignment]
    ours, theirs = socket.socketpair()
    server._admit(theirs)
    await eventually_async(lambda: not server._connections, what="it is forgotten")
    server._loop = loop
    assert theirs.fileno() == -1
    ours.close()
    await is_served(serving)


async def test_a_long_batch_lets_others_have_their_turn(serve: Serve) -> None:
    """5,000 requests in one go, each answered at once: another client is served in between."""
    serving = await serve()
    greedy, guest = await serving.enter(), await serving.enter()
    greedy.writer.write(wire.pack_request(FLUSH, 7, 0, 0) * 5000)
    guest.send(READ, 0, 4)
    assert (await guest.answer(4)).error == 0
    assert serving.door.started["flush"] < 5000
    for _ in range(5000):
        assert await greedy.answer() == Answer(7)
    for client in (greedy, guest):
        client.close()
