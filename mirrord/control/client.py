"""Talk to the daemon: one request, one answer, without an event loop.

Made for a command line that starts fast: nothing but the standard library and msgspec. What the
daemon refuses is raised again as the same class with the same code and words.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

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
from mirrord.control.sockets import check_socket_path
from mirrord.errors import MirrordError, NoDaemonError, RefusedError, UsageError

# The longest that the daemon takes by itself (an attach or detach whose storage hangs), and more.
ANSWER_DEADLINE_S = 150.0

Answer = TypeVar("Answer")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, deadline_s: float) -> None:
        super().__init__("localhost", timeout=deadline_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Python's own timeout would not wait while many others do (EAGAIN).
            seconds, part = divmod(ANSWER_DEADLINE_S, 1)
            deadline = struct.pack("@ll", int(seconds), int(part * 1e6))  # struct timeval
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, deadline)
            self.sock.connect(str(self._path))
            self.sock.settimeout(self.timeout)
        except BlockingIOError as error:
            self.sock.close()
            raise TimeoutError from error
        except BaseException:
            self.sock.close()
            raise


class Client:
    """The daemon at one control socket. Connects at the first request and stays connected."""

    def __init__(self, path: Path, *, deadline_s: float | None = None) -> None:
        check_socket_path(path)
        self.path = path
        self._deadline_s = ANSWER_DEADLINE_S if deadline_s is None else deadline_s
        self._connection = _Connection(path, self._deadline_s)

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._connection.close()

    def service(self) -> Service:
        """Return what the daemon says of itself."""
        return self._ask("GET", "/v1/service", Service)

    def disks(self) -> list[Disk]:
        """Return every disk, by name."""
        return self._ask("GET", "/v1/disks", list[Disk])

    def disk(self, name: str) -> Disk:
        """Return one disk."""
        return self._ask("GET", f"/v1/disks/{_part(name)}", Disk)

    def attach(self, request: AttachRequest) -> Disk:
        """Serve a location as a disk."""
        return self._ask("POST", "/v1/disks", Disk, request)

    def detach(self, name: str, *, force: bool = False) -> Disk:
        """Stop serving a disk; return how it was."""
        suffix = "?force=true" if force else ""
        return self._ask("DELETE", f"/v1/disks/{_part(name)}{suffix}", Disk)

    def upgrade(self, name: str, *, force: bool = False) -> Disk:
        """Have a disk served by a process of the daemon's version; return how it is then."""
        suffix = "?force=true" if force else ""
        return self._ask("POST", f"/v1/disks/{_part(name)}/upgrade{suffix}", Disk)

    def move(self, name: str, request: MoveRequest) -> Job:
        """Ask for a move; return its job."""
        return self._ask("POST", f"/v1/disks/{_part(name)}/move", Job, request)

    def jobs(self, disk: str | None = None) -> list[Job]:
        """Return all jobs, or a disk's, newest first."""
        suffix = "" if disk is None else "?" + urlencode({"disk": disk})
        return self._ask("GET", f"/v1/jobs{suffix}", list[Job])

    def job(self, job_id: str) -> Job:
        """Return one job, by its id or the beginning of it."""
        return self._ask("GET", f"/v1/jobs/{_part(job_id)}", Job)

    def steer(self, job_id: str, verb: str) -> Job:
        """Pause, resume, cancel or cut over a job; return it."""
        return self._ask("POST", f"/v1/jobs/{_part(job_id)}/{verb}", Job)

    def limit(self, job_id: str, limit: int) -> Job:
        """Change a job's bandwidth limit, in bytes a second; 0 is none."""
        return self._ask("PATCH", f"/v1/jobs/{_part(job_id)}", Job, LimitRequest(limit))

    def test_credential(self, location: str) -> CredentialTest:
        """Log on to a share as a disk process would; return what the server gives."""
        request = CredentialTestRequest(location)
        return self._ask("POST", "/v1/credential-test", CredentialTest, request)

    def _ask(self, method: str, path: str, answer: type[Answer], body: Any = None) -> Answer:
        try:
            data = None if body is None else msgspec.json.encode(body)
        except UnicodeEncodeError as error:
            raise UsageError(f"{error.object!r} is no UTF-8: name it otherwise") from error
        try:
            # A daemon that turns this user away answers without reading the request.
            with contextlib.suppress(BrokenPipeError):
                self._connection.request(
                    method, path, data, {"Content-Type": "application/json"} if data else {}
                )
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise self._no_daemon(error) from error
        if response.status >= 400:
            raise _problem(response.status, content)
        return msgspec.json.decode(content, type=answer)

    def _no_daemon(self, error: Exception) -> MirrordError:
        if isinstance(error, PermissionError):
            return RefusedError(
                "forbidden",
                f"this user may not use the daemon at {self.path}; run as root or as its user, "
                "or have socket_group and a [[grant]] in mirrord.toml let it in",
            )
        if isinstance(error, TimeoutError):
            return MirrordError(
                f"the daemon at {self.path} has not answered for {self._deadline_s:.0f} s"
            )
        return NoDaemonError(
            f"no daemon answers at {self.path}; start one with 'mirrord daemon', "
            "or name its socket with --socket"
        )


def _part(text: str) -> str:
    return quote(text, safe="", errors="replace")


def _problem(status: int, content: bytes) -> MirrordError:
    """Return the error that the daemon meant."""
    try:
        problem = msgspec.json.decode(content, type=Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return MirrordError(f"the daemon answered {status} with something that is no error of its")
    if problem.code == NoDaemonError.code:
        return NoDaemonError(problem.message)
    if status == 400:
        return UsageError(problem.message)
    if status < 500:
        return RefusedError(problem.code, problem.message)
    failed = MirrordError(problem.message)
    failed.code = problem.code
    return failed
