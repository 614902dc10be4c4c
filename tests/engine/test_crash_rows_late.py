"""The crash-point table, C9 to C24: from the commit on, and what is damaged, full or gone.

How the rows are brought about is told in `test_crash_rows`. C21 speaks of targets on other hosts:
here it is a local one that fails for a while. C24 (two daemons) is the service's; here two
processes want one job's files.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mirrord.core.journal import CAPACITY_BYTES, Kind, append
from mirrord.core.migration import Phase
from mirrord.errors import DamagedError, RefusedError
from mirrord.storage.job_files import JobFiles
from tests.engine.crashes import SIZE, UNIT, CrashBench

both_crashes = pytest.mark.parametrize("power", [False, True], ids=["kill", "power-cut"])
NEW = b"\xa5" * 4096


@both_crashes
async def test_c9_commit_not_found(on_files: CrashBench, power: bool) -> None:
    """Without the record it is row C8. No write of the guest was answered meanwhile."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_files.hang("write_log:COMMIT"))
    held = bench.guest(bench.write(0, NEW))
    assert bytes(await bench.disk.read(0, 4096)) == bytes(bench.expected[:4096])
    assert not held.done()
    await bench.kill(power=power)
    assert bench.records() == ["PREP"]
    found = await bench.recovered()
    assert found.location == str(bench.source_path)
    await bench.assert_moved(await bench.finish())


async def test_c9_commit_found(on_files: CrashBench) -> None:
    """With the record it is row C10. Both sides are equal."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_files.hang("write_log:COMMIT", after=True))
    held = bench.guest(bench.write(0, NEW))
    one, other = await bench.both()
    assert one == other
    assert not held.done()
    await bench.kill()
    found = await bench.recovered()
    assert found.location == str(bench.target_path)
    await bench.assert_moved(await bench.finish())


@both_crashes
async def test_c10_commit_durable_and_the_source_in_place(
    on_files: CrashBench, power: bool
) -> None:
    """The target is served, looked at once more, and then the source is deleted."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_registry.hang("moved"))
    await bench.kill(power=power)
    assert bench.names() == ["source.raw", "target.raw"]
    found = await bench.recovered()
    assert found.location == str(bench.target_path)
    assert found.job is not None
    assert bench.at_source.count("open") == 0
    status = await bench.finish()
    assert status.story[0].phase is Phase.RETIRING
    assert bench.trace.index("target.confirm") < bench.trace.index("+source.retire")
    assert bench.moved == [str(bench.target_path)]
    await bench.assert_moved(status)


