"""Fixtures of the storage tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mirrord.storage.fileio import FileIo, open_io
from tests.helpers import require_io_uring
from tests.smb_fixtures import kdc as kdc
from tests.smb_fixtures import make_samba as make_samba
from tests.smb_fixtures import samba as samba
from tests.storage.places import mounted


@pytest.fixture(params=["io_uring", "threads"])
async def io(request: pytest.FixtureRequest) -> AsyncIterator[FileIo]:
    """Both ways to do file operations."""
    if request.param == "io_uring":
        require_io_uring()
    opened = open_io(request.param)
    yield opened
    await opened.close()


@pytest.fixture
async def some_io() -> AsyncIterator[FileIo]:
    """The way that this machine takes, for what doesn't depend on it."""
    opened = open_io()
    yield opened
    await opened.close()


@pytest.fixture(params=["ext4", "xfs", "btrfs", "tmpfs"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A small file system of each kind, and where it is mounted. Needs root."""
    with mounted(request.param, tmp_path) as where:
        yield request.param, where
