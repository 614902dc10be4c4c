"""The engine's small parts by themselves: what no move reaches, or only by luck."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from mirrord.core.bitmap import PAGE_BITS, PAGE_BYTES, IntentMap
from mirrord.core.geometry import GIB, KIB, MIB, Extent, Status
from mirrord.core.journal import Kind, parse
from mirrord.core.migration import Event, Migration
from mirrord.engine.digests import COMPARING, ChunkHasher, Digests
from mirrord.engine.disk import Disk
from mirrord.engine.intents import Intents
from mirrord.engine.interrupt import Interrupt
from mirrord.engine.ledger import Ledger
from mirrord.engine.locks import Locks
from mirrord.engine.surroundings import outlive
from mirrord.storage.job_files import JobFiles
from mirrord.storage.memory import open_memory
from tests.engine.faults import Faults, FaultyBackend, FaultyStore

BLOCK = 4 * KIB


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
async def store(tmp_path: Path):
    """A job's files, with faults."""
    folder = tmp_path / "job"
    folder.mkdir()
    made = FaultyStore(await JobFiles.open(folder, 100 * GIB, "boot"), Faults("files"))
    await made.create(IntentMap(100 * GIB).content())
    yield made
    await made.close()


class TestDisk:
    """The door."""

    def disk(self, size: int = MIB) -> tuple[Disk, Faults]:
        faults = Faults("side")
        return Disk("vm1", FaultyBackend(open_memory(size), faults)), faults

    async def test_reads_and_flushes_go_on_behind_the_gate(self) -> None:
        disk, _ = self.disk()
        disk.close_gate()
        assert bytes(await disk.read(0, 3)) == bytes(3)
        await disk.flush()
        await disk.cache(0, disk.size)
        writes = [asyncio.create_task(disk.write(0, bytes([n]) * 8)) for n in (1, 2, 3)]
        await turns()
        assert not any(write.done() for write in writes)
        disk.open_gate()
        await asyncio.gather(*writes)
        assert bytes(await disk.read(0, 8)) == b"\x03" * 8  # in the order in which they came

    async def test_a_gate_that_closes_again_holds_who_was_let_go(self) -> None:
        disk, _ = self.disk()
        disk.close_gate()
        write = asyncio.create_task(disk.write(0, b"x"))
        await turns()
        disk.open_gate()
        disk.close_gate()
        await turns()
        assert not write.done()
        disk.open_gate()
        await write

    async def test_opening_an_open_gate_does_nothing(self) -> None:
        disk, _ = self.disk()
        disk.open_gate()
        await disk.write(0, b"x")

    async def test_settle_waits_for_what_began_before(self) -> None:
        disk, faults = self.disk()
        first = faults.hang("write", at=1)
        one = asyncio.create_task(disk.write(0, b"x"))
        await first.wait()
        settled = [asyncio.create_task(disk.settle()) for _ in range(2)]
        await turns()
        second = faults.hang("write", at=1)
        two = asyncio.create_task(disk.write(0, b"y"))
        await second.wait()
        first.release()
        await asyncio.gather(one, *settled)  # without the one that began later
        later = asyncio.create_task(disk.settle())
        await turns()
        assert not later.done()
        second.release()
        await asyncio.gather(two, later)
        await disk.settle()

    async def test_the_cache_is_warmed_in_steps(self) -> None:
        disk, faults = self.disk(3 * MIB + 5)
        others_turn = asyncio.create_task(asyncio.sleep(0))
        await disk.cache(1, disk.size - 1)
        assert faults.count("read") == 4
        assert others_turn.done()

    async def test_extents(self) -> None:
        disk, _ = self.disk()
        await disk.write(0, b"x")
        assert (await disk.extents(0, disk.size))[0].status is Status.DATA
        assert disk.dirty_extents(5, 10) == [Extent(5, 10, Status.CLEAN)]

    @pytest.mark.parametrize("kind", ["flush", "fua"])
    async def test_a_failed_flush_is_remembered(self, kind: str) -> None:
        disk, faults = self.disk()
        faults.fail("flush", "write", errno=errno.EIO)
        with pytest.raises(OSError, match="error"):
            await (disk.flush() if kind == "flush" else disk.write(0, b"x", fua=True))
        for request in (disk.flush(), disk.trim(0, 1, fua=True)):
            with pytest.raises(OSError, match="an earlier flush failed"):
                await request
        await disk.write(0, b"x")

    async def test_zeroes_that_are_not_fast_are_no_failed_flush(self) -> None:
        disk, faults = self.disk()
        faults.fail("write_zeroes", errno=errno.ENOTSUP)
        with pytest.raises(OSError, match="not supported"):
            await disk.write_zeroes(0, BLOCK, fua=True, fast=True)
        await disk.flush()

    @pytest.mark.parametrize("kind", ["flush", "fua"])
    async def test_a_flush_of_the_former_side_is_not_the_new_ones(self, kind: str) -> None:
        disk, faults = self.disk()
        rule = faults.hang("flush", "write")
        asked = asyncio.create_task(
            disk.flush() if kind == "flush" else disk.write(0, b"x", fua=True)
        )
        await rule.wait()
        disk.close_gate()
        disk.pivot(open_memory(disk.size))
        disk.open_gate()
        rule.errno = errno.EIO
        rule.release()
        with pytest.raises(OSError, match="error"):
            await asked
        await disk.flush()


