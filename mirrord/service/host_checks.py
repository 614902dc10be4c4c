"""What `mirrord doctor` looks at on this host: the kernel, what it grants, systemd, the clock.

Each check is one function that changes nothing and doesn't raise. What the kernel grants is what
it grants here, to this user: a service may be granted less or more.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from mirrord.core.geometry import MIB
from mirrord.core.units import format_bytes
from mirrord.service.checks import Check
from mirrord.storage.fileio import open_io

PYTHON_MIN = (3, 11)
KERNEL_MIN = (5, 6)  # openat2(2)
DESCRIPTORS_MIN = 4096  # a disk takes three in the daemon, a client one in its disk's process
RINGS_FREE = (5, 12)  # from here on rings don't count as locked memory
LOCKED_BYTES_MIN = 8 * MIB  # what current systems grant: a ring has room in it many times
UNIT = "mirrord.service"
SYSTEMCTL_S = 5.0  # it asks systemd by a local socket

_PROC = Path("/proc")
_SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
# adjtimex(2): struct timex begins with modes, which is padded, and four longs; then comes status.
_STATUS_AT = 5 * ctypes.sizeof(ctypes.c_long)
_TIMEX_BYTES = 512  # more than it has
_STATUS_UNSYNCHRONISED = 0x40
_TIME_ERROR = 5


def check_python() -> Check:
    """Look at the interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < PYTHON_MIN:
        return Check("python", "problem", f"Python {version}", "install Python 3.11 or later")
    return Check("python", "ok", f"Python {version}")


def check_kernel() -> Check:
    """Look at the kernel's version."""
    release = os.uname().release
    if _kernel() < KERNEL_MIN:
        return Check("kernel", "problem", f"Linux {release}", "mirrord needs Linux 5.6 or later")
    return Check("kernel", "ok", f"Linux {release}")


def _kernel() -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return tuple(map(int, found.groups())) if found else (0, 0)


def check_io() -> Check:
    """Look whether the kernel lets this user do file operations by io_uring, and why not."""

    async def probe() -> None:
        await open_io("io_uring").close()

    try:
        asyncio.run(probe())
    except OSError as error:
        text, advice = _forbidden(error)
        return Check("io", "advice", f"threads: {text}", f"{advice}, for about twice the rate")
    return Check("io", "ok", "io_uring")


def _forbidden(error: OSError) -> tuple[str, str]:
    """Say why there is no io_uring, and what to do about it."""
    disabled = _read(_PROC / "sys/kernel/io_uring_disabled")
    if disabled == "2":
        return "io_uring is forbidden to all", "sysctl kernel.io_uring_disabled=0"
    if disabled == "1":
        group = _read(_PROC / "sys/kernel/io_uring_group")
        return (
            f"io_uring is forbidden to users outside group {group}",
            "sysctl kernel.io_uring_disabled=0, or put the service's user into that group",
        )
    if re.search(r"^Seccomp:\s+2$", _read(_PROC / "self/status"), re.M):
        return (
            f"a seccomp filter forbids io_uring ({error.strerror})",
            "allow io_uring_setup, io_uring_enter and io_uring_register in the container's profile",
        )
    return f"io_uring can't be used ({error.strerror})", "use Linux 5.6 or later with io_uring"


def check_limits() -> list[Check]:
    """Look at what a process started here may take: files, their size, locked memory."""
    return [_check_descriptors(), _check_file_size(), _check_locked_memory()]


