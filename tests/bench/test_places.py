"""Too little space is refused at once, and an interruption leaves nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import places, processes
from bench.__main__ import ALL, main
from bench.model import MIB
from tests.helpers import eventually, have_loop_devices
from tests.style.sources import ROOT

START_S = 60


def test_a_folder_that_is_too_small_is_refused(tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    free_mib = space.f_bavail * space.f_frsize // MIB
    with pytest.raises(places.TooLittleSpaceError, match="are needed"):
        places.check_space(tmp_path, free_mib)
    places.check_space(tmp_path, 0)


def test_nothing_begins_when_the_last_scenario_has_too_little_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ALL, "idle", dataclasses.replace(ALL["idle"], space_mib=1 << 40))
    assert main(["cli", "idle", "--folder", str(tmp_path)]) == 2
    assert "are needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: sockets lie in it."""
    name = Path(tempfile.mkdtemp(prefix="mb-test-"))
    yield name
    shutil.rmtree(name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_process_mount_loop_device_or_folder(
    folder: Path, number: signal.Signals
) -> None:
    scenario = "sparse" if have_loop_devices() and shutil.which("mkfs.xfs") else "idle"
    command = [sys.executable, "-m", "bench", "--quick", scenario]
    command += ["--folder", str(folder), "--results", str(folder / "results")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as bench:
        eventually(lambda: processes.below(folder, "disk_process"), START_S)
        bench.send_signal(number)
        told = bench.communicate(timeout=START_S)[1]
    assert bench.returncode == 130, told
    assert f"interrupted ({number.name})" in told
    assert not processes.below(folder)
    assert str(folder) not in Path("/proc/mounts").read_text()
    assert str(folder) not in _loops()
    assert not list(folder.iterdir())


def _loops() -> str:
    if not shutil.which("losetup"):
        return ""
    return subprocess.run(("losetup", "--all"), capture_output=True, text=True, check=False).stdout
