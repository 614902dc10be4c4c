"""Several lines of one session: all used, lost and replaced; no write overtakes its repetition."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from mirrord.core.geometry import MIB
from mirrord.smb import status as st
from mirrord.smb import wire
from mirrord.smb.lanes import Request
from mirrord.smb.seal import Encrypted
from mirrord.storage.backend import Cache
from mirrord.storage.memory import open_memory
from mirrord.storage.smb.file import ShareFile
from mirrord.storage.smb.line import Line
from mirrord.storage.steady import SteadyBackend
from tests.helpers import eventually_async
from tests.samba import Samba
from tests.storage.conformance import pattern
from tests.storage.shares import DEADLINE_S, JOB, QUICK, Client, MakeClient
from tests.storage.shares import make_client as make_client
from tests.tcp_proxy import Proxy

SIZE = 2 * MIB
SEALED = pytest.mark.parametrize("encrypt", [True, False], ids=["encrypted", "signed"])


@pytest.fixture
def disk(samba: Samba) -> str:
    """A disk's name."""
    samba.put("channels.raw", pattern(SIZE))
    return "channels.raw"


async def load(backend: SteadyBackend, count: int = 300) -> None:
    """Write the pattern of another seed, in small and large pieces at once; check it."""
    data = pattern(SIZE, 2)
    step = SIZE // count
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(
            *(backend.write(at, data[at : at + step]) for at in range(0, SIZE, step))
        )
        assert bytes(await backend.read(0, SIZE)) == data


async def lines_of(client: Client) -> list[Any]:
    """Return the lines that live."""
    return [seat.line for seat in (await client.session())._seats]


