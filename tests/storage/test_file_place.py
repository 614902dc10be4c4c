"""Every refusal, every durable step, every reason to keep a source."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import subprocess
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from mirrord.errors import RefusedError
from mirrord.storage import durable
from mirrord.storage.backend import Backend, Cache
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import FileIo
from tests.helpers import require_program, require_root
from tests.storage.conformance import pattern
from tests.storage.places import allocated_bytes, make_file, mounted, run

JOB = "0d4fbd9c-7a52-4f7c-9d2b-5e1c8f6a3b70"
SIZE = MIB + 1
DEADLINE_S = 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk."""
    return make_file(tmp_path / "disk.raw", pattern(SIZE))


@pytest.fixture
async def source(path: Path, some_io: FileIo):
    """The disk, open."""
    opened = await FilePlace(str(path), some_io).open()
    yield opened
    await opened.close()


async def refusal_of(awaitable) -> RefusedError:
    """Return the refusal, which has to be one line."""
    with pytest.raises(RefusedError) as caught:
        await awaitable
    assert "\n" not in str(caught.value)
    return caught.value


class TestOpening:
    """What can be opened, and by whom."""

    async def test_the_location_becomes_what_a_link_leads_to(self, path, some_io) -> None:
        link = path.parent / "link"
        link.symlink_to(path)
        place = FilePlace(str(link), some_io)
        backend = await place.open()
        assert place.location == str(path)
        assert backend.name == "disk.raw"
        await backend.close()

    @pytest.mark.parametrize(
        ("make", "code"),
        [
            (lambda path: None, "location-missing"),
            (lambda path: path.mkdir(), "is-directory"),
            (os.mkfifo, "not-a-disk"),
            (lambda path: path.write_bytes(b""), "empty"),
            (lambda path: path.symlink_to("nowhere"), "location-missing"),
        ],
    )
    async def test_what_is_no_disk_is_refused(self, tmp_path, some_io, make, code) -> None:
        make(tmp_path / "thing")
        error = await refusal_of(FilePlace(str(tmp_path / "thing"), some_io).open())
        assert error.code == code
        assert str(tmp_path) in str(error)

    async def test_a_missing_directory_is_a_missing_location(self, tmp_path, some_io) -> None:
        error = await refusal_of(FilePlace(str(tmp_path / "no" / "disk"), some_io).open())
        assert error.code == "location-missing"

    async def test_a_second_writer_is_refused_until_the_first_closes(self, path, some_io) -> None:
        first = await FilePlace(str(path), some_io).open()
        error = await refusal_of(FilePlace(str(path), some_io).open())
        assert error.code == "in-use"
        assert (
            await refusal_of(FilePlace(str(path), some_io).open(read_only=True))
        ).code == "in-use"
        await first.close()
        await (await FilePlace(str(path), some_io).open()).close()

    async def test_readers_share_and_keep_writers_out(self, path, some_io) -> None:
        readers = [await FilePlace(str(path), some_io).open(read_only=True) for _ in range(2)]
        assert (await refusal_of(FilePlace(str(path), some_io).open())).code == "in-use"
        with pytest.raises(OSError, match="Read-only"):
            await readers[0].write(0, b"x")
        with pytest.raises(OSError, match="Read-only"):
            await readers[0].trim(0, 1)
        for reader in readers:
            await reader.close()

    async def test_qemu_and_mirrord_keep_each_other_out(self, path, some_io) -> None:
        qemu = [require_program("qemu-io"), "-f", "raw", str(path)]
        pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE}
        backend = await FilePlace(str(path), some_io).open()
        process = await asyncio.create_subprocess_exec(*qemu, **pipes)
        _, errors = await asyncio.wait_for(process.communicate(b"read 0 512\n"), DEADLINE_S)
        assert b"lock" in errors
        await backend.close()
        process = await asyncio.create_subprocess_exec(*qemu, **pipes)
        process.stdin.write(b"read 0 512\n")
        answer = await asyncio.wait_for(process.stdout.readuntil(b"512"), DEADLINE_S)
        assert b"read 512" in answer
        for read_only in (False, True):
            again = FilePlace(str(path), some_io).open(read_only=read_only)
            assert (await refusal_of(again)).code == "in-use"
        await asyncio.wait_for(process.communicate(b"quit\n"), DEADLINE_S)
        await (await FilePlace(str(path), some_io).open()).close()

    async def test_names_that_no_disk_may_have(self, tmp_path, some_io) -> None:
        for name in ("a\nb", "a\x7f", ".mirrord-x", "n" * 256):
            with pytest.raises(RefusedError) as caught:
                FilePlace(str(tmp_path / name), some_io)
            assert caught.value.code == "bad-name"
            assert "\n" not in str(caught.value)


