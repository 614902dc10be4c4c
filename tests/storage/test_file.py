"""Files on real file systems: holes, reflinks, full disks, sizes, and who changed what."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mirrord.core.geometry import MIB, Extent, Status, merge
from mirrord.storage import durable
from mirrord.storage.backend import Cache
from mirrord.storage.file import FileBackend
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import FileIo, open_io
from tests.storage.conformance import pattern
from tests.storage.places import allocated_bytes, make_file

JOB = "6f1c6d0e-52f5-4d17-8d0d-24a6c1a7f001"
CACHES = pytest.mark.parametrize("cache", list(Cache), ids=lambda cache: cache.value)


async def open_file(path: Path, io: FileIo, cache: Cache = Cache.WRITEBACK) -> FileBackend:
    """Open a file as a disk."""
    opened = await FilePlace(str(path), io).open(cache=cache)
    assert isinstance(opened, FileBackend)
    return opened


def leave_free(where: Path, free_bytes: int) -> None:
    """Have a file take what a file system has, but for `free_bytes`: that is sooner full."""
    status = os.statvfs(where)
    taken = status.f_bavail * status.f_frsize - free_bytes
    if taken > 0:
        with (where / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, taken)


async def all_extents(backend: FileBackend):
    """Return the extents of the whole disk, joined."""
    extents, at = [], 0
    while at < backend.size:
        extents += await backend.extents(at, backend.size - at)
        at = extents[-1].end
    return merge(extents)


class TestSizes:
    """A disk may have any size, and keeps it."""

    @CACHES
    @pytest.mark.parametrize("size", [1, 511, 512, 513, 4095, 4096, 4097, 8191, MIB + 1, MIB + 512])
    async def test_every_byte_to_the_last(self, tmp_path, io, size, cache) -> None:
        path = make_file(tmp_path / "disk", pattern(size, 1))
        backend = await open_file(path, io, cache)
        assert bytes(await backend.read(0, size)) == pattern(size, 1)
        await backend.write(0, pattern(size, 2))
        assert bytes(await backend.read(0, size)) == pattern(size, 2)
        await backend.write(size - 1, b"!", fua=True)
        assert bytes(await backend.read(size - 1, 1)) == b"!"
        assert bytes(await backend.read_stored(0, size)) == pattern(size, 2)[:-1] + b"!"
        half = size // 2
        await backend.write_zeroes(half, size - half, punch=False)
        await backend.trim(half, size - half, fua=True)
        assert bytes(await backend.read(0, size)) == pattern(size, 2)[:half] + bytes(size - half)
        await backend.flush()
        await backend.check_unchanged()
        await backend.close()
        assert path.stat().st_size == size
        assert path.read_bytes() == pattern(size, 2)[:half] + bytes(size - half)

    @CACHES
    async def test_five_tebibytes_of_holes(self, tmp_path, some_io, cache) -> None:
        size = 5 << 40
        path = make_file(tmp_path / "disk", b"", size)
        backend = await open_file(path, some_io, cache)
        await backend.write(size - 8192, pattern(8192))
        await backend.trim(0, size - 8192)
        statuses = [extent.status for extent in await all_extents(backend)]
        assert statuses == [Status.HOLE, Status.DATA]
        assert bytes(await backend.read(size - 8192, 8192)) == pattern(8192)
        assert allocated_bytes(path) < MIB
        await backend.close()

    async def test_data_that_is_known_is_told_without_a_thread(
        self, tmp_path, some_io, monkeypatch
    ) -> None:
        path = make_file(tmp_path / "disk", pattern(2 * MIB), 4 * MIB)
        backend = await open_file(path, some_io)
        assert (await backend.extents(0, MIB))[0].end == MIB
        looks: list[int] = []
        find = backend._holes.find
        monkeypatch.setattr(
            backend._holes, "find", lambda offset, end: (looks.append(offset), find(offset, end))[1]
        )
        assert await backend.extents(MIB, MIB) == [Extent(MIB, MIB, Status.DATA)]
        assert not looks
        await backend.trim(MIB, MIB)
        assert (await backend.extents(MIB, MIB))[0].status is Status.HOLE
        assert looks == [MIB]
        await backend.close()

    async def test_a_changed_size_is_noticed(self, tmp_path, some_io) -> None:
        path = make_file(tmp_path / "disk", pattern(8192))
        backend = await open_file(path, some_io)
        for size in (8193, 8191):
            os.truncate(path, size)
            with pytest.raises(OSError, match="changed the size") as caught:
                await backend.check_unchanged()
            assert caught.value.errno == errno.ESTALE
        with pytest.raises(OSError, match="shorter") as caught:
            await backend.read(8191, 1)
        assert caught.value.errno == errno.EIO
        await backend.close()


@pytest.mark.root
class TestFileSystems:
    """ext4, XFS, btrfs and tmpfs, each small and of our own."""

    @CACHES
    async def test_holes_are_found_made_and_kept(self, system, some_io, cache) -> None:
        _, where = system
        path = make_file(where / "disk", b"", 8 * MIB)
        backend = await open_file(path, some_io, cache)
        assert backend.capabilities.punches_holes
        assert [e.status for e in await all_extents(backend)] == [Status.HOLE]
        await backend.write(2 * MIB, pattern(MIB))
        await backend.write(6 * MIB, pattern(MIB))
        await backend.flush()
        found = [
            (e.offset, e.length) for e in await all_extents(backend) if e.status is Status.DATA
        ]
        assert found == [(2 * MIB, MIB), (6 * MIB, MIB)]
        assert 2 * MIB <= allocated_bytes(path) < 3 * MIB
        await backend.trim(2 * MIB, MIB)
        await backend.write_zeroes(6 * MIB, MIB)
        await backend.flush()
        assert allocated_bytes(path) < MIB
        assert not any(await backend.read_stored(0, 8 * MIB))
        await backend.write_zeroes(MIB, 2 * MIB, punch=False, fua=True)
        assert 2 * MIB <= allocated_bytes(path) < 3 * MIB
        await backend.close()

    async def test_only_what_survives_is_called_durable(self, system, some_io) -> None:
        kind, where = system
        backend = await open_file(make_file(where / "disk", b"x" * 4096), some_io)
        assert backend.capabilities.durable_flush == (kind != "tmpfs")
        await backend.close()

    @CACHES
    async def test_copies_below_share_blocks_where_they_can(self, system, some_io, cache) -> None:
        kind, where = system
        size = 8 * MIB + 4096
        source = await open_file(make_file(where / "disk", pattern(size)), some_io, cache)
        place = FilePlace(str(where / "target"), some_io)
        await place.check_target(source, needed=size)
        target = await place.create(JOB, source, cache=cache)
        copied = await target.copy_from(source, 0, size)
        assert copied == (kind in ("xfs", "btrfs"))
        if copied:
            await target.flush()
            assert bytes(await target.read_stored(0, size)) == pattern(size)
            assert not await target.copy_from(source, 100, 5000)
            await target.write(0, b"new")
            assert bytes(await source.read(0, 3)) == pattern(size)[:3]
        await target.close()
        await place.discard(JOB)
        await source.close()

    @CACHES
    async def test_a_file_server_copies_by_itself(
        self, system, some_io, cache, monkeypatch
    ) -> None:
        """A local file system stands for the server's: its copy_file_range is the kernel's own."""
        _, where = system
        here = os.open(where, os.O_RDONLY)
        monkeypatch.setattr("mirrord.storage.file.COPYING_SERVERS", {durable.file_system_of(here)})
        os.close(here)
        source = await open_file(make_file(where / "disk", pattern(MIB)), some_io, cache)
        target = await open_file(make_file(where / "target", b"", MIB), some_io, cache)
        assert await target.copy_from(source, 100, 5000) == (cache is Cache.WRITEBACK)
        copied = pattern(MIB)[100:5100] if cache is Cache.WRITEBACK else bytes(5000)
        assert bytes(await target.read(0, 6000)) == bytes(100) + copied + bytes(900)
        await target.close()
        await source.close()

    @CACHES
    async def test_a_full_file_system_is_enospc_and_loses_nothing(
        self, system, some_io, cache
    ) -> None:
        kind, where = system
        path = make_file(where / "disk", b"", 400 * MIB)
        leave_free(where, 40 * MIB)
        backend = await open_file(path, some_io, cache)
        written = 0

        async def fill() -> None:
            nonlocal written
            while written < backend.size:
                await backend.write(written, pattern(MIB, written))
                written += MIB
                if kind == "btrfs":  # it finds out late that delayed writes have no room
                    await backend.flush()

        with pytest.raises(OSError, match="No space") as caught:
            await fill()
        assert caught.value.errno == errno.ENOSPC
        await backend.trim(0, MIB)
        await backend.flush()
        for at in range(MIB, written, 8 * MIB):
            assert bytes(await backend.read(at, MIB)) == pattern(MIB, at)
        await backend.close()

    async def test_a_source_deleted_on_each_file_system(self, system, some_io) -> None:
        """Leases, births and renames that replace nothing work on all of them."""
        _, where = system
        path = make_file(where / "disk", pattern(8192))
        place = FilePlace(str(path), some_io)
        backend = await place.open()
        identity = backend.identity
        await backend.close()
        assert identity.born_ns > 0
        assert await place.retire(JOB, identity) is None
        await place.delete_retired(JOB, identity)
        assert not list(where.glob("*disk*"))


class TestFaults:
    """What goes wrong below."""

    def test_a_file_size_limit_is_efbig(self, tmp_path) -> None:
        """RLIMIT_FSIZE first makes a write partial, then EFBIG. In a process of its own."""
        path = make_file(tmp_path / "disk", b"", 2 * MIB)
        script = f"""
