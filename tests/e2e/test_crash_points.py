"""Every step of a move that makes something durable or changes a name is a crash point.

The steps are not listed by hand: a move is traced, and each call that it made is then, in a move
of its own, where the process is killed (before the call, after it) or what fails (with EIO, with
ENOSPC). The next process finds every acknowledged write, serves the one side that the journal
makes the disk, and the move ends as done, or as failed with a reason; nothing is left behind that
it does not tell of.

`MIRRORD_CRASH_PAIRS` is how many pairs of faults are tried in one move (default 5 of each kind),
`MIRRORD_CRASH_SEED` says which (default 1).
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mirrord.control import client as control_client
from mirrord.control.messages import AttachRequest, MoveRequest
from tests.daemon import Daemon
from tests.e2e.crash_points import BLOCK_BYTES, JOB_ID, STEPS, Folder, Point, before, written
from tests.forked import Forked
from tests.helpers import eventually, require_program
from tests.nbd_writer import WRITE, Client

HOWS = ["before", "after", "EIO", "ENOSPC"]
REACHED_BY_CHANCE = 0.1  # of all points, 4 of 81 were seen on a busy machine
PAIRS = int(os.environ.get("MIRRORD_CRASH_PAIRS", "5"))
SEED = int(os.environ.get("MIRRORD_CRASH_SEED", "1"))
SECOND_CALLS = 60  # a recovery that copies everything makes about so many
PART, RETIRED = ".target.raw.mirrord-JOB.part", ".source.raw.mirrord-JOB.retired"
JOB = "state/jobs/JOB"
# What the protocol asks for, in this order, whatever else a move does.
MOVED = [
    ("rename", f"{JOB}/job.json"),  # the wish
    ("fsync", JOB),
    ("fsync", f"new/{PART}"),  # the target
    ("fsync", "new"),
    ("rename", f"{JOB}/map"),
    ("rename", f"{JOB}/log"),
    ("fsync", JOB),
    ("fdatasync", f"{JOB}/log"),  # PREP
    ("fdatasync", "old/source.raw"),  # the guest's flush
    ("fdatasync", f"new/{PART}"),  # a checkpoint
    ("fdatasync", f"{JOB}/map"),  # R1: a write to a clean region
    ("fdatasync", f"new/{PART}"),
    ("renameat2", "new/target.raw"),  # R6
    ("fsync", "new"),
    ("fdatasync", "new/target.raw"),  # behind the gate
    ("fdatasync", f"{JOB}/log"),  # COMMIT
    ("rename", "state/disks/vm/disk.json"),
    ("fsync", "state/disks/vm"),
    ("renameat2", f"old/{RETIRED}"),
    ("fsync", "old"),
    ("fdatasync", f"{JOB}/log"),  # RETIRED
    ("unlink", f"old/{RETIRED}"),
    ("fsync", "old"),
    ("fdatasync", f"{JOB}/log"),  # DONE
    ("rename", f"{JOB}/ended.json"),
]
CANCELLED = [
    ("fdatasync", f"{JOB}/log"),  # ABORT
    ("unlink", f"new/{PART}"),
    ("fsync", "new"),
    ("fdatasync", f"{JOB}/log"),  # DONE
    ("rename", f"{JOB}/ended.json"),
]
PROTOCOL = {"cutover": MOVED, "cancel": CANCELLED}
# What a failed step makes a daemon tell its log.
TOLD = r"WARNING (outcome not written|a program may be told twice)"
# What a job that has ended keeps, what it had before, and what a death while that was made leaves.
ENDED_FILES = {"job.json", "ended.json"}
JOB_FILES = {"log", "lock", "dirty", "map", "story", "story.new"} | {
    f".{name}.new" for name in ("ended.json", "map", "log")
}
DISK_FILES = {"disk.json", ".disk.json.new"}  # the second is overwritten by the next move


@dataclass
class Diary:
    """What the guest was answered."""

    asked: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    struck: bool = False
    ended: bool = False  # the user was told of the end

    @classmethod
    def read(cls, path: Path) -> Diary:
        """Read what a process wrote until its end."""
        diary = cls()
        for line in path.read_text().splitlines():
            word, _, rest = line.partition(" ")
            if word in ("struck", "ended"):
                setattr(diary, word, True)
            else:
                {"ask": diary.asked, "done": diary.done, "error": diary.errors}[word].append(rest)
        return diary


def run_one(forked: Forked, root: Path, verb: str, point: Point, how: str) -> str:
    """Move with a fault at one point, live on, and check; return what came of it."""
    root.mkdir()
    folder = Folder(str(root))
    first = forked.call("move", root=str(root), verb=verb, point=point, how=how)
    diary = Diary.read(folder.diary)
    killed = how in ("before", "after")
    assert first.status == (-9 if killed and diary.struck else 0)
    refused = "" if first.result is None else first.result["refused"]
    second = forked.call("look", root=str(root))
    check_content(bytes.fromhex(second.result["found"]), diary)
    assert second.result["again"], "the content changed by itself"
    unannounced = [line for line in first.logged if not re.search(TOLD, line)]
    assert not unannounced + second.logged
    jobs = second.result["jobs"]
    assert not refused.startswith("["), "an errno explains nothing"
    answered = not refused and "copied" in diary.asked
    assert len(jobs) == 1 if answered else len(jobs) <= (0 if refused else 1)
    for phase, reason in jobs:
        check_end(phase, reason, verb, diary, killed=killed)
    check_names(folder, second.result["location"], jobs)
    if not diary.struck:
        return "not reached"
    return "refused" if refused else jobs[0][0] if jobs else "never asked"


def check_end(phase: str, reason: str, verb: str, diary: Diary, *, killed: bool) -> None:
    """A move ends as it was asked to, unless something failed, which it tells."""
    assert reason
    assert not reason.startswith("["), "an errno explains nothing"
    assert not (killed and diary.errors)
    phases = {"done"}
    if verb == "cancel":
        phases = {"cancelled"} if diary.ended else {"cancelled", "done"}
    if not killed:
        phases.add("failed")
    assert phase in phases, (phase, reason)


def check_content(found: bytes, diary: Diary) -> None:
    """Every acknowledged write is there; one that was not may be; there is nothing else."""
    expected = bytearray(before())
    for step in STEPS:
        offset, data = written(step)
        where = slice(offset, offset + BLOCK_BYTES)
        if step in diary.done or (step in diary.asked and found[where] == data):
            expected[where] = data
    wrong = [n for n in range(0, len(found), 512) if found[n : n + 512] != expected[n : n + 512]]
    assert not wrong, f"wrong at {wrong[:5]}; {diary}"


def check_names(folder: Folder, location: str, jobs: list[list[str]]) -> None:
    """There is one disk, at its place, and nothing else that isn't told of."""
    moved = bool(jobs) and jobs[0][0] == "done"
    here = folder.target if moved else folder.source
    assert location == str(here)
    reason = jobs[0][1] if jobs else ""
    for path in (*folder.source.parent.iterdir(), *folder.target.parent.iterdir()):
        assert path == here or str(path) in reason, (path, reason)
    assert here.exists()
    state = folder.directories.state
    assert {path.name for path in state.iterdir()} == {"disks", "jobs", "version"}
    assert {path.name for path in (state / "disks" / "vm").iterdir()} <= DISK_FILES
    directories = list((state / "jobs").iterdir())
    assert len(directories) == len(jobs)
    for directory in directories:
        names = {path.name for path in directory.iterdir()}
        assert ENDED_FILES <= names <= ENDED_FILES | JOB_FILES, names


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    """A process that forks those that are killed."""
    server = Forked("tests.e2e.crash_points")
    yield server
    server.close()


