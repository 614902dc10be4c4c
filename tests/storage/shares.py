"""What the tests of storage on SMB shares stand on: a client of its own, closed with the test."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from mirrord.errors import RefusedError
from mirrord.smb.location import parse_location
from mirrord.storage.backend import Cache
from mirrord.storage.memory import open_memory
from mirrord.storage.smb.dial import Security
from mirrord.storage.smb.line import LineSettings
from mirrord.storage.smb.place import SharePlace
from mirrord.storage.smb.server import ShareServer
from mirrord.storage.smb.session import ShareSession, ShareSettings
from mirrord.storage.steady import SteadyBackend
from tests.helpers import eventually_async, require_program, require_root
from tests.samba import Samba
from tests.storage.conformance import pattern

JOB = "0d4fbd9c-7a52-4f7c-9d2b-5e1c8f6a3b72"
DEADLINE_S = 30
NOBODY = 65534
# For servers that are killed, cut off or stopped. Not shorter: machines that test are busy.
QUICK = LineSettings(
    connect_s=3.0, silence_s=2.0, request_s=10.0, pending_s=20.0, check_s=0.1, restore_s=0.05
)


class Words:
    """A password."""

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return it."""
        return self._text

    def __repr__(self) -> str:
        return "***"


@dataclass
class Login:
    """Who logs on. `reads` counts how often somebody asked."""

    user: str | None
    password: Words | None = None
    kerberos: bool = False
    keytab: str | None = None
    ccache: str | None = None


@dataclass
class Client:
    """One process's view of a server: its places, and what it has open."""

    samba: Samba
    server: ShareServer
    port: int | None
    login: Login
    stamp: int = 1  # of the credential: another one is another number
    opened: list[SteadyBackend] = field(default_factory=list)

    def place(self, path: str, share: str = "disks") -> SharePlace:
        """Return a place on the share."""
        return SharePlace(parse_location(self.samba.url(path, share, port=self.port)), self.server)

    async def open(
        self, path: str = "disk.raw", *, authoritative: bool = False, read_only: bool = False
    ) -> SteadyBackend:
        """Open a disk that is there."""
        backend = await self.place(path).open(read_only=read_only)
        return self.mine(backend, authoritative=authoritative)

    async def create(self, path: str, size: int, *, authoritative: bool = False) -> SteadyBackend:
        """Make a target; it keeps its temporary name."""
        source = open_memory(size)
        backend = await self.place(path).create(JOB, source, cache=Cache.WRITEBACK)
        await source.close()
        return self.mine(backend, authoritative=authoritative)

    def mine(self, backend: Any, *, authoritative: bool = False) -> SteadyBackend:
        """Close a disk with the test."""
        assert isinstance(backend, SteadyBackend)
        backend.authoritative = authoritative
        self.opened.append(backend)
        return backend

    async def session(self) -> ShareSession:
        """Return the session, which has to be a fast one."""
        session = await self.server.session()
        assert isinstance(session, ShareSession)
        return session

    async def close(self) -> None:
        """Close everything."""
        async with asyncio.timeout(DEADLINE_S):
            for backend in self.opened:
                await backend.close()
            await self.server.close()


MakeClient = Callable[..., Client]
_numbers = itertools.count()


@pytest.fixture
async def make_client() -> AsyncIterator[MakeClient]:
    """Make clients of servers, with the settings of `ShareSettings`, that end with the test."""
    made: list[Client] = []

    def make(
        samba: Samba,
        *,
        port: int | None = None,
        encrypt: bool = True,
        sign: bool = True,
        min_dialect: str = "3.1.1",
        login: Login | None = None,
        **settings: Any,
    ) -> Client:
        security = Security(encrypt=encrypt, sign=sign, min_dialect=min_dialect)
        login = login or Login(samba.user, Words(samba.password))
        at = parse_location(samba.url("x", port=port))
        chosen = ShareSettings(security=security, **settings)
        client: Client

        def fingerprint() -> int:
            return client.stamp

        server = ShareServer(at, chosen, lambda: client.login, fingerprint)
        client = Client(samba, server, port, login)
        made.append(client)
        return client

    yield make
    for one in made:
        await one.close()


