"""Disks so large that one bit of the dirty bitmap covers more than a chunk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from mirrord.core.geometry import GIB, KIB
from mirrord.core.migration import Phase
from mirrord.engine.recovery import Places
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import open_io
from tests.engine.harness import QUICK, Bench, finish


async def test_a_chunk_is_at_least_one_block(tmp_path: Path) -> None:
    """Copied in smaller pieces no block would ever be clean."""
    size = 1025 * GIB
    settings = replace(
        QUICK, chunk_bytes=4 * KIB, zero_bytes=4 * KIB, region_bytes=GIB, scan_bytes=size
    )
    source = tmp_path / "source.raw"
    source.touch()
    os.truncate(source, size)
    io = open_io()
    places = Places(FilePlace(str(source), io), FilePlace(str(tmp_path / "target.raw"), io))
    bench = Bench(tmp_path, size, settings=settings, places=places)
    disk = await bench.open()
    offsets = (0, 512 * GIB + 4 * KIB, size - 3)
    for offset in offsets:
        await disk.write(offset, b"abc")
    job = await bench.start(verify="none")
    assert job.settings.chunk_bytes == job.bitmap.granularity == 8 * KIB
    assert (await finish(job, 5)).phase is Phase.DONE
    for offset in offsets:
        assert bytes(await disk.read(offset, 3)) == b"abc"
    await disk.backend.close()
    await io.close()
