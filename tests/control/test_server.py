"""The control socket as any HTTP client sees it: routes, bodies, limits, who is let in."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mirrord.control import server
from mirrord.control.messages import (
    AttachRequest,
    Disk,
    Job,
    LimitRequest,
    MoveRequest,
    Uris,
)
from mirrord.control.server import BODY_BYTES_MAX, ControlServer
from mirrord.control.sockets import Access, listen
from mirrord.errors import DamagedError, MirrordError, RefusedError

DISK = Disk(
    name="vm", state="serving", reason=None, location="/vm.raw", size=1, read_only=False,
    cache="writeback", uris=Uris("nbd:"), clients=0, job=None,
)  # fmt: skip
JOB = Job(id="1", disk="vm", phase="copying", source="/vm.raw", target="/x.raw")


class FakeApi:
    """Remembers what was asked; answers, or raises `trouble`."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.trouble: Exception | None = None

    def _answer(self, value: Any, *asked: Any) -> Any:
        self.asked.append(asked)
        if self.trouble is not None:
            raise self.trouble
        return value

    async def disks(self) -> list[Disk]:
        return self._answer([DISK], "disks")

    async def disk(self, name: str) -> Disk:
        return self._answer(DISK, "disk", name)

    async def attach(self, request: AttachRequest) -> Disk:
        return self._answer(DISK, "attach", request)

    async def detach(self, name: str, *, force: bool) -> Disk:
        return self._answer(DISK, "detach", name, force)

    async def move(self, name: str, request: MoveRequest) -> Job:
        return self._answer(JOB, "move", name, request)

    async def jobs(self, disk: str | None) -> list[Job]:
        return self._answer([JOB], "jobs", disk)

    async def job(self, job_id: str) -> Job:
        return self._answer(JOB, "job", job_id)

    async def steer(self, job_id: str, verb: str) -> Job:
        return self._answer(JOB, "steer", job_id, verb)

    async def limit(self, job_id: str, request: LimitRequest) -> Job:
        return self._answer(JOB, "limit", job_id, request)


