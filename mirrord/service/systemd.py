"""What systemd is told and gives: readiness by NOTIFY_SOCKET, sockets by LISTEN_FDS.

The protocols are those of sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3); without
systemd all of it is quiet.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from mirrord.errors import RefusedError

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
# How a place that the unit doesn't grant looks from inside: not there, or not to be written.
_NOT_GRANTED = frozenset(
    {
        "location-missing", "directory-missing", "directory-not-writable", "unreadable",
        "unreachable", "private-place",
    }
)  # fmt: skip


class Systemd:
    """The service manager, if there is one. What it told is taken out of the environment:
    it was meant for this process alone, and disk processes are started from here.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        told = [os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
        self._listens = told[:2] == [str(os.getpid()), "1"]
        interval, process = (os.environ.pop(f"WATCHDOG_{name}", "") for name in ("USEC", "PID"))
        # How often it wants to hear WATCHDOG=1, in seconds; None: it doesn't.
        self.watchdog_s: float | None = None
        if interval.isdecimal() and process in ("", str(os.getpid())):
            self.watchdog_s = int(interval) / 1_000_000

    def notify(self, state: str) -> None:
        """Tell it `state`, such as READY=1. Raises OSError when it asked and can't be told."""
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):
            address = "\0" + address[1:]  # an abstract socket
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as told:
            told.connect(address)
            told.sendall(state.encode())

    def listener(self) -> socket.socket | None:
        """Return the control socket that a socket unit made, if this process was started by it.

        Once: it is the caller's then.
        """
        if not self._listens:
            return None
        self._listens = False
        os.set_inheritable(_FIRST_DESCRIPTOR, False)
        listener = socket.socket(fileno=_FIRST_DESCRIPTOR)
        listener.setblocking(False)
        return listener


@contextlib.contextmanager
def granted() -> Iterator[None]:
    """Have a refusal of a place say, in the service, that its unit may be the reason."""
    try:
        yield
    except RefusedError as error:
        if error.code not in _NOT_GRANTED or "RUNTIME_DIRECTORY" not in os.environ:
            raise
        raise RefusedError(
            error.code,
            f"{error}; the service may use only places that its unit grants: see places.conf, "
            "beside its README",
        ) from error