class TestLocks:
    """Range locks that can be waited for."""

    async def test_first_come_first_served(self) -> None:
        locks = Locks()
        held = await locks.acquire(0, 10)
        waiting = [asyncio.create_task(locks.acquire(5, 15)) for _ in range(2)]
        beside = await locks.acquire(20, 30)
        await turns()
        locks.release(held)
        first = await waiting[0]
        assert not waiting[1].done()
        locks.release(first)
        locks.release(await waiting[1])
        locks.release(beside)

    async def test_who_gives_up_is_not_in_the_way(self) -> None:
        locks = Locks()
        held = await locks.acquire(0, 10)
        cancelled = asyncio.create_task(locks.acquire(0, 20))
        behind = asyncio.create_task(locks.acquire(15, 20))
        await turns()
        assert not behind.done()
        cancelled.cancel()
        locks.release(await behind)
        assert await locks.acquire_within(0, 1, 0.01) is None
        locks.release(held)
        free = await locks.acquire_within(0, 1, 0.01)
        assert free is not None
        locks.release(free)

    async def test_granted_and_cancelled_at_once(self) -> None:
        locks = Locks()
        held = await locks.acquire(0, 10)
        waiting = asyncio.create_task(locks.acquire(0, 10))
        await turns()
        locks.release(held)
        waiting.cancel()
        await asyncio.wait((waiting,))
        assert await locks.acquire_within(0, 10, 0.01) is not None


class TestIntents:
    """The intent map's way to disk."""

    async def test_group_commit(self, store: FaultyStore) -> None:
        """Who comes while a page is being written waits for the next one, with all the others."""
        intents = Intents(IntentMap(100 * GIB, MIB, bytes(PAGE_BYTES * 4)), store)
        writing = store.faults.hang("write_map")
        first = asyncio.create_task(intents.ensure(0, BLOCK))
        await writing.wait()
        others = [asyncio.create_task(intents.ensure(n * MIB, BLOCK)) for n in range(1, 50)]
        await turns()
        assert store.faults.count("write_map:durable") == 1
        writing.release()
        await asyncio.gather(first, *others)
        assert store.faults.count("write_map:durable") == 2
        stored = await store.read_map()
        assert stored is not None
        assert int.from_bytes(stored[:PAGE_BYTES], "little") == (1 << 50) - 1

    async def test_one_that_is_cancelled_leaves_the_others(self, store: FaultyStore) -> None:
        intents = Intents(IntentMap(100 * GIB, MIB, bytes(PAGE_BYTES * 4)), store)
        writing = store.faults.hang("write_map")
        first, second = (asyncio.create_task(intents.ensure(n * MIB, 1)) for n in range(2))
        await writing.wait()
        await turns()
        first.cancel()
        await asyncio.wait((first,))
        writing.release()
        await second
        assert intents.marked(MIB, 1)

    async def test_a_range_over_two_pages(self, store: FaultyStore) -> None:
        intents = Intents(IntentMap(100 * GIB, MIB, bytes(PAGE_BYTES * 4)), store)
        edge = PAGE_BITS * MIB
        assert not intents.marked(edge - 1, 2)
        await intents.ensure(edge - 1, 2)
        assert intents.marked(edge - 1, 2)
        assert store.faults.count("write_map:durable") == 2

    async def test_a_failed_write_marks_nothing(self, store: FaultyStore) -> None:
        intents = Intents(IntentMap(100 * GIB, MIB, bytes(PAGE_BYTES * 4)), store)
        store.faults.fail("write_map", errno=errno.EIO, after=True)
        with pytest.raises(OSError, match="Input/output error"):
            await intents.ensure(0, 1)
        assert not intents.marked(0, 1)
        await intents.ensure(0, 1)
        assert intents.marked(0, 1)

    async def test_clearing_waits_for_a_write_under_way(self, store: FaultyStore) -> None:
        """A lazy write never overtakes a durable one; the cleared bit counts no more at once."""
        intents = Intents(IntentMap(100 * GIB, MIB, bytes(PAGE_BYTES * 4)), store)
        await intents.ensure(0, 1)
        writing = store.faults.hang("write_map")
        other = asyncio.create_task(intents.ensure(MIB, 1))
        await writing.wait()
        clearing = asyncio.create_task(intents.clear([0]))
        await turns()
        assert not intents.marked(0, 1)
        assert not clearing.done()
        writing.release()
        await asyncio.gather(other, clearing)
        stored = await store.read_map()
        assert stored is not None
        assert int.from_bytes(stored[:PAGE_BYTES], "little") == 0b10

    async def test_clearing_nothing_writes_nothing(self, store: FaultyStore) -> None:
        intents = Intents(IntentMap(100 * GIB, MIB, bytes(PAGE_BYTES * 4)), store)
        await intents.clear([])
        assert store.faults.count("write_map:lazy") == 0


