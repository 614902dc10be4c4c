"""What is repeated when a disk on a share is open again: a review found each of these."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest

from mirrord.core.geometry import KIB
from mirrord.storage.backend import Buffer
from mirrord.storage.kept import REPEATED_AT_ONCE
from mirrord.storage.remote import LostError, RemoteFile, SteadySettings
from mirrord.storage.steady import SteadyBackend
from tests.helpers import eventually_async
from tests.storage.test_steady import BLOCK, UPPER, Entrance, File, Server, until_back
from tests.storage.test_steady import server as server

Reopen = Callable[[RemoteFile], Awaitable[RemoteFile]]


class Ways(Entrance):
    """Opens the disk again as a test says."""

    def __init__(self, server: Server, reopen: Reopen) -> None:
        super().__init__(server)
        self._reopen = reopen

    async def reopen(self, former: RemoteFile) -> RemoteFile:
        return await self._reopen(former)


async def served(server: Server, reopen: Reopen, io_timeout_s: float = 5) -> SteadyBackend:
    """Return a disk that a guest depends on."""
    settings = SteadySettings(io_timeout_s=io_timeout_s)
    backend = SteadyBackend(File(server), Ways(server, reopen), settings)
    backend.authoritative = True
    await backend.read(0, BLOCK)
    return backend


class Picky(File):
    """Refuses what is longer than a block."""

    async def write(self, offset: int, data: Buffer, **how: bool) -> None:
        if len(data) > BLOCK:
            raise OSError(errno.EDQUOT, "quota")
        await super().write(offset, data)


async def newer_in_flight(server: Server, backend: SteadyBackend) -> asyncio.Future[None]:
    """Write B, acknowledged, and C over it, in flight when the server dies and forgets B."""
    await backend.write(UPPER, b"B" * BLOCK)
    server.hanging = asyncio.get_running_loop().create_future()
    newer = asyncio.ensure_future(backend.write(UPPER, b"C" * 4 * BLOCK))
    await eventually_async(lambda: server.asked == 2, what="the newer one is in flight")
    server.content[UPPER : UPPER + BLOCK] = bytes(BLOCK)
    server.file.die()
    return newer


async def test_a_refused_write_takes_no_acknowledged_one_with_it(server: Server) -> None:
    """B is acknowledged; C over it is in flight; the server forgets B and refuses C."""

    async def reopen(former: RemoteFile) -> RemoteFile:
        return Picky(server)

    backend = await served(server, reopen)
    newer = await newer_in_flight(server, backend)
    with pytest.raises(OSError, match="quota"):
        await newer
    assert bytes(await backend.read(UPPER, BLOCK)) == b"B" * BLOCK
    assert bytes(server.content[UPPER : UPPER + BLOCK]) == b"B" * BLOCK
    await backend.close()


async def test_a_refused_write_whose_request_gave_up_takes_none_with_it(server: Server) -> None:
    """The same, but C's request times out before the server is back: C is kept by then."""
    gate = asyncio.Event()

    async def reopen(former: RemoteFile) -> RemoteFile:
        await gate.wait()
        return Picky(server)

    backend = await served(server, reopen, io_timeout_s=0.2)
    newer = await newer_in_flight(server, backend)
    with pytest.raises(OSError, match="in time"):
        await newer
    gate.set()
    await until_back(backend)
    assert bytes(await backend.read(UPPER, BLOCK)) == b"B" * BLOCK
    await backend.close()


async def test_what_a_replay_repeated_is_kept_when_its_request_gives_up(server: Server) -> None:
    """Its own request never sent it; a replay that did not end wrote it: it may be there."""
    opened: list[File] = []
    gate = asyncio.Event()
    cut = asyncio.Event()

    class Dying(File):
        async def flush(self) -> None:
            if len(opened) == 1:
                await cut.wait()
                raise LostError("cut")

    async def reopen(former: RemoteFile) -> RemoteFile:
        await gate.wait()
        opened.append(Dying(server))
        return opened[-1]

    backend = await served(server, reopen, io_timeout_s=0.2)
    server.file.die()
    writing = asyncio.ensure_future(backend.write(UPPER, b"X" * BLOCK))
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(OSError, match="could not be reached in time"):
        await writing
    assert backend.facts()["unflushed_bytes"]
    server.content[UPPER : UPPER + BLOCK] = bytes(BLOCK)
    cut.set()
    await until_back(backend)
    assert bytes(await backend.read(UPPER, BLOCK)) == b"X" * BLOCK
    await backend.close()


