"""What every backend has to do. One suite, run against each of them by `test_conformance.py`.

A subclass gives a fixture `backend`: an open, writable disk that reads as zeroes, of `SIZE` bytes.
"""

from __future__ import annotations

import asyncio
import errno
import random
from functools import lru_cache

import pytest

from mirrord.core.geometry import KIB, MIB, Status
from mirrord.storage.backend import Backend

SIZE = 8 * MIB
DEADLINE_S = 30


@lru_cache(maxsize=16)  # 8 MiB take 20 ms, and most tests want the same ones
def pattern(length: int, seed: int = 1) -> bytes:
    """Return bytes that look like data and repeat nowhere."""
    return random.Random(seed).randbytes(length)


async def expect(backend: Backend, expected: bytes, what: object) -> None:
    """Compare the whole disk; `what` names the case."""
    found = bytes(await backend.read(0, len(expected)))
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=True))
        first = next(at for at, (one, other) in pairs if one != other)
        pytest.fail(f"{what}: the first wrong byte is at {first}")


class BackendConformance:
    """The tests. Offsets and lengths are such that blocks and pages are cut in every way."""

    RANGES = (
        (0, 1),
        (1, 1),
        (511, 2),
        (512, 512),
        (4096, 4096),
        (4095, 4098),
        (100, 12345),
        (3 * MIB - 7, MIB + 14),
        (SIZE - 1, 1),
        (SIZE - 4097, 4097),
        (0, SIZE),
    )

    async def test_a_new_disk_reads_as_zeroes(self, backend: Backend) -> None:
        assert bytes(await backend.read(0, SIZE)) == bytes(SIZE)

    async def test_what_was_written_is_read(self, backend: Backend) -> None:
        for offset, length in self.RANGES:
            around = pattern(SIZE, 7)
            await backend.write(0, around)
            data = pattern(length)
            await backend.write(offset, data)
            assert bytes(await backend.read(offset, length)) == data
            expected = around[:offset] + data + around[offset + length :]
            await expect(backend, expected, (offset, length))

    @pytest.mark.parametrize("punch", [True, False])
    async def test_zeroes_are_zero_and_no_more(self, backend: Backend, punch: bool) -> None:
        for offset, length in self.RANGES:
            around = pattern(SIZE, 7)
            await backend.write(0, around)
            await backend.write_zeroes(offset, length, punch=punch, fua=True)
            expected = around[:offset] + bytes(length) + around[offset + length :]
            await expect(backend, expected, (offset, length))

    async def test_what_was_trimmed_reads_as_zeroes(self, backend: Backend) -> None:
        for offset, length in self.RANGES:
            around = pattern(SIZE, 7)
            await backend.write(0, around)
            await backend.trim(offset, length)
            expected = around[:offset] + bytes(length) + around[offset + length :]
            await expect(backend, expected, (offset, length))

    async def test_every_kind_of_buffer_is_written(self, backend: Backend) -> None:
        data = pattern(3 * 4096)
        for at, buffer in enumerate((data, bytearray(data), memoryview(data)[:])):
            await backend.write(at * MIB, buffer)
            assert bytes(await backend.read(at * MIB, len(data))) == data

    async def test_a_write_that_is_begun_is_told_of_once(self, backend: Backend) -> None:
        """... after the call, and its data is as it was then; or nothing was begun."""
        told: list[OSError | None] = []
        ended = asyncio.Event()

        def end(error: OSError | None) -> None:
            told.append(error)
            ended.set()

        for offset, length in self.RANGES:
            ended.clear()
            told.clear()
            around = pattern(SIZE, 7)
            await backend.write(0, around)
            data = pattern(length)
            changing = bytearray(data)
            if not backend.begin_write(offset, memoryview(changing), end):
                await expect(backend, around, (offset, length))
                continue
            changing[:] = bytes(length)
            assert not told
            await ended.wait()
            assert told == [None]
            expected = around[:offset] + data + around[offset + length :]
            await expect(backend, expected, (offset, length))

    async def test_what_was_read_does_not_change(self, backend: Backend) -> None:
        await backend.write(0, pattern(64 * KIB, 1))
        before = await backend.read(0, 64 * KIB)
        await backend.write(0, pattern(64 * KIB, 2))
        assert bytes(before) == pattern(64 * KIB, 1)

    async def test_a_durable_write_is_read_from_the_storage(self, backend: Backend) -> None:
        data = pattern(100_000)
        await backend.write(4097, data, fua=True)
        assert bytes(await backend.read_stored(4097, len(data))) == data

    async def test_flushed_writes_are_read_from_the_storage(self, backend: Backend) -> None:
        for offset, length in self.RANGES:
            await backend.write_zeroes(0, SIZE)
            data = pattern(length)
            await backend.write(offset, data)
            await backend.flush()
            assert bytes(await backend.read_stored(offset, length)) == data

    async def test_fast_zeroes_are_fast_or_refused_at_once(self, backend: Backend) -> None:
        data = pattern(MIB)
        await backend.write(0, data)
        if backend.capabilities.fast_zeroes:
            await backend.write_zeroes(0, MIB, fast=True)
            data = bytes(MIB)
        else:
            with pytest.raises(OSError) as caught:  # noqa: PT011
                await backend.write_zeroes(0, MIB, fast=True)
            assert caught.value.errno == errno.ENOTSUP
        assert bytes(await backend.read(0, MIB)) == data

    async def test_extents_cover_a_range_and_never_hide_data(self, backend: Backend) -> None:
        await backend.write(2 * MIB, pattern(MIB))
        await backend.write(5 * MIB + 100, pattern(100))
        at = 1000
        while at < SIZE:
            extents = await backend.extents(at, SIZE - at)
            assert extents
            for extent in extents:
                assert extent.offset == at
                assert extent.length > 0
                if extent.status is not Status.DATA:
                    content = bytes(await backend.read(extent.offset, extent.length))
                    assert content == bytes(extent.length)
                at = extent.end
        assert at == SIZE

    async def test_neighbours_written_at_once_all_arrive(self, backend: Backend) -> None:
        step = 777  # several in a block, some across two
        data = pattern(64 * step)
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(
                *(
                    backend.write(5 + at, data[at : at + step], fua=at % (16 * step) == 0)
                    for at in range(0, len(data), step)
                )
            )
        assert bytes(await backend.read(5, len(data))) == data

    async def test_parts_and_whole_blocks_written_at_once_all_arrive(
        self, backend: Backend
    ) -> None:
        data = pattern(MIB)
        pieces = []
        at = 0
        chance = random.Random(3)
        while at < MIB:
            length = min(MIB - at, chance.choice((512, 4096, 100, 8192, 3996)))
            pieces.append((at, data[at : at + length]))
            at += length
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(backend.write(at, piece) for at, piece in pieces))
        assert bytes(await backend.read(0, MIB)) == data

    async def test_many_reads_at_once(self, backend: Backend) -> None:
        data = pattern(MIB)
        await backend.write(0, data)
        await backend.flush()
        chance = random.Random(5)
        ranges = [(chance.randrange(MIB - 9000), chance.randrange(1, 9000)) for _ in range(600)]
        async with asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(
                *(backend.read_stored(at, length) for at, length in ranges)
            )
        for (at, length), answer in zip(ranges, answers, strict=True):
            assert bytes(answer) == data[at : at + length]

    async def test_a_cancelled_write_is_whole_or_was_not_begun(self, backend: Backend) -> None:
        """The buffer may be used again at once: an abandoned write has what it needs."""
        lengths = (1, 4096, 5000, MIB, 2 * MIB + 3)
        for length in lengths:
            await backend.write(0, bytes(3 * MIB))
            data = bytearray(pattern(length))
            task = asyncio.create_task(backend.write(10, data))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            data[:] = b"\xff" * length
            await backend.flush()
            await backend.write(SIZE - 1, b"x")  # something after it
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    found = bytes(await backend.read(10, length))
                    if found in (pattern(length), bytes(length)):
                        break

    async def test_cancelled_reads_do_no_harm(self, backend: Backend) -> None:
        data = pattern(4 * MIB)
        await backend.write(0, data)
        await backend.flush()
        tasks = [
            asyncio.create_task(backend.read_stored(at * 4096, 4096 * (1 + at % 3)))
            for at in range(500)
        ]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        async with asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        for at, answer in enumerate(answers):
            if isinstance(answer, asyncio.CancelledError):
                continue
            assert not isinstance(answer, BaseException)
            assert bytes(answer) == data[at * 4096 :][: 4096 * (1 + at % 3)]
        assert bytes(await backend.read_stored(0, 4 * MIB)) == data

    async def test_closing_waits_for_abandoned_operations(self, backend: Backend) -> None:
        tasks = [asyncio.create_task(backend.write(at * 65536, bytes(9000))) for at in range(100)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        begun: list[OSError | None] = []
        expected = sum(
            backend.begin_write(at * 65536, bytes(9000), begun.append) for at in range(100)
        )
        async with asyncio.timeout(DEADLINE_S):
            await backend.close()
            assert begun == [None] * expected
            await backend.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    @pytest.mark.parametrize("length", [4096, 5000, 65536, MIB, 3 * MIB + 17])
    async def test_what_is_moved_once_is_like_any_other(
        self, backend: Backend, length: int
    ) -> None:
        data = pattern(length, length)
        await backend.write(0, pattern(8 * MIB))
        await backend.write_once(4096, data)
        assert bytes(await backend.read_once(4096, length)) == data
        await backend.flush()
        assert bytes(await backend.read_stored(4096, length)) == data
        assert bytes(await backend.read_once(0, 4096)) == pattern(8 * MIB)[:4096]

    async def test_hints_and_checks_do_nothing_visible(self, backend: Backend) -> None:
        data = pattern(MIB)
        await backend.write(0, data)
        backend.forget_cache(0, MIB)
        await backend.check_unchanged()
        assert bytes(await backend.read(0, MIB)) == data

    async def test_identity_and_size(self, backend: Backend) -> None:
        assert backend.size == backend.identity.size == SIZE
        assert backend.identity.same_object(backend.identity)
