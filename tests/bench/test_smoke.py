"""Each local scenario runs from start to end, with tiny sizes. Its figures say nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import ALL
from tests.helpers import require_loop_devices, require_root
from tests.style.sources import ROOT

LOCAL = [name for name in ALL if not name.startswith("smb-")]


@pytest.mark.parametrize("name", LOCAL)
def test_a_scenario_measures_every_peer(name: str, tmp_path: Path) -> None:
    if name == "sparse":
        require_root()
        require_loop_devices()
    command = [sys.executable, "-m", "bench", "--quick", name, "--results", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / f"{name}.json").read_text())
    measured = {peer for by_peer in result["figures"].values() for peer in by_peer}
    assert measured | set(result["missing"]) == set(result["peers"])
    assert next(iter(ALL[name].peers)) in measured
    assert result["machine"]["cores"] == os.cpu_count()
    assert name in done.stdout