class TestChecking:
    """What can't become a target."""

    async def check(self, target, source, io, *, needed=SIZE, force=False) -> None:
        await FilePlace(str(target), io).check_target(source, needed=needed, force=force)

    async def test_a_good_target_leaves_no_trace(self, tmp_path, source, some_io) -> None:
        before = sorted(tmp_path.iterdir())
        await self.check(tmp_path / "target.raw", source, some_io)
        assert sorted(tmp_path.iterdir()) == before

    async def test_a_directory_keeps_the_name(self, tmp_path, source, some_io) -> None:
        (tmp_path / "to").mkdir()
        place = FilePlace(f"{tmp_path}/to/", some_io)
        await place.check_target(source, needed=SIZE)
        assert place.location == f"{tmp_path}/to/disk.raw"

    async def test_what_exists_is_never_a_target(self, tmp_path, source, some_io) -> None:
        make_file(tmp_path / "there", b"precious")
        (tmp_path / "dangling").symlink_to("nowhere")
        for name in ("there", "dangling"):
            error = await refusal_of(self.check(tmp_path / name, source, some_io, force=True))
            assert error.code == "target-exists"

    async def test_the_source_is_no_target_by_any_name(
        self, tmp_path, path, source, some_io
    ) -> None:
        (tmp_path / "symbolic").symlink_to(path)
        os.link(path, tmp_path / "hard")
        (tmp_path / "folder").symlink_to(tmp_path)
        for target in (
            path,
            tmp_path / "symbolic",
            tmp_path / "hard",
            tmp_path,
            tmp_path / "folder" / "disk.raw",
        ):
            error = await refusal_of(self.check(target, source, some_io))
            assert error.code == "target-is-source"

    async def test_a_missing_directory(self, tmp_path, source, some_io) -> None:
        make_file(tmp_path / "file", b"x")
        for name in ("no/disk", "no/", "file/disk"):
            error = await refusal_of(self.check(f"{tmp_path}/{name}", source, some_io))
            assert error.code == "directory-missing"

    async def test_too_little_space_says_how_much_and_can_be_forced(
        self, tmp_path, source, some_io
    ) -> None:
        error = await refusal_of(self.check(tmp_path / "target", source, some_io, needed=1 << 60))
        assert error.code == "no-space"
        assert str(1 << 60) in str(error)
        assert "available" in str(error)
        await self.check(tmp_path / "target", source, some_io, needed=1 << 60, force=True)

    async def test_no_file_is_made_among_devices(self, source, some_io) -> None:
        error = await refusal_of(self.check("/dev/no-such-disk", source, some_io))
        assert error.code == "location-missing"

    @pytest.mark.root
    async def test_a_read_only_file_system(self, tmp_path, source, some_io) -> None:
        require_root()
        with mounted("tmpfs", tmp_path) as where:
            run("mount", "-o", "remount,ro", str(where))
            error = await refusal_of(self.check(where / "target", source, some_io))
            assert error.code == "directory-not-writable"
            del error  # its traceback has the place, which holds the directory,
            await asyncio.sleep(0)  # and so has the loop until its next turn

    @pytest.mark.root
    def test_a_directory_of_somebody_else(self, tmp_path) -> None:
        """As another user, in a process of its own."""
        require_root()
        make_file(tmp_path / "disk.raw", b"x" * 4096).chmod(0o600)
        (tmp_path / "to").mkdir(mode=0o755)
        script = f"""
import asyncio, os
from mirrord.errors import RefusedError
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import ThreadIo
from mirrord.storage.memory import open_memory
async def main():
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    io = ThreadIo()
    try:
        await FilePlace({str(tmp_path / "disk.raw")!r}, io).open()
    except RefusedError as error:
        print(error.code)
    try:
        place = FilePlace({str(tmp_path / "to" / "t")!r}, io)
        await place.check_target(open_memory(4096), needed=1)
    except RefusedError as error:
        print(error.code)
    await io.close()
asyncio.run(main())
"""
        for folder in (tmp_path, *tmp_path.parents):
            if os.stat(folder).st_uid == os.geteuid() and folder.is_relative_to("/tmp"):
                folder.chmod(folder.stat().st_mode | 0o011)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
        )
        assert done.stdout.split() == ["unreadable", "directory-not-writable"], done.stderr


