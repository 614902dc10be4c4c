"""Names on a share: every refusal, every durable step, every reason to keep a source."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirrord.core.geometry import MIB, TIB, Status
from mirrord.storage.backend import Backend, Cache
from mirrord.storage.memory import open_memory
from mirrord.storage.smb import control
from mirrord.storage.smb.place import SharePlace
from tests.samba import Samba
from tests.storage.conformance import pattern
from tests.storage.places import allocated_bytes, make_file
from tests.storage.shares import DEADLINE_S, JOB, Client, Folder, MakeClient, refusal_of, smbclient
from tests.storage.shares import client as client
from tests.storage.shares import folder as folder
from tests.storage.shares import make_client as make_client
from tests.storage.shares import nobodys as nobodys
from tests.storage.shares import various as various

SIZE = MIB + 1


@pytest.fixture
async def source() -> Backend:
    """What is moved: a disk in memory, which has a name."""
    opened = open_memory(SIZE)
    opened.name = "disk.raw"
    return opened


class TestOpening:
    """What can be opened, and by whom."""

    @pytest.mark.parametrize(
        ("make", "code"),
        [
            (lambda path: None, "location-missing"),
            (lambda path: path.mkdir(), "is-directory"),
            (lambda path: path.write_bytes(b""), "empty"),
        ],
    )
    async def test_what_is_no_disk_is_refused(
        self, folder: Folder, make: Callable[[Path], object], code: str
    ) -> None:
        make(folder.path / "thing")
        error = await refusal_of(folder.place("thing").open())
        assert error.code == code
        assert f"{folder.name}/thing" in str(error)
        error = await refusal_of(folder.place("no/thing").open())
        assert error.code == "location-missing"

    async def test_a_folder_is_no_disk(self, client: Client, folder: Folder) -> None:
        for path in (f"{folder.name}/", ""):
            assert (await refusal_of(client.place(path).open())).code == "is-directory"

    async def test_a_share_that_there_is_not(self, client: Client, source: Backend) -> None:
        for work in (
            client.place("x", share="nowhere").open(),
            client.place("x", share="nowhere").check_target(source, needed=1),
        ):
            error = await refusal_of(work)
            assert error.code == "share-missing"
            assert "nowhere" in str(error)
            assert "127.0.0.1" in str(error)

    async def test_a_share_for_others(self, various: Samba, make_client: MakeClient) -> None:
        error = await refusal_of(make_client(various).place("x", share="denied").open())
        assert error.code == "share-denied"
        assert "denied" in str(error)

    async def test_a_second_writer_is_refused_until_the_first_closes(
        self, folder: Folder, samba: Samba, make_client: MakeClient
    ) -> None:
        make_file(folder.path / "disk.raw", pattern(SIZE))
        first = await folder.place("disk.raw").open()
        stranger = make_client(samba)
        for somebody in (stranger, folder.client):
            place = somebody.place(f"{folder.name}/disk.raw")
            for read_only in (False, True):
                error = await refusal_of(place.open(read_only=read_only))
                assert error.code == "in-use"
        await first.close()
        again = await stranger.place(f"{folder.name}/disk.raw").open()
        await again.close()

    async def test_readers_share_and_keep_writers_out(
        self, folder: Folder, samba: Samba, make_client: MakeClient
    ) -> None:
        make_file(folder.path / "disk.raw", pattern(SIZE))
        other = make_client(samba).place(f"{folder.name}/disk.raw")
        readers = [
            await folder.place("disk.raw").open(read_only=True),
            await other.open(read_only=True),
        ]
        assert (await refusal_of(other.open())).code == "in-use"
        with pytest.raises(OSError, match="Read-only"):
            await readers[0].write(0, b"x")
        for reader in readers:
            assert bytes(await reader.read(5, 50)) == pattern(SIZE)[5:55]
            await reader.close()

    async def test_a_handle_of_a_client_that_died_is_waited_for(
        self, folder: Folder, samba: Samba, make_client: MakeClient, expect_log: Any
    ) -> None:
        expect_log("connection lost", "connected again")
        make_file(folder.path / "disk.raw", pattern(SIZE))
        dead = make_client(samba)
        backend = await dead.open(f"{folder.name}/disk.raw")
        backend._closing = asyncio.create_task(asyncio.sleep(0))  # it doesn't come back
        (await dead.session()).abandon("it died")
        place = folder.place("disk.raw")
        place.patience_s = DEADLINE_S
        again = await place.open()
        assert bytes(await again.read(0, 512)) == pattern(SIZE)[:512]
        await again.close()
        backend._closing = None

    @pytest.mark.root
    async def test_what_this_user_may_not_open(
        self, nobodys: Samba, make_client: MakeClient, source: Backend
    ) -> None:
        file = nobodys.put("private/disk.raw", b"x" * 512)
        file.chmod(0)
        place = make_client(nobodys).place("private/disk.raw")
        assert (await refusal_of(place.open())).code == "unreadable"
        file.parent.chmod(0o500)
        place = make_client(nobodys).place("private/target.raw")
        error = await refusal_of(place.check_target(source, needed=1))
        assert error.code == "directory-not-writable"
        error = await refusal_of(place.create(JOB, source, cache=Cache.WRITEBACK))
        assert error.code == "directory-not-writable"
        assert os.listdir(file.parent) == ["disk.raw"]


class TestChecking:
    """What can't become a target."""

    async def test_a_good_target_leaves_no_trace(self, folder: Folder, source: Backend) -> None:
        await folder.place("target.raw").check_target(source, needed=SIZE)
        assert folder.names() == []

    async def test_a_folder_keeps_the_name(self, folder: Folder, source: Backend) -> None:
        (folder.path / "to").mkdir()
        for name in ("to/", "to"):
            place = folder.place(name)
            await place.check_target(source, needed=SIZE)
            assert place.location.endswith(f"/{folder.name}/to/disk.raw")
        source.name = "kept-in-the-root.raw"
        place = folder.client.place("")
        await place.check_target(source, needed=SIZE)
        assert place.location.endswith("/disks/kept-in-the-root.raw")

    async def test_a_name_that_no_share_takes(self, folder: Folder, source: Backend) -> None:
        source.name = "a:b"
        place = folder.place("")
        error = await refusal_of(place.check_target(source, needed=SIZE))
        assert error.code == "bad-name"

    async def test_a_nameless_disk_wants_a_name(self, folder: Folder, source: Backend) -> None:
        source.name = ""
        error = await refusal_of(folder.place("").check_target(source, needed=SIZE))
        assert error.code == "is-directory"

    async def test_what_exists_is_never_a_target(self, folder: Folder, source: Backend) -> None:
        make_file(folder.path / "there", b"precious")
        (folder.path / "disk.raw").mkdir()
        for name in ("there", ""):
            place = folder.place(name)
            error = await refusal_of(place.check_target(source, needed=1, force=True))
            assert error.code == "target-exists"
            error = await refusal_of(place.create(JOB, source, cache=Cache.WRITEBACK))
            assert error.code == "target-exists"
        assert folder.names() == ["disk.raw", "there"]

    async def test_the_source_is_no_target(self, folder: Folder) -> None:
        make_file(folder.path / "disk.raw", pattern(SIZE))
        os.link(folder.path / "disk.raw", folder.path / "hard")
        disk = await folder.place("disk.raw").open()
        for name in ("disk.raw", "DISK.RAW", "", "hard"):
            error = await refusal_of(folder.place(name).check_target(disk, needed=1))
            assert error.code == "target-is-source", name
        await disk.close()

    async def test_a_missing_folder(self, folder: Folder, source: Backend) -> None:
        make_file(folder.path / "file", b"x")
        for name in ("no/disk", "no/", "file/disk", "file/"):
            error = await refusal_of(folder.place(name).check_target(source, needed=1))
            assert error.code == "directory-missing", name
            error = await refusal_of(folder.place(name).create(JOB, source, cache=Cache.DIRECT))
            assert error.code == "directory-missing", name
        assert folder.names() == ["file"]

    async def test_too_little_space_says_how_much_and_can_be_forced(
        self, folder: Folder, source: Backend
    ) -> None:
        error = await refusal_of(folder.place("t").check_target(source, needed=1 << 60))
        assert error.code == "no-space"
        assert str(1 << 60) in str(error)
        assert "available" in str(error)
        await folder.place("t").check_target(source, needed=1 << 60, force=True)

    async def test_a_read_only_share(
        self, various: Samba, make_client: MakeClient, source: Backend
    ) -> None:
        place = make_client(various).place("target.raw", share="readonly")
        for work in (
            place.check_target(source, needed=1),
            place.create(JOB, source, cache=Cache.WRITEBACK),
        ):
            assert (await refusal_of(work)).code == "directory-not-writable"

    async def test_a_disk_that_is_too_large(
        self, folder: Folder, various: Samba, make_client: MakeClient
    ) -> None:
        huge = open_memory(17 * TIB)
        huge.name = "huge.raw"
        places = [folder.place("huge.raw"), make_client(various).place("huge.raw", share="solid")]
        for place in places:
            error = await refusal_of(place.create(JOB, huge, cache=Cache.WRITEBACK))
            assert error.code == "too-large"
            assert "choose another" in str(error)
        assert folder.names() == []
        assert os.listdir(various.folder("solid")) == []


