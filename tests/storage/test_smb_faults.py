"""A real server that dies, stops, forgets or is cut off, below a disk that a guest depends on."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirrord.core.geometry import KIB, MIB
from mirrord.storage.backend import UnreachableError
from mirrord.storage.remote import LostError
from mirrord.storage.smb import control
from mirrord.storage.smb.file import ShareFile
from mirrord.storage.steady import SteadyBackend
from tests.helpers import eventually_async
from tests.samba import Samba
from tests.storage.conformance import pattern
from tests.storage.places import allocated_bytes
from tests.storage.shares import (
    DEADLINE_S,
    QUICK,
    Guest,
    MakeClient,
    Words,
    smbclient,
    state_of,
    until_away,
)
from tests.storage.shares import make_client as make_client
from tests.tcp_proxy import Direction, Proxy

SIZE = 4 * MIB
LOST_AND_FOUND = ("connection lost", "connected again")
SEALED = pytest.mark.parametrize("encrypt", [True, False], ids=["encrypted", "signed"])


@pytest.fixture
def server(make_samba: Callable[..., Samba]) -> Samba:
    """A server of this test's own, with a disk."""
    one = make_samba()
    one.put("disk.raw", pattern(SIZE))
    return one


@pytest.fixture
def healthy(samba: Samba) -> Samba:
    """A server to which nothing happens, with a disk."""
    samba.put("disk.raw", pattern(SIZE))
    return samba


@pytest.fixture
def proxy(healthy: Samba) -> Iterator[Proxy]:
    """What lies between that and the client."""
    with Proxy(healthy.port) as one:
        yield one


@pytest.fixture(autouse=True)
def _announced(expect_log: Callable[..., None]) -> None:
    expect_log(*LOST_AND_FOUND)


