"""What `mirrord doctor` finds in a state directory, and what moves left elsewhere."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from mirrord.control.messages import Job
from mirrord.core import journal
from mirrord.core.geometry import KIB
from mirrord.core.journal import Kind
from mirrord.service import record_checks, state
from mirrord.service.checks import Check
from mirrord.service.mounts import Mount
from mirrord.service.record_checks import (
    LEFTOVERS_SHOWN,
    check_leftovers,
    check_records,
    recall,
)
from mirrord.service.state import Directories, DiskRecord, JobRecord
from mirrord.storage.names import part_name, retired_name

IDS = [f"00000000-0000-4000-8000-00000000000{n}" for n in range(5)]
ENDED, RUNNING, QUEUED, UNKNOWN, OTHER = IDS
HERE = [Mount("/", "/", "ext4", "/dev/vda1", {})]


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    """Make a state directory with a disk, a move that ended, one that runs, and one queued."""
    made = Directories(tmp_path / "state", tmp_path / "run")
    state.prepare(made)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    add_disk(made, "vm", tmp_path / "a/vm.raw")
    for job_id in (ENDED, RUNNING, QUEUED):
        add_job(made, job_id, tmp_path)
    content = bytearray(journal.CAPACITY_BYTES)
    data, _ = journal.append(journal.Log(), Kind.PREP, {})
    content[: len(data)] = data
    (made.job(RUNNING) / "log").write_bytes(content)
    ended = Job(
        id=ENDED, disk="vm", phase="done", source=f"{tmp_path}/a/vm.raw",
        target=f"{tmp_path}/b/vm.raw",
    )  # fmt: skip
    state.write_record(made.job(ENDED) / "ended.json", ended)
    return made


def add_disk(directories: Directories, name: str, location: Path) -> None:
    """Remember a disk."""
    directories.disk(name).mkdir()
    state.write_record(directories.disk(name) / "disk.json", DiskRecord(name, str(location)))


def add_job(directories: Directories, job_id: str, folder: Path) -> None:
    """Remember a move that was asked for."""
    directories.job(job_id).mkdir()
    record = JobRecord(
        id=job_id, disk="vm", source=f"{folder}/a/vm.raw", target=f"{folder}/b/vm.raw",
        created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    state.write_record(directories.job(job_id) / "job.json", record)


def levels(checks: list[Check]) -> list[tuple[str, str]]:
    """Return names and levels."""
    return [(check.name, check.level) for check in checks]


def test_what_is_in_order(directories: Directories, tmp_path: Path) -> None:
    known = recall(directories)
    assert known.folders() == known.former_folders() == {tmp_path / "a", tmp_path / "b"}
    checks = check_records(directories, known)
    assert levels(checks) == [("records", "ok"), ("room", "ok")]
    assert checks[0].text == "disks: 1; moves: 2 that haven't ended, 1 that have"
    assert levels(check_leftovers(directories, known.folders(), HERE)) == [("leftovers", "ok")]


def test_before_the_first_daemon(tmp_path: Path) -> None:
    directories = Directories(tmp_path / "not/yet", tmp_path / "run")
    known = recall(directories)
    assert levels(check_records(directories, known)) == [("records", "ok"), ("room", "ok")]
    assert not (tmp_path / "not").exists()


def test_damage(directories: Directories) -> None:
    (directories.disk("vm") / "disk.json").write_bytes(b"?")
    (directories.job(RUNNING) / "log").write_bytes(b"short")
    (directories.job(QUEUED) / "job.json").unlink()
    (directories.job(QUEUED) / "log").touch()
    add_job(directories, OTHER, directories.state)
    (directories.job(OTHER) / "job.json").write_bytes(b"?")
    checks = [c for c in check_records(directories, recall(directories)) if c.level == "problem"]
    damaged = (f"jobs/{OTHER}/job.json", f"jobs/{RUNNING}/log", f"jobs/{QUEUED}/job.json")
    for path in ("disks/vm/disk.json", *damaged):
        assert sum(str(directories.state / path) in check.text for check in checks) == 1
    assert len(checks) == 4


def test_what_a_daemon_is_just_doing_is_no_finding(directories: Directories) -> None:
    directories.job(UNKNOWN).mkdir()
    (directories.state / "jobs" / f".{OTHER}.forgotten").mkdir()
    directories.disk("attaching").mkdir()
    checks = check_records(directories, recall(directories))
    assert levels(checks) == [("records", "ok"), ("room", "ok")]


def test_a_move_whose_disk_is_gone(directories: Directories, tmp_path: Path) -> None:
    state.forget_disk(directories, "vm")
    checks = check_records(directories, recall(directories))
    assert levels(checks)[:2] == [("records", "advice")] * 2
    assert f"attach vm again, from {tmp_path}/a/vm.raw" in checks[0].advice


def test_a_state_directory_that_cannot_be_read(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Directories, "disk_names", refuse)
    checks = check_records(directories, recall(directories))
    assert levels(checks) == [("records", "advice")]
    assert "Permission denied" in checks[0].text
    assert check_leftovers(directories, [], HERE) == [], "nobody knows whose a file is"


def test_room_for_the_largest_disk(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "a/vm.raw").open("wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(record_checks, "available_bytes", lambda _: 34 << 20)
    room = check_records(directories, recall(directories))[-1]
    assert (room.name, room.level) == ("room", "ok")
    monkeypatch.setattr(record_checks, "available_bytes", lambda _: 16 << 20)
    room = check_records(directories, recall(directories))[-1]
    assert (room.level, room.advice) == ("problem", "no move can begin there: free some")
    os.truncate(tmp_path / "a/vm.raw", 64 * KIB)
    assert check_records(directories, recall(directories))[-1].level == "ok"


def test_a_disk_whose_storage_hangs_is_named(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = recall(directories)
    path = Path(known.disks[0].location)
    hanging = TimeoutError("no answer within 5 s")
    monkeypatch.setattr(record_checks, "look_at_disks", lambda _: {path: hanging})
    (check,) = [c for c in check_records(directories, known) if c.level == "problem"]
    assert check.text == f"{path}, a disk, hangs: no answer within 5 s"


def test_many_leftovers_are_counted(directories: Directories, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        for number in range(LEFTOVERS_SHOWN):
            (folder / part_name(f"{number}.raw", UNKNOWN)).touch()
    (a / part_name("one more.raw", UNKNOWN)).touch()
    checks = check_leftovers(directories, [a, b], HERE)
    assert len(checks) == LEFTOVERS_SHOWN + 2
    assert {check.level for check in checks} == {"advice"}
    assert [check.text for check in checks[-2:]] == [
        f"1 more of these are in {a}", f"{LEFTOVERS_SHOWN} more of these are in {b}",
    ]  # fmt: skip


def test_what_moves_left(directories: Directories, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for job_id in (ENDED, RUNNING, QUEUED):
        (b / part_name("vm.raw", job_id)).touch()
    (a / retired_name("v m.raw", UNKNOWN)).touch()
    (a / ".other.part").touch()
    checks = check_leftovers(directories, [a, b, tmp_path / "gone"], HERE)
    assert levels(checks) == [("leftovers", "advice")] * 2
    unknown, ended = checks
    assert "a former source of job" in unknown.text
    assert unknown.advice.startswith("is it another daemon's?")
    assert shlex.split(unknown.advice.rpartition(": ")[2]) == [
        "rm", str(a / retired_name("v m.raw", UNKNOWN))
    ]  # fmt: skip
    assert f"an unfinished target of job {ENDED}, which is done" in ended.text
    assert ended.advice == f"rm {b / part_name('vm.raw', ENDED)}"
    assert len(list(b.iterdir())) == 3, "nothing was removed"


def test_folders_of_other_hosts_are_not_listed(directories: Directories, tmp_path: Path) -> None:
    (tmp_path / "b" / part_name("vm.raw", ENDED)).touch()
    mounts = [*HERE, Mount("/", str(tmp_path), "nfs4", "x:/y", {})]
    assert levels(check_leftovers(directories, [tmp_path / "b"], mounts)) == [("leftovers", "ok")]
