"""Block devices: refusals, limits, release and wipe. Needs root and loop devices."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB, Status
from mirrord.errors import RefusedError
from mirrord.storage import block, durable
from mirrord.storage.backend import Cache
from mirrord.storage.block import BlockPlace
from mirrord.storage.file_place import FilePlace
from mirrord.storage.memory import open_memory
from tests.storage.conformance import pattern
from tests.storage.places import (
    SYSTEMS,
    content_of,
    fill,
    loop_device,
    make_file,
    open_names,
    run,
    unmount,
)

JOB = "6f1c6d0e-52f5-4d17-8d0d-24a6c1a7f002"
SIZE = 4 * MIB
DEADLINE_S = 30

pytestmark = pytest.mark.root


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A block device."""
    with loop_device(tmp_path, SIZE) as made:
        yield made


async def refusal_of(awaitable) -> RefusedError:
    """Return the refusal, which has to be one line."""
    with pytest.raises(RefusedError) as caught:
        await awaitable
    assert "\n" not in str(caught.value)
    return caught.value


async def test_a_device_is_opened_once(device, some_io) -> None:
    backend = await BlockPlace(device, some_io).open()
    assert backend.size == SIZE
    assert backend.identity.kind == "block"
    assert backend.name == device.removeprefix("/dev/")
    assert not backend.capabilities.starts_zeroed
    assert [e.status for e in await backend.extents(0, SIZE)] == [Status.DATA]
    await backend.check_unchanged()
    error = await refusal_of(BlockPlace(device, some_io).open(read_only=True))
    assert error.code == "in-use"
    await backend.close()
    await (await BlockPlace(device, some_io).open(cache=Cache.DIRECT)).close()


async def test_a_link_to_a_device_keeps_its_name(device, some_io, tmp_path) -> None:
    link = tmp_path / "by-id"
    link.symlink_to(device)
    place = BlockPlace(str(link), some_io)
    backend = await place.open()
    assert place.location == str(link)
    assert backend.name == "by-id"
    await backend.close()


async def test_what_is_no_device_is_refused(some_io, tmp_path) -> None:
    for location, code in (
        (make_file(tmp_path / "file", b"x"), "not-a-disk"),
        ("/dev/null", "not-a-disk"),
        ("/dev/no-such-device", "location-missing"),
    ):
        assert (await refusal_of(BlockPlace(str(location), some_io).open())).code == code


async def test_a_mounted_device_is_in_use(some_io, tmp_path) -> None:
    program, options, size = SYSTEMS["ext4"]
    with loop_device(tmp_path, size) as device:
        run(program, *options, device)
        where = tmp_path / "mount"
        where.mkdir()
        run("mount", device, str(where))
        try:
            assert (await refusal_of(BlockPlace(device, some_io).open())).code == "in-use"
            place = BlockPlace(device, some_io)
            check = place.check_target(open_memory(4096), needed=4096)
            assert (await refusal_of(check)).code == "in-use"
            source = await FilePlace(str(make_file(where / "disk", b"x" * 4096)), some_io).open()
            error = await refusal_of(place.check_target(source, needed=4096))
            assert error.code == "target-is-source"
            assert "file system" in str(error)
            await source.close()
        finally:
            unmount(where)


@pytest.mark.parametrize("source_kind", ["device", "file"])
async def test_the_source_under_another_name_is_no_target(
    tmp_path, some_io, source_kind: str
) -> None:
    """Two paths to the same bytes: copied onto itself, then wiped, nothing would be left."""
    backing = make_file(tmp_path / "disk", pattern(SIZE))
    first, second = (run("losetup", "--find", "--show", str(backing)) for _ in range(2))
    place = BlockPlace(first, some_io) if source_kind == "device" else FilePlace(
        str(backing), some_io
    )  # fmt: skip
    try:
        source = await place.open()
        error = await refusal_of(BlockPlace(second, some_io).check_target(source, needed=0))
        assert error.code == "target-is-source"
        await source.close()
    finally:
        run("losetup", "--detach", first)
        run("losetup", "--detach", second)


async def test_the_source_and_too_small_devices_are_no_targets(device, some_io) -> None:
    place = BlockPlace(device, some_io)
    error = await refusal_of(place.check_target(open_memory(SIZE + 1), needed=0))
    assert error.code == "target-too-small"
    assert str(SIZE + 1) in str(error)
    source = await place.open()
    error = await refusal_of(BlockPlace(device, some_io).check_target(source, needed=0))
    assert error.code == "target-is-source"
    await source.close()


