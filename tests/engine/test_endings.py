"""How jobs begin and end when a step of that fails: refusals, aborts, retirement, recovery."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from mirrord.core.migration import Event, Phase
from mirrord.engine import recovery
from mirrord.engine.activities import ACTIVITIES
from mirrord.engine.disk import Disk
from mirrord.engine.request import JobRequest
from mirrord.errors import RefusedError
from mirrord.storage.backend import Capabilities
from tests.engine import phases
from tests.engine.crashes import SIZE, SMALL, UNIT, CrashBench
from tests.engine.faults import FOR_EVER
from tests.helpers import eventually_async

NEW = b"\x42" * 4096


# The beginning


async def test_a_read_only_disk_is_refused(bench: CrashBench) -> None:
    backend = await bench.places.source.open()
    disk = Disk("vm1", backend, read_only=True)
    bench.disk = disk
    with pytest.raises(RefusedError) as caught:
        await bench.start()
    assert caught.value.code == "read-only"


async def test_what_cant_be_wiped_is_refused_before_anything_is_made(bench: CrashBench) -> None:
    """Not done as if it had not been asked for: somebody would give the old disk away."""
    with pytest.raises(RefusedError, match="no block device") as caught:
        await bench.begin(wipe=True)
    assert caught.value.code == "not-wiped"
    assert bench.names() == ["source"]
    assert bench.shelf.names() == ["source"]


@pytest.mark.parametrize("step", ["create", "write_log:PREP"])
async def test_a_job_that_cannot_be_recorded_leaves_no_target(bench: CrashBench, step: str) -> None:
    await bench.open()
    bench.at_files.fail(step, errno=errno.EIO)
    with pytest.raises(RefusedError, match="Input/output error") as caught:
        await bench.start()
    assert caught.value.code == "state-error"
    assert bench.names() == ["source"]
    await bench.write(0, NEW)


async def test_a_target_that_does_not_start_zeroed_is_written_everywhere(
    bench: CrashBench,
) -> None:
    """As a block device that held something else: holes of the source are zeroed there."""
    await bench.open()
    await bench.disk.trim(2 * UNIT, 4 * UNIT)
    bench.expected[2 * UNIT : 6 * UNIT] = bytes(4 * UNIT)
    create = bench.at_target.hang("create", after=True)
    starting = bench.guest(bench.start())
    await create.wait()
    content = bench.shelf.get(f".target.mirrord-{bench.request.job_id}.part")
    assert content is not None
    for block in range(3, 6):
        content.blocks[block] = bytearray(b"\xff" * UNIT)
    create.release()
    await starting
    bench.target.capabilities = Capabilities(True, True, False, False)
    status = await bench.finish()
    assert status.bytes_total == SIZE
    await bench.assert_moved(status)


async def test_copying_below_that_fails_is_tried_from_here(bench: CrashBench) -> None:
    """Which side failed can't be told from the outside; reading and writing tells."""
    await bench.begin(verify="none")
    bench.at_target.fail("copy_from", errno=errno.EIO)
    status = await bench.finish()
    assert Phase.DEGRADED not in [step.phase for step in status.story]
    await bench.assert_moved(status)


async def test_zeroes_that_the_target_refuses(bench: CrashBench) -> None:
    await bench.open()
    await bench.disk.write_zeroes(4 * UNIT, UNIT)
    bench.expected[4 * UNIT : 5 * UNIT] = bytes(UNIT)
    await bench.start()
    bench.tracker.bitmap.mark(4 * UNIT, UNIT)
    rule = bench.at_target.fail("write_zeroes", errno=errno.EIO)
    status = await bench.finish()
    assert rule.seen > 1
    assert "zeroing of the target failed" in bench.job.migration.tell()
    await bench.assert_moved(status)


# Before the commit point


async def test_an_abort_waits_for_the_state_directory(bench: CrashBench) -> None:
    """Until ABORT is durable every write is followed: a crash would resume the move."""
    await phases.copying(bench)
    broken = bench.at_files.fail("write_log", errno=errno.EIO, times=FOR_EVER)
    await bench.job.cancel()
    await broken.wait()
    await bench.write(0, NEW)
    assert not bench.tracker.bitmap.clean(0, len(NEW))
    await eventually_async(lambda: "waiting for the state directory" in bench.job.status().reason)
    assert ".target.mirrord-JOB.part" in bench.names()
    broken.release()
    bench.at_target.heal()
    assert (await bench.finish()).phase is Phase.CANCELLED
    assert bench.names() == ["source"]


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_a_target_that_cannot_be_deleted_is_left_over(bench: CrashBench, how: str) -> None:
    bench.settings = replace(SMALL, drain_s=0.05)
    await bench.hold_mirroring()
    if how == "fails":
        bench.at_target.fail("discard", errno=errno.EIO)
    else:
        bench.at_target.hang("discard")
    await bench.job.cancel()
    status = await bench.finish()
    assert status.phase is Phase.CANCELLED
    assert "the target mem:target is left over" in status.reason
    assert bench.job.status() is status
    bench.at_target.heal()


