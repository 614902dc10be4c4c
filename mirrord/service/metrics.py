"""What the daemon knows, as metrics for Prometheus.

Names and units follow https://prometheus.io/docs/practices/naming/. A disk is one series, and a
move that ended is none: its numbers are in `mirrord job`.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

import mirrord
from mirrord.control.messages import Disk, DiskState, Job, PhaseName

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# Of an unfinished move: the field, the metric, and what it says.
_JOB_NUMBERS = (
    ("bytes_total", "mirrord_job_size_bytes", "What the move has to copy in its first pass."),
    ("bytes_copied", "mirrord_job_copied_bytes", "What it has copied, again and again included."),
    ("bytes_remaining", "mirrord_job_remaining_bytes", "What is still to be copied."),
    ("copy_rate", "mirrord_job_copy_bytes_per_second", "How fast it copies."),
    ("dirty_rate", "mirrord_job_dirty_bytes_per_second", "How fast the guest makes it wrong."),
    ("eta_s", "mirrord_job_eta_seconds", "When it will be done; none: not by passes alone."),
)


def render(disks: Sequence[Disk], jobs: Sequence[Job], pids: Mapping[str, int]) -> bytes:
    """Return the text format. `jobs` are the newest first; `pids` are by disk, "" the daemon.

    Blocks: reads /proc.
    """
    from prometheus_client import CollectorRegistry, generate_latest  # only who asks needs it

    class Collected:
        def collect(self) -> Iterator[Metric]:
            yield from _collect(disks, jobs, pids)

    registry = CollectorRegistry()
    registry.register(Collected())
    return generate_latest(registry)


def _collect(
    disks: Sequence[Disk], jobs: Sequence[Job], pids: Mapping[str, int]
) -> Iterator[Metric]:
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        InfoMetricFamily,
    )

    yield InfoMetricFamily("mirrord", "The daemon.", {"version": mirrord.__version__})
    yield from _of_disks(disks)
    yield from _of_jobs(jobs)
    memory = GaugeMetricFamily(
        "mirrord_process_resident_memory_bytes",
        "Memory of a disk's process; the daemon's disk is empty.",
        labels=["disk"],
    )
    used = CounterMetricFamily(
        "mirrord_process_cpu_seconds", "Its processor time so far.", labels=["disk"]
    )
    for name, pid in pids.items():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            memory.add_metric([name], _resident_bytes(pid))
            used.add_metric([name], _processor_s(pid))
    yield memory
    yield used


def _of_disks(disks: Sequence[Disk]) -> Iterator[Metric]:
    from prometheus_client.metrics_core import GaugeMetricFamily

    state = GaugeMetricFamily(
        "mirrord_disk_state", "1 for the state that the disk is in.", labels=["disk", "state"]
    )
    size = GaugeMetricFamily("mirrord_disk_size_bytes", "Its size.", labels=["disk"])
    clients = GaugeMetricFamily("mirrord_disk_clients", "Connections now.", labels=["disk"])
    for disk in disks:
        for name in get_args(DiskState):
            state.add_metric([disk.name, name], float(disk.state == name))
        if disk.size is not None:
            size.add_metric([disk.name], disk.size)
        clients.add_metric([disk.name], disk.clients)
    yield from (state, size, clients)


def _of_jobs(jobs: Sequence[Job]) -> Iterator[Metric]:
    from prometheus_client.metrics_core import GaugeMetricFamily

    unfinished = [job for job in jobs if not job.ended_already]
    phase = GaugeMetricFamily(
        "mirrord_job_phase", "1 for the phase that a disk's unfinished move is in.",
        labels=["disk", "job", "phase"],
    )  # fmt: skip
    for job in unfinished:
        for name in get_args(PhaseName):
            phase.add_metric([job.disk, job.id, name], float(job.phase == name))
    yield phase
    for field, metric, text in _JOB_NUMBERS:
        family = GaugeMetricFamily(metric, text, labels=["disk", "job"])
        for job in unfinished:
            value = getattr(job, field)
            if value is not None:
                family.add_metric([job.disk, job.id], value)
        yield family
    outcomes = Counter[str](job.phase for job in jobs if job.ended_already)
    ended = GaugeMetricFamily(
        "mirrord_jobs_ended", "Moves that ended and are remembered.", labels=["phase"]
    )
    for name in ("done", "cancelled", "failed"):
        ended.add_metric([name], outcomes[name])
    yield ended
    yield from _of_last_jobs(jobs)


def _of_last_jobs(jobs: Sequence[Job]) -> Iterator[Metric]:
    from prometheus_client.metrics_core import GaugeMetricFamily

    failed = GaugeMetricFamily(
        "mirrord_disk_last_move_failed", "1 if the disk's last ended move failed.", labels=["disk"]
    )
    pause = GaugeMetricFamily(
        "mirrord_disk_last_pause_seconds", "How long the guest waited at the last cutover.",
        labels=["disk"],
    )  # fmt: skip
    last: dict[str, Job] = {}
    for job in jobs:
        if job.ended_already:
            last.setdefault(job.disk, job)
    for disk, job in sorted(last.items()):
        failed.add_metric([disk], float(job.phase == "failed"))
        if job.pause_ms is not None:
            pause.add_metric([disk], job.pause_ms / 1000)
    yield from (failed, pause)


def _resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _processor_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2].split()  # the name may have spaces
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