def _check_descriptors() -> Check:
    """A daemon raises its limit by itself, to the hard one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= DESCRIPTORS_MIN:
        shown = "no limit" if most == resource.RLIM_INFINITY else str(most)
        return Check("descriptors", "ok", f"a daemon started here may open {shown} files")
    return Check(
        "descriptors",
        "advice",
        f"a daemon started here may open only {most} files",
        "raise the hard limit: LimitNOFILE= of the unit, or ulimit -H -n",
    )


def _check_file_size() -> Check:
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most == resource.RLIM_INFINITY:
        return Check("file size", "ok", "no limit")
    return Check(
        "file size",
        "problem",
        f"writes behind {format_bytes(most)} of a file are refused here",
        "lift it: LimitFSIZE=infinity of the unit, or ulimit -f unlimited",
    )


def _check_locked_memory() -> Check:
    """Rings count as locked memory up to Linux 5.11."""
    most, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if most == resource.RLIM_INFINITY:
        return Check("memlock", "ok", "any memory may be locked")
    text = f"{format_bytes(most)} of memory may be locked"
    if _kernel() >= RINGS_FREE or most >= LOCKED_BYTES_MIN:
        return Check("memlock", "ok", text)
    return Check(
        "memlock", "advice", text, "more for io_uring: LimitMEMLOCK=8M of the unit, or ulimit -l"
    )


def check_fuse(device: Path = Path("/dev/fuse")) -> Check:
    """Look for what disks that appear as files will need; nothing needs it yet."""
    if os.access(device, os.R_OK | os.W_OK):
        return Check("fuse", "ok", f"{device} can be used")
    return Check(
        "fuse", "advice", f"{device} can't be used", "nothing needs it yet; later: modprobe fuse"
    )


def check_clock() -> Check:
    """Look whether something keeps the clock right: stories and the age of jobs are told by it."""
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: only asks
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    status = ctypes.c_int.from_buffer(timex, _STATUS_AT).value
    if state < 0:
        return Check("clock", "advice", "the kernel doesn't tell whether it is kept right")
    if state == _TIME_ERROR or status & _STATUS_UNSYNCHRONISED:
        return Check(
            "clock",
            "advice",
            "nothing keeps it right: the times of moves may be wrong",
            "run chrony or systemd-timesyncd: timedatectl set-ntp true",
        )
    return Check("clock", "ok", "it is synchronised")


def check_systemd() -> Check:
    """Look at systemd and mirrord's unit, where systemd runs."""
    if not _SYSTEMD.is_dir():
        return Check(
            "systemd", "ok", "it doesn't run here: something else has to start mirrord daemon"
        )
    program = shutil.which("systemctl")
    if program is None:
        return Check("systemd", "advice", "it runs, but there is no systemctl")
    version = _run(program, "--version").partition("\n")[0]
    unit = dict(
        line.split("=", 1)
        for line in _run(
            program, "show", UNIT, "--property",
            "LoadState,ActiveState,UnitFileState,NeedDaemonReload",
        ).splitlines()
        if "=" in line
    )  # fmt: skip
    return _of_unit(version, unit)


def _of_unit(version: str, unit: dict[str, str]) -> Check:
    loaded, active = unit.get("LoadState", "unknown"), unit.get("ActiveState", "unknown")
    text = f"{version}; {UNIT} is {active}"
    if loaded == "not-found":
        advice = "install it, or run mirrord daemon by other means"
        return Check("systemd", "advice", f"{version}; there is no {UNIT}", advice)
    if loaded != "loaded":
        return Check(
            "systemd", "problem", f"{version}; {UNIT} is {loaded}", f"systemctl status {UNIT}"
        )
    if active == "failed":
        return Check("systemd", "problem", text, f"journalctl -u {UNIT} says why")
    if unit.get("NeedDaemonReload") == "yes":
        advice = "systemctl daemon-reload, then restart it"
        return Check("systemd", "advice", f"{text}; its file has changed since", advice)
    enabled = unit.get("UnitFileState", "unknown")
    if not enabled.startswith("enabled"):
        advice = "disks are not served after a boot: systemctl enable mirrord.socket mirrord"
        return Check("systemd", "advice", f"{text} and {enabled}", advice)
    return Check("systemd", "ok", f"{text} and {enabled}")


def _run(*command: str) -> str:
    """Return what a program printed; nothing when it can't be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SYSTEMCTL_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
