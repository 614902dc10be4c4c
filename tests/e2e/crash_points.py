"""A move whose every step that makes something durable, or changes a name, may be its last one.

What runs in processes of its own beside `test_crash_points`. The calls of the operating system
are wrapped, in that process alone, so that each is told with the file it is about; one of them is
made to fail, or to be where the process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirrord.core.geometry import KIB
from mirrord.errors import MirrordError, RefusedError
from mirrord.service.state import Directories
from mirrord.storage import durable, fileio
from tests.engine.harness import QUICK
from tests.helpers import eventually_async
from tests.one_process import DISK, OneProcess, attach, serving

UNIT = 64 * KIB
SIZE = 5 * UNIT + 512
BLOCK_BYTES = 4096
SETTINGS = replace(
    QUICK, chunk_bytes=UNIT, region_bytes=UNIT, zero_bytes=4 * KIB, hot_checkpoints=0
)
JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# The guest's blocks: each write goes to one of its own, so that none hides another's loss.
STEPS = ("before", "copied", "mirrored", "clean", "moved")

Point = tuple[str, str, int]  # the call, the file in the test's folder, the how many-th of these


class Folder:
    """Where everything of one run lies."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.source = self.root / "old" / "source.raw"
        self.target = self.root / "new" / "target.raw"
        self.directories = Directories(self.root / "state", self.root / "run")
        self.diary = self.root / "diary"  # what the guest was answered, and that the point came

    def make(self) -> None:
        """Make the disk, attached."""
        for path in (self.source, self.target):
            path.parent.mkdir()
        self.source.write_bytes(before())
        attach(self.directories, self.source)


def before() -> bytes:
    """Return the disk's content at first: data, but for one hole."""
    return b"".join(bytes([n]) * UNIT for n in (1, 2, 0, 3, 4)) + b"\5" * 512


def written(step: str) -> tuple[int, bytes]:
    """Return offset and data of the guest's write at a step."""
    number = STEPS.index(step)
    return number * UNIT + BLOCK_BYTES, bytes([0xA0 + number]) * BLOCK_BYTES


# The life in which it happens.


