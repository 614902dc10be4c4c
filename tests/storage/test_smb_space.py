"""What a disk on a share takes: holes stay holes where there can be any; a full share says so."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrord.core.geometry import KIB, MIB, TIB, Extent, Status
from mirrord.smb import wire
from mirrord.storage.backend import Cache
from mirrord.storage.memory import open_memory
from tests.helpers import eventually_async
from tests.samba import Samba
from tests.storage.conformance import pattern
from tests.storage.places import allocated_bytes, mounted
from tests.storage.shares import JOB, Folder, MakeClient, refusal_of
from tests.storage.shares import client as client
from tests.storage.shares import folder as folder
from tests.storage.shares import make_client as make_client
from tests.storage.shares import various as various


class TestSpace:
    """Holes stay holes, where there can be any; a full share says so."""

    async def test_a_huge_disk_takes_no_more_than_is_written(
        self, folder: Folder, make_client: MakeClient
    ) -> None:
        size = 5 * TIB
        place = folder.place("huge.raw")
        target = await place.create(JOB, open_memory(size), cache=Cache.WRITEBACK)
        await target.write(size - 4096, b"x" * 4096)
        await target.write(2 * TIB, b"y" * 64 * KIB)
        await target.flush()
        await place.publish(JOB)
        file = folder.path / "huge.raw"
        assert file.stat().st_size == size
        assert allocated_bytes(file) <= MIB
        found, at = [], 0
        while at < size:
            extents = await target.extents(at, size - at)
            found += [extent for extent in extents if extent.status is Status.DATA]
            at = extents[-1].end
        assert sum(extent.length for extent in found) <= MIB
        assert {TIB * 2, size - 4096} <= {
            at
            for extent in found
            for at in (TIB * 2, size - 4096)
            if extent.offset <= at < extent.end
        }
        await target.trim(0, size)
        await target.flush()
        assert allocated_bytes(file) <= 64 * KIB
        await target.close()

    @pytest.mark.parametrize("fast", [True, False])
    async def test_a_hole_is_punched_and_seen(
        self, samba: Samba, make_client: MakeClient, fast: bool
    ) -> None:
        file = samba.put(f"sparse-{fast}.raw", pattern(4 * MIB))
        backend = await make_client(samba, fast=fast).open(f"sparse-{fast}.raw")
        assert backend.capabilities.punches_holes
        await backend.trim(MIB, 2 * MIB)
        await backend.write_zeroes(0, 4096, punch=False)
        await backend.flush()
        assert allocated_bytes(file) <= 2 * MIB + 8192
        extents = await backend.extents(0, 4 * MIB)
        assert [(e.offset, e.status) for e in extents] == [
            (0, Status.DATA), (MIB, Status.HOLE), (3 * MIB, Status.DATA),
        ]  # fmt: skip

    async def test_pieces_are_little_while_small_requests_come(
        self, samba: Samba, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []
        body = wire.write_body

        def counted(file_id: bytes, offset: int, length: int, flags: int) -> bytes:
            asked.append(length)
            return body(file_id, offset, length, flags)

        monkeypatch.setattr(wire, "write_body", counted)
        samba.put("pieces.raw", bytes(8 * MIB))
        backend = await make_client(samba).open("pieces.raw")
        data = pattern(2 * MIB)
        await backend.write(0, data)
        assert asked == [MIB, MIB]
        await backend.write(4 * MIB, b"small")
        asked.clear()
        await backend.write(2 * MIB, data)
        assert asked == [256 * KIB] * 8
        assert bytes(await backend.read(0, 4 * MIB)) == bytes(data) * 2

    async def test_a_walk_asks_for_holes_seldom_and_misses_none(
        self, samba: Samba, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server goes through all data up to the next hole for every question."""
        asked: list[tuple[int, int]] = []
        query = wire.ranges_query

        def counted(offset: int, length: int) -> bytes:
            asked.append((offset, length))
            return query(offset, length)

        monkeypatch.setattr(wire, "ranges_query", counted)
        size, step = 64 * MIB, MIB
        samba.put("walked.raw", pattern(size))
        backend = await make_client(samba).open("walked.raw")
        for at in range(0, size, step):
            assert await backend.extents(at, step) == [Extent(at, step, Status.DATA)]
        assert len(asked) <= 8
        assert all(at + length <= size for at, length in asked)
        for hole in (0, 5 * MIB, 40 * MIB):
            await backend.trim(hole, MIB)
            assert await backend.extents(hole, step) == [Extent(hole, step, Status.HOLE)]
        await backend.write(5 * MIB, pattern(MIB))
        found = [
            extent for at in range(0, size, step) for extent in await backend.extents(at, step)
        ]
        assert [e.offset for e in found if e.status is Status.HOLE] == [0, 40 * MIB]
        assert sum(extent.length for extent in found) == size

    @pytest.mark.parametrize("fast", [True, False])
    async def test_a_server_without_sparse_files_stays_right(
        self, various: Samba, make_client: MakeClient, fast: bool
    ) -> None:
        client = make_client(various, fast=fast)
        name = f"bare-{fast}.raw"
        place = client.place(name, share="bare")
        target = client.mine(await place.create(JOB, open_memory(4 * MIB), cache=Cache.WRITEBACK))
        assert not target.capabilities.punches_holes
        assert not target.capabilities.fast_zeroes
        assert target.identity.born_ns == 0
        await target.write(0, pattern(4 * MIB))
        await target.write_zeroes(MIB, 100_000)
        await target.trim(3 * MIB, 4096, fua=True)
        expected = bytearray(pattern(4 * MIB))
        expected[MIB : MIB + 100_000] = bytes(100_000)
        expected[3 * MIB : 3 * MIB + 4096] = bytes(4096)
        assert bytes(await target.read(0, 4 * MIB)) == expected
        extents = await target.extents(0, 4 * MIB)
        assert {extent.status for extent in extents} == {Status.DATA}
        await place.publish(JOB)
        assert various.file(name, "bare").read_bytes() == expected
        await place.discard(JOB)

    @pytest.mark.root
    async def test_a_share_that_gets_full(
        self, tmp_path: Path, make_samba: Callable[..., Samba], make_client: MakeClient
    ) -> None:
        with mounted("tmpfs", tmp_path) as where:
            server = make_samba(shares={"disks": where})
            client = make_client(server)
            source = open_memory(80 * MIB)
            place = client.place("full.raw")
            error = await refusal_of(place.check_target(source, needed=80 * MIB))
            assert error.code == "no-space"
            await place.check_target(source, needed=80 * MIB, force=True)
            target = client.mine(await place.create(JOB, source, cache=Cache.WRITEBACK))
            with pytest.raises(OSError, match="DISK_FULL") as caught:
                await asyncio.gather(*(target.write(n * MIB, b"x" * MIB) for n in range(80)))
            assert caught.value.errno == 28
            assert bytes(await target.read(0, MIB)) == b"x" * MIB
            await target.trim(0, 2 * MIB)
            await target.write(70 * MIB, b"x" * MIB)
            await place.discard(JOB)
            assert os.listdir(where) == []
            await client.close()
            await eventually_async(lambda: not server.children(), what="the share is let go")
            server.stop()
