"""Follow a job until it ends or reaches a phase, also across a restart of the daemon."""

from __future__ import annotations

import time
from collections.abc import Callable

from mirrord.control.client import Client
from mirrord.control.messages import Job
from mirrord.errors import MirrordError, NoDaemonError

# Between two looks: short beside a person's patience, and one small request each.
POLL_S = 0.1
# A daemon that is being restarted or upgraded is back within this; the move goes on meanwhile.
DAEMON_AWAY_S = 60.0

# The ladder that a move climbs. A later rung says that the earlier ones were reached.
LADDER = (
    "queued",
    "copying",
    "catching-up",
    "mirroring",
    "verifying",
    "cutting-over",
    "retiring",
    "done",
)


class WaitTimeoutError(MirrordError):
    """The time is over and the job isn't."""

    exit_code = 124
    code = "timeout"


def follow(
    client: Client,
    job: Job,
    show: Callable[[Job], None],
    *,
    phase: str | None = None,
    timeout_s: float | None = None,
) -> Job:
    """Return the job once it has ended, or has reached `phase`; tell `show` what is new.

    Raises WaitTimeoutError, and NoDaemonError when the daemon stays away.
    """
    began = time.monotonic()
    seen = len(job.story)
    away_since: float | None = None
    while True:
        show(job)
        entered = {step.phase for step in job.story[seen:]}
        if job.ended_already or (
            phase is not None and (phase in entered or has_reached(job, phase))
        ):
            return job
        now = time.monotonic()
        if timeout_s is not None and now - began >= timeout_s:
            raise WaitTimeoutError(
                f"the move of disk {job.disk} is still {job.phase} after {timeout_s:g} s; "
                "it goes on"
            )
        left_s = POLL_S if timeout_s is None else min(POLL_S, began + timeout_s - now)
        time.sleep(max(left_s, 0.0))
        try:
            job = client.job(job.id)
            away_since = None
        except NoDaemonError:
            away_since = away_since or now
            if now - away_since > DAEMON_AWAY_S:
                raise


def has_reached(job: Job, phase: str | None) -> bool:
    """Tell whether the job is in `phase`, or beyond it on the ladder."""
    if job.phase == phase:
        return True
    if phase not in LADDER or job.phase not in LADDER:
        return False
    return LADDER.index(job.phase) >= LADDER.index(phase)
