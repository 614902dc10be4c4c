"""What people read: truthful remaining time, one line an outcome, tables."""

from __future__ import annotations

import io
import json

import pytest
from msgspec.structs import replace

from mirrord import display
from mirrord.control.client import Client
from mirrord.control.messages import Disk, Job, Step, Uris
from mirrord.waiting import has_reached
from tests.cli.running import run

MIB = 1 << 20
JOB = Job(
    id="5f1c", disk="vm", phase="copying", source="/a", target="/b", bytes_total=100 * MIB,
    bytes_copied=25 * MIB, bytes_remaining=75 * MIB, copy_rate=10.0 * MIB, dirty_rate=5.0 * MIB,
    eta_s=15.0, passes=0,
)  # fmt: skip


def test_progress_is_what_is_equal_already() -> None:
    assert display.progress_line(JOB) == (
        "copying, 25 %, 75 MiB left, 10 MiB/s, guest changes 5 MiB/s, 15 s left"
    )


def test_a_time_that_is_not_true_is_not_shown() -> None:
    never = replace(JOB, eta_s=None, dirty_rate=20.0 * MIB)
    assert display.progress_line(never).endswith("will not finish by passes alone")
    unknown = replace(JOB, eta_s=None, copy_rate=None, dirty_rate=None)
    assert display.progress_line(unknown) == "copying, 25 %, 75 MiB left"
    assert display.time_left(replace(JOB, phase="verifying")) is None


def test_what_waits_says_for_what() -> None:
    queued = replace(JOB, phase="queued", bytes_total=0, reason="waits for b", copy_rate=None,
                     dirty_rate=None)  # fmt: skip
    assert display.progress_line(queued) == "queued, waits for b"


@pytest.mark.parametrize(("phase", "remaining", "expected"), [
    ("copying", 100 * MIB, 0.0), ("copying", 150 * MIB, 0.0), ("mirroring", 0, 1.0),
    ("done", 5, 1.0),
])  # fmt: skip
def test_the_fraction(phase: str, remaining: int, expected: float) -> None:
    assert display.fraction(replace(JOB, phase=phase, bytes_remaining=remaining)) == expected


def test_the_outcome_in_one_line() -> None:
    done = replace(JOB, phase="done", passes=1, pause_ms=1.5, verified=True, reason="deleted /a")
    assert display.outcome(done) == (
        "disk vm is now at /b: copied 25 MiB in 1 pass, paused the guest for 1.50 ms, verified; "
        "deleted /a"
    )
    for phase in ("failed", "cancelled"):
        told = display.outcome(replace(JOB, phase=phase, reason="why"))
        assert phase in told
        assert "why; the disk is still at /a" in told
    assert display.job_line(JOB) == "disk vm is copying (job 5f1c)"
    assert display.job_line(done) == display.outcome(done)


def test_tables() -> None:
    disk = Disk(
        name="vm", state="serving", reason=None, location="/a", size=MIB, read_only=False,
        cache="writeback", uris=Uris("nbd:x"), clients=1, job=None,
    )  # fmt: skip
    assert display.disks([disk, replace(disk, name="b", size=None)]).splitlines() == [
        "NAME  STATE    SIZE   CLIENTS  JOB  LOCATION",
        "vm    serving  1 MiB  1        -    /a",
        "b     serving  -      1        -    /a",
    ]
    assert "attach" in display.disks([])
    assert "move" in display.jobs([])
    refused = replace(disk, state="refused", reason="it is gone", location=None)
    assert "refused: it is gone" in display.disk(refused)
    assert "5f1c  vm    copying" in display.jobs([JOB])
    assert "  mirrord job 5f1c --story" in display.job(JOB)
    long = replace(JOB, id="0123456789ab", target="/b")
    assert "01234567  vm" in display.jobs([long]), "the beginning of an id is enough"


STORY = [
    Step("2026-01-01T23:58:00.5+00:00", "queued", "asked for", took_s=0.02),
    Step("2026-01-01T23:59:00.5+00:00", "copying", "nothing was copied yet", 71.0, 75.5),
    Step("2026-01-02T00:00:16+00:00", "catching-up", "the bulk pass copied 75 MiB", 0.01, 0.02),
    Step("2026-01-02T00:00:16+00:00", "mirroring", "a pass over 3 MiB at 40 MiB/s would take "
         "80 ms, no longer than mirroring will", 0.2, None),
]  # fmt: skip


def test_a_story() -> None:
    told = display.story(replace(JOB, phase="mirroring", story=STORY), 60)
    assert (
        told
        == """\
disk vm: /a → /b (job 5f1c)

2026-01-01, UTC
23:58:00  queued        20 ms
          asked for
23:59:00  copying       1 min 16 s, predicted 1 min 11 s
          nothing was copied yet
2026-01-02, UTC
00:00:16  catching-up   20 ms
          the bulk pass copied 75 MiB
00:00:16  mirroring     predicted 200 ms
          a pass over 3 MiB at 40 MiB/s would take 80 ms, no
          longer than mirroring will

now: mirroring, 25 %, 75 MiB left, 10 MiB/s, guest changes 5
MiB/s, 15 s left"""
    )
    whole = display.story(replace(JOB, phase="mirroring", story=STORY))
    assert "".join(whole.split()) == "".join(told.split()), "nothing is cut"
    ended = replace(JOB, phase="failed", reason="why", story=STORY)
    assert display.story(ended).endswith("failed: why; the disk is still at /a")


def test_lines_come_once_a_second_and_at_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now_s)
    stream = io.StringIO()
    with display.Progress(stream, JOB) as progress:
        progress.update(JOB)
        progress.update(JOB)
        progress.update(replace(JOB, phase="mirroring"))
        now_s += 1
        progress.update(replace(JOB, phase="mirroring"))
    assert [line.partition(",")[0] for line in stream.getvalue().splitlines()] == [
        "copying", "mirroring", "mirroring",
    ]  # fmt: skip


@pytest.mark.parametrize(("phase", "wanted", "reached"), [
    ("copying", "copying", True), ("mirroring", "copying", True), ("copying", "mirroring", False),
    ("paused", "copying", False), ("paused", "paused", True), ("done", "cutting-over", True),
    ("failed", "done", False), ("copying", None, False),
])  # fmt: skip
def test_a_later_rung_says_that_the_earlier_ones_were_reached(
    phase: str, wanted: str | None, reached: bool
) -> None:
    assert has_reached(replace(JOB, phase=phase), wanted) is reached


def test_wait_waits_for_the_move_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the one that is dated last: a clock may have been set back since."""
    ended = replace(JOB, id="ended", phase="done", created="2027-01-01")
    listed = [ended, replace(JOB, id="runs", created="2026-01-01")]
    asked = []

    def look(_: object, job_id: str) -> Job:
        asked.append(job_id)
        return replace(JOB, id=job_id, phase="done")

    monkeypatch.setattr(Client, "jobs", lambda *_: listed)
    monkeypatch.setattr(Client, "job", look)
    code, out, _ = run("wait", "vm", "--socket", "/none", "--json")
    assert (code, json.loads(out)["id"], asked) == (0, "runs", ["runs"])
