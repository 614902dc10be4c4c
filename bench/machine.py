"""What the figures were measured on: the machine, its kernel, and each program's version."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

BUSY_LOAD = 0.5  # of the cores: above it the figures are said to be from a busy machine

PROGRAMS = {  # by how a peer's name begins
    "qemu-storage-daemon": "qemu-storage-daemon",
    "blockdev-mirror": "qemu-storage-daemon",
    "qemu-img": "qemu-img",
    "nbdkit": "nbdkit",
    "nbdcopy": "nbdcopy",
    "cp": "cp",
    "rsync": "rsync",
}


def describe() -> dict[str, Any]:
    """Return cpu model, cores, memory, kernel and Python."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "memory_mib": _memory_mib(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def in_words(machine: dict[str, Any]) -> str:
    """Return one line about a machine that `describe` described."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_mib'] / 1024:.0f} GiB, "
        f"kernel {machine['kernel']}, Python {machine['python']}"
    )


def version(peer: str) -> str | None:
    """Return a peer's version by its own words, or None when it has none to tell."""
    if peer.startswith("mirrord"):
        return _first_line(sys.executable, "-P", "-m", "mirrord", "--version")
    for name, program in PROGRAMS.items():
        if peer.startswith(name) and shutil.which(program):
            return _first_line(program, "--version")
    return None


def is_busy(load: float) -> bool:
    """Tell whether a load is one beside which nothing can be measured well."""
    return load > BUSY_LOAD * (os.cpu_count() or 1)


@cache
def _first_line(*command: str) -> str | None:
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (told.stdout or told.stderr).strip().splitlines()
    return lines[0] if lines and told.returncode == 0 else None


def _cpu() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else platform.machine()


def _memory_mib() -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    return int(found[1]) // 1024 if found else 0
