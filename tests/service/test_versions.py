"""Another version takes over: the daemon, then the disks' processes; and state of other versions.

The other version is a copy of this one with other numbers, found first by PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import mirrord
from mirrord.core.geometry import MIB
from mirrord.errors import DamagedError, RefusedError
from mirrord.service import end_disks, state
from mirrord.service.state import Directories, DiskRecord
from tests.daemon import Daemon, command_line
from tests.helpers import eventually, require_program
from tests.nbd_writer import Client, Writer

NEWER = "999.0"
SLOW = "4MiB"  # a move that is still running when the test looks


@pytest.fixture
def newer(tmp_path: Path) -> str:
    """Make a version with another layout of its state; return what PYTHONPATH has to be."""
    package = tmp_path / "newer" / "mirrord"
    shutil.copytree(Path(mirrord.__file__).parent, package)
    for file, old, new in (
        ("__init__.py", r'^__version__ = ".*"$', f'__version__ = "{NEWER}"'),
        ("service/state.py", rf"^VERSION = {state.VERSION}$", f"VERSION = {state.VERSION + 1}"),
    ):
        text, count = re.subn(old, new, (package / file).read_text(), flags=re.M)
        assert count == 1, file
        (package / file).write_text(text)
    return str(package.parent)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Make a disk that is all data."""
    path = tmp_path / "vm.raw"
    path.write_bytes(os.urandom(32 * MIB))
    return path


def test_a_new_version_takes_over_and_guests_see_no_error(
    daemon: Daemon, disk: Path, tmp_path: Path, newer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(daemon.attach("vm", disk), "vm", seed=5)
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB))
    qemu = Qemu(daemon.attach("other", other), "other")
    qemu.write()
    writer.start()
    writer.wait_acknowledged(20)
    job = daemon.move("vm", tmp_path / "moved.raw", "--limit", SLOW)
    pids = {name: daemon.disk_pid(name) for name in ("vm", "other")}

    daemon.stop()
    monkeypatch.setenv("PYTHONPATH", newer)
    daemon.start()
    assert (daemon.state / "version").read_text() == f"{state.VERSION + 1}\n"
    assert {each["name"]: each["version"] for each in daemon.json("ls")} == dict.fromkeys(
        pids, mirrord.__version__
    )
    early = daemon.run("move", "other", tmp_path / "x.raw")
    assert (early.returncode, early.stderr.count("\n")) == (4, 1)
    assert "mirrord upgrade other" in early.stderr

    qemu.write()
    upgraded = daemon.json("upgrade")
    assert {each["name"]: each["version"] for each in upgraded} == dict.fromkeys(pids, NEWER)
    assert all(daemon.disk_pid(name) != pid for name, pid in pids.items())
    writer.wait_acknowledged(20)
    qemu.write()
    qemu.close()
    assert daemon.run("limit", "vm", "0").returncode == 0
    daemon.wait("vm")
    assert daemon.job(job)["verified"]
    writer.stop()
    assert writer.reconnects == 1
    client = Client(daemon.nbd_socket("vm"), "vm")
    writer.check(client.read)
    client.close()
    record = json.loads((daemon.state / "disks" / "vm" / "disk.json").read_text())
    assert record["location"] == str(tmp_path / "moved.raw")
    assert record["version"] == state.VERSION + 1


class Qemu:
    """A disk as QEMU has it: connected all the time, patient for a minute."""

    def __init__(self, address: str, name: str) -> None:
        where = f"driver=nbd,server.type=unix,server.path={address},export={name}"
        self._process = subprocess.Popen(
            [require_program("qemu-io"), "--image-opts", f"{where},reconnect-delay=60"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._written = 0

    def write(self) -> None:
        """Send a write, and a flush."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"write -P 7 {self._written * 4096} 4096\nflush\n")
        self._process.stdin.flush()
        self._written += 1

    def close(self) -> None:
        """Check that each write succeeded."""
        output, _ = self._process.communicate("quit\n", timeout=60)
        assert output.count("wrote 4096/4096 bytes") == self._written, output
        assert "rror" not in output, output


def test_state_of_a_newer_version_is_refused(
    daemon: Daemon, disk: Path, newer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.attach("vm", disk)
    daemon.stop()
    monkeypatch.setenv("PYTHONPATH", newer)
    daemon.start()
    daemon.stop()
    monkeypatch.delenv("PYTHONPATH")
    before = sorted((path, path.read_bytes()) for path in daemon.state.rglob("*.json"))
    daemon.in_process = False
    refused = daemon.run("daemon", "--state-dir", daemon.state, "--runtime-dir", daemon.runtime)
    assert (refused.returncode, refused.stderr) == (
        4,
        f"mirrord: {daemon.state} was written by a newer mirrord (its layout is "
        f"{state.VERSION + 1}, this one knows {state.VERSION}): install that version again, or "
        "give another --state-dir\n",
    )
    assert sorted((path, path.read_bytes()) for path in daemon.state.rglob("*.json")) == before


def test_records_of_older_and_newer_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = Directories(tmp_path / "s", tmp_path / "r")
    state.prepare(directories)
    path = tmp_path / "disk.json"
    record = DiskRecord("vm", "/vm.raw", version=state.VERSION)
    state.write_record(path, record)
    monkeypatch.setattr(state, "VERSION", state.VERSION + 1)
    assert state.read_record(path, DiskRecord) == record
    state.prepare(directories)
    monkeypatch.undo()
    with pytest.raises(RefusedError, match="written by a newer mirrord"):
        state.prepare(directories)
    # what a newer one added isn't called damage
    path.write_bytes(b'{"name": "vm", "location": "/x", "added": 1, "version": 2}')
    with pytest.raises(DamagedError, match=f"{path} was written by a newer mirrord"):
        state.read_record(path, DiskRecord)


def test_the_disks_processes_end_when_they_are_told(
    make_daemon: Callable[..., Daemon], disk: Path, tmp_path: Path
) -> None:
    """What mirrord-disks.service does: with a guest, without one, and where one hangs."""
    daemon = make_daemon()
    daemon.start()
    client = Client(daemon.attach("vm", disk), "vm")
    for name in ("other", "stuck"):
        (tmp_path / name).write_bytes(bytes(MIB))
        daemon.attach(name, tmp_path / name)
    pids = {name: daemon.disk_pid(name) for name in ("vm", "other", "stuck")}
    daemon.stop()
    os.kill(pids["stuck"], 19)  # SIGSTOP
    assert end_disks.end_disks(daemon.runtime, deadline_s=1) == ["stuck"]
    for name in ("vm", "other"):
        eventually(lambda pid=pids[name]: command_line(pid) in ([], [""]), what=f"{name} ended")
    assert command_line(pids["stuck"]) not in ([], [""])
    client.close()
    daemon.kill_disk("stuck")
    assert end_disks.end_disks(daemon.runtime, deadline_s=1) == []
