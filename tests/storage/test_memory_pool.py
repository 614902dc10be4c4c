"""Memory for the kernel: who may change it, where it lies, when it is copied."""

from __future__ import annotations

import os

import pytest

from mirrord.core.geometry import KIB, MIB
from mirrord.storage.fileio import FileIo
from mirrord.storage.memory_pool import (
    PAGE_BYTES,
    POOLED_READ_BYTES_MAX,
    aligned_address,
    constant,
    constant_address,
    new_aligned,
    writable,
)
from tests.storage.conformance import pattern
from tests.storage.places import make_file


@pytest.mark.parametrize("length", [1, 4096, POOLED_READ_BYTES_MAX + 1, MIB, 4 * MIB + 5])
def test_new_memory_is_filled_by_address_and_read_only(length) -> None:
    data, address = new_aligned(length)
    writable(address, length)[:] = pattern(length)
    assert bytes(data) == pattern(length)
    assert memoryview(data).readonly
    assert constant(data) is data
    assert constant_address(data) == address
    if length > POOLED_READ_BYTES_MAX:
        assert address % PAGE_BYTES == 0
        assert aligned_address(data) == address


def test_what_can_change_is_copied() -> None:
    changing = bytearray(b"before")
    for data in (changing, memoryview(changing), memoryview(changing).toreadonly()):
        copy = constant(data)
        assert type(copy) is bytes
    changing[:] = b"after!"
    assert copy == b"before"


def test_a_part_of_constant_data_is_not_copied() -> None:
    whole = pattern(1000)
    part = memoryview(whole)[100:200]
    assert constant(part) is part
    assert constant_address(part) == constant_address(whole) + 100
    assert constant(memoryview(whole)[::2]) == whole[::2]
    assert type(constant(memoryview(whole)[::2])) is bytes


def test_only_large_aligned_constant_data_goes_as_it_is() -> None:
    data, address = new_aligned(MIB)
    view = memoryview(data)
    assert aligned_address(view[PAGE_BYTES:]) == address + PAGE_BYTES
    for other in (
        view[512:],
        view[: 4 * KIB],
        view[::2],
        bytes(MIB),
        bytearray(MIB),
        memoryview(bytearray(MIB)),
    ):
        assert aligned_address(other) == 0


async def test_what_was_read_directly_is_written_without_the_pool(
    io: FileIo, tmp_path, monkeypatch
) -> None:
    content = pattern(4 * MIB)
    source, target = (
        os.open(make_file(tmp_path / name, data), os.O_RDWR | os.O_DIRECT)
        for name, data in (("source", content), ("target", bytes(4 * MIB)))
    )
    monkeypatch.setattr(io.pool, "take", None)  # whoever wants a slot fails
    data = await io.read_direct(source, 0, 4 * MIB)
    await io.write_direct(target, 0, data, dsync=False)
    monkeypatch.undo()
    assert bytes(await io.read_direct(target, 0, 4 * MIB)) == content
    os.close(source)
    os.close(target)
