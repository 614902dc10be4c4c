"""Block devices: refusals, limits, release and wipe. Needs root and loop devices."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB, Status
from mirrord.errors import RefusedError
from mirrord.storage.backend import Cache
from mirrord.storage.block import BlockPlace
from mirrord.storage.file_place import FilePlace
from mirrord.storage.memory import open_memory
from tests.storage.conformance import pattern
from tests.storage.places import SYSTEMS, content_of, fill, loop_device, make_file, run, unmount

JOB = "6f1c6d0e-52f5-4d17-8d0d-24a6c1a7f002"
SIZE = 4 * MIB

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


async def test_a_disk_smaller_than_its_device(device, some_io) -> None:
    backend = await BlockPlace(device, some_io, size=MIB).open()
    assert backend.size == MIB
    await backend.close()
    error = await refusal_of(BlockPlace(device, some_io, size=SIZE + 1).open())
    assert error.code == "target-too-small"


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
