"""The crash-point table, C0 to C8: before there is a commit record. (C9 on: test_crash_rows_late.)

Each row is brought about by running the engine to that point and ending its process, or its
machine, there.
"""

from __future__ import annotations

import os

import pytest

from mirrord.core.journal import BLOCK_BYTES
from mirrord.core.migration import Phase
from tests.engine.crashes import SIZE, UNIT, CrashBench
from tests.helpers import eventually_async

both_crashes = pytest.mark.parametrize("power", [False, True], ids=["kill", "power-cut"])
NEW = b"\xa5" * 4096


@pytest.mark.parametrize("point", ["created", "files created", "record torn", "record not written"])
async def test_c0_no_valid_prep(on_files: CrashBench, point: str) -> None:
    """Our `.part` without a PREP is deleted; one of somebody else's job is left."""
    bench = on_files
    stranger = bench.target_path.parent / ".target.raw.mirrord-other.part"
    stranger.write_bytes(b"not ours")
    await bench.open()
    rule = {
        "created": lambda: bench.at_target.hang("create", after=True),
        "files created": lambda: bench.at_files.hang("create", after=True),
        "record torn": lambda: bench.at_files.hang("write_log:PREP", after=True),
        "record not written": lambda: bench.at_files.hang("write_log:PREP"),
    }[point]()
    bench.guest(bench.start())
    await rule.wait()
    await bench.kill()
    assert ".target.raw.mirrord-JOB.part" in bench.names()
    if point == "record torn":
        with bench.log_path().open("r+b") as log:
            log.seek(100)
            log.write(bytes(BLOCK_BYTES - 100))
    found = await bench.recovered()
    assert found.job is None
    assert found.location == str(bench.source_path)
    assert bench.names() == sorted(["source.raw", ".target.raw.mirrord-other.part"])
    assert await bench.content() == bytes(bench.expected)


