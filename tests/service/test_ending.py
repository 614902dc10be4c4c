"""How a disk process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading
from mirrord.service import disk_process

async def live(options):
    threading.Thread(target=threading.Event().wait).start()
    disk_process.log.warning("last words")
    if how == "failing":
        raise KeyError("of the test")
    return 7

disk_process._live = live
how = sys.argv.pop(1)
sys.argv += "--state /s --runtime /r --name vm --listen-fd 0 --report-fd 1".split()
disk_process.main()
"""


@pytest.mark.parametrize(("how", "code"), [("well", 7), ("failing", 1)])
def test_a_thread_that_hangs_in_a_dead_storage_keeps_no_process(how: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == code, done.stderr
    assert "last words" in done.stderr
    assert ("KeyError: 'of the test'" in done.stderr) == (how == "failing")
