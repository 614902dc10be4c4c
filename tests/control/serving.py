"""A control server on a fake of what it serves, and requests to it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from mirrord.control.messages import (
    AttachRequest,
    CredentialTest,
    CredentialTestRequest,
    Disk,
    Job,
    LimitRequest,
    MoveRequest,
    Service,
    Uris,
)
from mirrord.control.server import ControlServer
from mirrord.control.sockets import Access, Peer, listen
from mirrord.errors import RefusedError
from tests.helpers import eventually_async

SERVICE = Service(version="1", state_dir="/var/lib/x", runtime_dir="/run/x", nbd_dir="/run/x/n")
DISK = Disk(
    name="vm", state="serving", reason=None, location="/vm.raw", size=1, read_only=False,
    cache="writeback", uris=Uris("nbd:"), clients=0, job=None,
)  # fmt: skip
CREDENTIAL = CredentialTest(
    location="smb://v/s", server="v", user=None, dialect="3.1.1", signing="required",
    encryption="required", weaknesses=[], channels=1, addresses=[], multichannel=False,
    continuously_available=False, read_bytes_max=1, write_bytes_max=1, writable=True,
)  # fmt: skip
JOB = Job(id="1", disk="vm", phase="copying", source="/vm.raw", target="/x.raw")


class FakeApi:
    """Remembers what was asked; answers, or raises `trouble`."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.trouble: Exception | None = None
        self.listed = [JOB]
        self.change = asyncio.Event()

    def _answer(self, value: Any, *asked: Any) -> Any:
        self.asked.append(asked)
        if self.trouble is not None:
            raise self.trouble
        return value

    async def service(self) -> Service:
        return self._answer(SERVICE, "service")

    async def disks(self) -> list[Disk]:
        return self._answer([DISK], "disks")

    async def disk(self, name: str) -> Disk:
        return self._answer(DISK, "disk", name)

    async def attach(self, request: AttachRequest) -> Disk:
        return self._answer(DISK, "attach", request)

    async def detach(self, name: str, *, force: bool) -> Disk:
        return self._answer(DISK, "detach", name, force)

    async def upgrade(self, name: str, *, force: bool) -> Disk:
        return self._answer(DISK, "upgrade", name, force)

    async def move(self, name: str, request: MoveRequest) -> Job:
        return self._answer(JOB, "move", name, request)

    async def jobs(self, disk: str | None) -> list[Job]:
        return self._answer(self.listed, "jobs", disk)

    async def job(self, job_id: str) -> Job:
        return self._answer(JOB, "job", job_id)

    async def steer(self, job_id: str, verb: str) -> Job:
        return self._answer(JOB, "steer", job_id, verb)

    async def limit(self, job_id: str, request: LimitRequest) -> Job:
        return self._answer(JOB, "limit", job_id, request)

    async def test_credential(self, request: CredentialTestRequest) -> CredentialTest:
        return self._answer(CREDENTIAL, "test_credential", request)

    async def jobs_changed(self, disk: str | None, within_s: float) -> list[Job]:
        self._answer(None, "changed", disk)
        await self.change.wait()
        self.change.clear()
        return self._answer(self.listed, "changed", disk)

    async def metrics(self) -> bytes:
        return self._answer(b"metric 1\n", "metrics")


class FakeGate:
    """Lets everybody in who isn't a stranger, but for the operations that are forbidden."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api
        self.strangers: set[int] = set()
        self.forbidden: set[str] = set()

    def admits(self, peer: Peer) -> bool:
        return peer.uid not in self.strangers

    def view(self, peer: Peer, operation: str) -> FakeApi:
        if operation in self.forbidden:
            raise RefusedError("forbidden", f"{peer.uid} may not {operation}")
        return self.api


class Served:
    """A control server on a fake, and requests to it."""

    def __init__(self, path: Path) -> None:
        self.api = FakeApi()
        self.gate = FakeGate(self.api)
        self.path = path

    async def tell_news(self, times: int) -> None:
        """Change the job; fail when nobody takes notice of it."""
        for number in range(times):
            self.api.listed = [msgspec.structs.replace(JOB, passes=number + 1)]
            self.api.change.set()
            await eventually_async(lambda: not self.api.change.is_set(), 0.5)

    async def ask(
        self, method: str, path: str, body: bytes | None = None, *, any_type: bool = False
    ) -> tuple[int, Any]:
        """Make one request; return status and document (with `any_type` that may be text)."""
        return await asyncio.to_thread(self._ask, method, path, body, any_type)

    def _ask(self, method: str, path: str, body: bytes | None, any_type: bool) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.path))
        try:
            with contextlib.suppress(BrokenPipeError):  # turned away before it was read
                connection.request(method, path, body)
            response = connection.getresponse()
            if any_type and response.getheader("Content-Type", "").startswith("text/plain"):
                return response.status, response.read()
            assert response.getheader("Content-Type") in (
                "application/json", "application/json; charset=utf-8",
            )  # fmt: skip
            return response.status, json.loads(response.read())
        finally:
            connection.close()


class _OverError(Exception):
    pass


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Served]:
    """Serve a fake at a socket."""
    one = Served(path)
    control = ControlServer(one.gate, listen(path, Access()))
    try:
        async with asyncio.TaskGroup() as group:
            await control.start(group)
            yield one
            await control.close()
            raise _OverError
    except* _OverError:
        pass