async def test_c10_with_a_target_that_cannot_be_confirmed(on_files: CrashBench) -> None:
    """The source is kept when a fresh look finds something else under the target's name."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_registry.hang("moved"))
    await bench.kill()
    found = await bench.recovered()
    bench.target_path.rename(bench.target_path.parent / "elsewhere")
    bench.target_path.write_bytes(bytes(SIZE))
    status = await bench.finish()
    assert status.phase is Phase.DONE
    assert status.source_kept is not None
    assert "was replaced" in status.source_kept
    assert bench.source_path.read_bytes() == bytes(bench.expected)
    assert found.disk.backend is bench.target


@pytest.mark.fault(3)
async def test_c11_commit_only_in_the_page_cache(
    on_files: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Journal, its directory and the target's are made durable before the target is looked for."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_files.hang("write_log:COMMIT", after=True))
    await bench.kill()
    honest = os.fsync

    def fsync(descriptor: int) -> None:
        honest(descriptor)
        bench.trace.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    monkeypatch.setattr(os, "fsync", fsync)
    found = await bench.recovered()
    assert found.location == str(bench.target_path)
    order = [step for step in bench.trace if not step.startswith("+")]
    found_at = order.index("target.find")
    for name in ("log", bench.request.job_id, bench.target_path.parent.name):
        assert f"fsync {name}" in order[:found_at], order
    assert order.index("fsync log") < order.index("files.read_log")
    assert order.index("files.read_log") < found_at


@pytest.mark.parametrize("record", ["COMMIT", "map"])
async def test_c11_what_cannot_be_made_durable_is_not_acted_on(
    on_files: CrashBench, record: str
) -> None:
    """EIO while the journal is made durable: nothing is served and nothing is touched."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_files.hang("write_log:COMMIT", after=record == "COMMIT"))
    await bench.kill()
    names = bench.names()
    bench.at_files.fail("read_log", errno=errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await bench.recovered()
    assert bench.names() == names
    assert not any(step.startswith("+target") for step in bench.trace)


@both_crashes
async def test_c12_the_guest_wrote_after_the_commit(on_files: CrashBench, power: bool) -> None:
    """The target is the truth; the source, stale by now, is never served again."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_source.hang("retire"))
    await bench.write(0, NEW)
    await bench.disk.flush()
    await bench.kill(power=power)
    assert bench.source_path.read_bytes()[: len(NEW)] != NEW
    found = await bench.recovered()
    assert bytes(await found.disk.read(0, len(NEW))) == NEW
    await bench.assert_moved(await bench.finish())


@pytest.mark.parametrize("target", ["missing", "another file", "short", "a directory", "EIO"])
async def test_c13_committed_but_the_target_is_lost(on_files: CrashBench, target: str) -> None:
    """Nothing is served, the source is kept, and nothing is changed."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_source.hang("retire"))
    await bench.kill()
    path = bench.target_path
    if target == "short":
        os.truncate(path, SIZE - 1)
    elif target != "EIO":
        path.rename(path.parent / "elsewhere")
        if target == "another file":
            path.write_bytes(bytes(SIZE))
        elif target == "a directory":
            path.mkdir()
    else:
        bench.at_target.fail("find", errno=errno.EIO)
    names, log = bench.names(), bench.log_path().read_bytes()
    with pytest.raises((RefusedError, OSError)) as caught:
        await bench.recovered()
    if target != "EIO":
        assert isinstance(caught.value, RefusedError)
        assert caught.value.code == "target-lost"
        assert str(path) in str(caught.value)
    assert bench.at_source.count("open") == 0
    assert bench.names() == names
    assert bench.log_path().read_bytes() == log
    assert bench.source_path.read_bytes() == bytes(bench.expected)


@both_crashes
@pytest.mark.parametrize("recorded", [False, True], ids=["not-recorded", "recorded"])
async def test_c14_source_renamed(on_files: CrashBench, recorded: bool, power: bool) -> None:
    """The file under the retired name is the source's: its deletion goes on."""
    bench = on_files
    await bench.begin()
    if recorded:
        rule = bench.at_source.hang("delete_retired")
    else:
        rule = bench.at_source.hang("retire", after=True)
    await bench.run_to(rule)
    await bench.kill(power=power)
    assert bench.names() == [".source.raw.mirrord-JOB.retired", "target.raw"]
    assert bench.records() == ["PREP", "COMMIT", *(["RETIRED"] if recorded else [])]
    await bench.assert_moved(await bench.resume())


async def test_c14_another_file_under_the_retired_name(on_files: CrashBench) -> None:
    """By device and inode it isn't the source, so it stays."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_source.hang("delete_retired"))
    await bench.kill()
    retired = bench.source_path.parent / f".source.raw.mirrord-{bench.request.job_id}.retired"
    retired.rename(bench.source_path.parent / "elsewhere")
    retired.write_bytes(b"an operator's")
    status = await bench.resume()
    assert status.phase is Phase.DONE
    assert retired.read_bytes() == b"an operator's"


async def test_c15_source_unlinked_but_done_missing(on_files: CrashBench) -> None:
    """Both names are gone: DONE."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_files.hang("write_log:DONE"))
    assert bench.names() == ["target.raw"]
    await bench.kill()
    status = await bench.resume()
    assert bench.trace.index("source.delete_retired") < bench.trace.index("+files.write_log:DONE")
    await bench.assert_moved(status)


@pytest.mark.fault(19)
async def test_c16_source_replaced(on_files: CrashBench) -> None:
    """What an operator put in the source's place is not touched; DONE says so."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_source.hang("retire"))
    await bench.kill()
    bench.source_path.rename(bench.source_path.parent / "elsewhere")
    bench.source_path.write_bytes(bytes(SIZE))
    status = await bench.resume()
    assert status.phase is Phase.DONE
    assert status.source_kept is not None
    assert "was replaced" in status.source_kept
    assert bench.source_path.read_bytes() == bytes(SIZE)
    done = bench.log().records[-1]
    assert done.kind is Kind.DONE
    assert done.payload["source_kept"] == status.source_kept


@both_crashes
async def test_c17_aborted_but_the_part_is_there(on_files: CrashBench, power: bool) -> None:
    """It is deleted, then DONE."""
    bench = on_files
    await bench.begin(cutover="manual")
    rule = bench.at_target.hang("discard")
    bench.run()
    await bench.job.cancel()
    await bench.run_to(rule)
    await bench.kill(power=power)
    assert bench.records() == ["PREP", "ABORT"]
    found = await bench.recovered()
    assert found.job is None
    assert found.location == str(bench.source_path)
    assert bench.names() == ["source.raw"]
    assert bench.records() == ["PREP", "ABORT", "DONE"]
    assert bench.log().records[-1].payload["phase"] == "cancelled"
    assert await bench.content() == bytes(bench.expected)


@pytest.mark.fault(8)
async def test_c18_target_full(on_files: CrashBench) -> None:
    """The job pauses for space, also over a kill; the guest notices nothing."""
    bench = on_files
    await bench.begin()
    full = bench.at_target.fail("write", errno=errno.ENOSPC, at=5, times=1 << 30)
    await bench.run_to_phase(Phase.PAUSED)
    assert "no space" in bench.job.status().reason
    await bench.write(3 * UNIT, NEW)
    await bench.disk.flush()
    await bench.kill()
    await bench.recovered()
    full = bench.at_target.fail("write", errno=errno.ENOSPC, times=1 << 30)
    await bench.run_to_phase(Phase.PAUSED)
    await bench.write(5 * UNIT, NEW)
    full.release()
    await bench.assert_moved(await bench.finish())


@pytest.mark.fault(21)
async def test_c19_state_full(on_files: CrashBench) -> None:
    """A new job is refused, and leaves nothing; a running one needs no more room than it has."""
    bench = on_files
    await bench.open()
    bench.at_files.fail("create", errno=errno.ENOSPC)
    with pytest.raises(RefusedError, match="state directory can't be written"):
        await bench.start()
    assert bench.names() == ["source.raw"]
    await bench.files.close()
    await bench.start()
    folder = bench.log_path().parent
    before = {path.name: (path.stat().st_size, path.stat().st_blocks) for path in folder.iterdir()}
    assert before["log"][1] * 512 >= CAPACITY_BYTES
    status = await bench.finish()
    after = {path.name: (path.stat().st_size, path.stat().st_blocks) for path in folder.iterdir()}
    assert after == before
    await bench.assert_moved(status)


async def test_c20_source_unreadable_at_one_offset(on_files: CrashBench) -> None:
    """The guest gets EIO there and nowhere else; the job fails and deletes nothing."""
    bench = on_files
    bad = range(6 * UNIT, 7 * UNIT)
    await bench.begin()
    bench.at_source.fail("read", errno=errno.EIO, times=1 << 30, within=bad)
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert f"read of the source failed at offset {6 * UNIT}" in status.reason
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.read(6 * UNIT, 4096)
    await bench.write(0, NEW)
    assert bytes(await bench.disk.read(0, 6 * UNIT)) == bytes(bench.expected[: 6 * UNIT])
    assert bench.names() == ["source.raw"]
    assert bench.records() == ["PREP", "ABORT", "DONE"]


async def test_c21_target_gone_for_a_while(on_files: CrashBench) -> None:
    """Before the commit: degraded; writes are tracked; the job goes on by itself."""
    bench = on_files
    await bench.hold_mirroring()
    everything = ("write", "write_zeroes", "flush", "read_stored", "check_unchanged")
    gone = bench.at_target.fail(*everything, errno=errno.EIO, times=1 << 30)
    await bench.write(0, NEW)
    await bench.run_to_phase(Phase.DEGRADED)
    await bench.write(9 * UNIT, NEW)
    gone.release()
    await bench.assert_moved(await bench.cut_over())


@pytest.mark.fault(22)
@pytest.mark.parametrize("length", [1, 31, 32, 40, 52])
async def test_c22_torn_last_record(on_files: CrashBench, length: int) -> None:
    """Its rest is made zero, and the job goes on from the records before it."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_files.hang("write_log:COMMIT"))
    await bench.kill()
    data, _ = append(bench.log(), Kind.COMMIT, {"at_s": 1234567890.123})
    with bench.log_path().open("r+b") as log:
        log.seek(bench.log().end)
        log.write(data[:length])
    assert bench.log().torn
    found = await bench.recovered()
    assert found.location == str(bench.source_path)
    assert not bench.log().torn
    assert bench.records() == ["PREP"]
    await bench.assert_moved(await bench.finish())


@pytest.mark.fault(22)
async def test_c23_damaged_journal(on_files: CrashBench) -> None:
    """A bad record with a good one behind it: nothing is served, nothing is touched."""
    bench = on_files
    await bench.begin()
    await bench.run_to(bench.at_source.hang("retire"))
    await bench.kill()
    with bench.log_path().open("r+b") as log:
        log.seek(60)  # inside PREP's payload
        log.write(b"\xff")
    names = bench.names()
    with pytest.raises(DamagedError, match="is bad, but one follows"):
        await bench.recovered()
    assert bench.names() == names
    assert bench.trace == ["+files.read_log", "files.read_log"]


@pytest.mark.fault(22)
@both_crashes
@pytest.mark.parametrize("damage", ["missing", "short"])
async def test_c23_map_lost(on_files: CrashBench, damage: str, power: bool) -> None:
    """Every region counts as marked: everything is copied again."""
    bench = on_files
    await bench.begin(verify="none")
    await bench.run_to(bench.at_target.hang("publish"))
    await bench.checkpoint()
    await bench.at_files.settled()
    await bench.kill(power=power)
    stored = bench.log_path().parent / "map"
    if damage == "missing":
        stored.unlink()
        stored.touch()
    else:
        os.truncate(stored, 100)
    found = await bench.recovered()
    assert found.job is not None
    assert found.job.status().bytes_remaining == SIZE
    status = await bench.finish()
    assert found.job.copier.copied_bytes == SIZE
    await bench.assert_moved(status)


@pytest.mark.fault(23)
async def test_c24_a_second_process_is_refused(on_files: CrashBench) -> None:
    """The job's files have a lock of their own (the daemon's is tested with the daemon)."""
    bench = on_files
    await bench.begin()
    with pytest.raises(RefusedError) as caught:
        await JobFiles.open(bench.log_path().parent, SIZE, bench.boot_id)
    assert caught.value.code == "in-use"
    await bench.assert_moved(await bench.finish())
