"""What keeps a daemon from starting, what doesn't, and what it serves when records are damaged."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from tests.daemon import Daemon
from tests.helpers import eventually

MakeDaemon = Callable[..., Daemon]


def start_another(daemon: Daemon, **changed: Path) -> subprocess.CompletedProcess[str]:
    """Try to start a daemon like `daemon`, but with the directories changed."""
    places = {"state-dir": daemon.state, "runtime-dir": daemon.runtime, "socket": daemon.socket}
    places |= {key.replace("_", "-"): path for key, path in changed.items()}
    options = [word for key, path in places.items() for word in (f"--{key}", str(path))]
    return subprocess.run(
        [*daemon.program, "daemon", *options], capture_output=True, text=True, timeout=30
    )


def refused(done: subprocess.CompletedProcess[str], named: Path) -> None:
    """Assert a refusal in one line that names the thing."""
    assert done.returncode == 4, done
    assert done.stderr.startswith("mirrord: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(named) in done.stderr


@pytest.mark.fault(23)
def test_a_second_daemon(daemon: Daemon, tmp_path: Path) -> None:
    refused(start_another(daemon), daemon.state)
    refused(start_another(daemon, state_dir=tmp_path / "s"), daemon.runtime)
    again = start_another(daemon, state_dir=tmp_path / "s", runtime_dir=tmp_path / "r")
    refused(again, daemon.socket)
    assert daemon.run("ls").returncode == 0


def test_a_stale_socket_is_replaced(daemon: Daemon) -> None:
    daemon.kill()
    assert daemon.socket.exists()
    daemon.start()
    assert daemon.run("ls").returncode == 0


def test_a_file_in_the_sockets_place(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.socket.write_text("precious")
    refused(start_another(daemon), daemon.socket)
    assert daemon.socket.read_text() == "precious"


def test_paths_that_are_too_long(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    long = tmp_path / ("x" * 100)
    refused(start_another(daemon, socket=long / "control.sock"), long)
    refused(start_another(daemon, runtime_dir=long), long)


def test_a_group_that_does_not_exist(daemon: Daemon, tmp_path: Path) -> None:
    disk = tmp_path / "vm.raw"
    disk.write_bytes(bytes(MIB))
    daemon.attach("vm", disk)
    daemon.kill()
    config = tmp_path / "mirrord.toml"
    config.write_text('nbd_socket_group = "nobody-has-it"')
    done = start_another(daemon, config=config)
    assert done.returncode == 2, done
    assert done.stderr == (
        "mirrord: nbd_socket_group: there is no group nobody-has-it on this system\n"
    )
    daemon.start()
    assert daemon.json("show", "vm")["state"] == "serving"


def test_a_name_that_makes_the_path_too_long(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    deep = daemon.root / ("r" * (80 - len(str(daemon.root))))
    daemon.runtime, daemon.socket = deep, deep / "control.sock"
    daemon.start()
    disk = tmp_path / "vm.raw"
    disk.write_bytes(bytes(MIB))
    done = daemon.run("attach", "n" * 64, disk, "--json")
    assert done.returncode == 4
    assert "path-too-long" in done.stderr
    daemon.attach("n", disk)


def test_a_state_directory_that_cant_be_used(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    file = tmp_path / "file"
    file.touch()
    refused(start_another(daemon, state_dir=file / "below"), file)
    refused(start_another(daemon, state_dir=file), file)
    (daemon.state / "version").write_text("7\n")
    refused(start_another(daemon), daemon.state)
    (daemon.state / "version").write_text("?")
    refused(start_another(daemon), daemon.state / "version")


@pytest.mark.fault(21)
@pytest.mark.root
def test_a_read_only_state_directory(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    daemon = make_daemon()
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", sealed], check=True)
    try:
        refused(start_another(daemon, state_dir=sealed), sealed)
    finally:
        subprocess.run(["umount", sealed], check=True)


def test_a_damaged_disk_record(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    daemon.expect_log("disk damaged")
    daemon.start()
    for name in ("good", "bad", "odd"):
        (tmp_path / f"{name}.raw").write_bytes(bytes(MIB))
        daemon.attach(name, tmp_path / f"{name}.raw")
    daemon.kill()
    for name in ("good", "bad", "odd"):
        daemon.kill_disk(name)
    bad, odd = (daemon.state / "disks" / name / "disk.json" for name in ("bad", "odd"))
    bad.write_bytes(bad.read_bytes()[:-20])
    odd.write_text(odd.read_text().replace('"odd"', '"even"'))
    before = bad.read_bytes(), odd.read_bytes()
    daemon.start()
    found = {each["name"]: each for each in daemon.json("ls")}
    assert found["good"]["state"] == "serving"
    for name, record in (("bad", bad), ("odd", odd)):
        assert found[name]["state"] == "refused"
        assert str(record) in found[name]["reason"]
        assert str(record) in daemon.run("move", name, tmp_path / "x.raw").stderr
    assert (bad.read_bytes(), odd.read_bytes()) == before


def test_a_disk_with_a_damaged_record_is_not_let_go_while_a_process_serves_it(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    daemon = make_daemon()
    daemon.expect_log("disk damaged")
    daemon.start()
    (tmp_path / "vm.raw").write_bytes(bytes(MIB))
    daemon.attach("vm", tmp_path / "vm.raw")
    record = daemon.state / "disks" / "vm" / "disk.json"
    good = record.read_bytes()
    daemon.kill()
    record.write_text('{"x": 1}')
    daemon.start()
    for options in ((), ("--force",)):
        told = daemon.run("detach", "vm", *options)
        assert told.returncode == 4
        assert "a process still serves it" in told.stderr
    daemon.kill()
    record.write_bytes(good)
    daemon.start()
    assert daemon.json("show", "vm")["state"] == "serving"
    daemon.kill()
    daemon.kill_disk("vm")
    record.write_text('{"x": 1}')
    daemon.start()
    told = daemon.run("detach", "vm")
    assert (told.returncode, told.stdout) == (0, "disk vm is no longer served\n")


def test_an_attach_that_is_refused_is_no_error_of_the_service(
    daemon: Daemon, tmp_path: Path
) -> None:
    """Whoever asked is told; nothing is announced here, so nothing above INFO may be logged."""
    refused = daemon.run("attach", "vm", tmp_path / "missing.raw")
    assert refused.returncode == 4
    assert refused.stderr.count("missing.raw") == 1
    assert daemon.log().count("disk refused") == 1


@pytest.mark.fault(22)
@pytest.mark.parametrize("damage", ["job.json", "log"])
def test_a_damaged_job(make_daemon: MakeDaemon, tmp_path: Path, damage: str) -> None:
    """The disk it may be about is refused and the file is named; the other is served."""
    daemon = make_daemon()
    daemon.expect_log("job damaged", "refused", "disk process")
    daemon.start()
    for name in ("vm", "other"):
        (tmp_path / f"{name}.raw").write_bytes(os.urandom(8 * MIB))
        daemon.attach(name, tmp_path / f"{name}.raw")
    job_id = daemon.move("vm", tmp_path / "moved.raw", "--limit", "1M")
    daemon.kill()
    for name in ("vm", "other"):
        daemon.kill_disk(name)
    path = daemon.state / "jobs" / job_id / damage
    content = bytearray(path.read_bytes())
    content[60] ^= 0x40
    path.write_bytes(b"?" if damage == "job.json" else content)
    daemon.start()
    found = {each["name"]: each for each in daemon.json("ls")}
    assert found["vm"]["state"] == "refused"
    assert str(path) in found["vm"]["reason"]
    assert str(path) in daemon.run("job", job_id[:8]).stderr
    assert found["other"]["state"] == "serving"


def test_what_a_crash_left_of_an_attach_is_swept(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.start()
    daemon.stop()
    half = daemon.state / "disks" / "half"
    half.mkdir()
    (half / "attach.json").write_text('{"name": "half", "location": "/x"}')
    (daemon.state / "jobs" / "00000000").mkdir()
    (daemon.state / "jobs" / ".1.forgotten").mkdir()
    daemon.start()
    assert daemon.json("ls") == []
    assert list((daemon.state / "disks").iterdir()) == []
    assert list((daemon.state / "jobs").iterdir()) == []


def test_wrong_configuration(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    config = tmp_path / "mirrord.toml"
    config.write_text('verify = "full"\nmax_movs = 3\n')
    done = subprocess.run(
        [*daemon.program, "daemon", "--config", str(config)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"{config}, line 2: unknown key max_movs" in done.stderr


def test_systemd_is_told(make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = make_daemon()
    address = str(daemon.root / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(15)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        daemon.start()
        assert manager.recv(100) == b"READY=1"
        daemon.stop()
        assert manager.recv(100) == b"STOPPING=1"


def test_the_watchdog_is_fed(make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = make_daemon()
    address = str(daemon.root / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(15)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        daemon.start()
        assert [manager.recv(100) for _ in range(4)] == [b"READY=1"] + 3 * [b"WATCHDOG=1"]
        os.kill(daemon.pid, signal.SIGSTOP)  # a daemon that hangs
        try:
            manager.settimeout(0.5)
            with pytest.raises(TimeoutError):
                [manager.recv(100) for _ in range(10)]
        finally:
            daemon.kill()


def test_a_socket_that_systemd_made(make_daemon: MakeDaemon) -> None:
    """LISTEN_FDS: a connect waits from the boot on, and the socket stays when the daemon ends."""
    daemon = make_daemon()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(daemon.socket))
        listener.listen()
        script = (
            f"exec 3<&{listener.fileno()}; export LISTEN_PID=$$ LISTEN_FDS=1; "
            f"exec {daemon.program[0]} daemon --state-dir {daemon.state} "
            f"--runtime-dir {daemon.runtime}"
        )
        with daemon.log_path.open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", script], pass_fds=[listener.fileno()], stderr=log
            )
        eventually(lambda: "ready socket=" in daemon.log(), 15, "ready")
        assert daemon.run("ls").returncode == 0
        process.terminate()
        assert process.wait(15) == 0
        assert daemon.socket.exists()


def test_clients_of_a_daemon_that_does_not_start_are_told_why(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """At a socket of systemd's, which would start it for them again and again."""
    daemon = make_daemon()
    config = tmp_path / "mirrord.toml"
    config.write_text("bad = 1\n")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(daemon.socket))
        listener.listen()
        asked = subprocess.Popen(
            [*daemon.program, "ls", "--socket", str(daemon.socket)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        select.select([listener], [], [], 15)
        started = subprocess.run(
            ["bash", "-c", f"exec 3<&{listener.fileno()}; export LISTEN_PID=$$ LISTEN_FDS=1; "
             f"exec {daemon.program[0]} daemon --config {config}"],
            pass_fds=[listener.fileno()], capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        _, told = asked.communicate(timeout=15)
    assert (started.returncode, asked.returncode) == (2, 5)
    assert started.stderr.startswith(f"mirrord: {config}, line 1: unknown key bad")
    assert told == started.stderr.replace("mirrord: ", "mirrord: the daemon does not start: ")
