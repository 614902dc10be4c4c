"""What `mirrord doctor` finds out about file systems: real ones, and how their flushes show."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from mirrord.service import checks, storage_checks
from mirrord.service.checks import Check
from mirrord.service.mounts import Mount, mount_of, read_mounts
from mirrord.service.state import DiskRecord
from mirrord.service.storage_checks import FLUSHES, Abilities, check_folders, try_folder
from tests.helpers import require_root
from tests.storage.places import make_file, mounted, run


def look(*folders: Path, disks: tuple[DiskRecord, ...] = ()) -> Check:
    """Return the one check of folders on one real file system."""
    (check,) = check_folders(folders, read_mounts(), disks)
    return check


@pytest.mark.parametrize(
    ("kind", "clones"), [("ext4", False), ("xfs", True), ("btrfs", True), ("tmpfs", False)]
)
def test_what_file_systems_can_do(tmp_path: Path, kind: str, clones: bool) -> None:
    """And that each passes its flushes on to the device. Nothing is left there."""
    with mounted(kind, tmp_path) as where:
        before = os.listdir(where)
        check = look(where)
        mount = mount_of(where, read_mounts())
        able = try_folder(where, where.stat().st_dev, mount)
        assert os.listdir(where) == before
        assert (able.holes, able.direct, able.clones) == (True, True, clones)
        assert check.text.startswith(f"{where}: {kind}, ")
        if kind == "tmpfs":
            assert (able.flushed, able.device) == (None, "")
            assert able.flush_s < storage_checks.FLUSH_S_MIN
            assert (check.level, "a reboot empties it" in check.advice) == ("advice", True)
        else:
            assert able.flushed is True
            assert able.flush_s > storage_checks.FLUSH_S_MIN
            assert (check.level, check.advice) == ("ok", "")
            assert "has a write cache)" in check.text


def test_flushes_that_are_held_back_are_seen(tmp_path: Path) -> None:
    """By the option that says so, and by the device that gets none."""
    with mounted("ext4", tmp_path) as where:
        run("mount", "-o", "remount,nobarrier", str(where))
        check = look(where)
        assert check.level == "problem"
        assert "mount it without nobarrier: a power cut loses " in check.advice
        mount = mount_of(where, read_mounts())
        assert mount is not None
        assert try_folder(where, where.stat().st_dev, mount).flushed is False
        unknown = mount._replace(options={})
        (check,) = check_folders([where], [unknown], ())
        assert check.level == "problem"
        assert "flushes don't get to the device, look at its mount options" in check.advice


def test_a_file_system_that_disks_will_fill(tmp_path: Path) -> None:
    with mounted("ext4", tmp_path) as where:
        disks = [
            DiskRecord(name, str(make_file(where / name, b"x" * MIB, size)))
            for name, size in (("small", 2 * MIB), ("large", 900 * MIB))
        ]
        assert look(where, disks=(disks[0],)).level == "ok"
        check = look(where, disks=(*disks, DiskRecord("elsewhere", "/nowhere/x")))
        assert check.level == "advice"
        assert check.advice == "its disks may grow by 900 MiB: make room before writes fail"


def test_a_file_system_that_is_full_or_read_only(tmp_path: Path) -> None:
    with mounted("ext4", tmp_path) as where:
        with (where / "all").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        check = look(where)
        assert (check.level, check.text) == ("problem", f"{where} is full")
        run("mount", "-o", "remount,ro", str(where))
        assert look(where).level == "advice"
        assert "read-only" in look(where).text


def test_each_file_system_is_looked_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    assert look(*folders).text.startswith(f"{tmp_path}/a: ")


def test_what_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (look(tmp_path / "none").level, look(tmp_path / "none").advice) == (
        "problem", "mount it, or make it",
    )  # fmt: skip
    for number, level in (
        (errno.EACCES, "advice"), (errno.EOPNOTSUPP, "ok"), (errno.EIO, "problem"),
    ):  # fmt: skip
        error = OSError(number, os.strerror(number))
        with monkeypatch.context() as patch:
            patch.setattr(storage_checks, "try_folder", raising(error))
            check = look(tmp_path)
        assert check.level == level, check
        assert (level != "ok") is bool(check.advice)


def raising(error: OSError) -> object:
    """Return what raises `error`, whatever it is called with."""

    def fail(*_: object) -> None:
        raise error

    return fail


def test_another_host_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away would hang who asks."""
    monkeypatch.setattr(storage_checks.os, "stat", raising(OSError(errno.EIO, "asked")))
    for kind in ("nfs4", "cifs", "fuse.sshfs"):
        mounts = [Mount("/", "/", "ext4", "/dev/x", {}), Mount("/", "/far", kind, "x:/y", {})]
        (check,) = check_folders([Path("/far/vms")], mounts, ())
        assert (check.level, check.text) == (
            "ok", "/far/vms is served by another host or program: not looked at",
        )  # fmt: skip


