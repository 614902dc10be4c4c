"""File names on a host: which are allowed, what they are called while a job lasts, and opening.

`open_inode` and `reopen` are the two halves of opening something without surprises: first the
inode, without side effects and without following a link, then, when it is known to be a regular
file or a block device, that same inode for reading or writing.
"""

from __future__ import annotations

import errno
import os
import stat

from mirrord.core.units import format_bytes
from mirrord.errors import RefusedError
from mirrord.storage import durable

NAME_BYTES_MAX = 255  # NAME_MAX of Linux


class NotADiskError(OSError):
    """A name leads to something that can't be a disk; `kind` says what, in words."""

    def __init__(self, kind: str) -> None:
        super().__init__(errno.EINVAL, f"it is {kind}")
        self.kind = kind


class Directory:
    """An open directory, closed when nobody refers to this any more."""

    def __init__(self, path: str, root: str | None = None) -> None:
        """Open it, below `root` if that is given.

        Raises `OSError`: ENOENT, ENOTDIR, EACCES, and what `open_below` raises.
        """
        self.path = path
        self.descriptor = -1
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self.descriptor = os.open(path, flags) if root is None else open_below(root, path, flags)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def unwritable(self) -> int:
        """Return the errno with which a name can't be made here by this process, or 0."""
        if os.access(".", os.W_OK | os.X_OK, dir_fd=self.descriptor, effective_ids=True):
            return 0
        sealed = os.fstatvfs(self.descriptor).f_flag & os.ST_RDONLY
        return errno.EROFS if sealed else errno.EACCES

    def available_bytes(self) -> int:
        """Return what the file system still takes, without what is reserved for root."""
        status = os.fstatvfs(self.descriptor)
        return status.f_bavail * status.f_frsize

    def refuse_private(self) -> None:
        """Refuse (`private-place`) a folder that is a service's own, and gone when it stops.

        By systemd.exec(5), PrivateTmp=: the service sees a folder of its own as /tmp, and another
        as /var/tmp. No other program would find a disk there, and a restart deletes it.
        """
        if "RUNTIME_DIRECTORY" not in os.environ:
            return  # no service: who runs this sees the same folder, and outlives it
        with open(f"/proc/self/fdinfo/{self.descriptor}", encoding="ascii") as told:
            mount = next(line.split()[1] for line in told if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                number, _, _, root, point, *_ = line.split(b" ", 5)
                if number.decode() == mount and b"/systemd-private-" in root:
                    raise RefusedError(
                        "private-place",
                        f"{self.path} lies in {os.fsdecode(point)}, which is the service's own "
                        "and is deleted when it stops: choose another place",
                    )

    def refuse_unfit(self, needed: int, *, lasting: bool) -> None:
        """Refuse a folder without space for so many bytes (`no-space`), and for a disk that is
        `lasting` one whose files a reboot deletes (`volatile-place`)."""
        volatile = lasting and durable.is_volatile(self.descriptor)
        available = self.available_bytes()
        if needed > available:
            warning = " although it lies in memory, and a reboot deletes it" if volatile else ""
            raise RefusedError(
                "no-space",
                f"{self.path} has not enough space: needed {format_bytes(needed)}"
                f" ({needed} bytes), available {format_bytes(available)}"
                f" ({available} bytes): free some, or use --force{warning}",
            )
        if volatile:
            raise RefusedError(
                "volatile-place",
                f"{self.path} lies in memory, and what is there is gone after a reboot: "
                "choose another place, or use --force",
            )


def check_name(location: str) -> None:
    """Refuse (`bad-name`) a path that no disk may have."""
    if any("\ud800" <= character <= "\udfff" for character in location):
        raise RefusedError("bad-name", f"{location!r} is no UTF-8: name it otherwise")
    if any(ord(character) < 32 or ord(character) == 127 for character in location):
        raise RefusedError("bad-name", f"{location!r} has control characters: name it otherwise")
    for component in location.split("/"):
        if component.startswith(".mirrord"):
            raise RefusedError(
                "bad-name", f"{location}: names that start with .mirrord are mirrord's own"
            )
        if len(os.fsencode(component)) > NAME_BYTES_MAX:
            raise RefusedError(
                "bad-name",
                f"{location}: a name is longer than {NAME_BYTES_MAX} bytes: shorten it",
            )


def part_name(name: str, job_id: str) -> str:
    """Return what a target is called until it is published."""
    return _hidden_name(name, f".mirrord-{job_id}.part")


def retired_name(name: str, job_id: str) -> str:
    """Return what a source is called between its retirement and its deletion."""
    return _hidden_name(name, f".mirrord-{job_id}.retired")


def _hidden_name(name: str, ending: str) -> str:
    """Put `ending` behind a dot and the name, of which so much is kept as there is room for."""
    room = NAME_BYTES_MAX - 1 - len(os.fsencode(ending))
    while len(os.fsencode(name)) > room:
        name = name[:-1]
    return f".{name}{ending}"


def open_below(root: str, path: str, flags: int) -> int:
    """Open an absolute path that has to lie below the directory `root`, or be it.

    Raises:
        OSError: ELOOP at a symbolic link, in `root` itself too; EXDEV when the path leaves it.
    """
    links = durable.RESOLVE_NO_SYMLINKS | durable.RESOLVE_NO_MAGICLINKS
    top = durable.open_beneath(-1, root, os.O_PATH | os.O_DIRECTORY, resolve=links)
    try:
        return durable.open_beneath(top, os.path.relpath(path, root), flags)
    finally:
        os.close(top)


def leaves_root(location: str, root: str | None, error: OSError) -> RefusedError | None:
    """Return the refusal where `error` is of a path that leads out of its root."""
    if root is None or error.errno not in (errno.ELOOP, errno.EXDEV):
        return None
    return RefusedError(
        "leaves-root",
        f"{location} leads through a symbolic link, or out of {root}, below which it was granted: "
        "write the path without links",
    )


def open_inode(directory: int | None, name: str, *, block_device: bool = False) -> int:
    """Return an O_PATH descriptor of a regular file (or a block device).

    Without a directory the name is an absolute path.

    Raises:
        NotADiskError: it is something else, a symbolic link included.
        OSError: it can't be reached.
    """
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISBLK(mode) if block_device else stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise NotADiskError(_kind(mode))


def reopen(inode: int, flags: int) -> int:
    """Open what an O_PATH descriptor stands for."""
    return os.open(f"/proc/self/fd/{inode}", flags | os.O_CLOEXEC)


def _kind(mode: int) -> str:
    for test, kind in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISREG, "a regular file"),
    ):
        if test(mode):
            return kind
    return "of an unknown kind"


