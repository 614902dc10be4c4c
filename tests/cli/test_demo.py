"""The demo: no root, nothing but the package, every byte found, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from mirrord.service.demo_guest import content, find_differences, make_disk
from tests.daemon import processes_naming
from tests.helpers import eventually

DEMO = [sys.executable, "-m", "mirrord", "demo", "--size", "32M"]


def environment(folder: Path) -> dict[str, str]:
    """Return an environment whose temporary folder is `folder`."""
    folder.chmod(0o777)
    return {**os.environ, "TMPDIR": str(folder)}


def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder whose path is short enough for sockets."""
    return tmp_path_factory.mktemp("d")


def test_the_demo_finds_every_write(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = short(tmp_path_factory)
    done = subprocess.run(DEMO, capture_output=True, text=True, timeout=60, env=environment(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^copied +\d.* in \d+ pass", done.stdout, re.M)
    assert re.search(r"^guest paused for +\d", done.stdout, re.M)
    assert re.search(r"^guest writes during the move +[1-9]", done.stdout, re.M)
    assert "at the target: every one found" in done.stdout
    assert list(folder.iterdir()) == []
    assert processes_naming(str(folder)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_cleans_up_when_it_is_interrupted(
    tmp_path_factory: pytest.TempPathFactory, number: signal.Signals
) -> None:
    folder = short(tmp_path_factory)
    with subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment(folder),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if "copying:" in line:
                break
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(20) == 128 + number
    assert list(folder.iterdir()) == []
    eventually(lambda: not processes_naming(str(folder)), 5, "no process is left")


def test_wrong_usage() -> None:
    done = subprocess.run([*DEMO[:-1], "1M"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "at least 16 MiB" in done.stderr


def test_what_is_missing_is_found(tmp_path: Path) -> None:
    disk = tmp_path / "vm.raw"
    make_disk(disk, 4 * MIB, 2 * MIB)
    written = {3: 9, 900: 4}
    assert find_differences(disk, 4 * MIB, 2 * MIB, {}) == []
    assert find_differences(disk, 4 * MIB, 2 * MIB, written) == [3, 900]
    with disk.open("rb+") as file:
        for block, sequence in written.items():
            file.seek(block * 4096)
            file.write(content(block, sequence))
        file.seek(0, os.SEEK_END)
        file.write(b"x")
    assert find_differences(disk, 4 * MIB, 2 * MIB, written) == [1024]
