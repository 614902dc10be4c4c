"""Processes that are told to end, and a host that is short of everything, end to end.

By their numbers in the table of faults (tests/README.md): 2, 25 and 30.
"""

from __future__ import annotations

import glob
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from tests.daemon import Daemon, command_line
from tests.helpers import eventually, require_program
from tests.nbd_probe import Probe
from tests.nbd_writer import WRITE, Client, content

SIZE = 16 * MIB
SLOW = "2MiB"  # a move that is still copying when the test looks
END_S = 10  # of a process that is told to end
ESHUTDOWN = 108
GUESTS_MAX = 16  # of one disk


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Make a disk that is all data."""
    path = tmp_path / "vm.raw"
    path.write_bytes(random.Random(8).randbytes(SIZE))
    return path


@pytest.mark.fault(2)
@pytest.mark.parametrize("phase", ["copying", "paused", "mirroring"])
def test_fault_02_a_process_that_is_told_to_end_finishes_what_is_in_flight(
    daemon: Daemon, disk: Path, tmp_path: Path, phase: str
) -> None:
    """What was answered is there, the rest is told ESHUTDOWN; exit 0 within 10 s; it resumes."""
    target = tmp_path / "moved.raw"
    client = Client(daemon.attach("vm", disk), "vm")
    limit = "1GiB" if phase == "mirroring" else SLOW
    job = daemon.move("vm", target, "--limit", limit, "--cutover", "manual")
    if phase == "paused":
        daemon.json("pause", "vm")
    daemon.wait("vm", phase)
    assert daemon.stop() == 0, "the daemon"
    pid = daemon.disk_pid("vm")
    blocks = range(200)
    for block in blocks:
        client.send(WRITE, block, block * 4096, 4096, content(block, block + 1))
    asked = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    answers = receive_all(client)
    eventually(lambda: command_line(pid) in ([], [""]), END_S, "it ends")
    assert time.monotonic() - asked < END_S
    assert set(answers.values()) <= {0, ESHUTDOWN}
    client.close()
    daemon.start()
    if phase == "paused":
        daemon.json("resume", "vm")
    daemon.json("limit", "vm", "1GiB")
    daemon.json("cutover", "vm")
    daemon.wait("vm")
    assert daemon.job(job)["verified"] is True
    found = target.read_bytes()
    before = random.Random(8).randbytes(SIZE)
    for block in blocks:
        where = slice(block * 4096, (block + 1) * 4096)
        possible = [content(block, block + 1)]
        if answers.get(block) != 0:
            possible.append(before[where])
        assert found[where] in possible, f"block {block}: {answers.get(block)}"


def receive_all(client: Client) -> dict[int, int]:
    """Return the errors by cookie of all that is answered before the connection ends."""
    answers: dict[int, int] = {}
    try:
        while True:
            cookie, error = client.receive()
            answers[cookie] = error
    except ConnectionError:
        return answers


@pytest.mark.fault(25)
def test_fault_25_a_move_ends_although_the_guest_writes_without_a_pause(
    daemon: Daemon, tmp_path: Path
) -> None:
    """fio writes 4 KiB blocks at random, 16 at a time, faster than the move may copy."""
    fio = require_program("fio")
    disk, target = tmp_path / "vm.raw", tmp_path / "moved.raw"
    with disk.open("wb") as file:
        file.truncate(SIZE // 4)
    uri = f"nbd+unix:///vm?socket={daemon.attach('vm', disk)}"
    load = subprocess.Popen(
        [fio, "--name=w", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k",
         "--iodepth=16", "--size=100%", "--loops=1000", "--verify=crc32c", "--do_verify=0",
         "--time_based", "--runtime=60"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    try:
        eventually(lambda: disk.stat().st_blocks * 512 > SIZE // 8, 30, "fio writes")
        job = daemon.move("vm", target, "--limit", "4MiB")
        daemon.wait("vm", timeout_s=30)
        assert load.poll() is None, "it wrote all the time"
    finally:
        load.send_signal(signal.SIGINT)  # it finishes what it has in flight
        _, error = load.communicate(timeout=30)
    assert b"error" not in error.lower(), error
    status = daemon.job(job)
    assert status["verified"] is True
    assert "mirroring" in [step["phase"] for step in status["story"]]


@pytest.mark.fault(30)
def test_fault_30_a_clock_that_jumps_by_a_year_ends_nothing(
    make_daemon: Callable[..., Daemon],
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every deadline is by the monotonic clock; only what is shown has the wall clock's time."""
    libraries = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
    if not libraries:
        pytest.skip("needs libfaketime")
    shift = tmp_path / "shift"
    shift.write_text("+0d\n")
    daemon = make_daemon()
    with monkeypatch.context() as faked:
        for name, value in {
            "LD_PRELOAD": libraries[0], "FAKETIME_TIMESTAMP_FILE": str(shift), "NO_FAKE_STAT": "1",
            "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }.items():  # fmt: skip
            faked.setenv(name, value)
        daemon.start()
    try:
        with Probe(daemon.attach("vm", disk)) as guest:
            job = daemon.move("vm", tmp_path / "moved.raw", "--limit", SLOW)
            for jump in ("+365d", "-365d"):
                shift.write_text(f"{jump}\n")
                guest.wait(50)
                assert daemon.job(job)["phase"] == "copying"
            daemon.json("limit", "vm", "1GiB")
            daemon.wait("vm")
            guest.wait(20)
        status = daemon.job(job)
        assert status["verified"] is True
        assert status["ended"] < status["started"], "the clocks that are shown did jump"
        assert status["pause_ms"] < 1000
        guest.check((tmp_path / "moved.raw").read_bytes())
        assert daemon.run("job", job).returncode == 0
    finally:
        for left in glob.glob(f"/dev/shm/*faketime*_{daemon.pid}"):
            os.unlink(left)


@pytest.mark.fault(30)
def test_fault_30_busy_processors_fail_nothing(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    burners = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        with Probe(daemon.attach("vm", disk)) as guest:
            job = daemon.move("vm", tmp_path / "moved.raw")
            daemon.wait("vm")
            guest.wait(20)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait(timeout=10)
    assert daemon.job(job)["verified"] is True
    guest.check((tmp_path / "moved.raw").read_bytes())


@pytest.mark.fault(30)
def test_fault_30_without_descriptors_accepting_pauses(daemon: Daemon, disk: Path) -> None:
    """64 of them, for a disk's process and for the daemon: who is connected is served, and who
    comes waits until somebody leaves.
    """
    daemon.expect_log("paused accepting", "control socket can't accept")
    path = daemon.attach("vm", disk)
    soft_and_hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    for pid in (daemon.pid, daemon.disk_pid("vm")):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (64, soft_and_hard[1]))
    with Probe(path) as guest:
        strangers = [connect(place) for place in (path, str(daemon.socket)) for _ in range(90)]
        eventually(lambda: "paused accepting" in daemon.log(), what="the disk's process pauses")
        guest.wait(100)
        for stranger in strangers:
            stranger.close()
        Client(path, "vm").close()
        assert daemon.json("show", "vm")["state"] == "serving"
        guest.wait(20)
    assert guest.worst_s < 1


def connect(path: str) -> socket.socket:
    """Return a connection on which nothing is said."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(path)
    return connection
