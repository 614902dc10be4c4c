"""Benches for the engine's tests: on real files, and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mirrord.storage.fileio import open_io
from tests.engine.crashes import CrashBench


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[CrashBench]:
    """A disk in memory, whose job has real files."""
    made = CrashBench(tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def on_files(tmp_path: Path) -> AsyncIterator[CrashBench]:
    """A disk, a target and a job, all of them real files."""
    io = open_io()
    made = CrashBench(tmp_path, io=io)
    yield made
    await made.close()
    await io.close()
