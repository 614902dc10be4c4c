"""What `mirrord doctor` looks at on storage: what the file systems of disks can do, and promise.

Nothing is changed: what a file system can do is tried in files that never get a name (O_TMPFILE).
Nothing that another host serves is touched, so that nobody waits for it.

Whether a flush gets to the disk can be seen in part: a device that has a volatile cache counts the
flushes that it gets (Documentation/block/stat.rst), and each fdatasync has to be at least one.
What the device does with it can't be seen.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mirrord.core.geometry import KIB
from mirrord.core.units import format_bytes
from mirrord.service.checks import REMOTE, VOLATILE, Check, Level, look_at, look_at_all
from mirrord.service.mounts import Mount, mount_of
from mirrord.service.places import is_share
from mirrord.service.state import DiskRecord
from mirrord.storage import durable
from mirrord.storage.carrying import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE

FLUSHES = 4  # an honest one takes 0.1 to 10 ms
# Nothing was sent to a device in less: ext4 that holds flushes back takes 26 µs, memory 0.3 µs.
FLUSH_S_MIN = 10e-6
PIECE_BYTES = 64 * KIB
SECTOR_BYTES = 512  # of st_blocks, whatever the file system's are (stat(3type))
NO_BARRIERS = ("nobarrier", "barrier=0")
SYS = Path("/sys")

_FICLONE = 0x40049409
_FLUSH_FIELD = 15  # of a device's `stat`


def check_folders(
    folders: Iterable[Path], mounts: Sequence[Mount], disks: Sequence[DiskRecord]
) -> list[Check]:
    """Look at each file system once, by the first of its folders."""
    checks, seen, files = [], set[int](), look_at_disks(disks)
    elsewhere = {folder for folder in folders if is_elsewhere(folder, mounts)}
    found = look_at_all(os.stat, set(folders) - elsewhere)
    for folder in sorted(folders):
        if folder in elsewhere:
            text = f"{folder} is served by another host or program: not looked at"
            checks.append(Check("storage", "ok", text))
            continue
        status = found[folder]
        try:
            if isinstance(status, OSError):
                raise status
            if status.st_dev in seen:
                continue
            seen.add(status.st_dev)
            here = [
                file
                for file in files.values()
                if not isinstance(file, OSError) and file.st_dev == status.st_dev
            ]
            look = partial(_check_system, status.st_dev, mount_of(folder, mounts), here)
            checks.append(look_at(look, folder))
        except OSError as error:
            checks.append(_refused(folder, error))
    return checks


def is_elsewhere(folder: Path, mounts: Sequence[Mount]) -> bool:
    """Tell whether something serves a folder that may not answer."""
    mount = mount_of(folder, mounts)
    return mount is not None and (mount.kind in REMOTE or mount.kind.startswith("fuse"))


def _refused(folder: Path, error: OSError) -> Check:
    """Say why a folder can't be looked at."""
    if isinstance(error, TimeoutError):
        text = f"{folder} hangs: {error.strerror or error}"
        return Check("storage", "problem", text, "look at its storage: dmesg")
    text = f"{folder} can't be looked at ({error.strerror})"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Check("storage", "problem", f"{folder} isn't there", "mount it, or make it")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Check("storage", "advice", text, "ask as root, or as the user of the daemon")
    if error.errno == errno.EROFS:
        return Check("storage", "advice", f"{folder} is read-only", "no disk moves from or to it")
    if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):  # of O_TMPFILE
        return Check("storage", "ok", f"{folder} can't be looked at without making a file there")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Check("storage", "problem", f"{folder} is full", "free some space")
    return Check("storage", "problem", text, "look at its storage: dmesg")


class Abilities(NamedTuple):
    """What a file system can do, as it was tried."""

    holes: bool
    direct: bool
    clones: bool
    flush_s: float  # the quickest
    flushed: bool | None  # each got to a device, or none has a cache; None: can't be seen
    device: str  # in words


def _check_system(
    device: int, mount: Mount | None, files: Sequence[os.stat_result], folder: Path
) -> Check:
    able = try_folder(folder, device, mount)
    kind = "an unknown file system" if mount is None else mount.kind
    available = available_bytes(folder)
    has = [
        "holes" if able.holes else "no holes",
        "O_DIRECT" if able.direct else "no O_DIRECT",
        "clones" if able.clones else "no clones",
        f"a flush takes {able.flush_s * 1e3:.2g} ms{able.device}",
    ]
    text = f"{folder}: {kind}, {format_bytes(available)} free; {', '.join(has)}"
    lie = _lie(able, mount)
    growth = sum(max(0, file.st_size - file.st_blocks * SECTOR_BYTES) for file in files)
    findings = {
        f"{lie}: a power cut loses what guests were told is durable": bool(lie),
        "a reboot empties it: a disk belongs elsewhere": kind in VOLATILE,
        "a disk takes its whole size here": not able.holes,
        "--cache direct is refused here": not able.direct,
        f"its disks may grow by {format_bytes(growth)}: make room before writes fail": (
            growth > available
        ),
    }
    advice = [finding for finding, holds in findings.items() if holds]
    level: Level = "problem" if lie else "advice" if advice else "ok"
    return Check("storage", level, text, "; ".join(advice))