def refusal(location: str, error: OSError) -> RefusedError:
    """Say why a file can't be opened or created, and what to do."""
    if isinstance(error, NotADiskError):
        code = "is-directory" if error.kind == "a directory" else "not-a-disk"
        return RefusedError(code, f"{location} is {error.kind}: name a file or a block device")
    directory = os.path.dirname(location)
    known = {
        errno.EEXIST: ("target-exists", "its temporary name is taken: discard the old job first"),
        errno.ENOENT: ("directory-missing", f"there is no directory {directory}: create it"),
        errno.ENOTDIR: ("directory-missing", f"{directory} is not a directory: name another"),
        errno.EACCES: ("directory-not-writable", f"{directory} isn't writable"),
        errno.EPERM: ("directory-not-writable", f"{directory} isn't writable"),
        errno.EROFS: ("directory-not-writable", f"{directory} is mounted read-only"),
        errno.ENOSPC: ("no-space", "its file system is full: free some space"),
        errno.EDQUOT: ("no-space", "the quota is used up: free some space"),
        errno.EFBIG: ("too-large", "its file system can't hold a file of that size"),
        errno.EINVAL: ("no-direct", "it can't be used past the page cache: use --cache writeback"),
    }
    code, reason = known.get(
        error.errno or 0, ("target-unusable", f"{error.strerror}: choose another target")
    )
    return RefusedError(code, f"{location} can't be created: {reason}")


def undeleted(error: OSError, path: str) -> OSError:
    """Return a deletion's error with what has become of the file: its name is a hidden one."""
    gone = "it is gone, but a power cut may bring {} back"
    left = "it is {} now" if os.path.lexists(path) else gone
    return OSError(error.errno, f"{error.strerror}; {left.format(path)}")
