"""Looks at locations: what is one thing, and storage that hangs while it is looked at."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mirrord.service import looks
from mirrord.service.looks import Looks
from mirrord.service.places import Found, find, same_location
from tests.helpers import eventually, require_root

STUCK = "/stuck/vm.raw"
SHORT_S = 0.2


class StuckStorage:
    """What `STUCK`, another name of a disk, lies on: it answers nothing until `let_go`."""

    def __init__(self, disk: str) -> None:
        self._disk = disk
        self.asked = 0
        self.let_go = threading.Event()

    def find(self, location: str, root: str | None = None) -> Found | None:
        if location == STUCK:
            self.asked += 1
            self.let_go.wait()
            return find(self._disk)
        return find(location, root)


@pytest.fixture
def stuck(
    monkeypatch: pytest.MonkeyPatch, disk: str, expect_log: Callable[..., None]
) -> Iterator[StuckStorage]:
    expect_log("location hangs")
    storage = StuckStorage(disk)
    monkeypatch.setattr(looks, "find", storage.find)
    monkeypatch.setattr(looks, "LOOK_DEADLINE_S", SHORT_S)
    yield storage
    storage.let_go.set()


@pytest.fixture
def disk(tmp_path: Path) -> str:
    path = tmp_path / "vm.raw"
    path.touch()
    return str(path)


async def test_the_first_that_is_the_same_is_told(tmp_path: Path, disk: str) -> None:
    link, hard, other = (str(tmp_path / name) for name in ("link", "hard", "other"))
    os.symlink(disk, link)
    os.link(disk, hard)
    os.mknod(other)
    seen = Looks()
    assert await seen.first_same(disk, []) is None
    assert await seen.first_same(disk, [other, "/missing", "smb://server/share/vm.raw"]) is None
    assert await seen.first_same(disk, [other, hard, link]) == 1
    assert await seen.first_same(disk, [hard, link, disk]) == 2, "a name needs no look"
    assert await seen.first_same("/missing", [other, "/missing"]) == 1
    assert await seen.first_same("/missing", [other, "/absent"]) is None


async def test_shares_are_compared_by_name(disk: str) -> None:
    at, others = "smb://server/share/vm.raw", [disk, "smb://SERVER/Share/vm.raw"]
    assert await Looks().first_same(at, others) == 1
    assert await Looks().first_same(at, [disk, "smb://server/share/other.raw"]) is None


async def test_below_a_root_no_link_is_followed(tmp_path: Path, disk: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    os.symlink(disk, root / "link")
    os.link(disk, root / "hard")
    seen = Looks()
    assert await seen.first_same(str(root / "link"), [disk], str(root)) is None
    assert await seen.first_same(str(root / "hard"), [disk], str(root)) == 0


def test_two_nodes_of_a_block_device_are_one_thing(tmp_path: Path) -> None:
    require_root()
    one, other, third = (str(tmp_path / name) for name in ("one", "other", "third"))
    for path, minor in (one, 11), (other, 11), (third, 12):
        os.mknod(path, 0o60600, os.makedev(7, minor))
    assert same_location(one, other)
    assert not same_location(one, third)
    assert find(one) == (os.makedev(7, 11), 0)


async def test_what_hangs_is_waited_for_once_and_counts_as_another(
    stuck: StuckStorage, disk: str, tmp_path: Path
) -> None:
    hard = str(tmp_path / "hard")
    os.link(disk, hard)
    seen = Looks()
    loop = asyncio.get_running_loop()
    began = loop.time()
    found = await asyncio.gather(*(seen.first_same(disk, [STUCK, hard]) for _ in range(3)))
    assert found == [1, 1, 1]
    assert SHORT_S <= loop.time() - began < 10 * SHORT_S
    for _ in range(100):
        assert await seen.first_same(STUCK, [disk, hard]) is None
    assert loop.time() - began < 20 * SHORT_S
    assert stuck.asked == 1


async def test_a_look_that_can_not_begin_is_taken_later(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be too many threads: that is no storage that hangs."""
    hard = str(tmp_path / "hard")
    os.link(disk, hard)
    seen = Looks()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            await seen.first_same(disk, [hard])
    assert await seen.first_same(disk, [hard]) == 0


async def test_what_answers_again_is_looked_at_again(stuck: StuckStorage, disk: str) -> None:
    seen = Looks()
    assert await seen.first_same(STUCK, [disk]) is None
    stuck.let_go.set()
    async with asyncio.timeout(10):
        while await seen.first_same(STUCK, [disk]) is None:
            assert stuck.asked == 1
    assert stuck.asked == 2


def test_a_look_may_outlive_the_loop(stuck: StuckStorage, disk: str) -> None:
    before = threading.active_count()
    asyncio.run(Looks().first_same(STUCK, [disk]), debug=True)
    assert threading.active_count() == before + 1
    stuck.let_go.set()
    eventually(lambda: threading.active_count() == before, what="its thread ends")