class TestAuthority:
    """Requests wait; no error, nothing is lost."""

    async def opened(self, client_of: MakeClient, server: Samba, **settings: Any) -> SteadyBackend:
        client = client_of(server, line=QUICK, **settings)
        return await client.open(authoritative=True)

    @SEALED
    @pytest.mark.parametrize("end", ["kill_child", "terminate_child", "crash", "restart", "reboot"])
    async def test_a_server_that_ends(
        self, server: Samba, make_client: MakeClient, end: str, encrypt: bool
    ) -> None:
        backend = await self.opened(make_client, server, encrypt=encrypt)
        guest = Guest(backend)
        async with guest.at_work():
            await guest.some_more()
            if end in ("crash", "reboot"):
                await asyncio.to_thread(server.kill_all)
                await until_away(backend)
                server.start(rebooted=end == "reboot")
            else:
                await asyncio.to_thread(getattr(server, end))
        # what a process keeps in its memory is lost when it is killed; else the handle is ours
        assert backend.connected().kept == (end == "terminate_child")
        await guest.check(server)

    async def test_a_rebooted_server_that_forgot_what_was_not_flushed(
        self, server: Samba, make_client: MakeClient
    ) -> None:
        backend = await self.opened(make_client, server)
        await backend.write(0, b"flushed" * 1000)
        await backend.flush()
        before = server.file("disk.raw").read_bytes()
        await backend.write(100 * KIB, b"acknowledged" * 9000)
        await backend.write(100 * KIB + 50, b"later")
        await backend.write_zeroes(MIB, 3 * KIB)
        seen = bytes(await backend.read(0, SIZE))
        server.kill_all()
        with server.file("disk.raw").open("r+b") as file:  # the same inode
            file.write(before)
        await until_away(backend)
        reading = asyncio.create_task(backend.read(0, SIZE))
        server.start(rebooted=True)
        assert bytes(await reading) == seen
        await backend.flush()
        assert server.file("disk.raw").read_bytes() == seen
        assert backend.facts()["unflushed_bytes"] == 0

    async def test_a_server_that_is_only_slow_is_waited_for(
        self, server: Samba, make_client: MakeClient, announced_logs: Any
    ) -> None:
        client = make_client(server, line=replace(QUICK, silence_s=4.0))
        backend = await client.open(authoritative=True)
        line = (await client.session())._seats[0].line
        server.pause(everything=True)
        try:
            reading = asyncio.create_task(backend.read(0, 5000))
            await eventually_async(lambda: line._echoed, what="it is asked whether it is there")
            assert not reading.done()
        finally:
            server.go_on()
        assert bytes(await reading) == pattern(SIZE)[:5000]
        assert not announced_logs.lines

    async def test_silence_counts_from_the_question(
        self, server: Samba, make_client: MakeClient
    ) -> None:
        """A line that was idle for long is not lost because its next answer takes a moment."""
        client = make_client(server, line=replace(QUICK, silence_s=3.0, idle_s=3600.0))
        backend = await client.open()
        line = (await client.session())._seats[0].line
        line.channel.heard_s -= 1000
        server.pause()
        reading = asyncio.create_task(backend.read(0, 512))
        try:
            await eventually_async(lambda: line.channel.in_flight)
            line._check()
            assert line.why is None
        finally:
            server.go_on()
        assert bytes(await reading) == pattern(SIZE)[:512]

    @pytest.mark.parametrize("everything", [False, True])
    async def test_a_server_that_stops_answering(
        self, server: Samba, make_client: MakeClient, everything: bool
    ) -> None:
        backend = await self.opened(make_client, server)
        guest = Guest(backend)
        async with guest.at_work():
            await guest.some_more()
            server.pause(everything=everything)
            await until_away(backend)
            server.go_on()
        await guest.check(server)

    @SEALED
    @pytest.mark.parametrize(
        "fault",
        [
            lambda proxy: proxy.cut(),
            lambda proxy: proxy.cut_after(30_000, "to_server"),
            lambda proxy: proxy.cut_after(300, "to_client"),
            lambda proxy: proxy.truncate("to_server", 70),
            lambda proxy: proxy.truncate("to_client"),
            lambda proxy: proxy.corrupt("to_server", 5000),
            lambda proxy: proxy.corrupt("to_client", 500),
            lambda proxy: proxy.corrupt("to_client", 0, 60),
        ],
        ids=[
            "cut", "cut-request", "cut-answer", "truncated-request", "truncated-answer",
            "changed-request", "changed-answer", "garbage",
        ],
    )  # fmt: skip
    async def test_a_network_that_cuts_and_corrupts(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient, encrypt: bool,
        fault: Callable[[Proxy], None],
    ) -> None:  # fmt: skip
        backend = await self.opened(make_client, healthy, port=proxy.port, encrypt=encrypt)
        guest = Guest(backend)
        accepted = proxy.accepted
        async with guest.at_work():
            await guest.some_more()
            fault(proxy)
            await eventually_async(
                lambda: proxy.accepted > accepted or guest.failed(), DEADLINE_S, "again"
            )
        await guest.check(healthy)

    @pytest.mark.parametrize("direction", ["to_server", "to_client", None])
    async def test_a_network_that_swallows(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient, direction: Direction | None
    ) -> None:
        backend = await self.opened(make_client, healthy, port=proxy.port)
        guest = Guest(backend)
        async with guest.at_work():
            await guest.some_more()
            proxy.hold(direction)
            await until_away(backend)
            assert "said nothing" in str(backend.facts()["reason"])
            proxy.release()
        await guest.check(healthy)

    async def test_a_slow_network_is_no_fault(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient, announced_logs: Any
    ) -> None:
        backend = await self.opened(make_client, healthy, port=proxy.port)
        guest = Guest(backend)
        async with guest.at_work():
            proxy.delay(0.05)
        proxy.delay(0)
        await guest.check(healthy)
        assert not announced_logs.lines

    @SEALED
    async def test_what_was_changed_on_the_way_is_never_read(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient, encrypt: bool
    ) -> None:
        backend = await self.opened(make_client, healthy, port=proxy.port, encrypt=encrypt)
        for skip in (3000, 300_000, 700_123):
            proxy.corrupt("to_client", skip)
            assert bytes(await backend.read(0, MIB)) == pattern(SIZE)[:MIB]

    async def test_a_handle_is_taken_over_again_and_again(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient
    ) -> None:
        client = make_client(healthy, port=proxy.port, line=QUICK)
        backend = await client.open(authoritative=True)
        assert backend.facts()["handle"] == "durable"
        for number in range(4):
            await backend.write(number * 5000, b"x" * 5000)
            proxy.cut()
            await until_away(backend)
            assert bytes(await backend.read(number * 5000, 5000)) == b"x" * 5000
            assert backend.connected().kept
            assert backend.facts()["handle"] == "durable"
            file = backend.connected()
            assert isinstance(file, ShareFile)
            facts = await file.session.control(control.facts, file.tree.share, file.handle)
            assert facts.is_sparse
        await backend.trim(0, SIZE)
        await backend.flush()
        assert allocated_bytes(healthy.file("disk.raw")) <= 64 * KIB, "it is not sparse any more"
        await backend.close()
        assert client.server.users == 0