class Served:
    """A control server on a fake, and requests to it."""

    def __init__(self, path: Path) -> None:
        self.api = FakeApi()
        self.path = path

    async def ask(
        self, method: str, path: str, body: bytes | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Make one request; return status and document."""
        return await asyncio.to_thread(self._ask, method, path, body)

    def _ask(self, method: str, path: str, body: bytes | None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.path))
        try:
            with contextlib.suppress(BrokenPipeError):  # turned away before it was read
                connection.request(method, path, body)
            response = connection.getresponse()
            assert response.getheader("Content-Type") in (
                "application/json", "application/json; charset=utf-8",
            )  # fmt: skip
            return response.status, json.loads(response.read())
        finally:
            connection.close()


class _OverError(Exception):
    pass


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """Serve a fake at a socket."""
    path = tmp_path / "c.sock"
    one = Served(path)
    control = ControlServer(one.api, listen(path, Access()))
    try:
        async with asyncio.TaskGroup() as group:
            await control.start(group)
            yield one
            await control.close()
            raise _OverError
    except* _OverError:
        pass


async def test_every_route(served: Served) -> None:
    moved = MoveRequest("/x.raw", limit=5, mode="mirror")
    asked: list[tuple[str, str, Any, int, tuple[Any, ...]]] = [
        ("GET", "/v1/disks", None, 200, ("disks",)),
        ("GET", "/v1/disks/vm", None, 200, ("disk", "vm")),
        ("POST", "/v1/disks", {"name": "vm", "location": "/l"}, 201,
         ("attach", AttachRequest("vm", "/l"))),
        ("DELETE", "/v1/disks/vm", None, 200, ("detach", "vm", False)),
        ("DELETE", "/v1/disks/vm?force=true", None, 200, ("detach", "vm", True)),
        ("POST", "/v1/disks/vm/move", {"target": "/x.raw", "limit": 5, "mode": "mirror"}, 202,
         ("move", "vm", moved)),
        ("GET", "/v1/jobs", None, 200, ("jobs", None)),
        ("GET", "/v1/jobs?disk=vm", None, 200, ("jobs", "vm")),
        ("GET", "/v1/jobs/1", None, 200, ("job", "1")),
        ("PATCH", "/v1/jobs/1", {"limit": 7}, 200, ("limit", "1", LimitRequest(7))),
        *((("POST", f"/v1/jobs/1/{verb}", None, 200, ("steer", "1", verb)))
          for verb in ("pause", "resume", "cancel", "cutover")),
    ]  # fmt: skip
    for method, path, body, status, call in asked:
        data = None if body is None else json.dumps(body).encode()
        answered, document = await served.ask(method, path, data)
        assert answered == status, document
        assert served.api.asked.pop() == call
        first = document[0] if isinstance(document, list) else document
        assert first["disk" if "job" in path or "move" in path else "name"] == "vm"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"x"', b'{"target": 5}', b"{}", b'{"target": "/x", "mode": "fast"}',
        b'{"target": "/x", "surprise": 1}', b'{"target": "/x", "limit": "fast"}', b"\xff\xfe",
    ],
)  # fmt: skip
async def test_a_wrong_body(served: Served, body: bytes) -> None:
    status, problem = await served.ask("POST", "/v1/disks/vm/move", body)
    assert (status, problem["code"]) == (400, "usage")
    assert not served.api.asked


async def test_an_unknown_key_is_named(served: Served) -> None:
    body = b'{"name": "vm", "location": "/l", "colour": "red"}'
    _, problem = await served.ask("POST", "/v1/disks", body)
    assert "colour" in problem["message"]


async def test_a_body_that_is_too_large(served: Served) -> None:
    body = b'{"target": "%s"}' % (b"x" * BODY_BYTES_MAX)
    status, problem = await served.ask("POST", "/v1/disks/vm/move", body)
    assert (status, problem["code"]) == (400, "usage")
    assert str(BODY_BYTES_MAX) in problem["message"]


async def test_a_body_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_DEADLINE_S", 0.05)
    reader, writer = await asyncio.open_unix_connection(served.path)
    writer.write(b"POST /v1/disks HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    assert await asyncio.wait_for(reader.readline(), 5) == b"HTTP/1.1 400 Bad Request\r\n"
    writer.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v2/disks", 404), ("POST", "/v1/jobs/1/fly", 404),
        ("PUT", "/v1/disks", 405), ("GET", "/v1/disks/vm/move", 405),
        ("DELETE", "/v1/disks/vm?force=perhaps", 400),
    ],
)  # fmt: skip
async def test_a_wrong_address(served: Served, method: str, path: str, status: int) -> None:
    answered, problem = await served.ask(method, path)
    assert answered == status
    assert set(problem) == {"code", "message"}
    assert not served.api.asked


@pytest.mark.parametrize(
    ("trouble", "status", "code"),
    [
        (RefusedError("target-exists", "it exists"), 409, "target-exists"),
        (RefusedError("unknown-disk", "no such disk"), 404, "unknown-disk"),
        (DamagedError("it is damaged"), 409, "damaged"),
        (MirrordError("it died"), 500, "failed"),
    ],
)
async def test_an_error_becomes_a_status(
    served: Served, trouble: Exception, status: int, code: str
) -> None:
    served.api.trouble = trouble
    answered, problem = await served.ask("GET", "/v1/disks/vm")
    assert (answered, problem) == (status, {"code": code, "message": str(trouble)})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
async def test_a_full_state_directory_is_a_refusal(served: Served, number: int) -> None:
    served.api.trouble = OSError(number, os.strerror(number))
    status, problem = await served.ask("GET", "/v1/disks")
    assert (status, problem["code"]) == (409, "state-error")
    assert "state directory" in problem["message"]
    assert os.strerror(number) in problem["message"]


@pytest.mark.parametrize("trouble", [OSError(5, "Input/output error"), ZeroDivisionError("bug")])
async def test_a_failure_of_the_daemon_is_told_and_logged(
    served: Served, trouble: Exception, expect_log: Any
) -> None:
    expect_log("request failed")
    served.api.trouble = trouble
    status, problem = await served.ask("GET", "/v1/disks")
    assert status == 500
    assert problem["code"] in ("io-error", "internal")
    served.api.trouble = None
    assert (await served.ask("GET", "/v1/disks"))[0] == 200


async def test_a_stranger_is_told_and_hung_up_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "peer", lambda connection: (1, os.geteuid() + 4711, 1))
    reader, writer = await asyncio.open_unix_connection(served.path)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["code"] == "forbidden"
    writer.close()
    assert not served.api.asked


async def test_root_is_let_in(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "peer", lambda connection: (1, 0, 0))
    assert (await served.ask("GET", "/v1/disks"))[0] == 200


async def test_too_many_connections(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 1)
    reader, writer = await asyncio.open_unix_connection(served.path)
    writer.write(b"GET /v1/disks HTTP/1.1\r\nHost: x\r\n\r\n")
    assert await asyncio.wait_for(reader.readline(), 5) == b"HTTP/1.1 200 OK\r\n"
    status, problem = await served.ask("GET", "/v1/disks")
    assert (status, problem["code"]) == (503, "busy")
    writer.close()


async def test_garbage_ends_one_connection_only(served: Served) -> None:
    reader, writer = await asyncio.open_unix_connection(served.path)
    writer.write(b"\x00\x01\x02garbage\r\n\r\n")
    assert b" 400 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    assert (await served.ask("GET", "/v1/disks"))[0] == 200
