"""The control socket: HTTP with JSON over a unix socket.

Every connection is looked at by SO_PEERCRED as it comes, before a byte of it is read: who may do
nothing here (`Gate.admits`) is told so and hung up on. Each request then gets the interface as its
peer may use it for that operation (`Gate.view`), and nothing else reaches the daemon. Nobody's
connections can take the place of others': each user has so many, and root's are counted apart.

Heads and bodies are bounded and have a deadline, and bodies may not have unknown keys. What a
request means is `Api`'s affair; here it becomes a status, and an error becomes
`{"code": …, "message": …}`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from functools import partial
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
    Service,
)
from mirrord.control.operations import OPERATIONS, STEERING, Operation, openapi
from mirrord.control.sockets import Peer, peer
from mirrord.errors import MirrordError, RefusedError, UsageError

log = logging.getLogger(__name__)

# A request names a disk and a location (4 KiB at most); the rest is room for keys to come.
BODY_BYTES_MAX = 64 << 10
# A local client sends its body with its headers; one that doesn't is stuck or hostile.
BODY_DEADLINE_S = 10.0
# Connections at once, of root and the daemon's user, and again of all others: a script that waits
# for each of a host's disks fits.
CONNECTIONS_MAX = 256
# Of one of the others, so that eight of them fit.
USER_CONNECTIONS_MAX = 32
# A connection without a complete head of a request is closed after this.
IDLE_S = 30.0
# Out of descriptors: nobody is accepted for so long, and the log gets one line each time.
ACCEPT_PAUSE_S = 1.0
# Progress is told so often, and that there is none so often.
EVENTS_S = 1.0
HEARTBEAT_S = 15.0
# https://prometheus.io/docs/instrumenting/exposition_formats/
METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A daemon that ends gives requests under way so long.
SHUTDOWN_S = 2.0

Request = TypeVar("Request", AttachRequest, MoveRequest, LimitRequest, CredentialTestRequest)

# Of what is no HTTP so much is told back.
_ECHO_CHARACTERS_MAX = 200
# An answer that nobody reads.
_GONE = "the client has gone"
# What the state directory's file system says when nothing more can be kept there.
_STATE_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_STATUSES = {"forbidden": 403, "unknown-disk": 404, "unknown-job": 404}


class Api(Protocol):
    """What the control interface offers. All may raise `MirrordError`."""

    async def service(self) -> Service: ...
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
    async def jobs_changed(self, disk: str | None, within_s: float) -> list[Job]: ...
    async def metrics(self) -> bytes: ...


class Gate(Protocol):
    """Who may do what."""

    def admits(self, peer: Peer) -> bool:
        """Tell whether it may do anything at all."""

    def view(self, peer: Peer, operation: str) -> Api:
        """Return the interface as `peer` may use it for one operation of `OPERATIONS`.

        Raises RefusedError (`forbidden`), as everything that the peer may not do with it does.
        """


Handler = Callable[[Api, web.Request], Awaitable[web.StreamResponse]]


class _Connection(web.RequestHandler):
    """Answers what is no HTTP in JSON as well, and leaves no trace of it in the log."""

    __slots__ = ()

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        no_log: Any = None  # of accesses
        super().__init__(server, loop=loop, access_log=no_log, keepalive_timeout=IDLE_S)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status != 400:
            return super().handle_error(request, status, exc, message)
        why = " ".join((message or "it is malformed").split())[:_ECHO_CHARACTERS_MAX]
        answer = _answer(Problem("usage", f"the request is no HTTP: {why}"), status)
        answer.force_close()
        return answer


class ControlServer:
    """Serves what `gate` lets through on a listening unix socket until `close`."""

    def __init__(self, gate: Gate, listener: socket.socket) -> None:
        self._gate = gate
        self._listener = listener
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[_errors])
        app.add_routes(self._routes())
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        self._task: asyncio.Task[None] | None = None

    def _routes(self) -> list[web.RouteDef]:
        return [
            web.route(
                each.method,
                _pattern(each.path),
                partial(self._run, each, getattr(self, f"_{each.name}")),
            )
            for each in OPERATIONS
        ]

    async def _run(
        self, operation: Operation, handler: Handler, request: web.Request
    ) -> web.StreamResponse:
        if request.transport is None:
            raise UsageError(_GONE)
        asking = peer(request.transport.get_extra_info("socket"))
        api = self._gate.view(asking, operation.name)
        unknown = set(request.query) - set(operation.query)
        if unknown:
            takes = f"; it takes {', '.join(operation.query)}" if operation.query else ""
            raise UsageError(f"{operation.path} takes no {min(unknown)!r}{takes}")
        return await handler(api, request)

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
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            problem = self._not_admitted(connection)
            if problem is not None:
                log.info("turned away uid=%d code=%s", peer(connection).uid, problem.code)
                turn_away(connection, problem)
                continue
            await loop.connect_accepted_socket(partial(_Connection, server, loop), connection)

    def _not_admitted(self, connection: socket.socket) -> Problem | None:
        asking = peer(connection)
        if not self._gate.admits(asking):
            return Problem(
                "forbidden",
                f"user {asking.uid} may do nothing here; root and the daemon's own user may, and "
                "whom a [[grant]] in mirrord.toml names",
            )
        others = self._connected()
        alike = sum(each.unrestricted is asking.unrestricted for each in others)
        own = sum(each.uid == asking.uid for each in others)
        if alike >= CONNECTIONS_MAX or (not asking.unrestricted and own >= USER_CONNECTIONS_MAX):
            return Problem("busy", f"too many connections ({own} of this user); try again later")
        return None

    def _connected(self) -> list[Peer]:
        server = self._runner.server
        assert server is not None
        transports = (each.transport for each in server.connections)
        return [peer(each.get_extra_info("socket")) for each in transports if each is not None]

    async def _service(self, api: Api, request: web.Request) -> web.Response:
        return _answer(await api.service())

    async def _disks(self, api: Api, request: web.Request) -> web.Response:
        return _answer(await api.disks())

    async def _disk(self, api: Api, request: web.Request) -> web.Response:
        return _answer(await api.disk(request.match_info["name"]))

    async def _attach(self, api: Api, request: web.Request) -> web.Response:
        wanted = await _body(request, AttachRequest)
        return _answer(await api.attach(wanted), status=201)

    async def _detach(self, api: Api, request: web.Request) -> web.Response:
        force = _flag(request, "force")
        return _answer(await api.detach(request.match_info["name"], force=force))

    async def _upgrade(self, api: Api, request: web.Request) -> web.Response:
        force = _flag(request, "force")
        return _answer(await api.upgrade(request.match_info["name"], force=force))

    async def _move(self, api: Api, request: web.Request) -> web.Response:
        wanted = await _body(request, MoveRequest)
        return _answer(await api.move(request.match_info["name"], wanted), status=202)

    async def _jobs(self, api: Api, request: web.Request) -> web.Response:
        return _answer(await api.jobs(request.query.get("disk")))

    async def _job(self, api: Api, request: web.Request) -> web.Response:
        return _answer(await api.job(request.match_info["id"]))

    async def _limit(self, api: Api, request: web.Request) -> web.Response:
        wanted = await _body(request, LimitRequest)
        return _answer(await api.limit(request.match_info["id"], wanted))

    async def _test_credential(self, api: Api, request: web.Request) -> web.Response:
        wanted = await _body(request, CredentialTestRequest)
        return _answer(await api.test_credential(wanted))

    async def _steer(self, api: Api, request: web.Request) -> web.Response:
        info = request.match_info
        return _answer(await api.steer(info["id"], info["verb"]))

    async def _openapi(self, api: Api, request: web.Request) -> web.Response:
        return _answer(openapi())

    async def _metrics(self, api: Api, request: web.Request) -> web.Response:
        return web.Response(
            body=await api.metrics(), headers={"Content-Type": METRICS_CONTENT_TYPE}
        )

    async def _events(self, api: Api, request: web.Request) -> web.StreamResponse:
        """Tell of the moves that are under way, and of each that changes, until the client goes."""
        disk = request.query.get("disk")
        jobs = await api.jobs(disk)
        told = {job.id: job for job in jobs if job.ended_already}
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        await response.prepare(request)
        try:
            await self._tell(api, response, disk, jobs, told)
        except ConnectionResetError:
            pass  # the client has gone
        except MirrordError as error:  # nothing more to tell, of a disk that is gone: it ends
            log.info("events ended disk=%r reason=%s", disk, error)
        except Exception:  # an error's answer would come in the middle of the stream
            log.exception("events failed disk=%r", disk)
        return response

    async def _tell(
        self,
        api: Api,
        response: web.StreamResponse,
        disk: str | None,
        jobs: list[Job],
        told: dict[str, Job],
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
            jobs = await api.jobs_changed(disk, EVENTS_S)


def _pattern(path: str) -> str:
    return path.replace("{verb}", "{verb:" + "|".join(STEERING) + "}")


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
    except ConnectionError as error:
        raise UsageError(_GONE) from error
    except web.HTTPRequestEntityTooLarge as error:
        raise UsageError(f"the body has more than {BODY_BYTES_MAX} bytes") from error
    except web.RequestPayloadError as error:
        raise UsageError("the body ended too soon") from error
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"the body is not what {request.path} takes: {error}") from error


def _answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn what was raised into an answer that a program can read."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return _answer(Problem("unknown-path", f"there is no {request.path}"), 404)
    except web.HTTPMethodNotAllowed:
        return _answer(Problem("method", f"{request.path} has no {request.method}"), 405)
    except UsageError as error:
        return _answer(Problem(error.code, str(error)), 400)
    except RefusedError as error:
        return _answer(Problem(error.code, str(error)), _STATUSES.get(error.code, 409))
    except MirrordError as error:
        status = 409 if error.exit_code == RefusedError.exit_code else 500
        return _answer(Problem(error.code, str(error)), status)
    except OSError as error:
        if error.errno in _STATE_FULL:
            text = f"the state directory can't be written ({error.strerror}): make room there"
            return _answer(Problem("state-error", text), 409)
        log.exception("request failed path=%s", request.rel_url.raw_path)
        return _answer(Problem("io-error", f"the daemon failed: {error}"), 500)
    except Exception as error:
        log.exception("request failed path=%s", request.rel_url.raw_path)
        return _answer(Problem("internal", f"the daemon failed ({error!r}); see its log"), 500)