import asyncio, errno, resource, sys
from mirrord.storage.backend import Cache
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import open_io
async def main():
    for kind in ("io_uring", "threads"):
        io = open_io(kind)
        backend = await FilePlace({str(path)!r}, io).open()
        for inline in (False, True):
            backend.authoritative = inline
            try:
                await backend.write((1 << 20) - 50_000, b"x" * 100_000)
            except OSError as error:
                print(errno.errorcode[error.errno])
        await backend.close()
        await io.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
asyncio.run(main())
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
        )
        assert done.stdout.split() == ["EFBIG"] * 4, done.stderr

    @CACHES
    async def test_a_failure_of_one_piece_is_told_when_all_have_ended(
        self, tmp_path, some_io, cache, monkeypatch
    ) -> None:
        backend = await open_file(make_file(tmp_path / "disk", b"", 8 * MIB), some_io, cache)
        real = some_io.write_direct
        ended = []

        async def fail_third(descriptor, offset, data, *, dsync):
            await real(descriptor, offset, data, dsync=dsync)
            ended.append(offset)
            if offset == 2 * MIB:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(some_io, "write_direct", fail_third)
        if cache is Cache.DIRECT:
            with pytest.raises(OSError, match="Input/output"):
                await backend.write(0, pattern(5 * MIB))
            assert sorted(ended) == [at * MIB for at in range(5)]
        else:
            await backend.write(0, pattern(5 * MIB))
        await backend.close()

    @CACHES
    async def test_file_systems_without_fallocate_get_zeroes_written(
        self, tmp_path, some_io, cache, monkeypatch
    ) -> None:
        backend = await open_file(make_file(tmp_path / "disk", pattern(4 * MIB)), some_io, cache)

        async def unsupported(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(some_io, "fallocate", unsupported)
        with pytest.raises(OSError, match="not faster") as caught:
            await backend.write_zeroes(0, MIB, fast=True)
        assert caught.value.errno == errno.ENOTSUP
        assert bytes(await backend.read(0, MIB)) == pattern(4 * MIB)[:MIB]
        await backend.trim(100, 3 * MIB)
        expected = pattern(4 * MIB)[:100] + bytes(3 * MIB) + pattern(4 * MIB)[3 * MIB + 100 :]
        assert bytes(await backend.read(0, 4 * MIB)) == expected
        await backend.close()

    async def test_no_preadv_flags_no_inline_reads(self, tmp_path, some_io, monkeypatch) -> None:
        backend = await open_file(make_file(tmp_path / "disk", pattern(8192)), some_io)
        calls = []

        def unsupported(*arguments: object) -> int:
            calls.append(arguments)
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "preadv", unsupported)
        for _ in range(3):
            assert bytes(await backend.read(1, 8000)) == pattern(8192)[1:8001]
        assert len(calls) == 1
        await backend.close()

    async def test_a_cold_or_half_cold_read_is_completed(self, tmp_path, io, monkeypatch) -> None:
        backend = await open_file(make_file(tmp_path / "disk", pattern(65536)), io)
        real = os.preadv
        answers = iter([None, 4096])

        def partly(descriptor, buffers, offset, flags=0):
            if not flags & os.RWF_NOWAIT:
                return real(descriptor, buffers, offset, flags)
            count = next(answers)
            if count is None:
                raise BlockingIOError(errno.EAGAIN, "cold")
            return real(descriptor, [memoryview(buffers[0])[:count]], offset)

        monkeypatch.setattr(os, "preadv", partly)
        for _ in range(2):
            assert bytes(await backend.read(10, 60000)) == pattern(65536)[10:60010]
        await backend.close()

    async def test_without_direct_reads_the_cache_is_dropped_instead(
        self, tmp_path, some_io, monkeypatch
    ) -> None:
        backend = await open_file(make_file(tmp_path / "disk", pattern(65536)), some_io)
        await backend.flush()
        monkeypatch.setattr("mirrord.storage.descriptor.reopen", _refuse_direct)
        for _ in range(2):
            assert bytes(await backend.read_stored(10, 60000)) == pattern(65536)[10:60010]
        await backend.close()


