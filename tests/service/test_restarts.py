"""The daemon and the disk processes die and come back; guests see no error, moves go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import mirrord
from mirrord.core.geometry import MIB
from tests.daemon import Daemon, command_line
from tests.helpers import eventually
from tests.nbd_writer import WRITE, Client, Writer, content

SLOW = "8MiB"  # a move that is still running when the test looks


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Make a disk that is all data."""
    path = tmp_path / "vm.raw"
    path.write_bytes(os.urandom(32 * MIB))
    return path


def write(client: Client, block: int, sequence: int) -> None:
    """Write one block and expect success."""
    client.send(WRITE, sequence, block * 4096, 4096, content(block, sequence))
    assert client.receive() == (sequence, 0)


def test_a_connected_guest_does_not_notice_the_daemon(daemon: Daemon, disk: Path) -> None:
    client = Client(daemon.attach("vm", disk), "vm")
    pid = daemon.disk_pid("vm")
    write(client, 1, 1)
    daemon.kill()
    write(client, 2, 2)
    assert daemon.run("ls").returncode == 5
    second = Client(daemon.nbd_socket("vm"), "vm")  # connecting works without a daemon, too
    write(second, 3, 3)
    daemon.start()
    write(client, 4, 4)
    assert daemon.disk_pid("vm") == pid
    shown = daemon.json("show", "vm")
    assert (shown["state"], shown["clients"]) == ("serving", 2)
    for block in (1, 2, 3, 4):
        assert client.read(block * 4096, 4096) == content(block, block)
    client.close()
    second.close()


@pytest.mark.fault(2)
def test_the_daemon_ends_in_good_order_and_leaves_disks_served(daemon: Daemon, disk: Path) -> None:
    client = Client(daemon.attach("vm", disk), "vm")
    pid = daemon.disk_pid("vm")
    assert daemon.stop() == 0
    assert not daemon.socket.exists()
    write(client, 1, 1)
    daemon.start()
    assert daemon.disk_pid("vm") == pid
    client.close()


def test_a_disk_process_that_dies_is_started_again(daemon: Daemon, disk: Path) -> None:
    daemon.expect_log("restarting disk process")
    writer = Writer(daemon.attach("vm", disk), "vm", seed=1)
    writer.start()
    for _ in range(3):
        writer.wait_acknowledged(50)
        daemon.kill_disk("vm")
    writer.wait_acknowledged(50)
    writer.stop()
    assert writer.reconnects >= 3
    client = Client(daemon.nbd_socket("vm"), "vm")
    writer.check(client.read)
    client.close()


def test_a_disk_process_that_died_with_the_daemon_is_started_again(
    daemon: Daemon, disk: Path
) -> None:
    daemon.attach("vm", disk)
    daemon.kill()
    daemon.kill_disk("vm")
    daemon.start()
    assert daemon.json("show", "vm")["state"] == "serving"
    client = Client(daemon.nbd_socket("vm"), "vm")
    write(client, 1, 1)
    client.close()


def test_a_disk_process_that_dies_after_the_daemons_return_is_started_again(
    daemon: Daemon, disk: Path
) -> None:
    """The returned daemon holds the listening socket that it got from the process."""
    daemon.expect_log("restarting disk process")
    writer = Writer(daemon.attach("vm", disk), "vm", seed=2)
    writer.start()
    daemon.kill()
    daemon.start()
    inode = os.stat(daemon.nbd_socket("vm")).st_ino
    daemon.kill_disk("vm")
    writer.wait_acknowledged(20)
    writer.stop()
    assert os.stat(daemon.nbd_socket("vm")).st_ino == inode, "the guests' socket was made anew"


