"""What is kept on a share through losses: locks, handles, and the names of others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mirrord.core.geometry import MIB
from mirrord.errors import RefusedError
from mirrord.storage.backend import Cache
from mirrord.storage.memory import open_memory
from mirrord.storage.remote import LostError
from mirrord.storage.smb import door
from mirrord.storage.smb.desk import Desk
from mirrord.storage.smb.plain import PlainSession
from tests.helpers import eventually_async
from tests.samba import Samba
from tests.storage.conformance import pattern
from tests.storage.shares import DEADLINE_S, JOB, QUICK, MakeClient, smbclient, until_away
from tests.storage.shares import make_client as make_client
from tests.tcp_proxy import Proxy


@pytest.fixture
def server(make_samba: Callable[..., Samba]) -> Samba:
    one = make_samba()
    one.put("disk.raw", pattern(MIB))
    return one


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("made", [True, False])
async def test_nobody_else_may_open_it(
    server: Samba, make_client: MakeClient, fast: bool, made: bool
) -> None:
    """Where a lease is asked for, its break has to be answered, or the file is anybody's."""
    client = make_client(server, line=QUICK, fast=fast)
    if made:
        place, memory = client.place("target.raw"), open_memory(MIB)
        disk = client.mine(await place.create(JOB, memory, cache=Cache.WRITEBACK))
        await place.publish(JOB)
    else:
        disk = await client.open("disk.raw", authoritative=True)
    name = "target.raw" if made else "disk.raw"
    stranger = make_client(server, line=QUICK)
    with pytest.raises(RefusedError, match="in use by another client"):
        await stranger.open(name)
    told = await asyncio.to_thread(smbclient, server, f"get {name} /dev/null")
    assert "SHARING_VIOLATION" in told
    await disk.write(0, b"well")
    assert disk._tie.life == 0


async def test_a_refusal_of_one_handle_says_nothing_of_others(
    server: Samba,
    make_client: MakeClient,
    expect_log: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A target is asked for under a name that it hasn't got yet; the guest's handle was kept."""
    expect_log("connection lost", "connected again")
    with Proxy(server.port) as proxy:
        client = make_client(server, line=QUICK, port=proxy.port)
        source = await client.open("disk.raw", authoritative=True)
        place, memory = client.place("target.raw"), open_memory(MIB)
        target = client.mine(await place.create(JOB, memory, cache=Cache.WRITEBACK))
        its_door = target.door
        assert isinstance(its_door, door.ShareDoor)
        its_door.paths = ["target.raw", target.connected().path]  # type: ignore[attr-defined]
        real, tried = door.ShareDoor._take_over, []

        async def take_over(self: Any, desk: Any, former: Any, path: str) -> Any:
            if path == "disk.raw" and not tried:
                raise LostError("the target first")
            tried.append(path)
            return await real(self, desk, former, path)

        monkeypatch.setattr(door.ShareDoor, "_take_over", take_over)
        await source.write(0, b"acknowledged")
        proxy.cut()
        await until_away(source)
        await source.write(4096, b"more")
        assert source.connected().kept
        assert bytes(await source.read(0, 12)) == b"acknowledged"
        await eventually_async(lambda: target.facts()["state"] == "connected", DEADLINE_S, "back")


async def test_a_repeated_discard_leaves_what_has_the_name_by_then(
    server: Samba, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without births an inode and a size are all that is known, and both are used again."""
    server.reconfigure(share_lines=["store dos attributes = no"])
    client = make_client(server, line=QUICK)
    place, memory = client.place("target.raw"), open_memory(MIB)
    target = client.mine(await place.create(JOB, memory, cache=Cache.WRITEBACK))
    await place.publish(JOB)
    identity, flushes = target.identity, 0
    real = Desk.flush_folder

    async def flush_folder(self: Desk, path: str) -> None:
        nonlocal flushes
        flushes += 1
        if flushes == 1:
            server.put("target.raw", b"another's")
            raise LostError("the connection broke")
        await real(self, path)

    async def leads_to(self: Desk, path: str, wanted: Any) -> bool:
        return bool(wanted == identity)  # as if it had the inode

    monkeypatch.setattr(Desk, "flush_folder", flush_folder)
    monkeypatch.setattr(Desk, "leads_to", leads_to)
    await place.discard(JOB)
    assert flushes == 2
    assert server.file("target.raw").read_bytes() == b"another's"


async def test_work_on_names_waits_for_a_share_that_its_server_doesnt_have_yet(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None]
) -> None:
    """A server that is restarted between publishing and the look must not end the move."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    place, memory = client.place("target.raw"), open_memory(MIB)
    target = client.mine(await place.create(JOB, memory, cache=Cache.WRITEBACK))
    await place.publish(JOB)
    shares = dict(server.shares)
    server.reconfigure(shares={})
    server.kill_child()
    await eventually_async(lambda: "has no share" in str(target.reason), DEADLINE_S, "missing")
    looking = asyncio.create_task(place.confirm(JOB, target.identity))
    await eventually_async(place._steps.locked, DEADLINE_S, "it began")
    server.reconfigure(shares=shares)
    assert await looking is None
    with pytest.raises(RefusedError, match="has no share"):
        await client.place("another.raw", "missing").open()


async def test_a_plain_session_that_is_slow_serves_others(
    server: Samba, make_client: MakeClient
) -> None:
    """It is ended for a target's sake only when it answers nobody."""
    client = make_client(server, line=QUICK, fast=False)
    source = await client.open("disk.raw")
    its_door, session = source.door, client.server._session
    assert isinstance(its_door, door.ShareDoor)
    assert isinstance(session, PlainSession)
    assert its_door._serves_others(session)
    session._answered_s -= door.OPEN_S
    assert not its_door._serves_others(session)
    await source.read(0, 512)
    assert its_door._serves_others(session)
    await source.close()
    assert not its_door._serves_others(session)


async def test_a_target_that_somebody_removed_isnt_waited_for_for_ever(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None]
) -> None:
    """Its job counts that, and pauses. The guest's own disk is waited for: it may be put back."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    source = await client.open("disk.raw", authoritative=True)
    place, memory = client.place("target.raw"), open_memory(MIB)
    target = client.mine(await place.create(JOB, memory, cache=Cache.WRITEBACK))
    files = list(server.folder().iterdir())
    for file in files:
        file.rename(file.with_suffix(".aside"))
    server.kill_child()
    for disk in (source, target):
        await eventually_async(lambda d=disk: "not there" in str(d.reason), DEADLINE_S, "missing")
    with pytest.raises(FileNotFoundError, match="is not there"):
        await target.write(0, b"x" * 512)
    reading = asyncio.create_task(source.read(0, 512))
    for file in files:
        file.with_suffix(".aside").rename(file)
    assert bytes(await reading) == pattern(MIB)[:512]
    await eventually_async(lambda: target.facts()["state"] == "connected", DEADLINE_S, "back")
