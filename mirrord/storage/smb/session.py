"""A session with a server: authenticated once, on one or several lines (multichannel).

One handle serves all lines. A request goes to the line with the least in flight. When a line is
lost and another lives, its unanswered requests are asked again there, under a new channel sequence
([MS-SMB2] 3.2.4.1.5): what the server may still find in the lost line's queue is then refused as
stale, so a late write can't overtake its own repetition; and a repetition is held back while the
server is still at what came before. With the last line the session is lost.

A lost line is replaced in the background as long as the session lives (`_restore`).

Control requests (names, sizes) are smbprotocol's, in a thread, one at a time, on any living line.
Their deadline is the line's: a thread that waits for ever ends when its line is lost.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from smbprotocol.connection import Connection
from smbprotocol.exceptions import SMBResponseException
from smbprotocol.session import Session
from smbprotocol.tree import TreeConnect

from mirrord.core.geometry import KIB, MIB
from mirrord.errors import RefusedError
from mirrord.smb import wire
from mirrord.smb.channel import Reply
from mirrord.smb.lanes import Request
from mirrord.storage.backend import Capabilities, Identity
from mirrord.storage.remote import LostError
from mirrord.storage.smb import control, dial
from mirrord.storage.smb.control import Handle
from mirrord.storage.smb.dial import DIALECTS, Login, Seat, Security
from mirrord.storage.smb.file import WARM_UP_BYTES, ShareFile
from mirrord.storage.smb.line import LOOP_S, Line, LineSettings, fail
from mirrord.storage.smb.trouble import Step, told, words_for
from mirrord.storage.smb.work import from_thread, in_thread, to_the_end

T = TypeVar("T")

log = logging.getLogger(__name__)

# smbprotocol dumps every message at DEBUG: a second for a megabyte. What matters is told here.
for _name in ("smbprotocol", "spnego"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

CHANNELS_MAX: Final = 8
RESTORE_MAX_S: Final = 60.0
# One read or write. A request costs some 45 us of user time, whatever its size, and 1 MiB of
# payload 220 us. While small requests come, which wait for a piece that is on its way, it is less.
PIECE_BYTES: Final = MIB
PIECE_BYTES_BESIDE_SMALL: Final = 256 * KIB
LOG_OFF_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class ShareSettings:
    """What a share's section in the configuration says, for the storage."""

    security: Security = field(default_factory=Security)
    channels: int | str = 1  # or "auto"
    io_timeout_s: float = 60.0
    unflushed_bytes_max: int = 64 << 20
    write_through: bool = False
    fast: bool = True
    weaknesses: tuple[str, ...] = ()  # what was allowed that shouldn't have to be, in words
    line: LineSettings = field(default_factory=LineSettings)


@dataclass(slots=True)
class Tree:
    """A share that is connected. `share` is smbprotocol's tree."""

    tree_id: int
    share: Any = field(repr=False)


