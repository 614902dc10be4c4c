"""Unix sockets: their addresses, who is at the other end, and descriptors sent over them."""

from __future__ import annotations

import contextlib
import errno
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
_SO_PEERGROUPS = 59  # Linux 4.13; the same on every architecture that Debian 12 has
_GID_BYTES = 4
_SOME_GROUPS, _NGROUPS_MAX = 256, 65536  # what Python's getsockopt takes; what Linux allows


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a unix socket, as it was when it connected."""

    pid: int  # of no use to decide what is allowed: another process may have it by now
    uid: int
    groups: frozenset[int]  # its own and the supplementary ones

    @property
    def unrestricted(self) -> bool:
        """Whether it may do everything: root, and who could do it without us anyway."""
        return self.uid in (0, os.geteuid())


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


def peer(connection: socket.socket) -> Peer:
    """Return who is at the other end.

    For a connecting side it is the process that listens, as it was when it began to.
    """
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    return Peer(pid, uid, _peer_groups(connection) | {gid})


def _peer_groups(connection: socket.socket) -> frozenset[int]:
    """Return the supplementary groups; the kernel tells them, no name service is asked."""
    try:
        room = _SOME_GROUPS * _GID_BYTES
        data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, room)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        data = _many_groups(connection)
    return frozenset(gid for (gid,) in struct.iter_unpack("=I", data))


def _many_groups(connection: socket.socket) -> bytes:
    import ctypes  # the command line, which nobody connects to, does without

    room = ctypes.c_uint(_NGROUPS_MAX * _GID_BYTES)
    data = ctypes.create_string_buffer(room.value)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(
        connection.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, data, ctypes.byref(room)
    ):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return data.raw[: room.value]


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
    try:
        # Nobody connects before the mode is set: Linux gives the name that of the unbound socket.
        # By the umask it can't be done: that also is the other threads', which make files.
        os.fchmod(listener.fileno(), 0)
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
    return listener


def remove_socket(path: Path) -> None:
    """Take the address away; it may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
