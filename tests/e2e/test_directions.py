"""A disk moves under a writer between files and block devices, in all four directions.

The rest of the work is the storage tests'; this is about the whole: daemon, disk process, export.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.helpers import require_loop_devices, require_program
from tests.nbd_writer import Writer

MIB = 1 << 20
SIZE_BYTES = 32 * MIB

MakeLoop = Callable[[Path, int], Path]


@pytest.fixture
def make_loop() -> Iterator[MakeLoop]:
    """Make loop devices over new files; they go with the test."""
    devices: list[str] = []

    def make(backing: Path, size_bytes: int) -> Path:
        require_loop_devices()
        with backing.open("wb") as file:
            file.truncate(size_bytes)
        losetup = [require_program("losetup"), "--find", "--show", str(backing)]
        device = subprocess.run(
            losetup, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
        devices.append(device)
        return Path(device)

    yield make
    for device in devices:
        subprocess.run([require_program("losetup"), "-d", device], check=True, timeout=30)


def fill(path: Path, size_bytes: int) -> None:
    """Write a disk with data in every second MiB, holes (of a file) in the others."""
    chance = random.Random(11)
    with path.open("r+b" if path.exists() else "wb") as file:
        for offset in range(0, size_bytes - MIB, 2 * MIB):
            file.seek(offset)
            file.write(chance.randbytes(MIB))
        if path.is_file():
            file.truncate(size_bytes)


def read_all(path: Path, size_bytes: int) -> bytes:
    """Return a disk's content."""
    with path.open("rb") as file:
        return file.read(size_bytes)


def move_under_writer(
    daemon: Daemon, target: Path | str, mode: str, *options: str
) -> tuple[Writer, str]:
    """Move disk `vm` while a writer writes from before to after; return both."""
    writer = Writer(daemon.nbd_socket("vm"), "vm", seed=2, hot_blocks=1024)
    writer.start()
    writer.wait_acknowledged(200)
    job_id = daemon.move("vm", target, "--mode", mode, *options)
    daemon.wait("vm")
    writer.wait_acknowledged(200)
    writer.stop()
    return writer, job_id


@pytest.mark.parametrize("cache", ["writeback", "direct"])
@pytest.mark.parametrize("target_kind", ["file", "block"])
@pytest.mark.parametrize("source_kind", ["file", "block"])
def test_a_disk_moves_in_every_direction(
    daemon: Daemon,
    tmp_path: Path,
    make_loop: MakeLoop,
    source_kind: str,
    target_kind: str,
    cache: str,
) -> None:
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    if source_kind == "block":
        source = make_loop(tmp_path / "source.backing", SIZE_BYTES)
    if target_kind == "block":
        target = make_loop(tmp_path / "target.backing", SIZE_BYTES + MIB)
    fill(source, SIZE_BYTES)
    before = read_all(source, SIZE_BYTES)
    daemon.attach("vm", source, "--cache", cache)

    mode = "mirror" if cache == "direct" else "auto"
    writer, job_id = move_under_writer(daemon, target, mode)

    shown = daemon.json("show", "vm")
    assert (shown["location"], shown["size"]) == (str(target), SIZE_BYTES)
    assert daemon.job(job_id)["verified"] is True
    daemon.json("detach", "vm")
    after = read_all(target, SIZE_BYTES)
    writer.check(lambda offset, length: after[offset : offset + length])
    untouched = 1024 * 4096  # behind the writer's blocks
    assert after[untouched:] == before[untouched:]
    if source_kind == "file":
        assert not source.exists()
    else:
        assert source.exists()  # a device is released, not wiped, and nobody says otherwise
        assert "released" in daemon.job(job_id)["reason"]
        assert read_all(source, SIZE_BYTES)[untouched:] == before[untouched:]
    if target_kind == "file":
        allocated = target.stat().st_blocks * 512
        assert allocated < SIZE_BYTES * 3 // 4, "a sparse disk became a full one"


def test_a_larger_device_does_not_make_the_disk_larger(
    daemon: Daemon, tmp_path: Path, make_loop: MakeLoop
) -> None:
    source, back = tmp_path / "source.raw", tmp_path / "back.raw"
    device = make_loop(tmp_path / "device.backing", 2 * SIZE_BYTES)
    fill(source, SIZE_BYTES)
    before = read_all(source, SIZE_BYTES)
    daemon.attach("vm", source)
    daemon.move("vm", device)
    daemon.wait("vm")
    daemon.expect_log("restarting disk process")
    daemon.kill_disk("vm")  # the next process knows the device, and the size from its record
    assert daemon.json("show", "vm")["size"] == SIZE_BYTES
    daemon.move("vm", back)
    daemon.wait("vm")
    assert back.stat().st_size == SIZE_BYTES
    assert read_all(back, SIZE_BYTES) == before


@pytest.mark.fault(24)
@pytest.mark.parametrize("size_bytes", [1, 511, 4097, 3 * MIB + 513])
def test_any_size_moves(daemon: Daemon, tmp_path: Path, size_bytes: int) -> None:
    source, target = tmp_path / "source.raw", tmp_path / "folder"
    target.mkdir()
    content = random.Random(size_bytes).randbytes(size_bytes)
    source.write_bytes(content)
    daemon.attach("vm", source)
    daemon.move("vm", target)
    daemon.wait("vm")
    assert (target / "source.raw").read_bytes() == content  # a folder keeps the name
    assert not source.exists()


def test_owner_mode_and_attributes_go_along(daemon: Daemon, tmp_path: Path) -> None:
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    source.write_bytes(b"x" * 5000)
    source.chmod(0o640)
    os.setxattr(source, "user.owner", b"somebody")
    if os.geteuid() == 0:
        os.chown(source, 12345, 23456)
    wanted = source.stat()
    daemon.attach("vm", source)
    daemon.move("vm", target)
    daemon.wait("vm")
    got = target.stat()
    assert (got.st_mode, got.st_uid, got.st_gid) == (wanted.st_mode, wanted.st_uid, wanted.st_gid)
    assert os.getxattr(target, "user.owner") == b"somebody"


def test_the_source_stays_when_asked(daemon: Daemon, tmp_path: Path) -> None:
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    source.write_bytes(b"stay" * 5000)
    daemon.attach("vm", source)
    daemon.move("vm", target, "--keep-source")
    daemon.wait("vm")
    assert source.read_bytes() == target.read_bytes()
    assert daemon.json("show", "vm")["location"] == str(target)