def _lie(able: Abilities, mount: Mount | None) -> str:
    """Say what shows that a flush doesn't do what it should; nothing if nothing does."""
    if mount is not None and mount.kind in VOLATILE:
        return ""  # it promises nothing
    written = {"": ""} if mount is None else mount.options
    for option in NO_BARRIERS:
        key, _, value = option.partition("=")
        if written.get(key) == value:
            return f"flushes don't get to the device, mount it without {option}"
    if able.flushed is False:
        return "flushes don't get to the device, look at its mount options"
    if able.flushed is None and able.flush_s < FLUSH_S_MIN:
        return "a flush is too quick to be one, look at what the file system lies on"
    return ""


def try_folder(folder: Path, device: int, mount: Mount | None) -> Abilities:
    """Try what a file system can do, in files without a name. Raises OSError."""
    leaves = _leaves(device, mount)
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    descriptor = os.open(folder, flags, 0o600)
    try:
        counted = [_flushes(each) for each in leaves]
        durations = []
        for number in range(FLUSHES):
            os.pwrite(descriptor, os.urandom(PIECE_BYTES), number * PIECE_BYTES)
            began_s = time.perf_counter()
            os.fdatasync(descriptor)
            durations.append(time.perf_counter() - began_s)
        arrived = [_flushes(each) for each in leaves]
        return Abilities(
            holes=_punches(descriptor),
            direct=_goes_direct(folder, flags),
            clones=_clones(folder, flags, descriptor),
            flush_s=min(durations),
            flushed=_arrived(leaves, counted, arrived),
            device=_named(leaves),
        )
    finally:
        os.close(descriptor)


def _punches(descriptor: int) -> bool:
    before = os.fstat(descriptor).st_blocks
    try:
        durable.fallocate(descriptor, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, 0, PIECE_BYTES)
    except OSError:
        return False
    return os.fstat(descriptor).st_blocks < before


def _goes_direct(folder: Path, flags: int) -> bool:
    try:
        descriptor = os.open(folder, flags | os.O_DIRECT, 0o600)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, PIECE_BYTES) as memory:
            return os.pwrite(descriptor, memory, 0) == PIECE_BYTES
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _clones(folder: Path, flags: int, source: int) -> bool:
    descriptor = os.open(folder, flags, 0o600)
    try:
        fcntl.ioctl(descriptor, _FICLONE, source)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


# Devices.


def _leaves(device: int, mount: Mount | None) -> list[Path]:
    """Return the devices at the bottom of a file system's, in /sys; none where it has none."""
    path = _device(device)
    if path is None and mount is not None and mount.source.startswith("/dev/"):
        try:
            path = _device(os.stat(mount.source).st_rdev)  # btrfs has a number of its own
        except OSError:
            return []
    return [] if path is None else _below(path)


def _device(number: int) -> Path | None:
    path = SYS / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
    return path.resolve() if path.exists() else None


def _below(path: Path) -> list[Path]:
    if (path / "partition").exists():
        path = path.parent
    try:
        slaves = sorted((path / "slaves").iterdir())
    except OSError:
        slaves = []
    return [leaf for each in slaves for leaf in _below(each.resolve())] or [path]


def _has_cache(device: Path) -> bool:
    try:
        return (device / "queue/write_cache").read_text().strip() != "write through"
    except OSError:
        return True


def _flushes(device: Path) -> int | None:
    """Return how many flushes a device has got; None where they aren't counted (no blk-mq)."""
    if not (device / "mq").is_dir():
        return None
    try:
        return int((device / "stat").read_text().split()[_FLUSH_FIELD])
    except (OSError, IndexError, ValueError):
        return None


def _arrived(
    leaves: Sequence[Path], before: Sequence[int | None], after: Sequence[int | None]
) -> bool | None:
    """Tell whether each flush came to a device: to one of several paths or mirrors is enough."""
    came, all_counted = 0, bool(leaves)
    cached = [each for each in zip(leaves, before, after, strict=True) if _has_cache(each[0])]
    for _, first, last in cached:
        if first is None or last is None:
            all_counted = False
        else:
            came += last - first
    if came >= FLUSHES or (leaves and not cached):
        return True
    return False if all_counted else None


def _named(leaves: Sequence[Path]) -> str:
    if not leaves:
        return ""
    names = ", ".join(each.name for each in leaves)
    cache = "a write cache" if any(map(_has_cache, leaves)) else "no write cache"
    return f" ({names} has {cache})"


def available_bytes(folder: Path) -> int:
    """Return what the file system still takes, without what is kept for root."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def look_at_disks(disks: Iterable[DiskRecord]) -> dict[Path, os.stat_result | OSError]:
    """Return what the system says of each file or device of a disk, or why it doesn't."""
    paths = {Path(disk.location) for disk in disks if not is_share(disk.location)}
    return look_at_all(os.stat, paths)
