"""What is compared again, how much at a time, and large holes as one while they are holes."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mirrord.core.bitmap import DirtyBitmap, IntentMap, bitmap_bytes_for
from mirrord.core.geometry import MIB, Extent, Status
from mirrord.engine.digests import Digests
from mirrord.engine.disk import Disk
from mirrord.engine.intents import Intents
from mirrord.engine.settings import EngineSettings
from mirrord.engine.tracking import WriteTracker
from mirrord.engine.verify import GROUP_CHUNKS_MAX, MISMATCHES_MAX, Verifier
from mirrord.errors import TargetError
from mirrord.storage.descriptor import DescriptorBackend
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import open_io
from mirrord.storage.job_files import JobFiles
from tests.helpers import eventually_async

SIZE = 256 * MIB + 512  # the last chunk is short
CHUNKS = 257
DATA = 100 * MIB  # where both sides have a chunk of data

Then = Callable[[], Awaitable[None]]
Beside = Callable[[int, int], Awaitable[None]]


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

    async def fill(self, chunks: int) -> None:
        """Have the guest write to each of the first chunks."""
        for chunk in range(chunks):
            await self.disk.write(chunk * MIB, b"x")

    def beside_reads(self, monkeypatch: pytest.MonkeyPatch, then: Beside) -> None:
        """Do something while a chunk is read back, told its number and how often it was."""
        honest = self.target.read_stored

        async def read(offset: int, length: int) -> object:
            data = await honest(offset, length)
            await then(offset // MIB, self.reads.count(offset))
            return data

        monkeypatch.setattr(self.target, "read_stored", read)

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
    yield Sides(disk, tracker, Verifier(disk, tracker, settings), reads)
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
    assert (verdict.mismatches, verdict.chunks, verdict.written_meanwhile) == ((), CHUNKS, 0)
    assert sides.verifier.verified_bytes == SIZE
    assert len(asked) < 10
    assert sides.reads == [DATA]


async def test_a_short_hole_is_left_to_the_walk(sides: Sides) -> None:
    for chunk in range(0, CHUNKS - 1, 15):
        await sides.disk.write(chunk * MIB, b"x")
    await sides.verifier._holes()
    assert sides.verifier.verified_bytes == 0
    verdict = await sides.verifier.run()
    assert (verdict.mismatches, verdict.chunks, verdict.written_meanwhile) == ((), CHUNKS, 0)


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
    assert (verdict.mismatches, verdict.written_meanwhile) == ((), 1)


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
    await sides.verifier._holes()
    assert sides.verifier.verified_bytes == 0
    verdict = await sides.verifier.run()
    assert (verdict.mismatches, verdict.chunks, verdict.written_meanwhile) == ((), CHUNKS, 0)
    assert len(sides.reads) == CHUNKS


async def test_a_few_chunks_that_are_written_to_are_compared_again(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sides.fill(20)

    async def write(chunk: int, times: int) -> None:
        if chunk in (8, 12, 16) and times == 1:  # that one was compared already, in a group before
            await sides.disk.write((chunk - 8) * MIB, b"y")

    sides.beside_reads(monkeypatch, write)
    verdict = await sides.verifier.run()
    assert (verdict.mismatches, verdict.written_meanwhile) == ((), 0)
    assert [sides.reads.count(chunk * MIB) for chunk in range(5)] == [2, 1, 1, 1, 2]


async def test_a_guest_that_writes_everywhere_is_not_followed(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk is compared once though, and that which it disturbed once more, locked."""
    await sides.fill(200)

    async def write(chunk: int, times: int) -> None:
        if chunk >= 8 and times == 1:  # the group before was compared already
            await sides.disk.write((chunk - 8) * MIB, b"y")
        if chunk in (7, 150) and times == 1:
            await sides.disk.write(chunk * MIB, b"z")

    sides.beside_reads(monkeypatch, write)
    verdict = await sides.verifier.run()
    again = sorted(offset // MIB for offset in set(sides.reads) if sides.reads.count(offset) > 1)
    assert again == [7, 150]
    unverified = sides.tracker.digests.unverified_bits()
    assert (verdict.mismatches, verdict.written_meanwhile) == ((), unverified.count())
    assert [unverified[chunk] for chunk in (7, 8, 150, 199)] == [1, 1, 1, 0]
    assert verdict.reason == (
        f"all {CHUNKS} chunks were equal on both sides; "
        f"the guest wrote to {verdict.written_meanwhile} meanwhile"
    )


async def test_a_difference_in_what_was_disturbed_is_found(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sides.fill(200)

    async def write(chunk: int, times: int) -> None:
        if chunk >= 8 and times == 1:
            await sides.disk.write((chunk - 8) * MIB, b"y")
        if (chunk, times) == (7, 1):
            await sides.disk.write(7 * MIB, b"z")
            await sides.target.write(7 * MIB + 1, b"lost")

    sides.beside_reads(monkeypatch, write)
    assert (await sides.verifier.run()).mismatches == (7 * MIB,)


@pytest.mark.parametrize("passes", [1, 3])
async def test_a_chunk_that_is_written_to_whenever_it_is_compared_is_compared(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """At last part by part, locked: the guest's write waits for the comparison of its part."""
    sides.verifier._settings = replace(sides.verifier._settings, verify_passes_max=passes)
    await sides.fill(20)
    await sides.target.write(7 * MIB + 500_000, b"rotten")
    writes: list[asyncio.Task[None]] = []
    waited = []

    async def write(chunk: int, times: int) -> None:
        if chunk == 7:
            writes.append(asyncio.create_task(sides.disk.write(7 * MIB, b"y")))
            done, _ = await asyncio.wait(writes[-1:], timeout=0.05)
            waited.append(not done)

    sides.beside_reads(monkeypatch, write)
    assert (await sides.verifier.run()).mismatches == (7 * MIB,)
    # Then the part that it writes to, and the rotten one, which it doesn't wait for.
    assert waited == [False] * min(passes, 2) + [True, False]
    await asyncio.gather(*writes)


async def test_all_that_differ_are_found_in_one_run(sides: Sides) -> None:
    """They are copied again once: what is found in the next run ends the move."""
    far_apart = (3 * MIB, 90 * MIB, 250 * MIB)
    for at in far_apart:
        await sides.target.write(at, b"rotten")
    assert (await sides.verifier.run()).mismatches == far_apart


async def test_a_target_that_is_all_different_ends_the_run_early(sides: Sides) -> None:
    for chunk in range(CHUNKS):
        await sides.target.write(chunk * MIB, b"rotten")
    found = len((await sides.verifier.run()).mismatches)
    assert MISMATCHES_MAX <= found < MISMATCHES_MAX + 5 * GROUP_CHUNKS_MAX


async def test_a_side_that_fails_while_a_chunk_is_locked_leaves_it_unlocked(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def trouble(chunk: int, times: int) -> None:
        if (chunk, times) == (7, 1):
            await sides.disk.write(7 * MIB, b"y")
        elif chunk == 7:
            raise OSError(errno.EIO, "gone")

    sides.verifier._settings = replace(sides.verifier._settings, verify_passes_max=1)
    await sides.fill(20)
    sides.beside_reads(monkeypatch, trouble)
    with pytest.raises(TargetError, match="gone"):
        await sides.verifier.run()
    await sides.disk.write(7 * MIB, b"z")


async def test_a_target_that_does_not_say_what_it_holds_is_noticed(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = asyncio.Event()
    sides.tracker._settings = replace(sides.tracker._settings, target_stall_s=0.05)

    async def extents(offset: int, length: int) -> list[Extent]:
        await hangs.wait()
        return [Extent(offset, length, Status.DATA)]

    monkeypatch.setattr(sides.target, "extents", extents)
    verifying = asyncio.create_task(sides.verifier.run())
    await eventually_async(lambda: sides.tracker.overdue)
    hangs.set()
    assert (await verifying).mismatches == ()


@pytest.mark.parametrize("at_work", [True, False])
async def test_a_guest_at_work_waits_behind_one_comparison(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, at_work: bool
) -> None:
    await sides.fill(200)
    most = now = 0
    honest = sides.verifier._chunks

    async def chunks(group: range) -> list[int]:
        nonlocal most, now
        now += 1
        most = max(most, now)
        if at_work:
            await sides.disk.read(255 * MIB, 512)
        found = await honest(group)
        now -= 1
        return found

    monkeypatch.setattr(sides.verifier, "_chunks", chunks)
    assert (await sides.verifier.run()).written_meanwhile == 0
    assert most == (1 if at_work else EngineSettings().verify_width)