class TestTarget:
    """From `create` to its final name, and back."""

    async def create(self, folder: Path, source: Backend, io, cache=Cache.WRITEBACK):
        place = FilePlace(str(folder / "target.raw"), io)
        await place.check_target(source, needed=SIZE)
        return place, await place.create(JOB, source, cache=cache)

    @pytest.mark.parametrize("cache", list(Cache))
    async def test_it_has_its_temporary_name_and_the_size(
        self, tmp_path, source, some_io, cache
    ) -> None:
        place, target = await self.create(tmp_path, source, some_io, cache)
        part = tmp_path / f".target.raw.mirrord-{JOB}.part"
        assert part.stat().st_size == SIZE
        assert allocated_bytes(part) == 0
        assert target.size == SIZE
        assert target.capabilities.starts_zeroed
        error = await refusal_of(FilePlace(str(tmp_path / "target.raw"), some_io).open())
        assert error.code == "location-missing"
        await target.close()
        await place.discard(JOB)
        await place.discard(JOB)
        assert not part.exists()

    async def test_a_long_name_is_cut_only_while_it_is_temporary(
        self, tmp_path, source, some_io
    ) -> None:
        name = "ü" * 127
        place = FilePlace(str(tmp_path / name), some_io)
        await place.check_target(source, needed=SIZE)
        target = await place.create(JOB, source, cache=Cache.WRITEBACK)
        await place.publish(JOB)
        assert (tmp_path / name).exists()
        await target.close()

    async def test_publish_and_withdraw_can_be_repeated(self, tmp_path, source, some_io) -> None:
        place, target = await self.create(tmp_path, source, some_io)
        part = tmp_path / f".target.raw.mirrord-{JOB}.part"
        for _ in range(2):
            await place.publish(JOB)
            assert (tmp_path / "target.raw").exists()
            assert not part.exists()
            assert await place.confirm(JOB, target.identity) is None
        for _ in range(2):
            await place.withdraw(JOB)
            assert part.exists()
            assert not (tmp_path / "target.raw").exists()
        await place.publish(JOB)
        await target.close()

    async def test_publish_replaces_nothing(self, tmp_path, source, some_io) -> None:
        place, target = await self.create(tmp_path, source, some_io)
        make_file(tmp_path / "target.raw", b"precious")
        with pytest.raises(FileExistsError):
            await place.publish(JOB)
        assert (tmp_path / "target.raw").read_bytes() == b"precious"
        await target.close()
        await place.discard(JOB)
        assert (tmp_path / "target.raw").read_bytes() == b"precious"

    async def test_publish_of_a_vanished_target_fails(self, tmp_path, source, some_io) -> None:
        place, target = await self.create(tmp_path, source, some_io)
        (tmp_path / f".target.raw.mirrord-{JOB}.part").unlink()
        with pytest.raises(FileNotFoundError):
            await place.publish(JOB)
        await target.close()

    @pytest.mark.parametrize("published", [False, True])
    async def test_it_is_found_again_under_either_name(
        self, tmp_path, source, some_io, published
    ) -> None:
        place, target = await self.create(tmp_path, source, some_io)
        await target.write(0, b"kept")
        if published:
            await place.publish(JOB)
        identity = target.identity
        await target.close()
        again = FilePlace(str(tmp_path / "target.raw"), some_io)
        found = await again.find(JOB, identity, cache=Cache.WRITEBACK)
        assert found is not None
        assert bytes(await found.read(0, 4)) == b"kept"
        await again.publish(JOB)
        assert (tmp_path / "target.raw").exists()
        await again.withdraw(JOB)
        await found.close()
        await again.discard(JOB)
        assert not list(tmp_path.glob("*target*"))
        assert not list(tmp_path.glob(".*target*"))

    async def test_another_file_is_not_found(self, tmp_path, source, some_io) -> None:
        place, target = await self.create(tmp_path, source, some_io)
        identity = target.identity
        await place.publish(JOB)
        await target.close()
        (tmp_path / "target.raw").unlink()
        make_file(tmp_path / "target.raw", b"", SIZE)
        again = FilePlace(str(tmp_path / "target.raw"), some_io)
        assert await again.find(JOB, identity, cache=Cache.WRITEBACK) is None
        assert "replaced" in (await again.confirm(JOB, identity) or "")
        await again.discard(JOB)
        assert (tmp_path / "target.raw").exists()

    async def test_a_shorter_or_missing_target_is_not_found(
        self, tmp_path, source, some_io
    ) -> None:
        place, target = await self.create(tmp_path, source, some_io)
        identity = target.identity
        await target.close()
        part = tmp_path / f".target.raw.mirrord-{JOB}.part"
        os.truncate(part, 10)
        assert await place.find(JOB, identity, cache=Cache.WRITEBACK) is None
        part.unlink()
        assert await place.find(JOB, identity, cache=Cache.WRITEBACK) is None
        assert "can't be opened" in (await place.confirm(JOB, identity) or "")

    async def test_mode_owner_and_attributes_are_the_sources(self, tmp_path, path, some_io) -> None:
        path.chmod(0o664)
        os.setxattr(path, "user.mirrord.test", b"label")
        if os.geteuid() == 0:
            os.chown(path, 1234, 5678)
        source = await FilePlace(str(path), some_io).open()
        before = os.umask(0o077)
        try:
            place, target = await self.create(tmp_path, source, some_io)
            await place.publish(JOB)
        finally:
            os.umask(before)
        status = (tmp_path / "target.raw").stat()
        assert stat.S_IMODE(status.st_mode) == 0o664
        if os.geteuid() == 0:
            assert (status.st_uid, status.st_gid) == (1234, 5678)
        assert os.getxattr(tmp_path / "target.raw", "user.mirrord.test") == b"label"
        await target.close()
        await source.close()


