"""Requests of other users to a real daemon: the kernel tells it who they are."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers import require_root

DEADLINE_S = 30


@contextmanager
def acting_as(uid: int, groups: Sequence[int]) -> Iterator[None]:
    """Be another user for a moment, in these groups, the first of them its own.

    To sockets, that is: files are still reached as root, as Python's own may be root's alone.
    """
    require_root()
    own_group, own_groups = os.getegid(), os.getgroups()
    os.setgroups(groups[1:])
    os.setegid(groups[0])
    os.seteuid(uid)
    ctypes.CDLL(None).setfsuid(0)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(own_group)
        os.setgroups(own_groups)


def connect_as(path: Path, uid: int, groups: Sequence[int]) -> http.client.HTTPConnection:
    """Return a connection of another user: it stays theirs."""
    connection = http.client.HTTPConnection("localhost", timeout=DEADLINE_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(DEADLINE_S)
    with acting_as(uid, groups):
        connection.sock.connect(str(path))
    return connection


def ask(
    connection: http.client.HTTPConnection, method: str, target: str, body: Any = None
) -> tuple[int, Any]:
    """Make a request; return status and document."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(method, target, data)
    except BrokenPipeError:
        pass  # turned away before it was read
    response = connection.getresponse()
    return response.status, json.loads(response.read())
