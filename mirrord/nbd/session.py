"""The server's half of the transmission phase: requests out of bytes, bytes out of results. Pure.

`take` parses every request that has come and fits the limits; what is wrong with a request is
answered here, so that whoever serves them sees valid ones only: inside the disk, known flags,
not empty. The owner answers each once, in any order, through `answer*`, tells `done`, and sends
`outgoing`.

* A payload belongs to its request alone and never changes afterwards. Up to `SMALL_BYTES` it is
  copied out of the inbox, a larger one is received into its own memory (one copy at most).
* A request whose payload hasn't come whole doesn't exist: a client that goes away in its middle
  has written nothing.
* A refused write's payload is consumed before the refusal is sent, so both ends stay in step.
* Which requests `take` returns, in which order, and which are refused, depends on the bytes and
  the limits alone, not on how the bytes were cut; what follows a violation never happens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from mirrord.core.geometry import KIB, Extent, Status
from mirrord.core.inbox import Inbox
from mirrord.errors import ProtocolError
from mirrord.nbd import wire
from mirrord.nbd.handshake import CONTEXT_IDS, Agreed, Export
from mirrord.nbd.limits import Limits
from mirrord.nbd.wire import (
    CHUNK_FLAG_DONE,
    CHUNK_MAGIC,
    CHUNK_OFFSET_DATA,
    CMD_FLAG_FUA,
    CMD_READ,
    CMD_WRITE,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Buffer,
)

# A payload up to this is waited for in the inbox, together with what follows it.
SMALL_BYTES: Final = 32 * KIB
# Replies of one batch: sent before more requests are started, so that unread ones are noticed.
BATCH_BYTES: Final = 8 << 20
# What a block status request holds while in flight: 4096 extents as objects, with room.
STATUS_COST_BYTES: Final = 512 * KIB

_HEADER: Final = wire.REQUEST.size
_unpack = wire.REQUEST.unpack_from
_pack_simple = wire.SIMPLE_REPLY.pack
_pack_data_chunk = wire.DATA_CHUNK.pack

_CONTEXT_STATES: Final[Mapping[str, Mapping[Status, int]]] = {
    wire.CONTEXT_ALLOCATION: {
        Status.ZERO: wire.STATE_ZERO,
        Status.HOLE: wire.STATE_HOLE | wire.STATE_ZERO,
    },
    wire.CONTEXT_DIRTY: {Status.DIRTY: wire.STATE_DIRTY},
}

# FUA is fine on every command (N2); the others where the protocol names them.
_KNOWN_FLAGS: Final = {
    wire.CMD_READ: wire.CMD_FLAG_FUA,  # and DF with structured replies
    wire.CMD_WRITE: wire.CMD_FLAG_FUA,
    wire.CMD_FLUSH: wire.CMD_FLAG_FUA,
    wire.CMD_TRIM: wire.CMD_FLAG_FUA,
    wire.CMD_CACHE: wire.CMD_FLAG_FUA,
    wire.CMD_WRITE_ZEROES: wire.CMD_FLAG_FUA | wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO,
    wire.CMD_BLOCK_STATUS: wire.CMD_FLAG_FUA | wire.CMD_FLAG_REQ_ONE,
}
_WRITING: Final = frozenset({wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES})
_GROWING: Final = frozenset({wire.CMD_WRITE, wire.CMD_WRITE_ZEROES})  # past the end: ENOSPC (N12)
_NO_DATA: Final = b""

_COMMAND_NAMES: Final = {
    wire.CMD_READ: "read",
    wire.CMD_WRITE: "write",
    wire.CMD_FLUSH: "flush",
    wire.CMD_TRIM: "trim",
    wire.CMD_CACHE: "cache",
    wire.CMD_WRITE_ZEROES: "write zeroes",
    wire.CMD_BLOCK_STATUS: "block status",
}
_ERROR_TEXTS: Final = {
    wire.EPERM: "not permitted, the export may be read-only",
    wire.EIO: "input/output error",
    wire.EINVAL: "invalid: unknown flag or command, or outside the export",
    wire.ENOSPC: "no space left, or past the end of the export",
    wire.EOVERFLOW: "too long for one chunk",
    wire.ENOTSUP: "can't be done faster than by writing",
    wire.ESHUTDOWN: "the server is stopping",
}


class Request(NamedTuple):
    """A valid request. `data` is a write's payload, and nobody else's."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes | bytearray


_new = tuple.__new__  # a third of the cost of calling the class


def cost(request: Request) -> int:
    """Return the bytes a request holds while in flight; a cache request, those it has read."""
    if request.command <= CMD_WRITE or request.command == wire.CMD_CACHE:
        return request.length
    return STATUS_COST_BYTES if request.command == wire.CMD_BLOCK_STATUS else 0