async def test_names_that_hang_do_not_hold_a_cancel_up(bench: CrashBench) -> None:
    """The name is being taken back when the operator cancels."""
    bench.settings = replace(SMALL, drain_s=0.05)
    await bench.begin()
    publish = bench.at_target.hang("publish")
    bench.at_target.hang("withdraw", "discard")
    await bench.run_to(publish)
    await bench.job.cancel()
    assert (await bench.finish()).phase is Phase.CANCELLED
    await bench.write(0, NEW)
    assert await bench.content() == bytes(bench.expected)


async def test_a_name_that_cannot_be_taken_back(bench: CrashBench) -> None:
    """Publishing it again at the next attempt, recovery and deletion know both names."""
    await bench.begin(verify="none")
    publish = bench.at_target.hang("publish")
    await bench.run_to(publish)
    bench.tracker.bitmap.mark(0, 4096)
    bench.at_target.fail("withdraw", errno=errno.EIO)
    publish.release()
    await bench.assert_moved(await bench.finish())


async def test_an_operator_who_comes_before_the_commit_is_heard(bench: CrashBench) -> None:
    """Behind the gate, at the last moment at which there is a way back."""
    release = await phases.at_the_gate(bench)
    await bench.job.pause()
    await bench.run_to_phase(Phase.PAUSED)
    assert not bench.gate_closed
    release()
    assert bench.records() == ["PREP", "SET"]
    await bench.job.resume()
    await bench.assert_moved(await bench.finish())


async def test_a_bug_ends_the_move_and_not_the_disk(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch, expect_log
) -> None:
    async def bug(job: object) -> tuple[Event, str]:
        raise ZeroDivisionError("a bug")

    expect_log("end job=job-1 error=ZeroDivisionError")
    monkeypatch.setitem(ACTIVITIES, Phase.VERIFYING, bug)
    await bench.begin()
    status = await bench.finish()
    assert status.phase is Phase.FAILED
    assert "internal error: ZeroDivisionError('a bug')" in status.reason
    assert bench.names() == ["source"]
    await bench.write(0, NEW)
    assert await bench.content() == bytes(bench.expected)


async def test_a_bug_after_the_commit_is_not_hidden(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch, expect_log
) -> None:
    """Nothing may be undone then: the process ends, and the next one finds the record."""

    async def bug(job: object) -> tuple[Event, str]:
        raise ZeroDivisionError("a bug")

    expect_log("end job=job-1 error=ZeroDivisionError")
    monkeypatch.setitem(ACTIVITIES, Phase.RETIRING, bug)
    await bench.begin()
    with pytest.raises(ExceptionGroup):
        await bench.finish()
    assert bench.records() == ["PREP", "COMMIT"]
    await bench.kill()
    monkeypatch.undo()
    await bench.assert_moved(await bench.resume())


async def test_changes_beyond_the_journals_room_are_heard_but_not_kept(
    bench: CrashBench, expect_log
) -> None:
    expect_log("set job=job-1 durable=no")
    release = await phases.copying(bench)
    for rate in range(1, 250):
        await bench.job.limit(rate << 20)
    assert bench.job.status().limit == 249 << 20
    await bench.job.limit(0)
    release()
    await bench.assert_moved(await bench.finish())


async def test_passes_that_will_not_end_say_so(bench: CrashBench) -> None:
    """The operator asked for passes alone, and the guest is faster."""
    bench.settings = phases.HELD
    bulk = await bench.hold_copying(0, mode="passes")
    bench.job.rates.copy, bench.job.rates.dirty = 4096.0, 1e9
    bench.job.rates.sample = lambda *_: None  # type: ignore[method-assign]
    await bench.write(9 * UNIT, NEW * 8)
    again = bench.at_target.hang("write", within=range(9 * UNIT, 10 * UNIT))
    bulk.release()
    await bench.run_to(again)
    assert bench.job.status().phase is Phase.CATCHING_UP
    assert bench.job.status().reason.startswith("will not finish by passes alone: ")
    again.release()
    await bench.assert_moved(await bench.finish())


