"""Bad input: each is refused in one line with the contract's exit code, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrord.storage import durable
from tests.cli.running import run
from tests.daemon import Daemon
from tests.helpers import require_loop_devices

MIB = 1 << 20


@pytest.fixture(scope="module")
def served() -> Iterator[Daemon]:
    """Serve disk `vm` (4 MiB, data), with `other.raw` beside it."""
    daemon = Daemon()
    (daemon.root / "disks").mkdir()
    (daemon.root / "disks" / "vm.raw").write_bytes(os.urandom(4 * MIB))
    (daemon.root / "disks" / "other.raw").write_bytes(os.urandom(MIB))
    daemon.start()
    daemon.attach("vm", daemon.root / "disks" / "vm.raw")
    yield daemon
    daemon.close()


def everything(daemon: Daemon) -> dict[str, str]:
    """Return every name below the daemon's folder, with what it holds."""
    found: dict[str, str] = {}
    for folder, names, files in os.walk(daemon.root):
        for name in names + files:
            path = Path(folder) / name
            if path == daemon.log_path:
                continue
            kind = oct(path.lstat().st_mode)
            if path.is_symlink():
                kind += os.readlink(path)
            elif path.is_file():
                kind += hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path)] = kind
    return found


def refuse(daemon: Daemon, code: str, *words: str | Path, status: int = 4) -> str:
    """Run a command that has to be refused with `code`; return its message."""
    before = everything(daemon)
    options = () if "--socket" in words else ("--socket", daemon.socket)
    code_returned, out, error = run(*words, *options)
    assert (code_returned, out) == (status, ""), error
    assert error.count("\n") == 1, error
    assert error.startswith("mirrord: ")
    code_returned, out, error = run(*words, *options, "--json")
    assert (code_returned, out) == (status, "")
    problem = json.loads(error)
    assert problem["code"] == code, problem
    assert everything(daemon) == before, "something was changed"
    assert "Traceback" not in daemon.log()
    return str(problem["message"])


def test_an_unknown_disk(served: Daemon) -> None:
    for words in (
        ("show", "nope"), ("move", "nope", served.root / "x.raw"), ("jobs", "nope"),
        ("pause", "nope"), ("limit", "nope", "1M"), ("wait", "nope"), ("detach", "nope"),
    ):  # fmt: skip
        assert "nope" in refuse(served, "unknown-disk", *words)


def test_a_name_in_use(served: Daemon) -> None:
    other = served.root / "disks" / "other.raw"
    assert "vm" in refuse(served, "name-in-use", "attach", "vm", other)


@pytest.mark.fault(23)
@pytest.mark.parametrize("way", ["path", "symlink", "hard link", "read-only"])
def test_the_same_file_twice(served: Daemon, tmp_path: Path, way: str) -> None:
    served.expect_log("refused")
    path = served.root / "disks" / "vm.raw"
    options = ["--read-only"] if way == "read-only" else []
    link = tmp_path / "link"
    if way == "symlink":
        link.symlink_to(path)
    elif way == "hard link":
        link.hardlink_to(path)
    else:
        link = path
    message = refuse(served, "already-served", "attach", "again", link, *options)
    assert "disk vm" in message


def test_a_file_that_another_program_uses(served: Daemon) -> None:
    path = served.root / "disks" / "other.raw"
    with path.open("rb+") as file:
        assert durable.lock_disk(file.fileno(), writing=True)
        assert str(path) in refuse(served, "in-use", "attach", "other", path)


@pytest.mark.fault(24)
def test_a_location_that_is_no_disk(served: Daemon, tmp_path: Path) -> None:
    missing = tmp_path / "missing.raw"
    assert str(missing) in refuse(served, "location-missing", "attach", "x", missing)
    deeper = tmp_path / "no" / "folder.raw"
    assert str(tmp_path / "no") in refuse(served, "location-missing", "attach", "x", deeper)
    assert str(tmp_path) in refuse(served, "is-directory", "attach", "x", tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert str(fifo) in refuse(served, "not-a-disk", "attach", "x", fifo)
    empty = tmp_path / "empty.raw"
    empty.touch()
    assert str(empty) in refuse(served, "empty", "attach", "x", empty)


def test_a_location_among_our_own_records(served: Daemon) -> None:
    """A journal could be written by a guest, and a record replaced by a target."""
    record = served.state / "disks" / "vm" / "disk.json"
    assert str(record) in refuse(served, "state-directory", "attach", "x", record)
    for target in (served.state, served.state / "x.raw", f"{served.state}/jobs/../x.raw"):
        assert str(served.state) in refuse(served, "state-directory", "move", "vm", target)
    for target in (served.runtime, served.runtime / "nbd/x.raw"):
        assert str(served.runtime) in refuse(served, "runtime-directory", "move", "vm", target)


def test_an_unreadable_location(served: Daemon, tmp_path: Path) -> None:
    """Root may read everything, but write nothing on a read-only file system."""
    secret = tmp_path / "secret.raw"
    if os.geteuid():
        secret.write_bytes(bytes(4096))
        secret.chmod(0)
        assert str(secret) in refuse(served, "unreadable", "attach", "x", secret)
        return
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True)
    try:
        secret.write_bytes(bytes(4096))
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        assert str(secret) in refuse(served, "unreadable", "attach", "x", secret)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.fault(5)
def test_a_target_that_exists(served: Daemon) -> None:
    other = served.root / "disks" / "other.raw"
    assert str(other) in refuse(served, "target-exists", "move", "vm", other)


