"""Storage that fails while a disk moves: what the guest and the operator see of it, end to end.

By their numbers in the table of faults (tests/README.md): 8 to 14 and 21. A real kernel returns
the errors, real processes meet them. Every phase and corner of the same faults: tests/engine.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from mirrord.control import client as control
from mirrord.control.messages import MoveRequest
from mirrord.core.geometry import MIB
from mirrord.errors import RefusedError
from mirrord.service.looks import LOOK_DEADLINE_S
from tests.daemon import Daemon
from tests.faulty_storage import SECTOR_BYTES, faulty_device, faulty_file, small_file_system
from tests.helpers import eventually, require_program
from tests.nbd_probe import Probe
from tests.nbd_writer import WRITE, Client, content

SIZE = 16 * MIB
SLOW = "4MiB"  # a move that is still copying when the test looks
BUDGET_S = 2.0  # what trouble with the target may cost one request, by the README
NOTICED_S = 1.0  # beside it: a loaded machine's own
OTHERS = 8  # disks beside a stuck one: more than an executor of this machine has threads


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Make a disk that is all data."""
    path = tmp_path / "vm.raw"
    path.write_bytes(random.Random(8).randbytes(SIZE))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that has room for one disk and a little more."""
    with small_file_system(tmp_path / "small", SIZE + 4 * MIB) as place:
        yield place


def fill_up(place: Path, leaving: int = 0) -> Path:
    """Use up a file system but for so many bytes; return the file that does."""
    ballast = place / "ballast"
    found = os.statvfs(place)
    left = found.f_bavail * found.f_bsize - leaving
    with ballast.open("wb", buffering=0) as file:
        try:
            while left > 0:
                left -= file.write(bytes(left))
        except OSError as error:
            if error.errno != errno.ENOSPC:  # as others took of it meanwhile
                raise
    return ballast


@pytest.mark.fault(7, 8)
def test_fault_08_a_full_target_pauses_the_move_and_space_lets_it_go_on(
    daemon: Daemon, disk: Path, small: Path
) -> None:
    """`paused: no space`, no error for the guest, and it goes on by itself."""
    ballast = fill_up(small, leaving=4 * MIB)
    with Probe(daemon.attach("vm", disk)) as guest:
        assert daemon.run("move", "vm", small).returncode == 4, "known in advance"
        job = daemon.move("vm", small, "--force")
        daemon.wait("vm", "paused")
        assert daemon.job(job)["reason"].startswith("no space at the target")
        guest.wait(50)
        ballast.unlink()
        daemon.wait("vm")
        guest.wait(50)
    guest.check((small / "vm.raw").read_bytes())
    assert guest.worst_s < BUDGET_S + NOTICED_S
    assert not disk.exists()


@pytest.mark.fault(8)
def test_fault_08_a_limit_of_the_file_size_is_no_space(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE: EFBIG in the middle of the copy."""
    with Probe(daemon.attach("vm", disk)) as guest:
        job = daemon.move("vm", tmp_path / "moved.raw", "--limit", SLOW)
        pid = daemon.disk_pid("vm")
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (8 * MIB, resource.RLIM_INFINITY))
        daemon.wait("vm", "paused")
        assert "no space at the target" in daemon.job(job)["reason"]
        guest.wait(50)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        daemon.json("resume", "vm")
        daemon.json("limit", "vm", "1GiB")
        daemon.wait("vm")
    guest.check((tmp_path / "moved.raw").read_bytes())
    assert guest.worst_s < BUDGET_S + NOTICED_S