def _refuse_direct(_: int) -> int:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


async def test_a_cache_hit_and_an_inline_write_end_without_waiting(tmp_path, some_io) -> None:
    """What a frontend starts by hand is then answered in the same batch."""
    backend = await open_file(make_file(tmp_path / "disk", pattern(MIB)), some_io)
    backend.authoritative = True
    writes = (backend.write(0, b"x" * 4096), backend.write(0, bytearray(MIB)))
    for coroutine in (backend.read(0, 4096), *writes):
        with pytest.raises(StopIteration):
            coroutine.send(None)
    await backend.close()


async def test_descriptors_are_all_given_back(tmp_path, some_io) -> None:
    """The second descriptor of each mode included. Other threads may have some of their own."""
    path = make_file(tmp_path / "disk", pattern(5000))

    def held() -> int:
        count = 0
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # another thread's, closed by now
                count += os.readlink(f"/proc/self/fd/{number}") == str(path)
        return count

    for cache in Cache:
        backend = await open_file(path, some_io, cache)
        await backend.read_stored(0, 5000)
        await backend.write(4999, b"x")
        assert held() >= 1
        await backend.close()
        assert held() == 0


MODEL_BYTES = 3 * 4096 + 700  # not a whole number of blocks: the last page has its own path


class FileModel(RuleBasedStateMachine):
    """A FileBackend does what a bytearray does."""

    cache = Cache.WRITEBACK
    ranges = st.tuples(
        st.integers(0, MODEL_BYTES - 1), st.sampled_from([1, 100, 512, 4096, 5000, MODEL_BYTES])
    ).map(lambda pair: (pair[0], min(pair[1], MODEL_BYTES - pair[0])))

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.path = Path(self.folder) / "model"
        make_file(self.path, b"", MODEL_BYTES)
        self.model = bytearray(MODEL_BYTES)
        self.backend = self.runner.run(self.open())

    async def open(self) -> FileBackend:
        self.io = open_io()
        return await open_file(self.path, self.io, self.cache)

    @rule(where=ranges, seed=st.integers(0, 9), fua=st.booleans())
    def write(self, where, seed, fua) -> None:
        offset, length = where
        data = pattern(length, seed)
        self.runner.run(self.backend.write(offset, data, fua=fua))
        self.model[offset : offset + length] = data

    @rule(first=ranges, second=ranges)
    def write_two_at_once(self, first, second) -> None:
        """Apart from one another, as range locks keep them; in one block, maybe."""
        (one, _), (two, length) = sorted([first, second])
        gap = two - one
        if not gap:
            return

        async def both() -> None:
            await asyncio.gather(
                self.backend.write(one, b"1" * gap), self.backend.write(two, b"2" * length)
            )

        self.runner.run(both())
        self.model[one:two] = b"1" * gap
        self.model[two : two + length] = b"2" * length

    @rule(where=ranges, punch=st.booleans(), fua=st.booleans())
    def write_zeroes(self, where, punch, fua) -> None:
        offset, length = where
        self.runner.run(self.backend.write_zeroes(offset, length, punch=punch, fua=fua))
        self.model[offset : offset + length] = bytes(length)

    @rule(where=ranges)
    def trim(self, where) -> None:
        offset, length = where
        self.runner.run(self.backend.trim(offset, length))
        self.model[offset : offset + length] = bytes(length)

    @rule(where=ranges, stored=st.booleans())
    def read(self, where, stored) -> None:
        offset, length = where
        if stored:
            self.runner.run(self.backend.flush())
            found = self.runner.run(self.backend.read_stored(offset, length))
        else:
            found = self.runner.run(self.backend.read(offset, length))
        assert bytes(found) == self.model[offset : offset + length]

    @rule()
    def reopen(self) -> None:
        self.runner.run(self.backend.close())
        self.backend = self.runner.run(open_file(self.path, self.io, self.cache))

    @invariant()
    def extents_hide_no_data(self) -> None:
        for extent in self.runner.run(all_extents(self.backend)):
            if extent.status is not Status.DATA:
                assert not any(self.model[extent.offset : extent.end])

    @invariant()
    def the_size_stays(self) -> None:
        assert self.path.stat().st_size == MODEL_BYTES

    def teardown(self) -> None:
        self.runner.run(self.backend.close())
        assert self.path.read_bytes() == self.model
        self.runner.run(self.io.close())
        self.runner.close()


@CACHES
def test_a_file_is_a_bytearray(tmp_path, cache) -> None:
    """Hypothesis looks for the sequence that shows otherwise."""

    class Model(FileModel):
        folder = str(tmp_path)

    Model.cache = cache
    # 40 runs of 25 steps: a second or two; the nightly profile may ask for more.
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=40,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
