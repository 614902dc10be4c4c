"""The main job on real input: a Linux guest goes on while its disk moves and processes die."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.guest import (
    Guest,
    check_file_system,
    make_file_system,
    make_initramfs,
    read_records,
    replay_journal,
)
from tests.samba import Samba
from tests.shares import leftovers, section
from tests.smb_fixtures import make_samba

__all__ = ["make_samba"]

SIZE_BYTES = 192 << 20
LIMIT = "8MiB"  # the guest's own data is a few MiB; the copy shall outlive all the kills

Boot = Callable[[Daemon, Path], Guest]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return kernel and initramfs."""
    return make_initramfs(tmp_path_factory.mktemp("initramfs"))


@pytest.fixture
def boot(kernel: tuple[Path, Path]) -> Iterator[Boot]:
    """Boot a guest from a new file system at the given path."""
    guests: list[Guest] = []

    def boot_guest(daemon: Daemon, disk: Path) -> Guest:
        make_file_system(disk, SIZE_BYTES)
        guests.append(Guest(*kernel, daemon.attach("vm", disk), "vm"))
        guests[-1].wait_mounted()
        guests[-1].wait_acked(20)
        return guests[-1]

    yield boot_guest
    for guest in guests:
        guest.kill()


def check_records(guest: Guest, disk: Path) -> None:
    """Assert that no fsynced record is missing, and that the guest never met an error."""
    found = read_records(disk)
    assert found[: guest.acked] == list(range(1, guest.acked + 1))
    assert not guest.complaints(), guest.complaints()


@pytest.mark.fault(1)
def test_a_guest_survives_the_move_and_the_death_of_every_process(
    daemon: Daemon, tmp_path: Path, boot: Boot
) -> None:
    daemon.expect_log("disk-process", "disk process", "connection")
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    guest = boot(daemon, source)
    job_id = daemon.move("vm", target, "--limit", LIMIT, "--cutover", "manual")

    for _ in range(3):
        guest.wait_acked(20)
        daemon.kill_disk("vm")
    guest.wait_acked(20)
    daemon.kill()
    guest.wait_acked(20)  # nobody but the disk process serves it
    daemon.start()
    guest.wait_acked(20)
    daemon.json("limit", "vm", "1GiB")
    daemon.wait("vm", "mirroring")
    daemon.kill_disk("vm")  # while both sides are written
    guest.wait_acked(20)
    daemon.wait("vm", "mirroring")
    daemon.json("cutover", "vm")
    daemon.wait("vm")
    guest.wait_acked(20)
    daemon.kill_disk("vm")  # now the target is the truth
    guest.wait_acked(20)
    guest.power_off()

    job = daemon.job(job_id)
    assert job["phase"] == "done"
    assert job["verified"] is True
    assert not source.exists()
    check_file_system(target)
    check_records(guest, target)


def test_a_power_cut_of_the_guest_loses_no_fsynced_record(
    daemon: Daemon, tmp_path: Path, boot: Boot
) -> None:
    daemon.expect_log("connection")
    target = tmp_path / "target.raw"
    guest = boot(daemon, tmp_path / "source.raw")
    daemon.move("vm", target, "--no-wait")
    daemon.wait("vm")
    guest.wait_acked(20)
    guest.kill()

    daemon.json("detach", "vm", "--force")
    replay_journal(target)
    check_file_system(target)
    check_records(guest, target)


def test_a_guest_lives_on_a_share_through_the_death_of_its_server(
    make_samba: Callable[..., Samba],
    make_daemon: Callable[..., Daemon],
    tmp_path: Path,
    boot: Boot,
) -> None:
    samba = make_samba()
    daemon = make_daemon(section(samba))
    daemon.expect_log("disk process", "connection lost", "connected again")
    daemon.start()
    source, back = tmp_path / "vm.raw", tmp_path / "back.raw"
    guest = boot(daemon, source)
    job_id = daemon.move("vm", samba.url("vm.raw"), "--limit", LIMIT, "--cutover", "manual")
    guest.wait_acked(20)
    samba.kill_child()  # while it is copied
    guest.wait_acked(20)
    daemon.json("limit", "vm", "1GiB")
    daemon.json("cutover", "vm")
    daemon.wait("vm")
    for _ in range(2):
        guest.wait_acked(20)
        samba.kill_all()
        samba.start(rebooted=True)
    guest.wait_acked(20)
    daemon.kill_disk("vm")
    guest.wait_acked(20)
    daemon.move("vm", back)
    daemon.wait("vm")
    guest.wait_acked(20)
    guest.power_off()

    assert daemon.job(job_id)["verified"] is True
    assert not source.exists()
    assert leftovers(samba.folder()) == []
    check_file_system(back)
    check_records(guest, back)
