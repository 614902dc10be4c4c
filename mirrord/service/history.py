"""What the state directory says about jobs: which are queued, unfinished, ended, damaged.

A job's journal is the truth; `ended.json` is derived from it (or is all there is of a job that
ended before it began). The files of a job that has ended are reduced to its record, its outcome
and its journal: the maps are as large as the disk deserves and of no use any more.

While a job runs its story is kept in a file of its own, replaced as a whole at each change of
phase, so a kill loses at most the last one. It isn't made durable: no flush of it gets in the
way of a cutover's, and after a power cut the story may begin anew. No decision is made by it.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from mirrord.control.messages import Job, PhaseName
from mirrord.control.messages import Step as Told
from mirrord.core import journal
from mirrord.core.migration import Step
from mirrord.engine.request import hear, tell
from mirrord.errors import DamagedError
from mirrord.service.logs import fields
from mirrord.service.state import (
    Directories,
    DiskRecord,
    JobRecord,
    forget_job,
    read_record,
    write_record,
)

log = logging.getLogger(__name__)

DROPPED_MAX = 64  # jobs that are forgotten at once
_UNTOLD = "untold"  # is there while a program has to be told of the job's end
_DAYS_MAX = 365_000  # a date before year 1 is none

Standing = Literal["queued", "unfinished", "ended"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One job as found: its standing, and how it looks to users."""

    record: JobRecord
    standing: Standing
    job: Job
    recorded: bool = False  # ended, and a daemon has taken note of that


def read_job(directories: Directories, job_id: str) -> Entry:
    """Read one job. Raises DamagedError naming the file."""
    directory = directories.job(job_id)
    try:
        record = read_record(directory / "job.json", JobRecord)
    except FileNotFoundError as error:
        raise DamagedError(f"{directory / 'job.json'} is missing") from error
    if record.id != job_id:
        raise DamagedError(f"{directory / 'job.json'} is damaged: it names job {record.id}")
    with contextlib.suppress(FileNotFoundError):
        return Entry(record, "ended", read_record(directory / "ended.json", Job), recorded=True)
    outcome = read_outcome(directory / "log")
    if outcome.state is journal.State.EMPTY:
        return Entry(record, "queued", record.as_job())
    story = [tell(step) for step in read_story(directory)]
    done = outcome.done
    if done is not None:
        if "story" not in done and "ended_s" in done:  # a recovery ended it
            story.append({"time_s": done["ended_s"], **done})
        return Entry(record, "ended", told(record, {"story": story, **done}))
    if not story:
        return Entry(record, "unfinished", record.as_job())
    now = {"phase": story[-1]["phase"], "reason": story[-1]["reason"]}
    return Entry(record, "unfinished", told(record, {**now, "story": story}))


def read_story(directory: Path) -> list[Step]:
    """Return a running job's phases so far; none when a power cut took them."""
    try:
        kept = msgspec.json.decode((directory / "story").read_bytes(), type=list[dict[str, Any]])
        return [hear(step) for step in kept]
    except FileNotFoundError:
        return []
    except (OSError, KeyError, TypeError, ValueError) as error:
        log.info("story lost %s", fields(job=directory.name, error=error))
        return []


def write_story(directory: Path, story: Sequence[Step]) -> None:
    """Keep a running job's phases so far. Raises OSError; after a kill the old or new are there."""
    new = directory / "story.new"
    new.write_bytes(msgspec.json.encode([tell(step) for step in story]))
    new.replace(directory / "story")


