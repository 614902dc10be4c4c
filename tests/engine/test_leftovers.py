"""What a move that failed leaves behind, and the next process deletes."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from mirrord.core.migration import Phase
from tests.engine.crashes import CrashBench
from tests.engine.rules import NEW


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power-cut"])
async def test_an_aborted_target_under_its_final_name(on_files: CrashBench, power: bool) -> None:
    """A crash between ABORT and the deletion: the file is ours by its identity."""
    await on_files.begin(verify="none")
    on_files.at_files.fail("write_log:COMMIT", errno=errno.EIO)
    discard = on_files.at_target.hang("discard")
    await on_files.run_to(discard)
    assert on_files.target_path.exists()
    await on_files.kill(power=power)
    found = await on_files.recovered()
    assert found.job is None
    assert on_files.names() == ["source.raw"]
    assert on_files.records() == ["PREP", "ABORT", "DONE"]
    await on_files.write(0, NEW)
    assert await on_files.content() == bytes(on_files.expected)
    await found.disk.backend.close()


async def test_a_strangers_file_under_the_final_name_stays(on_files: CrashBench) -> None:
    """Somebody put his own there while nobody ran: it is not what the move made."""
    await on_files.begin(verify="none")
    on_files.at_files.fail("write_log:COMMIT", errno=errno.EIO)
    discard = on_files.at_target.hang("discard")
    await on_files.run_to(discard)
    await on_files.kill()
    on_files.target_path.rename(on_files.target_path.with_name("aside"))
    on_files.target_path.write_bytes(b"mine")
    found = await on_files.recovered()
    assert on_files.target_path.read_bytes() == b"mine"
    assert on_files.records() == ["PREP", "ABORT", "DONE"]
    await found.disk.backend.close()


@pytest.mark.parametrize("wipe", [False, True], ids=["kept", "wiped"])
async def test_a_block_device_is_released(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch, wipe: bool
) -> None:
    """It can't be deleted; the operator is told what is on it now."""

    async def nothing(*_: object, **__: object) -> None:
        return None

    disk = await bench.open()
    disk.backend.identity = replace(disk.backend.identity, kind="block")
    await bench.start(wipe=wipe)
    monkeypatch.setattr(bench.source_place.inner, "retire", nothing)
    monkeypatch.setattr(bench.source_place.inner, "delete_retired", nothing)
    status = await bench.finish()
    assert (status.phase, status.source_kept) == (Phase.DONE, None)
    assert ("with zeroes" in status.reason, "old content" in status.reason) == (wipe, not wipe)
