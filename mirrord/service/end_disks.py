"""End the disks' processes in good order: `mirrord-disks.service` runs this when it stops.

    python -m mirrord.service.end_disks RUNTIME

The daemon must have ended before, for it starts again what ends. Each process flushes what its
guests wrote and ends within ten seconds, all at the same time; a guest that is still connected is
told that its disk shuts down (ESHUTDOWN). Exit status 1, with a line for each, when one is left:
its storage hangs, and what ends the system ends it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

from mirrord.control.sockets import dial, peer

# Twice what a process promises: its last flush may be just before its end.
DEADLINE_S = 20.0


def end_disks(runtime: Path, deadline_s: float = DEADLINE_S) -> list[str]:
    """Tell every disk's process to end and wait for it; return the names of those that are left.

    A process that is just starting can't be told: whoever ends the system does.
    """
    give_up = time.monotonic() + deadline_s
    told = {channel.stem: _tell(channel) for channel in sorted(runtime.glob("disks/*.sock"))}
    left = []
    for name, pidfd in told.items():
        if pidfd is None:
            continue
        ended, _, _ = select.select([pidfd], [], [], max(0.0, give_up - time.monotonic()))
        os.close(pidfd)
        if not ended:
            left.append(name)
    return left


def _tell(channel: Path) -> int | None:
    """Tell the process at its private channel to end, and return its pidfd; None if it's gone."""
    with contextlib.suppress(ConnectionRefusedError, FileNotFoundError, ProcessLookupError):
        with dial(channel) as connection:
            pid = peer(connection).pid
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        return pidfd
    return None


def main() -> int:
    """Run it, and return the exit code."""
    (runtime,) = map(Path, sys.argv[1:])
    left = end_disks(runtime)
    for name in left:
        print(
            f"mirrord: the process of disk {name} has not ended within {DEADLINE_S:.0f} s; "
            "its storage may hang",
            file=sys.stderr,
        )
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
