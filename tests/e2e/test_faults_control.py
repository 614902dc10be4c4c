"""Clients of the control socket that are wrong or mean harm, against a real daemon.

By its number in the table of faults (tests/README.md): 28. Each request gets one JSON document
with a code and a message, and changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mirrord.core.geometry import MIB
from tests.daemon import Daemon
from tests.helpers import require_root

pytestmark = pytest.mark.fault(28)

ANSWER_S = 15
NOBODY = 65534


@dataclass
class Service:
    """A daemon with one disk, `vm`, that is being moved, and one that isn't."""

    daemon: Daemon
    job: str

    def everything(self) -> dict[str, str]:
        """Return the names below the daemon's folder; of files that only requests change, more."""
        found = {}
        for folder, names, files in os.walk(self.daemon.root):
            for name in names + files:
                path = Path(folder) / name
                still = path.suffix == ".json" or path.parent.name == "disks"
                known = path.is_file() and still
                digest = hashlib.sha256(path.read_bytes()).hexdigest() if known else ""
                found[str(path)] = digest
        return found

    def say(self, data: bytes) -> tuple[int, Any]:
        """Send bytes on a connection of their own; return status and document of the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.daemon.socket))  # behind those who wait
            connection.settimeout(ANSWER_S)
            with contextlib.suppress(BrokenPipeError):  # it was answered before all had been sent
                connection.sendall(data)
            return answer_of(connection)

    def say_garbage(self, data: bytes) -> bytes:
        """Send what is no HTTP; return the beginning of the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.daemon.socket))  # behind those who wait
            connection.settimeout(ANSWER_S)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(data)
            return connection.recv(100)

    def refuses(self, data: bytes, status: int, code: str) -> str:
        """Assert one document with the code, and that nothing was changed; return the message."""
        before = self.everything()
        answered, problem = self.say(data)
        assert (answered, problem.get("code")) == (status, code), problem
        assert set(problem) == {"code", "message"}
        assert self.everything() == before, "something was changed"
        assert self.daemon.json("job", self.job)["phase"] == "copying"
        assert "Traceback" not in self.daemon.log()
        return str(problem["message"])


def answer_of(connection: socket.socket) -> tuple[int, Any]:
    """Return status and document of one answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        received = connection.recv(1 << 16)
        assert received, f"no answer but {data!r}"
        data += received
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    )
    while len(body) < length:
        received = connection.recv(1 << 16)
        assert received, "half an answer"
        body += received
    return int(head.split()[1]), json.loads(body)


def post(path: str, body: bytes | dict[str, Any] = b"") -> bytes:
    """Return a request."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Move disk `vm` so slowly that it doesn't end, with disk `other` beside it."""
    daemon = Daemon('socket_mode = "0666"\n')
    disks = daemon.root / "disks"
    disks.mkdir()
    for name in ("vm", "other"):
        (disks / f"{name}.raw").write_bytes(os.urandom(16 * MIB))
    daemon.start()
    for name in ("vm", "other"):
        daemon.attach(name, disks / f"{name}.raw")
    yield Service(daemon, daemon.move("vm", daemon.root / "moved.raw", "--limit", "16KiB"))
    unannounced = daemon.unannounced()
    daemon.close()
    assert not unannounced, "what clients do wrong is no failure of the daemon's"


DEEP = b"[" * 20_000
NAMES = ["..", "../../etc/passwd", "%2e%2e%2fvm", "vm%00", "%00", "v%0am", "x" * 5000, "%ff"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"target": "/x", "x": "' + b"x" * MIB + b'"}', 400, "usage"),
        (b'{"target"', 400, "usage"), (b"", 400, "usage"), (b"null", 400, "usage"),
        (b"[]", 400, "usage"), (b'{"t\xff": 1}', 400, "usage"), (b"\xff\xfe", 400, "usage"),
        (DEEP, 400, "usage"),
        (b'{"target": 1}', 400, "usage"), (b'{"target": "/x", "surplus": 1}', 400, "usage"),
        (b'{"target": "/x", "limit": -1}', 400, "usage"),
        (b'{"target": "/x", "limit": 1e400}', 400, "usage"),
        (b'{"target": "/x\\u0000y"}', 400, "usage"), (b'{"target": "x/../y"}', 400, "usage"),
    ],
    ids=["1 MiB", "half", "none", "null", "a list", "a key that is no UTF-8", "no UTF-8", "deep",
         "a number",
         "an unknown key", "a negative limit", "an infinite limit", "NUL", "a relative path"],
)  # fmt: skip
def test_fault_28_a_body_that_is_wrong(
    service: Service, body: bytes, status: int, code: str
) -> None:
    service.refuses(post("/v1/disks/other/move", body), status, code)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:20])
