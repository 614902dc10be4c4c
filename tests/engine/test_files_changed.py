"""Files that somebody else changes, and input at its limits.

By number, going on from `test_target_trouble`: 18 to 20 (files changed by somebody), 24 (sizes),
25 (a guest faster than the target), 26 (trims).
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from mirrord.core.geometry import GIB, MIB
from mirrord.core.migration import Event, Phase
from mirrord.storage.fileio import open_io
from tests.engine import phases
from tests.engine.crashes import SIZE, SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER
from tests.engine.harness import Writer

NEW = b"\x99" * 4096
WRITING = ("write", "write_zeroes")
NO_SPACE = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]


def entered(bench: CrashBench) -> list[Phase]:
    return [step.phase for step in bench.job.migration.story]


# 18, 19, 20: files that somebody else changes


@pytest.mark.fault(18)
@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 0])
@pytest.mark.parametrize("watched", [True, False], ids=["meanwhile", "at the cutover"])
async def test_18_the_source_changes_its_size(
    on_files: CrashBench, size: int, watched: bool
) -> None:
    bench = on_files
    if watched:
        bench.settings = replace(SMALL, watch_s=0.01)
        await bench.hold_mirroring()
    else:
        await bench.begin()
        await bench.run_to(bench.at_target.hang("read_stored"))
    os.truncate(bench.source_path, size)
    if not watched:
        bench.at_target.heal()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert status.reason.startswith("the source changed size")
    assert bench.names() == ["source.raw"]
    assert bench.source_path.stat().st_size == size


@pytest.mark.fault(18)
async def test_18_the_source_changes_its_size_between_two_processes(on_files: CrashBench) -> None:
    bench = on_files
    await bench.hold_mirroring()
    await bench.kill()
    os.truncate(bench.source_path, SIZE - 1)
    found = await bench.recovered()
    assert found.job is None
    assert bench.records() == ["PREP", "ABORT", "DONE"]
    assert "changed size" in bench.log().records[-1].payload["reason"]
    assert bench.names() == ["source.raw"]


@pytest.mark.fault(19)
async def test_19_the_source_is_replaced(on_files: CrashBench) -> None:
    """The open file goes on being served and moved; what was put in its place is kept."""
    bench = on_files
    await bench.hold_mirroring()
    other = bench.source_path.parent / "other"
    other.write_bytes(bytes(SIZE))
    other.rename(bench.source_path)
    await bench.write(0, NEW)
    status = await bench.cut_over()
    assert status.phase is Phase.DONE
    assert status.source_kept is not None
    assert "was replaced" in status.source_kept
    assert bench.source_path.read_bytes() == bytes(SIZE)
    assert bench.target_path.read_bytes() == bytes(bench.expected)


@pytest.mark.fault(20)
async def test_20_the_part_is_removed(on_files: CrashBench) -> None:
    bench = on_files
    await bench.hold_mirroring()
    bench.part_path.unlink()
    await bench.job.cutover()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "somebody removed the target" in status.reason
    assert bench.names() == ["source.raw"]
    assert await bench.content() == bytes(bench.expected)


@pytest.mark.fault(20)
async def test_20_the_part_is_replaced(on_files: CrashBench) -> None:
    """The open file may not be the one under the name: no cutover to a file of somebody else."""
    bench = on_files
    await bench.hold_mirroring()
    bench.part_path.rename(bench.part_path.parent / "elsewhere")
    bench.part_path.write_bytes(bytes(SIZE))
    await bench.job.cutover()
    status = await bench.finish()
    assert status.phase is Phase.FAILED, bench.told()
    assert bench.source_path.read_bytes() == bytes(bench.expected)


@pytest.mark.fault(20)
async def test_20_the_part_changes_its_size(on_files: CrashBench) -> None:
    bench = on_files
    bench.settings = replace(SMALL, watch_s=0.01)
    await bench.hold_mirroring()
    os.truncate(bench.part_path, SIZE - 1)
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "the target was changed by somebody else" in status.reason


@pytest.mark.fault(20)
@pytest.mark.parametrize("hold", [phases.verifying, phases.out_of_space, phases.degraded],
                         ids=lambda hold: hold.__name__)  # fmt: skip
async def test_20_the_part_changes_its_size_and_nobody_watches(
    on_files: CrashBench, hold: phases.Hold
) -> None:
    """Reading it fails like a target in trouble, but no later attempt can make it whole."""
    bench = on_files
    bench.target_place._remembering = False
    release = await hold(bench)
    os.truncate(bench.part_path, SIZE - 1)
    release()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "the target was changed by somebody else" in status.reason
    assert bench.names() == ["source.raw"]


async def test_a_target_that_cant_be_looked_at_was_not_changed(on_files: CrashBench) -> None:
    bench = on_files
    bench.settings = replace(SMALL, watch_s=0.01)
    await bench.hold_mirroring()
    bench.at_target.fail("check_unchanged", errno=errno.EIO)
    await bench.run_to_phase(Phase.DEGRADED)
    assert bench.job.migration.story[-1].reason.startswith("the target can't be looked at: ")
    await bench.assert_moved(await bench.cut_over())


@pytest.mark.fault(20)
async def test_20_the_part_is_written_to(on_files: CrashBench) -> None:
    """Found by verification, and copied again."""
    bench = on_files
    await bench.begin()
    rule = bench.at_target.hang("read_stored", times=FOR_EVER)
    await bench.run_to(rule)
    with bench.part_path.open("r+b") as part:
        part.seek(4 * UNIT)
        part.write(NEW)
    rule.release()
    await bench.assert_moved(await bench.finish())
    assert Event.MISMATCH_FOUND in [step.event for step in bench.job.migration.story]


@pytest.mark.fault(20)
async def test_20_something_takes_the_final_name(on_files: CrashBench) -> None:
    """It is never overwritten: the job fails, the source stays."""
    bench = on_files
    await bench.hold_mirroring()
    bench.target_path.write_bytes(b"an operator's")
    await bench.job.cutover()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "something else took the target's name" in status.reason
    assert bench.target_path.read_bytes() == b"an operator's"


# 24: sizes


@pytest.mark.fault(24)
@pytest.mark.parametrize("content", ["data", "zeroes", "holes"])
@pytest.mark.parametrize("size", [1, 511, 512, 513, 4095, 4097, MIB + 1])
async def test_24_odd_sizes(tmp_path: Path, size: int, content: str) -> None:
    io = open_io()
    data = random.Random(size).randbytes(size) if content == "data" else bytes(size)
    bench = CrashBench(tmp_path, size, io=io, content=data)
    if content == "holes":
        os.truncate(bench.source_path, 0)
        os.truncate(bench.source_path, size)
    await bench.begin()
    status = await bench.finish()
    await bench.assert_moved(status)
    found = bench.target_path.stat()
    assert found.st_size == size
    if content != "data":
        assert found.st_blocks == 0
    assert status.bytes_total == (size if content != "holes" else 0)
    await bench.close()
    await io.close()


@pytest.mark.fault(24)
async def test_24_a_huge_sparse_disk(tmp_path: Path) -> None:
    """5 TiB with a few MiB of data: exact, and still sparse."""
    size = 5 * 1024 * GIB + 512
    some_io = open_io()
    bench = CrashBench(tmp_path, size, io=some_io, settings=replace(SMALL, chunk_bytes=MIB,
                       region_bytes=MIB), content=b"")  # fmt: skip
    bench.source_place._remembering = bench.target_place._remembering = False
    places = {0: b"first", 3 * 1024 * GIB: b"middle", size - 4: b"last"}
    os.truncate(bench.source_path, size)
    with bench.source_path.open("r+b") as source:
        for offset, data in places.items():
            source.seek(offset)
            source.write(data)
    allocated = bench.source_path.stat().st_blocks
    await bench.begin(verify="none")
    status = await asyncio.wait_for(bench.job.run(), 60)
    assert status.phase is Phase.DONE, bench.told()
    assert status.bytes_total < 10 * MIB
    for offset, data in places.items():
        assert bytes(await bench.disk.read(offset, len(data))) == data
    assert bench.target_path.stat().st_size == size
    assert bench.target_path.stat().st_blocks <= 1.1 * allocated
    await bench.close()
    await some_io.close()


# 25 and 26: guests that write all the time, everything, everywhere


@pytest.mark.fault(25)
async def test_25_a_guest_faster_than_the_target(tmp_path: Path) -> None:
    """Passes alone would never end; mirroring does, and slows the guest down only then."""
    bench = CrashBench(tmp_path, 8 * MIB)
    await bench.open()
    writer = Writer(bench.disk, seed=3)
    writer.expected[:] = bench.expected
    await bench.start()
    slow = bench.at_target.delay(*WRITING, seconds=0.002)
    guests = [asyncio.create_task(writer.run())]
    status = await asyncio.wait_for(bench.job.run(), 40)
    writer.stopped = True
    await asyncio.gather(*guests)
    slow.release()
    assert status.phase is Phase.DONE
    assert Phase.MIRRORING in entered(bench)
    assert bytes(await bench.disk.read(0, bench.size)) == bytes(writer.expected)
    await bench.close()


@pytest.mark.fault(26)
@pytest.mark.parametrize("hold", [phases.copying, phases.catching_up, phases.mirroring, phases.held,
                                  phases.verifying, phases.preparing, phases.paused,
                                  phases.out_of_space, phases.degraded],
                         ids=lambda hold: hold.__name__)  # fmt: skip
async def test_26_every_kind_of_write_in_every_phase(bench: CrashBench, hold: phases.Hold) -> None:
    """Single bytes, unaligned, over chunks, the last byte; zeroes and trims, too."""
    release = await hold(bench)
    shots = [(0, 1), (4095, 2), (UNIT - 1, 2), (SIZE - 1, 1), (3 * UNIT - 700, 2 * UNIT + 1400),
             (8 * UNIT, UNIT), (12 * UNIT + 1, UNIT), (SIZE - 513, 513)]  # fmt: skip
    chance = random.Random(7)
    for offset, length in shots:
        data = chance.randbytes(length)
        await bench.write(offset, data)
        cut = min(offset + length, SIZE - 1)
        await bench.disk.write_zeroes(cut, 1)
        bench.expected[cut] = 0
        await bench.disk.trim(offset, max(1, length // 2))
        bench.expected[offset : offset + max(1, length // 2)] = bytes(max(1, length // 2))
        await bench.disk.write_zeroes(offset, 1, punch=False, fua=True)
        await bench.write(offset, data[:1], fua=True)
    await bench.disk.flush()
    release()
    if bench.job.migration.phase is Phase.PAUSED and not bench.job.space_wanted:
        await bench.job.resume()
    bench.job.cutover_wanted.set()
    await bench.assert_moved(await bench.finish())
