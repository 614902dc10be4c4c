"""Work on names of a share: each step is a few requests that `control` knows."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, Final

from mirrord.storage.backend import Identity
from mirrord.storage.remote import DeniedError, LostError
from mirrord.storage.smb import control
from mirrord.storage.smb.control import Facts
from mirrord.storage.smb.plain import PlainSession
from mirrord.storage.smb.session import ShareSession, Tree

KIND: Final = "smb"


def identity_of(facts: Facts, *, keeps_birth: bool) -> Identity:
    """Return what a file is known by. A birth that the server makes up is none."""
    born_ns = facts.born_ns if keeps_birth else 0
    return Identity(KIND, facts.volume, facts.number, facts.size, born_ns)


async def tree_again(
    session: ShareSession | PlainSession, share: str, *, anew: bool = False
) -> Tree:
    """Connect to a share that was there before: a server that is starting has it a little later.

    Raises LostError, also for that, and DeniedError.
    """
    try:
        return await session.tree(share, anew=anew)
    except DeniedError as error:
        if error.code != "share-missing":
            raise
        raise LostError(str(error.strerror)) from error


@dataclass(slots=True)
class Desk:
    """A share, ready for work on names. Everything raises OSError as the server refuses it."""

    session: ShareSession | PlainSession
    tree: Tree

    @property
    def keeps_handles(self) -> bool:
        """Whether handles may be taken over after a loss: not where breaks can't be answered."""
        return isinstance(self.session, ShareSession)

    async def ask(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one of `control`'s functions."""
        return await self.session.control(work, self.tree.share, *args, **kwargs)

    async def look(self, path: str) -> Facts | None:
        """Return what a name leads to, past every lock; None when there is nothing."""
        try:
            handle = await self.ask(
                control.open_handle, path, control.LOOK, share=control.SHARED, folder=None
            )
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        try:
            facts: Facts = await self.ask(control.facts, handle)
            return facts
        finally:
            await self.ask(control.close, handle)

    async def leads_to(self, path: str, identity: Identity) -> bool:
        """Tell whether a name leads to this very file."""
        return _is(await self.look(path), identity)

    async def remove(self, path: str, identity: Identity | None) -> None:
        """Delete a name, if it leads to the file of `identity`; None: whatever it leads to.

        Another file is only looked at: whoever has it open is not in the way.
        """
        if identity is not None and not await self.leads_to(path, identity):
            return
        try:
            handle = await self.ask(control.open_handle, path, control.REMOVE)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        try:
            if identity is None or _is(await self.ask(control.facts, handle), identity):
                await self.ask(control.dispose, handle)
        finally:
            await self.ask(control.close, handle)

    async def flush_folder(self, path: str) -> None:
        """Make changes of a folder's names durable, where the server does that."""
        access = control.LOOK | control.ADD_FILE
        try:
            handle = await self.ask(
                control.open_handle, path, access, share=control.SHARED, folder=True
            )
        except LostError:
            raise
        except OSError:
            return  # whoever may not add files here could not have changed a name either
        try:
            await self.ask(control.flush, handle)
        except LostError:
            raise
        except OSError:
            return  # Windows flushes no folder; its journal has the change
        finally:
            await self.ask(control.close, handle)


def _is(found: Facts | None, identity: Identity) -> bool:
    return found is not None and identity.is_still(
        identity_of(found, keeps_birth=identity.born_ns != 0)
    )