class Session:
    """One client past its handshake.

    `in_flight` counts requests taken and not yet `done`, `held_bytes` what they hold and a
    payload being received. `blocked` tells that `take` left a request behind for a limit: call
    it again when something is done. `ended` tells that the client said goodbye: finish, send,
    close.
    """

    def __init__(self, export: Export, agreed: Agreed, inbox: Inbox, limits: Limits) -> None:
        self.outgoing: list[Buffer] = []
        self.in_flight = 0
        self.held_bytes = 0
        self.requests = 0
        self.blocked = False
        self.ended = False
        self.stopping = False  # set by the owner: refuse everything from now on (N15)
        self.structured = agreed.structured
        self.contexts = agreed.contexts
        self._inbox = inbox
        self._limits = limits
        self._size = export.size
        self._read_only = export.read_only
        self._known_flags = dict(_KNOWN_FLAGS)
        if agreed.structured:
            self._known_flags[CMD_READ] |= wire.CMD_FLAG_DF
        self._room = 0  # of the `take` under way: requests, bytes
        self._room_bytes = 0
        self._arriving: Request | None = None  # its payload is being received
        self._refused: tuple[int, int] | None = None  # cookie, error: its payload is discarded

    @property
    def mid_request(self) -> bool:
        """Tell whether the next bytes belong to a request of which some have come."""
        inbox = self._inbox
        return inbox.waiting or (inbox.end > inbox.start and not self.blocked and not self.ended)

    def take(self, room_bytes: int) -> list[Request]:
        """Return the requests that have come, as far as the limits allow.

        `room_bytes` is what this session may hold in addition, as the owner sees it.
        Raises: ProtocolError when the connection must be closed. The requests before the
        violation were returned by an earlier call.
        """
        self.blocked = False
        inbox, limits = self._inbox, self._limits
        if inbox.waiting or self.ended:
            return []
        found = self._finish_payload()
        data, start, end = inbox.data, inbox.start, inbox.end
        size, writable = self._size, not self._read_only
        payload_max = 0 if self.stopping else limits.payload_bytes_max  # 0: each goes the odd way
        read_flags = self._known_flags[CMD_READ]
        room = room_granted = limits.requests_max - self.in_flight
        room_bytes = bytes_granted = min(room_bytes, limits.held_bytes_max - self.held_bytes)
        batch_floor = room_bytes - BATCH_BYTES
        while end - start >= _HEADER:
            magic, flags, command, cookie, offset, length = _unpack(data, start)
            body = stop = start + _HEADER
            usual = 0 < length <= payload_max and offset + length <= size and magic == REQUEST_MAGIC
            if command == CMD_WRITE:
                stop += length
                usual = usual and writable and flags <= CMD_FLAG_FUA and stop <= end
            elif command or flags & ~read_flags:
                usual = False
            if not usual:
                inbox.start, self._room, self._room_bytes = start, room, room_bytes
                more = self._take_odd(found)
                start, end, room, room_bytes = inbox.start, inbox.end, self._room, self._room_bytes
                if more:
                    continue
                break
            if room <= 0 or length > room_bytes or room_bytes <= batch_floor:
                self.blocked = True
                break
            payload = data[body:stop] if command else _NO_DATA
            found.append(_new(Request, (command, flags, cookie, offset, length, payload)))
            start = stop
            room -= 1
            room_bytes -= length
        inbox.start = start
        self.requests += len(found)
        self.in_flight += room_granted - room
        self.held_bytes += bytes_granted - room_bytes
        return found

    def _take_odd(self, found: list[Request]) -> bool:
        """Handle the request at the inbox's start, whatever it is; False when `take` must stop."""
        inbox = self._inbox
        magic, flags, command, cookie, offset, length = _unpack(inbox.data, inbox.start)
        violation = ""
        if magic != REQUEST_MAGIC:
            violation = f"a request starts with {magic:#x}"
        elif command == CMD_WRITE and length > self._limits.payload_bytes_max:
            violation = f"a write of {length} bytes"
        if violation:
            if not found:
                raise ProtocolError(violation)
            self.blocked = True  # those before it come first
            return False
        if command == wire.CMD_DISC:
            self.ended = True
            inbox.start = inbox.end
            return False
        error = self._refusal(command, flags, offset, length)
        if error is not None:
            return self._refuse(command, cookie, error, length)
        if command == wire.CMD_CACHE:
            # It is advice: a client can't make this host read more than with as many reads.
            length = min(length, self._limits.payload_bytes_max)
        request = Request(command, flags, cookie, offset, length, _NO_DATA)
        needed = cost(request)
        if command == CMD_WRITE and length <= SMALL_BYTES:
            return False  # the rest comes behind it, in the inbox
        if self._room <= 0 or needed > self._room_bytes:
            self.blocked = True
            return False
        self._room_bytes -= needed
        inbox.start += _HEADER
        if command != CMD_WRITE:
            self._room -= 1
            found.append(request)
            return True
        payload = bytearray(length)
        self._arriving = request._replace(data=payload)
        inbox.fill(memoryview(payload))  # never whole yet: `take` would have had it
        return False

    def _finish_payload(self) -> list[Request]:
        """Return the write whose payload has come; answer the one whose payload is thrown away."""
        if self._arriving is not None:
            request, self._arriving = self._arriving, None
            if not self.stopping:
                self.in_flight += 1
                return [request]
            self.held_bytes -= request.length
            self._send_refusal(CMD_WRITE, request.cookie, wire.ESHUTDOWN)
        elif self._refused is not None:
            (cookie, error), self._refused = self._refused, None
            self._send_refusal(CMD_WRITE, cookie, error)
        return []

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> int | None:
        """Return None for a valid request, else its error; 0 when nothing is left to do for it."""
        known = self._known_flags.get(command)
        if self.stopping:
            return wire.ESHUTDOWN
        if known is None or flags & ~known:
            return wire.EINVAL
        if self._read_only and command in _WRITING:
            return wire.EPERM
        if command == wire.CMD_FLUSH:
            return wire.EINVAL if offset or length else None
        if offset + length > self._size:  # Python's integers don't wrap
            return wire.ENOSPC if command in _GROWING else wire.EINVAL
        if command == CMD_READ and length > self._limits.payload_bytes_max:
            return wire.EOVERFLOW if flags & wire.CMD_FLAG_DF else wire.EINVAL
        if command == wire.CMD_BLOCK_STATUS and not (self.contexts and length):
            return wire.EINVAL
        return None if length else 0

    def _refuse(self, command: int, cookie: int, error: int, length: int) -> bool:
        inbox = self._inbox
        inbox.start += _HEADER
        if command == CMD_WRITE and not inbox.discard(length):
            self._refused = (cookie, error)
            return False
        self._send_refusal(command, cookie, error)
        return True

    def _send_refusal(self, command: int, cookie: int, error: int) -> None:
        if error:
            self.answer_error(command, cookie, error)
        elif command == CMD_READ and self.structured:
            chunk = wire.CHUNK.pack(CHUNK_MAGIC, CHUNK_FLAG_DONE, wire.CHUNK_NONE, cookie, 0)
            self.outgoing.append(chunk)
        else:
            self.answer(cookie)

    def done(self, count: int, held_bytes: int) -> None:
        """Note that `count` requests were answered; `held_bytes` is the sum of their `cost`."""
        self.in_flight -= count
        self.held_bytes -= held_bytes

    def abandon(self) -> None:
        """Forget a payload that will never come whole: the connection is gone."""
        if self._arriving is not None:
            self.held_bytes -= self._arriving.length
            self._arriving = None
            self._inbox.let_go()

    # Answers.

    def answer(self, cookie: int) -> None:
        """Answer a command that returns no data: it succeeded."""
        self.outgoing.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))

    def answer_read(self, cookie: int, offset: int, data: Buffer) -> None:
        """Answer a read with all its data, which never changes from now on.

        It is one chunk, and the last: no error is possible any more (N5, N6).
        """
        if self.structured:
            length = len(data) + 8
            kind = CHUNK_OFFSET_DATA
            head = _pack_data_chunk(CHUNK_MAGIC, CHUNK_FLAG_DONE, kind, cookie, length, offset)
        else:
            head = _pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie)
        self.outgoing += (head, data)

    def answer_error(self, command: int, cookie: int, error: int) -> None:
        """Answer any request with an error of the protocol (`wire.to_wire`)."""
        if self.structured:
            text = f"{_COMMAND_NAMES.get(command, 'unknown command')}: {_ERROR_TEXTS[error]}"
            self.outgoing.append(wire.pack_error(cookie, error, text))
        else:
            self.outgoing.append(_pack_simple(SIMPLE_REPLY_MAGIC, error, cookie))

    def answer_status(self, request: Request, found: Mapping[str, Sequence[Extent]]) -> None:
        """Answer a block status request with the extents of every selected context (N7).

        Extents start at the request's offset, in order and without gaps; they may stop early or
        reach past its end. None at all means "data", which is always a safe answer.
        """
        most = 1 if request.flags & wire.CMD_FLAG_REQ_ONE else self._limits.extents_max
        for name in self.contexts:
            states = _CONTEXT_STATES[name]
            payload = _pack_extents(request, found[name], states, most)
            flags = CHUNK_FLAG_DONE if name == self.contexts[-1] else 0
            kind, length = wire.CHUNK_BLOCK_STATUS, len(payload) + 4
            head = wire.CHUNK.pack(CHUNK_MAGIC, flags, kind, request.cookie, length)
            self.outgoing.append(head + wire.U32.pack(CONTEXT_IDS[name]) + payload)


def _pack_extents(
    request: Request, extents: Sequence[Extent], states: Mapping[Status, int], most: int
) -> bytes:
    """Return at most `most` descriptors: neighbours differ, and all lie inside the request."""
    runs: list[list[int]] = []  # length, flags
    left = request.length
    for extent in extents:
        length = min(extent.length, left)
        state = states.get(extent.status, 0)
        if runs and runs[-1][1] == state:
            runs[-1][0] += length
        elif length and len(runs) < most:
            runs.append([length, state])
        elif length:
            break
        left -= length
    if not runs:
        runs.append([request.length, 0])
    return b"".join(wire.DESCRIPTOR.pack(*run) for run in runs)
