"""File system steps that survive a power cut, and the locks around them. Linux, 64 bit.

Each function says what it promises. None of them promises anything on storage that lies about
a flush, and all of them block: call them from a thread where an event loop runs. What Python
3.11 lacks (renameat2, openat2, fstatfs) goes through libc's `syscall` with numbers of its own;
x86-64 and arm64 are known.

Rules that the callers build on:

* a name exists durably only after its *directory* was synced (fsync(2));
* a failed sync is never retried as if harmless: whoever gets the error must rewrite the data;
* a rename onto an existing name never happens by accident: `rename_no_replace`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import signal
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

# The numbers below 400 differ between the two machines; later ones are common to all.
SYS_OPENAT2 = 437
SYS_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}
SYS_STATX = {"x86_64": 332, "aarch64": 291}

_RENAME_NOREPLACE = 1
_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_TMPFS_MAGIC = 0x01021994
_RAMFS_MAGIC = 0x858458F6

# struct flock of a 64-bit Linux: type, whence, start, length (0: to the end), pid (0: OFD).
_FLOCK = struct.Struct("hhqqi4x")

# What QEMU locks (block/file-posix.c): a shared lock on byte 100+n says "I use permission n",
# on byte 200+n "I can't stand another's use of permission n".
_QEMU_USES, _QEMU_REFUSES = 100, 200
_QEMU_READ, _QEMU_WRITE, _QEMU_RESIZE = 0, 1, 3

_libc = ctypes.CDLL(None, use_errno=True)


def _function(name: str, *argument_types: type) -> ctypes._NamedFuncPointer:
    function = _libc[name]  # a fresh object each time, so each may have its own types
    function.restype = ctypes.c_long if name == "syscall" else ctypes.c_int
    function.argtypes = list(argument_types)
    return function


_renameat2 = _function(
    "syscall", *(ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p),
    ctypes.c_uint,
)  # fmt: skip
_openat2 = _function(
    "syscall", ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
)
_statx = _function(
    "syscall", *(ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint),
    ctypes.c_void_p,
)  # fmt: skip
_fallocate = _function(
    "fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong
)
_fstatfs = _function("fstatfs", ctypes.c_int, ctypes.c_void_p)


def check(result: int, name: str | None = None) -> int:
    """Return `result` of a C call, or raise the `OSError` that its errno means."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
    return result


# Names and contents.


