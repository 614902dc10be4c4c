"""What the requests of one disk's guests came to: how many, how long, how much, how many failed.

A request's time is the guest's, as far as it can be seen here: from the bytes that came to the
answer that can be sent. Counting is part of every request, so those that came together and end
together are counted together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Final

from mirrord.nbd import wire

KINDS: Final[Mapping[str, int]] = {
    "read": wire.CMD_READ,
    "write": wire.CMD_WRITE,
    "flush": wire.CMD_FLUSH,
    "trim": wire.CMD_TRIM,
    "zero": wire.CMD_WRITE_ZEROES,
}
_COMMANDS: Final = wire.CMD_BLOCK_STATUS + 1  # the others are counted too, and not shown
_BITS: Final = 64  # of a time in nanoseconds


@dataclass(frozen=True, slots=True)
class Count:
    """The requests of one kind that have ended. Entry n of `buckets`: those that took 2**(n-1)
    nanoseconds or more, and less than 2**n; it stops after the last that isn't 0."""

    buckets: tuple[int, ...]
    seconds: float
    bytes: int  # of those that succeeded
    errors: int


class Counters:
    """Counts the requests of all connections of one disk since its process started.

    Whoever answers a request adds its length to `moved_bytes`, or 1 to `errors`, by its command.
    """

    def __init__(self) -> None:
        self.moved_bytes = [0] * _COMMANDS
        self.errors = [0] * _COMMANDS
        self._buckets = [[0] * _BITS for _ in range(_COMMANDS)]
        self._spent_ns = [0] * _COMMANDS

    def count(self, commands: list[int], begun_ns: int) -> None:
        """Note that requests have ended, which came when `perf_counter_ns` was `begun_ns`."""
        spent_ns = perf_counter_ns() - begun_ns
        bits = spent_ns.bit_length()
        for command in commands if len(commands) == 1 else set(commands):
            number = commands.count(command)
            self._buckets[command][bits] += number
            self._spent_ns[command] += spent_ns * number

    @property
    def ended(self) -> int:
        """How many requests have ended."""
        return sum(map(sum, self._buckets))

    def counts(self) -> dict[str, Count]:
        """Return what was counted, by kind: read, write, flush, trim, zero."""
        return {kind: self._count(command) for kind, command in KINDS.items()}

    def _count(self, command: int) -> Count:
        buckets = self._buckets[command]
        last = max((n for n, count in enumerate(buckets) if count), default=-1)
        return Count(
            tuple(buckets[: last + 1]),
            self._spent_ns[command] / 1e9,
            self.moved_bytes[command],
            self.errors[command],
        )
