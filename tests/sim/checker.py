"""The checker: it knows what each guest may see, at every moment.

It keeps, block by block, two sets of values:

* `now`: what a read may return. A value leaves the set when a write that began after it had
  ended is acknowledged, or when a read has shown another one ("what was read never goes back").
* `stable`: what a power cut may leave. A value leaves it when a flush (or FUA) covers a later one.

A write in flight, a failed one and one that was cut off by a crash may or may not be there, until
something proves which.
"""

from __future__ import annotations

from tests.sim.disk import BLOCK
from tests.sim.world import World

NEVER = 1 << 60
Read = tuple[int, int, "list[list[Value]]"]  # when it began, first block, what it may see


class Value:
    """One write's content of one block, and when the write began and ended."""

    __slots__ = ("begin", "data", "end")

    def __init__(self, data: bytes, begin: int) -> None:
        self.data = data
        self.begin = begin
        self.end = NEVER

    def __repr__(self) -> str:
        end = "…" if self.end == NEVER else self.end
        return f"{self.data.hex()}[{self.begin},{end}]"


class Checker:
    """The oracle. `begin_*` before a request, `end_*` with its outcome."""

    def __init__(self, world: World, content: bytes) -> None:
        self.world = world
        self.size = len(content)
        self.now: list[list[Value]] = []
        for start in range(0, self.size, BLOCK):
            value = Value(content[start : start + BLOCK], 0)
            value.end = 0
            self.now.append([value])
        self.stable = [list(values) for values in self.now]
        self.in_flight: dict[int, Value] = {}
        self._reads: dict[int, Read] = {}
        self.shaky = False  # a flush of the authority failed: its cache may fall back
        self.failed_at = -1  # when that was
        self.cut_at = -1  # the last power cut
        self._proven: set[int] = set()  # blocks that were read since the last crash

    def begin_write(self, offset: int, data: bytes) -> list[tuple[int, Value]]:
        tick = self.world.tick()
        values = []
        for at in range(0, len(data), BLOCK):
            value = Value(data[at : at + BLOCK], tick)
            block = (offset + at) // BLOCK
            self.now[block].append(value)
            self.stable[block].append(value)
            self.in_flight[id(value)] = value
            for _, first, allowed in self._reads.values():
                if first <= block < first + len(allowed):
                    allowed[block - first].append(value)
            values.append((block, value))
        return values

    def end_write(self, values: list[tuple[int, Value]], *, fua: bool = False) -> None:
        tick = self.world.tick()
        for block, value in values:
            value.end = tick
            del self.in_flight[id(value)]
            begin = value.begin
            if fua or begin > self.failed_at:  # else the failed flush may have taken it along
                self.now[block] = [v for v in self.now[block] if v is value or v.end > begin]
            if fua:
                self.stable[block] = [v for v in self.stable[block] if v is value or v.end > begin]

    def fail_write(self, values: list[tuple[int, Value]]) -> None:
        tick = self.world.tick()
        for _, value in values:
            value.end = tick
            del self.in_flight[id(value)]

    def begin_flush(self) -> tuple[int, list[set[Value]]]:
        return self.world.tick(), [set(values) for values in self.now]

    def end_flush(self, flush: tuple[int, list[set[Value]]]) -> None:
        tick, seen = flush
        self.stable = [
            [v for v in values if v.begin > tick or v in before]
            for values, before in zip(self.stable, seen, strict=True)
        ]

    def flush_failed(self) -> None:
        """The authority lost what it had not written: anything not durable may come back."""
        self.shaky = True
        self.failed_at = self.world.tick()
        for block, values in enumerate(self.stable):
            self.now[block] = list(values)

    def begin_read(self, offset: int, length: int) -> Read:
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        tick = self.world.tick()
        self._reads[tick] = read = (tick, first, [list(v) for v in self.now[first:last]])
        return read

    def end_read(self, read: Read, data: bytes | None) -> None:
        """Check what was read; None for a failed read."""
        tick, first, allowed = self._reads.pop(read[0])
        if data is None:
            return
        for index, values in enumerate(allowed):
            block = first + index
            content = data[index * BLOCK : (index + 1) * BLOCK]
            if self.shaky:  # what came back during the read was allowed too
                values = values + self.now[block]
            if not any(v.data == content for v in values):
                self.world.violate(f"read of block {block} gave {content.hex()}, allowed {values}")
                return
            if not self.shaky:
                self._observe(block, content, tick)

    def end_extents(self, read: Read, zero: list[tuple[int, int]]) -> None:
        """Check that every block of the ranges (offset, length) could be read as zeroes."""
        _, first, allowed = self._reads.pop(read[0])
        for offset, length in zero:
            for block in range(-(-offset // BLOCK), (offset + length) // BLOCK):
                values = allowed[block - first] + (self.now[block] if self.shaky else [])
                if any(any(v.data) is False for v in values):
                    continue
                self.world.violate(f"block {block} is said to be zero, allowed {values}")
                return

    def _observe(self, block: int, content: bytes, tick: int) -> None:
        """A read that began at `tick` returned `content`: what had ended before is decided."""
        self._proven.add(block)
        now = self.now[block]
        if len(now) > 1:
            self.now[block] = [v for v in now if v.data == content or v.end > tick]
        stable = self.stable[block]
        if len(stable) > 1 and self.cut_at >= max(v.begin for v in stable):
            # nothing was written since the power cut: what is there is on the platter
            self.stable[block] = [v for v in stable if v.data == content]

    def crash(self, power: bool) -> None:
        tick = self.world.tick()
        for value in self.in_flight.values():
            value.end = tick
        self.in_flight.clear()
        self._reads.clear()
        self._proven.clear()
        if power:
            self.lose()
            self.cut_at = tick
            self.shaky = False

    def lose(self) -> None:
        """Storage forgot what was not flushed and nobody keeps; what was read since stays."""
        for block, values in enumerate(self.stable):
            if block not in self._proven:
                self.now[block] = list(values)
        for _, first, allowed in self._reads.values():
            for index, values in enumerate(allowed):
                values += (v for v in self.now[first + index] if v not in values)

    def check(self, content: bytes, what: str) -> str | None:
        """Return what is wrong with the content of the authority, at rest."""
        content = content[: self.size]
        for block, allowed in enumerate(self.now):
            found = content[block * BLOCK : (block + 1) * BLOCK]
            if not any(v.data == found for v in allowed):
                return f"{what}: block {block} holds {found.hex()}, allowed {allowed}"
        return None