@pytest.mark.parametrize("cache", list(Cache))
@pytest.mark.parametrize("size", [SIZE, SIZE - 1, MIB + 513])
async def test_a_target_is_the_disk_and_no_byte_more(device, some_io, cache, size) -> None:
    before = pattern(SIZE, 5)
    fill(device, before)
    place = BlockPlace(device, some_io)
    source = open_memory(size)
    await place.check_target(source, needed=size)
    target = await place.create(JOB, source, cache=cache)
    assert target.size == size
    await target.write(0, pattern(size))
    await target.write_zeroes(size - 5000, 5000)
    await target.write(size - 1, b"!", fua=True)
    await place.publish(JOB)
    await place.withdraw(JOB)
    identity = target.identity
    assert await place.confirm(JOB, identity) is None
    expected = pattern(size)[: size - 5000] + bytes(4999) + b"!"
    assert bytes(await target.read_stored(0, size)) == expected
    await target.close()
    found = await place.find(JOB, identity, cache=cache)
    assert found is not None
    assert bytes(await found.read(0, size)) == expected
    await found.close()
    await place.discard(JOB)
    assert content_of(device) == expected + before[size:]


async def test_a_shrunken_or_missing_device_is_not_found(device, some_io, tmp_path) -> None:
    place = BlockPlace(device, some_io)
    target = await place.create(JOB, open_memory(SIZE), cache=Cache.WRITEBACK)
    identity = target.identity
    backing = next(tmp_path.glob("backing-*"))
    with backing.open("r+b") as file:
        file.truncate(SIZE // 2)
    run("losetup", "--set-capacity", device)
    with pytest.raises(OSError, match="shrank") as caught:
        await target.check_unchanged()
    assert caught.value.errno == errno.ESTALE
    assert "another device" in (await place.confirm(JOB, identity) or "")
    await target.close()
    assert await place.find(JOB, identity, cache=Cache.WRITEBACK) is None
    gone = BlockPlace("/dev/no-such-device", some_io)
    assert await gone.find(JOB, identity, cache=Cache.WRITEBACK) is None
    assert "doesn't exist" in (await gone.confirm(JOB, identity) or "")


@pytest.mark.parametrize("cache", list(Cache))
@pytest.mark.parametrize("size", [MIB, MIB - 513])
async def test_a_disk_smaller_than_its_device(device, some_io, tmp_path, cache, size) -> None:
    """It has its own size in everything; the device's may change down to that."""
    before = pattern(SIZE, 5)
    fill(device, before)
    backend = await BlockPlace(device, some_io, size=size).open(cache=cache)
    assert backend.size == backend.identity.size == size
    extents = await backend.extents(1000, size - 1000)
    assert [(e.offset, e.length, e.status) for e in extents] == [(1000, size - 1000, Status.DATA)]
    await backend.write_zeroes(size - 9000, 9000)
    await backend.trim(0, size - 9000)
    await backend.write_zeroes(0, size, punch=False, fua=True)
    assert not any(await backend.read_stored(0, size))
    backing = next(tmp_path.glob("backing-*"))
    assert backing.read_bytes() == bytes(size) + before[size:]
    for changed, fits in ((SIZE + MIB, True), (MIB, True), (MIB - 4096, False)):
        os.truncate(backing, changed)
        run("losetup", "--set-capacity", device)
        if fits:
            await backend.check_unchanged()
            continue
        with pytest.raises(OSError, match="shrank") as caught:
            await backend.check_unchanged()
        assert caught.value.errno == errno.ESTALE
    await backend.close()


async def test_a_disk_larger_than_its_device_is_refused(device, some_io) -> None:
    error = await refusal_of(BlockPlace(device, some_io, size=SIZE + 1).open())
    assert error.code == "target-too-small"


class TestWhichDevice:
    """A name may lead to another device after a reboot, or when one is plugged in again."""

    @pytest.fixture
    def name(self, tmp_path: Path, device: str) -> Path:
        """What the operator calls it."""
        name = tmp_path / "names" / "disk"
        name.parent.mkdir()
        name.symlink_to(device)
        return name

    @pytest.fixture
    def other(self, tmp_path: Path) -> Iterator[str]:
        """Another device of that size."""
        (tmp_path / "other").mkdir()
        with loop_device(tmp_path / "other", SIZE) as made:
            yield made

    async def made(self, name, some_io):
        """Return the identity of a target by that name."""
        target = await BlockPlace(str(name), some_io).create(
            JOB, open_memory(MIB), cache=Cache.WRITEBACK
        )
        await target.close()
        return target.identity

    async def is_found(self, name, some_io, identity, *, same_boot) -> bool:
        place = BlockPlace(str(name), some_io)
        found = await place.find(JOB, identity, cache=Cache.WRITEBACK, same_boot=same_boot)
        if found is not None:
            assert found.size == found.identity.size == MIB
            await found.close()
            return True
        again = place.create(JOB, open_memory(MIB), cache=Cache.WRITEBACK)
        assert (await refusal_of(again)).code == "target-lost"
        return False

    @pytest.mark.parametrize("same_boot", [True, False])
    async def test_the_serial_tells(self, name, other, some_io, same_boot) -> None:
        identity = await self.made(name, some_io)
        assert identity.serial
        assert await self.is_found(name, some_io, identity, same_boot=same_boot)
        assert await BlockPlace(str(name), some_io).confirm(JOB, identity) is None
        name.unlink()
        name.symlink_to(other)
        before = content_of(other)
        assert not await self.is_found(name, some_io, identity, same_boot=same_boot)
        place = BlockPlace(str(name), some_io)
        assert "another device" in (await place.confirm(JOB, identity) or "")
        assert "another device" in (await place.retire(JOB, identity, wipe=True) or "")
        assert content_of(other) == before

    async def test_without_a_serial_the_number_tells_on_one_boot(
        self, name, other, some_io, monkeypatch
    ) -> None:
        monkeypatch.setattr(block, "_serial", lambda *_: "")
        identity = await self.made(name, some_io)
        assert await self.is_found(name, some_io, identity, same_boot=True)
        assert not await self.is_found(name, some_io, identity, same_boot=False)
        name.unlink()
        name.symlink_to(other)
        assert not await self.is_found(name, some_io, identity, same_boot=True)

    async def test_without_a_serial_a_lasting_name_tells_over_a_boot(
        self, name, some_io, monkeypatch
    ) -> None:
        monkeypatch.setattr(block, "_serial", lambda *_: "")
        identity = await self.made(name, some_io)
        monkeypatch.setattr(block, "_LASTING_NAMES", (f"{name.parent}/",))
        assert await self.is_found(name, some_io, identity, same_boot=False)

    async def test_one_that_was_claimed_a_moment_longer_is_waited_for(
        self, device, some_io, monkeypatch
    ) -> None:
        holder = await BlockPlace(device, some_io).open()
        pauses = []

        def sleep(pause_s: float) -> None:
            pauses.append(pause_s)
            if len(pauses) == 2:
                os.close(holder._descriptor)
                holder._descriptor = -1

        monkeypatch.setattr(durable.time, "sleep", sleep)
        assert (await refusal_of(BlockPlace(device, some_io).open())).code == "in-use"
        assert not pauses
        place = BlockPlace(device, some_io)
        place.patience_s = durable.LOCK_PATIENCE_S
        await (await place.open()).close()
        assert len(pauses) == 2
        await holder.close()

    async def test_one_that_nobody_waits_for_is_released(
        self, device, some_io, monkeypatch
    ) -> None:
        begun, may_end = threading.Event(), threading.Event()
        real = block.examine_device

        def slow(descriptor: int):
            begun.set()
            may_end.wait(DEADLINE_S)
            return real(descriptor)

        monkeypatch.setattr(block, "examine_device", slow)
        opening = asyncio.create_task(BlockPlace(device, some_io).open())
        assert await some_io.call(begun.wait, DEADLINE_S)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        may_end.set()
        await some_io.settle_calls()
        assert device not in open_names()


async def test_retiring_releases_and_wipes_only_when_asked(device, some_io) -> None:
    before = pattern(SIZE, 5)
    fill(device, before)
    place = BlockPlace(device, some_io, size=SIZE - 4096)
    backend = await place.open()
    identity = backend.identity
    assert "in use" in (await place.retire(JOB, identity, wipe=True) or "")
    await backend.close()
    assert await place.retire(JOB, identity) is None
    await place.delete_retired(JOB, identity)
    assert content_of(device) == before
    assert await place.retire(JOB, identity, wipe=True) is None
    assert content_of(device) == bytes(SIZE - 4096) + before[-4096:]


async def test_another_device_is_not_wiped(device, some_io, tmp_path) -> None:
    fill(device, pattern(SIZE, 5))
    place = BlockPlace(device, some_io)
    with loop_device(tmp_path, MIB) as other:
        backend = await BlockPlace(other, some_io).open()
        reason = await place.retire(JOB, backend.identity, wipe=True)
        await backend.close()
    assert reason is not None
    assert "another device" in reason
    assert content_of(device) == pattern(SIZE, 5)
