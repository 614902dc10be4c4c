"""What waits to be sent on one connection: what goes next, and how much may be on its way.

Lanes: control first, then small requests, which a guest waits for, then bulk, a guest's large
requests and copies in turn. Bulk goes after `OVERTAKES_MAX` small requests at the latest. So that a
small one never waits behind megabytes, bulk in flight is bounded: a lot while no small ones come,
little while they do.

Copies have a narrower window of their own, for other guests use the server too, by connections of
other processes and hosts, and wait behind whatever is queued there or on the way. Nobody tells us
of them; but what is queued, each answer is late by (`core.pacing.Window`).
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from mirrord.core.geometry import KIB, MIB
from mirrord.core.pacing import Window
from mirrord.smb import wire
from mirrord.smb.wire import Bytes

# A request or reply up to this is small: a guest's.
SMALL_BYTES_MAX: Final = 64 * KIB
# Bulk in flight: so much keeps loopback and a 10 Gbit/s link with 3 ms of delay busy; while small
# requests come they wait at most for this little (0.1 ms at 10 Gbit/s, 0.5 ms of crypto).
BULK_BYTES_MAX: Final = 4 * MIB
BULK_BYTES_BESIDE_SMALL: Final = 512 * KIB
# Bulk requests that are held back after the last small one, before the bound is lifted.
SMALL_REMEMBERED: Final = 64
# Small requests that may overtake a bulk one that waits.
OVERTAKES_MAX: Final = 64
# What is best asked for at a time by a copy: a server is at it for a fraction of a millisecond.
COPY_PIECE_BYTES: Final = 256 * KIB
# Pieces that may be queued at the server or on the way, before less or more of them are sent.
COPIES_QUEUED: Final = (0.5, 1.0)


class Request:
    """One request, which can be submitted again, to another channel too.

    `payload_bytes` is what it costs: bytes sent, or bytes of room for the answer. `copying_bytes`
    is what a copy reads, writes, or has the server copy; it is 0 for everything else.
    """

    __slots__ = (
        "body", "command", "control", "copying_bytes", "data", "owner", "payload_bytes", "pending",
        "replays", "room", "sent_s", "sequence", "tree_id",
    )  # fmt: skip

    def __init__(
        self,
        command: int,
        body: bytes,
        *,
        tree_id: int = 0,
        data: Bytes = b"",
        payload_bytes: int = 0,
        copying_bytes: int = 0,
        owner: Any = None,
        room: tuple[Bytes, memoryview] | None = None,
    ) -> None:
        self.command = command
        self.body = body
        self.tree_id = tree_id
        self.data = data
        self.payload_bytes = payload_bytes
        self.copying_bytes = copying_bytes
        self.owner = owner  # whatever the shell wants to know it by
        # Memory for what is read, and a view of the part of it that is this request's. A payload
        # that went there is that view, in `Reply.payload`; not every one can.
        self.room = room
        self.control: wire.Header | None = None  # of smbprotocol's own message
        self.pending = False  # the server said that it takes long
        self.sequence = 0  # the channel sequence that it was sent under
        self.replays = 0  # how often it was asked again, without knowing what became of it
        self.sent_s = 0.0


class Lanes:
    """Requests that wait. `first` is sent next: `take` it, and tell when it was `answered`."""

    def __init__(self) -> None:
        self.window = Window(COPY_PIECE_BYTES, BULK_BYTES_MAX, queued=COPIES_QUEUED)
        self._control, self._small = deque[Request](), deque[Request]()
        self._bulk, self._copies = deque[Request](), deque[Request]()
        self._bulk_bytes = 0  # in flight
        self._copying_bytes = 0
        self._small_lately = 0
        self._overtaken = 0
        self._copied_last = False

    def __len__(self) -> int:
        return sum(map(len, self._all()))

    def _all(self) -> tuple[deque[Request], ...]:
        return self._control, self._small, self._bulk, self._copies

    @property
    def beside_small(self) -> bool:
        """Whether small requests have come lately."""
        return self._small_lately > 0

    def add(self, request: Request) -> None:
        """Let a request wait."""
        self._lane_of(request).append(request)

    def _lane_of(self, request: Request) -> deque[Request]:
        if request.control is not None:
            return self._control
        if request.copying_bytes:
            return self._copies
        return self._bulk if request.payload_bytes > SMALL_BYTES_MAX else self._small

    def withdraw(self, request: Request) -> bool:
        """Let a request wait no longer; False if it didn't."""
        lane = self._lane_of(request)
        if request in lane:
            lane.remove(request)
            return True
        return False

    def clear(self) -> list[Request]:
        """Let nothing wait any longer; return all that did."""
        left = [request for lane in self._all() for request in lane]
        for lane in self._all():
            lane.clear()
        return left

    def clear_large(self) -> list[Request]:
        """Let nothing wait any longer that costs more than a small request may; return it."""
        left = [r for r in (*self._bulk, *self._copies) if r.payload_bytes > SMALL_BYTES_MAX]
        kept = [request for request in self._copies if request not in left]
        self._bulk.clear()
        self._copies = deque(kept)
        return left

    def first(self) -> Request | None:
        """Return what goes next, None if nothing may go now."""
        if self._control:
            return self._control[0]
        large = self._first_large()
        if self._small and not (large is not None and self._overtaken >= OVERTAKES_MAX):
            return self._small[0]
        return large

    def _first_large(self) -> Request | None:
        most = BULK_BYTES_BESIDE_SMALL if self._small_lately else BULK_BYTES_MAX
        if self._bulk_bytes + self._copying_bytes >= most:
            return None
        may_copy = self._copies and self._copying_bytes < self.window.bytes
        if self._bulk and not (may_copy and not self._copied_last):
            return self._bulk[0]
        return self._copies[0] if may_copy else None

    def take(self, request: Request) -> None:
        """Take the first request, which is sent now."""
        lane = self._lane_of(request)
        lane.popleft()
        if lane is self._small:
            overtaking = self._bulk or self._copies
            self._overtaken = self._overtaken + 1 if overtaking else 0
            if request.payload_bytes:
                self._small_lately = SMALL_REMEMBERED
        elif lane is not self._control:
            self._overtaken = 0
            self._copied_last = lane is self._copies
            self._fly(request, 1)

    def _fly(self, request: Request, sign: int) -> None:
        if request.copying_bytes:
            self._copying_bytes += sign * request.copying_bytes
        else:
            self._bulk_bytes += sign * request.payload_bytes

    def answered(self, request: Request, now_s: float) -> None:
        """Note that a request that was taken, none of control, has its answer."""
        if not request.copying_bytes and request.payload_bytes <= SMALL_BYTES_MAX:
            return
        self._fly(request, -1)
        self._small_lately = max(0, self._small_lately - 1)
        if request.copying_bytes and self._copies:  # else the window isn't what holds them back
            self.window.completed(request.copying_bytes, now_s - request.sent_s, now_s)
