"""The private channel: what a disk process says is heard in the order in which it says it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from mirrord.control.messages import Call, DiskStatus, Job, PhaseName, Reply
from mirrord.service.channel import Channel

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