async def test_the_time_to_wait_begins_with_the_loss(server: Server) -> None:
    """A request that a server has had for longer than `io_timeout` is repeated like any other."""

    async def reopen(former: RemoteFile) -> RemoteFile:
        return File(server)

    backend = await served(server, reopen, io_timeout_s=0.2)
    server.hanging = asyncio.get_running_loop().create_future()
    slow = asyncio.ensure_future(backend.write(UPPER, b"x" * BLOCK))
    began_s = asyncio.get_running_loop().time()
    await eventually_async(lambda: asyncio.get_running_loop().time() > began_s + 0.3)
    server.file.die()
    await slow
    assert bytes(await backend.read(UPPER, 1)) == b"x"
    await backend.close()


async def test_many_changes_are_repeated_at_once(server: Server) -> None:
    flying = most = 0

    class Slow(File):
        async def write(self, offset: int, data: Buffer, **how: bool) -> None:
            nonlocal flying, most
            flying += 1
            most = max(most, flying)
            await asyncio.sleep(0)
            flying -= 1
            await super().write(offset, data)

    async def reopen(former: RemoteFile) -> RemoteFile:
        return Slow(server)

    backend = await served(server, reopen)
    for number in range(100):
        await backend.write(2 * KIB * number, bytes([number]) * KIB)
    server.content[:] = bytes(len(server.content))
    server.file.die()
    await until_back(backend)
    for number in range(100):
        assert bytes(await backend.read(2 * KIB * number, KIB)) == bytes([number]) * KIB
    assert most == REPEATED_AT_ONCE
    await backend.close()


async def test_a_defect_does_not_end_the_attempts(
    server: Server, expect_log: Callable[..., None]
) -> None:
    expect_log("opening again failed")
    tries = 0

    async def reopen(former: RemoteFile) -> RemoteFile:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ValueError("of whatever kind")
        return File(server)

    backend = await served(server, reopen)
    server.file.die()
    assert bytes(await backend.read(0, BLOCK)) == bytes(BLOCK)
    assert tries == 2
    await backend.close()


async def test_a_write_that_landed_while_it_waited_for_room_leaves_no_sample(
    server: Server, expect_log: Callable[..., None]
) -> None:
    """Its own end is an error, of an earlier flush; what is there now is its content."""
    expect_log("flush not possible", "storage failed")
    opened: list[File] = []

    class Breaking(File):
        flushes = 0

        async def flush(self) -> None:
            self.flushes += 1
            if self.flushes > 1 and len(opened) == 1:
                raise OSError(errno.EIO, "the disk broke")

    async def reopen(former: RemoteFile) -> RemoteFile:
        opened.append(Breaking(server))
        return opened[-1]

    settings = SteadySettings(io_timeout_s=5, unflushed_bytes_max=3 * BLOCK)
    backend = SteadyBackend(File(server), Ways(server, reopen), settings)
    backend.authoritative = True
    await eventually_async(lambda: len(backend._samples.all()) == 2, what="both ends are known")
    await backend.write(UPPER, b"A" * BLOCK)
    await backend.write(UPPER + BLOCK, b"A" * BLOCK)
    server.file.die()
    with pytest.raises(OSError, match="flush failed"):
        await backend.write(0, b"W" * BLOCK)
    assert bytes(server.content[:BLOCK]) == b"W" * BLOCK
    opened[-1].die()
    await until_back(backend)
    assert backend.facts()["state"] == "connected", backend.reason
    await backend.close()
