"""A session and its files by smbprotocol's documented interface alone (`fast = false`).

The way out where the fast path meets a server that it doesn't get on with, and what its tests
compare it with. Everything runs in threads, one request at a time: some 2,000 a second. One
connection, no durable handles, descriptors below 1,024 (smbprotocol waits with select), and only
servers that can be trusted: what they say of a message's length, up to 4 GiB, is believed.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from errno import EIO, ESTALE
from functools import partial
from typing import Any, Final, TypeVar

from smbprotocol.connection import Connection, Dialects
from smbprotocol.exceptions import EndOfFile, SMBResponseException
from smbprotocol.open import Open
from smbprotocol.session import Session
from smbprotocol.tree import TreeConnect

from mirrord.core.geometry import GIB, KIB, MIB, Extent, Status
from mirrord.smb import wire
from mirrord.storage.backend import Buffer, Capabilities, Identity
from mirrord.storage.remote import DeniedError, LostError, RemoteFile
from mirrord.storage.smb import control, dial
from mirrord.storage.smb.control import Handle
from mirrord.storage.smb.dial import DIALECTS, Login
from mirrord.storage.smb.file import RANGES_BYTES_MAX, map_of
from mirrord.storage.smb.session import ShareSettings, Tree
from mirrord.storage.smb.trouble import Step, told, words_for
from mirrord.storage.smb.work import in_thread, to_the_end

T = TypeVar("T")

PIECE_BYTES: Final = 512 * KIB  # half of what the first credits pay for


class PlainSession:
    """As `ShareSession`, for what places and servers use of it."""

    def __init__(self, server: str, settings: ShareSettings) -> None:
        self.server = server
        self.settings = settings
        self.session_id = 0
        self.lost: LostError | None = None
        self.on_release: Callable[[], None] | None = None
        self.open_files = 0
        self._answered_s = asyncio.get_running_loop().time()
        self._connection: Connection
        self._session: Session
        self.trees: dict[str, Tree] = {}
        self._planting = asyncio.Lock()
        self._one = asyncio.Lock()
        self._ears: list[Callable[[LostError], None]] = []

    def facts(self) -> dict[str, object]:
        """Return what `show` says about the session."""
        dialect = next((n for n, d in DIALECTS.items() if d == self._connection.dialect), "2.0.2")
        encrypted = self.settings.security.encrypt
        return {
            "dialect": dialect,
            "signing": "by encryption" if encrypted else "by smbprotocol",
            "encryption": "by smbprotocol" if encrypted else "none",
            "channels": 0 if self.lost else 1,
            "weaknesses": list(self.settings.weaknesses),
        }

    @property
    def quiet_s(self) -> float:
        """How long ago the server last answered."""
        return asyncio.get_running_loop().time() - self._answered_s

    def when_lost(self, tell: Callable[[LostError], None]) -> None:
        """As `ShareSession.when_lost`."""
        if self.lost is not None:
            tell(self.lost)
        else:
            self._ears.append(tell)

    async def control(self, work: Callable[..., T], *args: Any, doing: str = "", **kw: Any) -> T:
        """Run work in a thread, after what was begun before. Raises as `ShareSession.control`."""
        bound = partial(work, *args, **kw)
        return await to_the_end(self._controlled(bound, doing or words_for(work)))

    async def _controlled(self, work: Callable[[], T], doing: str) -> T:
        async with self._one:
            if self.lost is not None:
                raise self.lost
            limit_s = self.settings.line.request_s
            try:
                async with asyncio.timeout(limit_s):
                    result = await in_thread(work)
                self._answered_s = asyncio.get_running_loop().time()
                return result
            except TimeoutError as error:
                self._lose(f"{self.server} has not answered for {limit_s:g} s")
                assert self.lost is not None
                raise self.lost from error
            except DeniedError:
                raise
            except Exception as error:
                found = told(error, Step(self.server, doing))
                if isinstance(found, LostError) or not isinstance(error, SMBResponseException):
                    self._lose(found.strerror or "the connection broke")
                    assert self.lost is not None
                    raise self.lost from error
                raise found from error

    async def tree(self, share: str, *, anew: bool = False) -> Tree:
        """As `ShareSession.tree`."""
        async with self._planting:
            return await self._tree(share, anew)

    async def _tree(self, share: str, anew: bool) -> Tree:
        found = None if anew else self.trees.get(share.casefold())
        if found is None:
            made = TreeConnect(self._session, rf"\\{self._connection.server_name}\{share}")
            try:
                await self.control(made.connect)
            except OSError as error:
                cause = error.__cause__
                if isinstance(cause, SMBResponseException):
                    raise told(cause, Step(self.server, "the share", share)) from cause
                raise
            found = Tree(made.tree_connect_id, made)
            if not anew:
                self.trees[share.casefold()] = found
        return found

    def file(
        self, tree: Tree, handle: Handle, identity: Identity, able: Capabilities, *, kept: bool
    ) -> PlainFile:
        """Return an open handle as a file."""
        self.open_files += 1
        return PlainFile(self, tree, handle, identity, able)

    def release(self) -> None:
        """As `ShareSession.release`."""
        self.open_files -= 1
        if self.on_release is not None:
            self.on_release()

    def _lose(self, why: str) -> None:
        if self.lost is None:
            self.lost = LostError(why)
            hang_up(self._connection)
            ears, self._ears = self._ears, []
            for tell in ears:
                tell(self.lost)

    def abandon(self, why: str) -> None:
        """As `ShareSession.abandon`."""
        self._lose(why)

    async def close(self) -> None:
        """End the connection. Never raises."""
        if self.lost is None:
            self._lose(f"{self.server}: closed")


async def open_plain_session(
    host: str, port: int, server: str, guid: uuid.UUID, settings: ShareSettings,
    login: Callable[[], Login],
) -> PlainSession:  # fmt: skip
    """As `open_session`."""
    session = PlainSession(server, settings)
    session._connection = Connection(guid, host, port, require_signing=settings.security.sign)
    limit_s = settings.line.connect_s + settings.line.silence_s
    try:
        async with asyncio.timeout(limit_s):
            await in_thread(_connect, session, login)
    except TimeoutError as error:
        raise LostError(f"{server} has not let us in within {limit_s:g} s") from error
    finally:
        if not session.session_id:
            hang_up(session._connection)
    return session


def _connect(session: PlainSession, login: Callable[[], Login]) -> None:
    security, connection = session.settings.security, session._connection
    try:
        connection.connect(timeout=int(session.settings.line.connect_s))
        dial.require(connection, security, session.server)
    except ValueError as error:  # how its transport tells that it can't connect
        raise LostError(f"{session.server} can't be reached") from error
    except Exception as error:
        raise told(error, Step(session.server, "connecting")) from error
    session._session = dial.authenticate(connection, login(), security, session.server)
    session.session_id = session._session.session_id


def hang_up(connection: Connection) -> None:
    """End a connection, in a thread: smbprotocol waits for its own ones."""
    threading.Thread(target=_disconnect, args=(connection,), name="smb", daemon=True).start()


def _disconnect(connection: Connection) -> None:
    try:
        if connection.transport is not None:
            connection.disconnect(close=False)
    except OSError:
        pass  # it is gone already


class PlainFile(RemoteFile):
    """An open file by `smbprotocol.open.Open`."""

    def __init__(
        self,
        session: PlainSession,
        tree: Tree,
        handle: Handle,
        identity: Identity,
        capabilities: Capabilities,
    ) -> None:
        """Take over an open handle."""
        self.session = session
        self.tree = tree
        self.handle = handle
        self.identity = identity
        self.size = identity.size
        self.capabilities = capabilities
        self._open = Open(tree.share, "")
        self._open.file_id = handle.file_id
        self._closed = False

    def when_lost(self, tell: Callable[[LostError], None]) -> None:
        self.session.when_lost(tell)

    def facts(self) -> dict[str, object]:
        return {**self.session.facts(), "handle": "plain"}

    async def read(
        self, offset: int, length: int, *, stored: bool = False, copying: bool = False
    ) -> Buffer:
        stored = stored and self._open.connection.dialect >= Dialects.SMB_3_0_2
        return await self.session.control(self._read, offset, length, stored)

    def _read(self, offset: int, length: int, unbuffered: bool) -> bytes:
        parts = []
        for at in range(offset, offset + length, PIECE_BYTES):
            count = min(PIECE_BYTES, offset + length - at)
            try:
                part = self._open.read(at, count, unbuffered=unbuffered)
            except EndOfFile as error:
                raise DeniedError(ESTALE, "cut-off", "the file ends before its size") from error
            if len(part) != count:
                raise DeniedError(ESTALE, "cut-off", "the file ends before its size")
            parts.append(part)
        return b"".join(parts)

    async def write(
        self, offset: int, data: Buffer, *, through: bool = False, copying: bool = False
    ) -> None:
        await self.session.control(self._write, offset, data, through)

    def _write(self, offset: int, data: Buffer, through: bool) -> None:
        view = memoryview(data)
        for at in range(0, len(view), PIECE_BYTES):
            piece = bytes(view[at : at + PIECE_BYTES])
            if self._open.write(piece, offset + at, write_through=through) != len(piece):
                raise DeniedError(EIO, "short-write", "the server wrote less than a whole request")

    async def zero(self, offset: int, length: int) -> None:
        for at in range(offset, offset + length, GIB):
            given = wire.zero_data(at, min(GIB, offset + length - at))
            await self._ioctl(wire.SET_ZERO_DATA, given)

    async def flush(self) -> None:
        await self.session.control(self._open.flush)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        try:
            output = await self._ioctl(
                wire.QUERY_ALLOCATED_RANGES, wire.ranges_query(offset, length), RANGES_BYTES_MAX
            )
        except LostError:
            raise
        except OSError:
            if length <= MIB:
                return [Extent(offset, length, Status.DATA)]
            return await self.extents(offset, length // 2)
        return map_of(wire.parse_ranges(output), offset, length, partial=False)

    async def _ioctl(self, code: int, given: bytes, room: int = 0) -> bytes:
        share, file_id = self.tree.share, self.handle.file_id
        return await self.session.control(control.ioctl, share, file_id, code, given, room)

    async def size_now(self) -> int:
        return await self.session.control(control.size_of, self.tree.share, self.handle)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self.session.lost is None:
            try:
                await self.session.control(control.close, self.tree.share, self.handle)
            except OSError:
                pass  # the server gives it back by itself when the session ends
        self.session.release()
