"""Connections that die in the middle of a step: nothing is left behind, nothing is done twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirrord.core.geometry import KIB, MIB
from mirrord.errors import ProtocolError, RefusedError
from mirrord.smb import wire
from mirrord.storage.backend import Cache
from mirrord.storage.memory import open_memory
from mirrord.storage.smb import control, door
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


async def test_a_target_that_may_not_be_opened_is_not_the_sources_trouble(
    make_samba: Callable[..., Samba],
    make_client: MakeClient,
    expect_log: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Both are files of one session, on two shares; the rights of one are taken away."""
    expect_log("connection lost", "connected again")
    tmp_path.chmod(0o755)  # noqa: ASYNC240
    shares = {name: tmp_path / name for name in ("disks", "other")}
    for folder in shares.values():
        folder.mkdir()
    server = make_samba(shares=shares)
    server.put("disk.raw", pattern(MIB))
    client = make_client(server, line=QUICK)
    source = await client.open(authoritative=True)
    place, memory = client.place("target.raw", "other"), open_memory(MIB)
    target = client.mine(await place.create(JOB, memory, cache=Cache.WRITEBACK))
    server.reconfigure(share_lines={"other": ["read only = yes"]})
    server.kill_child()
    await eventually_async(lambda: "ACCESS_DENIED" in str(target.reason), DEADLINE_S, "refused")
    await source.write(0, b"well")
    life, refusals = source._tie.life, 0
    while refusals < 3:
        target._tie.reason = None
        await eventually_async(lambda: "ACCESS_DENIED" in str(target.reason), DEADLINE_S, "again")
        await source.write(0, b"well")
        refusals += 1
    assert source._tie.life == life
    trees = (await client.session())._session.tree_connect_table
    await eventually_async(lambda: len(trees) == 2, DEADLINE_S, "an attempt's tree is left again")

    server.reconfigure(share_lines={"other": ["read only = no"]})
    await eventually_async(lambda: target.facts()["state"] == "connected", DEADLINE_S, "it is back")
    assert source._tie.life == life


async def test_a_look_that_is_given_up_leaves_nothing_open(
    server: Samba, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(server, line=QUICK)
    backend = await client.open(authoritative=True)
    real, entered, going_on = control.open_handle, threading.Event(), threading.Event()

    def slow(*args: Any, **keys: Any) -> Any:
        entered.set()
        assert going_on.wait(DEADLINE_S)
        return real(*args, **keys)

    monkeypatch.setattr(control, "open_handle", slow)
    looking = asyncio.create_task(backend.has_its_name())
    await asyncio.to_thread(entered.wait, DEADLINE_S)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    users = client.server.users
    going_on.set()
    await eventually_async(lambda: client.server.users == users - 1, what="the look has ended")
    monkeypatch.setattr(control, "open_handle", real)
    identity, place = backend.identity, client.place("disk.raw")
    await backend.close()
    assert await place.retire(JOB, identity) is None
    await place.delete_retired(JOB, identity)
    assert list(server.folder().iterdir()) == []


async def test_an_open_that_hangs_is_not_the_sources_trouble(
    server: Samba,
    make_client: MakeClient,
    expect_log: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another client has to give something back first, say; the source's session is well."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    source = await client.open(authoritative=True)
    place, memory = client.place("target.raw"), open_memory(MIB)
    target = client.mine(await place.create(JOB, memory, cache=Cache.WRITEBACK))
    real, tries = door.open_file, 0

    async def slow(served: Any, desk: Any, path: str, **keys: Any) -> Any:
        nonlocal tries
        if path != "disk.raw":
            tries += 1
            await asyncio.Event().wait()
        return await real(served, desk, path, **keys)

    async def not_kept(self: door.ShareDoor, *args: Any) -> None:
        return None

    monkeypatch.setattr(door, "OPEN_S", 0.1)
    monkeypatch.setattr(door, "open_file", slow)
    monkeypatch.setattr(door.ShareDoor, "_take_over", not_kept)
    server.kill_child()
    await until_away(target)
    await source.write(0, b"well")
    life, before = source._tie.life, tries
    await eventually_async(lambda: tries > before + 2, DEADLINE_S, "some attempts")
    await source.write(0, b"well")
    assert source._tie.life == life
    assert "takes longer than" in str(target.reason)


async def test_a_file_is_looked_for_under_both_names_by_a_tree_of_its_own(
    server: Samba,
    make_client: MakeClient,
    expect_log: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was refused, and was being renamed: the name that isn't there doesn't end the attempt."""
    expect_log("connection lost", "connected again")
    backend = await make_client(server, line=QUICK).open(authoritative=True)
    entrance = backend.door
    assert isinstance(entrance, door.ShareDoor)
    entrance.paths, entrance._refused = ["elsewhere.raw", "disk.raw"], True
    backend.connected().handle.durable = False  # type: ignore[attr-defined]
    real, asked = door.open_file, list[str]()

    async def noted(served: Any, desk: Any, path: str, **keys: Any) -> Any:
        asked.append(path)
        return await real(served, desk, path, **keys)

    monkeypatch.setattr(door, "open_file", noted)
    server.kill_child()
    await until_away(backend)
    async with asyncio.timeout(DEADLINE_S):
        await backend.write(0, b"found")
    assert asked.count("elsewhere.raw") == 1, asked
    assert server.file("disk.raw").read_bytes()[:5] == b"found"
