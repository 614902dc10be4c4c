"""What runs in processes of their own beside `test_power_cuts`: a move with small numbers, and
the life after a cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirrord.control.messages import LimitRequest
from mirrord.control.sockets import Access, listen
from mirrord.core.geometry import KIB
from mirrord.errors import RefusedError
from mirrord.frontends.nbd_server import NbdServer
from mirrord.service.state import Directories
from mirrord.storage.job_files import BOOT_ID_VARIABLE
from tests.engine.harness import QUICK
from tests.helpers import eventually_async
from tests.one_process import DISK, serving
from tests.power import Position, log_position

# Many regions and checkpoints although disk and move are small.
SMALL = replace(
    QUICK, chunk_bytes=64 * KIB, region_bytes=64 * KIB, checkpoint_s=0.02, hot_checkpoints=0
)


async def record(
    state: str, runtime: str, target: str, logs: list[str], limit: int
) -> list[Position]:
    """Serve the disk to one guest and move it; end when the guest has gone after the end.

    Returns where the logs were when the move was known, and when it had ended.
    """
    directories = Directories(Path(state), Path(runtime))
    async with serving(directories, SMALL) as process:
        process.begin()
        server = NbdServer(process.disk)
        await server.serve(listen(directories.nbd_socket(DISK), Access()))
        await eventually_async(lambda: server.clients, what="a guest")
        # Not verified: that would find and mend what the maps have forgotten.
        job = await process.move(Path(target), limit=limit, verify="none")
        asked = log_position(logs)
        await process.ended(job.id)
        ended = log_position(logs)
        await eventually_async(lambda: not server.clients, what="the guest leaves")
        await server.stop(1)
    return [asked, ended]


async def live_on(state: str, runtime: str, copy_to: str, small: bool) -> dict[str, Any]:
    """Be the first process after a cut: copy out what the guest finds, and end the move."""
    os.environ[BOOT_ID_VARIABLE] = "after-the-cut"
    directories = Directories(Path(state), Path(runtime))
    async with serving(directories, SMALL if small else None) as process:
        found = bytes(await process.disk.read(0, process.disk.size))
        await asyncio.to_thread(Path(copy_to).write_bytes, found)
        process.begin()
        jobs = await process.moves.jobs(None)
        for job in jobs:
            with contextlib.suppress(RefusedError):  # it has ended
                await process.moves.limit(job.id, LimitRequest(limit=0))
            await process.ended(job.id)
        assert bytes(await process.disk.read(0, process.disk.size)) == found
        return {
            "location": process.location,
            "phases": [(await process.moves.job(job.id)).phase for job in jobs],
        }