def test_a_move_goes_on_without_the_daemon(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    daemon.attach("vm", disk)
    job_id = daemon.move("vm", tmp_path / "moved.raw", "--limit", SLOW)
    daemon.kill()
    eventually(lambda: not disk.exists(), 30, "the move ends by itself")
    daemon.start()
    job = daemon.job(job_id)
    assert (job["phase"], job["verified"], job["bytes_remaining"]) == ("done", True, 0)
    assert daemon.json("show", "vm")["location"] == str(tmp_path / "moved.raw")
    assert (tmp_path / "moved.raw").read_bytes() == before


def test_a_move_resumes_after_its_process_died(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.expect_log("restarting disk process")
    before = disk.read_bytes()
    daemon.attach("vm", disk)
    job_id = daemon.move("vm", tmp_path / "moved.raw", "--limit", SLOW)
    daemon.kill_disk("vm")
    eventually(lambda: daemon.run("limit", "vm", "0").returncode == 0, what="the move is back")
    daemon.wait("vm")
    assert daemon.job(job_id)["phase"] == "done"
    assert (tmp_path / "moved.raw").read_bytes() == before


@pytest.mark.parametrize("both_die", [False, True])
def test_a_disk_stays_at_its_new_place(
    daemon: Daemon, disk: Path, tmp_path: Path, both_die: bool
) -> None:
    daemon.expect_log("restarting disk process")
    daemon.attach("vm", disk)
    daemon.move("vm", tmp_path / "moved.raw")
    daemon.wait("vm")
    if both_die:
        daemon.kill()
    daemon.kill_disk("vm")
    if both_die:
        daemon.start()
    shown = eventually(
        lambda: (found := daemon.json("show", "vm"))["state"] == "serving" and found,
        what="the disk is served again",
    )
    assert shown["location"] == str(tmp_path / "moved.raw")
    assert shown["job"] is None


@pytest.mark.fault(2)
def test_a_disk_process_ends_in_good_order(daemon: Daemon, disk: Path) -> None:
    daemon.expect_log("restarting disk process")
    daemon.attach("vm", disk)
    pid = daemon.disk_pid("vm")
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: command_line(pid) in ([], [""]), 10, "it ends within ten seconds")
    eventually(lambda: daemon.json("show", "vm")["state"] == "serving", what="served again")
    assert daemon.disk_pid("vm") != pid
    assert "status=0" in daemon.log()


def test_a_disk_that_is_gone_is_refused_and_others_are_served(
    make_daemon: Callable[..., Daemon], disk: Path, tmp_path: Path
) -> None:
    daemon = make_daemon()
    daemon.expect_log("refused")
    daemon.start()
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB))
    daemon.attach("vm", disk)
    daemon.attach("other", other)
    daemon.kill()
    for name in ("vm", "other"):
        daemon.kill_disk(name)
    disk.rename(tmp_path / "elsewhere.raw")
    daemon.start()
    states = {each["name"]: each for each in daemon.json("ls")}
    assert states["other"]["state"] == "serving"
    assert states["vm"]["state"] == "refused"
    assert str(disk) in states["vm"]["reason"]
    assert not os.path.exists(daemon.nbd_socket("vm"))
    refused = daemon.run("move", "vm", tmp_path / "x.raw")
    assert refused.returncode == 4
    assert str(disk) in refused.stderr
    assert daemon.run("detach", "vm").returncode == 0
    assert [each["name"] for each in daemon.json("ls")] == ["other"]


def test_detach(daemon: Daemon, disk: Path) -> None:
    client = Client(daemon.attach("vm", disk), "vm")
    pid = daemon.disk_pid("vm")
    write(client, 7, 7)
    refused = daemon.run("detach", "vm", "--json")
    assert refused.returncode == 4
    assert "clients-connected" in refused.stderr
    write(client, 8, 8)
    assert daemon.json("detach", "vm", "--force")["state"] == "detached"
    client.close()
    assert command_line(pid) in ([], [""])
    assert daemon.json("ls") == []
    assert not os.path.exists(daemon.nbd_socket("vm"))
    assert list((daemon.state / "disks").iterdir()) == []
    with disk.open("rb") as file:
        file.seek(7 * 4096)
        assert file.read(2 * 4096) == content(7, 7) + content(8, 8)
    daemon.attach("vm", disk)  # nothing of it is in the way


