"""Where a file has data and where it has none."""

from __future__ import annotations

import errno
import os

from mirrord.core.geometry import Extent, Status

# Data and hole pairs that one answer has; a look-up takes 1 to 4 us.
EXTENT_PAIRS_MAX = 512


class KnownData:
    """The data that was found last.

    A look for the next hole goes through all data before it, page by page or extent by extent: who
    walks through a disk and asks at each step has everything looked at again and again. So where
    data ends is remembered. What has become a hole meanwhile, and wasn't told of, is called data:
    to copy or compare it is never wrong.
    """

    def __init__(self) -> None:
        self._run = (0, 0)  # begin and end
        self.holes_made = 0  # so many were told of

    def end(self, offset: int) -> int:
        """Return where the data at `offset` ends; `offset` if none is known to be there."""
        begin, end = self._run
        return end if begin <= offset < end else offset

    def found(self, begin: int, end: int, since: int) -> None:
        """Remember data that was looked for when `holes_made` was `since`."""
        if since == self.holes_made:
            self._run = begin, end

    def forget(self, offset: int, length: int) -> None:
        """Take note of what may have become a hole."""
        self.holes_made += 1
        begin, end = self._run
        if offset < end and begin < offset + length:
            self._run = begin, max(begin, offset)


class HoleFinder:
    """Finds the holes of one open file, for whoever asks, in any thread."""

    def __init__(self, descriptor: int) -> None:
        """`known` is to be told of holes that are made."""
        self.known = KnownData()
        self._descriptor = descriptor

    def find(self, offset: int, end: int) -> list[Extent]:
        """Return data and holes from `offset` on, at most `EXTENT_PAIRS_MAX` of each. Blocks.

        Where the file system can't tell, everything is data.

        Raises:
            OSError: EIO where the file ends before `end`: what is gone is no hole.
        """
        if os.fstat(self._descriptor).st_size < end:
            raise OSError(errno.EIO, "the file is shorter now")
        extents: list[Extent] = []
        for _ in range(EXTENT_PAIRS_MAX):
            if offset >= end:
                break
            try:
                data, stop = self._next_data(offset, end)
            except OSError as error:
                status = Status.HOLE if error.errno == errno.ENXIO else Status.DATA
                extents.append(Extent(offset, end - offset, status))
                break
            if data > offset:
                extents.append(Extent(offset, data - offset, Status.HOLE))
            if stop > data:
                extents.append(Extent(data, stop - data, Status.DATA))
            offset = stop
        return extents

    def _next_data(self, offset: int, end: int) -> tuple[int, int]:
        """Return where the first data from `offset` on begins and ends, as far as `end`."""
        stop = self.known.end(offset)
        if stop > offset:
            return offset, min(stop, end)
        since = self.known.holes_made
        data = os.lseek(self._descriptor, offset, os.SEEK_DATA)
        if data >= end:
            return end, end
        stop = os.lseek(self._descriptor, data, os.SEEK_HOLE)
        self.known.found(data, stop, since)
        return data, min(stop, end)