class TestWidth:
    """How many lines there are, and that all are used."""

    @SEALED
    @pytest.mark.parametrize("channels", [2, 4])
    async def test_all_lines_carry_requests(
        self, samba: Samba, disk: str, make_client: MakeClient, channels: int, encrypt: bool
    ) -> None:
        client = make_client(samba, channels=channels, encrypt=encrypt)
        backend = await client.open(disk, authoritative=True)
        assert backend.facts()["channels"] == channels
        before = [line.channel._low for line in await lines_of(client)]
        await load(backend)
        after = [line.channel._low for line in await lines_of(client)]
        assert all(now > then + 10 for then, now in zip(before, after, strict=True))

    async def test_lines_of_one_key_never_use_a_nonce_twice(
        self, samba: Samba, disk: str, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = make_client(samba, channels=3)
        seen: list[bytes] = []
        real = Encrypted.close

        def close(self: Encrypted, *parts: Any) -> Any:
            made = real(self, *parts)
            whole = b"".join(bytes(part) for part in made)
            seen.append(whole[4 + 20 : 4 + 36])  # 2.2.41: the nonce
            return made

        monkeypatch.setattr(Encrypted, "close", close)
        await load(await client.open(disk))
        assert len(seen) > 300
        assert len(set(seen)) == len(seen)

    async def test_a_server_with_one_line_only_is_used_all_the_same(
        self, make_samba: Callable[..., Samba], make_client: MakeClient, expect_log: Any
    ) -> None:
        server = make_samba(multichannel=False)
        server.put("disk.raw", b"x" * 512)
        for channels in (3, "auto"):
            expect_log("single channel")
            backend = await make_client(server, channels=channels).open()
            assert backend.facts()["channels"] == 1
            await backend.close()

    @SEALED
    async def test_the_server_s_own_addresses_are_found(
        self, make_samba: Callable[..., Samba], make_client: MakeClient, encrypt: bool
    ) -> None:
        server = make_samba(addresses=("127.0.0.1", "127.0.0.2", "127.0.0.3"))
        server.put("channels.raw", pattern(SIZE))
        client = make_client(server, channels="auto", encrypt=encrypt)
        backend = await client.open("channels.raw", authoritative=True)
        peers = {line._transport.get_extra_info("peername")[0] for line in await lines_of(client)}
        assert len(peers) >= 2
        await load(backend)


class TestLoss:
    """A line that is lost while others live costs nobody anything but time."""

    @pytest.fixture(autouse=True)
    def _announced(self, expect_log: Callable[..., None]) -> None:
        expect_log("channel lost")

    @SEALED
    async def test_requests_of_a_lost_line_are_asked_again(
        self, samba: Samba, disk: str, make_client: MakeClient, encrypt: bool
    ) -> None:
        client = make_client(samba, channels=2, encrypt=encrypt, line=QUICK)
        backend = await client.open(disk, authoritative=True)
        session = await client.session()
        for number in range(3):
            loading = asyncio.create_task(load(backend))
            await asyncio.sleep(0)
            (await lines_of(client))[number % 2].lose("a test")
            await loading
            assert session.lost is None
            assert session.sequence == number + 1
            await eventually_async(lambda: session.channels == 2, DEADLINE_S, "a new line")
            # what smbprotocol asks has the new sequence as well
            await backend.check_unchanged()
            await backend.write_zeroes(0, 4096)
        await backend.flush()
        expected = bytes(4096) + pattern(SIZE, 2)[4096:]
        assert samba.file(disk).read_bytes() == expected

    async def test_names_change_after_a_loss(self, samba: Samba, make_client: MakeClient) -> None:
        client = make_client(samba, channels=2, line=QUICK)
        place = client.place("renamed.raw")
        target = client.mine(await place.create(JOB, open_memory(512), cache=Cache.WRITEBACK))
        (await lines_of(client))[0].lose("a test")
        await place.publish(JOB)
        await target.write(0, b"x" * 512)
        await place.withdraw(JOB)
        await place.discard(JOB)
        assert not list(samba.folder().glob("*renamed*"))

    async def test_a_late_write_of_a_lost_line_is_refused_by_the_server(
        self, samba: Samba, disk: str, make_client: MakeClient
    ) -> None:
        client = make_client(samba, channels=2, line=QUICK)
        backend = await client.open(disk)
        first, second = await lines_of(client)
        file = backend.connected()
        assert isinstance(file, ShareFile)

        def write(data: bytes) -> Request:
            body = wire.write_body(file.handle.file_id, 0, len(data), 0)
            return Request(
                wire.WRITE, body, tree_id=file.tree.tree_id, data=data, payload_bytes=len(data)
            )

        second.channel.sequence = 1  # as after the loss of the first, which only we believe
        assert (await second.ask(write(b"repeated"))).status == st.SUCCESS
        assert (await first.ask(write(b"too late"))).status == st.FILE_NOT_AVAILABLE
        first.channel.sequence = 1
        assert bytes(await backend.read(0, 8)) == b"repeated"

    async def test_a_path_that_dies_leaves_the_other_one(
        self, samba: Samba, disk: str, make_client: MakeClient
    ) -> None:
        with Proxy(samba.port) as proxy:
            client = make_client(samba, port=proxy.port, channels=3, line=QUICK)
            backend = await client.open(disk, authoritative=True)
            session = await client.session()
            pair = next(iter(proxy.pairs))
            loading = asyncio.create_task(load(backend))
            proxy._now(lambda: pair.end(gently=False))
            await loading
            await eventually_async(lambda: session.channels == 3, DEADLINE_S, "a new line")
            await client.close()

    async def test_with_the_last_line_the_session_is_lost_and_the_handle_comes_back(
        self, samba: Samba, disk: str, make_client: MakeClient, expect_log: Callable[..., None]
    ) -> None:
        """The handle that is taken over remembers the sequence that was reached."""
        expect_log("connection lost", "connected again")
        with Proxy(samba.port) as proxy:
            client = make_client(samba, port=proxy.port, channels=2, line=QUICK)
            backend = await client.open(disk, authoritative=True)
            former = await client.session()
            for _ in range(2):
                (await lines_of(client))[0].lose("a test")
                await load(backend)
                proxy.cut()
                await eventually_async(lambda s=former: s.lost is not None, DEADLINE_S, "it's lost")
                await load(backend)
                former = await client.session()
                assert backend.connected().kept
                await backend.write_zeroes(0, SIZE)


class TestNumbers:
    """Few credits, many descriptors."""

    @pytest.mark.parametrize("credits", [1, 2, 4, 64])
    @SEALED
    async def test_a_server_that_grants_few_credits(
        self, make_samba: Callable[..., Samba], make_client: MakeClient, credits: int,
        encrypt: bool,
    ) -> None:  # fmt: skip
        server = make_samba(global_lines=[f"smb2 max credits = {credits}"])
        server.put("channels.raw", pattern(SIZE))
        client = make_client(server, encrypt=encrypt)
        place = client.place("new.raw")
        target = client.mine(await place.create(JOB, open_memory(SIZE), cache=Cache.WRITEBACK))
        await load(target, 37)
        await target.flush()
        await place.publish(JOB)
        (line,) = await lines_of(client)
        assert line.channel._high - line.channel._low <= max(credits, 2)
        await place.discard(JOB)

    async def test_descriptors_above_those_of_select(
        self, samba: Samba, disk: str, make_client: MakeClient
    ) -> None:
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
        try:
            client = make_client(samba, channels=2)
            backend = await client.open(disk)
            for line in await lines_of(client):
                assert line._transport.get_extra_info("socket").fileno() > 1024
            await load(backend)
        finally:
            for one in held:
                os.close(one)


async def test_a_repetition_waits_until_the_server_knows_of_the_new_sequence(
    make_samba: Callable[..., Samba], make_client: MakeClient, expect_log: Callable[..., None]
) -> None:
    """The request that brings a new sequence is never held back, so it must change nothing: else a
    write that the server is still at lands after its own repetition, and after what came next."""
    expect_log("channel lost", "channel restored")
    samba = make_samba()
    samba.put("disk.raw", bytes(MIB))
    client = make_client(samba, channels=2)
    backend = await client.open("disk.raw", authoritative=True)
    session = await client.session()
    await eventually_async(lambda: session.channels == 2, what="both channels are there")
    sent: list[tuple[int, int]] = []
    lines = [seat.line for seat in session._seats]
    for line in lines:
        line.submit = _recorded(line.submit, sent)  # type: ignore[method-assign]
    samba.pause()
    writing = asyncio.ensure_future(backend.write(0, b"w" * 4096))

    def at_it() -> list[Line]:
        pending = [(line, line.channel._pending.values()) for line in lines]
        return [line for line, asked in pending if any(r.command == wire.WRITE for r in asked)]

    await eventually_async(at_it, what="the write is in flight")
    sent.clear()
    at_it()[0].lose("cut off")
    samba.go_on()
    await writing
    asked = [command for command, _ in sent if command in (wire.READ, wire.WRITE)]
    assert asked[0] == wire.READ
    assert (wire.WRITE, 1) in sent
    assert bytes(await backend.read(0, 4096)) == b"w" * 4096


def _recorded(submit: Callable[[Request], None], sent: list[tuple[int, int]]) -> Any:
    def record(request: Request) -> None:
        sent.append((request.command, request.replays))
        submit(request)

    return record