def test_detach_while_it_moves(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    daemon.attach("vm", disk)
    daemon.move("vm", tmp_path / "moved.raw", "--limit", "64KiB")  # for minutes
    for options in ([], ["--force"]):
        refused = daemon.run("detach", "vm", *options, "--json")
        assert refused.returncode == 4
        assert "job-running" in refused.stderr
    assert daemon.run("cancel", "vm").returncode == 0
    assert daemon.json("detach", "vm")["state"] == "detached"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["vm.raw"]


def test_a_disk_process_is_replaced_without_an_error(daemon: Daemon, disk: Path) -> None:
    """SIGHUP is for upgrades: what wasn't answered is sent again to the next process."""
    daemon.expect_log("restarting disk process")
    writer = Writer(daemon.attach("vm", disk), "vm", seed=3)
    writer.start()
    writer.wait_acknowledged(20)
    pid = daemon.disk_pid("vm")
    os.kill(pid, signal.SIGHUP)
    eventually(lambda: daemon.find_disk_pid("vm") not in (pid, None), what="another process")
    writer.wait_acknowledged(20)
    writer.stop()


def test_an_upgrade_replaces_each_process_and_guests_and_moves_go_on(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    writer = Writer(daemon.attach("vm", disk), "vm", seed=4)
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB))
    daemon.attach("other", other)
    writer.start()
    writer.wait_acknowledged(20)
    job = daemon.move("vm", tmp_path / "moved.raw", "--limit", SLOW)
    pids = {name: daemon.disk_pid(name) for name in ("vm", "other")}
    same = daemon.json("upgrade")
    assert [(each["name"], each["version"]) for each in same] == [
        ("other", mirrord.__version__), ("vm", mirrord.__version__),
    ]  # fmt: skip
    assert {name: daemon.disk_pid(name) for name in pids} == pids, "they are of this version"
    (renewed,) = daemon.json("upgrade", "vm", "--force")
    assert (renewed["state"], renewed["version"]) == ("serving", mirrord.__version__)
    assert daemon.disk_pid("vm") != pids["vm"]
    assert daemon.disk_pid("other") == pids["other"]
    writer.wait_acknowledged(20)
    assert daemon.run("limit", "vm", "1GiB").returncode == 0
    daemon.wait("vm")
    assert daemon.job(job)["phase"] == "done"
    assert "other" in daemon.run("upgrade", "--force").stdout
    assert daemon.disk_pid("other") != pids["other"]
    writer.wait_acknowledged(20)
    writer.stop()


def test_an_upgrade_tells_why_a_disk_is_not_served_afterwards(daemon: Daemon, disk: Path) -> None:
    daemon.expect_log("disk refused", "refused")
    daemon.attach("vm", disk)
    os.truncate(disk, 0)
    refused = daemon.run("upgrade", "vm", "--force", "--json")
    assert refused.returncode == 4
    assert str(disk) in refused.stderr
    assert daemon.json("show", "vm")["state"] == "refused"
    again = daemon.run("upgrade", "vm", "--force", "--json")
    assert (again.returncode, "disk-not-serving" in again.stderr) == (4, True)
    assert daemon.run("upgrade", "gone", "--json").returncode == 4


def test_a_disk_that_hangs_stalls_nobody_else(daemon: Daemon, disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB))
    daemon.attach("vm", disk)
    daemon.attach("other", other)
    pid = daemon.disk_pid("vm")
    os.kill(pid, signal.SIGSTOP)
    try:
        found = {each["name"]: each for each in daemon.json("ls")}
        assert found["other"]["state"] == "serving"
        assert "has not answered" in found["vm"]["reason"]
        assert daemon.json("detach", "other")["state"] == "detached"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert daemon.json("show", "vm")["reason"] is None


def test_a_disk_that_keeps_dying_is_started_ever_slower_and_can_be_detached(
    daemon: Daemon, disk: Path
) -> None:
    daemon.expect_log("restarting disk process", "disk process")
    daemon.attach("vm", disk)
    pids = set()
    for _ in range(3):
        pids.add(daemon.disk_pid("vm"))
        daemon.kill_disk("vm")
    eventually(lambda: "delay_s=0.5" in daemon.log(), what="the third start waits longer")
    assert "delay_s=0.0" in daemon.log()
    assert len(pids) == 3
    assert daemon.run("detach", "vm", "--force").returncode == 0
    assert daemon.json("ls") == []
