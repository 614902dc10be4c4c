"""A disk moves under a writer between files, block devices and shares, in every direction.

What shares can do by themselves is the storage tests' business; this is about the whole: daemon,
disk process, export, and a server that is a real one.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.test_directions import (
    MIB,
    SIZE_BYTES,
    MakeLoop,
    fill,
    make_loop,
    move_under_writer,
    read_all,
)
from tests.samba import Samba
from tests.shares import leftovers, section
from tests.smb_fixtures import make_samba

__all__ = ["make_loop", "make_samba"]

DIRECTIONS = [
    ("file", "share"),
    ("share", "file"),
    ("block", "share"),
    ("share", "block"),
    ("share", "share"),
    ("share", "other share"),
    ("share", "other server"),
]


@dataclass
class Site:
    """Two servers, and a daemon that knows their shares."""

    daemon: Daemon
    samba: Samba
    other: Samba


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Samba, Samba]]:
    """Start two servers, the first with two shares, the second for an ordinary client's eyes."""
    with contextlib.ExitStack() as ends:
        first, second = Samba(), Samba()
        ends.callback(first.close)
        ends.callback(second.close)
        first.shares["tapes"] = first.root / "tapes"
        first.shares["tapes"].mkdir()
        first.reconfigure()
        yield first.start(), second.start()


@pytest.fixture
def site(servers: tuple[Samba, Samba], make_daemon: Callable[..., Daemon]) -> Iterator[Site]:
    """Start a daemon for the servers; at the end nothing of it may be left on them."""
    first, second = servers
    config = section(first) + section(first, "tapes") + section(second)
    daemon = make_daemon(config)
    daemon.start()
    yield Site(daemon, first, second)
    for folder in (first.folder(), first.folder("tapes"), second.folder()):
        assert leftovers(folder) == []


class Places:
    """One end of a move for each kind: the location to name, and the file to look into."""

    def __init__(self, site: Site, folder: Path, make_loop: MakeLoop) -> None:
        self._site, self._folder, self._make_loop = site, folder, make_loop

    def make(self, kind: str, name: str) -> tuple[str, Path]:
        """Return location and file of a place of a kind; a device exists already."""
        if kind == "file":
            path = self._folder / f"{name}.raw"
            return str(path), path
        if kind == "block":
            larger = MIB if name == "target" else 0
            path = self._make_loop(self._folder / f"{name}.backing", SIZE_BYTES + larger)
            return str(path), path
        server = self._site.other if kind == "other server" else self._site.samba
        share = "tapes" if kind == "other share" else "disks"
        inside = f"{self._folder.name}-{name}.raw"
        return server.url(inside, share), server.file(inside, share)


@pytest.mark.parametrize("verify", ["full", "none"])
@pytest.mark.parametrize(("source_kind", "target_kind"), DIRECTIONS)
def test_a_disk_moves_in_every_direction(
    site: Site,
    tmp_path: Path,
    make_loop: MakeLoop,
    source_kind: str,
    target_kind: str,
    verify: str,
) -> None:
    daemon, places = site.daemon, Places(site, tmp_path, make_loop)
    source, source_path = places.make(source_kind, "source")
    target, target_path = places.make(target_kind, "target")
    fill(source_path, SIZE_BYTES)
    before = read_all(source_path, SIZE_BYTES)
    daemon.attach("vm", source)

    writer, job_id = move_under_writer(daemon, target, "auto", "--verify", verify)

    shown = daemon.json("show", "vm")
    assert (shown["location"], shown["size"]) == (target, SIZE_BYTES)
    assert daemon.job(job_id)["verified"] is (verify == "full")
    daemon.json("detach", "vm")
    after = read_all(target_path, SIZE_BYTES)
    writer.check(lambda offset, length: after[offset : offset + length])
    untouched = 1024 * 4096  # behind the writer's blocks
    assert after[untouched:] == before[untouched:]
    assert source_kind == "block" or not source_path.exists()
    if target_kind != "block":
        allocated = target_path.stat().st_blocks * 512
        assert allocated < SIZE_BYTES * 3 // 4, "a sparse disk became a full one"
        target_path.unlink()


