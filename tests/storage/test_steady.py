"""What `SteadyBackend` does when a server says no, by a server that is a few lines long.

Losses of every kind are the simulation's; this holds single decisions that a review has found.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from itertools import pairwise

import pytest

from mirrord.core.geometry import KIB, MIB, Extent, Status
from mirrord.storage import tie
from mirrord.storage.backend import Buffer, Capabilities, Identity
from mirrord.storage.remote import Door, ForgottenError, LostError, RemoteFile, SteadySettings
from mirrord.storage.steady import SteadyBackend
from tests.helpers import eventually_async

SIZE = MIB
UPPER = SIZE // 2  # what lies from here on is refused while the server is full
BLOCK = 4 * KIB


class Server:
    """A disk, and whether there is room in its upper half."""

    def __init__(self) -> None:
        self.content = bytearray(SIZE)
        self.full = False
        self.hanging: asyncio.Future[None] | None = None  # what a write there waits for
        self.asked = 0  # how many writes
        self.file: File


class File(RemoteFile):
    """One life of the connection."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.size = SIZE
        self.identity = Identity("smb", 1, 2, SIZE, 3)
        self.capabilities = Capabilities(True, True, True, True)
        self._lost: LostError | None = None
        self._tell: list[Callable[[LostError], None]] = []
        server.file = self

    def when_lost(self, tell: Callable[[LostError], None]) -> None:
        self._tell.append(tell)

    def die(self) -> None:
        """Lose the connection."""
        self._lost = LostError("cut")
        if self.server.hanging is not None:
            self.server.hanging.set_exception(self._lost)
            self.server.hanging = None
        for tell in self._tell:
            tell(self._lost)

    def _alive(self) -> None:
        if self._lost is not None:
            raise self._lost

    async def read(
        self, offset: int, length: int, *, stored: bool = False, copying: bool = False
    ) -> Buffer:
        self._alive()
        return bytes(self.server.content[offset : offset + length])

    async def write(
        self, offset: int, data: Buffer, *, through: bool = False, copying: bool = False
    ) -> None:
        self._alive()
        self.server.asked += 1
        if offset >= UPPER and self.server.hanging is not None:
            await self.server.hanging
        if offset >= UPPER and self.server.full:
            raise OSError(errno.ENOSPC, "full")
        self.server.content[offset : offset + len(data)] = data

    async def zero(self, offset: int, length: int) -> None:
        self._alive()
        self.server.content[offset : offset + length] = bytes(length)

    async def flush(self) -> None:
        self._alive()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Status.DATA)]

    async def size_now(self) -> int:
        return SIZE

    async def close(self) -> None:
        return


class Entrance(Door):
    """Opens the disk again at once."""

    where = "server"

    def __init__(self, server: Server) -> None:
        self._server = server

    async def reopen(self, former: RemoteFile) -> RemoteFile:
        return File(self._server)


@pytest.fixture
def server(expect_log: Callable[..., None]) -> Server:
    """A server of this test's own."""
    expect_log("connection lost", "connected again")
    return Server()


async def authority(server: Server) -> SteadyBackend:
    """Return a disk that a guest depends on, after its first flush."""
    backend = SteadyBackend(File(server), Entrance(server), SteadySettings(io_timeout_s=5))
    backend.authoritative = True
    await backend.read(0, BLOCK)
    return backend


async def until_back(backend: SteadyBackend) -> None:
    """Wait until the disk is connected again, or has failed."""
    await eventually_async(
        lambda: backend.facts()["state"] != "away", what="the connection is back"
    )


@pytest.mark.parametrize("flushed", [False, True])
async def test_a_targets_write_that_is_answered_as_its_connection_ends(
    server: Server, flushed: bool
) -> None:
    """The server restarts right behind its answer: the next flush must not vouch for the write.

    Found by the simulator (seed 17685), with a flush that had begun, and ended, during the write.
    """
    backend = SteadyBackend(File(server), Entrance(server), SteadySettings(target_wait_s=5))
    if flushed:
        answer = server.hanging = asyncio.get_running_loop().create_future()
        writing = asyncio.ensure_future(backend.write(UPPER, b"x" * BLOCK))
        await asyncio.sleep(0)
        await backend.flush()
        server.hanging = None
        answer.set_result(None)  # and before anybody hears of it …
        server.file.die()
        await writing
    else:
        await backend.write(UPPER, b"x" * BLOCK)
        server.file.die()
    server.content[UPPER:] = bytes(SIZE - UPPER)
    await until_back(backend)
    with pytest.raises(OSError, match="may have forgotten") as told:
        await backend.flush()
    assert told.value.errno == errno.ENOTCONN  # it was away: nobody need do anything
    await backend.flush()
    await backend.close()


async def test_a_refused_write_proves_nothing_later(server: Server) -> None:
    backend = await authority(server)
    server.full = True
    with pytest.raises(OSError, match="full"):
        await backend.write(UPPER, b"x" * BLOCK)
    await backend.flush()
    server.file.die()
    await until_back(backend)
    assert backend.facts()["state"] == "connected", backend.reason
    assert bytes(await backend.read(UPPER, BLOCK)) == bytes(BLOCK)
    await backend.close()


async def test_a_write_that_the_replay_is_refused_fails_alone(server: Server) -> None:
    backend = await authority(server)
    await backend.write(0, b"k" * BLOCK)  # acknowledged, to be repeated
    server.hanging = asyncio.get_running_loop().create_future()
    refused = asyncio.ensure_future(backend.write(UPPER, b"x" * BLOCK))
    await eventually_async(lambda: bool(backend._flying), what="the write is in flight")
    server.full = True
    server.content[:BLOCK] = bytes(BLOCK)  # the server forgets
    server.file.die()
    assert bytes(await backend.read(0, BLOCK)) == b"k" * BLOCK
    with pytest.raises(OSError, match="full"):
        await refused
    server.file.die()
    assert bytes(await backend.read(0, BLOCK)) == b"k" * BLOCK
    assert backend.facts()["state"] == "connected"
    await backend.close()


async def test_an_acknowledged_write_that_is_refused_is_never_given_up(server: Server) -> None:
    backend = await authority(server)
    await backend.write(UPPER, b"k" * BLOCK)
    server.full = True
    server.content[UPPER : UPPER + BLOCK] = bytes(BLOCK)  # forgotten, and no room to repeat it
    server.file.die()
    reading = asyncio.ensure_future(backend.read(UPPER, BLOCK))
    await eventually_async(lambda: backend.reason == "full", what="the replay is refused")
    assert not reading.done()
    server.full = False
    assert bytes(await reading) == b"k" * BLOCK
    await backend.close()


async def test_a_server_that_is_back_is_asked_again_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delays grew while it was away. Its first answer is that it kept nothing of ours."""
    monkeypatch.setattr(tie, "RETRY_FIRST_S", 0.01)
    asked_s: list[float] = []

    class Restarted(Entrance):
        """Away for some attempts; then it has forgotten the handle."""

        async def reopen(self, former: RemoteFile) -> RemoteFile:
            asked_s.append(asyncio.get_running_loop().time())
            if len(asked_s) < 7:
                raise LostError("away")
            if len(asked_s) == 7:
                raise ForgottenError("the handle was not kept")
            return await super().reopen(former)

    backend = SteadyBackend(File(server), Restarted(server), SteadySettings(io_timeout_s=5))
    backend.authoritative = True
    await backend.read(0, BLOCK)
    server.file.die()
    await until_back(backend)
    gaps = [after - before for before, after in pairwise(asked_s)]
    assert gaps[-1] < gaps[-2] / 2, gaps
    await backend.close()