def trace_one(forked: Forked, root: Path, verb: str) -> list[Point]:
    """Return the calls of a move in which nothing goes wrong."""
    root.mkdir()
    traced = forked.call("move", root=str(root), verb=verb, point=None, how="")
    assert (traced.status, traced.logged) == (0, [])
    return [tuple(point) for point in traced.result["trace"]]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("verb", ["cutover", "cancel"])
def test_every_step(tmp_path: Path, forked: Forked, verb: str, how: str) -> None:
    points = trace_one(forked, tmp_path / "traced", verb)
    calls = iter((call, path) for call, path, _ in points)
    missing = [step for step in PROTOCOL[verb] if step not in calls]
    assert not missing, f"{missing} are not among {points}"
    outcomes = Counter[str]()
    for number, point in enumerate(points):
        try:
            outcomes[run_one(forked, tmp_path / str(number), verb, point, how)] += 1
        except Exception as error:
            error.add_note(f"{verb}, {how} {point}")
            raise
    print(f"{verb}, {how}: {len(points)} points, {dict(outcomes)}")
    # How often a target is flushed while it is mirrored depends on the time.
    assert outcomes["not reached"] <= REACHED_BY_CHANCE * len(points)


@pytest.mark.parametrize("verb", ["cutover", "cancel"])
def test_a_second_fault(tmp_path: Path, forked: Forked, verb: str) -> None:
    """The process is killed at a step, and at a step of what the next one does something fails."""
    points = trace_one(forked, tmp_path / "traced", verb)
    chance = random.Random(f"{SEED} {verb}")
    for number in range(PAIRS):
        root = tmp_path / str(number)
        root.mkdir()
        point, first = chance.choice(points), chance.choice(["before", "after"])
        nth, second = chance.randint(1, SECOND_CALLS), chance.choice(HOWS)
        try:
            forked.call("move", root=str(root), verb=verb, point=point, how=first)
            forked.call("look", root=str(root), nth=nth, how=second)
            third = forked.call("look", root=str(root))
            diary = Diary.read(root / "diary")
            assert third.logged == []
            check_content(bytes.fromhex(third.result["found"]), diary)
            assert third.result["again"], "the content changed by itself"
            for phase, reason in third.result["jobs"]:
                check_end(phase, reason, verb, diary, killed=second in ("before", "after"))
            check_names(Folder(str(root)), third.result["location"], third.result["jobs"])
        except Exception as error:
            error.add_note(f"{verb}, {first} {point}, then {second} call {nth}; {SEED=} {number=}")
            raise