@both_crashes
@pytest.mark.parametrize("left", ["nothing", "a short file"])
async def test_c1_part_is_missing_or_short(on_files: CrashBench, left: str, power: bool) -> None:
    """The target is created again, and everything is copied, whatever the maps said."""
    bench = on_files
    await bench.begin()
    rule = bench.at_target.hang("write", at=9)
    await bench.run_to(rule)
    await bench.kill(power=power)
    if left == "nothing":
        bench.part_path.unlink()
    else:
        os.truncate(bench.part_path, SIZE // 2)
    status = await bench.resume()
    assert bench.records()[:2] == ["PREP", "PREP"]
    assert status.bytes_copied >= SIZE
    await bench.assert_moved(status)


async def test_c2_during_the_first_pass(on_files: CrashBench) -> None:
    """What was copied is not copied again, and the job says how much was left."""
    bench = on_files
    await bench.begin()
    rule = bench.at_target.hang("write", at=9)
    await bench.run_to(rule)
    left = bench.job.status().bytes_remaining
    assert 0 < left < SIZE
    await bench.kill()
    found = await bench.recovered()
    assert found.job is not None
    assert found.job.status().bytes_remaining == left
    status = await bench.finish()
    assert status.story[0].reason.startswith("resumed after a restart: ")
    assert status.story[0].phase is Phase.COPYING
    assert found.job.copier.copied_bytes == left
    await bench.assert_moved(status)


@pytest.mark.fault(3)
async def test_c2_after_a_power_cut_the_marked_regions_are_copied(on_files: CrashBench) -> None:
    """The dirty bitmap is not believed then; the intent map is, as of the last checkpoint."""
    bench = on_files
    await bench.begin()
    rule = bench.at_target.hang("write", at=9)
    await bench.run_to(rule)
    await bench.checkpoint()
    await eventually_async(lambda: bench.at_files.count("write_map:lazy") > 0)
    await bench.at_files.settled()
    marked = sum(length for _, length in bench.tracker.intents.map.ranges())
    assert 0 < marked < SIZE
    await bench.kill(power=True)
    found = await bench.recovered()
    assert found.job is not None
    assert found.job.status().bytes_remaining == marked
    status = await bench.finish()
    assert found.job.copier.copied_bytes == marked
    await bench.assert_moved(status)


async def test_c3_chunk_written_but_the_target_not_flushed(on_files: CrashBench) -> None:
    """The target forgets what was copied to it; every region is still marked, and copied again."""
    bench = on_files
    await bench.begin(verify="none")
    rule = bench.at_target.hang("flush")  # the first comes when everything is copied
    await bench.run_to(rule)
    assert bench.job.status().bytes_remaining == 0
    await bench.kill(power=True)
    assert bench.part_path.read_bytes() == bytes(SIZE)
    found = await bench.recovered()
    assert found.job is not None
    assert found.job.status().bytes_remaining == SIZE
    await bench.assert_moved(await bench.finish())


async def test_c4_target_flushed_but_the_marks_not_cleared(on_files: CrashBench) -> None:
    """Copied again, which is harmless."""
    bench = on_files
    await bench.begin(verify="none")
    rule = bench.at_target.hang("publish")
    await bench.run_to(rule)
    lazy = bench.at_files.hang("write_map:lazy")
    bench.guest(bench.checkpoint())
    await lazy.wait()
    await bench.kill(power=True)
    assert bench.part_path.read_bytes() == bytes(bench.expected)
    found = await bench.recovered()
    assert found.job is not None
    assert found.job.status().bytes_remaining == SIZE
    await bench.assert_moved(await bench.finish())


@both_crashes
@pytest.mark.parametrize("phase", ["followed", "mirrored"])
async def test_c5_intent_durable_but_the_source_not_written(
    on_files: CrashBench, phase: str, power: bool
) -> None:
    """The region is copied again, and nothing else; the guest sends its write once more."""
    bench = on_files
    if phase == "mirrored":
        await bench.hold_mirroring()
    else:
        await bench.hold_copying(16)
    await bench.checkpoint()
    await bench.at_files.settled()
    remaining = bench.job.status().bytes_remaining
    rule = bench.at_source.hang("write")
    bench.guest(bench.write(4 * UNIT + 4096, NEW))
    await rule.wait()
    assert bench.at_files.count("write_map:durable") == 1
    await bench.kill(power=power)
    found = await bench.recovered()
    assert found.job is not None
    again = UNIT if power else len(NEW)
    assert found.job.status().bytes_remaining == remaining + again
    await bench.write(4 * UNIT + 4096, NEW)
    await bench.assert_moved(await bench.cut_over())


@both_crashes
@pytest.mark.parametrize("written", ["the source", "the target"])
async def test_c6_one_leg_of_a_mirrored_write(
    on_files: CrashBench, written: str, power: bool
) -> None:
    """The region is copied from the source, over newer data that nobody was promised, too."""
    bench = on_files
    await bench.hold_mirroring()
    await bench.checkpoint()
    side = bench.at_target if written == "the source" else bench.at_source
    rule = side.hang("write")
    bench.guest(bench.write(0, NEW))
    await rule.wait()
    other, where = ("source", 0) if written == "the source" else ("target", 1)
    await eventually_async(lambda: f"{other}.write" in bench.trace[-4:])
    assert (await bench.both())[where][: len(NEW)] == NEW
    if power:  # the leg that was written is durable, by chance; the other isn't
        await (bench.source if other == "source" else bench.target).remember()
    await bench.kill(power=power)
    if written == "the source":
        bench.expected[: len(NEW)] = NEW
    await bench.recovered()
    await bench.assert_moved(await bench.cut_over())


@both_crashes
async def test_c7_target_flushed_but_not_renamed(on_files: CrashBench, power: bool) -> None:
    """Back to copying, and after a kill there is nothing to copy."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_target.hang("publish"))
    await bench.kill(power=power)
    assert ".target.raw.mirrord-JOB.part" in bench.names()
    status = await bench.resume()
    assert status.story[0].phase in (Phase.COPYING, Phase.CATCHING_UP)
    if not power:
        assert bench.job.copier.copied_bytes == 0
    await bench.assert_moved(status)


@both_crashes
@pytest.mark.parametrize("moment", ["not durable", "durable"])
async def test_c8_final_name_without_commit(on_files: CrashBench, moment: str, power: bool) -> None:
    """Either name is accepted; the target gets its temporary one back, and the job goes on."""
    bench = on_files
    await bench.begin()
    if moment == "durable":
        rule = bench.at_target.hang("publish", after=True)
    else:
        # Behind the closed gate: the flushes before belong to verification and preparation.
        await bench.run_to(bench.at_target.hang("publish"))
        rule = bench.at_target.hang("flush")
        bench.at_target.heal_others(rule)
    await bench.run_to(rule)
    await bench.kill(power=power)
    if moment == "not durable" and power:
        os.rename(bench.target_path, bench.part_path)  # the directory forgot
    else:
        assert "target.raw" in bench.names()
    found = await bench.recovered()
    assert found.location == str(bench.source_path)
    assert bench.names() == sorted(["source.raw", ".target.raw.mirrord-JOB.part"])
    await bench.assert_moved(await bench.finish())
