"""The conformance suite against a share: both paths, both ways of living, signed and encrypted."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from mirrord.storage.backend import Backend
from tests.samba import Samba
from tests.storage.conformance import SIZE, BackendConformance, expect
from tests.storage.shares import MakeClient
from tests.storage.shares import make_client as make_client
from tests.storage.shares import nobodys as nobodys

_numbers = itertools.count()


class Way(NamedTuple):
    """How the disk is used."""

    fast: bool
    authoritative: bool
    encrypt: bool
    user: str

    def __str__(self) -> str:
        return "-".join((
            "fast" if self.fast else "plain", "authority" if self.authoritative else "target",
            "encrypted" if self.encrypt else "signed", self.user,
        ))  # fmt: skip


USERS = ("oneself", "nobody")
EVERY = [
    Way(*flags, user)
    for *flags, user in itertools.product((True, False), (True, False), (True, False), USERS)
]
WHOLE = [
    Way(True, True, True, "oneself"),
    Way(True, False, False, "nobody"),
    Way(False, False, True, "oneself"),
]


@pytest.fixture
async def backend(
    request: pytest.FixtureRequest, way: Way, make_client: MakeClient
) -> AsyncIterator[Backend]:
    """A disk of zeroes behind a share."""
    server: Samba = request.getfixturevalue("nobodys" if way.user == "nobody" else "samba")
    name = f"conformance-{next(_numbers)}.raw"
    file = server.put(name, b"", SIZE)
    client = make_client(server, fast=way.fast, encrypt=way.encrypt)
    yield await client.open(name, authoritative=way.authoritative)
    file.unlink()


class TestShare(BackendConformance):
    """All of it."""

    @pytest.fixture(params=WHOLE, ids=str)
    def way(self, request: pytest.FixtureRequest) -> Way:
        found: Way = request.param
        return found


@pytest.mark.parametrize("way", [way for way in EVERY if way not in WHOLE], ids=str)
async def test_the_other_ways_are_no_different(backend: Backend) -> None:
    suite = BackendConformance()
    await suite.test_a_new_disk_reads_as_zeroes(backend)
    await suite.test_a_durable_write_is_read_from_the_storage(backend)
    await suite.test_parts_and_whole_blocks_written_at_once_all_arrive(backend)
    await backend.write_zeroes(0, SIZE)
    await expect(backend, bytes(SIZE), "zeroes")
    await suite.test_extents_cover_a_range_and_never_hide_data(backend)
    await suite.test_fast_zeroes_are_fast_or_refused_at_once(backend)
    await suite.test_identity_and_size(backend)
