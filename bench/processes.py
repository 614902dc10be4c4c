"""What processes used: processor time, memory, switches, read from /proc.

Processes are found by the folder that their command line names, so that only those that the
benchmark itself started are ever looked at or ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

TICKS_S = os.sysconf("SC_CLK_TCK")
END_S = 10.0
LOOK_S = 0.02


def below(folder: Path, word: str = "") -> list[int]:
    """Return the processes with a path below `folder` and `word` in their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                told = (entry / "cmdline").read_bytes().decode(errors="replace")
                if f"{folder}/" in told and word in told:
                    found.append(int(entry.name))
    return sorted(found)


def disk_processes(folder: Path) -> list[int]:
    """Return the disk processes of the daemon that has everything in `folder`."""
    return below(folder, "mirrord.service.disk_process")


def end(pids: Sequence[int]) -> None:
    """End processes, and return when they are gone; those that already are are no error."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in filter(_lives, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        give_up = time.monotonic() + END_S
        while any(map(_lives, pids)) and time.monotonic() < give_up:
            time.sleep(LOOK_S)


def _lives(pid: int) -> bool:
    """Tell whether a process is there, and not only waiting for its parent to notice its end."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return told.rsplit(")", 1)[1].split()[0] not in "ZX"


def processor_s(pid: int) -> float:
    """Return the processor time that a process used until now; 0 when it is gone."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = told.rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


def all_processor_s(pids: Iterable[int]) -> float:
    """Return the sum over processes."""
    return sum(processor_s(pid) for pid in pids)


def pss_mib(pid: int) -> float:
    """Return a process's proportional share of memory."""
    return _number(f"/proc/{pid}/smaps_rollup", "Pss") / 1024


def peak_rss_mib(pid: int) -> float:
    """Return the most memory that a process had resident."""
    return _number(f"/proc/{pid}/status", "VmHWM") / 1024


def voluntary_switches(pid: int) -> int:
    """Return how often the threads of a process went to sleep."""
    return sum(_number(f"{path}/status", "voluntary_ctxt_switches") for path in _threads(pid))


def _threads(pid: int) -> Iterator[Path]:
    yield from Path(f"/proc/{pid}/task").iterdir()


def _number(path: str, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+)", Path(path).read_text(), re.M)
    return int(found[1]) if found else 0
