"""A digest of each chunk as it was copied, and which chunks have been verified since.

A digest stands for "source and target hold this", so a guest's write forgets it, and the copier
sets it only when nothing wrote to the chunk while it was copied. A chunk without one is compared
by reading both sides. In memory only: after a restart every chunk is compared by reading.

Memory: 8 bytes a chunk, reserved at once and used only where something was copied (16 TiB in
1 MiB chunks: 128 MiB of address space).
"""

from __future__ import annotations

import mmap

from bitarray import bitarray

NONE = 0
COMPARING = 1  # no digest, but nothing was written since this mark was set


class Digests:
    """64-bit digests (XXH3) by chunk, as `of` makes them."""

    @staticmethod
    def of(digest: int) -> int:
        """Return the digest as it is kept: two values of 2**64 mean something else."""
        return digest if digest > COMPARING else digest + 2

    def __init__(self, size: int, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.size = size
        self.count = -(-size // chunk_bytes)
        self._memory = mmap.mmap(-1, max(1, self.count) * 8)
        self._digests = memoryview(self._memory).cast("Q")
        self._verified = bitarray(self.count)

    def forget(self, offset: int, length: int) -> None:
        """The range changed: its chunks have no digest and are not verified."""
        first = offset // self.chunk_bytes
        stop = (offset + length - 1) // self.chunk_bytes + 1
        if stop - first == 1:
            self._verified[first] = 0
            if self._digests[first]:
                self._digests[first] = 0
            return
        self._verified[first:stop] = 0
        for index in range(first, stop):
            if self._digests[index]:
                self._digests[index] = 0

    def set(self, index: int, digest: int) -> None:
        """Remember the digest of a chunk that is equal on both sides."""
        self._digests[index] = self.of(digest)

    def compare(self, index: int) -> None:
        """Mark a chunk without a digest that is about to be compared."""
        self._digests[index] = COMPARING

    def get(self, index: int) -> int:
        """Return the chunk's digest, COMPARING, or NONE."""
        return self._digests[index]

    def range_of(self, index: int) -> tuple[int, int]:
        """Return (offset, length) of a chunk; the last may be short."""
        offset = index * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.size - offset)

    def verified(self, index: int) -> None:
        """Remember that the chunk was compared and nothing wrote to it meanwhile."""
        self._verified[index] = 1

    def next_unverified(self, index: int) -> int:
        """Return the first unverified chunk at or after `index`, or -1."""
        return self._verified.find(0, index)

    def unverified(self) -> int:
        """Return how many chunks are not verified."""
        return self.count - self._verified.count()

    def restart(self) -> None:
        """Forget what was verified; digests stay."""
        self._verified.setall(0)
