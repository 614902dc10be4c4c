"""A file's name, and the durable steps that a move takes with it.

The directory is opened once and held; a name in it is never resolved again, and never through a
symbolic link. A link given as the location of an existing disk is followed once, at `open`, and
`location` is what it led to from then on. Below a root no link is followed at all (`names`).

Names: a target is made as `.NAME.mirrord-JOB.part`, gets NAME by `publish`; a source is renamed
to `.NAME.mirrord-JOB.retired` before it is unlinked. Every rename refuses to replace anything.

What a file is, is its inode, its size and its birth, not its name: another file under the name
(an operator restored a backup, an editor saved) is never touched. st_dev isn't compared, since it
changes over a boot, or a mount (btrfs).

Every step blocks, so it runs in a thread; one after another, for they share the state below. A
cancelled caller abandons the step's answer, and the next one waits all the same until it ended.
Crash points are those of the job: each step may be repeated, and finds its own half-done work.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from mirrord.errors import RefusedError
from mirrord.storage import durable
from mirrord.storage.backend import Backend, Cache, Identity, Place
from mirrord.storage.file import FileBackend, FileFacts, examine, identify
from mirrord.storage.fileio import FileIo
from mirrord.storage.names import (
    Directory,
    NotADiskError,
    check_name,
    leaves_root,
    open_inode,
    part_name,
    refusal,
    reopen,
    retired_name,
    undeleted,
)

P = ParamSpec("P")
T = TypeVar("T")
Opened = TypeVar("Opened", bound="tuple[int, FileFacts] | None")


class FilePlace(Place):
    """The name of a regular file that is a disk, or will be one."""

    def __init__(self, location: str, io: FileIo, *, root: str | None = None) -> None:
        """Touch nothing. `location` is a path; for a target, a directory's will do."""
        self._root = root
        self.location = os.path.abspath(location)
        self._is_directory = location.endswith("/")
        self._io = io
        self.patience_s = 0.0  # how long a lock that another holds may still go away
        self._steps = asyncio.Lock()
        self._directory: Directory | None = None
        self._name = os.path.basename(self.location)
        self._target: Identity | None = None  # the file this job made, once known
        check_name(self.location)

    # The interface. Each method runs one blocking step in a thread.

    async def open(self, *, read_only: bool = False, cache: Cache = Cache.WRITEBACK) -> Backend:
        descriptor, facts = await self._opening(self._open, read_only, cache)
        return self._adopt(descriptor, facts, cache, read_only)

    async def check_target(self, source: Backend, *, needed: int, force: bool = False) -> None:
        await self._step(self._check_target, source, needed, force)

    async def create(self, job_id: str, source: Backend, *, cache: Cache) -> Backend:
        descriptor, facts = await self._opening(self._create, job_id, source, cache)
        return self._adopt(descriptor, facts, cache)

    async def find(
        self, job_id: str, identity: Identity, *, cache: Cache, same_boot: bool = False
    ) -> Backend | None:
        found = await self._opening(self._find, job_id, identity, cache)
        return found and self._adopt(*found, cache)

    async def publish(self, job_id: str) -> None:
        await self._step(self._publish, job_id)

    async def withdraw(self, job_id: str) -> None:
        await self._step(self._withdraw, job_id)

    async def discard(self, job_id: str, identity: Identity | None = None) -> None:
        await self._step(self._discard, job_id, identity)

    async def confirm(self, job_id: str, identity: Identity) -> str | None:
        return await self._step(self._confirm, identity)

    async def retire(self, job_id: str, identity: Identity, *, wipe: bool = False) -> str | None:
        return await self._step(self._retire, job_id, identity)

    async def delete_retired(self, job_id: str, identity: Identity) -> None:
        await self._step(self._delete_retired, job_id, identity)

    async def _step(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.shield(await self._start(step, *args, **kwargs))

    async def _opening(
        self, step: Callable[P, Opened], *args: P.args, **kwargs: P.kwargs
    ) -> Opened:
        """Run a step that returns an open descriptor: closed again when nobody takes it."""
        return await self._io.take(await self._start(step, *args, **kwargs), _close_found)

    async def _start(
        self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Start a step when the former one has ended; the lock goes with its end, not before."""
        await self._steps.acquire()
        started = self._io.submit(step, *args, **kwargs)
        started.add_done_callback(lambda _: self._steps.release())
        return started

    def _adopt(
        self, descriptor: int, facts: FileFacts, cache: Cache, read_only: bool = False
    ) -> FileBackend:
        return FileBackend(
            descriptor, self._io, facts, cache=cache, name=self._name, read_only=read_only
        )

    # Opening. Everything below blocks.

    def _open(self, read_only: bool, cache: Cache) -> tuple[int, FileFacts]:
        if self._directory is None and self._root is None:
            self.location = os.path.realpath(self.location)
            check_name(self.location)
            self._name = os.path.basename(self.location)
        try:
            descriptor = self._open_file(self._name, read_only, cache)
        except FileNotFoundError as error:
            raise RefusedError(
                "location-missing", f"{self.location} doesn't exist: check the path"
            ) from error
        except NotADiskError as error:
            raise refusal(self.location, error) from error
        except OSError as error:
            raise self._unopened(error) from error
        return self._locked(descriptor, read_only, cache)

    def _open_file(self, name: str, read_only: bool, cache: Cache) -> int:
        inode = open_inode(self._parent().descriptor, name)
        try:
            flags = os.O_RDONLY if read_only else os.O_RDWR
            return reopen(inode, flags | (os.O_DIRECT if cache is Cache.DIRECT else 0))
        finally:
            os.close(inode)

    def _locked(self, descriptor: int, read_only: bool, cache: Cache) -> tuple[int, FileFacts]:
        """Lock and examine an open file; it is closed when that is refused."""
        try:
            lock = partial(durable.lock_disk, descriptor, writing=not read_only)
            if not durable.try_for(self.patience_s, lock):
                raise RefusedError(
                    "in-use",
                    f"{self.location} is in use by another program: stop that first",
                )
            facts = examine(descriptor, cache, read_only=read_only)
            if facts.identity.size == 0:
                raise RefusedError(
                    "empty", f"{self.location} has no size: a disk needs at least one byte"
                )
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise self._unopened(error) from error
            raise
        return descriptor, facts

    def _unopened(self, error: OSError) -> RefusedError:
        left = leaves_root(self.location, self._root, error)
        if left is not None:
            return left
        reason = error.strerror
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
            return RefusedError(
                "no-locks",
                f"{self.location} can't be locked ({reason}): use a file system with locks",
            )
        if error.errno == errno.EINVAL:
            return RefusedError(
                "no-direct",
                f"{self.location} can't be opened past the page cache: use --cache writeback",
            )
        if error.errno == errno.ETXTBSY:
            return RefusedError("in-use", f"{self.location} is being executed, or is swap space")
        return RefusedError(
            "unreadable",
            f"{self.location} can't be opened ({reason}): check its permissions",
        )

    def _parent(self) -> Directory:
        if self._directory is None:
            directory = Directory(os.path.dirname(self.location), self._root)
            directory.refuse_private()
            self._directory = directory
        return self._directory

    # The target, before there is one.

    def _check_target(self, source: Backend, needed: int, force: bool) -> None:
        self._settle_name(source)
        try:
            parent = self._parent()
        except OSError as error:
            directory = os.path.dirname(self.location)
            if (left := leaves_root(self.location, self._root, error)) is not None:
                raise left from error
            if error.errno == errno.EACCES:
                raise RefusedError(
                    "directory-not-writable",
                    f"the directory {directory} can't be used: {error.strerror}",
                ) from error
            raise RefusedError(
                "directory-missing",
                f"there is no directory {directory} ({error.strerror}): create it first",
            ) from error
        self._refuse_existing(source)
        if f"{parent.path}/".startswith("/dev/") and not parent.path.startswith("/dev/shm"):
            raise RefusedError(
                "location-missing",
                f"there is no device {self.location}: check the name, or attach the device",
            )
        if reason := parent.unwritable():
            what = "mount" if reason == errno.EROFS else "permissions"
            raise RefusedError(
                "directory-not-writable",
                f"can't write the directory {parent.path} ({os.strerror(reason)}): "
                f"change its {what}, or name another",
            )
        if not force:
            parent.refuse_unfit(needed, lasting=source.capabilities.durable_flush)

    def _settle_name(self, source: Backend) -> None:
        """Turn a directory's path into that of a file in it, of the source's name."""
        if self._directory is not None:
            return
        if self._leads_to_directory():
            if not source.name:
                raise RefusedError(
                    "is-directory", f"{self.location} is a directory: name the file in it"
                )
            self.location = os.path.join(self.location, source.name)
        elif self._is_directory:
            raise RefusedError(
                "directory-missing", f"there is no directory {self.location}: create it first"
            )
        directory, self._name = os.path.split(self.location)
        if self._root is None:
            self.location = os.path.join(os.path.realpath(directory), self._name)
        check_name(self.location)

    def _leads_to_directory(self) -> bool:
        if self._root is None:
            return os.path.isdir(self.location)
        try:
            Directory(self.location, self._root)
        except OSError as error:
            left = leaves_root(self.location, self._root, error)
            if left is not None:
                raise left from error
            return False
        return True

    def _refuse_existing(self, source: Backend) -> None:
        parent = self._parent().descriptor
        try:
            os.stat(self._name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        try:
            led_to = os.stat(self._name, dir_fd=parent)
        except OSError:
            led_to = None  # a link to nothing is in the way all the same
        if led_to is not None and (led_to.st_dev, led_to.st_ino) == (
            source.identity.device,
            source.identity.inode,
        ):
            raise RefusedError(
                "target-is-source", f"{self.location} is the source itself: name another target"
            )
        raise RefusedError(
            "target-exists",
            f"{self.location} exists and is never overwritten: name another target, or remove "
            "it if it is no disk that something uses",
        )

    def _create(self, job_id: str, source: Backend, cache: Cache) -> tuple[int, FileFacts]:
        self._settle_name(source)
        part = part_name(self._name, job_id)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            parent = self._parent()
            descriptor = os.open(part, flags, 0o600, dir_fd=parent.descriptor)
        except OSError as error:
            left = leaves_root(self.location, self._root, error)
            raise left or refusal(self.location, error) from error
        try:
            facts = self._prepare(descriptor, source, cache)
            durable.sync_directory(parent.descriptor)
        except BaseException as error:
            os.close(descriptor)
            durable.remove(parent.descriptor, part)
            if isinstance(error, OSError):
                raise refusal(self.location, error) from error
            raise
        self._target = facts.identity
        return descriptor, facts

    def _prepare(self, descriptor: int, source: Backend, cache: Cache) -> FileFacts:
        """Make a new file what the source is, but for its content; durable."""
        durable.lock_disk(descriptor, writing=True)  # nobody else can know the name yet
        os.ftruncate(descriptor, source.size)
        if isinstance(source, FileBackend):
            source.copy_attributes_to(descriptor)
        if cache is Cache.DIRECT:
            durable.set_direct(descriptor)
        facts = examine(descriptor, cache, read_only=False)
        os.fsync(descriptor)
        return facts

    # The target, while its job lasts.

    def _find(self, job_id: str, identity: Identity, cache: Cache) -> tuple[int, FileFacts] | None:
        try:
            parent = self._parent()
        except FileNotFoundError:
            return None
        durable.sync_directory(parent.descriptor)
        for name in (part_name(self._name, job_id), self._name):
            if not self._leads_to(name, identity):
                continue
            try:
                descriptor = self._open_file(name, False, cache)
            except OSError as error:
                raise self._unopened(error) from error
            found = self._locked(descriptor, False, cache)
            if not identity.is_still(found[1].identity):
                os.close(descriptor)
                continue
            self._target = found[1].identity
            return found
        return None

    def _publish(self, job_id: str) -> None:
        parent, part = self._parent().descriptor, part_name(self._name, job_id)
        if self._exists(part):
            if self._target is not None and self._leads_to(self._name, self._target):
                durable.remove(parent, part)  # both names: a rename by links was interrupted
            elif self._target is not None and not self._leads_to(part, self._target):
                raise FileNotFoundError(errno.ENOENT, "the target's file was replaced", part)
            else:
                durable.rename_no_replace(parent, part, self._name)
        elif self._target is None or not self._leads_to(self._name, self._target):
            raise FileNotFoundError(errno.ENOENT, "the target's file is gone", part)
        durable.sync_directory(parent)

    def _withdraw(self, job_id: str) -> None:
        parent, part = self._parent().descriptor, part_name(self._name, job_id)
        if self._target is not None and self._leads_to(self._name, self._target):
            if self._exists(part):
                durable.remove(parent, self._name)
            else:
                durable.rename_no_replace(parent, self._name, part)
        durable.sync_directory(parent)

    def _discard(self, job_id: str, identity: Identity | None) -> None:
        try:
            parent = self._parent().descriptor
        except FileNotFoundError:
            return
        name = part_name(self._name, job_id)
        try:
            durable.remove(parent, name)
            ours = (known for known in (self._target, identity) if known)
            if any(self._leads_to(self._name, known) for known in ours):
                name = self._name
                durable.remove(parent, name)
            durable.sync_directory(parent)
        except OSError as error:
            raise undeleted(error, f"{self._parent().path}/{name}") from error

    def _confirm(self, identity: Identity) -> str | None:
        try:
            directory = Directory(os.path.dirname(self.location), self._root)
            descriptor = os.open(
                self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.descriptor
            )
        except OSError as error:
            return f"the target {self.location} can't be opened ({error.strerror})"
        try:
            if not identity.is_still(identify(descriptor)):
                return f"the target {self.location} was replaced or changed its size"
            if not os.pread(descriptor, 1, 0) or not os.pread(descriptor, 1, identity.size - 1):
                return f"the target {self.location} is shorter than it was"
        except OSError as error:
            return f"the target {self.location} can't be read ({error.strerror})"
        finally:
            os.close(descriptor)
        return None

    # The source, after the commit point.

    def _retire(self, job_id: str, identity: Identity) -> str | None:
        try:
            parent = self._parent().descriptor
            retired = retired_name(self._name, job_id)
            if self._leads_to(retired, identity):
                durable.sync_directory(parent)
                return None
            if not self._exists(self._name):
                durable.sync_directory(parent)
                return None  # unlinked before a crash; RETIRED had not become durable
            inode = open_inode(parent, self._name)
        except NotADiskError:
            return f"{self.location} was replaced meanwhile"
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{self.location} can't be looked at ({error.strerror})"
        try:
            if not identity.is_still(identify(inode)):
                return f"{self.location} was replaced meanwhile"
            return self._retire_file(inode, parent, retired, identity)
        except BlockingIOError:
            return f"another program has {self.location} open"
        except OSError as error:
            left = f"; it is {self._parent().path}/{retired} now" if self._exists(retired) else ""
            return f"{self.location} can't be retired ({error.strerror}){left}"
        finally:
            os.close(inode)

    def _retire_file(self, inode: int, parent: int, retired: str, identity: Identity) -> str | None:
        if os.fstat(inode).st_nlink != 1:
            return f"{self.location} has another hard link"
        descriptor = reopen(inode, os.O_RDONLY)
        try:
            with durable.sole_opener(descriptor):
                durable.rename_no_replace(parent, self._name, retired)
                reason = None
                if not self._leads_to(retired, identity):
                    reason = f"{self.location} was replaced meanwhile"
                elif not durable.lease_holds(descriptor):
                    reason = f"another program has {self.location} open"
                if reason is not None:
                    durable.rename_no_replace(parent, retired, self._name)
                durable.sync_directory(parent)
                return reason
        finally:
            os.close(descriptor)

    def _delete_retired(self, job_id: str, identity: Identity) -> None:
        try:
            parent = self._parent().descriptor
        except FileNotFoundError:
            return
        retired = retired_name(self._name, job_id)
        try:
            if self._leads_to(retired, identity):
                durable.remove(parent, retired)
            durable.sync_directory(parent)
        except OSError as error:
            raise undeleted(error, f"{self._parent().path}/{retired}") from error

    # What a name leads to.

    def _exists(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._parent().descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _leads_to(self, name: str, identity: Identity) -> bool:
        try:
            inode = open_inode(self._parent().descriptor, name)
        except (FileNotFoundError, NotADiskError):
            return False
        try:
            return identity.is_still(identify(inode))
        finally:
            os.close(inode)


def _close_found(found: tuple[int, FileFacts] | None) -> None:
    if found is not None:
        os.close(found[0])
