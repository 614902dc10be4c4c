"""A control server for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mirrord.control import server
from tests.control.serving import Served, serving


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """Serve a fake at a socket, which doesn't wait for listeners at its end."""
    monkeypatch.setattr(server, "SHUTDOWN_S", 0.1)
    async with serving(tmp_path / "c.sock") as one:
        yield one
