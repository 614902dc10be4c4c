"""Programs that are run when a move has ended: `on_done` and `on_failed` of the configuration.

A program gets the job's JSON on its standard input, as `mirrord job ID --json` prints it. It runs
as the daemon does, with its restrictions, and is given a while; how it fails is logged, and is
nobody else's affair. It is run once for each job. A daemon that was away when the job ended does it
when it is back; one that is killed while a program runs leaves it to end, and doesn't run it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Callable

import msgspec

from mirrord.control.messages import Job
from mirrord.service.config import Config
from mirrord.service.logs import fields

log = logging.getLogger(__name__)

# A program that reports somewhere; longer, and it hangs.
DEADLINE_S = 60.0
# Many moves may end together.
PROGRAMS_MAX = 4
# What is logged of what a failed program said last.
TOLD_BYTES_MAX = 500

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}


class Notifier:
    """Runs the programs. Its tasks belong to `group`, and never raise."""

    def __init__(self, config: Config, group: asyncio.TaskGroup) -> None:
        self._commands = {"done": config.on_done, "failed": config.on_failed}
        self._group = group
        self._places = asyncio.Semaphore(PROGRAMS_MAX)

    def wants(self, job: Job) -> bool:
        """Whether a program is to be told of a job that ended like this."""
        return bool(self._commands.get(job.phase))

    def ended(self, job: Job, begin: Callable[[], None]) -> None:
        """Tell of a job that has ended; `begin` is called when its program is about to run."""
        if self.wants(job):
            self._group.create_task(self._run(job, begin), name=f"notify {job.id}")
        else:
            begin()

    async def _run(self, job: Job, begin: Callable[[], None]) -> None:
        command = self._commands[job.phase]
        async with self._places:
            begin()
            try:
                why = await _outcome(command, msgspec.json.encode(job))
            except (OSError, ValueError) as error:
                why = f"it can't be run: {error}"
        about = {"job": job.id, "disk": job.disk, "phase": job.phase, "program": command[0]}
        if why is None:
            log.info("notified %s", fields(**about))
        else:
            log.error("not notified %s", fields(**about, error=why))


async def _outcome(command: list[str], text: bytes) -> str | None:
    """Run a program on `text`; return what went wrong.

    Files and no pipes: what it leaves behind in the background holds nobody up.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(text)
        given.seek(0)
        program = await asyncio.create_subprocess_exec(
            *command,
            stdin=given,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=said,
            cwd="/",
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(DEADLINE_S):
                await program.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)  # and whoever it has started
            await program.wait()
            return f"it was ended after {DEADLINE_S:g} s"
        if program.returncode == 0:
            return None
        said.seek(max(0, said.seek(0, os.SEEK_END) - TOLD_BYTES_MAX))
        last = said.read().decode(errors="replace").strip()
        return f"exit code {program.returncode}" + (f": {last}" if last else "")
