"""Which regions of a side were written since its last good flush."""

from __future__ import annotations

from bitarray import bitarray


class Unflushed:
    """A bit a region. A bit goes only when a flush that began after the region's last write had
    ended has ended well: a flush under way, one that failed and one that was abandoned prove
    nothing. Several flushes may be under way."""

    def __init__(self, count: int, initial: bitarray | None = None) -> None:
        self.bits = bitarray(count, endian="little") if initial is None else initial
        self._since: dict[int, bitarray] = {}  # what ended since each flush began
        self._next = 0

    def wrote(self, regions: slice) -> None:
        """Say that a write to the regions has ended."""
        self.bits[regions] = 1
        for since in self._since.values():
            since[regions] = 1

    def begin(self) -> int:
        """Say that a flush begins; answer with `end`."""
        self._next += 1
        self._since[self._next] = bitarray(len(self.bits), endian="little")
        return self._next

    def end(self, flush: int, *, good: bool) -> None:
        """Say how a flush ended."""
        since = self._since.pop(flush)
        if good:
            self.bits &= since

    def clear(self) -> None:
        """Forget everything: it is remembered elsewhere now."""
        self.bits.setall(0)
