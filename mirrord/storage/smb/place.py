"""A name on a share, and the durable steps that a move takes with it.

As `FilePlace`, with what a share has in the place of a file system's means: a handle that nobody
shares is the lock; a rename is asked of the open handle, and never replaces anything; an open for
attributes alone, which no lock is in the way of, tells what a name leads to. A file is known by
its number on its volume, its size and its birth. After each change of a name the folder is
flushed, where the server does that; where not, `find` accepts either name after a crash.

While the server is away a step tries for `server.PATIENCE_S`, then it is an `OSError`. A cancelled
caller abandons a step's answer; the next one waits all the same until it has ended.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar, cast

from mirrord.core.geometry import KIB, TIB
from mirrord.core.units import format_bytes
from mirrord.errors import RefusedError
from mirrord.smb.location import ShareLocation
from mirrord.storage.backend import Backend, Cache, Identity, Place, UnreachableError
from mirrord.storage.names import part_name, retired_name
from mirrord.storage.remote import DeniedError, LostError, SteadySettings
from mirrord.storage.smb import control
from mirrord.storage.smb.control import Handle
from mirrord.storage.smb.desk import Desk, identity_of, tree_again
from mirrord.storage.smb.door import File, ShareDoor, as_file, open_file
from mirrord.storage.smb.server import PATIENCE_S, ShareServer
from mirrord.storage.smb.trouble import not_creatable, unopened
from mirrord.storage.smb.work import to_the_end
from mirrord.storage.steady import SteadyBackend

log = logging.getLogger(__name__)

# A handle that a killed process held is given back when its connection is gone: a moment later.
LOCK_RETRY_S: Final = 0.2
# One of ours that was being opened when its job ended is given back, as soon as it is open.
LOCKED_S: Final = 1.0
# Guests wait while a crashed job's target is looked for; without it the job ends.
FIND_PATIENCE_S: Final = 5.0
# Samba sets an end beyond this, but refuses to write there.
SIZE_IN_DOUBT: Final = 16 * TIB - 64 * KIB

T = TypeVar("T")


class SharePlace(Place):
    """The name of a disk on a share, or of one that will be there."""

    def __init__(self, location: ShareLocation, server: ShareServer) -> None:
        """Touch nothing. For a target, a folder's location will do."""
        self._at = location
        self._server = server
        self.patience_s = 0.0  # how long a lock that another holds may still go away
        self._target: SteadyBackend | None = None  # what this job made or found
        self._settled = False
        self._steps = asyncio.Lock()

    @property
    def location(self) -> str:  # type: ignore[override]
        return str(self._at)

    # The interface. Each method does one step, when the former has ended.

    async def open(self, *, read_only: bool = False, cache: Cache = Cache.WRITEBACK) -> Backend:
        return await self._step(self._open(read_only), _give_back)

    async def check_target(self, source: Backend, *, needed: int, force: bool = False) -> None:
        await self._step(self._check_target(source, needed, force))

    async def create(self, job_id: str, source: Backend, *, cache: Cache) -> Backend:
        return await self._step(self._create(job_id, source), _give_back)

    async def find(
        self, job_id: str, identity: Identity, *, cache: Cache, same_boot: bool = False
    ) -> Backend | None:
        return await self._step(self._find(job_id, identity), _give_back)

    async def publish(self, job_id: str) -> None:
        await self._step(self._insist(lambda: self._publish(job_id)))

    async def withdraw(self, job_id: str) -> None:
        await self._step(self._insist(lambda: self._withdraw(job_id)))

    async def discard(self, job_id: str, identity: Identity | None = None) -> None:
        await self._step(self._insist(lambda: self._discard(job_id, identity), LOCKED_S))

    async def confirm(self, job_id: str, identity: Identity) -> str | None:
        return await self._step(self._insist(lambda: self._confirm(identity)))

    async def retire(self, job_id: str, identity: Identity, *, wipe: bool = False) -> str | None:
        return await self._step(self._insist(lambda: self._retire(job_id, identity)))

    async def delete_retired(self, job_id: str, identity: Identity) -> None:
        await self._step(self._insist(lambda: self._delete_retired(job_id, identity)))

    async def _step(
        self,
        step: Coroutine[Any, Any, T],
        release: Callable[[T], Awaitable[None]] | None = None,
    ) -> T:
        """Do a step to its end, also when the caller is cancelled; none that never began."""
        try:
            await self._steps.acquire()
        except BaseException:
            step.close()
            raise
        return await to_the_end(self._in_turn(step), release)

    async def _in_turn(self, step: Coroutine[Any, Any, T]) -> T:
        try:
            return await step
        finally:
            self._steps.release()

    async def _insist(self, step: Callable[[], Coroutine[Any, Any, T]], locked_s: float = 0.0) -> T:
        """Begin again what a lost connection ended, for a while: it may be repeated.

        So may, for `locked_s`, what met a file that is open.
        """
        began_s = asyncio.get_running_loop().time()
        while True:
            try:
                return await step()
            except OSError as error:
                limit_s = locked_s if error.errno == errno.EBUSY else 0.0
                limit_s = PATIENCE_S if isinstance(error, LostError) else limit_s
                if asyncio.get_running_loop().time() >= began_s + limit_s:
                    raise
            await asyncio.sleep(LOCK_RETRY_S)

    # The share.

    @asynccontextmanager
    async def _desk(
        self, patience_s: float = PATIENCE_S, *, known: bool = True
    ) -> AsyncIterator[Desk]:
        """Have the share connected, for a step; it is `known` to have been there before.

        Raises LostError, DeniedError.
        """
        self._server.use()
        try:
            session = await self._server.patiently(patience_s)
            share = self._at.share
            tree = await (tree_again(session, share) if known else session.tree(share))
            yield Desk(session, tree)
        finally:
            self._server.release()

    @asynccontextmanager
    async def _refusing(self, patience_s: float = 0.0) -> AsyncIterator[Desk]:
        """The same for what refuses, at once: RefusedError, or UnreachableError."""
        try:
            async with self._desk(patience_s, known=False) as desk:
                yield desk
        except DeniedError as error:
            raise RefusedError(error.code, error.strerror or error.code) from error
        except LostError as error:
            raise UnreachableError(error.strerror or "the server is away") from error

    # Opening.

    async def _open(self, read_only: bool) -> Backend:
        async with self._refusing() as desk:
            if self._at.is_folder:
                raise RefusedError("is-directory", f"{self.location} is a folder: name a file")
            file = await self._open_patiently(desk, self._at.path, read_only)
            if file.size == 0:
                await file.close()
                raise RefusedError(
                    "empty", f"{self.location} has no size: a disk needs at least one byte"
                )
        return self._steady(file, read_only=read_only)

    async def _open_patiently(self, desk: Desk, path: str, read_only: bool) -> File:
        until_s = asyncio.get_running_loop().time() + self.patience_s
        while True:
            try:
                return await open_file(self._server, desk, path, read_only=read_only)
            except (LostError, DeniedError):
                raise
            except OSError as error:
                busy = error.errno == errno.EBUSY
                if not busy or asyncio.get_running_loop().time() > until_s:
                    raise unopened(self.location, error) from error
            await asyncio.sleep(LOCK_RETRY_S)

    def _steady(self, file: File, *, read_only: bool = False) -> SteadyBackend:
        settings = self._server.settings
        return SteadyBackend(
            file,
            ShareDoor(self._server, self._at, read_only),
            SteadySettings(
                io_timeout_s=settings.io_timeout_s,
                unflushed_bytes_max=settings.unflushed_bytes_max,
                write_through=settings.write_through,
            ),
            name=self._at.name,
            read_only=read_only,
        )

    # The target, before there is one.

    async def _check_target(self, source: Backend, needed: int, force: bool) -> None:
        async with self._refusing() as desk:
            try:
                await self._settle(desk, source)
                await self._check_folder(desk, needed, force)
            except (LostError, DeniedError):
                raise
            except OSError as error:
                raise not_creatable(self._at, error) from error

    async def _settle(self, desk: Desk, source: Backend) -> None:
        """Turn a folder's location into that of a file in it; refuse a name that is taken."""
        if not self._settled and await self._is_folder(desk, self._at):
            if not source.name:
                raise RefusedError("is-directory", f"{self.location} is a folder: name a file")
            self._at = self._at.inside(source.name)
        elif not self._settled and self._at.is_folder:
            raise RefusedError(
                "directory-missing", f"there is no folder {self.location}: create it first"
            )
        self._settled = True
        found = await desk.look(self._at.path)
        if found is None:
            return
        if source.identity.same_object(identity_of(found, keeps_birth=True)):
            raise RefusedError(
                "target-is-source", f"{self.location} is the source itself: name another target"
            )
        raise RefusedError(
            "target-exists",
            f"{self.location} exists and is never overwritten: name another target, or remove "
            "it if it is no disk that something uses",
        )

    async def _is_folder(self, desk: Desk, at: ShareLocation) -> bool:
        if not at.path:
            return True
        try:
            handle = await desk.ask(
                control.open_handle, at.path, control.LOOK, share=control.SHARED, folder=True
            )
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise
        await desk.ask(control.close, handle)
        return True

    async def _check_folder(self, desk: Desk, needed: int, force: bool) -> None:
        access = control.LOOK | control.ADD_FILE
        handle = await desk.ask(
            control.open_handle, self._at.folder, access, share=control.SHARED, folder=True
        )
        try:
            available = await desk.ask(control.available_bytes, handle)
        finally:
            await desk.ask(control.close, handle)
        if needed > available and not force:
            raise RefusedError(
                "no-space",
                f"{self._at.server}/{self._at.share} has not enough space: needed "
                f"{format_bytes(needed)} ({needed} bytes), available {format_bytes(available)} "
                f"({available} bytes): free some, or use --force",
            )

    async def _create(self, job_id: str, source: Backend) -> Backend:
        async with self._refusing() as desk:
            try:
                await self._settle(desk, source)
                file = await self._make(desk, self._part(job_id), source.size)
            except (LostError, DeniedError):
                raise
            except OSError as error:
                raise not_creatable(self._at, error) from error
        self._target = self._steady(file)
        return self._target

    async def _make(self, desk: Desk, part: str, size: int) -> File:
        """Make the target's file; it is gone again when that fails, however it does."""
        made = False
        try:
            handle = await desk.ask(
                control.open_handle, part, control.WRITE, create=True, durable=desk.keeps_handles
            )
            made = True
            file = await self._prepare(desk, handle, part, size)
        except BaseException as error:
            if made or isinstance(error, LostError):
                await self._unmake(desk, part, handle if made else None)
            raise
        return file

    async def _unmake(self, desk: Desk, part: str, handle: Handle | None) -> None:
        try:
            if handle is not None:
                await desk.ask(control.dispose, handle)
                await desk.ask(control.close, handle)
                return
        except OSError:  # the connection is lost: by another one, then
            pass
        try:
            async with self._desk(FIND_PATIENCE_S) as again:
                await again.remove(part, None)
        except OSError as error:
            log.warning("part left over location=%s error=%s", self.location, error.strerror)

    async def _prepare(self, desk: Desk, handle: Handle, part: str, size: int) -> File:
        """Make a new file as large as the source, of holes, durable."""
        sparse = await desk.ask(control.make_sparse, handle)
        try:
            await desk.ask(control.set_size, handle, size)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOSPC):  # how servers say that it is too large
                raise OSError(errno.EFBIG, error.strerror) from error
            raise
        if size > SIZE_IN_DOUBT:
            try:
                await desk.ask(control.probe_end, handle, size)
            except DeniedError as error:
                raise OSError(errno.EFBIG, error.strerror) from error
        await desk.ask(control.flush, handle)
        facts = await desk.ask(control.facts, handle)
        if facts.size != size:
            raise OSError(errno.EFBIG, f"the server made a file of {facts.size} bytes")
        await desk.flush_folder(self._at.folder)
        return as_file(self._server, desk, handle, facts, part, sparse=sparse)

    # The target, while its job lasts.

    async def _find(self, job_id: str, identity: Identity) -> Backend | None:
        async with self._refusing(FIND_PATIENCE_S) as desk:
            for path in (self._part(job_id), self._at.path):
                if not await desk.leads_to(path, identity):
                    continue
                try:
                    file = await self._open_patiently(desk, path, False)
                except RefusedError as error:
                    if error.code != "in-use":
                        raise
                    raise UnreachableError(str(error)) from error  # by a dead process of ours
                if identity.is_still(file.identity):
                    self._target = self._steady(file)
                    return self._target
                await file.close()
        return None

    async def _publish(self, job_id: str) -> None:
        await self._rename_target(self._part(job_id), self._at.path)
        assert self._target is not None
        file = cast(File, self._target.connected())  # a lost one is waited for
        sparse = self._target.capabilities.punches_holes
        await file.session.control(control.unhide, file.tree.share, file.handle, sparse=sparse)

    async def _withdraw(self, job_id: str) -> None:
        if self._target is not None:
            await self._rename_target(self._at.path, self._part(job_id))

    async def _rename_target(self, old: str, new: str) -> None:
        """Rename the target by its own handle, unless it has that name already."""
        target = self._target
        if target is None:
            raise FileNotFoundError(errno.ENOENT, "the target is not open", old)
        door = cast(ShareDoor, target.door)
        async with self._desk() as desk:
            found = await desk.look(new)
            if found is None or not target.identity.is_still(
                identity_of(found, keeps_birth=target.identity.born_ns != 0)
            ):
                if found is not None:
                    raise FileExistsError(errno.EEXIST, "the name is taken", new)
                if not await desk.leads_to(old, target.identity):
                    raise FileNotFoundError(errno.ENOENT, "the target's file is gone", old)
                file = cast(File, target.connected())
                door.paths = [new, old]
                # by the session that the handle is of
                await file.session.control(control.rename, file.tree.share, file.handle, new)
            door.paths = [new]
            await desk.flush_folder(self._at.folder)

    async def _discard(self, job_id: str, identity: Identity | None) -> None:
        if self._target is not None:
            identity = self._target.identity
            await self._target.close()  # its lock would be in the way
        async with self._desk() as desk:
            await desk.remove(self._part(job_id), None)
            if identity is not None:
                await desk.remove(self._at.path, identity)
            # Not before: this may be done again, and has to know it then. Nor later: what has this
            # name by then, and perhaps this inode, is somebody else's.
            self._target = None
            await desk.flush_folder(self._at.folder)

    async def _confirm(self, identity: Identity) -> str | None:
        try:
            async with self._desk() as desk:
                found = await desk.look(self._at.path)
        except LostError:
            raise
        except OSError as error:
            return f"the target {self.location} can't be looked at ({error.strerror})"
        if found is None:
            return f"the target {self.location} is gone"
        if not identity.is_still(identity_of(found, keeps_birth=identity.born_ns != 0)):
            return f"the target {self.location} was replaced or changed its size"
        return None

    # The source, after the commit point.

    async def _retire(self, job_id: str, identity: Identity) -> str | None:
        async with self._desk() as desk:
            retired = self._at.beside(retired_name(self._at.name, job_id)).path
            if await desk.leads_to(retired, identity):
                await desk.flush_folder(self._at.folder)
                return None
            try:
                handle = await desk.ask(control.open_handle, self._at.path, control.REMOVE)
            except LostError:
                raise
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return None  # deleted before a crash; RETIRED had not become durable
                if error.errno == errno.EBUSY:
                    return f"another client has {self.location} open"
                return f"{self.location} can't be retired ({error.strerror})"
            try:
                return await self._retire_open(desk, handle, retired, identity)
            finally:
                await desk.ask(control.close, handle)

    async def _retire_open(
        self, desk: Desk, handle: Handle, retired: str, identity: Identity
    ) -> str | None:
        found = await desk.ask(control.facts, handle)
        if not identity.is_still(identity_of(found, keeps_birth=identity.born_ns != 0)):
            return f"{self.location} was replaced meanwhile"
        if found.links > 1:
            return f"{self.location} has another hard link"
        await desk.ask(control.rename, handle, retired)
        await desk.flush_folder(self._at.folder)
        return None

    async def _delete_retired(self, job_id: str, identity: Identity) -> None:
        async with self._desk() as desk:
            retired = self._at.beside(retired_name(self._at.name, job_id)).path
            await desk.remove(retired, identity)
            await desk.flush_folder(self._at.folder)

    # Names.

    def _part(self, job_id: str) -> str:
        return self._at.beside(part_name(self._at.name, job_id)).path


async def _give_back(opened: Backend | None) -> None:
    """Close a disk that nobody took."""
    if opened is not None:
        await opened.close()
