"""Opening again after a loss, when the server answers late, refuses, or never answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from mirrord.core.geometry import MIB
from mirrord.storage import tie
from mirrord.storage.backend import Cache
from mirrord.storage.memory import open_memory
from mirrord.storage.remote import DeniedError
from mirrord.storage.smb import control, door
from mirrord.storage.smb.place import SharePlace
from mirrord.storage.steady import SteadyBackend
from tests.helpers import eventually_async
from tests.samba import Samba
from tests.storage.conformance import pattern
from tests.storage.shares import DEADLINE_S, JOB, QUICK, Client, MakeClient, until_away
from tests.storage.shares import make_client as make_client

SOURCE = "disk.raw"


@pytest.fixture
def server(make_samba: Callable[..., Samba]) -> Samba:
    one = make_samba()
    one.put(SOURCE, pattern(MIB))
    return one


class Opens:
    """The server's opens: those of `wanted` are held until `go`, after `done` if `late`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wanted: Callable[[str], bool] = lambda path: False
        self.refused: Callable[[str], bool] = lambda path: False
        self.refusal = OSError(5, "not yet")
        self.late = False  # the server has done it when it hangs
        self.held = 0
        self.go = threading.Event()
        self.hung_up: Callable[[], bool] = lambda: False  # what ends smbprotocol's waiting
        self._real = control.open_handle
        monkeypatch.setattr(control, "open_handle", self._open)
        monkeypatch.setattr(door, "OPEN_S", 0.3)
        monkeypatch.setattr(door.ShareDoor, "_take_over", self._not_kept)

    async def _not_kept(self, *_: Any) -> None:
        return None

    def _open(self, tree: Any, path: str, access: int, **keys: Any) -> Any:
        if access not in (control.READ, control.WRITE):  # only looked at
            return self._real(tree, path, access, **keys)
        if self.refused(path):
            raise self.refusal
        held = self.wanted(path) and not self.go.is_set()
        if held and self.late:
            handle = self._real(tree, path, access, **keys)
        self.held += held
        while held and not self.go.wait(0.05):
            if self.hung_up():
                raise OSError(104, "the connection broke")
        return handle if held and self.late else self._real(tree, path, access, **keys)


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Opens:
    return Opens(monkeypatch)


async def pair(client: Client) -> tuple[SteadyBackend, SharePlace, SteadyBackend]:
    """Return a guest's disk and a move's target, with its place, in one session."""
    source = await client.open(SOURCE, authoritative=True)
    place, memory = client.place("target.raw"), open_memory(MIB)
    target = client.mine(await place.create(JOB, memory, cache=Cache.WRITEBACK))
    return source, place, target


@pytest.mark.parametrize("authority", [True, False])
async def test_a_file_that_is_open_too_late_is_given_back(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None], opens: Opens,
    authority: bool,
) -> None:  # fmt: skip
    """Nobody waits for it any more, and it would be in the way of each later attempt."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    source, _, target = await pair(client)
    first, second = (target, source) if authority else (source, target)
    await source.write(0, b"acknowledged")
    opens.late = True
    opens.wanted = lambda path: (path == SOURCE) == authority
    opens.refused = lambda path: opens.wanted(path) and first.facts()["state"] == "away"
    server.kill_child()
    await until_away(second)
    await eventually_async(lambda: opens.held > 0, DEADLINE_S, "an open that hangs")
    await eventually_async(lambda: "takes longer" in str(second.reason), DEADLINE_S, "given up")
    opens.go.set()
    await eventually_async(lambda: second.facts()["state"] == "connected", DEADLINE_S, "back")
    assert bytes(await source.read(0, 12)) == b"acknowledged"


async def test_a_job_that_ends_while_its_target_is_being_opened(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None], opens: Opens
) -> None:
    """What was opened for it is given back, and then removed."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    source, place, target = await pair(client)
    opens.late = True
    opens.wanted = lambda path: path != SOURCE
    opens.refused = lambda path: path != SOURCE and source.facts()["state"] == "away"
    door.OPEN_S = DEADLINE_S  # the fixture puts it back
    server.kill_child()
    await until_away(target)
    await eventually_async(lambda: opens.held > 0, DEADLINE_S, "an open that hangs")
    ending = asyncio.create_task(place.discard(JOB))
    await eventually_async(lambda: target._tie._closed, DEADLINE_S, "the target's end")
    opens.go.set()
    await ending
    assert [path.name for path in server.folder().iterdir()] == [SOURCE]
    await eventually_async(lambda: client.server.users == 1, DEADLINE_S, "one user is left")


