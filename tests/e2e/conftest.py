"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.hostile import Attacked


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """Serve a disk that hostile clients abuse, with the limits that everybody has."""
    one = Attacked(tmp_path_factory.mktemp("attacked"))
    yield one
    one.close()
