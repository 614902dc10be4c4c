"""`max_moves`: further moves are queued, say for what they wait, and start when there is room."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from mirrord.service.scheduler import startable, waits_for
from tests.daemon import Daemon
from tests.helpers import eventually

NAMES = ("a", "b", "c")


@pytest.fixture
def one_at_a_time(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Daemon:
    """Serve three disks; one move at once. That of `a` runs slowly, the others wait."""
    daemon = make_daemon("max_moves = 1\n")
    daemon.start()
    for name in NAMES:
        (tmp_path / f"{name}.raw").write_bytes(os.urandom(12 * MIB))
        daemon.attach(name, tmp_path / f"{name}.raw")
    (tmp_path / "there").mkdir()
    for name in NAMES:
        daemon.move(name, tmp_path / "there", "--limit", "512K")
    return daemon


def phases(daemon: Daemon) -> dict[str, str]:
    """Return each disk's phase, of its newest job."""
    return {job["disk"]: job["phase"] for job in reversed(daemon.json("jobs"))}


def test_a_queued_move_says_for_what_it_waits_and_starts_in_its_turn(
    one_at_a_time: Daemon, tmp_path: Path
) -> None:
    daemon = one_at_a_time
    assert phases(daemon) == {"a": "copying", "b": "queued", "c": "queued"}
    reason = daemon.json("jobs", "b")[0]["reason"]
    assert "1 of at most 1" in reason
    daemon.json("limit", "c", "0")  # before it has begun, too
    daemon.json("limit", "b", "0")
    daemon.json("limit", "a", "0")
    for name in NAMES:
        daemon.wait(name)
    jobs = {job["disk"]: job for job in daemon.json("jobs")}
    assert jobs["a"]["ended"] <= jobs["b"]["started"]
    assert jobs["b"]["ended"] <= jobs["c"]["started"]
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        f"{name}.raw" for name in NAMES
    ]


def test_a_daemon_ends_well_while_moves_begin_and_end(one_at_a_time: Daemon) -> None:
    """What happens while it ends is the next one's to go on with."""
    daemon = one_at_a_time
    for name in NAMES:
        eventually(lambda name=name: phases(daemon)[name] != "queued", what=f"{name} has a place")
        daemon.json("limit", name, "0")
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log()
        daemon.start()
    for name in NAMES:
        daemon.wait(name)
    assert phases(daemon) == dict.fromkeys(NAMES, "done")


def test_a_queued_move_is_cancelled_without_a_trace(one_at_a_time: Daemon, tmp_path: Path) -> None:
    daemon = one_at_a_time
    refused = daemon.run("pause", "b", "--json")
    assert (refused.returncode, json.loads(refused.stderr)["code"]) == (4, "wrong-phase")
    cancelled = daemon.json("cancel", "b")
    assert cancelled["phase"] == "cancelled"
    assert [(step["phase"], step["text"]) for step in cancelled["story"]] == [
        ("queued", "asked for"), ("cancelled", "cancelled before it began"),
    ]  # fmt: skip
    assert cancelled["story"][0]["took_s"] > 0
    assert daemon.run("wait", "b").returncode == 3
    daemon.json("cancel", "a")
    eventually(lambda: phases(daemon)["c"] == "copying", what="c has a's place")
    assert phases(daemon) == {"a": "cancelled", "b": "cancelled", "c": "copying"}
    daemon.json("cancel", "c")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("disks_die", [False, True])
def test_the_queue_survives_the_daemons_restart(one_at_a_time: Daemon, disks_die: bool) -> None:
    daemon = one_at_a_time
    daemon.kill()
    for name in NAMES if disks_die else ():
        daemon.kill_disk(name)
    daemon.start()
    found = phases(daemon)
    assert found["a"] in ("copying", "catching-up")
    assert (found["b"], found["c"]) == ("queued", "queued")
    daemon.json("cancel", "a")
    eventually(lambda: phases(daemon)["b"] == "copying", what="b has a's place")
    assert phases(daemon)["c"] == "queued"


def test_a_queued_move_that_cant_start_any_more_fails(
    one_at_a_time: Daemon, tmp_path: Path
) -> None:
    daemon = one_at_a_time
    (tmp_path / "there" / "b.raw").write_text("mine")
    daemon.json("cancel", "a")
    eventually(lambda: phases(daemon)["c"] == "copying", what="c does not wait for b")
    job = daemon.json("jobs", "b")[0]
    assert job["phase"] == "failed"
    assert "exists" in job["reason"]
    assert (tmp_path / "there" / "b.raw").read_text() == "mine"
    assert daemon.json("show", "b")["state"] == "serving"


def test_the_decision_is_first_come_first_served() -> None:
    queued = [("1", "a"), ("2", "b"), ("3", "a"), ("4", "c")]
    assert startable(queued, [], None) == ["1", "2", "4"]
    assert startable(queued, [], 2) == ["1", "2"]
    assert startable(queued, ["a"], 2) == ["2"]
    assert startable(queued, ["x", "y"], 2) == []
    assert startable(queued, ["x", "y", "z"], 2) == []


def test_what_is_waited_for() -> None:
    assert "of disk a" in waits_for("a", ["a"], None)
    assert "2 of at most 2 moves run;" in waits_for("a", ["y", "x"], 2)
    assert "process of disk a" in waits_for("a", [], 2)
