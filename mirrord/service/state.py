"""The files of the state directory that name disks and jobs, and the sockets' places.

    STATE/lock                    one daemon a state directory (flock)
    STATE/version                 its layout: an older one is read, a newer one refused
    STATE/disks/NAME/disk.json    the disk, once its attach has succeeded
    STATE/disks/NAME/attach.json  an attach under way; without disk.json it never happened
    STATE/disks/NAME/lock         flock of the disk process: the fence
    STATE/jobs/UUID/job.json      what was asked for; never changes
    STATE/jobs/UUID/ended.json    how it ended, as users see it; derived, or of a job never started
    STATE/jobs/UUID/story         its phases so far (`history.py`); nothing depends on it
    STATE/jobs/UUID/log …         journal and maps (`storage/job_files.py`)

Both the daemon and the disk processes use this module; it imports nothing heavy. Functions that
write block for a sync: call them in a thread where a loop is waiting. A record that can't be read
raises `DamagedError` naming the file; nothing here repairs or guesses.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from mirrord.control.messages import CacheMode, CopyMode, CutoverMode, Job, Step, VerifyMode
from mirrord.control.sockets import check_socket_path
from mirrord.errors import DamagedError, RefusedError
from mirrord.storage import durable
from mirrord.storage.backend import Identity

# The layout that is written here. Each record has that of its writer: an older one is read (and
# brought up to date where it is written again), a newer one is refused.
VERSION = 1


class DiskRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One attached disk."""

    name: str
    location: str
    cache: CacheMode = "writeback"
    read_only: bool = False
    size: int | None = None  # once it was moved: the guest's, which a larger device doesn't change
    root: str | None = None  # the location was granted below it, and is never looked for elsewhere
    # What was opened there, of a file or a block device, and on which boot; None too in a record
    # of an older version.
    identity: Identity | None = None
    boot: str | None = None
    version: int = VERSION


class JobRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a move was asked to do."""

    id: str
    disk: str
    source: str
    target: str
    created: str
    keep_source: bool = False
    wipe: bool = False
    force: bool = False
    verify: VerifyMode = "full"
    limit: int | None = None
    mode: CopyMode = "auto"
    cutover: CutoverMode = "auto"
    source_root: str | None = None  # as a disk's
    target_root: str | None = None
    version: int = VERSION

    def as_job(self) -> Job:
        """Return the job as users see it before anything has begun."""
        return Job(
            id=self.id,
            disk=self.disk,
            phase="queued",
            source=self.source,
            target=self.target,
            keep_source=self.keep_source,
            verify=self.verify,
            mode=self.mode,
            cutover=self.cutover,
            limit=self.limit or None,
            created=self.created,
            story=[Step(self.created, "queued", "asked for")],
        )


Record = TypeVar("Record", DiskRecord, JobRecord, Job)


@dataclass(frozen=True, slots=True)
class Directories:
    """Where everything of one daemon lies."""

    state: Path
    runtime: Path

    def disk(self, name: str) -> Path:
        return self.state / "disks" / name

    def disk_lock(self, name: str) -> Path:
        return self.disk(name) / "lock"

    def job(self, job_id: str) -> Path:
        return self.state / "jobs" / job_id

    def nbd_socket(self, name: str) -> Path:
        return self.runtime / "nbd" / f"{name}.sock"

    def channel(self, name: str) -> Path:
        return self.runtime / "disks" / f"{name}.sock"

    def disk_names(self) -> list[str]:
        return sorted(entry.name for entry in _entries(self.state / "disks"))

    def job_ids(self) -> list[str]:
        return sorted(entry.name for entry in _entries(self.state / "jobs"))


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        yield from (entry for entry in entries if entry.is_dir(follow_symlinks=False))


def prepare(directories: Directories) -> None:
    """Make both directories and what lies in them; refuse a state directory of a newer version.

    Raises RefusedError (`state-unwritable`, `state-version`), DamagedError.
    """
    wanted = (
        (directories.state, 0o700),
        (directories.state / "disks", 0o700),
        (directories.state / "jobs", 0o700),
        (directories.runtime, 0o755),
        (directories.runtime / "nbd", 0o755),
        (directories.runtime / "disks", 0o700),
    )
    for path, mode in wanted:
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            kind = "state" if directories.state in (path, *path.parents) else "runtime"
            raise _unwritable(kind, path, error) from error
        if not os.access(path, os.W_OK | os.X_OK):
            kind = "state" if directories.state in (path, *path.parents) else "runtime"
            raise _unwritable(kind, path, PermissionError("permission denied"))
    # Guests' users have to get to their sockets, whatever the umask was; each has its own mode.
    (directories.runtime / "nbd").chmod(0o755)
    for path in (directories.state, directories.runtime):
        _refuse_strangers(path)
    check_socket_path(directories.channel("x"))
    _check_version(directories.state / "version")


def _refuse_strangers(path: Path) -> None:
    """Refuse a directory in which, or in the place of which, another user could put anything."""
    for each in (path, path.parent):
        status = each.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise RefusedError(
                "directory-not-ours",
                f"{each} belongs to user {status.st_uid}; give a directory of your own",
            )
        if status.st_mode & stat.S_IWOTH and (each == path or not status.st_mode & stat.S_ISVTX):
            raise RefusedError(
                "directory-not-ours", f"everybody may write in {each}: chmod o-w {each}"
            )


def _unwritable(kind: str, path: Path, error: OSError) -> RefusedError:
    return RefusedError(
        f"{kind}-unwritable",
        f"can't write the {kind} directory {path}: {error.strerror or error}; "
        f"choose another with --{kind}-dir, or give this user access",
    )


def _check_version(path: Path) -> None:
    """Refuse what a newer version made; from now on older ones refuse what is made here."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        text = "0"
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} can't be read ({error}); nothing was changed") from error
    if not text.isdecimal():
        raise DamagedError(
            f"{path} is damaged: it should hold the number {VERSION}; if the directory is "
            f"mirrord's, write that number into it"
        )
    if int(text) > VERSION:
        raise RefusedError(
            "state-version",
            f"{path.parent} was written by a newer mirrord (its layout is {text}, this one knows "
            f"{VERSION}): install that version again, or give another --state-dir",
        )
    if int(text) < VERSION:
        try:
            replace_file(path, f"{VERSION}\n".encode())
        except OSError as error:
            raise _unwritable("state", path.parent, error) from error


