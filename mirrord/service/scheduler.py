"""Which queued move starts next, and what the others wait for. Pure decisions, first come first.

A job holds a place from its start to its end, also while it is paused or degraded: its target and
its bitmaps exist all that time, and letting others overtake would make `max_moves` mean nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


def startable(
    queued: Sequence[tuple[str, str]], running: Collection[str], max_moves: int | None
) -> list[str]:
    """Return the jobs to start now.

    `queued` has (job, disk), oldest first; `running` has the disks whose job holds a place.
    """
    free = len(queued) if max_moves is None else max_moves - len(running)
    busy = set(running)
    chosen: list[str] = []
    for job_id, disk in queued:
        if len(chosen) >= free:
            break
        if disk not in busy:
            busy.add(disk)
            chosen.append(job_id)
    return chosen


def waits_for(disk: str, running: Collection[str], max_moves: int | None) -> str:
    """Say in one line what a queued move of `disk` waits for."""
    if disk in running:
        return f"waits for the running move of disk {disk}"
    if max_moves is not None and len(running) >= max_moves:
        return (
            f"waits for a free place: {len(running)} of at most {max_moves} moves run; "
            "max_moves in the configuration sets the limit"
        )
    return f"waits for the process of disk {disk}"
