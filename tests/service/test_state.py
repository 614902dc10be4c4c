"""The state directory's records, locks, leftovers and history."""

from __future__ import annotations

import datetime
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mirrord.control.messages import Job
from mirrord.core import journal
from mirrord.core.journal import Kind
from mirrord.core.migration import STORY_STEPS_MAX, Event, Migration, Phase, Step
from mirrord.engine.request import SUMMARY_STEPS_MAX, JobStatus
from mirrord.errors import DamagedError, RefusedError
from mirrord.service import history, state
from mirrord.service.state import Directories, DiskRecord, JobRecord

RECORD = JobRecord(
    id="1", disk="vm", source="/a", target="/b", created="2026-01-01T00:00:00+00:00", limit=5
)

ASKED_S = datetime.datetime.fromisoformat(RECORD.created).timestamp()


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    """Make an empty state directory."""
    made = Directories(tmp_path / "s", tmp_path / "r")
    state.prepare(made)
    return made


def add_job(directories: Directories, *kinds: Kind, **done: object) -> Path:
    """Write a job with those journal records; `done` is the last one's payload."""
    directory = directories.job(RECORD.id)
    directory.mkdir()
    state.write_record(directory / "job.json", RECORD)
    log = journal.Log()
    content = bytearray(journal.CAPACITY_BYTES)
    for kind in kinds:
        end = log.end
        data, log = journal.append(log, kind, done if kind is kinds[-1] else {})
        content[end : end + len(data)] = data
    if kinds:
        (directory / "log").write_bytes(content)
    return directory


def test_preparing_twice_changes_nothing(directories: Directories) -> None:
    state.prepare(directories)
    assert (directories.state / "version").read_text() == "1\n"
    assert (directories.runtime / "nbd").stat().st_mode & 0o777 == 0o755


def test_a_directory_of_another_users(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    if os.getuid():
        with pytest.raises(RefusedError, match="belongs to user"):
            state.prepare(directories)
    else:
        state.prepare(directories)  # root's directories are nobody's to fear


def test_a_record_is_what_was_written(directories: Directories) -> None:
    path = directories.state / "disk.json"
    record = DiskRecord("vm", "/vm.raw", "direct", True)
    state.write_record(path, record)
    assert state.read_record(path, DiskRecord) == record
    assert sorted(entry.name for entry in directories.state.iterdir()) == [
        "disk.json", "disks", "jobs", "version",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff", b"null", b'{"name": "vm"}', b'{"name": 1, "location": "/x"}',
        b'{"name": "vm", "location": "/x", "surprise": 1}',
        b'{"name": "vm", "location": "/x", "version": 2}',
    ],
)  # fmt: skip
def test_a_damaged_record_is_named(directories: Directories, content: bytes) -> None:
    path = directories.state / "disk.json"
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=str(path)):
        state.read_record(path, DiskRecord)
    with pytest.raises(FileNotFoundError):
        state.read_record(path.with_name("none"), DiskRecord)


def test_a_lock_is_held_until_its_last_descriptor_is_closed(directories: Directories) -> None:
    path = directories.state / "lock"
    lock = state.take_lock(path)
    assert lock is not None
    inherited = os.dup(lock)
    os.close(lock)
    assert state.take_lock(path) is None
    os.close(inherited)
    again = state.take_lock(path)
    assert again is not None
    os.close(again)


def test_what_is_swept(directories: Directories) -> None:
    for name in ("attached", "attaching", "left"):
        directories.disk(name).mkdir()
    (directories.disk("attached") / "disk.json").touch()
    lock = state.take_lock(directories.disk_lock("attaching"))
    assert lock is not None
    add_job(directories)
    directories.job("2").mkdir()
    directories.job(".3.forgotten").mkdir()
    directories.job("4").mkdir()
    (directories.job("4") / "log").touch()  # nobody knows what that was: it stays
    state.sweep(directories)
    os.close(lock)
    assert directories.disk_names() == ["attached", "attaching"]
    assert directories.job_ids() == ["1", "4"]