@pytest.mark.fault(9)
def test_fault_09_a_target_that_is_full_while_mirrored_pauses_the_move(
    daemon: Daemon, disk: Path, small: Path
) -> None:
    """As 8: what the guest writes meanwhile is followed, and copied when there is space."""
    with disk.open("r+b") as file:
        file.truncate(SIZE // 2)
        file.truncate(SIZE)
    blocks = SIZE // 4096
    with Probe(daemon.attach("vm", disk), blocks=8) as quiet:
        job = daemon.move("vm", small, "--cutover", "manual", "--force")  # it lies in memory
        daemon.wait("vm", "mirroring")
        quiet.wait(20)
        ballast = fill_up(small)
        with Probe(daemon.nbd_socket("vm"), blocks=blocks) as guest:
            daemon.wait("vm", "paused")
            assert "no space at the target" in daemon.job(job)["reason"]
            guest.wait(100)
            ballast.unlink()
            daemon.json("resume", "vm")
            daemon.wait("vm", "mirroring")
            daemon.json("cutover", "vm")
            daemon.wait("vm")
    guest.check((small / "vm.raw").read_bytes() if not quiet.errors else b"")
    assert guest.worst_s < BUDGET_S + NOTICED_S


@pytest.mark.fault(10)
def test_fault_10_a_bad_sector_of_the_source_fails_the_move_and_nothing_else(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    """`failed`, with the offset; nothing deleted; the guest sees EIO there and nowhere else."""
    bad = 5 * MIB
    place = tmp_path / "place"
    place.mkdir()
    with faulty_file(place, disk, bad_sectors=(bad // SECTOR_BYTES,)) as source:
        path = daemon.attach("vm", source.path)
        with Probe(path) as guest:
            job = daemon.move("vm", tmp_path / "moved.raw")
            assert daemon.run("wait", "vm").returncode == 1
            guest.wait(20)
        status = daemon.job(job)
        assert status["phase"] == "failed"
        assert "read of the source failed at offset" in status["reason"]
        assert daemon.json("show", "vm")["location"] == str(source.path)
        assert qemu_io(path, f"read {bad} 512").returncode == 1
        assert qemu_io(path, f"read {bad - 4096} 4096", f"read {bad + 4096} 1M").returncode == 0
        daemon.json("detach", "vm", "--force")
    assert not (tmp_path / "moved.raw").exists()
    guest.check(disk.read_bytes())


def qemu_io(path: str, *commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands on disk `vm` in QEMU's own client."""
    words = [word for command in commands for word in ("-c", command)]
    uri = f"nbd+unix:///vm?socket={path}"
    return subprocess.run(
        [require_program("qemu-io"), "-f", "raw", "-t", "writeback", *words, uri],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.fault(11, 12)
@pytest.mark.parametrize("phase", ["copying", "mirroring"])
def test_fault_11_12_errors_of_the_target_for_a_while_are_made_good(
    daemon: Daemon, disk: Path, tmp_path: Path, phase: str
) -> None:
    """A device that loses what its cache held: all since its last good flush is written again.

    The errors come with a flush; past the page cache, with each write.
    """
    cache = "direct" if phase == "mirroring" else "writeback"
    backing = tmp_path / "backing.raw"
    with backing.open("wb") as file:
        file.truncate(SIZE)
    with faulty_device(tmp_path, backing) as (device, storage):
        with Probe(daemon.attach("vm", disk, "--cache", cache)) as guest:
            job = daemon.move("vm", device, "--limit", SLOW, "--cutover", "manual")
            if phase == "mirroring":
                daemon.json("limit", "vm", "1GiB")
            daemon.wait("vm", phase)
            guest.wait(20)
            storage.fail()
            daemon.json("limit", "vm", "1GiB")
            daemon.wait("vm", "degraded")
            guest.wait(50)
            storage.heal()
            daemon.json("cutover", "vm")
            daemon.wait("vm")
            guest.wait(20)
        assert daemon.job(job)["verified"] is True
        assert guest.worst_s < BUDGET_S + NOTICED_S
        daemon.json("detach", "vm")
    guest.check(backing.read_bytes())
    untouched = MIB
    assert backing.read_bytes()[untouched:] == random.Random(8).randbytes(SIZE)[untouched:]


@pytest.mark.fault(13)
def test_fault_13_a_source_that_cannot_flush_is_told_to_the_guest_and_fails_the_move(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    """FLUSH is answered EIO, the job has failed, nothing was deleted."""
    with faulty_file(tmp_path, disk, flush_fails=True) as source:
        path = daemon.attach("vm", source.path)
        assert qemu_io(path, "write 0 4k").returncode == 0
        assert qemu_io(path, "flush").returncode == 1
        job = daemon.move("vm", tmp_path / "moved.raw")
        assert daemon.run("wait", "vm").returncode == 1
        assert "flush of the source failed" in daemon.job(job)["reason"]
        assert source.path.exists()
        assert not (tmp_path / "moved.raw").exists()
        daemon.expect_log("detached unflushed", "flush")
        daemon.json("detach", "vm", "--force")


HANG_S = float(os.environ.get("MIRRORD_HANG_S", "6"))


@pytest.mark.fault(14)
@pytest.mark.parametrize("end", ["it comes back", "cancel"])
def test_fault_14_a_target_that_hangs_costs_a_request_two_seconds_once(
    daemon: Daemon, disk: Path, tmp_path: Path, end: str
) -> None:
    """The move is `degraded`, the guest goes on with the source; cancel returns within 5 s."""
    backing = tmp_path / "backing.raw"
    with backing.open("wb") as file:
        file.truncate(SIZE)
    with faulty_device(tmp_path, backing) as (device, storage):
        with Probe(daemon.attach("vm", disk, "--cache", "direct")) as guest:
            job = daemon.move("vm", device, "--cutover", "manual")
            daemon.wait("vm", "mirroring")
            guest.wait(20)
            storage.hang()
            began = time.monotonic()
            daemon.wait("vm", "degraded")
            assert guest.worst_s < BUDGET_S + NOTICED_S
            guest.begin_again()
            if end == "cancel":
                asked = time.monotonic()
                assert daemon.run("cancel", "vm").returncode == 0
                assert time.monotonic() - asked < 5
                guest.wait(50)
                storage.heal()
            else:
                eventually(lambda: time.monotonic() > began + HANG_S, HANG_S + 1, "it hangs")
                guest.wait(50)
                assert guest.worst_s < NOTICED_S, "again"
                assert daemon.job(job)["phase"] == "degraded"
                storage.heal()
                daemon.json("cutover", "vm")
                daemon.wait("vm")
        daemon.json("detach", "vm")
    guest.check((disk if end == "cancel" else backing).read_bytes())


def test_storage_that_does_not_answer_holds_up_nobody_else(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    """Even the name of the stuck disk's file can't be looked at: others are attached and moved."""
    forgotten_pause_s = 1.2  # so long the kernel tells of the file without asking
    backing = tmp_path / "backing.raw"
    with backing.open("wb") as file:
        file.truncate(SIZE)
    with (
        ThreadPoolExecutor() as pool,
        closing(control.Client(daemon.socket)) as asker,
        faulty_file(tmp_path, backing) as storage,
    ):
        daemon.expect_log("location hangs")
        guest = Client(daemon.attach("stuck", storage.path), "stuck")
        daemon.attach("vm", disk)
        time.sleep(forgotten_pause_s)
        with storage.away():
            began = time.monotonic()
            guest.send(WRITE, 1, 0, 4096, content(0, 1))
            for number in range(OTHERS):
                other = tmp_path / f"other-{number}.raw"
                other.write_bytes(bytes(MIB))
                daemon.attach(f"other-{number}", other)
            asking = pool.submit(asker.move, "other-0", MoveRequest(str(storage.path)))
            daemon.move("vm", tmp_path / "moved.raw")
            daemon.wait("vm")
            took_s = time.monotonic() - began
            eventually(
                lambda: [job["reason"] for job in daemon.json("jobs", "other-0") if job["reason"]],
                what="it is told, too",
            )
            assert "target may hang" in daemon.json("jobs", "other-0")[0]["reason"]
            with closing(Client(daemon.nbd_socket("other-0"), "other-0")) as its_guest:
                its_guest.send(WRITE, 1, 0, 4096, content(0, 1))
                assert its_guest.receive() == (1, 0)
            eventually(lambda: daemon.json("show", "stuck")["reason"], what="it is told of")
            assert "storage may hang" in daemon.json("show", "stuck")["reason"]
        with pytest.raises(RefusedError, match="exists"):
            asking.result()
        assert daemon.json("jobs", "other-0") == []
        assert guest.receive() == (1, 0)
        guest.close()
        eventually(lambda: not daemon.json("show", "stuck")["reason"], what="it is over")
        assert took_s < LOOK_DEADLINE_S + OTHERS
        daemon.json("detach", "stuck")


@pytest.mark.fault(21)
def test_fault_21_a_full_state_directory_starts_nothing_and_ends_no_guest(
    make_daemon: Callable[..., Daemon], disk: Path, tmp_path: Path
) -> None:
    """A new job is refused. The one under way has room for its COMMIT already, so it switches
    over; what is still to be written, and the source's deletion, wait for space.
    """
    daemon = make_daemon()
    other = tmp_path / "other.raw"
    other.write_bytes(disk.read_bytes())
    with small_file_system(daemon.state, 8 * MIB):
        daemon.start()
        daemon.attach("other", other)
        with Probe(daemon.attach("vm", disk)) as guest:
            job = daemon.move("vm", tmp_path / "moved.raw", "--limit", "8MiB")
            ballast = fill_up(daemon.state)
            refused = daemon.run("move", "other", tmp_path / "another.raw")
            assert refused.returncode == 4
            assert "state directory" in refused.stderr, refused.stderr
            assert refused.stderr.count("\n") == 1
            assert not (tmp_path / "another.raw").exists()
            daemon.wait("vm", "retiring")
            eventually(lambda: daemon.job(job)["reason"], what="it says what it waits for")
            assert "can't be written" in daemon.job(job)["reason"]
            assert disk.exists(), "the source goes last"
            guest.wait(20)
            ballast.unlink()
            daemon.wait("vm")
        guest.check((tmp_path / "moved.raw").read_bytes())
        daemon.move("other", tmp_path / "another.raw")
        daemon.wait("other")
        daemon.close()
