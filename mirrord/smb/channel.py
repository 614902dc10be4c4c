"""One SMB connection's requests and replies, bytes in, events out: credits, lanes, breaks, silence.

Until `start` the connection belongs to smbprotocol, which negotiates and authenticates: its
messages pass as they are, since their very bytes are hashed into the keys (3.1.1). From `start` on
every message is numbered, paid for and sealed here. smbprotocol's own later ones (creates,
set-infos) come in by `control`: they get a message id of ours, and their replies get theirs back,
with as many credits as they cost, so that its count of them is always enough.

    submit, control ──▸ `Lanes` ──pump──▸ sealed, in `outgoing` ──▸ the socket
    received ──▸ whole messages ──opened──▸ replies, matched by message id ──▸ returned

What goes first, and how much is in flight, `Lanes` says. So that a small request never waits behind
megabytes that are sealed already, the owner pumps only while little is unsent.

Credits (3.2.4.1.2): a request waits until the server has granted what it costs; the window is never
overrun. When a server grants too few for a large request, even when asked while nothing is in
flight, all large ones are `refused`; their owner then asks in pieces of one credit.

Invariants: a message id is used once; a request is in exactly one of a lane and `_pending`; what
is in flight was paid for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mirrord.core.geometry import KIB
from mirrord.core.inbox import INBOX_BYTES, SPARE_BYTES, Inbox
from mirrord.errors import ProtocolError
from mirrord.smb import status as st
from mirrord.smb import wire
from mirrord.smb.lanes import Lanes, Request
from mirrord.smb.seal import Seal
from mirrord.smb.wire import Bytes

# Credits to ask for: 32 MiB of payload, or a deep queue of a guest's small requests.
CREDITS_WANTED: Final = 512
CREDITS_ASKED_MAX: Final = 128  # at a time: some servers grant nothing when asked for too much
# Before authentication a server has nothing long to say (a SPNEGO token has some kilobytes), and
# nothing but an answer to each question, and that it takes long.
GREETING_BYTES_MAX: Final = 64 * KIB
ANSWERS_MAX: Final = 2
# Leases that are taken back and not yet given back: far more than one process has disks.
BREAKS_MAX: Final = 1024
# Around a payload: headers, an ioctl's output, a create's contexts.
OVERHEAD_BYTES_MAX: Final = 128 * KIB
# Bytes of an inbox's message that is waited for as a whole; a longer one gets memory of its own.
_WHOLE_BYTES_MAX = INBOX_BYTES - SPARE_BYTES - wire.LENGTH_BYTES
_READ_HEAD = wire.READ_DATA_OFFSET
_NEXT_COMMAND = slice(20, 24)  # of a header


Allocate = Callable[[int], tuple[Bytes, memoryview]]


def plain_memory(length: int) -> tuple[Bytes, memoryview]:
    """Return memory for a payload, and a view to fill it by."""
    memory = bytearray(length)
    return memory, memoryview(memory)


class Reply:
    """What came for a request: its status, the message, and a payload that was split off."""

    __slots__ = ("message", "payload", "request", "status")

    def __init__(
        self, request: Request, status: int, message: Bytes, payload: Bytes | None
    ) -> None:
        self.request = request
        self.status = status
        self.message = message
        self.payload = payload


class Channel:
    """One connection. The owner feeds `inbox` and calls `received`, and sends `outgoing`."""

    def __init__(self, allocate: Allocate = plain_memory) -> None:
        self.inbox = Inbox()
        self.outgoing: list[Bytes] = []
        self.greeting: list[bytes] = []  # messages for smbprotocol, before `start`
        self.breaks: list[wire.Break] = []
        self.refused: list[Request] = []  # too large for what the server grants
        self.sequence = 0  # channel sequence, the same on all channels of a session
        # When something came last, or was asked with nothing in flight, by the owner's clock:
        # silence begins there.
        self.heard_s = 0.0
        self.seal: Seal | None = None
        self._allocate = allocate
        self._session_id = 0
        self._message_bytes_max = GREETING_BYTES_MAX
        self._greetings_due = 0
        self._multi_credit = False
        self._low = 0  # the next message id
        self._high = 1  # the first one that is not granted: before any reply there is one credit
        self._pending: dict[int, Request] = {}
        self._lanes = Lanes()
        self._asking = False  # an ECHO has asked for credits, and nothing else was answered since
        self._acks = 0  # of breaks, unanswered
        # A long message that is being received: a read's request and head, and the rest's memory.
        self._fill: tuple[Request | None, bytes, Bytes] | None = None
        self._untold: list[Request] = []  # answered in what turned out to be no SMB

    # The beginning: smbprotocol's.

    def greet(self, message: bytes) -> None:
        """Send a message of smbprotocol's as it is, before `start`."""
        header = wire.parse_header(message)
        self._low = max(self._low, header.message_id + max(header.charge, 1))
        self._greetings_due += ANSWERS_MAX
        self.outgoing += wire.frame(message)

    def start(self, seal: Seal, session_id: int, *, piece_bytes: int, multi_credit: bool) -> None:
        """Take the connection over, with the keys that were agreed on.

        `piece_bytes` is the most that one reply brings.
        """
        self.seal = seal
        self._session_id = session_id
        self._message_bytes_max = min(piece_bytes + OVERHEAD_BYTES_MAX, wire.MESSAGE_BYTES_MAX)
        self._multi_credit = multi_credit
        self._high = max(self._high, self._low)

    # Asking.

    @property
    def in_flight(self) -> int:
        """Requests that were sent and not answered."""
        return len(self._pending)

    @property
    def beside_small(self) -> bool:
        """Whether small requests have come lately: bulk is held back, and best asked for in little
        pieces, for one that is sent or received holds up all others."""
        return self._lanes.beside_small

    @property
    def waiting(self) -> int:
        """Requests that have not been sent."""
        return len(self._lanes)

    def affords(self, request: Request) -> bool:
        """Tell whether the credits are there for a request."""
        return self._high - self._low >= self._charge(request)

    def submit(self, request: Request) -> None:
        """Queue a request; `pump` sends it."""
        self._lanes.add(request)

    def control(self, message: bytes) -> None:
        """Queue a message of smbprotocol's; its reply is a `Reply` to a request with `control`."""
        header = wire.parse_header(message)
        request = Request(header.command, message)
        request.control = header
        request.payload_bytes = max(header.charge, 1) * wire.CREDIT_BYTES
        self._lanes.add(request)

    def pump(self, now_s: float) -> None:
        """Seal and number what may be sent now. Raises ProtocolError when nothing ever may."""
        if self.seal is None:
            return
        while (request := self._lanes.first()) is not None:
            if self.affords(request):
                self._lanes.take(request)
                self._send(request, now_s)
            elif not self._ask_for_credits(request, now_s):
                return

    def _charge(self, request: Request) -> int:
        return wire.charge_of(request.payload_bytes) if self._multi_credit else 1

    def _ask_for_credits(self, request: Request, now_s: float) -> bool:
        """Ask, when no reply to anything else could bring more; when that didn't help, refuse all
        that is large, and return True."""
        if self._pending:
            return False
        if self._high == self._low or (self._asking and request.control is not None):
            raise ProtocolError(f"the server grants {self._high - self._low} credits in all")
        if self._asking:
            self._asking = False
            self.refused += self._lanes.clear_large()
            return True
        self._asking = True
        self._send(Request(wire.ECHO, wire.echo_body()), now_s, wish=self._charge(request))
        return False

    def _send(self, request: Request, now_s: float, wish: int = 0) -> None:
        assert self.seal is not None
        charge = self._charge(request)
        message_id = self._low
        self._low += charge
        missing = CREDITS_WANTED - (self._high - self._low)
        wish = wish or charge + max(0, min(CREDITS_ASKED_MAX, missing))
        if not self._pending:
            self.heard_s = now_s
        request.sent_s = now_s
        request.sequence = self.sequence
        request.pending = False
        self._pending[message_id] = request
        if request.control is not None:
            credits = max(wish, request.control.credits)
            head = wire.patched(request.body, message_id, credits, self.sequence)
        else:
            head = (
                wire.pack_header(
                    request.command,
                    charge=charge if self._multi_credit else 0,
                    credits=wish,
                    message_id=message_id,
                    tree_id=request.tree_id,
                    session_id=self._session_id,
                    sequence=self.sequence,
                    flags=wire.REPLAY if request.replays else 0,
                )
                + request.body
            )
        self.outgoing += self.seal.close(head, request.data)

    def keep_alive(self, now_s: float) -> None:
        """Ask whether the server is there; any answer counts."""
        if self.seal is not None and self._high > self._low:
            self._send(Request(wire.ECHO, wire.echo_body()), now_s)

    def acknowledge(self, broken: wire.Break, tree_id: int) -> None:
        """Agree to what is left of a lease or oplock."""
        if broken.lease:
            body = wire.lease_ack_body(broken.key, broken.state)
        else:
            body = wire.oplock_ack_body(broken.key, broken.state)
        self._acks += 1
        self.submit(Request(wire.OPLOCK_BREAK, body, tree_id=tree_id))

    def oldest_s(self, *, pending: bool) -> float | None:
        """Return when the oldest unanswered request was sent: of those the server said it is
        at (`pending`), or of the others."""
        sent = [r.sent_s for r in self._pending.values() if r.pending == pending]
        return min(sent, default=None)

    def lost(self) -> list[Request]:
        """Return everything unanswered, oldest first, when the connection is gone."""
        left = [*self._untold, *self._pending.values(), *self._lanes.clear()]
        self._untold.clear()
        self._pending.clear()
        self._fill = None
        self.inbox.let_go()
        return left

    # Hearing.

    def received(self, count: int, now_s: float) -> list[Reply]:
        """Note that `count` bytes came into the inbox's buffer; return what they answer.

        Raises ProtocolError: the connection can't be used any more, and all is `lost`.
        """
        self.heard_s = now_s
        self.inbox.received(count)
        replies: list[Reply] = []
        try:
            while not self.inbox.waiting:
                if self._fill is not None:
                    self._filled(replies)
                elif not self._take(replies):
                    break
        except ProtocolError:
            self._untold = [reply.request for reply in replies]
            raise
        return replies

    def _take(self, replies: list[Reply]) -> bool:
        """Take one message from the inbox, or begin to; False when there is no whole one."""
        inbox = self.inbox
        have = inbox.end - inbox.start
        if have < wire.LENGTH_BYTES:
            return False
        at = inbox.start + wire.LENGTH_BYTES
        length = int.from_bytes(inbox.data[inbox.start : at], "big")
        if not wire.HEADER_BYTES <= length <= self._message_bytes_max:
            raise ProtocolError(f"a message of {length} bytes")
        if have - wire.LENGTH_BYTES >= length:
            inbox.start = at + length
            self._message(bytes(memoryview(inbox.data)[at : at + length]), replies)
            return True
        if length <= _WHOLE_BYTES_MAX or have < wire.LENGTH_BYTES + _READ_HEAD:
            return False
        inbox.start = at
        self._begin_large(length)
        return True

    def _begin_large(self, length: int) -> None:
        """Have a long message received into its own memory: past its head, if it is a read's."""
        inbox = self.inbox
        head = bytes(memoryview(inbox.data)[inbox.start : inbox.start + _READ_HEAD])
        request = self._reads_plainly(head, length - _READ_HEAD)
        if request is None:
            head = b""
        inbox.start += len(head)
        memory, view = self._room_for(request, length - len(head))
        self._fill = (request, head, memory)
        inbox.fill(view)

    def _room_for(self, request: Request | None, length: int) -> tuple[Bytes, memoryview]:
        if request is None or request.room is None or len(request.room[1]) != length:
            return self._allocate(length)
        view = request.room[1]
        return view, view

    def _reads_plainly(self, head: bytes, length: int) -> Request | None:
        """Return the request, if this is the head of a plain answer to a read and nothing else,
        with so many bytes of data."""
        if head[:4] != wire.SMB2_MAGIC or self.seal is None or not self.seal.splits:
            return None
        header = wire.parse_header(head)
        request = self._pending.get(header.message_id)
        plain = (
            request is not None
            and request.command == wire.READ
            and request.control is None
            and header.status == st.SUCCESS
            and header.next_command == 0
            and head[64:67] == bytes((17, 0, _READ_HEAD))
            and int.from_bytes(head[68:72], "little") == length <= request.payload_bytes
        )
        return request if plain else None

    def _filled(self, replies: list[Reply]) -> None:
        assert self._fill is not None
        assert self.seal is not None
        (request, head, memory), self._fill = self._fill, None
        if request is None:
            self._message(memory, replies)
            return
        self.seal.open_read(head, memory)
        self._answered(wire.parse_header(head), head, memory, replies)

    def _message(self, message: Bytes, replies: list[Reply]) -> None:
        seal = self.seal
        if seal is None:
            if not self._greetings_due:
                raise ProtocolError("a server that speaks without being asked")
            self._greetings_due -= 1
            self._high += wire.parse_header(message).credits
            self.greeting.append(bytes(message))
            return
        if message[:4] == wire.TRANSFORM_MAGIC:
            for part in _parts(seal.open(message)):
                self._answered(wire.parse_header(part), part, None, replies)
        else:
            for part in _parts(message):
                opened = seal.open(part)
                self._answered(wire.parse_header(opened), opened, None, replies)

    def _answered(
        self, header: wire.Header, message: Bytes, payload: Bytes | None, replies: list[Reply]
    ) -> None:
        if not header.flags & wire.FROM_SERVER:
            raise ProtocolError("a server that sends requests")
        if header.message_id == wire.UNSOLICITED:
            if header.command == wire.OPLOCK_BREAK:
                if self._acks + len(self.breaks) >= BREAKS_MAX:
                    raise ProtocolError(f"{BREAKS_MAX} leases taken back at once")
                self.breaks.append(wire.parse_break(message))
            return
        request = self._pending.get(header.message_id)
        if request is None or header.command != request.command:
            raise ProtocolError(f"an answer to no request of ours: {header.message_id}")
        self._high = min(self._high + header.credits, self._low + 0xFFFF)
        if header.status == st.PENDING:
            request.pending = True
            return
        del self._pending[header.message_id]
        if request.control is not None:
            credits = max(request.control.charge, 1)
            message = wire.patched(message, request.control.message_id, credits)
        elif request.command == wire.ECHO:
            return  # whatever it says: the server is there
        elif request.command == wire.OPLOCK_BREAK:
            self._acks -= 1
            return
        else:
            self._lanes.answered(request, self.heard_s)
        self._asking = False
        replies.append(Reply(request, header.status, message, payload))


def _parts(message: Bytes) -> list[Bytes]:
    """Cut a compound into its messages (3.2.5.1.9). One that leads nowhere leads to no header."""
    if message[_NEXT_COMMAND] == b"\0\0\0\0":  # no compound: nearly all
        return [message]
    parts: list[Bytes] = []
    while following := wire.parse_header(message).next_command:
        parts.append(memoryview(message)[:following])
        message = memoryview(message)[following:]
    parts.append(message)
    return parts
