"""A move's story: told while it lasts and afterwards, whatever was killed meanwhile."""

from __future__ import annotations

import datetime
import itertools
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from mirrord.control.client import Client
from mirrord.core.geometry import MIB
from tests.daemon import Daemon
from tests.helpers import eventually


def told(daemon: Daemon, job_id: str) -> Any:
    """Return a job, without a process for the question."""
    with closing(Client(daemon.socket)) as client:
        return msgspec.to_builtins(client.job(job_id))


def phases(job: Any) -> list[str]:
    """Return the phases of a story."""
    return [step["phase"] for step in job["story"]]


def test_a_story_survives_what_the_move_survives(daemon: Daemon, tmp_path: Path) -> None:
    daemon.expect_log("restarting disk process")
    disk = tmp_path / "vm.raw"
    disk.write_bytes(os.urandom(40 * MIB))
    daemon.attach("vm", disk)
    job_id = daemon.move("vm", tmp_path / "there.raw", "--limit", "4M")
    eventually(
        lambda: told(daemon, job_id)["story"][-1]["predicted_s"], what="the pass is predicted"
    )
    daemon.json("pause", "vm")
    before = told(daemon, job_id)["story"]
    assert phases({"story": before}) == ["queued", "copying", "paused"]
    kept = daemon.state / "jobs" / job_id / "story"
    eventually(lambda: '"paused"' in kept.read_text(), what="it is written down")
    daemon.kill()
    daemon.kill_disk("vm")
    daemon.start()
    eventually(lambda: len(told(daemon, job_id)["story"]) >= 5, what="its process is back")
    daemon.json("limit", "vm", "0")
    daemon.json("resume", "vm")
    eventually(lambda: told(daemon, job_id)["phase"] == "done")
    done = told(daemon, job_id)
    assert phases(done)[:6] == ["queued", "copying", "paused", "copying", "paused", "copying"]
    assert phases(done)[-4:] == ["verifying", "cutting-over", "retiring", "done"]
    story = done["story"]
    assert story[:2] == before[:2], "what it knew before"
    assert 1 < story[1]["predicted_s"] < 20, "40 MiB at 4 MiB a second, and a burst before"
    assert story[3]["text"].startswith("resumed after a restart: ")
    assert story[4]["text"] == "it was paused before the restart"
    for step, later in itertools.pairwise(story):
        began, ended = (datetime.datetime.fromisoformat(each["time"]) for each in (step, later))
        assert abs((ended - began).total_seconds() - step["took_s"]) < 1e-3
    assert (story[-1]["took_s"], story[-1]["time"]) == (None, done["ended"])
    shown = daemon.run("job", job_id[:8], "--story").stdout
    assert all(step["text"] in shown for step in story)
    assert daemon.json("job", job_id, "--story") == done, "the same as data"
    daemon.kill()
    daemon.start()
    assert told(daemon, job_id) == done
    assert not list(daemon.state.glob("jobs/*/story*"))
