"""Opening a disk on a share, the first time and again whenever its connection has died.

A handle that nobody shares is the lock. Where the server grants it the handle is durable: it is
taken over after a loss, which proves that nobody else had the file; else it is opened anew.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Final, cast

from mirrord.smb.location import ShareLocation
from mirrord.storage.backend import Capabilities
from mirrord.storage.remote import DeniedError, Door, ForgottenError, LostError, RemoteFile
from mirrord.storage.smb import control
from mirrord.storage.smb.control import Facts, Handle
from mirrord.storage.smb.desk import Desk, identity_of, tree_again
from mirrord.storage.smb.file import ShareFile
from mirrord.storage.smb.plain import PlainFile, PlainSession
from mirrord.storage.smb.server import ShareServer
from mirrord.storage.smb.session import ShareSession
from mirrord.storage.smb.work import aside, to_the_end

OPEN_S: Final = 10.0  # that opening again may take, before the connection is believed stuck
YIELD_S: Final = 1.0  # then a guest's disk on the same server has its turn before a move's target

File = ShareFile | PlainFile


class ShareDoor(Door):
    """Opens a disk on a share again."""

    def __init__(self, server: ShareServer, at: ShareLocation, read_only: bool) -> None:
        self.where = server.name
        self.paths: list[str] = []  # where it may be, when it was being renamed
        self._refused = False  # by the rights, at the last attempt: the next has a tree of its own
        self._server = server
        self._share = at.share
        self._read_only = read_only

    def changed(self) -> bool:
        return self._server.changed()

    async def reopen(self, former: RemoteFile) -> RemoteFile:
        file = await to_the_end(self._reopen(former), _give_back)
        await former.close()
        return file

    async def is_there(self, former: RemoteFile) -> bool:
        return await to_the_end(self._is_there(former))

    async def _is_there(self, former: RemoteFile) -> bool:
        self._server.use()
        try:
            session = await self._server.session()
            desk = Desk(session, await session.tree(self._share))
            for path in self.paths or [former.path]:
                if await desk.leads_to(path, former.identity):
                    return True
            return False
        finally:
            self._server.release()

    async def _reopen(self, former: RemoteFile) -> RemoteFile:
        self._server.use()
        try:
            return await self._open_again(former)
        finally:
            self._server.release()

    async def _open_again(self, former: RemoteFile) -> RemoteFile:
        session = await self._server.session()
        its = cast(File, former).session
        if its is session or its.lost is not None:  # the handle is of no use any more
            await former.close()
        anew, self._refused = self._refused, False
        tree = await tree_again(session, self._share, anew=anew)
        desk = Desk(session, tree)
        try:
            file = await self._find(desk, former)
        except BaseException:
            if anew:
                aside(desk.ask(control.disconnect))
            raise
        if anew:  # Samba looks once a tree who may do what: work on names has the rights, too, now
            session.trees[self._share.casefold()] = tree
        return file

    async def _find(self, desk: Desk, former: RemoteFile) -> RemoteFile:
        paths = self.paths or [former.path]
        for path in paths:
            kept = await self._take_over(desk, former, path)
            if kept is not None:
                return kept
        missing: OSError | None = None
        for path in paths:
            try:
                opening = open_file(self._server, desk, path, read_only=self._read_only)
                async with asyncio.timeout(OPEN_S):
                    found = await to_the_end(opening, _give_back)
            except (LostError, DeniedError):
                raise
            except TimeoutError as error:
                why = f"{self.where}: opening {path} takes longer than {OPEN_S:g} s"
                if self.authoritative or not self._serves_others(desk.session):
                    desk.session.abandon(why)
                if not self.authoritative:
                    await asyncio.sleep(YIELD_S)
                raise LostError(why) from error
            except OSError as error:
                why = f"{self.where}: {error.strerror}"
                self._refused = error.errno == errno.EACCES
                if error.errno != errno.ENOENT:
                    # Locked: the server has not noticed yet that the old connection is gone.
                    raise LostError(why) from error
                missing = error
                continue
            if len(paths) == 1 or former.identity.is_still(found.identity):
                return found
            await found.close()
        why = f"{self.where}: {paths[0]} is not there"
        if not self.authoritative:  # a job needn't wait for ever for what may have been removed
            raise DeniedError(errno.ENOENT, "target-missing", why) from missing
        raise LostError(why) from missing

    def _serves_others(self, session: ShareSession | PlainSession) -> bool:
        """Tell whether files are open in it that don't wait for ours to be opened."""
        waits = isinstance(session, PlainSession) and session.quiet_s > OPEN_S / 2
        return session.open_files > 0 and not waits

    async def _take_over(self, desk: Desk, former: RemoteFile, path: str) -> File | None:
        """Have the server give us the handle that it kept, if it did."""
        handle, its = cast(File, former).handle, cast(File, former).session
        if not handle.durable or not isinstance(its, ShareSession) or its.forgotten:
            return None
        access, share = _mode(self._read_only)
        try:
            again = await desk.ask(control.reopen_handle, path, access, handle, share=share)
        except LostError:
            raise
        except OSError as error:
            # Forgotten, or somebody else wanted the file. Samba leaves half of a handle behind that
            # it refused to give back, until its process ends: an open would wait for that one.
            handle.durable = False
            its.forgotten |= error.errno == errno.ENOENT  # else it may have kept the others
            why = f"{self.where}: the handle was not kept ({error.strerror})"
            desk.session.abandon(why)
            raise ForgottenError(why) from error
        facts = await desk.ask(control.facts, again)
        sparse = former.capabilities.punches_holes
        if sparse and not facts.is_sparse and not self._read_only:  # Samba has forgotten it
            await desk.ask(control.make_sparse, again)
        return as_file(
            self._server, desk, again, facts, path, sparse=sparse, kept=True,
            keeps_birth=former.identity.born_ns != 0,
        )  # fmt: skip