class ShareSession:
    """An authenticated session. Made by `open_session`."""

    def __init__(
        self, server: str, settings: ShareSettings, login: Callable[[], Login], sequence: int = 0
    ) -> None:
        self.server = server
        self.settings = settings
        self.session_id = 0
        self.lost: LostError | None = None
        self.encrypted = False
        self.piece_bytes = PIECE_BYTES  # the most that the server takes, and that is of use
        self.warm_up_bytes = WARM_UP_BYTES  # of a file's first read, as far as the server goes
        self.unbuffered = False  # the dialect has reads past the server's cache
        self._login = login
        self._seats: list[Seat] = []
        self._lines_made = 0
        self.sequence = sequence  # ChannelSequence: it grows with each lost line
        self._session: Session
        self.trees: dict[str, Tree] = {}
        self._planting = asyncio.Lock()
        self._control = asyncio.Lock()
        self._ears: list[Callable[[LostError], None]] = []
        self._break_ears: dict[bytes, Callable[[wire.Break], None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._wanted = 1
        self._addresses_known: list[str] = []
        self._restoring = False
        self.on_release: Callable[[], None] | None = None
        self.open_files = 0
        self.forgotten = False  # the server kept none of its handles

    # What it is.

    @property
    def channels(self) -> int:
        """Lines that are alive."""
        return len(self._seats)

    def facts(self) -> dict[str, object]:
        """Return what `show` says about the session."""
        if not self._seats:
            return {"channels": 0, "weaknesses": list(self.settings.weaknesses)}
        seat = self._seats[0]
        name = seat.line.channel.seal.name if seat.line.channel.seal is not None else "none"
        dialect = next((n for n, d in DIALECTS.items() if d == seat.connection.dialect), "2.0.2")
        return {
            "dialect": dialect,
            "signing": name if not self.encrypted else "by encryption",
            "encryption": name if self.encrypted else "none",
            "channels": len(self._seats),
            "weaknesses": list(self.settings.weaknesses),
        }

    def when_lost(self, tell: Callable[[LostError], None]) -> None:
        """Have `tell` called once the last line is lost; at once if it is already."""
        if self.lost is not None:
            tell(self.lost)
        else:
            self._ears.append(tell)

    def when_broken(self, key: bytes, tell: Callable[[wire.Break], None] | None) -> None:
        """Have `tell` called when the lease or oplock of `key` is taken back; None: no more."""
        if tell is None:
            self._break_ears.pop(key, None)
        else:
            self._break_ears[key] = tell

    # Asking.

    def ask(self, request: Request) -> asyncio.Future[Reply]:
        """Send a request on a line. The future fails with LostError when there is none left."""
        seats = self._seats
        if not seats:
            answer: asyncio.Future[Reply] = self._loop.create_future()
            answer.set_exception(self.lost or LostError(f"{self.server}: the session has ended"))
            return answer
        if len(seats) == 1:
            return seats[0].line.ask(request)
        return self._idlest(request).ask(request)

    def _idlest(self, request: Request) -> Line:
        lines = [seat.line for seat in self._seats]
        return min(lines, key=lambda line: line.channel.in_flight + line.channel.waiting)

    def ask_aside(self, request: Request) -> None:
        """Send a request whose answer is of no interest, if it has to wait for no credits."""
        line = self._seats[0].line if self._seats else None
        if line is not None and line.channel.affords(request):
            line.submit(request)

    async def control(self, work: Callable[..., T], *args: Any, doing: str = "", **kw: Any) -> T:
        """Run one of `control`'s functions in a thread.

        Raises LostError, and `OSError` or DeniedError as `trouble.told` says.
        """
        bound = partial(work, *args, **kw)
        return await to_the_end(self._controlled(bound, doing or words_for(work)))

    async def _controlled(self, work: Callable[[], T], doing: str) -> T:
        async with self._control:
            if not self._seats:
                raise self.lost or LostError(f"{self.server}: the session has ended")
            self._session.connection = self._seats[0].connection
            try:
                return await in_thread(work)
            except Exception as error:
                if self.lost is not None:
                    raise self.lost from error
                found = told(error, Step(self.server, doing))
                if isinstance(found, LostError) and isinstance(error, SMBResponseException):
                    self.abandon(found.strerror or doing)  # the server doesn't know us any more
                raise found from error

    async def tree(self, share: str, *, anew: bool = False) -> Tree:
        """Connect to a share, once, or `anew` for the caller alone. Raises DeniedError."""
        async with self._planting:  # or two who ask at once have a tree each, and files on both
            return await self._tree(share, anew)

    async def _tree(self, share: str, anew: bool) -> Tree:
        found = None if anew else self.trees.get(share.casefold())
        if found is None:
            path = rf"\\{self._seats[0].connection.server_name}\{share}" if self._seats else share
            made = TreeConnect(self._session if self._seats else None, path)
            try:
                await self.control(made.connect, require_secure_negotiate=False)
                if made.encrypt_data and not self.encrypted:
                    self._encrypt()
                # sealed by the line; paths are the share's own
                made.encrypt_data = made.is_dfs_share = False
                # before 3.1.1: whether somebody changed the negotiation (3.2.5.5)
                await self.control(made._verify_dialect_negotiate, doing="the share")
            except OSError as error:
                cause = error.__cause__
                if cause is not None and not isinstance(error, LostError):
                    raise told(cause, Step(self.server, "the share", share)) from cause
                raise
            found = Tree(made.tree_connect_id, made)
            if not anew:
                self.trees[share.casefold()] = found
        return found

    # Lines.

    async def _open(self, host: str, port: int, guid: uuid.UUID, previous: int) -> None:
        settings, security = self.settings, self.settings.security
        self._host, self._port, self._guid = host, port, guid
        seat = await self._dial(host, previous)
        channels = settings.channels
        if channels == "auto" or (isinstance(channels, int) and channels > 1):
            if seat.connection.supports_multi_channel:
                await self._widen()
            elif channels != "auto":
                log.warning("single channel server=%s wanted=%s", self.server, channels)
        self.encrypted = self.encrypted or security.encrypt

    async def _dial(self, host: str, previous: int) -> Seat:
        """Connect, negotiate, log on: the first line."""
        security = self.settings.security
        connection = await in_thread(
            dial.connect, self._line, host, self._port, self._guid, security,
            self.settings.line.connect_s, self.server,
        )  # fmt: skip
        try:
            login = await in_thread(self._login)
            self._session = await in_thread(
                dial.authenticate, connection, login, security, self.server, previous
            )
        except BaseException:
            dial.hang_up(connection)
            raise
        session = self._session
        self.session_id = session.session_id
        self.encrypted = bool(session.encrypt_data)
        self.unbuffered = connection.dialect >= DIALECTS["3.0.2"]
        # smbprotocol must neither sign nor encrypt from here on: the line does.
        session.encrypt_data = session.signing_required = False
        return self._sit(connection, session.signing_key)

    def _line(self) -> Line:
        """Make a line. Called by smbprotocol's thread, so the loop has to make it."""

        async def make() -> Line:
            return Line(
                self.settings.line,
                on_lost=self._line_lost,
                on_break=self._broken,
                on_held=self._again,
            )

        return from_thread(self._loop, make, LOOP_S)

    def piece_now(self, most: int) -> int:
        """Return how much of at most so much is best asked for at a time now."""
        beside_small = any(seat.line.channel.beside_small for seat in self._seats)
        return min(most, PIECE_BYTES_BESIDE_SMALL) if beside_small else most

    def _sit(self, connection: Connection, signing_key: bytes) -> Seat:
        """Take a connection over from smbprotocol."""
        line = connection.transport.line
        self._lines_made += 1
        seat = Seat(connection, line, self._lines_made, signing_key)
        limits = (connection.max_read_size, connection.max_write_size)
        self.piece_bytes = min(self.piece_bytes, *limits)
        self.warm_up_bytes = min(self.warm_up_bytes, connection.max_read_size)
        multi_credit = bool(connection.supports_multi_credit)
        if not multi_credit:
            self.piece_bytes = self.warm_up_bytes = min(self.piece_bytes, wire.CREDIT_BYTES)
        seal = dial.seal_of(connection, self._session, encrypt=self.encrypted, seat=seat)
        line.channel.sequence = self.sequence
        line.start(seal, self.session_id, piece_bytes=self.piece_bytes, multi_credit=multi_credit)
        if line.why is not None:
            raise LostError(f"{self.server}: {line.why.strerror}") from line.why
        self._seats.append(seat)
        return seat

    def _encrypt(self) -> None:
        """Encrypt from now on: the share wants it."""
        self.encrypted = True
        for seat in self._seats:
            seat.line.channel.seal = dial.seal_of(
                seat.connection, self._session, encrypt=True, seat=seat
            )

    async def _widen(self) -> None:
        """Bind as many lines as are wanted, as far as the server allows."""
        channels = self.settings.channels
        addresses = [self._host]
        if channels == "auto":
            try:
                addresses = await self._addresses()
            except OSError as error:
                log.info("interfaces unknown server=%s error=%s", self.server, error)
        wanted = channels if isinstance(channels, int) else min(len(addresses), CHANNELS_MAX)
        self._addresses_known = addresses
        while len(self._seats) < wanted:
            try:
                await self._bind(addresses[len(self._seats) % len(addresses)])
            except OSError as error:
                log.warning("channel missing server=%s error=%s", self.server, error)
                break
        self._wanted = wanted

    async def _addresses(self) -> list[str]:
        tree = await self.tree("IPC$")
        return await self.control(control.interfaces, tree.share) or [self._host]

    async def _bind(self, address: str) -> None:
        connection = await in_thread(
            dial.connect, self._line, address, self._port, self._guid, self.settings.security,
            self.settings.line.connect_s, self.server,
        )  # fmt: skip
        try:
            connection.server_name = self._seats[0].connection.server_name if self._seats else ""
            login = await in_thread(self._login)
            key = await in_thread(dial.bind, self._session, connection, login, self.server)
            connection.session_table[self.session_id] = self._session
            if self.lost is not None:
                raise self.lost
            self._sit(connection, key)
        except BaseException:
            dial.hang_up(connection)
            raise

    def _line_lost(self, line: Line, why: LostError, left: list[Request]) -> None:
        gone = [seat for seat in self._seats if seat.line is line]
        self._seats = [seat for seat in self._seats if seat.line is not line]
        if self._seats and gone and self.lost is None:
            self.sequence = (self.sequence + 1) & 0xFFFF
            for seat in self._seats:
                seat.line.channel.sequence = self.sequence
            log.warning("channel lost server=%s left=%d error=%s", self.server,
                        len(self._seats), why.strerror)  # fmt: skip
            mine = [r for r in left if r.control is None and r.owner is not None]
            self._own(self._repeat(mine))
            if not self._restoring:
                self._own(self._restore())
            return
        for request in left:
            fail(request, LostError(f"{self.server}: {why.strerror}"))
        if gone:
            self._lose(LostError(f"{self.server}: {why.strerror}"))

    async def _repeat(self, requests: list[Request]) -> None:
        """Ask again what a lost line leaves, once the server knows of the new sequence.

        The request that brings a new sequence is never held back itself (3.3.5.2.10 counts older
        ones only from then on), so it has to be one that changes nothing.
        """
        files = {(r.tree_id, wire.file_id_of(r.command, r.body)) for r in requests}
        news = [
            self.ask(Request(wire.READ, wire.read_body(file_id, 0, 1), tree_id=tree_id,
                             payload_bytes=1))
            for tree_id, file_id in files if file_id
        ]  # fmt: skip
        try:
            await asyncio.gather(*news, return_exceptions=True)  # any answer will do
        except asyncio.CancelledError:
            for request in requests:
                fail(request, LostError(f"{self.server}: the session has ended"))
            raise
        for request in requests:
            self._again(request)

    def _again(self, request: Request) -> None:
        """Ask once more what may have been done: the server holds it back until it knows."""
        request.replays += 1
        if self._seats:
            self._idlest(request).submit(request)
        else:
            fail(request, self.lost or LostError(f"{self.server}: the session has ended"))

    def _lose(self, why: LostError) -> None:
        if self.lost is None:
            self.lost = why
            ears, self._ears = self._ears, []
            for tell in ears:
                tell(why)

    async def _restore(self) -> None:
        """Bind lines in the place of lost ones, on whichever address works."""
        self._restoring = True
        delay_s, tried = self.settings.line.restore_s, 0
        while self.lost is None and len(self._seats) < self._wanted:
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RESTORE_MAX_S)
            if self.lost is None and len(self._seats) < self._wanted:
                address = self._addresses_known[tried % len(self._addresses_known)]
                tried += 1
                try:
                    await self._bind(address)
                except (OSError, RefusedError) as error:
                    log.info("channel not restored server=%s error=%s", self.server, error)
                else:
                    log.info("channel restored server=%s now=%d", self.server, len(self._seats))
        self._restoring = False

    def _broken(self, line: Line, broken: wire.Break) -> None:
        tell = self._break_ears.get(broken.key)
        if tell is not None:
            tell(broken)
        if broken.wants_ack:  # of a file, too, that is being opened just now, or was given up
            tree_id = next((tree.tree_id for tree in self.trees.values()), 0)
            line.acknowledge(broken, tree_id)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def abandon(self, why: str) -> None:
        """End every line: the server doesn't know this session, or something of it, any more."""
        self._lose(LostError(why))
        for seat in tuple(self._seats):
            seat.line.lose(why)

    async def close(self) -> None:
        """Log off, if that goes quickly, and end every line. Never raises."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._seats and self.lost is None:
            try:
                async with asyncio.timeout(LOG_OFF_S):
                    await self.control(_log_off, self._session)
            except (OSError, TimeoutError) as error:
                log.info("log-off failed server=%s error=%s", self.server, error)
        self._lose(LostError(f"{self.server}: closed"))
        for seat in tuple(self._seats):
            seat.line.lose("closed")

    def file(
        self, tree: Tree, handle: Handle, identity: Identity, able: Capabilities, *, kept: bool
    ) -> ShareFile:
        """Return an open handle as a file."""
        file = ShareFile(self, tree, handle, identity, able, kept=kept)
        file.warm_up()
        self.open_files += 1
        return file

    def release(self) -> None:
        """One file less: what it means is the owner's business."""
        self.open_files -= 1
        if self.on_release is not None:
            self.on_release()


def _log_off(session: Session) -> None:
    """Log off; trees and handles go with the session."""
    session.open_table.clear()
    session.tree_connect_table.clear()
    session.disconnect(close=False, timeout=LOG_OFF_S)


async def open_session(
    host: str,
    port: int,
    server: str,
    guid: uuid.UUID,
    settings: ShareSettings,
    login: Callable[[], Login],
    previous: int = 0,
    sequence: int = 0,
) -> ShareSession:
    """Connect and log on. `server` is what messages call it; `guid` is this client's, for ever.

    `previous` is a session of ours that the server may still believe alive; it ends that one.
    `sequence` goes on from that session's: the server remembers it of a handle taken over.
    Raises LostError, DeniedError.
    """
    session = ShareSession(server, settings, login, sequence)
    try:
        await session._open(host, port, guid, previous)
    except BaseException:
        await session.close()
        raise
    return session
