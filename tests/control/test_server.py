"""The control socket as any HTTP client sees it: routes, bodies, limits, who is let in."""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import openapi_spec_validator
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import mirrord
from mirrord.control import server
from mirrord.control.messages import AttachRequest, LimitRequest, MoveRequest
from mirrord.control.operations import OPERATIONS, STEERING, Operation, openapi
from mirrord.control.server import BODY_BYTES_MAX
from mirrord.errors import DamagedError, MirrordError, RefusedError
from tests.control.serving import JOB, Served
from tests.helpers import eventually_async


async def test_every_route(served: Served) -> None:
    moved = MoveRequest("/x.raw", limit=5, mode="mirror")
    asked: list[tuple[str, str, Any, int, tuple[Any, ...]]] = [
        ("GET", "/v1/disks", None, 200, ("disks",)),
        ("GET", "/v1/disks/vm", None, 200, ("disk", "vm")),
        ("POST", "/v1/disks", {"name": "vm", "location": "/l"}, 201,
         ("attach", AttachRequest("vm", "/l"))),
        ("DELETE", "/v1/disks/vm", None, 200, ("detach", "vm", False)),
        ("DELETE", "/v1/disks/vm?force=true", None, 200, ("detach", "vm", True)),
        ("POST", "/v1/disks/vm/upgrade", None, 200, ("upgrade", "vm", False)),
        ("POST", "/v1/disks/vm/upgrade?force=true", None, 200, ("upgrade", "vm", True)),
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


@pytest.mark.parametrize(
    ("method", "path", "takes"),
    [
        ("GET", "/v1/disks?force=true", ""),
        ("DELETE", "/v1/disks/vm?force=true&colour=red", "; it takes force"),
        ("GET", "/v1/jobs?disk=vm&color=", "; it takes disk"),
        ("GET", "/v1/events?colour", "; it takes disk"),
        ("GET", "/metrics?x=1", ""),
    ],
)
async def test_an_unknown_query(served: Served, method: str, path: str, takes: str) -> None:
    status, problem = await served.ask(method, path)
    assert (status, problem["code"]) == (400, "usage")
    assert problem["message"].endswith(f"'{takes}")
    assert "takes no" in problem["message"]
    assert not served.api.asked


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
    "rest",
    [b"Content-Length: 10\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\nz\r\n{"],
    ids=["half", "no chunk"],
)
async def test_a_body_that_ends_too_soon_is_the_clients_affair(served: Served, rest: bytes) -> None:
    """Nothing is logged: it is no failure of the daemon's."""
    reader, writer = await asyncio.open_unix_connection(served.path)
    writer.write(b"POST /v1/disks HTTP/1.1\r\nHost: x\r\n" + rest)
    writer.write_eof()
    await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert not served.api.asked
    assert (await served.ask("GET", "/v1/disks"))[0] == 200


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


@pytest.mark.fault(21)
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


async def test_a_stranger_is_told_and_hung_up_on(served: Served) -> None:
    served.gate.strangers.add(os.geteuid())
    reader, writer = await asyncio.open_unix_connection(served.path)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["code"] == "forbidden"
    writer.close()
    assert not served.api.asked


@pytest.mark.parametrize("each", OPERATIONS, ids=lambda each: each.name)
async def test_what_the_gate_forbids_is_not_done(served: Served, each: Operation) -> None:
    served.gate.forbidden.add(each.name)
    path = each.path.replace("{verb}", "pause").replace("{name}", "vm").replace("{id}", "1")
    status, problem = await served.ask(each.method, path, b"{}")
    assert (status, problem["code"]) == (403, "forbidden")
    assert not served.api.asked


