"""A file that is removed or replaced under a served disk: its process has the only copy then."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from mirrord.service import state
from mirrord.service.mover import Mover
from mirrord.service.places import PlaceFactory
from mirrord.service.state import Directories, DiskRecord
from mirrord.storage.backend import Cache
from tests.daemon import Daemon
from tests.helpers import eventually, require_loop_devices
from tests.nbd_writer import Client, content
from tests.service.test_restarts import write
from tests.storage.places import loop_device


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Make a disk."""
    path = tmp_path / "vm.raw"
    path.write_bytes(os.urandom(4 * MIB))
    return path


def replace(path: Path) -> None:
    """Put another file of the same size under the name, as `cp` to a new name and `mv` do."""
    new = path.with_suffix(".new")
    new.write_bytes(bytes(4 * MIB))
    new.rename(path)


def refused(daemon: Daemon, *words: str) -> None:
    """Be refused in one line that says how to save the disk; then nothing has changed."""
    before = daemon.disk_pid("vm")
    done = daemon.run(*words)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done
    assert "was removed or replaced" in done.stderr
    assert "mirrord move vm TARGET" in done.stderr
    assert daemon.disk_pid("vm") == before
    assert daemon.json("show", "vm")["state"] == "serving"


@pytest.mark.parametrize("lose", [Path.unlink, replace])
def test_what_was_lost_can_be_saved(
    daemon: Daemon, disk: Path, tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    client = Client(daemon.attach("vm", disk), "vm")
    before = disk.read_bytes()
    lose(disk)
    write(client, 3, 1)
    client.close()
    refused(daemon, "upgrade", "vm", "--force")
    refused(daemon, "detach", "vm")
    daemon.move("vm", tmp_path / "saved.raw")
    daemon.wait("vm")
    assert daemon.json("upgrade", "vm", "--force")[0]["state"] == "serving"
    assert daemon.json("detach", "vm")["state"] == "detached"
    saved = (tmp_path / "saved.raw").read_bytes()
    assert saved == before[: 3 * 4096] + content(3, 1) + before[4 * 4096 :]
    assert disk.exists() is (lose is replace), "a file that was never served is nobody's to delete"


def test_another_device_is_not_served_to_the_same_guest(daemon: Daemon, tmp_path: Path) -> None:
    """On the same boot its number is enough to know it, where it has no serial."""
    require_loop_devices()
    daemon.expect_log("restarting disk process", "disk refused")
    path = tmp_path / "volume"
    with (
        loop_device(tmp_path, 4 * MIB) as first,
        loop_device(tmp_path, 4 * MIB, sector_bytes=4096) as second,
    ):
        path.symlink_to(first)
        daemon.attach("vm", path)
        path.unlink()
        path.symlink_to(second)
        refused(daemon, "upgrade", "vm", "--force")
        daemon.kill_disk("vm")
        eventually(lambda: daemon.json("show", "vm")["state"] == "refused", what="it is refused")
        assert f"{path} is not what disk vm" in daemon.json("show", "vm")["reason"]
        daemon.json("detach", "vm")


async def test_what_a_switch_has_left_is_not_looked_for_where_it_went(
    disk: Path, tmp_path: Path
) -> None:
    """Between the switch and its record, the location is still the source's."""
    target = PlaceFactory().make(str(shutil.copyfile(disk, tmp_path / "target.raw")))
    record = DiskRecord("vm", str(disk))
    directories = Directories(tmp_path / "state", tmp_path / "run")
    state.prepare(directories)
    mover = Mover(record, directories, on_change=lambda _: None)
    await mover.open()
    before = mover.disk.backend
    assert mover.status(0).opened == (before.identity.device, before.identity.inode)
    mover.disk.backend = await target.open(read_only=False, cache=Cache.WRITEBACK)
    assert mover.status(0).opened is None
    assert mover.record().identity is None
    await before.close()
    await mover.disk.backend.close()


def test_what_was_lost_can_be_given_up(daemon: Daemon, disk: Path) -> None:
    daemon.attach("vm", disk)
    disk.unlink()
    assert daemon.json("detach", "vm", "--force")["state"] == "detached"


def test_another_file_is_not_served_to_the_same_guest(daemon: Daemon, disk: Path) -> None:
    daemon.expect_log("restarting disk process", "disk refused")
    daemon.attach("vm", disk)
    kept = disk.with_name("kept")
    os.link(disk, kept)
    replace(disk)
    daemon.kill_disk("vm")
    eventually(lambda: daemon.json("show", "vm")["state"] == "refused", what="it is refused")
    reason = daemon.json("show", "vm")["reason"]
    assert f"{disk} is not what disk vm was served from" in reason
    again = daemon.run("upgrade", "vm", "--json")
    assert (again.returncode, "disk-not-serving" in again.stderr) == (4, True)
    kept.rename(disk)
    daemon.stop()
    daemon.start()
    assert daemon.json("show", "vm")["state"] == "serving"
    replace(disk)
    daemon.kill_disk("vm")
    eventually(lambda: daemon.json("show", "vm")["state"] == "refused", what="it is refused")
    daemon.json("detach", "vm")
    daemon.attach("vm", disk)
    assert daemon.json("show", "vm")["state"] == "serving"


def test_a_disk_may_grow_while_nobody_serves_it(daemon: Daemon, disk: Path) -> None:
    daemon.attach("vm", disk)
    daemon.kill()
    daemon.kill_disk("vm")
    os.truncate(disk, 8 * MIB)
    daemon.start()
    assert daemon.json("show", "vm")["size"] == 8 * MIB


def test_a_record_of_an_older_version_learns_what_it_is_of(daemon: Daemon, disk: Path) -> None:
    daemon.attach("vm", disk)
    path = daemon.state / "disks/vm/disk.json"
    before = json.loads(path.read_text())
    known = before["identity"]
    assert (known["inode"], known["size"]) == (disk.stat().st_ino, 4 * MIB)
    older = {key: value for key, value in before.items() if key not in ("identity", "boot")}
    path.write_text(json.dumps(older))
    daemon.json("upgrade", "vm", "--force")
    assert json.loads(path.read_text()) == before


def test_after_a_boot_a_file_is_believed(daemon: Daemon, disk: Path) -> None:
    """There are file systems that give other numbers to their files then."""
    daemon.attach("vm", disk)
    path = daemon.state / "disks/vm/disk.json"
    before = json.loads(path.read_text())
    daemon.kill()
    daemon.kill_disk("vm")
    path.write_text(json.dumps({**before, "boot": "another"}))
    replace(disk)
    daemon.start()
    assert daemon.json("show", "vm")["state"] == "serving"
    now = json.loads(path.read_text())
    assert (now["boot"], now["identity"]["inode"]) == (before["boot"], disk.stat().st_ino)
