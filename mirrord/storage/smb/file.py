"""An open file on a share, by mirrord's own framing of its requests: what the data path uses.

Reads and writes are cut into pieces, of the session's `piece_bytes` or smaller ones for copies, all
asked for at once; the channel's lanes and credits see to order and number. A piece is answered
whole or is an error: a short write is EIO, a short read means that somebody cut the file off
(ESTALE).

Zeroing and the map of holes are FSCTLs, framed here as well: they are a guest's requests, and as
often as its writes. Names and sizes are `control`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from errno import EDQUOT, EFBIG, EIO, ENOSPC, ESTALE
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mirrord.core.geometry import GIB, MIB, Extent, Status, merge
from mirrord.errors import ProtocolError
from mirrord.smb import status as st
from mirrord.smb import wire
from mirrord.smb.channel import Reply
from mirrord.smb.lanes import COPY_PIECE_BYTES, SMALL_BYTES_MAX, Request
from mirrord.storage.backend import Buffer, Capabilities, Identity
from mirrord.storage.holes import KnownData
from mirrord.storage.memory_pool import constant, new_aligned, writable
from mirrord.storage.remote import LostError, RemoteFile
from mirrord.storage.smb import control
from mirrord.storage.smb.control import Handle
from mirrord.storage.smb.line import TooLargeError

if TYPE_CHECKING:
    from mirrord.storage.smb.session import ShareSession, Tree

T = TypeVar("T")

# Punching a hole keeps a server's process busy while it frees the blocks.
ZERO_BYTES_MAX: Final = GIB
# Ranges of one answer: 4,096 of them fill the 64 KiB that every server answers with.
RANGES_BYTES_MAX: Final = 64 * 1024
# How far a look for holes goes where all before it was data.
AHEAD_BYTES_MAX: Final = 256 * MIB
# What a server copies for one request. Every one takes 1 MiB ([MS-SMB2] 3.3.3:
# ServerSideCopyMaxChunkSize), and Samba does nothing else for us meanwhile.
COPY_STEP_BYTES: Final = 2 * COPY_PIECE_BYTES

# A first read, of as much as is ever in flight of a file (4 MiB for guests, 4 for copies), from
# where no file reaches.
WARM_UP_BYTES: Final = 8 * MIB
BEYOND_ANY_FILE: Final = 1 << 62


class ShareFile(RemoteFile):
    """An open file on one session."""

    def __init__(
        self,
        session: ShareSession,
        tree: Tree,
        handle: Handle,
        identity: Identity,
        capabilities: Capabilities,
        *,
        kept: bool = False,
    ) -> None:
        """Take over an open handle."""
        self.session = session
        self.tree = tree
        self.handle = handle
        self.identity = identity
        self.size = identity.size
        self.capabilities = capabilities
        self.kept = kept
        self._piece_bytes = session.piece_bytes
        self._unbuffered = wire.READ_UNBUFFERED if session.unbuffered else 0
        self._resume_keys: dict[bytes, bytes] = {}
        self._maps = True  # until the server says that it has no map of holes
        self._known = KnownData()
        self._ahead_bytes = 0  # how far a look for holes goes at least
        self._no_copies = False
        self._clones = True  # until the server says that it can't
        self._granted: set[str] = set()  # what this handle was allowed before
        self._closed = False
        session.when_broken(handle.guid.bytes, self._broken)

    def when_lost(self, tell: Callable[[LostError], None]) -> None:
        self.session.when_lost(tell)

    def warm_up(self) -> None:
        """Have the server's process keep memory for as much as is in flight, by a large read that
        moves nothing.

        Samba takes memory for each request. What is free of that at the end of its heap, glibc
        gives back to the kernel, beyond twice the largest block that was mapped and freed before
        (mallopt(3), M_MMAP_THRESHOLD): where that is a request of ours, each request's pages are
        made anew, in a third of the time the server takes.
        """
        request = self._read(BEYOND_ANY_FILE, self.session.warm_up_bytes, 0)
        self.session.ask_aside(request)

    def facts(self) -> dict[str, object]:
        kept = "persistent" if self.handle.persistent else "durable" if self.handle.durable else ""
        return {**self.session.facts(), "handle": kept or "plain"}

    def _broken(self, broken: wire.Break) -> None:
        """The server gave up keeping the handle for us; it still is ours alone while it lives."""
        self.handle.durable = self.handle.persistent

    # Bytes.

    async def read(
        self, offset: int, length: int, *, stored: bool = False, copying: bool = False
    ) -> Buffer:
        flags = self._unbuffered if stored else 0
        if length <= SMALL_BYTES_MAX:
            reply = await self.session.ask(self._read(offset, length, flags, None, copying))
            return self._what_was_read(reply, length)
        whole, address = new_aligned(length)
        view = writable(address, length)  # nobody else sees `whole` before this returns it

        def make(at: int, count: int) -> Request:
            return self._read(at, count, flags, (whole, view[at - offset :][:count]), copying)

        replies = await self._in_pieces(make, offset, length, copying)
        at = 0
        for reply in replies:
            room, data = reply.request.room, self._what_was_read(reply, reply.request.payload_bytes)
            if room is None or data is not room[1]:
                view[at : at + len(data)] = data
            at += len(data)
        return whole

    def _read(
        self,
        offset: int,
        length: int,
        flags: int,
        room: tuple[Buffer, memoryview] | None = None,
        copying: bool = False,
    ) -> Request:
        body = wire.read_body(self.handle.file_id, offset, length, flags)
        return Request(
            wire.READ, body, tree_id=self.tree.tree_id, payload_bytes=length, room=room,
            file=self.handle.file_id,
            copying_bytes=length if copying else 0,
        )  # fmt: skip

    def _what_was_read(self, reply: Reply, length: int) -> Buffer:
        if reply.status != st.SUCCESS:
            raise self._failure(reply, "read")
        self._granted.add("read")
        data = reply.payload
        if data is None:
            data = self._parsed(wire.read_reply, reply.message, length)
        if len(data) != length:
            raise OSError(ESTALE, f"the file ends {length - len(data)} bytes before its size")
        return data

    async def write(
        self, offset: int, data: Buffer, *, through: bool = False, copying: bool = False
    ) -> None:
        data = constant(data)
        flags = wire.WRITE_THROUGH if through else 0
        if len(data) <= SMALL_BYTES_MAX:
            request = self._write(offset, data, flags, copying)
            self._was_written(await self.session.ask(request))
            return
        view = memoryview(data)

        def make(at: int, count: int) -> Request:
            return self._write(at, view[at - offset :][:count], flags, copying)

        for reply in await self._in_pieces(make, offset, len(data), copying):
            self._was_written(reply)

    def _was_written(self, reply: Reply) -> None:
        if reply.status != st.SUCCESS:
            raise self._failure(reply, "write")
        self._granted.add("write")
        count = self._parsed(wire.write_reply, reply.message)
        if count != reply.request.payload_bytes:
            raise OSError(EIO, f"the server wrote {count} bytes of a whole request")

    def _write(self, offset: int, data: Buffer, flags: int, copying: bool = False) -> Request:
        length = len(data)
        body = wire.write_body(self.handle.file_id, offset, length, flags)
        return Request(
            wire.WRITE, body, tree_id=self.tree.tree_id, data=data, payload_bytes=length,
            file=self.handle.file_id,
            copying_bytes=length if copying else 0,
        )  # fmt: skip

    async def _in_pieces(
        self, make: Callable[[int, int], Request], offset: int, length: int, copying: bool
    ) -> list[Reply]:
        """Ask for all pieces of a range at once; they need not lie on any boundary."""
        end = offset + length
        while True:
            most = self._piece_bytes
            piece = min(most, COPY_PIECE_BYTES) if copying else self.session.piece_now(most)
            requests = [make(at, min(piece, end - at)) for at in range(offset, end, piece)]
            try:
                return await self._all(requests)
            except TooLargeError:  # nothing of the others is lost: each is done again, the same
                self._piece_bytes = max(piece // 4, wire.CREDIT_BYTES)

    async def zero(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            count = min(ZERO_BYTES_MAX, end - offset)
            await self._ioctl(wire.SET_ZERO_DATA, wire.zero_data(offset, count), "zero")
            self._known.forget(offset, count)
            offset += count

    async def flush(self) -> None:
        body = wire.flush_body(self.handle.file_id)
        reply = await self.session.ask(Request(wire.FLUSH, body, tree_id=self.tree.tree_id))
        if reply.status != st.SUCCESS:
            raise self._failure(reply, "flush")
        self._granted.add("flush")
        self._parsed(wire.empty_reply, reply.message)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Look further than asked while all is data: a server walks to its end for each look."""
        if not self._maps or self._known.end(offset) >= offset + length:
            return [Extent(offset, length, Status.DATA)]
        since = self._known.holes_made
        ahead = max(length, min(self._ahead_bytes, self.size - offset))
        found = await self._extents(offset, ahead)
        first = found[0]
        if first.status is Status.DATA:
            self._known.found(offset, first.end, since)
        all_data = first.status is Status.DATA and first.length == ahead
        self._ahead_bytes = min(2 * ahead, AHEAD_BYTES_MAX) if all_data else 0
        end = offset + length
        return [
            Extent(each.offset, min(each.end, end) - each.offset, each.status)
            for each in found
            if each.offset < end
        ]

    async def _extents(self, offset: int, length: int) -> list[Extent]:
        given = wire.ranges_query(offset, length)
        body = wire.ioctl_body(
            self.handle.file_id, wire.QUERY_ALLOCATED_RANGES, given, RANGES_BYTES_MAX
        )
        request = Request(
            wire.IOCTL, body, tree_id=self.tree.tree_id, payload_bytes=RANGES_BYTES_MAX
        )
        reply = await self.session.ask(request)
        partial = reply.status == st.BUFFER_OVERFLOW
        if reply.status == st.BUFFER_TOO_SMALL:
            return await self._extents_of_half(offset, length)
        if reply.status in st.UNSUPPORTED:
            self._maps = False
            return [Extent(offset, length, Status.DATA)]
        if reply.status != st.SUCCESS and not partial:
            raise self._failure(reply, "the list of allocated ranges")
        output = self._parsed(wire.ioctl_reply, reply.message, RANGES_BYTES_MAX)
        ranges = self._parsed(wire.parse_ranges, output)
        return map_of(ranges, offset, length, partial=partial)

    async def _extents_of_half(self, offset: int, length: int) -> list[Extent]:
        if length <= self._piece_bytes:
            return [Extent(offset, length, Status.DATA)]
        return await self._extents(offset, length // 2)

    async def size_now(self) -> int:
        return await self.session.control(control.size_of, self.tree.share, self.handle)

    # Copies inside the server.

    def copies_from(self, source: RemoteFile) -> bool:
        """Resume keys are the session's own."""
        return isinstance(source, ShareFile) and source.session is self.session

    async def copy_from(self, source: RemoteFile, offset: int, length: int) -> bool:
        if self._no_copies or not isinstance(source, ShareFile) or not self.copies_from(source):
            return False
        done = self._clones and await self._clone(source, offset, length)
        if not done:
            done = await self._copy(source, offset, length)
            self._no_copies = not done
        self._known.forget(offset, length)  # the source's holes may have come with it
        return done

    async def _clone(self, source: ShareFile, offset: int, length: int) -> bool:
        """Have both files share the range's blocks; whole clusters, and the end of the file."""
        given = wire.duplicate_extents(source.handle.file_id, offset, offset, length)
        try:
            await self._ioctl(wire.DUPLICATE_EXTENTS, given, "clone")
        except LostError:
            raise
        except OSError:
            self._clones = False
            return False
        return True

    async def _copy(self, source: ShareFile, offset: int, length: int) -> bool:
        """Have the server copy; False where it doesn't."""
        try:
            key = await self._resume_key(source)
            for at in range(offset, offset + length, COPY_STEP_BYTES):
                await self._copy_step(key, at, min(COPY_STEP_BYTES, offset + length - at))
        except LostError:
            raise
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT, EFBIG):
                raise
            return False
        return True

    async def _copy_step(self, key: bytes, offset: int, length: int) -> None:
        given = wire.copy_chunks(key, [(offset, offset, length)])
        output = await self._ioctl(
            wire.SRV_COPYCHUNK_WRITE, given, "copy", room=12, copying_bytes=length
        )
        if self._copy_parsed(wire.parse_copied, output)[2] != length:
            raise OSError(EIO, "the server copied less than it was asked to")

    async def _resume_key(self, source: ShareFile) -> bytes:
        file_id = source.handle.file_id
        if file_id not in self._resume_keys:
            self._resume_keys.clear()
            output = await source._ioctl(wire.REQUEST_RESUME_KEY, b"", "resume key", room=32)
            self._resume_keys[file_id] = self._copy_parsed(wire.parse_resume_key, output)
        return self._resume_keys[file_id]

    # The end.

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.session.when_broken(self.handle.guid.bytes, None)
        if self.session.lost is None:
            try:
                await self.session.control(control.close, self.tree.share, self.handle)
            except OSError:
                pass  # the server gives it back by itself when the session ends
        self.session.release()

    # Inside.

    async def _all(self, requests: list[Request]) -> list[Reply]:
        """Have all requests in flight at once; return or raise when every one has ended."""
        answers = [self.session.ask(request) for request in requests]
        if len(answers) == 1:
            return [await answers[0]]
        outcomes = await asyncio.gather(*answers, return_exceptions=True)
        replies: list[Reply] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            replies.append(outcome)
        return replies

    async def _ioctl(
        self, code: int, given: bytes, doing: str, room: int = 0, copying_bytes: int = 0
    ) -> bytes:
        body = wire.ioctl_body(self.handle.file_id, code, given, room)
        request = Request(
            wire.IOCTL, body, tree_id=self.tree.tree_id, file=self.handle.file_id,
            copying_bytes=copying_bytes,
        )  # fmt: skip
        reply = await self.session.ask(request)
        if reply.status != st.SUCCESS:
            raise self._failure(reply, doing)
        self._granted.add(doing)
        return self._parsed(wire.ioctl_reply, reply.message, room)

    def _parsed(self, parse: Callable[..., T], *args: Any) -> T:
        """Understand an answer; one that breaks the protocol ends the session."""
        try:
            return parse(*args)
        except ProtocolError as error:
            why = f"{self.session.server} broke the protocol: {error}"
            self.session.abandon(why)
            raise LostError(why) from error

    def _copy_parsed(self, parse: Callable[..., T], output: bytes) -> T:
        """The same of a copy inside the server, without which a move can do."""
        try:
            return parse(output)
        except ProtocolError as error:
            raise OSError(EIO, str(error)) from error

    def _failure(self, reply: Reply, doing: str) -> OSError:
        denied = reply.status == st.ACCESS_DENIED and doing in self._granted
        if reply.status in st.LOST or denied:
            # The server forgot the session or the handle: the connection is of no use any more.
            # Or the request was changed on the way: that is how it answers a wrong signature.
            why = f"{self.session.server}: {doing}: {st.name_of(reply.status)}"
            self.session.abandon(why)
            return LostError(why)
        return st.failure(reply.status, f"{self.session.server}: {doing}")


def map_of(
    ranges: list[tuple[int, int]], offset: int, length: int, *, partial: bool
) -> list[Extent]:
    """Turn allocated ranges into extents that cover the range; a partial answer ends early."""
    found: list[Extent] = []
    at, end = offset, offset + length
    for start, count in ranges:
        start, stop = max(start, at), min(start + count, end)
        if start >= stop:
            continue
        found += [Extent(at, start - at, Status.HOLE), Extent(start, stop - start, Status.DATA)]
        at = stop
    if not partial:
        found.append(Extent(at, end - at, Status.HOLE))
    elif not found:
        found.append(Extent(offset, length, Status.DATA))
    return merge(found)
