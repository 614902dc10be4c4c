"""The contract of the command line: JSON shapes, exit codes, progress, waiting."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from tests.cli.running import run
from tests.daemon import Daemon
from tests.helpers import eventually
from tests.nbd_writer import Client

SLOW = "2MiB"
DISK_KEYS = {
    "name", "state", "reason", "location", "size", "read_only", "cache", "uris", "clients", "job",
    "share", "target_share", "snippets", "version",
}  # fmt: skip
JOB_KEYS = {
    "id", "disk", "phase", "bytes_total", "bytes_copied", "bytes_remaining", "copy_rate",
    "dirty_rate", "eta_s", "passes", "pause_ms", "verified", "reason", "source", "target",
    "created", "started", "ended", "story", "keep_source", "verify", "mode", "cutover", "limit",
}  # fmt: skip
STEP_KEYS = {"time", "phase", "text", "predicted_s", "took_s"}


@pytest.fixture
def daemon(daemon: Daemon) -> Daemon:
    """Start a daemon of its own for the test; its commands are processes, as a user's are."""
    daemon.in_process = False
    return daemon


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Make a disk of 16 MiB that is all data."""
    path = tmp_path / "vm.raw"
    path.write_bytes(os.urandom(16 * MIB))
    return path


def test_what_attach_ls_and_show_print(daemon: Daemon, disk: Path) -> None:
    attached = daemon.json("attach", "vm", disk)
    shown = daemon.json("show", "vm")
    listed = daemon.json("ls")
    assert attached == shown
    assert listed == [shown]
    assert set(shown) == DISK_KEYS
    socket = daemon.nbd_socket("vm")
    assert shown["location"] == str(disk)
    assert shown["size"] == 16 * MIB
    assert shown["uris"] == {"nbd": f"nbd+unix:///vm?socket={socket}", "fuse": None}
    assert (shown["clients"], shown["job"], shown["state"]) == (0, None, "serving")
    assert "reconnect-delay=" in shown["snippets"]["qemu"]
    assert socket in shown["snippets"]["libvirt"]
    assert socket in shown["snippets"]["nbd_client"]
    client = Client(socket, "vm")
    assert daemon.json("show", "vm")["clients"] == 1
    client.close()
    text = daemon.run("show", "vm").stdout
    assert f"-blockdev driver=nbd,node-name=disk-vm,server.type=unix,server.path={socket}," in text
    told = daemon.run("attach", "b", make(disk.parent / "b")).stdout
    assert f"nbd+unix:///b?socket={daemon.nbd_socket('b')}\n" in told


def make(path: Path) -> Path:
    """Make a small disk."""
    path.write_bytes(bytes(MIB))
    return path


def test_a_relative_location_is_the_callers(daemon: Daemon, disk: Path) -> None:
    done = subprocess.run(
        [*daemon.program, "attach", "vm", "vm.raw", "--socket", daemon.socket],
        cwd=disk.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert daemon.json("show", "vm")["location"] == str(disk)


def test_a_link_is_followed_once(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.raw"
    link.symlink_to(disk)
    assert daemon.json("attach", "vm", link)["location"] == str(disk)


def test_a_read_only_disk(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    assert daemon.json("attach", "vm", disk, "--read-only")["read_only"] is True
    refused = daemon.run("move", "vm", tmp_path / "x.raw", "--json")
    assert refused.returncode == 4
    assert "read-only" in refused.stderr


def test_a_move_from_its_request_to_its_end(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    daemon.attach("vm", disk)
    target = tmp_path / "there"
    target.mkdir()
    job = daemon.json("move", "vm", target, "--no-wait", "--limit", SLOW)
    assert set(job) == JOB_KEYS
    assert (job["disk"], job["source"]) == ("vm", str(disk))
    assert job["target"] == str(target / "vm.raw")
    assert job["phase"] in ("copying", "catching-up", "mirroring")
    assert job["limit"] == 2 * MIB
    assert daemon.json("show", "vm")["job"] == job["id"]
    assert daemon.json("limit", "vm", "0")["limit"] is None
    done = daemon.json("wait", "vm")
    assert set(done) == JOB_KEYS
    assert (done["phase"], done["verified"], done["bytes_remaining"]) == ("done", True, 0)
    assert done["bytes_copied"] >= done["bytes_total"] == 16 * MIB
    assert done["passes"] >= 1
    assert done["pause_ms"] >= 0
    assert [step["phase"] for step in done["story"]][-1] == "done"
    assert all(set(step) == STEP_KEYS for step in done["story"])
    assert daemon.json("job", job["id"]) == done
    assert daemon.json("job", job["id"][:8]) == done
    assert daemon.json("jobs") == [done] == daemon.json("jobs", "vm")
    shown = daemon.json("show", "vm")
    assert (shown["location"], shown["job"]) == (str(target / "vm.raw"), None)
    assert (target / "vm.raw").read_bytes() == before
    assert not disk.exists()
    assert daemon.json("wait", "vm") == done  # at once, with its outcome


def test_jobs_are_listed_newest_first(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.attach("vm", disk)
    ids = []
    for name in ("a", "b", "c"):
        ids.append(daemon.json("move", "vm", tmp_path / name)["id"])
    assert [job["id"] for job in daemon.json("jobs")] == ids[::-1]
    daemon.kill()
    daemon.start()
    assert [job["id"] for job in daemon.json("jobs", "vm")] == ids[::-1]
    assert daemon.json("job", ids[0])["phase"] == "done"


def test_the_source_is_kept_when_asked(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.attach("vm", disk)
    done = daemon.json("move", "vm", tmp_path / "x", "--keep-source", "--verify", "none")
    assert (done["keep_source"], done["verified"]) == (True, False)
    assert disk.exists()


def test_pause_resume_and_cancel(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.attach("vm", disk)
    daemon.move("vm", tmp_path / "x", "--limit", SLOW)
    assert daemon.json("pause", "vm")["phase"] == "paused"
    again = daemon.run("pause", "vm", "--json")
    assert (again.returncode, json.loads(again.stderr)["code"]) == (4, "wrong-phase")
    assert daemon.json("wait", "vm", "--phase", "paused")["phase"] == "paused"
    assert daemon.json("resume", "vm")["phase"] in ("copying", "catching-up")
    assert daemon.json("cancel", "vm")["phase"] == "cancelled"
    waited = daemon.run("wait", "vm")
    assert waited.returncode == 3
    assert "cancelled" in waited.stderr
    assert daemon.run("wait", "vm", "--json").returncode == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vm.raw"]
    refused = daemon.run("cancel", "vm", "--json")
    assert (refused.returncode, json.loads(refused.stderr)["code"]) == (4, "no-job")
    assert daemon.run("move", "vm", tmp_path / "x").returncode == 0


def test_a_manual_cutover(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.attach("vm", disk)
    daemon.move("vm", tmp_path / "x", "--cutover", "manual")
    held = daemon.json("wait", "vm", "--phase", "mirroring")
    assert held["phase"] in ("mirroring", "verifying")
    timed_out = daemon.run("wait", "vm", "--timeout", "0.5")
    assert timed_out.returncode == 124
    assert disk.exists()
    assert daemon.run("cutover", "vm").returncode == 0
    assert daemon.run("wait", "vm").returncode == 0
    assert not disk.exists()


def test_waiting_ends_with_its_time(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.attach("vm", disk)
    daemon.move("vm", tmp_path / "x", "--limit", SLOW)
    done = daemon.run("wait", "vm", "--timeout", "0.2", "--json")
    assert (done.returncode, done.stdout) == (124, "")
    assert json.loads(done.stderr)["code"] == "timeout"


def test_waiting_survives_the_daemons_restart(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.attach("vm", disk)
    daemon.move("vm", tmp_path / "x", "--limit", "8MiB")
    waiting = subprocess.Popen(
        [*daemon.program, "wait", "vm", "--json", "--socket", daemon.socket],
        stdout=subprocess.PIPE,
    )
    daemon.kill()
    daemon.start()
    out, _ = waiting.communicate(timeout=60)
    # it may have come before its first look at the daemon, then there was none
    assert waiting.returncode in (0, 5)
    assert waiting.returncode == 5 or json.loads(out)["phase"] == "done"
    daemon.wait("vm")


def test_a_second_move_is_refused(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.attach("vm", disk)
    daemon.move("vm", tmp_path / "x", "--limit", "256KiB")  # it must not end meanwhile
    refused = daemon.run("move", "vm", tmp_path / "y", "--json")
    assert (refused.returncode, json.loads(refused.stderr)["code"]) == (4, "job-running")
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB))
    daemon.attach("other", other)
    refused = daemon.run("move", "other", tmp_path / "x", "--json")
    assert (refused.returncode, json.loads(refused.stderr)["code"]) == (4, "target-in-use")


def test_progress_is_a_line_a_second_without_a_terminal(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    daemon.attach("vm", disk)
    done = daemon.run("move", "vm", tmp_path / "x", "--limit", "6MiB")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert re.search(r"^copying, \d+ %, .* left", done.stdout, re.M)
    assert lines[-1].startswith(f"disk vm is now at {tmp_path / 'x'}: copied 16 MiB in ")
    assert "\x1b" not in done.stdout
    as_json = daemon.run("move", "vm", tmp_path / "y", "--limit", "6MiB", "--json")
    assert json.loads(as_json.stdout)["phase"] == "done"
    assert "copying" in as_json.stderr


def on_terminal(words: list[str | Path]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command on a terminal of its own; return it and the terminal's other end."""
    own, its = pty.openpty()
    process = subprocess.Popen(
        words, stdin=its, stdout=its, stderr=its, start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(its)
    return process, own


def read_terminal(terminal: int, until: Callable[[str], bool], deadline_s: float = 30) -> str:
    """Read what a terminal shows until that is enough or it is closed."""
    shown = ""
    while not until(shown):
        assert select.select([terminal], [], [], deadline_s)[0], shown
        try:
            shown += os.read(terminal, 4096).decode()
        except OSError:  # EIO: nobody has the other end open any more
            return shown
    return shown


def test_progress_is_a_bar_on_a_terminal(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.attach("vm", disk)
    words = [*daemon.program, "move", "vm", tmp_path / "x", "--limit", "8MiB"]
    process, terminal = on_terminal([*words, "--socket", daemon.socket])
    shown = read_terminal(terminal, lambda text: False)
    os.close(terminal)
    assert process.wait(10) == 0
    assert "vm copying" in shown
    assert "━" in shown or "─" in shown
    assert "disk vm is now at" in shown


def test_an_interrupt_leaves_the_move_running(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.attach("vm", disk)
    words = [*daemon.program, "move", "vm", tmp_path / "x", "--limit", "8MiB"]
    process = subprocess.Popen(
        [*words, "--socket", daemon.socket],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline()  # it has begun
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert "mirrord wait vm" in error
    daemon.wait("vm")


def test_a_failed_job(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    """Somebody changes the source's size under a move: the job fails, the source stays."""
    daemon.expect_log("size")
    daemon.attach("vm", disk)
    process = subprocess.Popen(
        [*daemon.program, "move", "vm", tmp_path / "x", "--limit", SLOW, "--socket", daemon.socket],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    eventually(lambda: daemon.json("show", "vm")["job"], what="the move runs")
    with disk.open("rb+") as file:
        file.truncate(8 * MIB)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert error.startswith("mirrord: the move of disk vm failed: ")
    assert daemon.run("wait", "vm").returncode == 1
    assert disk.exists()


def test_version_and_help() -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"mirrord \d+\.\d+\.\d+\n", out)
    code, out, _ = run("--help")
    assert code == 0
    commands = re.findall(r"^  ([a-z]+)  +\S", out, re.M)
    assert commands == [
        "daemon", "attach", "ls", "show", "move", "jobs", "job", "pause", "resume", "cancel",
        "cutover", "limit", "wait", "detach", "upgrade", "demo", "doctor", "credential",
        "libvirt",
    ]  # fmt: skip
    for command in commands:
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "--socket" in out or command in ("demo", "credential", "libvirt")
    code, out, error = run()
    assert (code, out) == (2, "")
    assert "Commands:" in error


FULL = "mirrord: standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("mirrord --help | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("mirrord --help >&-", 0, ""),
        ("mirrord --version <&- >&- 2>&-", 0, ""),
        ("mirrord --version >/dev/full", 4, FULL),
        ("mirrord --help >/dev/full", 4, FULL),
        ("mirrord ls --json --socket /nowhere >/dev/full", 5, None),
        ("mirrord ls --socket /nowhere 2>&-", 5, ""),
    ],
)
def test_output_that_nobody_reads(line: str, code: int, error: str | None) -> None:
    programs = Path(sys.executable).parent
    done = subprocess.run(
        line, shell=True, executable="/bin/bash", capture_output=True, text=True,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert error is None or done.stderr == error