class TestLedger:
    """The journal's one writer."""

    async def written(self, store: FaultyStore) -> list[Kind]:
        return [record.kind for record in parse(await store.read_log()).records]

    async def test_a_decision_is_made_although_nobody_waits(self, store: FaultyStore) -> None:
        """Cancelled in the middle, the append first finds out what came of it."""
        ledger = Ledger(store)
        rule = store.faults.hang("write_log")
        writing = asyncio.create_task(ledger.append(Kind.PREP, {}))
        await rule.wait()
        for _ in range(2):
            writing.cancel()
            await turns()
            assert not writing.done()
        rule.release()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert [record.kind for record in ledger.log.records] == [Kind.PREP]
        await ledger.append(Kind.COMMIT, {})
        assert await self.written(store) == [Kind.PREP, Kind.COMMIT]

    async def test_cancelled_and_failed(self, store: FaultyStore) -> None:
        ledger = Ledger(store)
        rule = store.faults.hang("write_log")
        writing = asyncio.create_task(ledger.append(Kind.PREP, {}))
        await rule.wait()
        writing.cancel()
        await turns()
        rule.errno = errno.EIO
        rule.release()
        with pytest.raises((OSError, asyncio.CancelledError)):
            await writing
        assert ledger.log.records == ()

    async def test_one_record_at_a_time(self, store: FaultyStore) -> None:
        ledger = Ledger(store)
        await ledger.append(Kind.PREP, {})
        rule = store.faults.hang("write_log")
        one = asyncio.create_task(ledger.append(Kind.SET, {"limit": 1}))
        await rule.wait()
        two = asyncio.create_task(ledger.append(Kind.SET, {"limit": 2}))
        await turns()
        assert store.faults.count("write_log:SET") == 1
        rule.release()
        await asyncio.gather(one, two)
        assert ledger.outcome.settings == {"limit": 2}

    @pytest.mark.parametrize("written", [False, True])
    async def test_an_unknown_record_is_zeroed_before_the_next(
        self, store: FaultyStore, written: bool
    ) -> None:
        """Also when it was longer than the next, and when zeroing fails at first."""
        ledger = Ledger(store)
        await ledger.append(Kind.PREP, {})
        store.faults.fail("write_log:COMMIT", errno=errno.EIO, after=written)
        with pytest.raises(OSError, match="Input/output error"):
            await ledger.append(Kind.COMMIT, {"long": "x" * 10000})
        store.faults.fail("write_log:zeroes", errno=errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            await ledger.append(Kind.ABORT, {})
        await ledger.append(Kind.ABORT, {})
        assert await self.written(store) == [Kind.PREP, Kind.ABORT]
        zeroed = store.faults.trace.index("files.write_log:zeroes")
        assert zeroed < store.faults.trace.index("+files.write_log:ABORT")


class TestInterrupt:
    """Which of several reasons counts."""

    def migration(self) -> Migration:
        migration = Migration()
        migration.handle(Event.STARTED, "", 0.0)
        return migration

    def test_the_most_urgent_reason_wins(self) -> None:
        interrupt = Interrupt()
        for event in (Event.PAUSE_REQUESTED, Event.ABORTED, Event.TARGET_FAILED):
            interrupt.request(event, event.value)
        assert interrupt.pending(self.migration())
        assert interrupt.take() == (Event.ABORTED, "aborted")
        assert not interrupt.pending(self.migration())

    def test_of_two_equal_reasons_the_first_counts(self) -> None:
        interrupt = Interrupt()
        interrupt.request(Event.ABORTED, "first")
        interrupt.request(Event.ABORTED, "second")
        assert interrupt.take() == (Event.ABORTED, "first")

    async def test_a_reason_that_the_phase_does_not_know_is_dropped(self) -> None:
        interrupt = Interrupt()
        interrupt.request(Event.RESUMED, "nobody paused it")
        await interrupt.wait()
        assert not interrupt.pending(self.migration())
        waiting = asyncio.create_task(interrupt.wait())
        await turns()
        assert not waiting.done()
        interrupt.request(Event.CANCEL_REQUESTED, "")
        await waiting


class TestDigests:
    """A digest a chunk."""

    def test_what_is_forgotten(self) -> None:
        digests = Digests(10 * MIB + 1, MIB)
        assert digests.count == 11
        assert digests.range_of(10) == (10 * MIB, 1)
        for index in range(digests.count):
            digests.set(index, index + 100)
            digests.verified(index)
        digests.forget(MIB - 1, 2)
        digests.forget(5 * MIB, 1)
        digests.forget(10 * MIB, 1)
        gone = [index for index in range(11) if not digests.get(index)]
        assert gone == [0, 1, 5, 10]
        assert digests.unverified() == 4
        assert list(digests.unverified_bits().search(1)) == gone
        digests.forget(0, 10 * MIB + 1)
        assert digests.unverified() == 11

    def test_no_digest_is_taken_for_a_mark(self) -> None:
        digests = Digests(3 * MIB, MIB)
        for value in (0, COMPARING):
            digests.set(0, value)
            assert digests.get(0) == Digests.of(value) > COMPARING
        digests.compare(1)
        assert digests.get(1) == COMPARING

    @given(st.lists(st.integers(1, 40), min_size=1), st.lists(st.integers(1, 50)), st.binary())
    def test_a_copy_is_hashed_chunk_by_chunk(
        self, cuts: list[int], feeds: list[int], salt: bytes
    ) -> None:
        """`cuts` are lengths of run and gap in turn; the bytes come in pieces of `feeds`."""
        size, chunk_bytes = 333, 16
        content = random.Random(salt).randbytes(size)
        runs: list[tuple[int, int]] = []
        offset = 0
        for number, length in enumerate(cuts):
            length = min(length, size - offset)
            if number % 2 == 0 and length:
                runs.append((offset, length))
            offset += length
        hasher = ChunkHasher(digests := Digests(size, chunk_bytes), runs)
        stream = b"".join(content[at : at + length] for at, length in runs)
        for feed in [*feeds, len(stream)]:
            hasher.update(stream[:feed])
            stream = stream[feed:]
        whole = {
            index: xxh3_64_intdigest(content[at : at + length])
            for index in range(digests.count)
            for at, length in [digests.range_of(index)]
            if any(start <= at and at + length <= start + count for start, count in runs)
        }
        assert hasher.found == whole
        assert hasher.wanted == bool(whole)

    def test_one_byte(self) -> None:
        digests = Digests(1, MIB)
        assert digests.range_of(0) == (0, 1)
        digests.forget(0, 1)
        assert digests.unverified_bits().all()


async def test_what_outlives_a_job_ends_in_silence() -> None:
    async def fail() -> None:
        raise OSError(errno.EIO, "nobody listens")

    await outlive(asyncio.ensure_future(fail()))
    cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()
    await outlive(cancelled)
    assert cancelled.cancelled()
