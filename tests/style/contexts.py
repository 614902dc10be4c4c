"""A plugin for pytest under coverage: what each test file passes through is told apart."""

from __future__ import annotations

from collections.abc import Iterator

import coverage
import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Count what is run by a test, its fixtures included, as its file's."""
    running = coverage.Coverage.current()
    assert running is not None, "to be used under coverage"
    running.switch_context(item.path.name)
    yield
