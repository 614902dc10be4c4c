"""Processes that are found by their folder, and are gone when they were ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import processes

WAITS = "import signal, sys; {} print(flush=True); sys.stdin.read()"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN);"


@pytest.fixture(params=["", DEAF], ids=["willing", "deaf"])
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", WAITS.format(request.param), f"{tmp_path}/x"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as started:
        assert started.stdout is not None
        started.stdout.readline()
        try:
            yield started
        finally:
            started.kill()


def test_a_process_that_was_ended_is_gone(
    process: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "END_S", 0.3)
    assert processes.below(tmp_path) == [process.pid]
    assert not processes.below(tmp_path, "no such word")
    assert processes.peak_rss_mib(process.pid) > 1
    processes.end([process.pid])
    assert process.poll() is not None
    assert processes.processor_s(process.pid) == 0
    processes.end([process.pid])
