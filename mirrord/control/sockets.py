"""Unix sockets: their addresses, who is at the other end, and descriptors sent over them."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from mirrord.errors import RefusedError

# struct sockaddr_un has 108 bytes, one of them for the terminating zero.
SOCKET_PATH_BYTES_MAX = 107

# Connects that wait while a disk process starts again: all clients of a disk, and more.
BACKLOG = 128

_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, slots=True)
class Access:
    """Who may connect to a socket: its file's permissions, and its group where not the user's."""

    mode: int = 0o600
    group_id: int | None = None


def check_socket_path(path: Path | str) -> None:
    """Refuse (`path-too-long`) what can't be the address of a unix socket."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise RefusedError(
            "path-too-long",
            f"the socket path {path} has {length} bytes, the system allows "
            f"{SOCKET_PATH_BYTES_MAX}; use a shorter name or directory",
        )


def peer(connection: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of the other end.

    For a connecting side they are of the process that listens, as it was when it began to.
    """
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    return pid, uid, gid


def dial(path: Path) -> socket.socket:
    """Connect without waiting. Raises OSError when nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.connect(os.fspath(path))
    except BaseException:
        connection.close()
        raise
    return connection


def is_answered(path: Path) -> bool:
    """Tell whether somebody listens at `path`."""
    try:
        dial(path).close()
    except BlockingIOError:
        return True  # the backlog is full
    except OSError:
        return False
    return True


def listen(path: Path, access: Access) -> socket.socket:
    """Listen at `path`, in place of whatever a dead process left there.

    The caller knows that no live process listens there.
    """
    check_socket_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777)  # nobody connects before the mode is set
    try:
        remove_socket(path)
        listener.setblocking(False)
        listener.bind(os.fspath(path))
        if access.group_id is not None:
            os.chown(path, -1, access.group_id)
        path.chmod(access.mode)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def remove_socket(path: Path) -> None:
    """Take the address away; it may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
