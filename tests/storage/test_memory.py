"""Memory places: the steps of a move, and a shelf that refuses what a directory refuses."""

from __future__ import annotations

import pytest

from mirrord.core.geometry import MIB, Status
from mirrord.errors import RefusedError
from mirrord.storage.backend import Cache
from mirrord.storage.memory import BLOCK_BYTES, MemoryPlace, MemoryShelf, open_memory

JOB = "job"


@pytest.fixture
def shelf() -> MemoryShelf:
    """A shelf with one disk."""
    shelf = MemoryShelf()
    shelf.add("a", MIB)
    return shelf


async def test_a_whole_move(shelf) -> None:
    source_place, target_place = MemoryPlace("a", shelf), MemoryPlace("b", shelf)
    source = await source_place.open()
    await target_place.check_target(source, needed=MIB)
    target = await target_place.create(JOB, source, cache=Cache.WRITEBACK)
    await target.write(5, b"moved")
    for _ in range(2):
        await target_place.publish(JOB)
        assert await target_place.confirm(JOB, target.identity) is None
    for _ in range(2):
        await target_place.withdraw(JOB)
    assert await target_place.confirm(JOB, target.identity)
    await target_place.publish(JOB)
    identity = source.identity
    await source.close()
    for _ in range(2):
        assert await source_place.retire(JOB, identity) is None
    for _ in range(2):
        await source_place.delete_retired(JOB, identity)
    assert shelf.names() == ["b"]
    found = await target_place.find(JOB, target.identity, cache=Cache.WRITEBACK)
    assert found is not None
    assert bytes(await found.read(5, 5)) == b"moved"


async def test_refusals(shelf) -> None:
    source = await MemoryPlace("a", shelf).open()
    shelf.add("b", MIB)
    for attempt, code in (
        (MemoryPlace("a", shelf).open(), "in-use"),
        (MemoryPlace("c", shelf).open(), "location-missing"),
        (MemoryPlace("a", shelf).check_target(source, needed=1), "target-is-source"),
        (MemoryPlace("b", shelf).check_target(source, needed=1), "target-exists"),
    ):
        with pytest.raises(RefusedError) as caught:
            await attempt
        assert caught.value.code == code
    with pytest.raises(FileExistsError):
        shelf.add("b", 1)


async def test_a_taken_name_and_a_replaced_source(shelf) -> None:
    source = await MemoryPlace("a", shelf).open()
    place = MemoryPlace("b", shelf)
    target = await place.create(JOB, source, cache=Cache.WRITEBACK)
    shelf.add("b", MIB)
    with pytest.raises(FileExistsError):
        await place.publish(JOB)
    await place.discard(JOB)
    assert shelf.names() == ["a", "b"]
    assert await place.find(JOB, target.identity, cache=Cache.WRITEBACK) is None
    with pytest.raises(FileExistsError):
        shelf.rename("a", "b")
    with pytest.raises(FileNotFoundError):
        shelf.rename("c", "d")
    assert "replaced" in (await place.retire(JOB, source.identity) or "")


async def test_read_only_and_closed_disks_refuse() -> None:
    shelf = MemoryShelf()
    shelf.add("a", MIB)
    backend = await MemoryPlace("a", shelf).open(read_only=True)
    with pytest.raises(OSError, match="read-only"):
        await backend.write(0, b"x")
    await backend.close()
    with pytest.raises(OSError, match="closed"):
        await backend.flush()


async def test_blocks_come_and_go() -> None:
    backend = open_memory(3 * BLOCK_BYTES + 5)
    await backend.write(BLOCK_BYTES, b"x")
    await backend.write(3 * BLOCK_BYTES, b"x")
    assert backend.allocated_bytes == 2 * BLOCK_BYTES
    statuses = [e.status for e in await backend.extents(0, backend.size)]
    assert statuses == [Status.HOLE, Status.DATA, Status.HOLE, Status.DATA]
    await backend.trim(0, backend.size)
    assert backend.allocated_bytes == 0
    await backend.write_zeroes(0, 1, punch=False)
    assert backend.allocated_bytes == BLOCK_BYTES