class Strace:
    """strace of living processes, until they end or it is stopped."""

    def __init__(self, folder: Path, pids: list[int], *options: str) -> None:
        self._folder = folder
        folder.mkdir()
        self._process = subprocess.Popen(
            [require_program("strace"), "-ff", "-y", "-s", "4096", "-o", str(folder / "calls"),
             *options, *(f"--attach={pid}" for pid in pids)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        for _ in pids:
            told = self._process.stderr.readline()
            assert " attached" in told, told

    def stop(self) -> None:
        """Let go of the processes. Idempotent."""
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=10)

    def calls(self, root: Path) -> set[tuple[str, str]]:
        """Return the calls that succeeded on files below `root`, named as the points are."""
        found = set()
        for path in self._folder.iterdir():
            for line in path.read_text().splitlines():
                if (parsed := parse_call(line, root)) is not None:
                    found.add(parsed)
        return found


# What strace shows, and what it is called here: libc and Python choose among names.
NAMES = {
    "fsync": "fsync", "fdatasync": "fdatasync", "ftruncate": "ftruncate", "truncate": "truncate",
    "fallocate": "fallocate", "rename": "rename", "renameat": "rename", "renameat2": "renameat2",
    "link": "link", "linkat": "link", "unlink": "unlink", "unlinkat": "unlink", "rmdir": "rmdir",
    "mkdir": "mkdir", "mkdirat": "mkdir", "openat": "create", "openat2": "create",
}  # fmt: skip


def parse_call(line: str, root: Path) -> tuple[str, str] | None:
    """Return the call of a line of strace's, and the last path in it."""
    call, _, rest = line.partition("(")
    arguments, _, result = rest.rpartition(" = ")
    if call not in NAMES or result.startswith("-1") or ("open" in call and "O_CREAT" not in line):
        return None
    names = re.findall(r'<([^>]*)>|"([^"]*)"', arguments)
    path = ""
    for directory, name in names:
        path = directory or os.path.join(path, name)
    if not path.startswith(f"{root}/"):
        return None
    return NAMES[call], JOB_ID.sub("JOB", path.removeprefix(f"{root}/"))


def test_real_processes_make_no_other_calls(
    make_daemon: Callable[..., Daemon], tmp_path: Path, forked: Forked
) -> None:
    """What strace sees of a real move is among the points, so none is missing from them."""
    points = {(call, path) for call, path, _ in trace_one(forked, tmp_path / "traced", "cutover")}
    points = {("fallocate" if "fallocate" in call else call, path) for call, path in points}
    folder = Folder(str(tmp_path))
    for path in (folder.source, folder.target):
        path.parent.mkdir()
    folder.source.write_bytes(before())
    daemon = make_daemon()
    daemon.state = folder.directories.state
    daemon.start()
    control = control_client.Client(daemon.socket)
    control.attach(AttachRequest("vm", str(folder.source)))
    strace = Strace(tmp_path / "strace", [daemon.pid, daemon.disk_pid("vm")])
    try:
        job = control.move("vm", MoveRequest(str(folder.target)))
        eventually(lambda: control.job(job.id).ended_already, 30, "the end")
    finally:
        strace.stop()
        control.close()
    seen = strace.calls(tmp_path)
    assert ("renameat2", "new/target.raw") in seen
    assert len(seen) > 25, seen
    assert not seen - points


# A real disk process at the first call of a kind, whatever it is about: what happens there, and
# the phase in which its move ends.
REAL = [
    ("fsync", "signal=SIGKILL"),
    ("fdatasync", "signal=SIGKILL"),
    ("renameat", "signal=SIGKILL"),
    ("renameat2", "signal=SIGKILL"),
    ("unlinkat", "signal=SIGKILL"),
    ("renameat2", "error=EIO"),
]


def test_real_processes_at_a_call_of_each_kind(daemon: Daemon, tmp_path: Path) -> None:
    """The points above are of one process in place of two; here both are real, for a sample."""
    daemon.expect_log("restarting disk process")
    control = control_client.Client(daemon.socket)
    names = [f"{call}-{how.partition('=')[2].lower()}" for call, how in REAL]
    straces, written_at = [], BLOCK_BYTES
    try:
        for name, (call, how) in zip(names, REAL, strict=True):
            (tmp_path / name).write_bytes(before())
            control.attach(AttachRequest(name, str(tmp_path / name)))
            guest = Client(daemon.nbd_socket(name), name)
            guest.send(WRITE, 1, written_at, BLOCK_BYTES, b"\xee" * BLOCK_BYTES)
            assert guest.receive() == (1, 0)
            guest.close()
            inject = f"--inject={call}:{how}:when=1"
            straces.append(Strace(tmp_path / f"{name}.strace", [daemon.disk_pid(name)], inject))
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(lambda name: ask(daemon, tmp_path, name), names))
        eventually(lambda: all(job.ended_already for job in control.jobs()), 30, "the ends")
        for name in names:
            assert [job.phase for job in control.jobs(name)] == ["done"]
            assert not (tmp_path / name).exists()
            after = bytearray(before())
            after[written_at : written_at + BLOCK_BYTES] = b"\xee" * BLOCK_BYTES
            assert (tmp_path / f"{name}.moved").read_bytes() == after
    finally:
        for strace in straces:
            strace.stop()
        control.close()
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        f"{name}.moved" for name in names
    }
    assert daemon.log().count("restarting disk process") == len(REAL) - 1


def ask(daemon: Daemon, folder: Path, name: str) -> None:
    """Ask for a move, whose answer may be that the process died meanwhile."""
    control = control_client.Client(daemon.socket)
    try:
        control.move(name, MoveRequest(str(folder / f"{name}.moved")))
    finally:
        control.close()