def test_a_folder_on_a_share_keeps_the_name(site: Site, tmp_path: Path) -> None:
    source = tmp_path / "vm.raw"
    content = random.Random(1).randbytes(3 * MIB + 513)
    source.write_bytes(content)
    folder = site.samba.folder() / "folder"
    folder.mkdir(exist_ok=True)
    site.daemon.attach("vm", source)
    site.daemon.move("vm", site.samba.url("folder/"))
    site.daemon.wait("vm")
    assert site.daemon.json("show", "vm")["location"] == site.samba.url("folder/vm.raw")
    assert (folder / "vm.raw").read_bytes() == content
    assert not source.exists()


@pytest.mark.parametrize("size_bytes", [1, 511, MIB + 1])
def test_any_size_goes_there_and_back(site: Site, tmp_path: Path, size_bytes: int) -> None:
    source, back = tmp_path / "source.raw", tmp_path / "back.raw"
    content = random.Random(size_bytes).randbytes(size_bytes)
    source.write_bytes(content)
    site.daemon.attach("vm", source)
    for target in (site.samba.url(f"{size_bytes}.raw"), back):
        site.daemon.move("vm", target)
        site.daemon.wait("vm")
    assert back.read_bytes() == content


def test_a_disk_is_served_read_only_from_a_share(site: Site) -> None:
    content = random.Random(5).randbytes(MIB)
    site.samba.put("read-only.raw", content)
    site.daemon.attach("vm", site.samba.url("read-only.raw"), "--read-only")
    shown = site.daemon.json("show", "vm")
    assert shown["read_only"]
    assert shown["share"]["state"] == "connected"
    site.daemon.json("detach", "vm")


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_the_only_copy_is_not_let_go(site: Site, replaced: bool) -> None:
    """The file's name is gone at the server; what is open is what a move can save."""
    content = random.Random(6).randbytes(MIB)
    file = site.samba.put("gone.raw", content)
    site.daemon.attach("vm", site.samba.url("gone.raw"))
    file.unlink()
    if replaced:
        site.samba.put("gone.raw", b"another" * 1000, MIB)
    assert "removed or replaced" in site.daemon.json("show", "vm")["reason"]
    for words in (("detach", "vm"), ("upgrade", "vm", "--force")):
        done = site.daemon.run(*words, "--json")
        assert done.returncode == 4
        assert "disk-replaced" in done.stderr
    site.daemon.move("vm", site.samba.url(f"saved-{replaced}.raw"))
    site.daemon.wait("vm")
    assert site.samba.file(f"saved-{replaced}.raw").read_bytes() == content
    assert site.daemon.json("show", "vm")["reason"] is None
    site.daemon.json("detach", "vm")


def test_show_of_a_stuck_disk_is_quick(site: Site) -> None:
    site.daemon.expect_log("no answer", "stuck", "hangs")
    site.samba.put("stuck.raw", b"x" * MIB)
    site.daemon.attach("vm", site.samba.url("stuck.raw"))
    pid = site.daemon.disk_pid("vm")
    os.kill(pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        site.daemon.json("show", "vm")
        assert time.monotonic() - began_s < 15
    finally:
        os.kill(pid, signal.SIGCONT)


def test_what_show_says_about_a_share(site: Site) -> None:
    site.samba.put("shown.raw", b"x" * MIB)
    site.daemon.attach("vm", site.samba.url("shown.raw"))
    share = site.daemon.json("show", "vm")["share"]
    assert share["dialect"] == "3.1.1"
    assert share["encryption"] == "AES-128-GCM"
    assert (share["io_timeout_s"], share["weaknesses"]) == (60.0, [])
    text = site.daemon.run("show", "vm").stdout
    assert "SMB 3.1.1" in text
    assert "waits up to 60 s" in text
