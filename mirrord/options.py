"""What several commands of the command line take."""

from __future__ import annotations

import contextlib
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mirrord.control.client import Client
from mirrord.errors import MirrordError

COMPLETE_VARIABLE = "_MIRRORD_COMPLETE"  # set by the shell that wants to know what may follow
# Whoever presses the tabulator waits: a daemon that is busy for longer isn't asked.
COMPLETE_DEADLINE_S = 1.0


def disk_names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the disks that may be meant, for a shell's completion; none without a daemon."""
    from mirrord.service.config import default_socket

    named = context.params.get("socket") or os.environ.get("MIRRORD_SOCKET")
    with contextlib.suppress(MirrordError):
        named = named or default_socket()
        client = Client(Path(named).absolute(), deadline_s=COMPLETE_DEADLINE_S)
        with contextlib.closing(client):
            return [disk.name for disk in client.disks() if disk.name.startswith(incomplete)]
    return []


class Cache(StrEnum):
    writeback = "writeback"
    direct = "direct"


class Verify(StrEnum):
    full = "full"
    none = "none"


class Mode(StrEnum):
    auto = "auto"
    passes = "passes"
    mirror = "mirror"


class Cutover(StrEnum):
    auto = "auto"
    manual = "manual"


class PhaseChoice(StrEnum):
    queued = "queued"
    copying = "copying"
    catching_up = "catching-up"
    mirroring = "mirroring"
    verifying = "verifying"
    cutting_over = "cutting-over"
    retiring = "retiring"
    done = "done"
    paused = "paused"
    degraded = "degraded"
    cancelled = "cancelled"
    failed = "failed"


Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        envvar="MIRRORD_SOCKET",
        metavar="PATH",
        readable=False,  # the daemon says who may
        help="The daemon's control socket.",
        show_default="/run/mirrord/control.sock for root, else below $XDG_RUNTIME_DIR",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="The disk.", show_default=False, autocompletion=disk_names),
]


def open_client(socket: Path | None) -> Client:
    """Return a client of the daemon at `socket`, or at the place where this user's would be."""
    if socket is None:
        from mirrord.service.config import default_socket

        socket = default_socket()
    return Client(socket.absolute())
