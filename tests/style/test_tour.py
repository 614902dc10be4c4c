"""The README's tour, typed by a test: every line works as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from tests.daemon import kill_and_wait, processes_naming
from tests.helpers import require_program
from tests.style.sources import ROOT

TOUR = re.compile(r"<!-- tour[^\n]*-->\n```console\n(.*?)```", re.S)
# What a reader does without thinking: wait until the daemon is there.
WAIT = 'until [ -S "$MIRRORD_SOCKET" ]; do read -t 0.05 <> <(:) || :; done'
TOUR_S = 90


def tour_script() -> str:
    """Return the tour as a script that ends at the first line that fails."""
    blocks = TOUR.findall((ROOT / "README.md").read_text())
    assert len(blocks) >= 3
    lines = re.sub(r"^\$ ", "", "".join(blocks), flags=re.M)
    lines = re.sub(r"^(mirrord daemon .*&)$", lambda m: f"{m[1]}\n{WAIT}", lines, flags=re.M)
    return f"set -eu\n{lines}"


def test_the_tour_works(tmp_path: Path) -> None:
    require_program("qemu-system-x86_64")
    require_program("curl")
    # unix sockets need short paths: the tour runs in a folder of its own below /tmp
    folder = tmp_path
    (folder / ".venv").symlink_to(ROOT / ".venv")
    script = tour_script()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MIRRORD_")}
    log = folder / "tour.log"
    try:
        with log.open("wb") as out:
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                timeout=TOUR_S, env=environment,
            )  # fmt: skip
        printed = log.read_text()
        assert done.returncode == 0, printed
        assert not (folder / "tour" / "ssd" / "vm.raw").exists(), printed
        assert not (folder / "tour" / "hdd" / "vm.raw").exists(), printed
        assert (folder / "tour" / "ssd" / "back.raw").stat().st_size == 2 << 30
        assert "tour/hdd/vm.raw" in printed
        assert json.loads((folder / "tour" / "openapi.json").read_text())["openapi"] == "3.1.0"
        assert 'mirrord_disk_state{disk="vm",state="serving"} 1.0' in printed
    finally:
        for pid in processes_naming(str(folder)):
            kill_and_wait(pid)
