"""Memory is no place for a disk that survives a reboot where it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from mirrord.errors import RefusedError
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import FileIo
from tests.helpers import require_root
from tests.storage.places import make_file, mounted

SIZE = MIB


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs."""
    require_root()
    with mounted("tmpfs", tmp_path) as where:
        yield where


async def refusal(disk: Path, target: Path, io: FileIo, *, force: bool, needed: int) -> str:
    """Return the code with which a target is refused, "" where it isn't."""
    source = await FilePlace(str(disk), io).open()
    try:
        await FilePlace(str(target), io).check_target(source, needed=needed, force=force)
    except RefusedError as error:
        return error.code if "reboot" in str(error) else str(error)
    finally:
        await source.close()
    return ""


@pytest.mark.root
async def test_a_disk_does_not_go_where_a_reboot_deletes_it(
    tmp_path: Path, memory: Path, some_io: FileIo
) -> None:
    disk, target = make_file(tmp_path / "disk.raw", b"x" * SIZE), memory / "target.raw"
    assert await refusal(disk, target, some_io, force=False, needed=SIZE) == "volatile-place"
    assert await refusal(disk, target, some_io, force=False, needed=1 << 50) == "no-space"
    assert not await refusal(disk, target, some_io, force=True, needed=1 << 50)


@pytest.mark.root
async def test_a_disk_in_memory_may_stay_there(memory: Path, some_io: FileIo) -> None:
    disk = make_file(memory / "disk.raw", b"x" * SIZE)
    assert not await refusal(disk, memory / "target.raw", some_io, force=False, needed=SIZE)
