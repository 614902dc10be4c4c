"""Received bytes on their way to a parser: one fixed buffer, and large payloads past it.

The owner receives into `buffer()` and says `received(count)`. A parser reads `data[start:end]`
and moves `start`. A large payload is routed straight into its own memory with `fill`, so that it
is copied at most once; a refused one is thrown away with `discard`.

Invariants: `0 <= start <= end <= capacity`; while `waiting`, `start == end`, so that nothing
stands behind bytes that are still to come; `buffer()` is never empty as long as no parser leaves
more than `capacity - SPARE_BYTES` unread.
"""

from __future__ import annotations

from typing import Final

from mirrord.core.geometry import KIB

INBOX_BYTES: Final = 256 * KIB  # a unix socket queues about 208 KiB: one receive takes it all
SPARE_BYTES: Final = 64 * KIB  # less room than this at the end: move what is unread to the front


class Inbox:
    """The receive side of one connection. Memory is touched only as far as bytes came."""

    __slots__ = ("_discard", "_filled", "_target", "_view", "data", "end", "start", "waiting")

    def __init__(self, capacity: int = INBOX_BYTES) -> None:
        self.data = bytearray(capacity)
        self._view = memoryview(self.data)
        self.start = 0
        self.end = 0
        self.waiting = False  # for the rest of what was asked for by `fill` or `discard`
        self._target: memoryview | None = None
        self._filled = 0
        self._discard = 0

    def buffer(self) -> memoryview:
        """Return where the next bytes go."""
        if self._target is not None:
            return self._target[self._filled :]
        if self.start == self.end:
            self.start = self.end = 0
            return self._view
        if len(self.data) - self.end < SPARE_BYTES and self.start:
            unread = self.end - self.start
            self._view[:unread] = self._view[self.start : self.end]
            self.start, self.end = 0, unread
        return self._view[self.end :]

    def received(self, count: int) -> None:
        """Note that `count` bytes came into what `buffer` returned."""
        if not self.waiting:
            self.end += count
        elif self._target is not None:
            self._filled += count
            if self._filled == len(self._target):
                self._target, self.waiting = None, False
        else:
            step = min(count, self._discard)
            self._discard -= step
            self.start += step
            self.end += count
            self.waiting = self._discard > 0

    def fill(self, target: memoryview) -> bool:
        """Put the next `len(target)` bytes into `target`; True when they have all come."""
        have = min(len(target), self.end - self.start)
        target[:have] = self._view[self.start : self.start + have]
        self.start += have
        if have == len(target):
            return True
        self._target, self._filled, self.waiting = target, have, True
        return False

    def let_go(self) -> None:
        """Forget the rest of a payload, and its memory."""
        self._target, self._discard, self.waiting = None, 0, False

    def discard(self, count: int) -> bool:
        """Throw the next `count` bytes away; True when they have all come."""
        have = min(count, self.end - self.start)
        self.start += have
        self._discard = count - have
        self.waiting = self._discard > 0
        return not self.waiting
