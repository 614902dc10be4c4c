"""What simulated kills leave behind is nobody else's."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """Collect coroutines that a simulated kill left before their first step.

    Else they are collected, with a warning each, in the middle of some other test.
    """
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        gc.collect()
