"""A server of a share dies in every phase of a move, in every way, under a writer.

Before the commit the guest notices nothing: the job degrades and goes on by itself. After it the
guest's requests wait, and nothing acknowledged is lost. The writer's requests never fail; at the
end each block holds its last write.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon
from tests.e2e.test_directions import MIB, SIZE_BYTES, fill, read_all
from tests.helpers import eventually
from tests.nbd_writer import BLOCK_BYTES, WRITE, Client, Writer
from tests.samba import Samba
from tests.shares import keep_password, leftovers, section
from tests.smb_fixtures import make_samba
from tests.tcp_proxy import Proxy

__all__ = ["make_samba"]

LOGGED = ("connection lost", "connected again", "channel", "flush not possible", "clear intent-map")
SHORT_S = 2.0  # shorter than any deadline
SERVED_S = 14.0  # 6 to find the target, 2 to remove it, a start, and a busy machine
LONG_S = 13.0  # longer than the ten seconds after which a silent server counts as gone


def kill_child(samba: Samba) -> None:
    """Kill the processes that serve our connections."""
    samba.kill_child()


def reboot(samba: Samba) -> None:
    """Kill all of smbd and start it as after a reboot."""
    samba.kill_all()
    samba.start(rebooted=True)


def restart(samba: Samba) -> None:
    """Stop smbd in good order, and start it."""
    samba.restart()


def pause(samba: Samba, duration_s: float = SHORT_S) -> None:
    """Stop everything for a while: connected, but no answer."""
    samba.pause(everything=True)
    resting(duration_s)
    samba.go_on()


def pause_long(samba: Samba) -> None:
    """Stop everything for longer than the deadline."""
    pause(samba, LONG_S)


def resting(pause_s: float) -> None:
    """Let a fault last: the pause is the fault itself."""
    time.sleep(pause_s)


FAULTS: list[Callable[[Samba], None]] = [kill_child, reboot, restart, pause]


@pytest.fixture
def start(make_samba: Callable[..., Samba], make_daemon: Callable[..., Daemon]) -> Any:
    """Start a server and a daemon that knows its share."""

    def begin(**keys: object) -> tuple[Samba, Daemon]:
        samba = make_samba()
        daemon = make_daemon(section(samba, **keys))
        daemon.expect_log(*LOGGED)
        daemon.start()
        return samba, daemon

    return begin


def begin_writing(daemon: Daemon, location: Path | str) -> Writer:
    """Attach a disk and write to it."""
    writer = Writer(daemon.attach("vm", location), "vm", seed=3, hot_blocks=1024)
    writer.start()
    writer.wait_acknowledged(200)
    return writer


def check(writer: Writer, before: bytes, after: bytes) -> None:
    """Stop the writer and compare what it was told with what is there."""
    writer.check(lambda offset, length: after[offset : offset + length])
    untouched = 1024 * 4096
    assert after[untouched:] == before[untouched:]


@pytest.mark.fault(15)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("phase", ["copying", "mirroring"])
def test_before_the_commit_the_guest_notices_nothing(
    start: Any, tmp_path: Path, phase: str, fault: Callable[[Samba], None]
) -> None:
    samba, daemon = start()
    source = tmp_path / "vm.raw"
    fill(source, SIZE_BYTES)
    before = read_all(source, SIZE_BYTES)
    writer = begin_writing(daemon, source)
    options = ("--limit", "4MiB") if phase == "copying" else ("--cutover", "manual")
    job_id = daemon.move("vm", samba.url("vm.raw"), *options)
    eventually(lambda: daemon.job(job_id)["phase"] == phase, 30, f"the job is {phase}")
    writer.wait_acknowledged(200)

    fault(samba)

    writer.wait_acknowledged(300)
    daemon.json("limit", "vm", "0")
    if phase == "mirroring":
        daemon.json("cutover", "vm")
    daemon.wait("vm")
    writer.wait_acknowledged(100)
    writer.stop()
    daemon.json("detach", "vm")
    check(writer, before, samba.file("vm.raw").read_bytes())
    assert not source.exists()
    assert leftovers(samba.folder()) == []
    if fault is not pause:
        phases = [step["phase"] for step in daemon.job(job_id)["story"]]
        assert "degraded" in phases, phases


@pytest.mark.fault(15)
@pytest.mark.parametrize("fault", [*FAULTS, pause_long], ids=lambda fault: fault.__name__)
def test_after_the_commit_the_guest_only_waits(start: Any, fault: Callable[[Samba], None]) -> None:
    samba, daemon = start()
    before = bytes(SIZE_BYTES)
    samba.put("vm.raw", b"", SIZE_BYTES)
    writer = begin_writing(daemon, samba.url("vm.raw"))
    for _ in range(2):
        fault(samba)
        writer.wait_acknowledged(300)
    writer.stop()
    assert writer.reconnects == 0, "the guest's connection is none of the server's affairs"
    share = daemon.json("show", "vm")["share"]
    assert (share["state"], share["reason"]) == ("connected", None)
    daemon.json("detach", "vm")
    check(writer, before, samba.file("vm.raw").read_bytes())


def test_a_server_that_is_away_too_long_is_an_error_and_then_is_well_again(start: Any) -> None:
    samba, daemon = start(io_timeout=2)
    daemon.expect_log("last flush failed", "restarting disk process")
    samba.put("vm.raw", b"", SIZE_BYTES)
    daemon.attach("vm", samba.url("vm.raw"))
    samba.kill_all()
    away = eventually(
        lambda: (share := daemon.json("show", "vm")["share"])["state"] == "away" and share,
        what="show says that the server is away",
    )
    assert str(samba.port) in away["reason"]
    assert away["io_timeout_s"] == 2.0
    done = daemon.run("move", "vm", samba.url("other.raw"))
    assert done.returncode == 4, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    samba.start(rebooted=True)
    eventually(
        lambda: daemon.json("show", "vm")["share"]["state"] == "connected",
        what="show says that the server is back",
    )


def test_a_disk_with_unflushed_writes_is_not_let_go_while_its_server_is_away(start: Any) -> None:
    samba, daemon = start()
    daemon.expect_log("detached unflushed", "last flush failed")
    samba.put("vm.raw", b"", SIZE_BYTES)
    client = Client(daemon.attach("vm", samba.url("vm.raw")), "vm")
    client.send(WRITE, 1, 0, BLOCK_BYTES, b"w" * BLOCK_BYTES)
    assert client.receive() == (1, 0)
    client.close()
    samba.kill_all()
    eventually(lambda: daemon.json("show", "vm")["share"]["state"] == "away", what="it is away")
    for words in (("detach", "vm"), ("upgrade", "vm", "--force")):
        done = daemon.run(*words, "--json")
        assert done.returncode == 4
        assert "not-flushed" in done.stderr
    assert re.search(r"^problem +disk vm +away: ", daemon.run("doctor").stdout, re.M)
    assert re.search(r"^vm +away ", daemon.run("ls").stdout, re.M)
    samba.start(rebooted=True)
    eventually(
        lambda: daemon.json("show", "vm")["share"]["state"] == "connected", 30, what="it is back"
    )
    daemon.json("detach", "vm")
    assert samba.file("vm.raw").read_bytes()[:BLOCK_BYTES] == b"w" * BLOCK_BYTES

    daemon.attach("vm", samba.url("vm.raw"))
    samba.kill_all()
    eventually(lambda: daemon.json("show", "vm")["share"]["state"] == "away", what="it is away")
    daemon.json("detach", "vm")  # nothing is owed


@pytest.mark.parametrize("stopped", [False, True], ids=["dead", "stopped"])
def test_a_guest_waits_for_its_own_disk_only_so_long(
    start: Any, tmp_path: Path, stopped: bool
) -> None:
    """The disk's process is killed while the server of a move's target is away."""
    samba, daemon = start()
    daemon.expect_log("restarting disk process", "leave job=", "location hangs")
    source = tmp_path / "vm.raw"
    fill(source, SIZE_BYTES)
    socket = daemon.attach("vm", source)
    job_id = daemon.move("vm", samba.url("vm.raw"), "--limit", "4MiB")
    eventually(lambda: daemon.job(job_id)["phase"] == "copying", 30, "the job is copying")
    samba.pause(everything=True) if stopped else samba.kill_all()
    daemon.kill_disk("vm")
    began_s = time.monotonic()
    client = Client(socket, "vm")
    client.send(WRITE, 1, 0, BLOCK_BYTES, b"w" * BLOCK_BYTES)
    assert client.receive() == (1, 0)
    assert time.monotonic() - began_s < SERVED_S
    client.close()
    assert "could not be opened after a restart" in daemon.job(job_id)["reason"]
    assert source.read_bytes()[:BLOCK_BYTES] == b"w" * BLOCK_BYTES
    if stopped:
        samba.go_on()


def test_an_upgrade_makes_durable_what_its_process_alone_has(start: Any) -> None:
    """Its server is connected and doesn't answer: what it hasn't flushed may have to be repeated.

    That was lost when the server's power failed then, and nobody said so.
    """
    samba, daemon = start()
    daemon.expect_log("connection lost")
    samba.put("vm.raw", b"", SIZE_BYTES)
    client = Client(daemon.attach("vm", samba.url("vm.raw")), "vm")
    client.send(WRITE, 1, 0, BLOCK_BYTES, b"w" * BLOCK_BYTES)
    assert client.receive() == (1, 0)
    served_by = daemon.disk_pid("vm")
    samba.pause(everything=True)
    refused = daemon.run("upgrade", "vm", "--force", "--json")
    samba.go_on()
    assert (refused.returncode, json.loads(refused.stderr)["code"]) == (4, "not-flushed")
    assert daemon.disk_pid("vm") == served_by
    client.send(WRITE, 2, BLOCK_BYTES, BLOCK_BYTES, b"x" * BLOCK_BYTES)
    assert client.receive() == (2, 0)
    client.close()
    eventually(lambda: daemon.run("upgrade", "vm", "--force").returncode == 0, 30, "it is well")
    assert daemon.disk_pid("vm") != served_by
    daemon.json("detach", "vm")
    expected = b"w" * BLOCK_BYTES + b"x" * BLOCK_BYTES
    assert samba.file("vm.raw").read_bytes()[: len(expected)] == expected


@pytest.mark.parametrize("line", ["read only = yes", "valid users = daemon"])
def test_a_disk_that_is_denied_when_its_process_starts_waits_for_its_rights(
    start: Any, line: str
) -> None:
    """As one whose process lives: nobody need restart anything."""
    samba, daemon = start()
    daemon.expect_log("restarting disk process", "unreachable")
    samba.put("vm.raw", b"", SIZE_BYTES)
    daemon.attach("vm", samba.url("vm.raw"))
    samba.reconfigure(share_lines=[line])
    samba.kill_child()
    daemon.kill_disk("vm")
    eventually(lambda: daemon.json("show", "vm")["reason"], 20, "it says that it is denied")
    assert daemon.json("show", "vm")["state"] == "starting"
    samba.reconfigure(share_lines=[])
    eventually(lambda: daemon.json("show", "vm")["state"] == "serving", 30, "it serves again")
    refused = daemon.run("attach", "other", samba.url("missing.raw"), "--json")
    assert json.loads(refused.stderr)["code"] == "location-missing"


def test_a_disk_waits_for_a_server_that_is_away_at_its_start(start: Any) -> None:
    samba, daemon = start()
    daemon.expect_log("unreachable", "restarting disk process", "last flush failed")
    samba.put("vm.raw", b"", SIZE_BYTES)
    writer = begin_writing(daemon, samba.url("vm.raw"))
    samba.kill_all()
    daemon.kill_disk("vm")
    shown = eventually(
        lambda: (
            (disk := daemon.json("show", "vm"))["reason"] and "reached" in disk["reason"] and disk
        ),
        40,
        "show says what the disk waits for",
    )
    assert shown["state"] == "starting"
    samba.start(rebooted=True)
    writer.wait_acknowledged(100)
    writer.stop()
    daemon.json("detach", "vm")
    after = samba.file("vm.raw").read_bytes()
    writer.check(lambda offset, length: after[offset : offset + length])


@pytest.mark.fault(16)
def test_a_wrong_password_pauses_the_move_and_a_right_one_lets_it_go_on(
    start: Any, tmp_path: Path
) -> None:
    samba, daemon = start()
    source = tmp_path / "vm.raw"
    fill(source, SIZE_BYTES)
    before = read_all(source, SIZE_BYTES)
    writer = begin_writing(daemon, source)
    job_id = daemon.move("vm", samba.url("vm.raw"), "--limit", "4MiB")
    eventually(lambda: daemon.job(job_id)["phase"] == "copying", 30, "the job is copying")
    old = samba.password
    samba.set_password("another one")
    samba.kill_child()
    job = eventually(
        lambda: (job := daemon.job(job_id))["phase"] == "paused" and job, 60, "the job pauses"
    )
    assert "wrong user or password" in job["reason"]
    for secret in (old, "another one"):
        assert secret not in str(job)
        assert secret not in daemon.log()
    writer.wait_acknowledged(100)
    keep_password(samba)
    daemon.json("limit", "vm", "0")
    daemon.json("resume", "vm")
    daemon.wait("vm")
    writer.stop()
    daemon.json("detach", "vm")
    check(writer, before, samba.file("vm.raw").read_bytes())


def test_a_full_share_pauses_the_move_and_space_lets_it_go_on(start: Any, tmp_path: Path) -> None:
    from tests.storage.places import mounted

    with mounted("tmpfs", tmp_path) as small:
        samba, daemon = start()
        samba.reconfigure(shares={"disks": small})
        ballast = small / "ballast"
        ballast.write_bytes(bytes(48 * MIB))
        source = tmp_path / "vm.raw"
        fill(source, SIZE_BYTES)
        before = read_all(source, SIZE_BYTES)
        writer = begin_writing(daemon, source)
        refused = daemon.run("move", "vm", samba.url("vm.raw"))
        assert refused.returncode == 4, refused.stderr
        assert "not enough space" in refused.stderr
        job_id = daemon.move("vm", samba.url("vm.raw"), "--force")
        eventually(lambda: daemon.job(job_id)["phase"] == "paused", 60, "the job pauses")
        writer.wait_acknowledged(100)
        ballast.unlink()
        daemon.wait("vm")
        writer.stop()
        daemon.json("detach", "vm")
        check(writer, before, samba.file("vm.raw").read_bytes())
        samba.stop()


@pytest.mark.parametrize("meddling", ["cut", "corrupt", "truncate"])
def test_what_happens_to_bytes_on_the_way_is_noticed(
    make_samba: Callable[..., Samba],
    make_daemon: Callable[..., Daemon],
    tmp_path: Path,
    meddling: str,
) -> None:
    samba = make_samba()
    with Proxy(samba.port) as proxy:
        daemon = make_daemon(section(samba, port=proxy.port))
        daemon.expect_log(*LOGGED)
        daemon.start()
        source = tmp_path / "vm.raw"
        fill(source, SIZE_BYTES)
        before = read_all(source, SIZE_BYTES)
        writer = begin_writing(daemon, source)
        target = samba.url("vm.raw", port=proxy.port)
        job_id = daemon.move("vm", target, "--cutover", "manual")
        eventually(lambda: daemon.job(job_id)["phase"] == "mirroring", 30, "the job mirrors")
        for direction in ("to_server", "to_client"):
            if meddling == "cut":
                proxy.cut()
            elif meddling == "truncate":
                proxy.truncate(direction)
            else:
                proxy.corrupt(direction, skip=200)
            writer.wait_acknowledged(300)
        daemon.json("cutover", "vm")
        daemon.wait("vm")
        proxy.cut()
        writer.wait_acknowledged(200)
        writer.stop()
        daemon.json("detach", "vm")
        check(writer, before, samba.file("vm.raw").read_bytes())
