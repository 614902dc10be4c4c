"""What `mirrord doctor` finds out about the host."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from pathlib import Path

import pytest

from mirrord.service import host_checks
from mirrord.service.checks import Check
from tests.helpers import have_io_uring


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have the checks read another /proc."""
    monkeypatch.setattr(host_checks, "_PROC", tmp_path)
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "self").mkdir()
    return tmp_path


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no io_uring."""

    def forbid(_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("mirrord.storage.uring.UringIo.__init__", forbid)


def kernel(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """Run on another kernel."""
    monkeypatch.setattr(os, "uname", lambda: type("Uname", (), {"release": release}))


def test_this_host_can_run_mirrord() -> None:
    for check in (host_checks.check_python(), host_checks.check_kernel()):
        assert check.level == "ok"
    assert (host_checks.check_io().level == "ok") is have_io_uring()


def test_what_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_checks, "PYTHON_MIN", (99, 0))
    assert host_checks.check_python().level == "problem"
    for release, level in (("5.5.19", "problem"), ("5.10.0-8-amd64", "ok"), ("6.1", "ok")):
        kernel(monkeypatch, release)
        assert host_checks.check_kernel().level == level


@pytest.mark.usefixtures("forbidden")
@pytest.mark.parametrize(
    ("files", "why", "what"),
    [
        ({"sys/kernel/io_uring_disabled": "2\n"}, "forbidden to all", "io_uring_disabled=0"),
        ({"sys/kernel/io_uring_disabled": "1\n", "sys/kernel/io_uring_group": "77\n"},
         "outside group 77", "into that group"),
        ({"sys/kernel/io_uring_disabled": "0\n", "self/status": "Name:\tx\nSeccomp:\t2\n"},
         "a seccomp filter", "the container's profile"),
        ({"self/status": "Seccomp:\t0\n"}, "Operation not permitted", "Linux 5.6"),
    ],
)  # fmt: skip
def test_why_there_is_no_io_uring(proc: Path, files: dict[str, str], why: str, what: str) -> None:
    for name, content in files.items():
        (proc / name).write_text(content)
    check = host_checks.check_io()
    assert check.level == "advice", "it works without"
    assert check.text.startswith("threads: ")
    assert why in check.text
    assert what in check.advice


def limits(monkeypatch: pytest.MonkeyPatch, **values: int) -> dict[str, Check]:
    """Return the checks of limits, of which some are set."""
    real = resource.getrlimit
    set_here = {getattr(resource, f"RLIMIT_{name}"): value for name, value in values.items()}
    with monkeypatch.context() as patch:
        patch.setattr(
            resource, "getrlimit", lambda n: (set_here[n],) * 2 if n in set_here else real(n)
        )
        return {check.name: check for check in host_checks.check_limits()}


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, level in ((256, "advice"), (1 << 20, "ok"), (resource.RLIM_INFINITY, "ok")):
        assert limits(monkeypatch, NOFILE=most)["descriptors"].level == level
    assert limits(monkeypatch, FSIZE=resource.RLIM_INFINITY)["file size"].level == "ok"
    small = limits(monkeypatch, FSIZE=1 << 20)["file size"]
    assert (small.level, "1 MiB" in small.text) == ("problem", True)
    for release, most, level in (
        ("5.10", 64 << 10, "advice"), ("5.10", 8 << 20, "ok"), ("6.1", 64 << 10, "ok"),
        ("5.10", resource.RLIM_INFINITY, "ok"),
    ):  # fmt: skip
        kernel(monkeypatch, release)
        assert limits(monkeypatch, MEMLOCK=most)["memlock"].level == level


def test_fuse(tmp_path: Path) -> None:
    device = tmp_path / "fuse"
    assert host_checks.check_fuse(device).level == "advice"
    device.touch()
    assert host_checks.check_fuse(device).level == "ok"


@pytest.mark.parametrize(
    ("state", "status", "level"),
    [(0, 0x2001, "ok"), (0, 0x40, "advice"), (5, 0, "advice"), (-1, 0, "advice")],
)
def test_the_clock(monkeypatch: pytest.MonkeyPatch, state: int, status: int, level: str) -> None:
    class Libc:
        def adjtimex(self, timex: ctypes.Array[ctypes.c_char]) -> int:
            assert timex.raw == bytes(len(timex)), "it only asks"
            ctypes.c_int.from_buffer(timex, 40).value = status
            return state

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc())
    assert host_checks.check_clock().level == level


def test_the_real_clock_is_asked() -> None:
    """The status is where the kernel puts it: it has no bits beyond those that there are."""
    timex = ctypes.create_string_buffer(host_checks._TIMEX_BYTES)
    assert 0 <= ctypes.CDLL(None).adjtimex(timex) <= 5
    assert 0 <= ctypes.c_int.from_buffer(timex, host_checks._STATUS_AT).value < 1 << 16
    assert host_checks.check_clock().name == "clock"


SYSTEMCTL = """#!/bin/sh
case "$1" in
--version) echo "systemd 252 (252.38)"; echo +PAM ;;
show) cat "$(dirname "$0")/shown" ;;
esac
"""


@pytest.mark.parametrize(
    ("shown", "level", "said"),
    [
        ("LoadState=loaded\nActiveState=active\nUnitFileState=enabled\n", "ok",
         "systemd 252 (252.38); mirrord.service is active and enabled"),
        ("LoadState=not-found\nActiveState=inactive\nUnitFileState=\n", "advice", "install it"),
        ("LoadState=bad-setting\nActiveState=inactive\n", "problem", "systemctl status"),
        ("LoadState=loaded\nActiveState=failed\nUnitFileState=enabled\n", "problem",
         "journalctl -u mirrord.service"),
        ("LoadState=loaded\nActiveState=active\nUnitFileState=disabled\n", "advice",
         "systemctl enable"),
        ("LoadState=loaded\nActiveState=active\nUnitFileState=enabled\nNeedDaemonReload=yes\n",
         "advice", "daemon-reload"),
        ("", "problem", "is unknown"),
    ],
)  # fmt: skip
def test_systemd(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: str, level: str, said: str
) -> None:
    monkeypatch.setattr(host_checks, "_SYSTEMD", tmp_path / "none")
    assert host_checks.check_systemd().level == "ok"
    monkeypatch.setattr(host_checks, "_SYSTEMD", tmp_path)
    program = tmp_path / "systemctl"
    program.write_text(SYSTEMCTL)
    program.chmod(0o755)
    (tmp_path / "shown").write_text(shown)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = host_checks.check_systemd()
    assert check.level == level
    assert said in f"{check.text} — {check.advice}"
    (tmp_path / "shown").unlink()
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host_checks.check_systemd().text == "it runs, but there is no systemctl"