class TestUnreachable:
    """It takes too long, or what comes back is another thing."""

    async def test_requests_fail_when_their_time_is_over_and_work_later(
        self, server: Samba, make_client: MakeClient, expect_log: Callable[..., None]
    ) -> None:
        expect_log("flush not possible")  # kept writes are flushed from time to time
        backend = await make_client(server, line=QUICK, io_timeout_s=0.3).open(authoritative=True)
        await backend.write(0, b"kept")
        server.kill_all()
        await until_away(backend)
        with pytest.raises(UnreachableError) as caught:
            await backend.read(0, 4)
        assert "could not be reached in time" in str(caught.value)
        assert client_text(server) in str(caught.value)
        with pytest.raises(UnreachableError):
            await backend.flush()
        server.start()
        await eventually_async(lambda: state_of(backend) == "connected", DEADLINE_S)
        assert bytes(await backend.read(0, 4)) == b"kept"
        await backend.flush()

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ("replace", "replaced by another file"),
            ("grow", f"has {SIZE + 512} bytes, not {SIZE}"),
            ("first", "not as it was left: at offset 0"),
            ("flushed", f"not as it was left: at offset {MIB}"),
        ],
    )
    async def test_another_disk_is_refused(
        self, server: Samba, make_client: MakeClient, expect_log: Callable[..., None],
        change: str, reason: str,
    ) -> None:  # fmt: skip
        expect_log("storage failed")
        backend = await make_client(server, line=QUICK).open(authoritative=True)
        await eventually_async(lambda: len(backend._samples.all()) == 2, what="edges are known")
        await backend.write(MIB, b"durable" * 100)
        await backend.flush()
        server.kill_all()
        file = server.file("disk.raw")
        if change == "replace":
            content = file.read_bytes()
            file.rename(server.file("old.raw"))
            server.put("disk.raw", content)
        elif change == "grow":
            os.truncate(file, SIZE + 512)
        else:
            with file.open("r+b") as opened:
                opened.seek(0 if change == "first" else MIB)
                opened.write(b"another")
        server.start()
        for ask in (backend.read(0, 512), backend.write(0, b"x"), backend.flush()):
            with pytest.raises(OSError, match="the disk on") as caught:
                await ask
            assert caught.value.errno == errno.EIO
            assert reason in str(caught.value)
        assert state_of(backend) == "failed"
        assert reason in str(backend.facts()["reason"])

    async def test_a_file_that_is_not_there_is_waited_for(
        self, server: Samba, make_client: MakeClient
    ) -> None:
        backend = await make_client(server, line=QUICK).open(authoritative=True)
        server.kill_all()
        server.file("disk.raw").rename(server.file("elsewhere"))
        server.start()
        reading = asyncio.create_task(backend.read(0, 512))
        await eventually_async(lambda: "is not there" in str(backend.facts()["reason"]))
        assert not reading.done()
        server.file("elsewhere").rename(server.file("disk.raw"))
        assert bytes(await reading) == pattern(SIZE)[:512]

    @pytest.mark.parametrize("authoritative", [True, False])
    async def test_another_password_is_waited_for(
        self, server: Samba, make_client: MakeClient, authoritative: bool
    ) -> None:
        client = make_client(server, line=QUICK)
        backend = await client.open(authoritative=authoritative)
        server.set_password("another")
        server.terminate_child()
        await until_away(backend)
        await eventually_async(lambda: "wrong user or password" in str(backend.facts()["reason"]))
        reading = asyncio.create_task(backend.read(0, 512))
        if not authoritative:
            with pytest.raises(OSError, match="wrong user or password"):
                await reading
        client.login.password = Words("another")
        client.stamp += 1
        if authoritative:
            await reading
        await eventually_async(lambda: state_of(backend) == "connected", DEADLINE_S)
        assert bytes(await backend.read(0, 512)) == pattern(SIZE)[:512]