class TestRetiring:
    """The source is deleted last, and kept whenever there is a doubt."""

    @pytest.fixture
    async def place(self, path, some_io) -> FilePlace:
        """The source's place, as the job has it: opened, and closed after the pivot."""
        place = FilePlace(str(path), some_io)
        backend = await place.open()
        self.identity = backend.identity
        await backend.close()
        return place

    async def retire_again(self, path, some_io) -> str | None:
        """Retire as after a restart: by a place that was never opened."""
        return await FilePlace(str(path), some_io).retire(JOB, self.identity)

    async def test_it_goes_in_two_steps_that_can_be_repeated(self, path, place, some_io) -> None:
        retired = path.parent / f".disk.raw.mirrord-{JOB}.retired"
        assert await place.retire(JOB, self.identity) is None
        assert not path.exists()
        assert retired.exists()
        assert await place.retire(JOB, self.identity) is None
        assert await self.retire_again(path, some_io) is None
        await place.delete_retired(JOB, self.identity)
        assert not retired.exists()
        await place.delete_retired(JOB, self.identity)
        assert await self.retire_again(path, some_io) is None

    async def kept(self, path, place, some_io, reason: str) -> None:
        before = path.read_bytes()
        for outcome in (
            await place.retire(JOB, self.identity),
            await self.retire_again(path, some_io),
        ):
            assert outcome is not None
            assert reason in outcome
        await place.delete_retired(JOB, self.identity)
        assert path.read_bytes() == before
        assert not list(path.parent.glob(".*"))

    async def test_a_replaced_file_is_kept(self, path, place, some_io) -> None:
        path.rename(path.parent / "elsewhere")
        make_file(path, pattern(SIZE, 9))
        await self.kept(path, place, some_io, "replaced")

    async def test_a_new_file_in_the_old_inode_is_kept(self, path, place, some_io) -> None:
        """File systems give a freed inode number to the next file."""
        path.unlink()
        make_file(path, pattern(SIZE, 9))
        await self.kept(path, place, some_io, "replaced")

    async def test_a_link_in_its_place_is_kept(self, path, place, some_io) -> None:
        path.rename(path.parent / "elsewhere")
        path.symlink_to("elsewhere")
        await self.kept(path, place, some_io, "replaced")

    async def test_a_changed_size_is_kept(self, path, place, some_io) -> None:
        os.truncate(path, SIZE + 1)
        await self.kept(path, place, some_io, "replaced")

    async def test_a_file_with_another_hard_link_is_kept(self, path, place, some_io) -> None:
        os.link(path, path.parent / "second")
        await self.kept(path, place, some_io, "hard link")

    @pytest.mark.parametrize("mode", ["rb", "r+b"])
    async def test_a_file_that_is_open_elsewhere_is_kept(self, path, place, some_io, mode) -> None:
        with path.open(mode):
            await self.kept(path, place, some_io, "open")

    async def test_our_own_open_disk_counts_as_open(self, path, place, some_io) -> None:
        backend = await FilePlace(str(path), some_io).open()
        await self.kept(path, place, some_io, "open")
        await backend.close()

    async def test_where_it_is_left_when_a_step_fails(self, path, place, monkeypatch) -> None:
        """Nobody would look for a source under its hidden name."""

        def fail(*arguments: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        retired = path.parent / f".disk.raw.mirrord-{JOB}.retired"
        with monkeypatch.context() as broken:
            broken.setattr(durable, "sync_directory", fail)
            outcome = await place.retire(JOB, self.identity)
        assert outcome == f"{path} can't be retired (Input/output error); it is {retired} now"
        with monkeypatch.context() as broken:
            broken.setattr(durable, "remove", fail)
            with pytest.raises(OSError, match=f"Input/output error; it is {retired} now$"):
                await place.delete_retired(JOB, self.identity)
        monkeypatch.setattr(durable, "sync_directory", fail)
        with pytest.raises(OSError, match=f"gone, but a power cut may bring {retired} back$"):
            await place.delete_retired(JOB, self.identity)
        assert not retired.exists()

    async def test_a_missing_directory_is_no_error(self, path, place, some_io) -> None:
        outcome = await FilePlace("/nowhere/disk.raw", some_io).retire(JOB, self.identity)
        assert outcome is None

    def test_who_opens_a_leased_file_waits_and_is_noticed(self, path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        received = []
        old = signal.signal(signal.SIGURG, lambda *_: received.append(True))
        try:
            with durable.sole_opener(descriptor):
                assert durable.lease_holds(descriptor)
                with pytest.raises(BlockingIOError):
                    os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                assert not durable.lease_holds(descriptor)
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        finally:
            signal.signal(signal.SIGURG, old)
            os.close(descriptor)
        assert received