@pytest.mark.fault(6)
@pytest.mark.parametrize("way", ["path", "symlink", "hard link", "folder"])
def test_a_target_that_is_the_source(served: Daemon, tmp_path: Path, way: str) -> None:
    path = served.root / "disks" / "vm.raw"
    target = tmp_path / "link"
    if way == "symlink":
        target.symlink_to(path)
    elif way == "hard link":
        target.hardlink_to(path)
    else:
        target = path if way == "path" else path.parent
    refuse(served, "target-is-source", "move", "vm", target)


@pytest.mark.fault(4)
def test_a_target_whose_folder_is_missing(served: Daemon, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "vm.raw"
    assert "/no" in refuse(served, "directory-missing", "move", "vm", missing)
    assert "/no" in refuse(served, "directory-missing", "move", "vm", f"{tmp_path}/no/")


@pytest.mark.fault(7)
@pytest.mark.root
def test_a_target_without_space(served: Daemon, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", small], check=True)
    try:
        message = refuse(served, "no-space", "move", "vm", small)
        assert "needed 4 MiB" in message
        assert "available 1 MiB" in message
        assert "a reboot deletes it" in message
    finally:
        # lazy, so that a failure leaves nothing behind; that nothing is held is asserted
        held = subprocess.run(["umount", small]).returncode
        if held:
            subprocess.run(["umount", "--lazy", small], check=True)
    assert not held, "a refused target is still held"


@pytest.mark.root
def test_a_block_device_that_is_too_small(served: Daemon, tmp_path: Path) -> None:
    require_loop_devices()
    backing = tmp_path / "small.img"
    backing.write_bytes(bytes(MIB))
    made = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=True
    )
    device = made.stdout.strip()
    try:
        message = refuse(served, "target-too-small", "move", "vm", device)
        assert device in message
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_a_command_in_the_wrong_phase(served: Daemon) -> None:
    for verb in ("pause", "resume", "cancel", "cutover"):
        assert "vm" in refuse(served, "no-job", verb, "vm")
    refuse(served, "no-job", "limit", "vm", "1M")
    refuse(served, "no-job", "wait", "vm")


def test_an_unknown_job(served: Daemon) -> None:
    assert "1234" in refuse(served, "unknown-job", "job", "1234")


@pytest.mark.parametrize(
    "location",
    ["nbd://host/vm", "nbds://host/vm", "nbd+unix:///vm?socket=/x"],
)
def test_places_that_come_later(served: Daemon, location: str) -> None:
    assert location in refuse(served, "not-supported-yet", "move", "vm", location)
    assert location in refuse(served, "not-supported-yet", "attach", "x", location)


def test_a_path_that_is_no_text(served: Daemon) -> None:
    message = refuse(served, "usage", "attach", "x", "/y\udcff", status=2)
    assert "UTF-8" in message
    named = os.fsencode(served.root / "disks") + b"/x\xff.raw"
    Path(os.fsdecode(named)).write_bytes(bytes(MIB))
    link = served.root / "disks" / "linked.raw"
    link.symlink_to(os.fsdecode(named))
    assert "UTF-8" in refuse(served, "bad-name", "attach", "x", link)
    refuse(served, "usage", "move", "vm", "/y\udcff", status=2)


def test_options_that_come_later(served: Daemon) -> None:
    other = served.root / "disks" / "other.raw"
    refuse(served, "not-supported-yet", "attach", "x", other, "--fuse", "/x")
    refuse(served, "not-supported-yet", "attach", "x", other, "--in-place")


@pytest.mark.parametrize(
    "words",
    [
        ("attach", "../x", "/y"), ("attach", "", "/y"), ("attach", ".x", "/y"),
        ("attach", "x" * 65, "/y"), ("attach", "x", ""), ("attach", "x", "/a\nb"),
        ("attach", "x", "/y", "--cache", "fast"), ("attach", "x"), ("attach",),
        ("move", "vm", "/y", "--limit", "fast"), ("move", "vm", "/y", "--limit", "-1"),
        ("move", "vm", "/y", "--mode", "quick"), ("move", "vm", "/y", "--verify", "half"),
        ("move", "vm", ""), ("move", "vm", "ftp://host/x"), ("limit", "vm", "12 parsecs"),
        ("limit", "vm"), ("wait", "vm", "--phase", "flying"), ("wait", "vm", "--timeout", "-1"),
        ("wait", "vm", "--timeout", "soon"), ("job", ""), ("ls", "surplus"), ("fly", "vm"),
        ("show", "vm", "--fast"), ("jobs", "a/b"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage(words: tuple[str, ...]) -> None:
    """None of these comes as far as a daemon: the socket leads nowhere, and that isn't told."""
    code, out, error = run(*words, "--socket", "/nowhere/control.sock")
    assert (code, out) == (2, ""), error
    assert error.count("\n") == 1
    assert error.startswith("mirrord: ")
    code, out, error = run(*words, "--socket", "/nowhere/control.sock", "--json")
    assert (code, out, json.loads(error)["code"]) == (2, "", "usage")


def test_no_daemon(tmp_path: Path, served: Daemon) -> None:
    nowhere = tmp_path / "nowhere.sock"
    message = refuse(served, "no-daemon", "ls", "--socket", nowhere, status=5)
    assert str(nowhere) in message


def test_a_socket_path_that_is_too_long(served: Daemon) -> None:
    refuse(served, "path-too-long", "ls", "--socket", "/" + "x" * 120)
