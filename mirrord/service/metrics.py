"""What the daemon knows, as metrics for Prometheus.

Names and units follow https://prometheus.io/docs/practices/naming/. A disk is one series, and a
move that ended is none: its numbers are in `mirrord job`.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, get_args

import mirrord
from mirrord.control.messages import Disk, DiskState, Job, PhaseName, RequestCount

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# Of an unfinished move: its field's name, the metric, and what it says.
_JOB_NUMBERS = (
    ("bytes_total", "mirrord_job_size_bytes", "What the move has to copy in its first pass."),
    ("bytes_copied", "mirrord_job_copied_bytes", "What it has copied, again and again included."),
    ("bytes_remaining", "mirrord_job_remaining_bytes", "What is still to be copied."),
    ("copy_rate", "mirrord_job_copy_bytes_per_second", "How fast it copies."),
    ("dirty_rate", "mirrord_job_dirty_bytes_per_second", "How fast the guest makes it wrong."),
    ("eta_s", "mirrord_job_eta_seconds", "When it will be done; none: not by passes alone."),
)


# Of the histograms: buckets end at 2**n nanoseconds, from 16 µs to 34 s. Each costs a series.
_FIRST_BUCKET, _LAST_BUCKET = 14, 35


@dataclass(frozen=True, slots=True)
class Process:
    """A process of ours, and what the guests of its disk asked for."""

    pid: int
    requests: Mapping[str, RequestCount] = field(default_factory=dict)
    stalled_s: float = 0.0


def render(disks: Sequence[Disk], jobs: Sequence[Job], processes: Mapping[str, Process]) -> bytes:
    """Return the text format. `jobs` are the newest first, `processes` by disk, "" the daemon.

    Blocks: reads /proc.
    """
    from prometheus_client import CollectorRegistry, generate_latest  # only who asks needs it

    class Collected:
        def collect(self) -> Iterator[Metric]:
            yield from _collect(disks, jobs, processes)

    registry = CollectorRegistry()
    registry.register(Collected())
    return generate_latest(registry)


def _collect(
    disks: Sequence[Disk], jobs: Sequence[Job], processes: Mapping[str, Process]
) -> Iterator[Metric]:
    from prometheus_client.metrics_core import InfoMetricFamily

    yield InfoMetricFamily("mirrord", "The daemon.", {"version": mirrord.__version__})
    yield from _of_disks(disks)
    yield from _of_requests(processes)
    yield from _of_jobs(jobs)
    yield from _of_processes(processes)


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


def _of_requests(processes: Mapping[str, Process]) -> Iterator[Metric]:
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    labels = ["disk", "kind"]
    stalled = GaugeMetricFamily(
        "mirrord_disk_stalled_seconds",
        "For how long guests have had no answer at all, while some wait for one.",
        labels=["disk"],
    )
    took = HistogramMetricFamily(
        "mirrord_disk_request_seconds",
        "How long guests' requests took, since the disk's process started.",
        labels=labels,
    )
    moved = CounterMetricFamily(
        "mirrord_disk_request_bytes", "The bytes of those that succeeded.", labels=labels
    )
    failed = CounterMetricFamily(
        "mirrord_disk_request_errors", "Those that a guest saw fail.", labels=labels
    )
    for disk, process in processes.items():
        if disk:
            stalled.add_metric([disk], process.stalled_s)
        for kind, count in process.requests.items():
            took.add_metric([disk, kind], _cumulated(count.buckets), count.seconds)
            moved.add_metric([disk, kind], count.bytes)
            failed.add_metric([disk, kind], count.errors)
    yield from (stalled, took, moved, failed)


def _cumulated(buckets: Sequence[int]) -> list[tuple[str, float]]:
    """Return the bounds in seconds, each with all that took less."""
    sums = list(accumulate(buckets, initial=0))[1:] or [0]
    told: list[tuple[str, float]] = [
        (repr(2**n / 1e9), sums[min(n, len(sums) - 1)])
        for n in range(_FIRST_BUCKET, _LAST_BUCKET + 1)
    ]
    return [*told, ("+Inf", sums[-1])]


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
    for name, metric, text in _JOB_NUMBERS:
        family = GaugeMetricFamily(metric, text, labels=["disk", "job"])
        for job in unfinished:
            value = getattr(job, name)
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


def _of_processes(processes: Mapping[str, Process]) -> Iterator[Metric]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    memory = GaugeMetricFamily(
        "mirrord_process_resident_memory_bytes",
        "Memory of a disk's process, what it shares with others included; the daemon's disk is "
        "empty.",
        labels=["disk"],
    )
    own = GaugeMetricFamily(
        "mirrord_process_own_memory_bytes", "Its memory that no file backs.", labels=["disk"]
    )
    used = CounterMetricFamily(
        "mirrord_process_cpu_seconds", "Its processor time so far.", labels=["disk"]
    )
    for name, process in processes.items():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            resident, backed = _memory_bytes(process.pid)
            used_s = _processor_s(process.pid)
            memory.add_metric([name], resident)
            own.add_metric([name], resident - backed)
            used.add_metric([name], used_s)
    yield from (memory, own, used)


def _memory_bytes(pid: int) -> tuple[int, int]:
    """Return what a process has in memory, and what of it a file backs (proc_pid_statm(5))."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        _, resident, backed, *_ = map(int, file.read().split())
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return resident * page_bytes, backed * page_bytes


def _processor_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2].split()  # the name may have spaces
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