class TestTarget:
    """An error at once, and one more at the first flush, so that the job copies again."""

    async def test_it_fails_at_once_and_the_first_flush_fails_once(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient
    ) -> None:
        client = make_client(healthy, port=proxy.port, line=QUICK)
        backend = await client.open()
        await backend.write(0, b"x" * 4096)
        proxy.hold()
        writing = asyncio.create_task(backend.write(4096, b"y" * 4096))
        line = (await client.session())._seats[0].line
        await eventually_async(lambda: line.channel.in_flight, what="it was sent")
        proxy.cut()
        with pytest.raises(LostError) as caught:
            await writing
        assert caught.value.errno == errno.ENOTCONN
        assert client_text(proxy) in str(caught.value)
        proxy.release()
        await backend.write(8192, b"z" * 4096)
        with pytest.raises(OSError, match="may have forgotten") as refused:
            await backend.flush()
        assert refused.value.errno == errno.ENOTCONN
        await backend.write(0, b"x" * 4096)
        await backend.write(4096, b"y" * 4096)
        await backend.flush()
        assert healthy.file("disk.raw").read_bytes()[:12288] == b"".join(
            letter * 4096 for letter in (b"x", b"y", b"z")
        )

    async def test_what_was_flushed_needs_no_second_copy(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient
    ) -> None:
        backend = await make_client(healthy, port=proxy.port, line=QUICK).open()
        await backend.write(0, b"x" * 4096)
        await backend.flush()
        proxy.cut()
        await until_away(backend)
        await backend.flush()
        assert bytes(await backend.read(0, 4096)) == b"x" * 4096

    @SEALED
    async def test_what_was_changed_on_the_way_is_an_error(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient, encrypt: bool
    ) -> None:
        client = make_client(healthy, port=proxy.port, line=QUICK, encrypt=encrypt)
        backend = await client.open()
        proxy.corrupt("to_client", 300_000)
        with pytest.raises(LostError, match="broke the protocol"):
            await backend.read(0, MIB)
        assert bytes(await backend.read(0, MIB)) == pattern(SIZE)[:MIB]

    async def test_a_plain_path_comes_back_too(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient
    ) -> None:
        backend = await make_client(healthy, port=proxy.port, line=QUICK, fast=False).open()
        await backend.write(0, b"x" * 4096)
        proxy.cut()
        with pytest.raises(LostError):
            await backend.write(4096, b"y" * 4096)
        await backend.write(8192, b"z" * 4096)
        with pytest.raises(OSError, match="may have forgotten"):
            await backend.flush()
        await backend.flush()
        assert backend.facts()["handle"] == "plain"


def born_ns(file: Path) -> int:
    """Return when a file was made, which `os.stat` doesn't tell."""
    told = subprocess.run(["stat", "-c", "%.9W", file], capture_output=True, text=True, check=True)
    return int(told.stdout.replace(".", ""))


class TestHandle:
    """What the server keeps for us, and until when."""

    async def test_a_new_session_ends_the_one_that_the_server_believes_in(
        self, server: Samba, make_client: MakeClient
    ) -> None:
        client = make_client(server, line=QUICK)
        backend = await client.open(authoritative=True)
        first = await client.session()
        lost = LostError("believed by us alone")
        stranger = make_client(server)
        with pytest.raises(Exception, match="in use by another client"):
            await stranger.open()
        first._lose(lost)  # its connection stays
        assert bytes(await backend.read(0, 512)) == pattern(SIZE)[:512]
        assert (await client.session()) is not first
        await first.close()

    async def test_somebody_who_wants_the_file_breaks_the_lease_and_nothing_else(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient
    ) -> None:
        backend = await make_client(healthy, port=proxy.port, line=QUICK).open(authoritative=True)
        assert backend.facts()["handle"] == "durable"
        printed = await asyncio.to_thread(smbclient, healthy, "get disk.raw /dev/null")
        assert "SHARING_VIOLATION" in printed
        await eventually_async(lambda: backend.facts()["handle"] == "plain", what="a lease broken")
        await backend.write(0, b"still ours")
        proxy.cut()
        await until_away(backend)
        assert bytes(await backend.read(0, 10)) == b"still ours"
        assert not backend.connected().kept
        assert backend.facts()["handle"] == "durable"

    async def test_a_handle_that_the_server_gives_back_to_nobody(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Samba compares births; half of what it refuses would keep everybody out, us too."""
        real = control.facts
        monkeypatch.setattr(control, "facts", lambda *about: replace(real(*about), is_sparse=True))
        # In units of 100 ns, as SMB has it, one birth in a hundred would be the same.
        while born_ns(healthy.put("birth.raw", pattern(SIZE))) % 100 == 0:
            healthy.file("birth.raw").unlink()
        client = make_client(healthy, port=proxy.port, line=QUICK)
        backend = await client.open("birth.raw", authoritative=True)
        file = backend.connected()
        assert isinstance(file, ShareFile)
        await file.session.control(control.make_sparse, file.tree.share, file.handle)
        proxy.cut()
        await until_away(backend)
        assert bytes(await backend.read(0, 512)) == pattern(SIZE)[:512]
        assert not backend.connected().kept

    async def test_a_new_target_s_handle_is_taken_over(
        self, healthy: Samba, proxy: Proxy, make_client: MakeClient
    ) -> None:
        client = make_client(healthy, port=proxy.port, line=QUICK)
        backend = await client.create("new.raw", SIZE, authoritative=True)
        proxy.cut()
        await until_away(backend)
        assert bytes(await backend.read(0, 512)) == bytes(512)
        assert backend.connected().kept
        await client.place("new.raw").discard("another job")
        os.unlink(healthy.file(backend.connected().path))


def client_text(where: Samba | Proxy) -> str:
    """Return what messages call the server."""
    return f"127.0.0.1:{where.port}"
