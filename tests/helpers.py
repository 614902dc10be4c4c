"""What tests of several kinds share: waiting for other processes, and telling why a test skips.

A test never sleeps in order to wait. It waits for an event with a deadline; `eventually` is the
last resort, for what another process does and tells nobody.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

POLL_S = 0.02  # short beside anything waited for, long beside one look

# Why a test may skip, and whether this machine really can't run it. `make test` in CI turns any
# other skip into a failure (see conftest.py), so that coverage can't shrink in silence.
NEEDS_ROOT = "needs root"
NEEDS_LOOP = "needs loop devices"
NEEDS_FUSE = "needs FUSE"
NEEDS_URING = "needs io_uring"


def eventually(predicate: Callable[[], T], deadline_s: float = 10, what: str = "") -> T:
    """Return the first true value of `predicate`, or fail when `deadline_s` has passed."""
    give_up = time.monotonic() + deadline_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > give_up:
            pytest.fail(f"not within {deadline_s} s: {what or predicate!r}; last: {value!r}")
        time.sleep(POLL_S)


async def eventually_async(predicate: Callable[[], T], deadline_s: float = 10, what: str = "") -> T:
    """Do what `eventually` does without stopping the event loop."""
    give_up = time.monotonic() + deadline_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > give_up:
            pytest.fail(f"not within {deadline_s} s: {what or predicate!r}; last: {value!r}")
        await asyncio.sleep(POLL_S)


def require_root() -> None:
    """Skip unless this is root."""
    if os.geteuid() != 0:
        pytest.skip(NEEDS_ROOT)


def have_loop_devices() -> bool:
    """Tell whether loop devices can be made here."""
    return os.geteuid() == 0 and os.path.exists("/dev/loop-control")


def require_loop_devices() -> None:
    """Skip unless loop devices can be made."""
    if not have_loop_devices():
        pytest.skip(NEEDS_LOOP)


def have_fuse() -> bool:
    """Tell whether a program can be a file system here."""
    return os.geteuid() == 0 and os.path.exists("/dev/fuse")


def require_fuse() -> None:
    """Skip unless a program can be a file system."""
    if not have_fuse():
        pytest.skip(NEEDS_FUSE)


def have_io_uring() -> bool:
    """Tell whether the kernel lets this process make an io_uring."""
    system_call_number = 425  # io_uring_setup, the same on every architecture
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params
    descriptor: int = libc.syscall(system_call_number, 2, parameters)
    if descriptor < 0:
        return False
    os.close(descriptor)
    return True


def require_io_uring() -> None:
    """Skip unless io_uring can be used."""
    if not have_io_uring():
        pytest.skip(NEEDS_URING)


def require_program(name: str) -> str:
    """Return the path of a program, or skip; `make test` installs all that the tests need."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"needs the program {name}")
    return path


_telling: set[asyncio.Task[None]] = set()


def tell_the_end(
    work: Coroutine[Any, Any, None], ended: Callable[[OSError | None], None]
) -> asyncio.Task[None]:
    """Run `work`, and tell of its end as `Backend.begin_write` does: outside of any task."""
    tell = asyncio.get_running_loop().call_soon

    async def run() -> None:
        try:
            await work
        except OSError as error:
            tell(ended, error)
        else:
            tell(ended, None)

    task = asyncio.get_running_loop().create_task(run())
    _telling.add(task)
    task.add_done_callback(_telling.discard)
    return task