@pytest.mark.parametrize("hanging", ["stat", "try_folder"])
def test_storage_that_hangs_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: str
) -> None:
    """A look that hangs ends, whether the first or a later one; so does one at a disk's file."""
    monkeypatch.setattr(checks, "LOOK_DEADLINE_S", 0.2)
    answered = threading.Event()
    monkeypatch.setattr(
        storage_checks if hanging == "try_folder" else storage_checks.os,
        hanging,
        lambda *_, **__: answered.wait(30),
    )
    try:
        check = look(tmp_path, disks=(DiskRecord("vm", str(tmp_path / "vm.raw")),))
    finally:
        answered.set()
    assert (check.level, check.text) == ("problem", f"{tmp_path} hangs: no answer within 0 s")


ABLE = Abilities(True, True, True, 1e-3, None, "")


@pytest.mark.parametrize(
    ("able", "level", "said"),
    [
        (ABLE, "ok", ""),
        (ABLE._replace(flush_s=1e-6), "problem", "a flush is too quick to be one"),
        (ABLE._replace(flushed=True, flush_s=1e-6), "ok", ""),
        (ABLE._replace(flushed=False), "problem", "flushes don't get to the device"),
        (ABLE._replace(holes=False), "advice", "a disk takes its whole size here"),
        (ABLE._replace(direct=False), "advice", "--cache direct is refused here"),
        (ABLE._replace(clones=False), "ok", ""),
    ],
)
def test_what_a_finding_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: Abilities, level: str, said: str
) -> None:
    monkeypatch.setattr(storage_checks, "try_folder", lambda *_: able)
    (check,) = check_folders([tmp_path], [Mount("/", "/", "zfs", "tank", {})], ())
    assert check.level == level
    assert check.advice.startswith(said)
    assert bool(said) is bool(check.advice)


@contextmanager
def devices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """A /sys with a mapped device (8:7) above a partition of one disk and another whole disk."""
    disks = folder / "devices"
    for name, cache in (("sda", "write back"), ("nvme0n1", "write through")):
        (disks / name / "queue").mkdir(parents=True)
        (disks / name / "mq").mkdir()
        (disks / name / "queue/write_cache").write_text(f"{cache}\n")
        (disks / name / "stat").write_text(" ".join("0" * 15) + " 7 0\n")
    (disks / "sda/sda1").mkdir()
    (disks / "sda/sda1/partition").write_text("1\n")
    (disks / "dm-0/slaves").mkdir(parents=True)
    (disks / "dm-0/slaves/sda1").symlink_to(disks / "sda/sda1")
    (disks / "dm-0/slaves/nvme0n1").symlink_to(disks / "nvme0n1")
    (folder / "dev/block").mkdir(parents=True)
    (folder / "dev/block/8:7").symlink_to(disks / "dm-0")
    monkeypatch.setattr(storage_checks, "SYS", folder)
    yield {path.name: path for path in disks.iterdir()}


def test_the_devices_at_the_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with devices(tmp_path, monkeypatch) as made:
        leaves = storage_checks._leaves(os.makedev(8, 7), None)
        assert leaves == [made["nvme0n1"], made["sda"]]
        assert storage_checks._leaves(os.makedev(8, 8), None) == []
        assert storage_checks._named(leaves) == " (nvme0n1, sda has a write cache)"
        assert storage_checks._named(leaves[:1]) == " (nvme0n1 has no write cache)"
        counts = [storage_checks._flushes(leaf) for leaf in leaves]
        assert counts == [7, 7]
        arrived = storage_checks._arrived
        assert arrived(leaves, counts, [7, 7 + FLUSHES]) is True
        assert arrived(leaves, counts, [7 + FLUSHES, 6 + FLUSHES]) is False, "sda has the cache"
        assert arrived(leaves[:1], [7], [7]) is True, "there is nothing to flush"
        assert arrived([], [], []) is None
        (made["nvme0n1"] / "queue/write_cache").write_text("write back\n")
        assert arrived(leaves, counts, [8, 6 + FLUSHES]) is True, "two paths to one device"
        (made["sda"] / "mq").rmdir()  # its flushes aren't counted
        counts = [storage_checks._flushes(leaf) for leaf in leaves]
        assert counts == [7, None]
        assert arrived(leaves, counts, counts) is None


def test_a_folder_of_another_users(tmp_path: Path) -> None:
    require_root()
    folder = tmp_path / "own"
    folder.mkdir(0o700)
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        check = look(folder)
    finally:
        os.seteuid(0)
    assert (check.level, check.advice) == (
        "advice", "ask as root, or as the user of the daemon",
    )  # fmt: skip