async def test_a_targets_open_that_hangs_doesnt_keep_a_guest_waiting(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None], opens: Opens
) -> None:
    """Both are to be opened again, the target's turn is first, and the server never answers it."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    source, _, target = await pair(client)
    opens.wanted = lambda path: path != SOURCE
    opens.refused = lambda path: path == SOURCE and not opens.held
    door.OPEN_S = 1.0  # until then the source asks, too; the fixture puts it back
    server.kill_child()
    await until_away(source)
    async with asyncio.timeout(5):  # the open hangs for longer
        await source.write(0, b"well")
    life = source._tie.life
    held = opens.held
    await eventually_async(lambda: opens.held > held or held > 1, DEADLINE_S, "another attempt")
    await source.write(0, b"still well")
    assert source._tie.life == life
    assert target.facts()["state"] == "away"
    opens.go.set()
    await eventually_async(lambda: target.facts()["state"] == "connected", DEADLINE_S, "back")


async def test_a_plain_session_ends_by_a_targets_open_that_hangs(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None], opens: Opens
) -> None:
    """It does one thing after another, so a guest's requests would wait behind that, too."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK, fast=False)
    source, _, target = await pair(client)
    opens.wanted = lambda path: path != SOURCE
    opens.refused = lambda path: path != SOURCE and source.facts()["state"] == "away"
    opens.refusal = DeniedError(13, "share-denied", "not yet")  # others end a plain session
    server.kill_child()
    await source.read(0, 512)  # by this it notices, and is open again first
    await eventually_async(lambda: opens.held, DEADLINE_S, "an open that hangs")
    session = client.server._session
    assert session is not None
    opens.hung_up = lambda: session.lost is not None
    async with asyncio.timeout(5):
        await source.write(0, b"well")
    opens.go.set()
    await eventually_async(lambda: target.facts()["state"] == "connected", DEADLINE_S, "back")


@pytest.mark.parametrize("published", [False, True])
async def test_a_target_that_is_open_elsewhere_when_its_job_ends(
    server: Samba, make_client: MakeClient, published: bool
) -> None:
    """For a moment: it is removed after that, under either name. For longer: that is told."""
    client, another = make_client(server, line=QUICK), make_client(server, line=QUICK)
    _, place, target = await pair(client)
    name = target.connected().path
    if published:
        await place.publish(JOB)
        name = "target.raw"
    await target.close()
    theirs = await another.open(name, read_only=True)
    with pytest.raises(OSError, match="SHARING_VIOLATION"):
        await place.discard(JOB)
    ending = asyncio.create_task(place.discard(JOB))
    await eventually_async(place._steps.locked, DEADLINE_S, "it began")
    await theirs.close()
    await ending
    assert [path.name for path in server.folder().iterdir()] == [SOURCE]


async def test_a_share_that_is_there_again_later_than_its_server(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None]
) -> None:
    """A server that begins doesn't have it yet. A job waits then, and nobody need do anything."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    _, _, target = await pair(client)
    shares = dict(server.shares)
    server.reconfigure(shares={})
    server.kill_child()
    await eventually_async(lambda: "has no share" in str(target.reason), DEADLINE_S, "missing")
    assert target._tie._denied is None
    server.reconfigure(shares=shares)
    await eventually_async(lambda: target.facts()["state"] == "connected", DEADLINE_S, "back")


async def test_a_right_is_asked_for_more_often_than_a_password(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None]
) -> None:
    """No account gets locked by that, and an operator who has granted it goes on at once."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    _, _, target = await pair(client)
    server.reconfigure(share_lines=["valid users = daemon"])
    server.kill_child()
    await eventually_async(lambda: "grant that" in str(target.reason), DEADLINE_S, "denied")
    server.reconfigure(share_lines=[])
    async with asyncio.timeout(tie.DENIED_RETRY_S / 2):
        await eventually_async(lambda: target.facts()["state"] == "connected", DEADLINE_S, "back")


