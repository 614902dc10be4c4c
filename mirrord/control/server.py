"""The control socket: HTTP with JSON over a unix socket, and who may use it.

Every connection is checked by SO_PEERCRED as it comes, before a byte of it is read: the daemon's
own user and root are let in, everybody else is told so and hung up on. Bodies are bounded, have a
deadline, and may not have unknown keys. What a request means is `Api`'s affair; here it becomes a
status, and an error becomes `{"code": …, "message": …}`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, Protocol, TypeVar

import msgspec
from aiohttp import web

from mirrord.control.messages import (
    AttachRequest,
    CredentialTest,
    CredentialTestRequest,
    Disk,
    Job,
    LimitRequest,
    MoveRequest,
    Problem,
)
from mirrord.control.operations import OPERATIONS, STEERING, openapi
from mirrord.control.sockets import peer
from mirrord.errors import MirrordError, RefusedError, UsageError

log = logging.getLogger(__name__)

# A request names a disk and a location (4 KiB at most); the rest is room for keys to come.
BODY_BYTES_MAX = 64 << 10
# A local client sends its body with its headers; one that doesn't is stuck or hostile.
BODY_DEADLINE_S = 10.0
# Connections at once, of everybody: a script that waits for each of a host's disks fits.
CONNECTIONS_MAX = 256
# A connection without a request is closed after this.
IDLE_S = 30.0
# Progress is told so often, and that there is none so often.
EVENTS_S = 1.0
HEARTBEAT_S = 15.0
# https://prometheus.io/docs/instrumenting/exposition_formats/
METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A daemon that ends gives requests under way so long.
SHUTDOWN_S = 2.0

Request = TypeVar("Request", AttachRequest, MoveRequest, LimitRequest, CredentialTestRequest)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# What the state directory's file system says when nothing more can be kept there.
_STATE_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class Api(Protocol):
    """What the control interface offers. All may raise `MirrordError`."""

    async def disks(self) -> list[Disk]: ...
    async def disk(self, name: str) -> Disk: ...
    async def attach(self, request: AttachRequest) -> Disk: ...
    async def detach(self, name: str, *, force: bool) -> Disk: ...
    async def upgrade(self, name: str, *, force: bool) -> Disk: ...
    async def move(self, name: str, request: MoveRequest) -> Job: ...
    async def jobs(self, disk: str | None) -> list[Job]: ...
    async def job(self, job_id: str) -> Job: ...
    async def steer(self, job_id: str, verb: str) -> Job: ...
    async def limit(self, job_id: str, request: LimitRequest) -> Job: ...
    async def test_credential(self, request: CredentialTestRequest) -> CredentialTest: ...
    async def job_changed(self, within_s: float) -> None: ...
    async def metrics(self) -> bytes: ...


class ControlServer:
    """Serves `api` on a listening unix socket until `close`."""

    def __init__(self, api: Api, listener: socket.socket) -> None:
        self._api = api
        self._listener = listener
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[_errors])
        app.add_routes(self._routes())
        self._runner = web.AppRunner(
            app, access_log=None, keepalive_timeout=IDLE_S, shutdown_timeout=SHUTDOWN_S
        )
        self._task: asyncio.Task[None] | None = None

    def _routes(self) -> list[web.RouteDef]:
        return [
            web.route(each.method, _pattern(each.path), getattr(self, f"_{each.name}"))
            for each in OPERATIONS
        ]

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Begin to accept; the accepting task belongs to `group`."""
        await self._runner.setup()
        self._task = group.create_task(self._accept(), name="control socket")

    async def close(self) -> None:
        """Stop accepting and finish what is under way, within a short while."""
        if self._task is not None:
            self._task.cancel()
        self._listener.close()
        await self._runner.cleanup()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                log.warning("control socket can't accept: %s", error)
                await asyncio.sleep(0.1)  # out of descriptors: some will be closed
                continue
            problem = _not_admitted(connection, len(server.connections))
            if problem is not None:
                turn_away(connection, problem)
                continue
            await loop.connect_accepted_socket(server, connection)

    async def _disks(self, request: web.Request) -> web.Response:
        return _answer(await self._api.disks())

    async def _disk(self, request: web.Request) -> web.Response:
        return _answer(await self._api.disk(request.match_info["name"]))

    async def _attach(self, request: web.Request) -> web.Response:
        wanted = await _body(request, AttachRequest)
        return _answer(await self._api.attach(wanted), status=201)

    async def _detach(self, request: web.Request) -> web.Response:
        force = _flag(request, "force")
        return _answer(await self._api.detach(request.match_info["name"], force=force))

    async def _upgrade(self, request: web.Request) -> web.Response:
        force = _flag(request, "force")
        return _answer(await self._api.upgrade(request.match_info["name"], force=force))

    async def _move(self, request: web.Request) -> web.Response:
        wanted = await _body(request, MoveRequest)
        return _answer(await self._api.move(request.match_info["name"], wanted), status=202)

    async def _jobs(self, request: web.Request) -> web.Response:
        return _answer(await self._api.jobs(request.query.get("disk")))

    async def _job(self, request: web.Request) -> web.Response:
        return _answer(await self._api.job(request.match_info["id"]))

    async def _limit(self, request: web.Request) -> web.Response:
        wanted = await _body(request, LimitRequest)
        return _answer(await self._api.limit(request.match_info["id"], wanted))

    async def _test_credential(self, request: web.Request) -> web.Response:
        wanted = await _body(request, CredentialTestRequest)
        return _answer(await self._api.test_credential(wanted))

    async def _steer(self, request: web.Request) -> web.Response:
        info = request.match_info
        return _answer(await self._api.steer(info["id"], info["verb"]))

    async def _openapi(self, request: web.Request) -> web.Response:
        return _answer(openapi())

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=await self._api.metrics(), headers={"Content-Type": METRICS_CONTENT_TYPE}
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Tell of the moves that are under way, and of each that changes, until the client goes."""
        disk = request.query.get("disk")
        jobs = await self._api.jobs(disk)
        told = {job.id: job for job in jobs if job.ended_already}
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        await response.prepare(request)
        try:
            await self._tell(response, disk, jobs, told)
        except ConnectionResetError:
            pass  # the client has gone
        except MirrordError as error:  # nothing more to tell, of a disk that is gone: it ends
            log.info("events ended disk=%s reason=%s", disk, error)
        except Exception:  # an error's answer would come in the middle of the stream
            log.exception("events failed disk=%s", disk)
        return response

    async def _tell(
        self, response: web.StreamResponse, disk: str | None, jobs: list[Job], told: dict[str, Job]
    ) -> NoReturn:
        """Write what is not `told` yet, for ever. Raises ConnectionResetError."""
        quiet_s = 0.0
        while True:
            news = [job for job in jobs if told.get(job.id) != job]
            told = {job.id: job for job in jobs}
            for job in reversed(news):  # the oldest first
                data = msgspec.json.encode(job)
                await response.write(b"event: job\nid: %s\ndata: %s\n\n" % (job.id.encode(), data))
            quiet_s = 0.0 if news else quiet_s + EVENTS_S
            if quiet_s >= HEARTBEAT_S:
                await response.write(b":\n\n")  # a comment: who has gone is noticed
                quiet_s = 0.0
            await self._api.job_changed(EVENTS_S)
            jobs = await self._api.jobs(disk)


def _pattern(path: str) -> str:
    return path.replace("{verb}", "{verb:" + "|".join(STEERING) + "}")


def _not_admitted(connection: socket.socket, connections: int) -> Problem | None:
    _, uid, _ = peer(connection)
    if uid not in (0, os.geteuid()):
        return Problem(
            "forbidden", f"user {uid} may not use this daemon; root and its own user may"
        )
    if connections >= CONNECTIONS_MAX:
        return Problem("busy", f"the daemon has {connections} connections; try again later")
    return None


def turn_away(connection: socket.socket, problem: Problem) -> None:
    """Say why and hang up, without waiting for anything of the client's."""
    status = "403 Forbidden" if problem.code == "forbidden" else "503 Service Unavailable"
    body = msgspec.json.encode(problem)
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with connection:
        connection.setblocking(False)
        try:
            connection.send(head.encode() + body)
        except OSError as error:
            log.debug("client gone before it was turned away: %s", error)


