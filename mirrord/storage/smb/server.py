"""A server as a process knows it: one session at a time for all that this process has there.

Whoever needs the session asks for it; the first after a loss connects, the others wait for the same
attempt. Source and target on one server share a session, which is what lets the server copy between
them. The client's GUID stays the same, and a new session names the one before it, so that a server
which still believes in that ends it, and gives its handles free.
"""

from __future__ import annotations

import asyncio
import errno
import uuid
from collections.abc import Callable, Hashable
from typing import Final

from mirrord.errors import RefusedError
from mirrord.smb.location import ShareLocation
from mirrord.storage.remote import DeniedError, LostError
from mirrord.storage.smb.dial import Login
from mirrord.storage.smb.plain import PlainSession, open_plain_session
from mirrord.storage.smb.session import ShareSession, ShareSettings, open_session

# Nothing of this process is open there any more: the session ends after this.
IDLE_S: Final = 5.0
# Names are looked up and changed while a server is away for so long at the most.
PATIENCE_S: Final = 20.0
RETRY_S: Final = 0.25


class ShareServer:
    """One server, one user."""

    def __init__(
        self,
        location: ShareLocation,
        settings: ShareSettings,
        login: Callable[[], Login],
        fingerprint: Callable[[], Hashable],
    ) -> None:
        """`login` reads the credential anew each time; `fingerprint` tells whether it changed."""
        self.name = location.server
        self.settings = settings
        self._host, self._port = location.host, location.port
        self._login = login
        self._fingerprint = fingerprint
        self._guid = uuid.uuid4()
        self._session: ShareSession | PlainSession | None = None
        self._previous = self._sequence = 0
        self._connecting: asyncio.Task[ShareSession | PlainSession] | None = None
        self.users = 0  # open files, and work on names
        self._ending: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._tried: Hashable = None  # the credential of the last attempt

    def changed(self) -> bool:
        """Tell whether the credential is another one than at the last attempt."""
        return self._fingerprint() != self._tried

    async def session(self) -> ShareSession | PlainSession:
        """Return the living session, or a new one. Raises LostError, DeniedError."""
        session = self._session
        if session is not None and session.lost is None:
            return session
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> ShareSession | PlainSession:
        if self._session is not None:
            self._previous = self._session.session_id
            if isinstance(self._session, ShareSession):
                self._sequence = (self._session.sequence + 1) & 0xFFFF
        self._tried = self._fingerprint()
        try:
            session = await self._open()
        except RefusedError as error:  # the credential can't be read
            raise DeniedError(errno.EACCES, error.code, str(error)) from error
        session.on_release = self.release
        self._session = session
        return session

    async def _open(self) -> ShareSession | PlainSession:
        about = (self._host, self._port, self.name, self._guid, self.settings, self._login)
        if not self.settings.fast:
            return await open_plain_session(*about)
        return await open_session(*about, self._previous, self._sequence)

    def _connected(self, attempt: asyncio.Task[ShareSession | PlainSession]) -> None:
        self._connecting = None
        if not attempt.cancelled():
            attempt.exception()  # told to whoever waited, if anybody did

    async def patiently(self, patience_s: float = PATIENCE_S) -> ShareSession | PlainSession:
        """Return a session, trying for a while, or once. Raises LostError, DeniedError."""
        until_s = asyncio.get_running_loop().time() + patience_s
        why = f"{self.name} does not answer"
        while True:
            limit = asyncio.timeout_at(until_s if patience_s else None)
            try:
                async with limit:
                    return await self.session()
            except TimeoutError as error:
                raise LostError(why if limit.expired() else str(error)) from error
            except LostError as error:
                why = error.strerror or why
                if asyncio.get_running_loop().time() >= until_s:
                    raise
            await asyncio.sleep(RETRY_S)

    def use(self) -> None:
        """One user more: an open file, or work on names."""
        self.users += 1
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def release(self) -> None:
        """One user less; the session ends a while after the last."""
        self.users -= 1
        if not self.users and self._idle is None:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(IDLE_S, self._end)

    def _end(self) -> None:
        self._idle = None
        session = self._session
        if session is not None and session.lost is None:  # a lost one is the next one's `previous`
            self._session, self._previous = None, 0
            self._ending = asyncio.get_running_loop().create_task(session.close())

    async def close(self) -> None:
        """End the session now, and with it everything that is still open there."""
        if self._idle is not None:
            self._idle.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait((self._connecting,))
        if self._session is not None:
            await self._session.close()
        if self._ending is not None:
            await self._ending