def read_outcome(path: Path) -> journal.Outcome:
    """Fold a journal, without changing or syncing anything. Raises DamagedError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return journal.Outcome()
    except OSError as error:
        raise DamagedError(f"{path} can't be read: {error}") from error
    try:
        return journal.fold(journal.parse(data).records)
    except DamagedError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error


def told(record: JobRecord, status: journal.Payload) -> Job:
    """Return a job as users see it, of what was asked for and what the engine says about it.

    `status` is the engine's summary, live or from the journal's last record; what a job that was
    ended by a recovery doesn't say is as it was in the beginning.
    """
    values = msgspec.to_builtins(record.as_job())
    asked = values.pop("story")
    values |= {key: status[key] for key in Job.__struct_fields__ if key in status}
    values["limit"] = status.get("limit", record.limit) or None
    for key in ("started", "ended"):
        values[key] = _time(status.get(f"{key}_s"))
    values["story"] = asked + _told_story(status.get("story", ()))
    if len(values["story"]) > 1:
        asked_s = datetime.datetime.fromisoformat(record.created).timestamp()
        asked[0]["took_s"] = max(0.0, status["story"][0]["time_s"] - asked_s)
    return msgspec.convert(values, type=Job)


def concluded(job: Job, phase: PhaseName, reason: str, ended: str) -> Job:
    """Return a job that ends now, without the engine."""
    story = list(job.story)
    if story:  # a process of an older version may have told of a job without one
        began, end = map(datetime.datetime.fromisoformat, (story[-1].time, ended))
        took_s = max(0.0, (end - began).total_seconds())
        story[-1] = msgspec.structs.replace(story[-1], took_s=took_s)
    story.append(Told(ended, phase, reason))
    return msgspec.structs.replace(job, phase=phase, reason=reason, ended=ended, story=story)


def _told_story(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the engine's steps as users see them: each took until the next one began."""
    ends_s = [step["time_s"] for step in steps[1:]]
    return [
        {
            "time": _time(step["time_s"]),
            "phase": step["phase"],
            "text": step["reason"],
            "predicted_s": step.get("predicted_s"),
            "took_s": None if end_s is None else max(0.0, end_s - step["time_s"]),
        }
        for step, end_s in itertools.zip_longest(steps, ends_s)
    ]


def _time(seconds: float | None) -> str | None:
    """Return RFC 3339, UTC, of seconds since 1970."""
    if seconds is None:
        return None
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="microseconds")


def concerns(directories: Directories, job_id: str, disk: DiskRecord) -> bool:
    """Tell whether a damaged job may hold the truth about `disk`, so that it can't be served.

    Its record names the disk, if it can be read. Else the journal decides: a job that never came
    to its first record, or that has ended, is of no consequence to anybody; another is of this
    disk if the disk lies where that job came from or goes to. In doubt it is.
    """
    directory = directories.job(job_id)
    try:
        return read_record(directory / "job.json", JobRecord).disk == disk.name
    except (DamagedError, FileNotFoundError):
        pass
    try:
        outcome = read_outcome(directory / "log")
        status = os.stat(disk.location)
    except (DamagedError, OSError):
        return True
    if outcome.prep is None or outcome.finished:
        return False
    is_block = stat.S_ISBLK(status.st_mode)
    # not st_dev of a file: it may be another one after a boot
    own = ("block", status.st_rdev) if is_block else ("file", status.st_ino)
    ends = (outcome.prep["source"], outcome.prep["target"])
    return any(
        own == (end["kind"], end["device"] if end["kind"] == "block" else end["inode"])
        for end in ends
    )


def write_ended(directories: Directories, job: Job) -> None:
    """Remember how a job ended, drop the maps, and give back what the journal had reserved.

    The record is durable on return and counts from then on, so the rest may be left undone.
    """
    directory = directories.job(job.id)
    write_record(directory / "ended.json", job)
    for name in ("dirty", "map", "story", "story.new"):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # it ended before it began
        path = directory / "log"
        os.truncate(path, journal.parse(path.read_bytes()).end)
        os.truncate(path, journal.CAPACITY_BYTES)  # the same bytes, the zeroes as a hole


def is_untold(directories: Directories, job_id: str) -> bool:
    """Tell whether a program has still to be told of a job that ended."""
    return (directories.job(job_id) / _UNTOLD).exists()


def note_untold(directories: Directories, job_id: str) -> None:
    """Note that a program has to be told of a job's end, before that is written down."""
    (directories.job(job_id) / _UNTOLD).touch()


def note_told(directories: Directories, job_id: str) -> None:
    """Note that a program is told now: whatever happens, it won't be again."""
    (directories.job(job_id) / _UNTOLD).unlink(missing_ok=True)


def drop_old(directories: Directories, ended: list[Job], keep: int, days: int) -> list[str]:
    """Forget ended jobs above a number or an age, but never the last one; return their ids.

    One that a program has still to be told of goes later.
    At most `DROPPED_MAX`, as each is a sync: the next job that ends takes more with it.
    """
    age = datetime.timedelta(days=min(days, _DAYS_MAX))
    oldest = datetime.datetime.now(datetime.UTC) - age
    by_age = sorted(ended, key=lambda job: job.ended or job.created or "")
    surplus = [
        job.id
        for number, job in enumerate(reversed(by_age))
        if number >= keep or (number and (job.ended or job.created or "") < oldest.isoformat())
    ]
    oldest_first = surplus[: -DROPPED_MAX - 1 : -1]
    oldest_first = [each for each in oldest_first if not is_untold(directories, each)]
    for job_id in oldest_first:
        forget_job(directories, job_id)
    return oldest_first