def _flag(request: web.Request, name: str) -> bool:
    value = request.query.get(name, "false")
    if value not in ("true", "false"):
        raise UsageError(f"{name} is true or false, not {value!r}")
    return value == "true"


async def _body(request: web.Request, kind: type[Request]) -> Request:
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            data = await request.read()
    except TimeoutError as error:
        raise UsageError(f"the body did not come within {BODY_DEADLINE_S:.0f} s") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise UsageError(f"the body has more than {BODY_BYTES_MAX} bytes") from error
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise UsageError(f"the body is not what {request.path} takes: {error}") from error


def _answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what was raised into an answer that a program can read; log who changes what."""
    if request.method != "GET" and request.transport is not None:
        _, uid, _ = peer(request.transport.get_extra_info("socket"))
        log.info("asked uid=%d method=%s path=%s", uid, request.method, request.path)
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return _answer(Problem("unknown-path", f"there is no {request.path}"), 404)
    except web.HTTPMethodNotAllowed:
        return _answer(Problem("method", f"{request.path} has no {request.method}"), 405)
    except UsageError as error:
        return _answer(Problem(error.code, str(error)), 400)
    except RefusedError as error:
        status = 404 if error.code in ("unknown-disk", "unknown-job") else 409
        return _answer(Problem(error.code, str(error)), status)
    except MirrordError as error:
        status = 409 if error.exit_code == RefusedError.exit_code else 500
        return _answer(Problem(error.code, str(error)), status)
    except OSError as error:
        if error.errno in _STATE_FULL:
            text = f"the state directory can't be written ({error.strerror}): make room there"
            return _answer(Problem("state-error", text), 409)
        log.exception("request failed path=%s", request.path)
        return _answer(Problem("io-error", f"the daemon failed: {error}"), 500)
    except Exception as error:
        log.exception("request failed path=%s", request.path)
        return _answer(Problem("internal", f"the daemon failed ({error!r}); see its log"), 500)
