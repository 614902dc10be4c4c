"""Those who follow moves share one look at the disk processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mirrord.control.messages import DiskStatus
from mirrord.service import state
from mirrord.service.config import Config
from mirrord.service.looks import Looks
from mirrord.service.moves import Moves
from mirrord.service.state import Directories, JobRecord

RECORD = JobRecord(id="1", disk="vm", source="/a", target="/b", created="2026-01-01T00:00:00+00:00")
LISTENERS = 20
LONG_S = 60.0


class CountingProcess:
    """A disk's process with a move that goes on; counts how often it is asked."""

    serving = True

    def __init__(self) -> None:
        self.looks = 0
        self.status = DiskStatus(
            name="vm", location="/a", size=1, read_only=False, cache="writeback", clients=0,
            job=msgspec.structs.replace(RECORD.as_job(), phase="copying"),
        )  # fmt: skip

    async def refresh(self) -> DiskStatus:
        self.looks += 1
        job = msgspec.structs.replace(self.status.job, bytes_copied=self.looks)
        return msgspec.structs.replace(self.status, job=job)


@pytest.fixture
def process() -> CountingProcess:
    """The process of disk vm."""
    return CountingProcess()


@pytest.fixture
async def moves(tmp_path: Path, process: CountingProcess) -> AsyncIterator[Moves]:
    """One move, which runs."""
    directories = Directories(tmp_path, tmp_path)
    (tmp_path / "jobs" / "1").mkdir(parents=True)
    state.write_record(directories.job("1") / "job.json", RECORD)
    async with asyncio.TaskGroup() as group:
        known: Any = process
        one = Moves(Config(), directories, group, lambda _: known, Looks())
        await one.load()
        one.disk_ready(process.status)
        yield one


async def test_all_who_wait_share_a_look(moves: Moves, process: CountingProcess) -> None:
    for round_ in (1, 2):
        waiting = (moves.changed(None, 0.01) for _ in range(LISTENERS))
        found = await asyncio.gather(*waiting)
        assert process.looks == round_
        assert {jobs[0].bytes_copied for jobs in found} == {round_}


async def test_who_gives_up_takes_nothing_from_the_others(
    moves: Moves, process: CountingProcess
) -> None:
    first = asyncio.create_task(moves.changed(None, 0.05))
    second = asyncio.create_task(moves.changed("vm", 0.05))
    await asyncio.sleep(0)
    first.cancel()
    assert [job.bytes_copied for job in await second] == [1]
    assert await moves.changed("other", 0.01) == []


async def test_a_new_phase_wakes_them(moves: Moves, process: CountingProcess) -> None:
    waiting = [asyncio.create_task(moves.changed(None, LONG_S)) for _ in range(LISTENERS)]
    await asyncio.sleep(0)  # they have begun to wait
    await asyncio.sleep(0)
    process.status = msgspec.structs.replace(
        process.status, job=msgspec.structs.replace(process.status.job, phase="mirroring")
    )
    moves.disk_ready(process.status)
    async with asyncio.timeout(5):
        found = await asyncio.gather(*waiting)
    assert {jobs[0].phase for jobs in found} == {"mirroring"}
    assert process.looks == 1