def smbclient(samba: Samba, *commands: str, share: str = "disks") -> str:
    """Run Samba's own client; return all that it printed."""
    done = subprocess.run(
        [require_program("smbclient"), f"//127.0.0.1/{share}", "-p", str(samba.port), "-s",
         str(samba.config), "-U", f"{samba.user}%{samba.password}", "-c", ";".join(commands)],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def nobodys() -> Iterator[Samba]:
    """A server that root runs as an ordinary user."""
    require_root()
    server = Samba(uid=NOBODY)
    try:
        yield server.start()
    finally:
        server.close()


LINES = {
    "readonly": ["read only = yes"],
    "denied": ["valid users = daemon"],
    "bare": ["store dos attributes = no"],
    "solid": ["strict allocate = yes"],
}


@pytest.fixture(scope="session")
def various() -> Iterator[Samba]:
    """A server with shares that each can't do something."""
    server = Samba(shares={}, share_lines=LINES)
    for name in LINES:
        folder = server.root / name
        folder.mkdir()
        server.give(folder)
        server.shares[name] = folder
    server.reconfigure(shares=server.shares)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def client(samba: Samba, make_client: MakeClient) -> Client:
    """A client of the server that has nothing special."""
    return make_client(samba)


class Folder:
    """A folder on the share, of this test's own."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.name = f"place-{next(_numbers)}"
        self.path = client.samba.file(self.name)
        self.path.mkdir()
        client.samba.give(self.path)

    def place(self, name: str) -> SharePlace:
        """Return the place of a name in it."""
        return self.client.place(f"{self.name}/{name}")

    def names(self) -> list[str]:
        """Return what lies in it."""
        return sorted(os.listdir(self.path))


@pytest.fixture
def folder(client: Client) -> Folder:
    """Where this test's files are."""
    return Folder(client)


async def refusal_of(awaitable: Any) -> RefusedError:
    """Return the refusal, which has to be one line."""
    with pytest.raises(RefusedError) as caught:
        await awaitable
    assert "\n" not in str(caught.value)
    return caught.value


def state_of(backend: SteadyBackend) -> object:
    """Return what `show` says about the connection."""
    return backend.facts()["state"]


_losses: WeakKeyDictionary[SteadyBackend, int] = WeakKeyDictionary()


async def until_away(backend: SteadyBackend) -> None:
    """Wait until another loss was noticed; it may be over by then."""
    before = _losses.get(backend, 0)
    await eventually_async(lambda: backend._tie.life > before, DEADLINE_S, "away")
    _losses[backend] = backend._tie.life


class Guest:
    """Writes all the time to the second half of the disk, and knows what has to be there."""

    def __init__(self, backend: SteadyBackend) -> None:
        self.backend = backend
        self.expected = bytearray(pattern(backend.size))
        self.done = 0
        self._chance = random.Random(7)
        self._tasks: list[asyncio.Task[None]] = []
        self._stop = False

    @asynccontextmanager
    async def at_work(self, depth: int = 4) -> AsyncIterator[Guest]:
        """Write meanwhile; every request has to end well."""
        self._tasks = [asyncio.create_task(self._write(number, depth)) for number in range(depth)]
        try:
            yield self
            await self.some_more()
            self._stop = True
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def some_more(self) -> None:
        """Wait until more was written than is in flight."""
        enough = self.done + 20
        await eventually_async(lambda: self.done >= enough or self.failed(), DEADLINE_S, "writes")

    def failed(self) -> bool:
        """Raise what a request failed with, if one did."""
        for task in self._tasks:
            if task.done():
                task.result()
        return False

    async def _write(self, number: int, depth: int) -> None:
        room = self.backend.size // 2 // depth
        start = self.backend.size // 2 + number * room
        while not self._stop:
            length = self._chance.choice((512, 4096, 5000, 70_000))
            at = start + self._chance.randrange(room - length)
            data = self._chance.randbytes(length)
            await self.backend.write(at, data, fua=self._chance.random() < 0.1)
            self.expected[at : at + length] = data
            self.done += 1
            if self._chance.random() < 0.1:
                await self.backend.flush()

    async def check(self, server: Samba) -> None:
        """Compare what is read, and what lies behind the share once it is flushed."""
        assert bytes(await self.backend.read(0, self.backend.size)) == self.expected
        await self.backend.flush()
        assert server.file("disk.raw").read_bytes() == self.expected
