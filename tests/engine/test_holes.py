"""Large holes are verified as one, and only while they are holes on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mirrord.core.bitmap import DirtyBitmap, IntentMap, bitmap_bytes_for
from mirrord.core.geometry import MIB, Extent
from mirrord.engine.digests import Digests
from mirrord.engine.disk import Disk
from mirrord.engine.intents import Intents
from mirrord.engine.settings import EngineSettings
from mirrord.engine.tracking import WriteTracker
from mirrord.engine.verify import Verifier
from mirrord.storage.descriptor import DescriptorBackend
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import open_io
from mirrord.storage.job_files import JobFiles
from tests.helpers import eventually_async

SIZE = 256 * MIB + 512  # the last chunk is short
CHUNKS = 257
DATA = 100 * MIB  # where both sides have a chunk of data

Then = Callable[[], Awaitable[None]]


@dataclass
class Sides:
    """A disk that is mirrored and a verifier of it."""

    disk: Disk
    tracker: WriteTracker
    verifier: Verifier
    reads: list[int]  # offsets of the target that were read back

    @property
    def target(self) -> DescriptorBackend:
        assert isinstance(self.tracker.target, DescriptorBackend)
        return self.tracker.target

    def interfere(self, monkeypatch: pytest.MonkeyPatch, then: Then) -> None:
        """Do something while the holes are looked at, once."""
        honest, left = self.verifier._both_hole, [then]

        async def both(offset: int, length: int) -> bool:
            equal = await honest(offset, length)
            while left:
                await left.pop()()
            return equal

        monkeypatch.setattr(self.verifier, "_both_hole", both)


@pytest.fixture
async def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sides]:
    io = open_io()
    backends = []
    for name in ("source", "target"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(SIZE)
            file.seek(DATA)
            file.write(b"d" * MIB)
        backends.append(await FilePlace(str(tmp_path / name), io).open())
    settings = EngineSettings()
    folder = tmp_path / "job"
    folder.mkdir()
    files = await JobFiles.open(
        folder, SIZE, "boot", dirty_bytes=bitmap_bytes_for(SIZE), region_bytes=MIB
    )
    intents = IntentMap(SIZE, MIB)
    await files.create(intents.content())
    bitmap = DirtyBitmap(SIZE, bytearray(bitmap_bytes_for(SIZE)))
    bitmap.clear()
    source, target = backends
    tracker = WriteTracker(
        source, target, bitmap, Intents(intents, files), Digests(SIZE, MIB), settings,
        report=lambda trouble: pytest.fail(str(trouble)), give_up=_never, charge=lambda _: None,
    )  # fmt: skip
    disk = Disk("vm", source)
    disk.follow(tracker)
    tracker.start_mirroring().settled = True
    reads: list[int] = []
    honest = target.read_stored

    async def noted(offset: int, length: int) -> object:
        reads.append(offset)
        return await honest(offset, length)

    monkeypatch.setattr(target, "read_stored", noted)
    yield Sides(disk, tracker, Verifier(tracker, settings), reads)
    await tracker.close_target()
    await source.close()
    await files.close()
    await io.close()


async def _never(error: OSError) -> None:
    pytest.fail(str(error))


async def test_holes_are_verified_without_a_look_at_each_chunk(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    honest = sides.target.extents

    async def extents(offset: int, length: int) -> list[Extent]:
        asked.append((offset, length))
        return await honest(offset, length)

    monkeypatch.setattr(sides.target, "extents", extents)
    verdict = await sides.verifier.run()
    assert (verdict.mismatches, verdict.chunks, verdict.unsettled) == ((), CHUNKS, 0)
    assert sides.verifier.verified_bytes == SIZE
    assert len(asked) < 10
    assert sides.reads == [DATA]


async def test_a_short_hole_is_left_to_the_walk(sides: Sides) -> None:
    for chunk in range(0, CHUNKS - 1, 15):
        await sides.disk.write(chunk * MIB, b"x")
    assert await sides.verifier._holes() == 0
    verdict = await sides.verifier.run()
    assert (verdict.mismatches, verdict.chunks, verdict.unsettled) == ((), CHUNKS, 0)


@pytest.mark.parametrize("at", [0, DATA - MIB, SIZE - 1])
async def test_what_a_guest_writes_meanwhile_is_compared(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """... and what the target then lost is found."""

    async def write() -> None:
        await sides.disk.write(at, b"x")
        await sides.target.write(at, b"y")

    sides.interfere(monkeypatch, write)
    verdict = await sides.verifier.run()
    assert verdict.mismatches == (at // MIB * MIB,)


async def test_a_write_under_way_is_waited_for(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has taken its digest away already, and what it does comes after the look."""
    goes_on = asyncio.Event()
    at = 5 * MIB

    def slowly(side: DescriptorBackend) -> None:
        honest = side.write

        async def write(offset: int, data: bytes, *, fua: bool = False) -> None:
            await goes_on.wait()
            await honest(offset, data, fua=fua)

        monkeypatch.setattr(side, "write", write)
        monkeypatch.setattr(side, "begin_write", lambda *_: False)

    slowly(sides.target)
    slowly(sides.disk.backend)  # type: ignore[arg-type]
    guest = asyncio.create_task(sides.disk.write(at, b"x"))
    await asyncio.sleep(0)

    async def lose() -> None:
        goes_on.set()
        await guest
        await sides.target.write(at, b"y")

    sides.interfere(monkeypatch, lose)
    verifying = asyncio.create_task(sides.verifier.run())
    await eventually_async(lambda: goes_on.is_set() or len(sides.tracker.locks._ranges) == 2)
    goes_on.set()
    assert (await verifying).mismatches == (at,)


async def test_what_is_marked_meanwhile_is_not_called_verified(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def mark() -> None:
        sides.tracker.bitmap.mark(5 * MIB, 4096)

    sides.interfere(monkeypatch, mark)
    verdict = await sides.verifier.run()
    assert (verdict.mismatches, verdict.unsettled) == ((), 1)


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_hole_on_one_side_is_a_difference(sides: Sides, side: str) -> None:
    await getattr(sides.tracker, side).write(50 * MIB, b"x")
    verdict = await sides.verifier.run()
    assert verdict.mismatches == (50 * MIB,)


async def test_a_side_that_cannot_tell_is_read(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(offset: int, length: int) -> list[Extent]:
        raise OSError("no such question")

    monkeypatch.setattr(sides.target, "extents", refuse)
    assert await sides.verifier._holes() == 0
    verdict = await sides.verifier.run()
    assert (verdict.mismatches, verdict.chunks, verdict.unsettled) == ((), CHUNKS, 0)
    assert len(sides.reads) == CHUNKS
