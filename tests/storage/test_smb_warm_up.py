"""A server's process keeps the memory of its requests: their pages are not made anew each time."""

from __future__ import annotations

import asyncio

from mirrord.core.geometry import MIB
from mirrord.smb import wire
from mirrord.smb.lanes import Request
from mirrord.storage.smb.file import BEYOND_ANY_FILE, WARM_UP_BYTES
from mirrord.storage.steady import SteadyBackend
from tests.samba import Samba
from tests.storage.shares import Client
from tests.storage.shares import client as client
from tests.storage.shares import make_client as make_client

SIZE = 64 * MIB
DEPTH = 4
# Without a first large read they are 150, each time that the heap's end happens to be free.
FAULTS_A_REQUEST_MAX = 8


async def write_all(backend: SteadyBackend) -> None:
    """Write the disk in requests of 1 MiB, some at a time."""
    data = bytes(MIB)

    async def work(first: int) -> None:
        for offset in range(first * MIB, SIZE, DEPTH * MIB):
            await backend.write(offset, data)

    await asyncio.gather(*(work(number) for number in range(DEPTH)))


async def test_requests_of_a_server_find_their_memory_warm(samba: Samba, client: Client) -> None:
    before = set(samba.children())
    backend = await client.create("warm.raw", SIZE, authoritative=True)
    [child] = set(samba.children()) - before
    await write_all(backend)
    faults = samba.page_faults(child)
    await write_all(backend)
    assert samba.page_faults(child) - faults < FAULTS_A_REQUEST_MAX * SIZE // MIB


async def test_it_is_not_asked_for_where_the_credits_are_not_there(
    samba: Samba, client: Client
) -> None:
    backend = await client.create("cold.raw", SIZE, authoritative=True)
    session = await client.session()
    [seat] = session._seats
    asked: list[Request] = []
    seat.line.submit = asked.append  # type: ignore[method-assign]
    file = backend._tie.file
    assert file is not None
    file.warm_up()  # type: ignore[attr-defined]
    assert [(r.command, r.payload_bytes) for r in asked] == [(wire.READ, WARM_UP_BYTES)]
    assert BEYOND_ANY_FILE.to_bytes(8, "little") in asked[0].body
    seat.line.channel._low = seat.line.channel._high - 100
    file.warm_up()  # type: ignore[attr-defined]
    assert len(asked) == 1
