"""The private channel: what a disk process says is heard in the order in which it says it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import uvloop

from mirrord.control.messages import Call, DiskStatus, Job, PhaseName, Reply
from mirrord.service.channel import Channel, ChannelServer

soon_delay_s = 0.002  # until the other end has noticed
PHASES: list[PhaseName] = ["copying", "mirroring", "cutting-over", "retiring", "done"]


def job(phase: PhaseName) -> Job:
    return Job(id="1", disk="vm", phase=phase, source="/a", target="/b")


def status(phase: PhaseName) -> DiskStatus:
    return DiskStatus(
        name="vm", location="/a", size=1, read_only=False, cache="writeback", clients=0,
        job=job(phase),
    )  # fmt: skip


def line(call_id: int | None, said: DiskStatus | Job) -> bytes:
    return msgspec.json.encode(Reply(call_id, msgspec.Raw(msgspec.json.encode(said)))) + b"\n"


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[Path]:
    """A process whose move changes its phase before and after each answer, all in one packet."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = msgspec.json.decode(await reader.readline(), type=Call)
        before, now, *later = PHASES
        said = [line(None, job(before)), line(call.id, status(now))]
        writer.write(b"".join(said + [line(None, job(phase)) for phase in later]))
        writer.close()

    path = tmp_path / "channel"
    server = await asyncio.start_unix_server(serve, path)
    yield path
    server.close()
    await server.wait_closed()


def test_news_concern_no_daemon_that_died(tmp_path: Path) -> None:
    """At whatever turn of the loop that is noticed: once it failed the move that told of itself."""

    async def tell_the_dead() -> None:
        path = tmp_path / "channel"
        server = ChannelServer({}, guests)
        await server.listen(path)
        alive = await asyncio.open_unix_connection(path)
        try:
            for _ in range(20):
                await tell_one(server, path)
            told = [await alive[0].readline() for _ in range(20 * 31)]
        finally:
            alive[1].close()
            await server.close(path)
        assert all(b'"phase":"' in line for line in told)

    async def tell_one(server: ChannelServer, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.connect(str(path))
            await asyncio.sleep(soon_delay_s)
            server.tell(job("copying"))
            await asyncio.sleep(soon_delay_s)
        # It is closed with news unread, and so reset.
        for _ in range(30):
            server.tell(job("mirroring"))
            await asyncio.sleep(0)

    loops = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with socket.socket(socket.AF_UNIX) as guests, loops as runner:
        runner.run(tell_the_dead())


async def test_an_answer_is_heard_between_the_news_around_it(process: Path) -> None:
    heard: list[PhaseName] = []
    channel = await Channel.connect(process, lambda job: heard.append(job.phase))

    async def ask() -> None:
        answer = await channel.call("status", DiskStatus, deadline_s=10)
        assert answer.job is not None
        heard.append(answer.job.phase)

    async with asyncio.timeout(10):
        await asyncio.gather(ask(), channel.run())
    assert heard == PHASES