def _mode(read_only: bool) -> tuple[int, int]:
    if read_only:
        return control.READ, control.SHARED_FOR_READING
    return control.WRITE, control.NOT_SHARED


async def open_file(
    server: ShareServer, desk: Desk, path: str, *, read_only: bool, made_sparse: bool = False
) -> File:
    """Open a file that is there, for ourselves alone."""
    access, share = _mode(read_only)
    durable = not read_only and desk.keeps_handles
    handle = await desk.ask(control.open_handle, path, access, share=share, durable=durable)
    try:
        facts = await desk.ask(control.facts, handle)
        sparse = facts.is_sparse or made_sparse
        if read_only or sparse or not await desk.ask(control.make_sparse, handle):
            return as_file(server, desk, handle, facts, path, sparse=sparse, keeps_birth=sparse)
    except BaseException:
        await desk.ask(control.close, handle)
        raise
    # Samba has written the birth down just now, rounded, and gives no handle back whose file has
    # another birth than when it was opened: so it is opened once more.
    await desk.ask(control.close, handle)
    return await open_file(server, desk, path, read_only=read_only, made_sparse=True)


def as_file(
    server: ShareServer,
    desk: Desk,
    handle: Handle,
    facts: Facts,
    path: str,
    *,
    sparse: bool,
    kept: bool = False,
    keeps_birth: bool | None = None,
) -> File:
    """Return an open handle as a file; the server counts it until it is closed."""
    able = Capabilities(
        punches_holes=sparse, fast_zeroes=sparse, starts_zeroed=True, durable_flush=True
    )
    identity = identity_of(facts, keeps_birth=sparse if keeps_birth is None else keeps_birth)
    file = desk.session.file(desk.tree, handle, identity, able, kept=kept)
    file.path = path
    server.use()
    return file


async def _give_back(file: RemoteFile) -> None:
    """Close a file that nobody took."""
    await file.close()
