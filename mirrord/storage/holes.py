"""Where a file has data and where it has none."""

from __future__ import annotations

import errno
import os

from mirrord.core.geometry import Extent, Status

# Data and hole pairs that one `extents` answer looks up; a look-up takes 1 to 4 us.
EXTENT_PAIRS_MAX = 512


def find_extents(descriptor: int, offset: int, end: int) -> list[Extent]:
    """Return the data and the holes from `offset` on, at most `EXTENT_PAIRS_MAX` of each. Blocks.

    Where the file system can't tell, everything is data.

    Raises:
        OSError: EIO where the file ends before `end`: what is gone is no hole.
    """
    if os.fstat(descriptor).st_size < end:
        raise OSError(errno.EIO, "the file is shorter now")
    extents: list[Extent] = []
    for _ in range(EXTENT_PAIRS_MAX):
        if offset >= end:
            break
        try:
            data = min(os.lseek(descriptor, offset, os.SEEK_DATA), end)
        except OSError as error:
            status = Status.HOLE if error.errno == errno.ENXIO else Status.DATA
            extents.append(Extent(offset, end - offset, status))
            break
        if data > offset:
            extents.append(Extent(offset, data - offset, Status.HOLE))
        if data < end:
            offset = min(os.lseek(descriptor, data, os.SEEK_HOLE), end)
            extents.append(Extent(data, offset - data, Status.DATA))
        else:
            offset = end
    return extents