async def test_a_guests_own_open_that_hangs_has_a_session_of_its_own(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None], opens: Opens
) -> None:
    """Something of the old session is stuck at the server: what the target has there must go."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    source, _, target = await pair(client)
    stuck = []

    def wanted(path: str) -> bool:
        if path == SOURCE and not stuck:
            stuck.append(client.server._session)
        return path == SOURCE and client.server._session in stuck

    opens.wanted = wanted
    opens.refused = lambda path: path == SOURCE and target.facts()["state"] == "away" and not stuck
    server.kill_child()
    await until_away(source)
    async with asyncio.timeout(DEADLINE_S):
        await source.write(0, b"well")
    assert opens.held == 1
    opens.go.set()
    await eventually_async(lambda: target.facts()["state"] == "connected", DEADLINE_S, "back")


@pytest.mark.parametrize("fast", [True, False])
async def test_rights_that_came_back_are_everybodys(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None], fast: bool
) -> None:
    """Samba looks once a tree who may do what: work on names has to have the new tree, too."""
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK, fast=fast)
    disk = await client.open(SOURCE, authoritative=True)
    server.reconfigure(share_lines=["read only = yes"])
    server.kill_child()
    reading = asyncio.create_task(disk.read(0, 512))  # a plain session notices by it
    await eventually_async(lambda: "ACCESS_DENIED" in str(disk.reason), DEADLINE_S, "refused")
    server.reconfigure(share_lines=["read only = no"])
    async with asyncio.timeout(DEADLINE_S):
        await disk.write(0, b"well again")
        await reading
    place = client.place("target.raw")
    target = client.mine(await place.create(JOB, disk, cache=Cache.WRITEBACK))
    await place.publish(JOB)
    assert server.file("target.raw").exists()
    identity = disk.identity
    await disk.close()
    old = client.place(SOURCE)
    assert await old.retire(JOB, identity) is None
    await old.delete_retired(JOB, identity)
    await target.close()
    assert [path.name for path in server.folder().iterdir()] == ["target.raw"]


async def test_attempts_that_were_refused_leave_no_trees(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None]
) -> None:
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    await client.open(SOURCE, authoritative=True)
    server.put("other.raw", pattern(MIB))
    other = await client.open("other.raw")
    other.connected().handle.durable = False  # type: ignore[attr-defined]
    moved = server.file("other.raw").rename(server.file("elsewhere.raw"))
    server.kill_child()
    its_door = other.door
    assert isinstance(its_door, door.ShareDoor)
    attempts = 0
    real = its_door._find

    async def find(*arguments: Any) -> Any:
        nonlocal attempts
        attempts += 1
        try:
            return await real(*arguments)
        finally:
            its_door._refused = True  # as if it had been, which a missing file hides

    its_door._find = find  # type: ignore[method-assign]
    await eventually_async(lambda: attempts >= 4, DEADLINE_S, "some attempts")
    session = await client.session()
    await eventually_async(
        lambda: len(session._session.tree_connect_table) <= 2, DEADLINE_S, "the others are left"
    )
    moved.rename(server.file("other.raw"))
    await eventually_async(lambda: other.facts()["state"] == "connected", DEADLINE_S, "back")
    assert len(session.trees) == 1


async def test_a_target_is_hidden_from_nobody_though_its_renaming_was_not_answered(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expect_log("connection lost", "connected again")
    client = make_client(server, line=QUICK)
    _, place, _ = await pair(client)
    real_rename, real_unhide, unhidden = control.rename, control.unhide, []

    def rename(*arguments: Any) -> None:
        real_rename(*arguments)
        if not unhidden:
            server.kill_child()
            raise OSError(104, "the connection broke")

    def unhide(*arguments: Any, **keys: Any) -> None:
        real_unhide(*arguments, **keys)
        unhidden.append(arguments)

    monkeypatch.setattr(control, "rename", rename)
    monkeypatch.setattr(control, "unhide", unhide)
    await place.publish(JOB)
    assert server.file("target.raw").exists()
    assert len(unhidden) == 1


async def test_a_server_that_kept_nothing_isnt_asked_for_each_handle(
    server: Samba, make_client: MakeClient, expect_log: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It has no other of that session either; each refusal ends the new session, for all of it."""
    expect_log("connection lost", "connected again")
    real, tried = control.reopen_handle, []

    def reopen(tree: Any, path: str, *arguments: Any, **keys: Any) -> Any:
        tried.append(path)
        return real(tree, path, *arguments, **keys)

    monkeypatch.setattr(control, "reopen_handle", reopen)
    client = make_client(server, line=QUICK)
    source, _, target = await pair(client)
    disks = [source, target]
    for number in range(3):
        server.put(f"{number}.raw", pattern(MIB))
        disks.append(await client.open(f"{number}.raw"))
    server.kill_all()
    server.start()

    def back() -> bool:
        return all(disk._tie.life and disk.facts()["state"] == "connected" for disk in disks)

    await eventually_async(back, DEADLINE_S, "all are back")
    assert [disk._tie.life for disk in disks] == [1] * len(disks)
    assert len(tried) <= 2  # the second was asked for before the first was refused
