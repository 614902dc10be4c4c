"""Connections that die in the middle of a step: nothing is left behind, nothing is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from mirrord.core.geometry import KIB, MIB
from mirrord.errors import ProtocolError, RefusedError
from mirrord.smb import wire
from mirrord.storage.backend import Cache
from mirrord.storage.memory import open_memory
from tests.helpers import eventually_async
from tests.samba import Samba
from tests.shares import leftovers
from tests.storage.conformance import pattern
from tests.storage.shares import DEADLINE_S, JOB, QUICK, MakeClient, until_away
from tests.storage.shares import make_client as make_client
from tests.tcp_proxy import Proxy


async def test_all_who_ask_for_a_share_at_once_have_one_tree(
    samba: Samba, make_client: MakeClient
) -> None:
    """A file opened through one of two trees is unknown to a request that names the other."""
    session = await make_client(samba).session()
    trees = await asyncio.gather(*(session.tree("disks") for _ in range(4)))
    assert len({tree.tree_id for tree in trees}) == 1


@pytest.mark.parametrize("count", range(400, 4000, 450))
async def test_a_target_that_could_not_be_made_leaves_nothing(
    samba: Samba, make_client: MakeClient, expect_log: Callable[..., None], count: int
) -> None:
    expect_log("connection lost", "connected again")
    folder = samba.file(f"losses-{count}")
    folder.mkdir(exist_ok=True)
    with Proxy(samba.port) as proxy:
        client = make_client(samba, port=proxy.port, line=QUICK)
        place = client.place(f"losses-{count}/disk.raw")
        source = open_memory(MIB)
        await place.check_target(source, needed=0)
        proxy.cut_after(count, "to_server")
        try:
            client.mine(await place.create(JOB, source, cache=Cache.WRITEBACK))
        except (RefusedError, OSError):
            assert leftovers(folder) == []
        else:  # it was over before
            await place.discard(JOB)
            assert leftovers(folder) == []


@pytest.fixture
def server(make_samba: Callable[..., Samba]) -> Samba:
    """A server of this test's own, with a disk."""
    one = make_samba()
    one.put("disk.raw", pattern(MIB))
    return one


async def test_rights_that_were_taken_away_for_a_while(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None]
) -> None:
    """Samba asks once a connection who may write."""
    expect_log("connection lost", "connected again")
    backend = await make_client(server, line=QUICK).open(authoritative=True)
    server.reconfigure(share_lines=["read only = yes"])
    server.kill_child()
    await eventually_async(
        lambda: "ACCESS_DENIED" in str(backend.reason), DEADLINE_S, "it may not be opened"
    )
    server.reconfigure(share_lines=["read only = no"])
    async with asyncio.timeout(DEADLINE_S):
        await backend.write(0, b"well again")
    assert bytes(await backend.read(0, 10)) == b"well again"


async def test_whether_the_file_still_has_its_name(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None]
) -> None:
    expect_log("connection lost", "connected again")
    backend = await make_client(server, line=QUICK).open(authoritative=True)
    file = server.file("disk.raw")
    assert await backend.has_its_name()
    file.rename(file.with_name("elsewhere.raw"))
    assert not await backend.has_its_name()
    server.put("disk.raw", pattern(MIB))
    assert not await backend.has_its_name()
    file.with_name("elsewhere.raw").rename(file)
    assert await backend.has_its_name()
    server.kill_all()
    await until_away(backend)
    assert await backend.has_its_name()  # as far as is known


@pytest.mark.parametrize("parse", ["write_reply", "empty_reply", "ioctl_reply", "parse_ranges"])
async def test_an_answer_that_is_sealed_well_and_makes_no_sense(
    server: Samba,
    make_client: MakeClient,
    expect_log: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    parse: str,
) -> None:
    """It ends the connection, as any other breach of the protocol does; the guest only waits."""
    expect_log("connection lost", "connected again")
    backend = await make_client(server, line=QUICK).open(authoritative=True)
    good, seen = getattr(wire, parse), 0

    def once(*args: object) -> object:
        nonlocal seen
        seen += 1
        if seen == 1:
            raise ProtocolError("a reply says 0 where 17 belongs")
        return good(*args)

    await backend.flush()
    monkeypatch.setattr(wire, parse, once)
    await backend.write(0, b"there")
    await backend.write_zeroes(64 * KIB, 64 * KIB)
    await backend.flush()
    await backend.extents(0, MIB)
    assert seen > 1
    assert bytes(await backend.read(0, 5)) == b"there"
    assert backend.facts()["state"] == "connected"
