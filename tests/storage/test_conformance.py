"""The conformance suite against every backend that this machine can have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mirrord.storage.backend import Backend, Cache
from mirrord.storage.block import BlockPlace
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import FileIo
from mirrord.storage.memory import open_memory
from tests.storage.conformance import SIZE, BackendConformance
from tests.storage.places import loop_device, make_file


class TestMemory(BackendConformance):
    """Memory."""

    @pytest.fixture
    def backend(self) -> Backend:
        return open_memory(SIZE)


class TestFile(BackendConformance):
    """A file, through the page cache and past it, by io_uring and by threads."""

    @pytest.fixture(params=list(Cache), ids=lambda cache: cache.value)
    async def backend(
        self, request: pytest.FixtureRequest, io: FileIo, tmp_path: Path
    ) -> AsyncIterator[Backend]:
        path = make_file(tmp_path / "disk.raw", b"", SIZE)
        opened = await FilePlace(str(path), io).open(cache=request.param)
        yield opened
        await opened.close()


class TestInlineFile(BackendConformance):
    """A file whose small writes may block, as on the authoritative side."""

    @pytest.fixture
    async def backend(self, some_io: FileIo, tmp_path: Path) -> AsyncIterator[Backend]:
        path = make_file(tmp_path / "disk.raw", b"", SIZE)
        opened = await FilePlace(str(path), some_io).open()
        opened.authoritative = True
        yield opened
        await opened.close()


@pytest.mark.root
class TestBlock(BackendConformance):
    """A block device of 512 or of 4096 byte blocks."""

    @pytest.fixture(params=[512, 4096])
    def sector_bytes(self, request: pytest.FixtureRequest) -> int:
        return int(request.param)

    @pytest.fixture(params=list(Cache), ids=lambda cache: cache.value)
    async def backend(
        self, request: pytest.FixtureRequest, some_io: FileIo, tmp_path: Path, sector_bytes: int
    ) -> AsyncIterator[Backend]:
        with loop_device(tmp_path, SIZE, sector_bytes) as device:
            opened = await BlockPlace(device, some_io).open(cache=request.param)
            yield opened
            await opened.close()