def take_lock(path: Path) -> int | None:
    """Return the descriptor of the file at `path` with an exclusive flock, or None if it is taken.

    The lock belongs to the open file: a child that inherits the descriptor holds it as well.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if durable.try_flock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


class _Versioned(msgspec.Struct):
    """Any record, whatever else it has."""

    version: int = VERSION


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a record. Raises FileNotFoundError, DamagedError (naming the file)."""
    try:
        content = path.read_bytes()
        version = msgspec.json.decode(content, type=_Versioned).version
        if version > VERSION:
            raise DamagedError(
                f"{path} was written by a newer mirrord (its layout is {version}, this one knows "
                f"{VERSION}): install that version again"
            )
        return msgspec.json.decode(content, type=kind)
    except FileNotFoundError:
        raise
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedError(
            f"{path} is damaged ({error}); nothing was changed: put a good copy in its place"
        ) from error


def write_record(path: Path, record: DiskRecord | JobRecord | Job) -> None:
    """Replace the record at `path`, in this version's layout; durable on return."""
    if not isinstance(record, Job):
        record = msgspec.structs.replace(record, version=VERSION)
    encoded = msgspec.json.format(msgspec.json.encode(record), indent=1)
    replace_file(path, encoded + b"\n")


def replace_file(path: Path, content: bytes) -> None:
    """Replace the file at `path` as one durable step: the old content or the new, never a mix."""
    with _opened(path.parent) as directory:
        durable.replace(directory, path.name, content)


def sync_directory(path: Path) -> None:
    """Make what was created, renamed or removed in the directory durable."""
    with _opened(path) as directory:
        durable.sync_directory(directory)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make the directory and its entry; durable on return. It may exist."""
    path.mkdir(mode=0o700, exist_ok=True)
    sync_directory(path.parent)


def forget_disk(directories: Directories, name: str) -> None:
    """Remove a disk's directory. Its record goes first, so a crash leaves no half disk."""
    directory = directories.disk(name)
    with contextlib.suppress(FileNotFoundError):
        (directory / "disk.json").unlink()
        sync_directory(directory)
    shutil.rmtree(directory)
    sync_directory(directory.parent)


def forget_job(directories: Directories, job_id: str) -> None:
    """Remove a job as if it had never been; in one step, so that no crash leaves half of it."""
    forgotten = directories.state / "jobs" / f".{job_id}.forgotten"
    directories.job(job_id).rename(forgotten)
    sync_directory(forgotten.parent)
    shutil.rmtree(forgotten)


def sweep(directories: Directories) -> None:
    """Remove what a crash left of things that were being made or forgotten."""
    for job_id in directories.job_ids():
        directory = directories.job(job_id)
        unasked = not any((directory / name).exists() for name in ("job.json", "log"))
        if job_id.startswith(".") or unasked:
            shutil.rmtree(directory)
    for name in directories.disk_names():
        directory = directories.disk(name)
        if (directory / "disk.json").exists():
            continue
        lock = take_lock(directory / "lock")
        if lock is not None:  # else a process is just finishing an attach
            if not (directory / "disk.json").exists():
                shutil.rmtree(directory)
            os.close(lock)
