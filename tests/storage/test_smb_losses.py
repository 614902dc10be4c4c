"""Connections that die in the middle of a step: nothing is left behind, nothing is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from mirrord.core.geometry import MIB
from mirrord.errors import RefusedError
from mirrord.storage.backend import Cache
from mirrord.storage.memory import open_memory
from tests.samba import Samba
from tests.shares import leftovers
from tests.storage.shares import JOB, QUICK, MakeClient
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
