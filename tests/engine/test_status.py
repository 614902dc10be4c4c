"""The numbers that a job shows: bytes left, passes, what is dirty."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mirrord.core.geometry import KIB, MIB, Status
from mirrord.core.migration import Phase
from mirrord.core.pacing import BURST_BYTES
from mirrord.engine.tracking import EXTENTS_MAX
from mirrord.errors import RefusedError
from tests.engine.crashes import UNIT, CrashBench
from tests.engine.harness import Bench, finish
from tests.engine.phases import HELD
from tests.helpers import eventually_async


async def test_what_waits_for_the_limit_is_left(tmp_path: Path) -> None:
    """The last chunk left the bitmap's list and waits for its turn: it is still to be copied."""
    size = BURST_BYTES + UNIT
    bench = CrashBench(tmp_path, size, settings=HELD)
    await bench.begin(limit=KIB, verify="none")
    bench.run()
    await eventually_async(lambda: bench.job.copier.copied_bytes == BURST_BYTES)
    assert bench.job.bitmap.todo() == 0
    assert bench.job.status().bytes_remaining == UNIT
    await bench.job.limit(0)
    await bench.assert_moved(await bench.finish())
    await bench.close()


async def test_the_pass_over_an_empty_disk_counts(tmp_path: Path) -> None:
    """A job that has made its bulk pass says so, though there was nothing to copy."""
    bench = Bench(tmp_path, MIB)
    disk = await bench.open()
    status = await finish(await bench.start())
    assert (status.passes, status.bytes_total) == (1, 0)
    await disk.backend.close()


async def test_an_answer_about_dirty_extents_is_bounded(tmp_path: Path) -> None:
    """Every other block is dirty. One answer keeps the loop for some milliseconds at most; who
    wants more asks again from where it ends."""
    bench = CrashBench(tmp_path, 16 * MIB, settings=HELD)
    rule = await bench.hold_copying(0)
    granularity = bench.job.bitmap.granularity
    blocks = range(UNIT // granularity, bench.size // granularity)
    for block in blocks[::2]:
        bench.job.bitmap.mark(block * granularity, 1)
    offset, answers, dirty = UNIT, 0, 0
    while offset < bench.size:
        extents = bench.disk.dirty_extents(offset, bench.size - offset)
        assert 1 <= len(extents) <= EXTENTS_MAX
        assert extents[0].offset == offset
        dirty += sum(extent.status is Status.DIRTY for extent in extents)
        offset, answers = extents[-1].end, answers + 1
    assert (dirty, answers) == (len(blocks[::2]), -(-len(blocks) // EXTENTS_MAX))
    rule.release()
    await bench.assert_moved(await bench.finish())
    await bench.close()


async def test_a_committed_move_has_nothing_left(bench: CrashBench) -> None:
    """Also before it runs again after a crash, when nothing of it is to be changed any more."""
    await bench.begin()
    retire = bench.at_source.hang("retire")
    await bench.run_to(retire)
    await bench.kill()
    await bench.recovered()
    assert bench.job.status().bytes_remaining == 0
    with pytest.raises(RefusedError):
        await bench.job.limit(MIB)
    await bench.assert_moved(await bench.finish())


async def test_a_pass_is_predicted_when_its_rate_is_known(tmp_path: Path) -> None:
    """The bulk pass by its first rate, a later pass at its start; what has no end has none."""
    size = 4 * BURST_BYTES
    bench = CrashBench(tmp_path, size, settings=replace(HELD, sample_s=0.2))
    await bench.begin(limit=BURST_BYTES, verify="none")
    bench.run()
    story = bench.job.migration.story
    assert story == []
    await eventually_async(lambda: story and story[0].predicted_s is not None)
    assert 0.2 < (story[0].predicted_s or 0) < 60
    await bench.job.pause()
    await eventually_async(lambda: story[-1].phase is Phase.PAUSED)
    bench.job.sample()
    assert story[-1].predicted_s is None
    await bench.job.limit(0)
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())
    await bench.close()
