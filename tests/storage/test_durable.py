"""Atomic replacement, renames that replace nothing, confined look-ups, locks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mirrord.storage import durable
from tests.helpers import eventually


@pytest.fixture
def folder(tmp_path: Path):
    """An open directory."""
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


class TestReplace:
    """All or nothing."""

    def test_it_makes_and_replaces(self, folder, tmp_path) -> None:
        for content in (b"one", b"two" * 1000, b""):
            durable.replace(folder, "file", content)
            assert (tmp_path / "file").read_bytes() == content
        assert os.listdir(folder) == ["file"]
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600

    def test_a_stale_temporary_is_overwritten(self, folder, tmp_path) -> None:
        (tmp_path / ".file.new").write_bytes(b"longer than the content")
        durable.replace(folder, "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new"

    def test_order_of_the_steps(self, folder, monkeypatch) -> None:
        """The content is synced before the rename, the directory after it."""
        story = []
        fsync, rename = os.fsync, os.rename

        def note_fsync(descriptor: int) -> None:
            story.append("directory" if descriptor == folder else "file")
            fsync(descriptor)

        def note_rename(*names: str, **directories: int) -> None:
            story.append("rename")
            rename(*names, **directories)

        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(os, "rename", note_rename)
        durable.replace(folder, "file", b"x")
        assert story == ["file", "rename", "directory"]

    def test_a_failure_leaves_the_old_content(self, folder, tmp_path, monkeypatch) -> None:
        durable.replace(folder, "file", b"old")

        def fail(_: int) -> None:
            raise OSError(errno.EIO, "no")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no"):
            durable.replace(folder, "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"old"
        assert os.listdir(folder) == ["file"]

    def test_a_write_that_moves_nothing_is_eio(self, folder, monkeypatch) -> None:
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        with pytest.raises(OSError, match="moved nothing"):
            durable.replace(folder, "file", b"new")


class TestRename:
    """Never over an existing name."""

    @pytest.fixture(params=["one step", "by links"])
    def way(self, request, monkeypatch) -> None:
        if request.param == "by links":

            def unsupported(*_: object) -> int:
                raise OSError(errno.EINVAL, "flags")

            monkeypatch.setattr(durable, "_renameat2", unsupported)

    @pytest.mark.usefixtures("way")
    def test_it_renames(self, folder, tmp_path) -> None:
        (tmp_path / "old").write_bytes(b"x")
        durable.rename_no_replace(folder, "old", "new")
        assert os.listdir(folder) == ["new"]

    @pytest.mark.usefixtures("way")
    def test_it_replaces_nothing(self, folder, tmp_path) -> None:
        (tmp_path / "old").write_bytes(b"x")
        (tmp_path / "new").write_bytes(b"precious")
        with pytest.raises(FileExistsError):
            durable.rename_no_replace(folder, "old", "new")
        assert (tmp_path / "new").read_bytes() == b"precious"
        assert (tmp_path / "old").read_bytes() == b"x"

    @pytest.mark.usefixtures("way")
    def test_a_missing_file(self, folder) -> None:
        with pytest.raises(FileNotFoundError):
            durable.rename_no_replace(folder, "old", "new")

    def test_other_failures_are_not_worked_around(self, folder, monkeypatch) -> None:
        def fail(*_: object) -> int:
            raise OSError(errno.EROFS, "read-only")

        monkeypatch.setattr(durable, "_renameat2", fail)
        with pytest.raises(OSError, match="read-only"):
            durable.rename_no_replace(folder, "old", "new")

    def test_remove_says_whether_there_was_something(self, folder, tmp_path) -> None:
        (tmp_path / "file").touch()
        assert durable.remove(folder, "file")
        assert not durable.remove(folder, "file")


class TestBeneath:
    """No way out of a directory."""

    def test_what_lies_below_is_opened(self, folder, tmp_path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "file").write_bytes(b"x")
        for path in ("a/file", "a/../a/file"):
            descriptor = durable.open_beneath(folder, path, os.O_RDONLY)
            assert os.read(descriptor, 1) == b"x"
            assert not os.get_inheritable(descriptor)
            os.close(descriptor)

    @pytest.mark.parametrize(
        ("path", "code"),
        [
            ("../x", errno.EXDEV),
            ("/etc/passwd", errno.EXDEV),
            ("link", errno.ELOOP),
            ("inner/x", errno.ELOOP),
            ("missing", errno.ENOENT),
        ],
    )
    def test_what_leads_elsewhere_is_refused(self, folder, tmp_path, path, code) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to("file")
        (tmp_path / "inner").symlink_to("/etc")
        with pytest.raises(OSError) as caught:  # noqa: PT011
            durable.open_beneath(folder, path, os.O_RDONLY)
        assert caught.value.errno == code


class TestLocks:
    """Who holds what."""

    def test_flock(self, folder) -> None:
        one, two = (os.open("l", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder) for _ in "12")
        assert durable.try_flock(one)
        assert durable.try_flock(one)
        assert not durable.try_flock(two)
        os.close(one)
        assert durable.try_flock(two)
        os.close(two)

    def test_a_disks_lock_belongs_to_the_description(self, folder) -> None:
        one, two = (os.open("l", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder) for _ in "12")
        duplicate = os.dup(one)
        assert durable.lock_disk(one, writing=True)
        assert durable.lock_disk(duplicate, writing=True)
        assert not durable.lock_disk(two, writing=True)
        assert not durable.lock_disk(two, writing=False)
        os.close(os.open("l", os.O_RDWR, dir_fd=folder))  # a POSIX lock would go here
        assert not durable.lock_disk(two, writing=True)
        os.close(one)
        assert not durable.lock_disk(two, writing=True)
        os.close(duplicate)
        assert durable.lock_disk(two, writing=True)
        os.close(two)

    def test_a_file_system_that_cannot_lock_is_not_in_use(self) -> None:
        with pytest.raises(OSError, match="Bad file"):
            durable.lock_disk(-1 & 0x7FFF, writing=True)


def test_preallocated_space_is_there(folder, tmp_path) -> None:
    descriptor = os.open("file", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder)
    durable.preallocate(descriptor, 1 << 20)
    assert os.fstat(descriptor).st_blocks * 512 >= 1 << 20
    os.close(descriptor)


def test_failed_calls_into_libc_raise(folder) -> None:
    closed = os.dup(folder)
    os.close(closed)
    for call in (
        lambda: durable.fallocate(closed, 0, 0, 1),
        lambda: durable.is_volatile(closed),
        lambda: durable.birth_ns(closed),
    ):
        with pytest.raises(OSError, match="Bad file"):
            call()


def test_a_successor_in_the_same_inode_has_another_birth(folder, tmp_path) -> None:
    births = set()

    def make_one_more() -> bool:
        descriptor = os.open("file", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder)
        births.add(durable.birth_ns(descriptor))
        os.close(descriptor)
        os.unlink("file", dir_fd=folder)
        return len(births) > 1

    eventually(make_one_more, what="the next tick of the clock")
    assert 0 not in births