class TestTarget:
    """From `create` to its final name, and back."""

    PART = f".target.raw.mirrord-{JOB}.part"

    async def create(self, folder: Folder, source: Backend) -> tuple[SharePlace, Backend]:
        place = folder.place("target.raw")
        await place.check_target(source, needed=SIZE)
        return place, await place.create(JOB, source, cache=Cache.WRITEBACK)

    async def test_it_has_its_temporary_name_and_the_size(
        self, folder: Folder, source: Backend
    ) -> None:
        place, target = await self.create(folder, source)
        part = folder.path / self.PART
        assert part.stat().st_size == SIZE
        assert allocated_bytes(part) == 0
        assert target.size == SIZE
        assert target.capabilities.starts_zeroed
        assert (await refusal_of(folder.place("target.raw").open())).code == "location-missing"
        error = await refusal_of(folder.place("target.raw").create(JOB, source, cache=Cache.DIRECT))
        assert error.code == "target-exists"
        await place.discard(JOB)
        await place.discard(JOB)
        assert folder.names() == []

    async def test_a_long_name_is_cut_only_while_it_is_temporary(
        self, folder: Folder, source: Backend
    ) -> None:
        name = "ü" * 127
        place = folder.place(name)
        await place.check_target(source, needed=SIZE)
        target = await place.create(JOB, source, cache=Cache.WRITEBACK)
        await place.publish(JOB)
        assert folder.names() == [name]
        await target.close()

    async def test_publish_and_withdraw_can_be_repeated(
        self, folder: Folder, source: Backend
    ) -> None:
        place, target = await self.create(folder, source)
        for _ in range(2):
            await place.publish(JOB)
            assert folder.names() == ["target.raw"]
            assert await place.confirm(JOB, target.identity) is None
        for _ in range(2):
            await place.withdraw(JOB)
            assert folder.names() == [self.PART]
            assert "is gone" in str(await place.confirm(JOB, target.identity))
        await place.publish(JOB)
        await target.close()
        assert await place.confirm(JOB, target.identity) is None

    async def test_it_is_hidden_from_nobody(
        self, folder: Folder, source: Backend, samba: Samba
    ) -> None:
        """Samba hides names with a dot, and remembers that of the file."""
        place, target = await self.create(folder, source)
        await place.publish(JOB)
        await target.write(0, b"x" * 4096)  # Samba then looks at the attributes once more
        await target.close()
        told = smbclient(samba, f"allinfo {folder.name}/target.raw")
        assert "attributes: " in told
        assert "H" not in told.partition("attributes: ")[2].partition(" (")[0]
        reader = await folder.place("target.raw").open(read_only=True)
        assert target.identity.is_still(reader.identity)
        extents = await reader.extents(0, SIZE)
        assert [extent.status for extent in extents] == [Status.DATA, Status.HOLE]
        await reader.close()

    async def test_publish_replaces_nothing(self, folder: Folder, source: Backend) -> None:
        place, target = await self.create(folder, source)
        make_file(folder.path / "target.raw", b"precious")
        with pytest.raises(FileExistsError):
            await place.publish(JOB)
        await place.discard(JOB)
        assert folder.names() == ["target.raw"]
        assert (folder.path / "target.raw").read_bytes() == b"precious"
        assert "replaced" in str(await place.confirm(JOB, target.identity))

    async def test_publish_of_a_vanished_target_fails(
        self, folder: Folder, source: Backend
    ) -> None:
        place, target = await self.create(folder, source)
        (folder.path / self.PART).unlink()
        with pytest.raises(FileNotFoundError):
            await place.publish(JOB)
        await target.close()

    @pytest.mark.parametrize("published", [False, True])
    async def test_it_is_found_again_under_either_name(
        self, folder: Folder, source: Backend, published: bool
    ) -> None:
        place, target = await self.create(folder, source)
        await target.write(0, b"kept")
        if published:
            await place.publish(JOB)
        await target.close()
        again = folder.place("target.raw")
        found = await again.find(JOB, target.identity, cache=Cache.WRITEBACK)
        assert found is not None
        assert bytes(await found.read(0, 4)) == b"kept"
        await again.publish(JOB)
        assert folder.names() == ["target.raw"]
        await again.withdraw(JOB)
        assert folder.names() == [self.PART]
        await again.discard(JOB)
        assert folder.names() == []

    async def test_another_file_is_not_found_and_not_discarded(
        self, folder: Folder, source: Backend, samba: Samba, make_client: MakeClient
    ) -> None:
        place, target = await self.create(folder, source)
        await place.publish(JOB)
        await target.close()
        (folder.path / "target.raw").rename(folder.path / "elsewhere")
        make_file(folder.path / "target.raw", b"", SIZE)
        again = folder.place("target.raw")
        assert await again.find(JOB, target.identity, cache=Cache.WRITEBACK) is None
        await again.discard(JOB, target.identity)
        somebodys = await make_client(samba).open(f"{folder.name}/target.raw")
        await again.discard(JOB, target.identity)  # and who has that open is not in the way
        await somebodys.close()
        assert folder.names() == ["elsewhere", "target.raw"]

    @pytest.mark.parametrize("known", [False, True])
    async def test_a_published_target_is_discarded_when_it_is_known(
        self, folder: Folder, source: Backend, known: bool
    ) -> None:
        place, target = await self.create(folder, source)
        await place.publish(JOB)
        await target.close()
        again = folder.place("target.raw")
        for _ in range(2):
            await again.discard(JOB, target.identity if known else None)
        assert folder.names() == ([] if known else ["target.raw"])

    @pytest.mark.parametrize("size", [1, 511, (1 << 20) + 1])
    async def test_every_size_works(self, folder: Folder, size: int) -> None:
        small = open_memory(size)
        place = folder.place("odd.raw")
        target = await place.create(JOB, small, cache=Cache.WRITEBACK)
        await target.write(0, pattern(size))
        await target.flush()
        await place.publish(JOB)
        assert (folder.path / "odd.raw").read_bytes() == pattern(size)
        await target.write_zeroes(size - 1, 1)
        assert bytes(await target.read(0, size)) == pattern(size)[:-1] + b"\0"
        extents = await target.extents(0, size)
        assert extents[-1].end <= size
        await target.close()
        again = await folder.place("odd.raw").open()
        assert again.size == size
        await again.close()

    async def test_a_cancelled_create_leaves_what_can_be_discarded(
        self, folder: Folder, source: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inside, real = asyncio.Event(), control.set_size
        loop = asyncio.get_running_loop()

        def set_size(*arguments: Any) -> None:
            loop.call_soon_threadsafe(inside.set)
            real(*arguments)

        monkeypatch.setattr(control, "set_size", set_size)
        place = folder.place("target.raw")
        task = asyncio.create_task(place.create(JOB, source, cache=Cache.WRITEBACK))
        async with asyncio.timeout(DEADLINE_S):
            await inside.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            await place.discard(JOB)
        assert folder.names() == []

    async def test_a_cancelled_open_keeps_nobody_out(self, folder: Folder) -> None:
        make_file(folder.path / "disk.raw", pattern(SIZE))
        await folder.client.server.session()
        for turns in range(0, 12, 2):
            task = asyncio.create_task(folder.place("disk.raw").open())
            for _ in range(turns):
                await asyncio.to_thread(os.getpid)
            task.cancel()
            outcome = await asyncio.gather(task, return_exceptions=True)
            if isinstance(outcome[0], Backend):
                await outcome[0].close()
            place = folder.place("disk.raw")
            place.patience_s = DEADLINE_S
            await (await place.open()).close()


class TestSource:
    """After the commit: out of the way, then gone; or kept, with the reason."""

    async def disk(self, folder: Folder) -> Any:
        make_file(folder.path / "disk.raw", pattern(SIZE))
        backend = await folder.place("disk.raw").open()
        await backend.close()
        return backend.identity

    async def test_it_is_retired_and_deleted_and_both_can_be_repeated(self, folder: Folder) -> None:
        identity = await self.disk(folder)
        for _ in range(2):
            assert await folder.place("disk.raw").retire(JOB, identity) is None
            assert folder.names() == [f".disk.raw.mirrord-{JOB}.retired"]
        for _ in range(2):
            await folder.place("disk.raw").delete_retired(JOB, identity)
            assert folder.names() == []
        assert await folder.place("disk.raw").retire(JOB, identity) is None

    async def kept(self, folder: Folder, identity: Any, reason: str) -> None:
        before = folder.names()
        outcome = await folder.place("disk.raw").retire(JOB, identity)
        assert outcome is not None
        assert reason in outcome
        await folder.place("disk.raw").delete_retired(JOB, identity)
        assert folder.names() == before

    async def test_a_replaced_file_is_kept(self, folder: Folder) -> None:
        identity = await self.disk(folder)
        (folder.path / "disk.raw").rename(folder.path / "elsewhere")
        make_file(folder.path / "disk.raw", pattern(SIZE, 9))
        await self.kept(folder, identity, "replaced")

    async def test_a_new_file_in_the_old_inode_is_kept(self, folder: Folder) -> None:
        identity = await self.disk(folder)
        (folder.path / "disk.raw").unlink()
        make_file(folder.path / "disk.raw", pattern(SIZE, 9))
        await self.kept(folder, identity, "replaced")

    async def test_a_changed_size_is_kept(self, folder: Folder) -> None:
        identity = await self.disk(folder)
        os.truncate(folder.path / "disk.raw", SIZE + 1)
        await self.kept(folder, identity, "replaced")

    async def test_a_file_with_another_hard_link_is_kept(self, folder: Folder) -> None:
        identity = await self.disk(folder)
        os.link(folder.path / "disk.raw", folder.path / "second")
        await self.kept(folder, identity, "hard link")

    @pytest.mark.parametrize("read_only", [False, True])
    async def test_a_file_that_another_client_has_open_is_kept(
        self, folder: Folder, samba: Samba, make_client: MakeClient, read_only: bool
    ) -> None:
        identity = await self.disk(folder)
        stranger = await make_client(samba).open(f"{folder.name}/disk.raw", read_only=read_only)
        await self.kept(folder, identity, "another client")
        await stranger.close()
        assert await folder.place("disk.raw").retire(JOB, identity) is None

    async def test_a_missing_folder_is_no_error(self, folder: Folder) -> None:
        identity = await self.disk(folder)
        assert await folder.place("no/disk.raw").retire(JOB, identity) is None