def test_fault_28_a_name_that_is_none(service: Service, name: str) -> None:
    before = service.everything()
    for request in (post(f"/v1/disks/{name}/move", {"target": "/x"}),
                    f"DELETE /v1/disks/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
                    f"GET /v1/jobs/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()):  # fmt: skip
        status, problem = service.say(request)
        assert status in (400, 404), problem
        assert set(problem) == {"code", "message"}
        assert len(problem["message"]) < 6000
    status, problem = service.say(post("/v1/disks", {"name": name, "location": "/x"}))
    assert (status, problem["code"]) == (400, "usage")
    assert service.everything() == before
    assert "Traceback" not in service.daemon.log()


def test_fault_28_a_symlink_as_target_is_no_way_out(service: Service, tmp_path: Path) -> None:
    """What a link points at is neither followed nor overwritten: it exists."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    link = tmp_path / "link"
    link.symlink_to(precious)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nothing")
    for target in (link, dangling):
        body = {"target": str(target)}
        service.refuses(post("/v1/disks/other/move", body), 409, "target-exists")
    assert precious.read_bytes() == b"precious"
    assert not (tmp_path / "nothing").exists()


def test_fault_28_unknown_verbs_jobs_and_disks(service: Service) -> None:
    service.refuses(post(f"/v1/jobs/{service.job}/fly"), 404, "unknown-path")
    service.refuses(post("/v1/jobs/1234/cancel"), 404, "unknown-job")
    service.refuses(post("/v1/disks/nope/move", {"target": "/x"}), 404, "unknown-disk")
    service.refuses(b"PUT /v1/disks HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method")


def test_fault_28_a_second_move_of_one_disk(service: Service) -> None:
    message = service.refuses(post("/v1/disks/vm/move", {"target": "/x"}), 409, "job-running")
    assert "vm" in message


def test_fault_28_another_user(service: Service) -> None:
    """Told so, and hung up on, although the socket's mode lets it connect."""
    require_root()
    for folder in (service.daemon.root, service.daemon.runtime):
        folder.chmod(0o755)
    script = (
        "import contextlib, os, socket, sys; os.setgroups([]); os.setgid(int(sys.argv[2]));"
        "os.setuid(int(sys.argv[2])); s = socket.socket(socket.AF_UNIX); s.settimeout(15);"
        "s.connect(sys.argv[1])\n"
        "with contextlib.suppress(BrokenPipeError): s.sendall(b'POST /v1/jobs/' + "
        "sys.argv[3].encode() + b'/cancel HTTP/1.1\\r\\n'"
        "b'Host: x\\r\\nContent-Length: 0\\r\\n\\r\\n')\n"
        "data = b''\nwhile not data.endswith(b'}'): data += s.recv(4096)\n"
        "print(data.decode())"
    )
    before = service.everything()
    done = subprocess.run(
        [sys.executable, "-c", script, service.daemon.socket, str(NOBODY), service.job],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    head, _, body = done.stdout.partition("\n\n")
    assert "403" in head.splitlines()[0], done
    assert json.loads(body)["code"] == "forbidden"
    assert service.everything() == before
    assert service.daemon.json("job", service.job)["phase"] == "copying"


def test_fault_28_clients_that_say_half_or_nothing_hold_nobody_up(service: Service) -> None:
    """150 that are idle, in the middle of a header, of a body; and others that send garbage."""
    beginnings = [b"", b"GET /v1/di", post("/v1/disks", b"{" * 100)[:-50]]
    slow = []
    for number in range(150):
        connection = socket.socket(socket.AF_UNIX)
        slow.append(connection)
        connection.connect(str(service.daemon.socket))
        connection.sendall(beginnings[number % 3])
    try:
        for garbage in (b"\x00\x01garbage\r\n\r\n", b"BREW / HTTP/1.1\r\n\r\n",
                        b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"):  # fmt: skip
            assert service.say_garbage(garbage).startswith(b"HTTP/1.0 400 "), garbage[:20]
        assert service.daemon.json("show", "other")["state"] == "serving"
    finally:
        for connection in slow:
            connection.close()


def test_fault_28_cancel_twice(service: Service) -> None:
    """The second finds a move that has ended, and says so."""
    job = service.daemon.move("other", service.daemon.root / "elsewhere.raw", "--limit", "16KiB")
    status, told = service.say(post(f"/v1/jobs/{job}/cancel"))
    assert (status, told["id"]) == (200, job)
    assert service.daemon.run("wait", "other").returncode == 3
    service.refuses(post(f"/v1/jobs/{job}/cancel"), 409, "wrong-phase")
    assert service.daemon.json("job", job)["phase"] == "cancelled"
    assert not (service.daemon.root / "elsewhere.raw").exists()
