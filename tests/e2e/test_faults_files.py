"""Names and files that are wrong, or that somebody changes while a disk moves, end to end.

By their numbers in the table of faults (tests/README.md): 4, 18 to 20, 24 and 26.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from tests.daemon import Daemon
from tests.faulty_storage import small_file_system
from tests.helpers import eventually, require_program
from tests.nbd_probe import Probe

SIZE = 16 * MIB
SLOW = "4MiB"  # a move that is still copying when the test looks


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Make a disk that is all data."""
    path = tmp_path / "vm.raw"
    path.write_bytes(random.Random(8).randbytes(SIZE))
    return path


@pytest.mark.fault(4)
def test_fault_04_a_folder_that_cant_be_written_is_refused_with_path_and_reason(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    """Before anything was prepared: no job, no name at the target."""
    daemon.attach("vm", disk)
    with small_file_system(tmp_path / "sealed", SIZE) as sealed:
        subprocess.run(["mount", "-o", "remount,ro", sealed], check=True)
        refused = daemon.run("move", "vm", sealed)
        assert refused.returncode == 4
        assert str(sealed) in refused.stderr
        assert "Read-only file system" in refused.stderr
        assert refused.stderr.count("\n") == 1
        missing = daemon.run("move", "vm", tmp_path / "no" / "vm.raw")
        assert missing.returncode == 4
        assert str(tmp_path / "no") in missing.stderr
        assert list(sealed.iterdir()) == []
    assert daemon.json("jobs", "vm") == []
    assert daemon.json("show", "vm")["job"] is None


@pytest.mark.fault(18)
@pytest.mark.parametrize("size", [SIZE - MIB, SIZE + 1], ids=["truncated", "grown"])
def test_fault_18_a_source_of_another_size_fails_the_move(
    daemon: Daemon, disk: Path, tmp_path: Path, size: int
) -> None:
    """`source changed size`; no cutover, nothing deleted, and the guest goes on."""
    with Probe(daemon.attach("vm", disk)) as guest:
        job = daemon.move("vm", tmp_path / "moved.raw", "--cutover", "manual")
        daemon.wait("vm", "mirroring")
        os.truncate(disk, size)
        daemon.json("cutover", "vm")
        assert daemon.run("wait", "vm").returncode == 1
        guest.wait(20)
    assert "source changed size" in daemon.job(job)["reason"]
    assert daemon.json("show", "vm")["location"] == str(disk)
    assert [path.name for path in tmp_path.iterdir()] == ["vm.raw"]
    guest.check(disk.read_bytes())


@pytest.mark.fault(19)
def test_fault_19_what_took_the_sources_name_is_not_deleted(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    """The open file goes on being served and moved; the job says why something was kept."""
    strange = tmp_path / "strange"
    strange.write_bytes(b"precious")
    with Probe(daemon.attach("vm", disk)) as guest:
        job = daemon.move("vm", tmp_path / "moved.raw", "--limit", SLOW)
        strange.rename(disk)
        guest.wait(20)
        daemon.json("limit", "vm", "1GiB")
        daemon.wait("vm")
        guest.wait(20)
    assert disk.read_bytes() == b"precious"
    assert "was replaced" in daemon.job(job)["reason"]
    guest.check((tmp_path / "moved.raw").read_bytes())


@pytest.mark.fault(20)
@pytest.mark.parametrize("act", ["removed", "shortened", "written to"])
def test_fault_20_a_target_that_somebody_changes_is_not_switched_to(
    daemon: Daemon, disk: Path, tmp_path: Path, act: str
) -> None:
    """Removed, or of another size: the job fails. Other bytes are found, and copied again."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with Probe(daemon.attach("vm", disk)) as guest:
        options = [] if act == "written to" else ["--cutover", "manual"]
        job = daemon.move("vm", folder, "--limit", SLOW, *options)
        (part,) = folder.iterdir()
        eventually(lambda: daemon.job(job)["bytes_copied"] > 2 * MIB, what="a part is there")
        if options:
            daemon.json("limit", "vm", "1GiB")
            daemon.wait("vm", "mirroring")
        if act == "removed":
            part.unlink()
        elif act == "shortened":
            os.truncate(part, SIZE - 1)
        else:
            with part.open("r+b") as file:
                file.seek(MIB)
                file.write(bytes(4096))
        daemon.json("cutover" if options else "limit", "vm", *([] if options else ["1GiB"]))
        ended = daemon.run("wait", "vm")
        guest.wait(20)
    status = daemon.job(job)
    if act == "written to":
        assert (ended.returncode, status["verified"]) == (0, True)
        content = (folder / "vm.raw").read_bytes()
        assert content[MIB:] == random.Random(8).randbytes(SIZE)[MIB:]
        assert "differ" in str(status["story"])
    else:
        assert ended.returncode == 1
        assert "target" in status["reason"], status
        assert list(folder.iterdir()) == []
        content = disk.read_bytes()
    guest.check(content)


@pytest.mark.fault(26)
def test_fault_26_qemu_writes_single_bytes_zeroes_and_trims_in_every_phase(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    """The disk holds what a simple model says, before and after the cutover."""
    path = daemon.attach("vm", disk)
    expected = bytearray(disk.read_bytes())
    chance = random.Random(26)
    qemu_writes(path, expected, chance)
    daemon.move("vm", tmp_path / "moved.raw", "--limit", SLOW, "--cutover", "manual")
    daemon.wait("vm", "copying")
    qemu_writes(path, expected, chance)
    daemon.json("pause", "vm")
    daemon.wait("vm", "paused")
    qemu_writes(path, expected, chance)
    daemon.json("resume", "vm")
    daemon.json("limit", "vm", "1GiB")
    daemon.wait("vm", "mirroring")
    qemu_writes(path, expected, chance)
    daemon.json("cutover", "vm")
    daemon.wait("vm")
    assert (tmp_path / "moved.raw").read_bytes() == expected
    qemu_writes(path, expected, chance)
    daemon.json("detach", "vm")
    assert (tmp_path / "moved.raw").read_bytes() == expected


def qemu_writes(path: str, expected: bytearray, chance: random.Random) -> None:
    """Let QEMU's client write, write zeroes and trim at any alignment; do the same to the model."""
    words = []
    for offset, length in [(0, 1), (4095, 2), (MIB - 1, 2), (SIZE - 1, 1), (5 * MIB - 700, 3000)]:
        pattern = chance.randrange(1, 256)
        words += ["-c", f"write -q -P {pattern} {offset} {length}"]
        expected[offset : offset + length] = bytes([pattern]) * length
    for kind in ("write -q -z", "write -q -z -u", "discard -q"):
        offset, length = chance.randrange(SIZE // 2), chance.randrange(1, MIB)
        words += ["-c", f"{kind} {offset} {length}"]
        expected[offset : offset + length] = bytes(length)
    uri = f"nbd+unix:///vm?socket={path}"
    done = subprocess.run(
        [require_program("qemu-io"), "-f", "raw", "-t", "writeback", "-d", "unmap", *words, uri],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.fault(24)
@pytest.mark.parametrize("size", [512, MIB + 1, 5 << 40], ids=["512", "1 MiB + 1", "5 TiB"])
def test_fault_24_a_disk_of_any_size_is_copied_exactly_and_stays_sparse(
    daemon: Daemon, tmp_path: Path, size: int
) -> None:
    source, target = tmp_path / "vm.raw", tmp_path / "moved.raw"
    places = {0: b"first", size // 2: b"middle", size - 4: b"last"}
    with source.open("wb") as file:
        file.truncate(size)
        for offset, data in places.items():
            file.seek(offset)
            file.write(data)
    allocated = source.stat().st_blocks
    daemon.attach("vm", source)
    # Comparing 5 TiB of holes takes five minutes.
    daemon.move("vm", target, "--verify", "none" if size > MIB + 1 else "full")
    daemon.wait("vm")
    found = target.stat()
    assert found.st_size == size
    assert found.st_blocks <= max(1.1 * allocated, allocated + 8)
    with target.open("rb") as file:
        for offset, data in places.items():
            file.seek(offset)
            assert file.read(len(data)) == data
