"""The rules an NBD server is judged by (N1 to N17 of the protocol), over real sockets."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

import pytest

from mirrord.nbd import wire
from tests.frontends.conftest import Serve
from tests.frontends.doors import SIZE, MemoryDoor
from tests.frontends.raw import Answer, Raw
from tests.nbd.speaking import flags, go

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << n for n in range(5))


async def test_n1_a_flush_is_answered_when_the_door_has_flushed(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.close_gate("flush")
    client.send(WRITE, data=b"x")
    client.send(FLUSH, cookie=8)
    client.send(READ, 0, 1, cookie=9)
    assert [await client.answer(), await client.answer(1)] == [Answer(7), Answer(9, 0, b"x")]
    serving.door.open_gate()
    assert await client.answer() == Answer(8)
    client.close()


async def test_n2_fua_reaches_the_door(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    for command, name in ((WRITE, "write"), (TRIM, "trim"), (ZEROES, "write_zeroes")):
        for flag in (0, FUA):
            data = b"x" * 512 if command == WRITE else b""
            client.send(command, 0, 512, flag=flag, data=data)
            assert (await client.answer()).error == 0
            assert serving.door.log[-1][0] == name
            assert serving.door.log[-1][3]["fua"] is bool(flag)
    client.close()


async def test_n3_a_quick_request_overtakes_a_slow_one(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.close_gate("write")
    for cookie in (1, 2):
        client.send(WRITE, 0, cookie=cookie, data=b"x" * 512)
    client.send(READ, 0, 512, cookie=3)
    assert (await client.answer(512)).cookie == 3
    serving.door.open_gate()
    assert {(await client.answer()).cookie, (await client.answer()).cookie} == {1, 2}
    client.close()


async def test_n4_a_flush_covers_what_other_connections_wrote(serve: Serve) -> None:
    serving = await serve()
    one, two = await serving.enter(), await serving.enter()
    one.send(WRITE, 0, data=b"one")
    assert (await one.answer()).error == 0
    two.send(FLUSH)
    assert (await two.answer()).error == 0
    two.send(READ, 0, 3)
    assert (await two.answer(3)).data == b"one"
    assert [entry[0] for entry in serving.door.log] == ["write", "flush", "read"]
    for client in (one, two):
        client.close()


@pytest.mark.parametrize("gated", [False, True])
async def test_n5_a_structured_read_that_fails_is_an_error_chunk(serve: Serve, gated: bool) -> None:
    serving = await serve()
    client = await serving.enter(structured=True)
    serving.door.errors["read"] = OSError(errno.EIO, "broken")
    if gated:
        serving.door.close_gate("read")
    client.send(READ, 0, 512)
    await serving.door.until(started=1)
    if gated:
        serving.door.open_gate()
    flag, kind, payload = await client.chunk()
    assert (flag, kind, payload[:4]) == (1, wire.CHUNK_ERROR, b"\0\0\0\5")
    serving.door.errors.clear()
    client.send(READ, 8, 512, flag=DF)
    flag, kind, payload = await client.chunk()
    assert (flag, kind, payload) == (1, wire.CHUNK_OFFSET_DATA, b"\0" * 7 + b"\x08" + bytes(512))
    client.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
async def test_n6_a_read_that_fails_has_no_data_and_the_next_one_has(
    serve: Serve, number: int
) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.errors["read"] = OSError(number, "broken")
    client.send(READ, 0, 512)
    assert (await client.answer(512)).error == wire.to_wire(number)
    serving.door.errors.clear()
    client.send(READ, 0, 512)
    assert (await client.answer(512)).data == bytes(512)
    client.close()


async def test_n6_a_door_that_reads_too_little_breaks_nobodys_stream(
    serve: Serve, expect_log: Callable[..., None]
) -> None:
    expect_log("failed command=0")
    serving = await serve()
    client = await serving.enter()
    serving.door.short_reads = True
    client.send(READ, 0, 512)
    assert (await client.answer(512)).error == wire.EIO
    client.close()


async def test_a_defect_below_the_door_is_eio_for_one_request_and_logged(
    serve: Serve, expect_log: Callable[..., None]
) -> None:
    expect_log("failed command=3")
    serving = await serve()
    client = await serving.enter()
    serving.door.errors["flush"] = ZeroDivisionError("a defect")
    client.send(FLUSH)
    client.send(READ, 0, 4)
    assert await client.answer() == Answer(7, wire.EIO)
    assert (await client.answer(4)).data == bytes(4)
    client.close()


async def test_n7_block_status_has_both_contexts(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter(structured=True)
    client.send(STATUS, 0, 4096)
    chunks = [await client.chunk(), await client.chunk()]
    assert [flag for flag, _, _ in chunks] == [0, 1]
    half = (2048).to_bytes(4, "big")
    assert chunks[0][2] == b"\0\0\0\1" + half + bytes(4) + half + b"\0\0\0\3"
    assert chunks[1][2] == b"\0\0\0\2" + (4096).to_bytes(4, "big") + b"\0\0\0\1"
    client.send(STATUS, 0, 4096, flag=REQ_ONE)
    assert len((await client.chunk())[2]) == len((await client.chunk())[2]) == 12
    client.close()


async def test_n7_without_a_context_there_is_no_block_status(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    client.send(STATUS, 0, 4096)
    assert (await client.answer()).error == wire.EINVAL
    client.close()


async def test_n8_write_zeroes_says_what_the_client_wants(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.data[:] = b"x" * SIZE
    client.send(ZEROES, 0, 512)
    client.send(ZEROES, 512, 512, flag=NO_HOLE)
    client.send(ZEROES, 1024, 512, flag=FAST_ZERO)
    assert [(await client.answer()).error for _ in range(3)] == [0, 0, wire.ENOTSUP]
    assert [entry[3] for entry in serving.door.log] == [
        {"fua": False, "punch": True, "fast": False},
        {"fua": False, "punch": False, "fast": False},
        {"fua": False, "punch": True, "fast": True},
    ]
    assert serving.door.data[:1536] == bytes(1024) + b"x" * 512
    client.close()


async def test_n9_n10_trim_and_cache_reach_the_door(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    client.send(TRIM, 512, 1024)
    client.send(CACHE, 0, 4096)
    assert [(await client.answer()).error for _ in range(2)] == [0, 0]
    assert [entry[:3] for entry in serving.door.log] == [("trim", 512, 1024), ("cache", 0, 4096)]
    client.close()


@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        (WRITE, SIZE, 1, wire.ENOSPC),
        (WRITE, 2**64 - 1, 2, wire.ENOSPC),
        (READ, 2**64 - 1, 2, wire.EINVAL),
        (TRIM, SIZE, 1, wire.EINVAL),
        (99, 0, 0, wire.EINVAL),
    ],
)
async def test_n12_what_is_wrong_never_reaches_the_door(
    serve: Serve, command: int, offset: int, length: int, error: int
) -> None:
    serving = await serve()
    client = await serving.enter()
    client.send(command, offset, length, data=b"x" * length if command == WRITE else b"")
    assert await client.answer() == Answer(7, error)
    client.send(FLUSH)
    assert await client.answer() == Answer(7)
    assert [entry[0] for entry in serving.door.log] == ["flush"]
    client.close()


async def test_n12_a_read_only_disk_is_not_written(serve: Serve) -> None:
    serving = await serve(MemoryDoor(read_only=True))
    client = await serving.enter()
    for command in (WRITE, TRIM, ZEROES):
        client.send(command, 0, 512, data=b"x" * 512 if command == WRITE else b"")
        assert await client.answer() == Answer(7, wire.EPERM)
    assert serving.door.log == []
    client.close()


async def test_n12_errors_of_the_storage_become_those_of_nbd(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    for number, error in ((errno.EDQUOT, 28), (errno.EFBIG, 28), (errno.ENOMEM, 5)):
        serving.door.errors["write"] = OSError(number, "no")
        client.send(WRITE, data=b"x")
        assert await client.answer() == Answer(7, error)
    client.close()


async def test_n13_32_mib_go_both_ways(serve: Serve) -> None:
    length = 32 << 20
    serving = await serve(MemoryDoor(length))
    client = await serving.enter()
    client.send(WRITE, 0, data=b"x" * length)
    assert (await client.answer()).error == 0
    client.send(READ, 0, length)
    assert (await client.answer(length)).data == b"x" * length
    client.close()


async def test_n14_a_goodbye_waits_for_what_is_in_flight(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.close_gate("write")
    client.send(WRITE, 0, data=b"x" * 512)
    client.send(DISC)
    await serving.door.until(started=1)
    serving.door.open_gate()
    assert await client.closed() == wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, 7)
    assert serving.door.data[:512] == b"x" * 512


async def test_n14_an_end_of_file_is_a_goodbye_too(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.close_gate("read")
    client.send(READ, 0, 4)
    client.writer.write_eof()
    await serving.door.until(started=1)
    serving.door.open_gate()
    assert len(await client.closed()) == 20


async def test_r18_a_new_connection_waits_for_what_a_dead_one_has_in_flight(serve: Serve) -> None:
    """A guest that reconnects sends its write again, then a newer one. The old one comes last on a
    slow disk, and must not undo the newer one."""
    serving = await serve()
    door = serving.door
    old = await serving.enter()
    door.close_gate("write")
    old.send(WRITE, 0, data=b"a" * 512)
    await door.until(started=1)
    old.close()
    await serving.alone()
    new = await serving.enter()
    new.send(WRITE, 0, cookie=1, data=b"a" * 512)
    new.send(WRITE, 0, cookie=2, data=b"b" * 512)
    other = await serving.enter()  # so does everybody else who comes now
    other.send(READ, 0, 1, cookie=3)
    assert door.started.total() == 1
    door.open_gate()
    assert {(await new.answer()).cookie, (await new.answer()).cookie} == {1, 2}
    assert (await other.answer(1)).cookie == 3
    assert [entry[0] for entry in door.log[:2]] == ["write", "write"]
    assert bytes(door.data[:512]) == b"b" * 512
    new.close()
    other.close()


@pytest.mark.parametrize("length", [4096, 500_000])
async def test_r18_requests_of_a_dead_connection_run_to_their_end(
    serve: Serve, length: int
) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.close_gate("write")
    client.send(WRITE, 0, data=b"x" * length)
    await serving.door.until(started=1)
    client.close()
    await serving.alone()
    assert serving.door.running == 1
    serving.door.open_gate()
    await serving.door.until(ended=1)
    assert serving.door.data[:length] == b"x" * length
    other = await serving.enter()
    other.send(READ, 0, length)
    assert (await other.answer(length)).data == b"x" * length
    other.close()


@pytest.mark.parametrize("length", [512, 40_000, 300_000])
async def test_a_payload_never_changes_while_the_door_has_it(serve: Serve, length: int) -> None:
    serving = await serve()
    client = await serving.enter()
    serving.door.close_gate("write")
    client.send(WRITE, 0, data=b"a" * length)
    await serving.door.until(started=1)
    for _ in range(3):  # the receive buffer is used over and over
        client.send(READ, 0, 512)
        await client.answer(512)
        client.send(WRITE, SIZE, data=b"b" * length)
        assert (await client.answer()).error == wire.ENOSPC
    serving.door.open_gate()
    assert (await client.answer()).error == 0
    assert serving.door.data[:length] == b"a" * length
    client.close()


@pytest.mark.fault(2)
async def test_n15_in_flight_is_finished_and_the_rest_is_told(serve: Serve) -> None:
    serving = await serve()
    client, stranger = await serving.enter(), await Raw.open(serving.path)
    serving.door.close_gate("write")
    client.send(WRITE, 0, data=b"x", cookie=1)
    await serving.door.until(started=1)
    stopping = asyncio.create_task(serving.server.stop(10))
    await asyncio.sleep(0)
    client.send(READ, 0, 1, cookie=2)
    assert await client.answer() == Answer(2, wire.ESHUTDOWN)
    stranger.writer.write(flags() + go())
    assert await stranger.option_reply() == wire.REP_ERR_SHUTDOWN
    serving.door.open_gate()
    assert await client.answer() == Answer(1)
    assert await client.closed() == await stranger.closed() == b""
    assert await stopping
    assert serving.server.clients == []


@pytest.mark.parametrize("way", range(3))
async def test_n15_every_request_in_flight_is_answered_before_the_end(
    serve: Serve, way: int
) -> None:
    """However they wait: what ends in one turn of the loop is answered, to every client."""
    serving = await serve()
    clients = [await serving.enter() for _ in range(3)]
    serving.door.close_gate("write")
    for client in clients:
        while (serving.door.started.total() + 1) % 3 != way:
            client.send(READ, 0, 512)
            await client.answer(512)
        started = serving.door.started.total()
        client.send(WRITE, 0, data=b"x", cookie=1)
        await serving.door.until(started=started + 1)
    stopping = asyncio.create_task(serving.server.stop(10))
    await asyncio.sleep(0)
    serving.door.open_gate()
    for client in clients:
        assert await client.answer() == Answer(1)
        assert await client.closed() == b""
    assert await stopping


async def test_n15_with_a_successor_nothing_is_refused(serve: Serve) -> None:
    """A client that reconnects would pass ESHUTDOWN on to its guest; silence makes it wait."""
    serving = await serve()
    client, stranger = await serving.enter(), await Raw.open(serving.path)
    serving.door.close_gate("write")
    client.send(WRITE, 0, data=b"x", cookie=1)
    await serving.door.until(started=1)
    stopping = asyncio.create_task(serving.server.stop(10, coming_back=True))
    assert await stranger.closed() == b""
    answer = asyncio.create_task(client.answer())
    client.send(READ, 0, 1, cookie=2)
    serving.door.open_gate()
    assert await answer == Answer(1)
    assert await client.closed() == b""
    assert await stopping


async def test_n15_a_request_that_hangs_does_not_hold_up_the_end(
    serve: Serve, expect_log: Callable[..., None]
) -> None:
    expect_log("stopped in_flight=1")
    serving = await serve()
    client = await serving.enter()
    serving.door.close_gate("write")
    client.send(WRITE, 0, data=b"x")
    await serving.door.until(started=1)
    assert not await serving.server.stop(0.05)
    assert await client.closed() == b""
    assert serving.door.running == 1


async def test_n16_the_empty_name_is_the_disk_and_another_is_unknown(serve: Serve) -> None:
    serving = await serve()
    client = await Raw.open(serving.path)
    client.writer.write(flags() + go(b"other") + go(b""))
    assert await client.option_reply() == wire.REP_ERR_UNKNOWN
    assert await client.option_reply() == wire.REP_INFO
    client.close()


async def test_n16_abort_is_acknowledged_then_closed(serve: Serve) -> None:
    serving = await serve()
    client = await Raw.open(serving.path)
    client.writer.write(flags() + wire.pack_option(wire.OPT_ABORT))
    assert await client.option_reply() == wire.REP_ACK
    assert await client.closed() == b""


async def test_n17_unknown_client_flags_close(serve: Serve) -> None:
    serving = await serve()
    client = await Raw.open(serving.path)
    client.writer.write(flags(0x80000003))
    assert await client.closed() == b""


async def test_requests_behind_go_are_served(serve: Serve) -> None:
    """A client that knows the export need not wait for the last reply of the handshake."""
    serving = await serve()
    client = await Raw.open(serving.path)
    client.writer.write(flags() + go() + wire.pack_request(FLUSH, 7, 0, 0))
    while await client.option_reply() != wire.REP_ACK:
        pass
    assert await client.answer() == Answer(7)
    client.close()


async def test_the_server_counts_what_its_clients_do(serve: Serve) -> None:
    serving = await serve()
    client = await serving.enter()
    client.send(WRITE, 0, data=b"x" * 1000)
    client.send(READ, 0, 5000)
    await client.answer()
    await client.answer(5000)
    (shown,) = serving.server.clients
    assert (shown.requests, shown.in_flight) == (2, 0)
    assert shown.bytes_in > 1000 + 56
    assert shown.bytes_out > 5000 + 32
    client.send(DISC)
    await client.closed()
    await serving.alone()


async def test_a_server_serves_once(serve: Serve) -> None:
    serving = await serve()
    with pytest.raises(ValueError, match="already"):
        await serving.server.serve(None)  # type: ignore[arg-type]
