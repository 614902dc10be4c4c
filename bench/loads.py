"""A guest's load beside a move, and moves that are awaited: what several scenarios share."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.nbd_load import Measured
from mirrord.control.client import Client
from mirrord.control.messages import Job, MoveRequest

LOOK_S = 0.05  # between two looks at a job: they cost the daemon time
MOVE_S = 300
ROUNDING = 1e-9  # 0.99 of a hundred is 99, whatever floats say


class LoadFailedError(Exception):
    """A guest's request failed, or had no answer for half a minute."""


@contextlib.contextmanager
def loaded(socket: Path | str, name: str, *options: str) -> Iterator[Measured]:
    """A paced load in a process of its own; what it measured is there at the end.

    Raises:
        LoadFailedError: At the end, when the server didn't serve it.
    """
    measured: Measured = []
    command = [sys.executable, "-m", "bench.nbd_load", str(socket), name, *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise LoadFailedError("the load doesn't begin")
            yield measured
            told = process.communicate()[0]  # which closes its standard input, too
        finally:
            process.kill()
        if process.returncode:
            raise LoadFailedError("the load failed")
        measured += json.loads(told)


def quantile_ms(values_s: Sequence[float], share: float) -> float:
    """Return the least value that `share` of all are not above (nearest rank), in milliseconds."""
    ordered = sorted(values_s)
    rank = math.ceil(share * len(ordered) - ROUNDING)
    return 1000 * ordered[max(0, rank - 1)]


def between(measured: Measured, first_s: float, last_s: float) -> list[float]:
    """Return how long those requests took that were answered between two times of day."""
    return [took for at, took, _ in measured if first_s < at < last_s]


def move(client: Client, name: str, request: MoveRequest) -> Job:
    """Move a disk and return the job at its end."""
    return wait_for_phase(client, client.move(name, request), "done")


def wait_for_phase(client: Client, job: Job, phase: str) -> Job:
    """Return a job once it is in a phase.

    Raises:
        RuntimeError: It ended otherwise, or takes too long; the text is its story.
    """
    give_up_s = time.monotonic() + MOVE_S
    while job.phase != phase and not job.ended_already and time.monotonic() < give_up_s:
        time.sleep(LOOK_S)
        job = client.job(job.id)
    if job.phase != phase:
        story = "\n".join(f"{step.time} {step.phase}: {step.text}" for step in job.story)
        raise RuntimeError(f"the move is {job.phase}, not {phase}:\n{story}")
    return job