def test_how_a_job_stands_by_its_journal(directories: Directories) -> None:
    directory = add_job(directories)
    entry = history.read_job(directories, "1")
    assert (entry.standing, entry.job.phase, entry.job.limit) == ("queued", "queued", 5)
    for kinds, standing in (
        ((Kind.PREP,), "unfinished"),
        ((Kind.PREP, Kind.COMMIT), "unfinished"),
        ((Kind.PREP, Kind.ABORT), "unfinished"),
        ((Kind.PREP, Kind.ABORT, Kind.DONE), "ended"),
    ):
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
        add_job(directories, *kinds, phase="failed", reason="why")
        entry = history.read_job(directories, "1")
        assert entry.standing == standing
    assert (entry.job.phase, entry.job.reason, entry.job.target) == ("failed", "why", "/b")


def test_an_ended_job_is_reduced_to_its_outcome(directories: Directories) -> None:
    directory = add_job(directories, Kind.PREP, Kind.ABORT, Kind.DONE, phase="failed", reason="r")
    for name in ("map", "dirty"):
        (directory / name).write_bytes(b"x")
    log = (directory / "log").read_bytes()
    entry = history.read_job(directories, "1")
    history.write_ended(directories, entry.job)
    assert sorted(file.name for file in directory.iterdir()) == ["ended.json", "job.json", "log"]
    assert (directory / "log").read_bytes() == log
    assert (directory / "log").stat().st_blocks * 512 < 64 << 10
    assert history.read_job(directories, "1") == replace(entry, recorded=True)
    (directory / "ended.json").unlink()
    assert history.read_job(directories, "1") == entry, "it is derived"


def test_a_job_that_ended_before_it_began(directories: Directories) -> None:
    add_job(directories)
    ended = Job(id="1", disk="vm", phase="cancelled", source="/a", target="/b")
    history.write_ended(directories, ended)
    assert history.read_job(directories, "1").job == ended


def test_damage_is_named(directories: Directories) -> None:
    directory = add_job(directories, Kind.PREP)
    (directory / "log").write_bytes(b"short")
    with pytest.raises(DamagedError, match=str(directory / "log")):
        history.read_job(directories, "1")
    state.write_record(directory / "job.json", RECORD)
    os.rename(directory, directories.job("2"))
    with pytest.raises(DamagedError, match="it names job 1"):
        history.read_job(directories, "2")
    (directories.job("2") / "job.json").unlink()
    with pytest.raises(DamagedError, match="is missing"):
        history.read_job(directories, "2")


def test_whom_a_damaged_job_concerns(directories: Directories, tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("source", "target", "other")}
    for path in paths.values():
        path.write_bytes(b"x")
    ends = {
        name: {"kind": "file", "device": 1, "inode": paths[name].stat().st_ino, "size": 1}
        for name in ("source", "target")
    }
    disk = {name: DiskRecord("d", str(path)) for name, path in paths.items()}
    directory = add_job(directories, Kind.PREP, **ends)
    assert history.concerns(directories, "1", DiskRecord("vm", "/x"))
    assert not history.concerns(directories, "1", disk["source"]), "the record names another"
    (directory / "job.json").write_bytes(b"?")
    assert history.concerns(directories, "1", disk["source"])
    assert history.concerns(directories, "1", disk["target"])
    assert not history.concerns(directories, "1", disk["other"])
    assert history.concerns(directories, "1", DiskRecord("d", str(tmp_path / "gone"))), "in doubt"
    assert not history.concerns(directories, "1", DiskRecord("d", "/dev/null"))
    (directory / "log").write_bytes(b"short")
    assert history.concerns(directories, "1", disk["other"])
    (directory / "log").unlink()
    assert not history.concerns(directories, "1", disk["source"]), "it never began"


