"""What Prometheus is told."""

from __future__ import annotations

import os

from prometheus_client.parser import text_string_to_metric_families

from mirrord import __version__
from mirrord.control.messages import Disk, Job, Uris
from mirrord.service.metrics import render

NOBODY = 2**22 + 1  # above the largest pid


def disk(name: str, **values: object) -> Disk:
    told: dict[str, object] = {
        "state": "serving", "reason": None, "location": "/vm.raw", "size": 5, "read_only": False,
        "cache": "writeback", "uris": Uris("nbd:"), "clients": 2, "job": None,
    }  # fmt: skip
    return Disk(name=name, **(told | values))  # type: ignore[arg-type]


def job(number: int, phase: str, **values: object) -> Job:
    told = {"disk": "vm", "source": "/a", "target": "/b"} | values
    return Job(id=str(number), phase=phase, **told)  # type: ignore[arg-type]


def samples(disks: list[Disk], jobs: list[Job], pids: dict[str, int]) -> dict[str, float]:
    """Return the value of each series, by its name and labels."""
    text = render(disks, jobs, pids).decode()
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())):
            sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }  # fmt: skip


def test_disks() -> None:
    told = samples([disk("vm"), disk("other", state="refused", size=None, clients=0)], [], {})
    assert told[f"mirrord_info version={__version__}"] == 1
    assert told["mirrord_disk_state disk=vm state=serving"] == 1
    assert told["mirrord_disk_state disk=other state=serving"] == 0
    assert told["mirrord_disk_state disk=other state=refused"] == 1
    assert told["mirrord_disk_size_bytes disk=vm"] == 5
    assert "mirrord_disk_size_bytes disk=other" not in told
    assert told["mirrord_disk_clients disk=vm"] == 2


def test_a_move_under_way() -> None:
    running = job(3, "copying", bytes_total=10, bytes_copied=4, bytes_remaining=6, copy_rate=2.5)
    told = samples([], [running, job(2, "failed"), job(1, "done", pause_ms=4.0)], {})
    assert told["mirrord_job_phase disk=vm job=3 phase=copying"] == 1
    assert told["mirrord_job_phase disk=vm job=3 phase=mirroring"] == 0
    assert told["mirrord_job_remaining_bytes disk=vm job=3"] == 6
    assert told["mirrord_job_copy_bytes_per_second disk=vm job=3"] == 2.5
    assert "mirrord_job_eta_seconds disk=vm job=3" not in told
    assert not [name for name in told if "job=1" in name or "job=2" in name]


def test_moves_that_ended() -> None:
    told = samples([], [job(3, "failed"), job(2, "done", pause_ms=4.0), job(1, "done")], {})
    assert told["mirrord_jobs_ended phase=done"] == 2
    assert told["mirrord_jobs_ended phase=failed"] == 1
    assert told["mirrord_jobs_ended phase=cancelled"] == 0
    assert told["mirrord_disk_last_move_failed disk=vm"] == 1, "the newest one did"
    assert "mirrord_disk_last_pause_seconds disk=vm" not in told
    told = samples([], [job(3, "done", pause_ms=4.0), job(2, "failed")], {})
    assert told["mirrord_disk_last_move_failed disk=vm"] == 0
    assert told["mirrord_disk_last_pause_seconds disk=vm"] == 0.004


def test_processes() -> None:
    told = samples([], [], {"": os.getpid(), "vm": NOBODY})
    assert told["mirrord_process_resident_memory_bytes disk="] > 1 << 20
    assert told["mirrord_process_cpu_seconds_total disk="] > 0
    assert "mirrord_process_resident_memory_bytes disk=vm" not in told
