"""A digest of each chunk as it was copied, and which chunks have been verified since.

A digest stands for "source and target hold this", so a guest's write forgets it, and the copier
sets it only when nothing wrote to the chunk while it was copied. A chunk without one is compared
by reading both sides. In memory only: after a restart every chunk is compared by reading.

Memory: 8 bytes a chunk, reserved at once and used only where something was copied (16 TiB in
1 MiB chunks: 128 MiB of address space).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from bitarray import bitarray
from xxhash import xxh3_64

NONE = 0
COMPARING = 1  # no digest, but nothing was written since this mark was set


class Watched:
    """Chunks that are compared as one. `untouched` says that nothing was written since."""

    __slots__ = ("chunks", "untouched")

    def __init__(self, chunks: range) -> None:
        self.chunks = chunks
        self.untouched = True


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
        self._watched: list[Watched] = []

    def forget(self, offset: int, length: int) -> None:
        """The range changed: its chunks have no digest and are not verified."""
        first = offset // self.chunk_bytes
        stop = (offset + length - 1) // self.chunk_bytes + 1
        for watched in self._watched:
            if first < watched.chunks.stop and watched.chunks.start < stop:
                watched.untouched = False
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

    def inside(self, offset: int, length: int) -> range:
        """Return the chunks that lie in a range as a whole; may be none."""
        end = offset + length
        stop = self.count if end >= self.size else end // self.chunk_bytes
        return range(-(-offset // self.chunk_bytes), stop)

    def watch(self, chunks: range) -> Watched:
        """Notice from now on whether something of the chunks is forgotten, until `settle`."""
        self._watched.append(Watched(chunks))
        return self._watched[-1]

    def settle(self, watched: Watched, *, verified: bool) -> None:
        """End a watch; if that is so, remember all its chunks as verified."""
        self._watched.remove(watched)
        if verified:
            self._verified[watched.chunks.start : watched.chunks.stop] = 1

    def unverified_bits(self) -> bitarray:
        """Return a bit for each chunk, set for those that are not verified now."""
        return ~self._verified

    def unverified(self) -> int:
        """Return how many chunks are not verified."""
        return self.count - self._verified.count()

    def restart(self) -> None:
        """Forget what was verified; digests stay."""
        self._verified.setall(0)


class ChunkHasher:
    """Takes the digests of those chunks that (offset, length) of a copy cover as a whole.

    It is fed with every byte of the runs, in order. `found` has the digest of each chunk by then.
    """

    def __init__(self, digests: Digests, runs: Sequence[tuple[int, int]]) -> None:
        self.found: dict[int, int] = {}
        # (chunk, bytes) of what will come; the chunk is -1 for what belongs to none.
        self._parts: list[tuple[int, int]] = []
        for offset, length in runs:
            end = offset + length
            while offset < end:
                index = offset // digests.chunk_bytes
                start, whole = digests.range_of(index)
                part = min(end, start + whole) - offset
                self._parts.append((index if part == whole else -1, part))
                offset += part
        self.wanted = any(index >= 0 for index, _ in self._parts)
        self._parts.reverse()
        self._hash = xxh3_64()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take what comes next."""
        view = memoryview(data)
        while view:
            index, left = self._parts.pop()
            part, view = view[:left], view[left:]
            if index >= 0:
                self._hash.update(part)
            if len(part) < left:
                self._parts.append((index, left - len(part)))
            elif index >= 0:
                self.found[index] = self._hash.intdigest()
                self._hash.reset()
