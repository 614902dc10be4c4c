"""A file that is removed or replaced under a served disk: its process has the only copy then."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from mirrord.control import client as control
from mirrord.core.geometry import MIB
from mirrord.errors import RefusedError
from mirrord.service import history, state
from mirrord.service.mover import Mover
from mirrord.service.moves import now
from mirrord.service.places import PlaceFactory
from mirrord.service.state import Directories, DiskRecord, JobRecord
from mirrord.storage.backend import Cache
from tests.daemon import Daemon
from tests.e2e.test_faults_storage import fill_up
from tests.faulty_storage import small_file_system
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
    assert f"{disk} was removed or replaced" in daemon.json("show", "vm")["reason"]
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


def test_a_loop_devices_file_may_be_renamed(daemon: Daemon, tmp_path: Path) -> None:
    require_loop_devices()
    folder = tmp_path / "disks"
    folder.mkdir()
    with loop_device(folder, 4 * MIB) as device:
        daemon.attach("vm", device)
        folder.rename(tmp_path / "elsewhere")
        assert daemon.json("upgrade", "vm", "--force")[0]["state"] == "serving"
        daemon.json("detach", "vm")
        (tmp_path / "elsewhere").rename(folder)


def test_while_it_moves_another_file_is_not_served_and_the_target_is_kept(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    """Once all is copied, the target may be the only copy: the move goes on with its source."""
    daemon.expect_log("restarting disk process", "disk refused")
    before = disk.read_bytes()
    daemon.attach("vm", disk)
    (tmp_path / "there").mkdir()
    daemon.move("vm", tmp_path / "there" / "vm.raw", "--cutover", "manual")
    waiting = "waiting for `mirrord cutover`"
    eventually(lambda: waiting in (daemon.json("jobs", "vm")[0]["reason"] or ""), what="it is held")
    kept = disk.with_name("kept")
    os.link(disk, kept)
    replace(disk)
    daemon.kill_disk("vm")
    eventually(lambda: daemon.json("show", "vm")["state"] == "refused", what="it is refused")
    assert f"{disk} is not what disk vm" in daemon.json("show", "vm")["reason"]
    (part,) = (tmp_path / "there").iterdir()
    assert part.read_bytes() == before
    kept.rename(disk)
    daemon.stop()
    daemon.start()
    daemon.json("cutover", "vm")
    daemon.wait("vm")
    assert (tmp_path / "there" / "vm.raw").read_bytes() == before


def test_a_disk_is_served_although_what_it_is_cant_be_written_down(
    make_daemon: Callable[..., Daemon], disk: Path
) -> None:
    """After a boot, on a state directory that is full."""
    daemon = make_daemon()
    daemon.expect_log("identity not kept")
    with small_file_system(daemon.state, 8 * MIB):
        daemon.start()
        daemon.attach("vm", disk)
        path = daemon.state / "disks/vm/disk.json"
        daemon.kill()
        daemon.kill_disk("vm")
        path.write_text(json.dumps({**json.loads(path.read_text()), "boot": "another"}))
        fill_up(daemon.state)
        daemon.start()
        assert daemon.json("show", "vm")["state"] == "serving"
        daemon.close()


def test_a_detach_is_refused_while_guests_may_come_back(daemon: Daemon, disk: Path) -> None:
    """One that is idle connects to the next process at its next request."""
    daemon.expect_log("restarting disk process")
    daemon.attach("vm", disk)
    daemon.json("upgrade", "vm", "--force")
    daemon.json("detach", "vm")  # nobody had it
    daemon.attach("vm", disk)
    daemon.kill_disk("vm")
    eventually(lambda: daemon.json("show", "vm")["state"] == "serving", what="it is served again")
    refusal = daemon.run("detach", "vm", "--json")
    assert (refusal.returncode, json.loads(refusal.stderr)["code"]) == (4, "clients-awaited")
    daemon.json("detach", "vm", "--force")
    with closing(Client(daemon.attach("vm", disk), "vm")):
        daemon.json("upgrade", "vm", "--force")
    refusal = daemon.run("detach", "vm", "--json")
    assert (refusal.returncode, json.loads(refusal.stderr)["code"]) == (4, "clients-awaited")
    with closing(Client(daemon.nbd_socket("vm"), "vm")) as client:
        write(client, 3, 1)  # it is back, and goes by itself
    eventually(lambda: daemon.json("show", "vm")["clients"] == 0, what="it has left")
    daemon.json("detach", "vm")


def test_a_detach_is_refused_in_the_moment_after_a_process_was_killed(
    daemon: Daemon, disk: Path
) -> None:
    """What the dead one said of its guests is no word of the next one's."""
    daemon.expect_log("restarting disk process")
    with (
        closing(control.Client(daemon.socket)) as asker,
        closing(Client(daemon.attach("vm", disk), "vm")) as client,
    ):
        write(client, 3, 1)
        daemon.json("show", "vm")  # from now on the daemon knows of that write
        daemon.kill_disk("vm")
        with pytest.raises(RefusedError) as caught:
            asker.detach("vm")
    assert caught.value.code in ("clients-awaited", "disk-restarted")
    assert daemon.json("show", "vm")["name"] == "vm"


def test_after_a_move_nothing_of_the_old_place_is_held(
    daemon: Daemon, disk: Path, tmp_path: Path
) -> None:
    """It may be a file system that is to be unmounted."""
    daemon.attach("vm", disk)
    (tmp_path / "there").mkdir()
    daemon.move("vm", tmp_path / "there" / "vm.raw")
    daemon.wait("vm")
    descriptors = Path(f"/proc/{daemon.disk_pid('vm')}/fd")

    def held() -> list[str]:
        found = [os.readlink(each) for each in descriptors.iterdir()]
        return [each for each in found if each == str(tmp_path) or each.endswith("(deleted)")]

    eventually(lambda: not held(), what="all is given back")


@pytest.mark.parametrize("head", [b"QFI\xfb\0\0\0\3", b"KDMV", b"vhdxfile", b"conectix"])
def test_images_of_other_formats_are_refused(daemon: Daemon, tmp_path: Path, head: bytes) -> None:
    image = tmp_path / "vm.img"
    image.write_bytes(head + bytes(MIB - len(head)))
    refusal = daemon.run("attach", "vm", image)
    assert refusal.returncode == 4
    assert "image, not raw: make it one by 'qemu-img convert -O raw'" in refusal.stderr
    assert daemon.json("ls") == []


async def test_a_process_that_ends_begins_no_move(disk: Path, tmp_path: Path) -> None:
    """The next one goes on with what was written down."""
    directories = Directories(tmp_path / "state", tmp_path / "run")
    state.prepare(directories)
    mover = Mover(DiskRecord("vm", str(disk)), directories, on_change=lambda _: None)
    await mover.open()
    running = asyncio.create_task(mover.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    record = JobRecord(
        id="1", disk="vm", source=str(disk), target=str(tmp_path / "moved.raw"), created=now()
    )
    state.make_directory(directories.job("1"))
    state.write_record(directories.job("1") / "job.json", record)
    with pytest.raises(RefusedError) as caught:
        await mover.start(record)
    assert caught.value.code == "disk-restarted"
    done = asyncio.Event()

    async def late() -> None:
        done.set()

    mover._adopt(late())
    await asyncio.wait_for(done.wait(), 10)
    assert history.read_job(directories, "1").standing == "unfinished"


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