def sync_directory(directory: int) -> None:
    """Make creations, renames and deletions in the open `directory` durable."""
    os.fsync(directory)


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data`; not durable yet. A write that moves nothing is EIO."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        if done <= 0:
            raise OSError(errno.EIO, "a write moved nothing")
        view, offset = view[done:], offset + done


def replace(directory: int, name: str, data: bytes, mode: int = 0o600) -> None:
    """Give the file `name` in `directory` the content `data`, all or nothing, durable on return.

    A crash leaves the old content or the new one, and maybe a stale `.NAME.new`, which the next
    call overwrites. One writer at a time (the caller's lock sees to it). On an error the old
    content is still there, unless it came from the last step, the directory's sync: then either
    may be.
    """
    temporary = f".{name}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, mode, dir_fd=directory)
    try:
        write_all(descriptor, data, 0)
        os.fsync(descriptor)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        remove(directory, temporary)
        raise
    finally:
        os.close(descriptor)
    sync_directory(directory)


def remove(directory: int, name: str) -> bool:
    """Unlink `name`; False when it was not there. Durable only after `sync_directory`."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def rename_no_replace(directory: int, old: str, new: str) -> None:
    """Rename within `directory`, never over an existing name. Durable after `sync_directory`.

    Where a file system can't do that in one step (EINVAL), a hard link takes the new name, which
    is as exclusive, and then the old one goes; a crash in between leaves both names for one file.

    Raises:
        FileExistsError: `new` exists; nothing was changed.
        FileNotFoundError: `old` doesn't exist.
    """
    number = SYS_RENAMEAT2.get(platform.machine())
    if number is not None:
        try:
            check(
                _renameat2(
                    number, directory, os.fsencode(old), directory, os.fsencode(new),
                    _RENAME_NOREPLACE,
                ),
                new,
            )  # fmt: skip
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
    os.link(old, new, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    os.unlink(old, dir_fd=directory)


def open_beneath(
    root: int,
    path: str,
    flags: int,
    mode: int = 0,
    *,
    resolve: int = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
) -> int:
    """Open `path` below the open directory `root` and return a close-on-exec descriptor.

    With the default `resolve` no `..`, absolute path or symbolic link leads anywhere else.

    Raises:
        OSError: EXDEV when the path leaves `root`, ELOOP at a symbolic link.
    """
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return check(_openat2(SYS_OPENAT2, root, os.fsencode(path), how, len(how)), path)


def preallocate(descriptor: int, length: int) -> None:
    """Allocate storage for the first `length` bytes, so that writing there can't hit ENOSPC.

    Grows the file when it is shorter. Not a promise on copy-on-write file systems (btrfs).
    """
    os.posix_fallocate(descriptor, 0, length)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its modes. Not durable before a sync."""
    check(_fallocate(descriptor, mode, offset, length))


def set_direct(descriptor: int) -> None:
    """Send the descriptor's reads and writes past the page cache (O_DIRECT) from now on.

    Raises:
        OSError: EINVAL where the file system can't.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)


def birth_ns(descriptor: int) -> int:
    """Return when the file was made, in nanoseconds, or 0 where its file system doesn't say.

    Inode numbers are used again at once; together with this they tell a file from its successor,
    unless that was made within the same tick of the kernel's clock (1 to 10 ms).
    """
    number = SYS_STATX.get(platform.machine())
    if number is None:
        return 0
    result = ctypes.create_string_buffer(256)  # struct statx
    check(_statx(number, descriptor, b"", _AT_EMPTY_PATH, _STATX_BTIME, result))
    (mask,) = struct.unpack_from("=I", result.raw, 0)
    if not mask & _STATX_BTIME:
        return 0
    seconds, nanoseconds = struct.unpack_from("=qI", result.raw, 80)
    return int(seconds * 1_000_000_000 + nanoseconds)


def is_volatile(descriptor: int) -> bool:
    """Tell whether the file lies on a file system that no power cut survives (tmpfs, ramfs)."""
    return file_system_of(descriptor) in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def file_system_of(descriptor: int) -> int:
    """Return the magic number of the file system on which an open file lies, as statfs(2) does."""
    result = ctypes.create_string_buffer(256)  # struct statfs has 120 bytes
    check(_fstatfs(descriptor, result))
    magic: int = struct.unpack_from("=q", result.raw)[0] & 0xFFFFFFFF
    return magic


# Locks.

# What a killed process held open may stay so for a while, its locks included: the kernel ends its
# io_uring operations after it was reaped, and those refer to their files. That takes milliseconds,
# on a slow disk some hundred. Who follows such a process should be that patient before it believes
# a lock to be another program's.
LOCK_PATIENCE_S = 1.0
_LOCK_RETRY_DELAY_S = 0.01  # a hundred tries in that time cost next to nothing


def try_for(patience_s: float, attempt: Callable[[], bool]) -> bool:
    """Repeat what failed until it succeeds or `patience_s` are over; at least once. Blocks."""
    deadline_s = time.monotonic() + patience_s
    while not attempt():
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(_LOCK_RETRY_DELAY_S)
    return True


def try_flock(descriptor: int) -> bool:
    """Take the exclusive flock(2) without waiting; False when another holds it.

    It belongs to the open file description and goes with its last descriptor, so also with the
    death of the process. Advisory: it binds only those who ask.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_disk(descriptor: int, *, writing: bool) -> bool:
    """Lock a disk's file against another QEMU or mirrord; False when it is in use.

    A writer locks every byte: QEMU, which locks single bytes shared, is kept out in either mode.
    A reader locks the bytes that a reading QEMU locks, and gets along with other readers.

    These are locks of the open file *description* (F_OFD_SETLK): a second `open` in the same
    process conflicts with the first, a duplicate doesn't, and closing some other descriptor of
    the same file takes nothing away. Advisory.

    Raises:
        OSError: the file system can't lock (ENOLCK, EOPNOTSUPP, EINVAL).
    """
    if writing:
        return _set_lock(descriptor, fcntl.F_WRLCK, 0, 0)
    wanted = (_QEMU_USES + _QEMU_READ, _QEMU_REFUSES + _QEMU_WRITE, _QEMU_REFUSES + _QEMU_RESIZE)
    if not all(_set_lock(descriptor, fcntl.F_RDLCK, byte, 1) for byte in wanted):
        return False
    forbidden = (_QEMU_USES + _QEMU_WRITE, _QEMU_USES + _QEMU_RESIZE, _QEMU_REFUSES + _QEMU_READ)
    return not any(_others_lock(descriptor, byte) for byte in forbidden)


def _set_lock(descriptor: int, kind: int, start: int, length: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _others_lock(descriptor: int, byte: int) -> bool:
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


@contextmanager
def sole_opener(descriptor: int) -> Iterator[None]:
    """Hold a write lease (F_SETLEASE): nobody else has the file open, and who tries has to wait.

    A process that opens the file meanwhile waits in open(2) for the end of the block, at most
    /proc/sys/fs/lease-break-time seconds; ask `lease_holds` before believing what was done.
    The kernel announces such a process by a signal, which would be SIGIO and deadly; SIGURG is
    one that is ignored unless somebody handles it.

    Raises:
        BlockingIOError: another open file description exists, of any process, ours included.
        OSError: EACCES when the file isn't ours, EINVAL where the file system has no leases.
    """
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    try:
        yield
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, 0)


def lease_holds(descriptor: int) -> bool:
    """Tell, inside `sole_opener`, whether nobody has tried to open the file since."""
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_WRLCK


# Attributes.


def copy_attributes(source: int, target: int) -> None:
    """Give the open file `target` the owner, mode, label and extended attributes of `source`.

    The umask has no say. What this process may not set is left out: an owner or a
    `trusted.`/`security.` attribute without privilege (EPERM), attributes that the target's
    file system doesn't know (EOPNOTSUPP). Where the group can't be kept, the mode gives the
    group nothing, as it would be another one. Set-id bits never travel.
    """
    status = os.fstat(source)
    mode = stat.S_IMODE(status.st_mode) & 0o777
    try:
        os.fchown(target, status.st_uid, status.st_gid)
    except PermissionError:
        try:
            os.fchown(target, -1, status.st_gid)
        except PermissionError:
            mode &= ~stat.S_IRWXG
    os.fchmod(target, mode)
    for name in _attribute_names(source):
        try:
            os.setxattr(target, name, os.getxattr(source, name))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENODATA):
                raise


def _attribute_names(descriptor: int) -> list[str]:
    try:
        return os.listxattr(descriptor)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