async def move(root: str, verb: str, point: Point | None, how: str) -> dict[str, Any]:
    """Move the disk under a guest, with a fault at one point; return what came of it.

    `verb`: what ends the move, "cutover" or "cancel"; of the latter only that end has points.
    `how`: "before" and "after" kill the process there, else it is the name of an error.
    """
    folder = Folder(root)
    folder.make()
    diary = os.open(folder.diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    tracer = Tracer(folder.root, tuple(point) if point else None, how, diary)
    tracer.install()
    told = {"refused": "", "trace": tracer.trace}
    async with serving(folder.directories, SETTINGS) as process:
        process.begin()
        guest = Guest(process, diary)
        await guest.write("before")
        tracer.tracing = verb == "cutover"
        try:
            job = await process.move(folder.target, cutover="manual")
        except MirrordError as error:
            told["refused"] = str(error)
            return told
        except OSError as error:  # the control interface knows what to say about it
            told["refused"] = f"the daemon failed: {error}"
            return told
        await guest.write("copied")
        await _held(process, job.id)
        await guest.write("mirrored")
        map_path = folder.directories.job(job.id) / "map"
        await eventually_async(
            lambda: guest.failed or not map_path.exists() or not any(map_path.read_bytes())
        )
        await guest.write("clean")
        tracer.tracing = True
        await _steer(process, job.id, verb)
        await process.ended(job.id)
        os.write(diary, b"ended\n")
        await guest.write("moved")
    return told


async def _held(process: OneProcess, job_id: str) -> None:
    """Wait until the move waits for the operator, or has ended."""
    while True:
        shown = await process.moves.job(job_id)
        if shown.ended_already or (shown.phase == "mirroring" and not shown.bytes_remaining):
            return
        await process.moves.changed(DISK, 0.01)


async def _steer(process: OneProcess, job_id: str, verb: str) -> None:
    """Do as an operator does, who tries again when the state can't be written."""
    while not (await process.moves.job(job_id)).ended_already:
        try:
            await process.moves.steer(job_id, verb)
            return
        except RefusedError as error:
            if error.code == "wrong-phase":  # it is just ending
                return
            if error.code != "state-error":
                raise


class Guest:
    """Writes, flushes, and notes in the diary what it was answered."""

    def __init__(self, process: OneProcess, diary: int) -> None:
        self.failed = False
        self._process = process
        self._diary = diary

    async def write(self, step: str) -> None:
        """Do a write and a flush."""
        os.write(self._diary, f"ask {step}\n".encode())
        try:
            await self._process.disk.write(*written(step), fua=step == "mirrored")
            await self._process.disk.flush()
        except OSError as error:
            self.failed = True
            os.write(self._diary, f"error {step} {error}\n".encode())
        else:
            os.write(self._diary, f"done {step}\n".encode())


class Tracer:
    """Wraps the calls, notes them, and does to one of them what was asked for.

    That is a point, or the how many-th call of all.
    """

    def __init__(self, root: Path, point: Point | int | None, how: str, diary: int) -> None:
        self.trace: list[Point] = []
        self.tracing = False
        self._root = root
        self._point = point
        self._how = how
        self._diary = diary
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def install(self) -> None:
        """Wrap everything by which mirrord makes something durable or changes a name."""
        fileio.open_io = lambda choice="auto": fileio.ThreadIo()
        for name in ("fsync", "fdatasync", "ftruncate", "posix_fallocate"):
            self._wrap(os, name, name, lambda descriptor, *_, **__: _path(descriptor))
        for name in ("unlink", "rmdir", "mkdir"):
            self._wrap(os, name, name, lambda path, *_, dir_fd=None, **__: _path(dir_fd, path))
        self._wrap(os, "rename", "rename", _renamed)
        self._wrap(os, "replace", "rename", _renamed)
        self._wrap(os, "link", "link", _renamed)
        self._wrap(os, "truncate", "truncate", lambda path, *_, **__: _path(None, path))
        self._wrap(os, "open", "create", _created)
        self._wrap(io, "open", "create", _opened)
        self._wrap(os, "pwritev", "write-through", _written_through)
        self._wrap(durable, "_fallocate", "fallocate", lambda descriptor, *_: _path(descriptor))
        self._wrap(
            durable, "_renameat2", "renameat2",
            lambda number, old_at, old, new_at, new, flags: _path(new_at, os.fsdecode(new)),
        )  # fmt: skip

    def _wrap(self, module: Any, name: str, call: str, where: Callable[..., str | None]) -> None:
        real = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._point not in self._note(call, where(*args, **kwargs)):
                return real(*args, **kwargs)
            os.write(self._diary, b"struck\n")
            if self._how == "after":
                with contextlib.suppress(OSError):  # what isn't there can't be removed
                    real(*args, **kwargs)
            if self._how in ("before", "after"):
                os.kill(os.getpid(), signal.SIGKILL)
            number = getattr(errno, self._how)
            raise OSError(number, os.strerror(number))

        setattr(module, name, wrapped)

    def _note(self, call: str, path: str | None) -> tuple[Point, int] | tuple[()]:
        """Note a call on a file of the test's, and return its names."""
        if not self.tracing or path is None or not path.startswith(f"{self._root}/"):
            return ()
        role = JOB_ID.sub("JOB", path.removeprefix(f"{self._root}/"))
        with self._lock:
            self._counts[call, role] += 1
            point = (call, role, self._counts[call, role])
            self.trace.append(point)
            return point, len(self.trace)


def _path(directory: int | None, name: Any = "") -> str:
    if directory is None:
        return os.path.abspath(name)
    return os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name).rstrip("/")


def _renamed(
    old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None, **_: Any
) -> str:
    return _path(dst_dir_fd, new)


def _created(path: Any, flags: int, *_: Any, dir_fd: int | None = None, **__: Any) -> str | None:
    return _path(dir_fd, path) if flags & os.O_CREAT else None


def _opened(path: Any, mode: str = "r", *_: Any, **__: Any) -> str | None:
    return None if isinstance(path, int) or not set(mode) & set("wax") else _path(None, path)


def _written_through(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> str | None:
    return _path(descriptor) if flags & os.RWF_DSYNC else None


# The life after it.


async def look(root: str, nth: int = 0, how: str = "") -> dict[str, Any]:
    """Be the next process: read the disk, let the move end, read the disk again.

    With a fault at its `nth` call; a disk may be refused because of that.
    """
    folder = Folder(root)
    diary = os.open(folder.diary, os.O_WRONLY | os.O_APPEND)
    tracer = Tracer(folder.root, nth or None, how, diary)
    tracer.install()
    tracer.tracing = True
    try:
        return await _look(folder)
    except* (MirrordError, OSError) as refused:
        if not nth:
            raise
        told = [str(error) for error in refused.exceptions]
    return {"refused": told}


async def _look(folder: Folder) -> dict[str, Any]:
    async with serving(folder.directories, SETTINGS) as process:
        found = bytes(await process.disk.read(0, SIZE))
        process.begin()
        jobs = await process.moves.jobs(None)
        for job in jobs:
            await _held(process, job.id)
            await _steer(process, job.id, "cutover")
            await process.ended(job.id)
        again = bytes(await process.disk.read(0, SIZE))
        ended = [await process.moves.job(job.id) for job in jobs]
        return {
            "found": found.hex(),
            "again": again == found,
            "location": process.location,
            "jobs": [[job.phase, job.reason or ""] for job in ended],
        }