@pytest.mark.parametrize(
    ("keep", "days", "kept"),
    [
        (3, 10**6, ["2", "3", "4"]),
        (1, 10**6, ["4"]),
        (9, 10**6, ["1", "2", "3", "4"]),
        (9, 150, ["3", "4"]),
        (9, 1, ["4"]),  # the last one stays, however old
    ],
)
def test_old_ended_jobs_are_forgotten(
    directories: Directories, keep: int, days: int, kept: list[str]
) -> None:
    jobs = []
    today = datetime.datetime.now(datetime.UTC)
    for number in (3, 1, 4, 2):
        directories.job(str(number)).mkdir()
        moment = today - datetime.timedelta(days=400 - 90 * number)  # 310, 220, 130, 40 days ago
        jobs.append(
            Job(id=str(number), disk="vm", phase="done", source="/a", target="/b",
                created=moment.isoformat(), ended=moment.isoformat())
        )  # fmt: skip
    forgotten = history.drop_old(directories, jobs, keep, days)
    assert sorted(forgotten) == sorted({"1", "2", "3", "4"} - set(kept))
    assert directories.job_ids() == kept
    left = [job for job in jobs if job.id in kept]
    assert history.drop_old(directories, left, keep, days) == []


def test_few_jobs_are_forgotten_at_once(directories: Directories) -> None:
    """Each is a sync, and the daemon answers nobody meanwhile."""
    jobs = []
    for number in range(history.DROPPED_MAX + 3):
        created = f"2026-01-01T00:00:{number:06d}"
        directories.job(created).mkdir()
        jobs.append(
            Job(id=created, disk="vm", phase="done", source="/a", target="/b", ended=created)
        )
    oldest = [job.id for job in jobs[: history.DROPPED_MAX]]
    assert history.drop_old(directories, jobs, 1, 10**6) == oldest
    left = [job for job in jobs if job.id not in oldest]
    assert history.drop_old(directories, left, 1, 10**6) == [job.id for job in left[:2]]
    assert directories.job_ids() == [jobs[-1].id]


def test_a_job_that_a_program_has_to_be_told_of_is_remembered(directories: Directories) -> None:
    jobs = []
    for day in ("2026-01-01", "2026-01-02", "2026-01-03"):
        directories.job(day).mkdir()
        jobs.append(Job(id=day, disk="vm", phase="done", source="/a", target="/b", ended=day))
    history.note_untold(directories, "2026-01-01")
    assert history.drop_old(directories, jobs, 1, 1) == ["2026-01-02"]
    history.note_told(directories, "2026-01-01")
    assert history.drop_old(directories, [jobs[0], jobs[2]], 1, 1) == ["2026-01-01"]


def test_a_job_that_has_just_ended_is_remembered(directories: Directories) -> None:
    """Although it was asked for before the others."""
    jobs = []
    for created, ended in (("2026-01-01", "2026-01-09"), ("2026-01-02", "2026-01-03")):
        directories.job(created).mkdir()
        jobs.append(
            Job(id=created, disk="vm", phase="done", source="/a", target="/b", created=created,
                ended=ended)
        )  # fmt: skip
    assert history.drop_old(directories, jobs, 1, 1) == ["2026-01-02"]


def test_what_the_engine_says_becomes_what_users_see() -> None:
    status = JobStatus(
        job_id="1", disk="vm", phase=Phase.PAUSED, source="/a", target="/b", bytes_total=9,
        bytes_copied=4, bytes_remaining=5, copy_rate=None, dirty_rate=2.0, eta_s=None, passes=1,
        pause_ms=None, verified=False, reason="asked", created_s=0.0, started_s=1.5, ended_s=None,
        limit=0, source_kept=None,
        story=(
            Step(ASKED_S + 1.5, Phase.COPYING, Event.STARTED, "begun", 9.0),
            Step(ASKED_S + 4.0, Phase.PAUSED, Event.PAUSE_REQUESTED, "asked"),
        ),
    )  # fmt: skip
    job = history.told(RECORD, status.summary())
    assert (job.id, job.phase, job.limit, job.created) == ("1", "paused", None, RECORD.created)
    assert (job.started, job.ended) == ("1970-01-01T00:00:01.500000+00:00", None)
    assert [
        (step.phase, step.text, step.predicted_s, step.took_s) for step in job.story
    ] == [
        ("queued", "asked for", None, 1.5), ("copying", "begun", 9.0, 2.5),
        ("paused", "asked", None, None),
    ]  # fmt: skip
    assert (job.bytes_total, job.bytes_copied, job.copy_rate) == (9, 4, None)


