"""Jobs are found by a beginning of their id, for each who asks among those that he may see."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from mirrord.errors import DamagedError, RefusedError
from mirrord.service import history, state
from mirrord.service.config import Config
from mirrord.service.looks import Looks
from mirrord.service.moves import Moves
from mirrord.service.state import Directories, JobRecord
from mirrord.service.supervisor import DiskProcess

RECORD = JobRecord(id="", disk="", source="/a", target="/b", created="2026-01-01T00:00:00+00:00")
SEEN, HIDDEN, OTHER, DAMAGED = "1a-seen", "1a-hidden", "1b-other", "1c-damaged"


def no_process(disk: str) -> DiskProcess:
    raise RefusedError("unknown-disk", disk)


@pytest.fixture
async def moves(tmp_path: Path, expect_log: Callable[..., None]) -> AsyncIterator[Moves]:
    """Two moves of disks named `seen`, one of another disk, and one whose record is damaged."""
    expect_log("job damaged")
    directories = Directories(tmp_path, tmp_path)
    for job_id, disk in ((SEEN, "seen"), (HIDDEN, "hidden"), (OTHER, "seen"), (DAMAGED, "seen")):
        directories.job(job_id).mkdir(parents=True)
        record = msgspec.structs.replace(RECORD, id=job_id, disk=disk)
        state.write_record(directories.job(job_id) / "job.json", record)
    (directories.job(DAMAGED) / "job.json").write_text("?")
    async with asyncio.TaskGroup() as group:
        one = Moves(Config(), directories, group, no_process, Looks())
        await one.load()
        yield one


async def refusal(moves: Moves, job_id: str, covers: Callable[[str], bool] | None = None) -> str:
    with pytest.raises(RefusedError) as caught:
        await moves.job(job_id, covers)
    return caught.value.code


async def test_a_beginning_that_one_job_has(moves: Moves) -> None:
    assert (await moves.job("1b")).id == OTHER
    assert (await moves.job(HIDDEN)).id == HIDDEN
    assert await refusal(moves, "1a") == "ambiguous-job"
    assert await refusal(moves, "1") == "ambiguous-job"
    assert await refusal(moves, "2") == "unknown-job"
    assert await refusal(moves, HIDDEN + "-") == "unknown-job"


@pytest.mark.parametrize("asked", ["1c", DAMAGED])
async def test_a_damaged_job_is_found_as_others_are(moves: Moves, asked: str) -> None:
    with pytest.raises(DamagedError, match=r"job\.json is damaged"):
        await moves.job(asked)


async def test_a_queued_move_is_only_cancelled_once_that_is_written_down(
    moves: Moves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next daemon, which knows nothing of it, would begin it."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kicks = []
    with monkeypatch.context() as patch:
        patch.setattr(history, "write_ended", full)
        patch.setattr(moves, "kick", lambda: kicks.append(1))
        with pytest.raises(RefusedError, match="it stays queued; free some space"):
            await moves.steer(OTHER, "cancel")
        await asyncio.sleep(0)
    assert kicks, "another may have waited for its place"
    assert (await moves.job(OTHER)).phase == "queued"
    assert (await moves.steer(OTHER, "cancel")).phase == "cancelled"
    with pytest.raises(RefusedError, match="can no longer be cancelled"):
        await moves.steer(OTHER, "cancel")


async def test_beginnings_tell_nothing_of_jobs_that_one_may_not_see(moves: Moves) -> None:
    def covers(disk: str) -> bool:
        return disk == "seen"

    assert (await moves.job("1a", covers)).id == SEEN
    assert await refusal(moves, "1a-h", covers) == "unknown-job"
    assert await refusal(moves, "1c", covers) == "unknown-job"
    assert await refusal(moves, DAMAGED, covers) == "unknown-job"
    assert await refusal(moves, "1", covers) == "ambiguous-job", "of two that he sees"
    assert (await moves.job(HIDDEN, covers)).disk == "hidden", "who knows all of it is told no"