class Events:
    """A client of `/v1/events`."""

    def __init__(self, path: Path, query: str = "") -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(str(path))
        self._socket.sendall(f"GET /v1/events{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        self._file = self._socket.makefile("rb")
        self.head = [line.strip() for line in iter(self._file.readline, b"\r\n")]

    def _lines(self) -> list[bytes]:
        """Return the lines of one chunk."""
        length = int(self._file.readline(), 16)
        data = self._file.read(length + 2)
        return data.strip().split(b"\n")

    def next(self) -> dict[str, Any] | None:
        """Return the next event's data, None for a comment."""
        lines = self._lines()
        if lines == [b":"]:
            return None
        kind, identity, data = lines
        assert kind == b"event: job"
        document: dict[str, Any] = json.loads(data.removeprefix(b"data: "))
        assert identity == b"id: " + document["id"].encode()
        return document

    def rest(self) -> bytes:
        """Return the end of the answer, as it is."""
        return self._file.read(5)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


async def test_events_tell_what_changes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEARTBEAT_S", 2 * server.EVENTS_S)
    old = msgspec.structs.replace(JOB, id="0", phase="done")
    served.api.listed = [JOB, old]
    events = await asyncio.to_thread(Events, served.path, "?disk=vm")
    assert b"Content-Type: text/event-stream" in events.head
    first = await asyncio.to_thread(events.next)
    assert first == msgspec.to_builtins(JOB), "what has ended before is no news"
    for phase in ("mirroring", "done"):
        served.api.listed = [msgspec.structs.replace(JOB, phase=phase), old]
        served.api.change.set()
        changed = await asyncio.to_thread(events.next)
        assert changed is not None
        assert (changed["id"], changed["phase"]) == ("1", phase)
    for _ in range(4):
        served.api.change.set()
        await eventually_async(lambda: not served.api.change.is_set())
    assert await asyncio.to_thread(events.next) is None, "a sign of life"
    assert set(served.api.asked) == {("jobs", "vm"), ("changed", "vm")}
    events.close()


@pytest.mark.parametrize("trouble", [RefusedError("unknown-disk", "gone"), KeyError("a bug")])
async def test_a_stream_that_can_not_go_on_ends(
    served: Served, trouble: Exception, expect_log: Callable[..., None]
) -> None:
    """Nothing else comes in it: an answer with an error would be taken for events."""
    expect_log("events failed")
    events = await asyncio.to_thread(Events, served.path)
    assert await asyncio.to_thread(events.next) is not None
    await eventually_async(lambda: ("changed", None) in served.api.asked)
    served.api.trouble = trouble
    served.api.change.set()
    assert await asyncio.to_thread(events.rest) == b"0\r\n\r\n"
    events.close()


async def test_a_listener_that_goes_is_forgotten(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    events = await asyncio.to_thread(Events, served.path)
    await eventually_async(lambda: ("changed", None) in served.api.asked)
    events.close()
    with pytest.raises(pytest.fail.Exception):  # nobody waits for news any more
        await served.tell_news(5)  # the first writes may still succeed
    assert not caplog.records


async def test_metrics(served: Served) -> None:
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(served.path))
    await asyncio.to_thread(connection.request, "GET", "/metrics")
    response = await asyncio.to_thread(connection.getresponse)
    assert response.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    assert response.read() == b"metric 1\n"
    connection.close()


async def test_what_is_documented_is_what_there_is(served: Served) -> None:
    status, document = await served.ask("GET", "/v1/openapi.json")
    assert status == 200
    openapi_spec_validator.validate(document)
    assert document["info"]["version"] == mirrord.__version__
    for path, methods in document["paths"].items():
        for method in methods:
            if path == "/v1/events":
                continue
            real = path.replace("{verb}", "pause").replace("{name}", "vm").replace("{id}", "1")
            status, _ = await served.ask(method.upper(), real, b"[]", any_type=True)
            assert status in (200, 201, 202, 400), (method, path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "location", "target", "limit", "mode", "verify", "cache", "wipe"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
async def test_whatever_is_sent_the_answer_is_documented(served: Served, data: Any) -> None:
    """The status, and a document that fits its schema."""
    document = openapi()
    each = data.draw(
        st.sampled_from([o for o in OPERATIONS if o.name not in ("events", "metrics")])
    )
    word = st.text(st.characters(codec="ascii", exclude_characters="/?#%\\{}"), min_size=1)
    path = each.path.replace("{verb}", data.draw(st.sampled_from(STEERING)))
    for name in ("name", "id"):
        path = path.replace(f"{{{name}}}", quote(data.draw(word), safe=""))
    for name in each.query:
        path += f"?{name}=" + quote(data.draw(st.sampled_from(["true", "false", "", "x y"])))
    body = data.draw(st.none() | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
    status, answer = await served.ask(each.method, path, body)
    responses = document["paths"][each.path][each.method.lower()]["responses"]
    response = responses.get(str(status)) or responses[f"{status // 100}XX"]
    schema = response["content"]["application/json"]["schema"]
    Draft202012Validator(schema | {"components": document["components"]}).validate(answer)