STEPS = (
    Step(1.5, Phase.COPYING, Event.STARTED, "nothing was copied yet", 9.0),
    Step(2.5, Phase.PAUSED, Event.PAUSE_REQUESTED, "the operator paused it"),
)


def test_the_story_of_a_job_whose_process_does_not_answer(directories: Directories) -> None:
    directory = add_job(directories, Kind.PREP)
    history.write_story(directory, STEPS)
    assert tuple(history.read_story(directory)) == STEPS
    job = history.read_job(directories, "1").job
    assert (job.phase, job.reason) == ("paused", "the operator paused it")
    assert [step.phase for step in job.story] == ["queued", "copying", "paused"]


def test_a_recovery_that_ends_a_job_is_the_end_of_its_story(directories: Directories) -> None:
    kinds = (Kind.PREP, Kind.ABORT, Kind.DONE)
    directory = add_job(directories, *kinds, phase="failed", reason="why", ended_s=7.5)
    history.write_story(directory, STEPS)
    job = history.read_job(directories, "1").job
    assert [step.phase for step in job.story] == ["queued", "copying", "paused", "failed"]
    assert [step.took_s for step in job.story][1:] == [1.0, 5.0, None]
    assert (job.story[-1].text, job.story[-1].time) == ("why", job.ended)
    history.write_ended(directories, job)
    assert not (directory / "story").exists()
    assert history.read_job(directories, "1").job == job


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"[{}]", b'[{"phase": "x"}]', b"[1]", b"{}"])
def test_a_story_that_a_power_cut_took(directories: Directories, content: bytes) -> None:
    """It is none, and the job is as it was."""
    directory = add_job(directories, Kind.PREP)
    (directory / "story").write_bytes(content)
    assert history.read_story(directory) == []
    assert history.read_job(directories, "1").standing == "unfinished"


def test_the_longest_story_fits_into_the_journal() -> None:
    """With the longest paths and reasons, in an alphabet of four bytes a letter."""
    path = "/" + "\U0001f4be" * 1023
    migration = Migration()
    for number in range(2 * STORY_STEPS_MAX):
        migration.handle(Event.STARTED if not number else Event.PASS_ENDED, path, float(number))
        migration.predict(1.5, float(number))
    status = JobStatus(
        job_id="1", disk="vm", phase=Phase.DONE, source=path, target=path, bytes_total=9,
        bytes_copied=4, bytes_remaining=5, copy_rate=None, dirty_rate=2.0, eta_s=None, passes=1,
        pause_ms=None, verified=False, reason=path, created_s=0.0, started_s=1.5, ended_s=None,
        limit=0, source_kept=path, story=tuple(migration.story),
    )  # fmt: skip
    kept = status.summary()
    assert len(journal.encode(3, Kind.DONE, kept)) <= 64 << 10
    steps = kept["story"]
    assert len(steps) == SUMMARY_STEPS_MAX
    assert [steps[0]["time_s"], steps[-1]["time_s"]] == [0.0, 2.0 * STORY_STEPS_MAX - 1]


def test_a_job_that_ends_without_the_engine() -> None:
    ended = "2026-01-01T00:00:02.500000+00:00"
    job = history.concluded(RECORD.as_job(), "failed", "why", ended)
    assert (job.phase, job.reason, job.ended) == ("failed", "why", ended)
    assert [(step.phase, step.took_s) for step in job.story] == [("queued", 2.5), ("failed", None)]
    older = Job(id="1", disk="vm", phase="queued", source="/a", target="/b")
    assert [s.phase for s in history.concluded(older, "failed", "why", ended).story] == ["failed"]
