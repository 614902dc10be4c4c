"""What waits to be sent on one connection: what goes next, and how much may be on its way.

Lanes: control first, then small requests, which a guest waits for, then large ones: for each file
those of guests and those of copies, in turn. A large one goes after `OVERTAKEN_BYTES_MAX` of small
ones at the latest. So that a small one never waits behind megabytes, what is in flight of a lane
is bounded: a lot while no small ones come, little while they do. Files are bounded apart, for a
target that hangs must not keep a guest from its disk.

Copies have a narrower bound of their own, for other guests use the server too, by connections of
other processes and hosts, and wait behind whatever is queued there or on the way. Nobody tells us
of them; so no more is in flight than what makes copies faster (`core.pacing.Climb`).
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from mirrord.core.geometry import KIB, MIB
from mirrord.core.pacing import Climb
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
# Small requests that may overtake a large one that waits: 64 of a guest's usual 4 KiB.
OVERTAKEN_BYTES_MAX: Final = 256 * KIB
LEAST_BYTES: Final = 4 * KIB  # that a request counts for there
# What is best asked for at a time by a copy: a server is at it for a fraction of a millisecond.
COPY_PIECE_BYTES: Final = 256 * KIB


class Request:
    """One request, which can be submitted again, to another channel too.

    `payload_bytes` is what it costs: bytes sent, or bytes of room for the answer. `file` is which
    it is about, where it may be large. `copying_bytes` is what a copy reads, writes, or has the
    server copy; it is 0 for everything else.
    """

    __slots__ = (
        "body", "command", "control", "copying_bytes", "data", "file", "owner", "payload_bytes",
        "pending", "replays", "room", "sent_s", "sequence", "tree_id",
    )  # fmt: skip

    def __init__(
        self,
        command: int,
        body: bytes,
        *,
        tree_id: int = 0,
        data: Bytes = b"",
        payload_bytes: int = 0,
        file: bytes = b"",
        copying_bytes: int = 0,
        owner: Any = None,
        room: tuple[Bytes, memoryview] | None = None,
    ) -> None:
        self.command = command
        self.body = body
        self.tree_id = tree_id
        self.data = data
        self.payload_bytes = payload_bytes
        self.file = file
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


_Lane = tuple[bytes, bool]  # a file, and whether it is of copies


class Lanes:
    """Requests that wait. `first` is sent next: `take` it, and tell when it was `answered`."""

    def __init__(self) -> None:
        self.window = Climb(COPY_PIECE_BYTES, BULK_BYTES_MAX)
        self._control, self._small = deque[Request](), deque[Request]()
        self._large: dict[_Lane, deque[Request]] = {}  # none is empty; the first one's turn is next
        self._flying: dict[_Lane, int] = {}  # bytes
        self._small_lately = 0
        self._overtaken_bytes = 0
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    @property
    def beside_small(self) -> bool:
        """Whether small requests have come lately."""
        return self._small_lately > 0

    def add(self, request: Request) -> None:
        """Let a request wait."""
        self._waiting += 1
        if request.control is not None:
            self._control.append(request)
        elif _is_large(request):
            self._large.setdefault(_lane_of(request), deque()).append(request)
        else:
            self._small.append(request)

    def clear(self) -> list[Request]:
        """Let nothing wait any longer; return all that did."""
        lanes = (self._control, self._small, *self._large.values())
        left = [request for lane in lanes for request in lane]
        self._control.clear()
        self._small.clear()
        self._large.clear()
        self._waiting = 0
        return left

    def clear_large(self) -> list[Request]:
        """Let nothing wait any longer that costs more than a small request may; return it."""
        waiting = [request for lane in self._large.values() for request in lane]
        self._large.clear()
        self._waiting -= len(waiting)
        left = [request for request in waiting if request.payload_bytes > SMALL_BYTES_MAX]
        for request in waiting:
            if request.payload_bytes <= SMALL_BYTES_MAX:  # of a copy
                self.add(request)
        return left

    def first(self) -> Request | None:
        """Return what goes next, None if nothing may go now."""
        if self._control:
            return self._control[0]
        large = next((queue[0] for lane, queue in self._large.items() if self._may_go(lane)), None)
        if self._small and (large is None or self._overtaken_bytes < OVERTAKEN_BYTES_MAX):
            return self._small[0]
        return large

    def _may_go(self, lane: _Lane) -> bool:
        _, copies = lane
        if self._small_lately:
            most = COPY_PIECE_BYTES if copies else BULK_BYTES_BESIDE_SMALL
        else:
            most = self.window.bytes if copies else BULK_BYTES_MAX
        return self._flying.get(lane, 0) < most

    def take(self, request: Request) -> None:
        """Take the first request, which is sent now."""
        self._waiting -= 1
        if request.control is not None:
            self._control.popleft()
        elif _is_large(request):
            self._overtaken_bytes = 0
            lane = _lane_of(request)
            queue = self._large.pop(lane)
            queue.popleft()
            if queue:
                self._large[lane] = queue
            self._flying[lane] = self._flying.get(lane, 0) + _bytes_of(request)
        else:
            self._small.popleft()
            overtaking = max(request.payload_bytes, LEAST_BYTES)
            self._overtaken_bytes = self._overtaken_bytes + overtaking if self._large else 0
            if request.payload_bytes:
                self._small_lately = SMALL_REMEMBERED

    def answered(self, request: Request, now_s: float) -> None:
        """Note that a request that was taken, none of control, has its answer."""
        if not _is_large(request):
            return
        self._small_lately = max(0, self._small_lately - 1)
        lane, count = _lane_of(request), _bytes_of(request)
        self._flying[lane] -= count
        if not self._flying[lane]:
            del self._flying[lane]
        if not request.copying_bytes:
            return
        if self._small_lately:
            self.window.restart()
        else:
            self.window.completed(count, request.sent_s, now_s)


def _is_large(request: Request) -> bool:
    return request.copying_bytes > 0 or request.payload_bytes > SMALL_BYTES_MAX


def _lane_of(request: Request) -> _Lane:
    return request.file, request.copying_bytes > 0


def _bytes_of(request: Request) -> int:
    return request.copying_bytes or request.payload_bytes
