"""What Prometheus is told."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from mirrord import __version__
from mirrord.control.messages import Disk, Job, RequestCount, Uris
from mirrord.core.geometry import MIB
from mirrord.frontends.counters import KINDS
from mirrord.service.metrics import Process, render
from tests.daemon import Daemon
from tests.helpers import eventually
from tests.nbd_writer import FLUSH, WRITE, Client
from tests.style.sources import ROOT

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


def samples(disks: list[Disk], jobs: list[Job], processes: dict[str, Process]) -> dict[str, float]:
    """Return the value of each series, by its name and labels."""
    return parsed(render(disks, jobs, processes))


def parsed(text: bytes) -> dict[str, float]:
    """Return the value of each series of a scrape."""
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())):
            sample.value
        for family in text_string_to_metric_families(text.decode())
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
    told = samples([], [], {"": Process(os.getpid()), "vm": Process(NOBODY)})
    resident = told["mirrord_process_resident_memory_bytes disk="]
    assert resident > told["mirrord_process_own_memory_bytes disk="] > 1 << 20
    assert told["mirrord_process_cpu_seconds_total disk="] > 0
    assert "mirrord_process_resident_memory_bytes disk=vm" not in told


def test_requests() -> None:
    """Nothing is lost at either end of the histogram, and a bound has what took less."""
    buckets = [0] * 41
    buckets[3], buckets[14], buckets[15], buckets[40] = 1, 2, 4, 8  # 8 ns, 16 µs, 33 µs, 18 min
    count = RequestCount(buckets, 1.5, 4096, 3)
    none = RequestCount([], 0.0, 0, 0)
    told = samples([], [], {"vm": Process(NOBODY, {"read": count, "write": none}, 2.5)})
    assert told["mirrord_disk_stalled_seconds disk=vm"] == 2.5
    name, labels = "mirrord_disk_request_seconds", "disk=vm kind=read"
    bounds = {
        float(key.rpartition("le=")[2]): value
        for key, value in told.items()
        if key.startswith(f"{name}_bucket {labels}")
    }
    assert list(bounds.values()) == sorted(bounds.values())
    assert bounds[2**14 / 1e9] == 3
    assert bounds[2**15 / 1e9] == bounds[2**35 / 1e9] == 7
    assert bounds[float("inf")] == told[f"{name}_count {labels}"] == 15
    assert told[f"{name}_sum {labels}"] == 1.5
    assert told[f"mirrord_disk_request_bytes_total {labels}"] == 4096
    assert told[f"mirrord_disk_request_errors_total {labels}"] == 3
    assert told[f"{name}_count disk=vm kind=write"] == 0, "a kind that nobody used is there"


def test_a_guest_is_counted(daemon: Daemon, tmp_path: Path) -> None:
    """From the guest's request to the text that Prometheus gets, and from nothing after a kill."""
    daemon.expect_log("restarting disk process")
    (tmp_path / "vm.raw").write_bytes(bytes(MIB))
    guest = Client(daemon.attach("vm", tmp_path / "vm.raw"), "vm")
    for command, length in ((WRITE, 4096), (WRITE, 8192), (FLUSH, 0)):
        guest.send(command, 1, 0, length, bytes(length))
        assert guest.receive() == (1, 0)
    told = scrape(daemon)
    assert told["mirrord_disk_request_bytes_total disk=vm kind=write"] == 12288
    assert told["mirrord_disk_request_seconds_count disk=vm kind=write"] == 2
    assert told["mirrord_disk_request_seconds_count disk=vm kind=flush"] == 1
    assert 0 < told["mirrord_disk_request_seconds_sum disk=vm kind=flush"] < 10
    assert told["mirrord_disk_clients disk=vm"] == 1
    assert told["mirrord_process_own_memory_bytes disk=vm"] > 1 << 20
    guest.close()
    daemon.kill_disk("vm")
    eventually(lambda: daemon.find_disk_pid("vm"))
    eventually(
        lambda: scrape(daemon).get("mirrord_disk_request_bytes_total disk=vm kind=write") == 0,
        what="another process counts from 0",
    )


def scrape(daemon: Daemon) -> dict[str, float]:
    """Ask the daemon as Prometheus does."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(daemon.socket))
    connection.request("GET", "/metrics")
    with contextlib.closing(connection):
        return parsed(connection.getresponse().read())


RULES = re.search(r"<!-- alerts -->\n```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_alerts_of_the_readme_name_metrics_that_exist() -> None:
    """All of them, with the labels that they ask for, in a file that Prometheus would take."""
    assert RULES is not None
    (group,) = yaml.safe_load(RULES[1])["groups"]
    counts = {kind: RequestCount([1], 1.0, 1, 1) for kind in KINDS}
    running = job(2, "degraded", copy_rate=1.0, dirty_rate=1.0, eta_s=1.0)
    told = samples(
        [disk("vm")],
        [running, job(1, "failed", pause_ms=1.0)],
        {"vm": Process(os.getpid(), counts)},
    )
    names = {key.partition(" ")[0] for key in told}
    assert len(group["rules"]) >= 5
    for rule in group["rules"]:
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}, rule
        used = re.findall(r"\bmirrord_\w+", rule["expr"])
        assert used, rule
        for name in used:
            assert name in names, f"{rule['alert']}: no metric {name}"
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', rule["expr"]):
            for each in value.split("|"):
                assert any(f" {label}={each}" in key for key in told), f"{label}={each}"
        for label in re.findall(r"\$labels\.(\w+)", str(rule["annotations"])):
            assert any(f" {label}=" in key for key in told if key.startswith(used[0])), label