# After the commit point


async def test_the_source_is_kept_as_asked(bench: CrashBench) -> None:
    await bench.begin(keep_source=True)
    status = await bench.finish()
    assert status.phase is Phase.DONE
    assert status.source_kept == "as asked"
    assert bench.names() == ["source", "target"]
    assert bench.records() == ["PREP", "COMMIT", "DONE"]


@pytest.mark.parametrize("step", ["retire", "delete_retired"])
async def test_a_source_that_cannot_be_deleted_is_a_remark(bench: CrashBench, step: str) -> None:
    await bench.begin()
    bench.at_source.fail(step, errno=errno.EACCES)
    status = await bench.finish()
    assert status.phase is Phase.DONE
    assert "could not be deleted" in str(status.source_kept)
    assert await bench.content() == bytes(bench.expected)


async def test_a_source_that_cannot_be_closed_well_is_kept(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def close() -> None:
        raise OSError(errno.EIO, "late error")

    await bench.begin()
    monkeypatch.setattr(bench.source, "close", close)
    status = await bench.finish()
    assert status.phase is Phase.DONE
    assert "closing it failed" in str(status.source_kept)
    assert "source" in bench.names()


@pytest.mark.parametrize("what", ["registry", "journal"])
async def test_retirement_insists(bench: CrashBench, what: str) -> None:
    """The target is the truth already: what has to be recorded is tried until it is."""
    await bench.begin()
    if what == "registry":
        broken = bench.at_registry.fail("moved", errno=errno.ENOSPC, times=FOR_EVER)
    else:
        broken = bench.at_files.fail("write_log:RETIRED", errno=errno.ENOSPC, times=FOR_EVER)
    bench.run()
    await broken.wait()
    await eventually_async(lambda: broken.seen > 2)
    assert bench.job.status().reason.startswith(f"the {what} can't be written")
    await bench.write(0, NEW)  # the guest goes on with the target
    broken.release()
    status = await bench.finish()
    assert bench.job.retirement.problem is None
    await bench.assert_moved(status)


# Recovery


async def test_a_target_that_cannot_be_opened_again_ends_the_move(bench: CrashBench) -> None:
    """The guest must not wait for it."""
    await phases.copying(bench)
    await bench.kill()
    bench.at_target.fail("find", "discard", errno=errno.EIO)
    found = await bench.recovered()
    assert found.job is None
    assert bench.records() == ["PREP", "ABORT", "DONE"]
    done = bench.log().records[-1].payload
    assert done["phase"] == "failed"
    assert "the target could not be opened after a restart" in done["reason"]
    assert await bench.content() == bytes(bench.expected)


@pytest.mark.parametrize("what", ["find", "withdraw", "discard"])
async def test_a_target_that_hangs_after_a_restart_ends_the_move(
    bench: CrashBench, expect_log, what: str
) -> None:
    """The guest waits for it only so long, and no longer for its removal."""
    await phases.copying(bench)
    await bench.kill()
    hanging = bench.at_target.hang(what, times=FOR_EVER)
    if what == "discard":
        bench.at_target.fail("find", errno=errno.EIO)
        expect_log("leave job=job-1 target=mem:target")
    bench.settings = replace(bench.settings, find_s=0.1, discard_s=0.1)
    found = await bench.recovered()
    assert found.job is None
    assert hanging.seen == 1
    assert bench.records() == ["PREP", "ABORT", "DONE"]
    reason = bench.log().records[-1].payload["reason"]
    assert "within 0.1 s" in reason
    assert await bench.content() == bytes(bench.expected)
    hanging.release()


async def test_an_aborted_target_that_cannot_be_deleted_after_a_restart(
    bench: CrashBench, expect_log
) -> None:
    expect_log("leave job=job-1 target=mem:target")
    await bench.hold_mirroring()
    discard = bench.at_target.hang("discard")
    await bench.job.cancel()
    await bench.run_to(discard)
    await bench.kill()
    bench.at_target.fail("discard", errno=errno.EIO)
    found = await bench.recovered()
    assert found.job is None
    assert "is left over" in bench.log().records[-1].payload["reason"]


async def test_a_wish_whose_target_cannot_be_deleted(bench: CrashBench, expect_log) -> None:
    """Row C0 with a target directory out of reach: the disk is served all the same."""
    expect_log("leave job=job-1 target=mem:target")
    await bench.open()
    prep = bench.at_files.hang("write_log:PREP")
    bench.guest(bench.start())
    await prep.wait()
    await bench.kill()
    bench.at_target.fail("discard", errno=errno.EIO)
    found = await bench.recovered()
    assert found.job is None
    assert await bench.content() == bytes(bench.expected)


async def test_a_source_that_was_replaced_while_nobody_looked(on_files: CrashBench) -> None:
    """The maps say nothing about another file."""
    bench = on_files
    await bench.hold_mirroring()
    await bench.kill()
    bench.source_path.rename(bench.source_path.parent / "elsewhere")
    bench.source_path.write_bytes(bytes(SIZE))
    found = await bench.recovered()
    assert found.job is None
    assert "was replaced" in bench.log().records[-1].payload["reason"]
    assert await bench.content() == bytes(SIZE)


@pytest.mark.parametrize("ending", ["done", "cancelled"])
async def test_an_ended_job_is_only_looked_at(bench: CrashBench, ending: str) -> None:
    if ending == "done":
        await bench.begin()
        await bench.finish()
    else:
        await bench.hold_mirroring()
        await bench.job.cancel()
        await bench.finish()
    await bench.kill()
    before = bench.log_path().read_bytes()
    found = await bench.recovered()
    assert found.job is None
    assert found.location == ("mem:target" if ending == "done" else "mem:source")
    assert bench.log_path().read_bytes() == before
    assert await bench.content() == bytes(bench.expected)


async def test_a_recovery_that_fails_lets_the_source_go(bench: CrashBench) -> None:
    """The next process can open it."""
    await phases.copying(bench)
    await bench.kill()
    bench.at_files.fail("write_log:ABORT", errno=errno.EIO)
    bench.at_target.fail("find", errno=errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await bench.recovered()
    await bench.recovered()
    await bench.assert_moved(await bench.finish())


async def test_a_target_that_cannot_be_created_again(bench: CrashBench) -> None:
    await phases.copying(bench)
    await bench.kill()
    bench.shelf.remove(f".target.mirrord-{bench.request.job_id}.part")
    bench.at_files.fail("write_log:PREP", errno=errno.EIO)
    found = await bench.recovered()
    assert found.job is None
    assert bench.records() == ["PREP", "ABORT", "DONE"]
    assert bench.names() == ["source"]


async def test_the_status_of_a_move_that_is_only_retired(bench: CrashBench) -> None:
    """After the restart there is no copier: nothing is said about rates."""
    await bench.begin()
    await bench.run_to(bench.at_source.hang("retire"))
    await bench.kill()
    found = await bench.recovered()
    assert found.job is not None
    retire = bench.at_source.hang("retire")
    await bench.run_to(retire)
    status = found.job.status()
    assert (status.copy_rate, status.dirty_rate, status.eta_s) == (None, None, None)
    assert status.bytes_remaining == 0
    retire.release()
    await bench.assert_moved(await bench.finish())


# Checkpoints by themselves


async def test_housekeeping_clears_marks(bench: CrashBench, expect_log) -> None:
    bench.settings = replace(SMALL, checkpoint_s=0.01, sample_s=0.005)
    await bench.hold_mirroring()
    await eventually_async(lambda: not bench.marked(0))
    broken = bench.at_files.fail("write_map:lazy", errno=errno.EIO)
    expect_log("clear intent-map error=")
    await bench.write(0, NEW)
    await bench.disk.flush()
    await broken.wait()
    await bench.assert_moved(await bench.cut_over())


async def test_many_unflushed_bytes_are_flushed_soon(bench: CrashBench) -> None:
    bench.settings = replace(SMALL, checkpoint_bytes=4 * UNIT, sample_s=0.005)
    await bench.hold_copying(12, cutover="manual")
    await eventually_async(lambda: bench.at_target.count("flush") > 0)
    bench.at_target.heal()
    await bench.assert_moved(await bench.cut_over())


async def test_no_move_without_the_extents(bench: CrashBench) -> None:
    """How much room is needed can't be told: refused."""
    await bench.open()
    bench.at_source.fail("extents", errno=errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await recovery.check(
            bench.disk, bench.places.target, JobRequest("job-1", "vm1", "mem:source", "mem:target")
        )
