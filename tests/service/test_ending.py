"""How a disk process ends."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, threading
from mirrord.service import disk_process

async def live(options):
    threading.Thread(target=threading.Event().wait).start()
    disk_process.log.warning("last words")
    return 7

disk_process._live = live
sys.argv += "--state /s --runtime /r --name vm --listen-fd 0 --report-fd 1".split()
disk_process.main()
"""


def test_a_thread_that_hangs_in_a_dead_storage_keeps_no_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 7, done.stderr
    assert "last words" in done.stderr
