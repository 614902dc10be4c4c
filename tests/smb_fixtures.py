"""Fixtures that give a test a Samba or a realm, for the conftest.py of folders to import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.kdc import Kdc
from tests.samba import Samba


@pytest.fixture(scope="session")
def samba() -> Iterator[Samba]:
    """One server for many tests: signed, encryption allowed, multichannel. Not to be killed."""
    server = Samba()
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def make_samba() -> Iterator[Callable[..., Samba]]:
    """Start servers, with the options of `Samba`, that end with the test."""
    made: list[Samba] = []

    def make(**options: Any) -> Samba:
        made.append(Samba(**options))
        return made[-1].start()

    yield make
    for one in made:
        one.close()


@pytest.fixture
def kdc() -> Iterator[Kdc]:
    """Start a Kerberos realm of its own for the test."""
    one = Kdc()
    try:
        yield one.start()
    finally:
        one.close()
