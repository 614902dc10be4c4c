"""What may differ between source and target: the dirty bitmap and the intent map. Pure.

`DirtyBitmap` is fine (4 KiB) and says what to copy next. It lies in memory that is mapped over a
file, so it survives a kill of the process, but not a power cut. `IntentMap` is coarse (1 MiB
regions), is written through to storage, and is what may be believed after a power cut. Neither
moves data or writes a file; the engine does, and tells them.

Invariants of `DirtyBitmap`:

* `todo` is a subset of `mapped`. A block in `mapped` but not in `todo` is being copied, or its
  mirrored write is in flight.
* Every byte of the mapped memory goes from its old to its new value in one store, and a bit that
  must stay 1 is never 0 in between: the process may be killed between any two instructions.
* Bits behind the last block are 0.

The life of a block, and why a kill is harmless at each step:

    guest writes         mark, source write, mark     marked before the first byte can change
    copier               take, read, write, copied    stays in `mapped` until the target has it
    copy failed          put_back                     never left `mapped`
    write during a copy  mark sets `todo` again       `copied` leaves what `todo` has
    mirrored write       hold, both writes, unmark    stays in `mapped` until both sides have it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bitarray import bitarray

from mirrord.core.geometry import KIB, MIB, round_up

Pages = list[tuple[int, bytes]]

# Convergence depends on unique dirty bytes, and a guest's file system writes 4 KiB blocks.
GRANULARITY_MIN_BYTES = 4 * KIB
# Scanning 32 MiB takes 1 to 3 ms, the longest one step may hold the loop; 1 TiB at 4 KiB fits.
BITMAP_MAX_BYTES = 32 * MIB
# The intent map's writes are of this size, which storage writes whole.
PAGE_BYTES = 4 * KIB
PAGE_BITS = PAGE_BYTES * 8
REGION_BYTES = MIB


def granularity_for(size: int) -> int:
    """Return the bytes one bit covers: 4 KiB, doubled until the bitmap fits into 32 MiB."""
    granularity = GRANULARITY_MIN_BYTES
    while -(-size // granularity) > BITMAP_MAX_BYTES * 8:
        granularity *= 2
    return granularity


def bitmap_bytes_for(size: int) -> int:
    """Return how many bytes of buffer a `DirtyBitmap` of a disk of `size` bytes needs."""
    return -(-size // (granularity_for(size) * 8))


def map_bytes_for(size: int, region_bytes: int = REGION_BYTES) -> int:
    """Return the length of the intent map of a disk of `size` bytes: whole pages."""
    return -(-size // (region_bytes * PAGE_BITS)) * PAGE_BYTES


class DirtyBitmap:
    """The blocks at which the target may differ, over `buffer`, which outlives the process.

    What `buffer` already holds is believed: it is the state that a killed process left. Give
    zeroes for a clean start, or call `mark_all` or `clear`. The buffer stays in use as long as
    this object lives.

    Attributes (read only): `size` of the disk, `granularity`, `dirtied_bytes`: how much `mark`
    has ever added to what must be copied; its growth per second is the unique dirty rate.
    """

    __slots__ = ("_blocks", "_mapped", "_mapped_count", "_shift", "_todo", "_todo_count",
                 "dirtied_bytes", "granularity", "size")  # fmt: skip

    def __init__(self, size: int, buffer: memoryview | bytearray) -> None:
        if size <= 0:
            raise ValueError("a disk has at least one byte")
        needed = bitmap_bytes_for(size)
        if len(buffer) < needed:
            raise ValueError(f"the dirty bitmap needs {needed} bytes, the buffer has {len(buffer)}")
        self.size = size
        self.granularity = granularity_for(size)
        self.dirtied_bytes = 0
        self._shift = self.granularity.bit_length() - 1
        self._blocks = -(-size // self.granularity)
        self._mapped = bitarray(buffer=memoryview(buffer)[:needed], endian="little")
        self._mapped[self._blocks :] = 0
        self._todo = bitarray(self._mapped)
        self._mapped_count = self._todo_count = self._mapped.count()

    # -- guest writes

    def mark(self, offset: int, length: int) -> None:
        """Say that the guest writes here: call before the write starts and again when it ended.

        Costs about 0.1 µs for one block; called for every write of a tracked disk.
        """
        shift = self._shift
        first = offset >> shift
        if (offset + length - 1) >> shift != first:
            self._mark_blocks(first, ((offset + length - 1) >> shift) + 1)
        elif not self._todo[first]:  # what is in todo is in mapped: nothing to do
            if not self._mapped[first]:
                self._mapped[first] = 1
                self._mapped_count += 1
            self._todo[first] = 1
            self._todo_count += 1
            self.dirtied_bytes += self.granularity

    def _mark_blocks(self, first: int, stop: int) -> None:
        self.dirtied_bytes += self._set(first, stop) << self._shift

    def hold(self, offset: int, length: int) -> None:
        """Say that a mirrored write of clean blocks starts: a kill must find them, the copier not.

        Answer with `unmark` when both sides have it, with `mark` when they may differ.
        """
        first, stop = self._touched(offset, length)
        if stop - first > 1:
            self._mapped_count += stop - first - self._mapped.count(1, first, stop)
            self._mapped[first:stop] = 1
        elif not self._mapped[first]:
            self._mapped[first] = 1
            self._mapped_count += 1

    def unmark(self, offset: int, length: int, *, was_clean: bool = False) -> None:
        """Say that a mirrored write has ended well on both sides, so that they are equal here.

        A block that the range covers only in part was equal as a whole only if it was clean
        before: such blocks change only with `was_clean`, the answer that `clean` gave for the
        range before this write was marked. The caller's range lock must cover whole blocks.
        """
        first, stop = self._touched(offset, length) if was_clean else self._inside(offset, length)
        self._drop(first, stop)

    # -- the copier

    def take(self, cursor: int, length_max: int) -> tuple[int, int] | None:
        """Return the first (offset, length) to copy at or after `cursor`, None if there is none.

        The range is then the caller's, who answers with `copied` or `put_back`. It is whole
        blocks (the disk's last may be short), at most `length_max` but at least one block.
        """
        first = -1
        if self._todo_count and cursor < self.size:
            first = self._todo.find(1, cursor >> self._shift)
        if first < 0:
            return None
        limit = min(self._blocks, first + max(1, length_max >> self._shift))
        stop = self._todo.find(0, first, limit)
        if stop < 0:
            stop = limit
        self._todo[first:stop] = 0
        self._todo_count -= stop - first
        offset = first << self._shift
        return offset, min(self.size, stop << self._shift) - offset

    def take_chunk(self, cursor: int, chunk_bytes: int, runs_max: int) -> list[tuple[int, int]]:
        """Return the first run to copy at or after `cursor`, and those behind it in its chunk.

        As `take`, at most `runs_max`; none crosses the chunk's end but a larger block.
        """
        runs: list[tuple[int, int]] = []
        end = self.size
        while len(runs) < runs_max and self._todo_count and cursor < end:
            offset = self._todo.find(1, cursor >> self._shift) << self._shift
            if not 0 <= offset < end:
                break
            if not runs:
                end = min(end, offset - offset % chunk_bytes + chunk_bytes)
            runs += filter(None, [self.take(offset, round_up(end - offset, self.granularity))])
            cursor = sum(runs[-1])
        return runs

    def retake(self, offset: int, length: int) -> None:
        """Take once more what was taken: it was marked since, but nothing was read yet."""
        first, stop = self._inside(offset, length)
        self._todo_count -= self._todo.count(1, first, stop)
        self._todo[first:stop] = 0

    def put_back(self, offset: int, length: int) -> None:
        """Say that what was taken was not copied: it must be taken again."""
        self._set(*self._touched(offset, length))

    def copied(self, offset: int, length: int, keep: Iterable[tuple[int, int]] = ()) -> None:
        """Say that the target has what the source held at some moment since `take`.

        Blocks marked meanwhile stay. So do those of `keep`: (offset, length) of guest writes in
        flight now that don't go to the target; their second mark is still to come.
        """
        first, stop = self._inside(offset, length)
        if first >= stop:
            return
        stay = self._todo[first:stop]
        for kept_first, kept_stop in (self._touched(*kept) for kept in keep):
            if kept_first < stop and first < kept_stop:
                stay[max(0, kept_first - first) : min(stop, kept_stop) - first] = 1
        self._mapped_count -= self._mapped.count(1, first, stop)
        start = stay.find(0)
        while start >= 0:  # fills of runs, because storing a slice could shift bits in place
            end = stay.find(1, start)
            end = len(stay) if end < 0 else end
            self._mapped[first + start : first + end] = 0
            start = stay.find(0, end)
        self._mapped_count += self._mapped.count(1, first, stop)

    # -- questions

    def clean(self, offset: int, length: int) -> bool:
        """Tell whether source and target are known to be equal over the whole range."""
        return self._mapped.find(1, *self._touched(offset, length)) < 0

    def region_dirty(self, index: int, region_bytes: int) -> bool:
        """Tell whether the region has a block that may differ."""
        offset = index * region_bytes
        return not self.clean(offset, min(region_bytes, self.size - offset))

    def clean_regions(self, region_bytes: int) -> bitarray:
        """Return a bit for each region of the disk: 1 where no block may differ.

        The cost grows with the number of runs of dirty blocks and of dirty regions, whichever is
        less; a clean terabyte takes a scan of 1 to 3 ms.
        """
        clean = bitarray(-(-self.size // region_bytes), endian="little")
        clean.setall(1)
        first = self._mapped.find(1)
        while first >= 0:
            stop = self._mapped.find(0, first)
            stop = self._blocks if stop < 0 else min(stop, self._blocks)
            region = (first << self._shift) // region_bytes
            after = -(-(stop << self._shift) // region_bytes)
            clean[region:after] = 0
            beyond = max(stop, -(-after * region_bytes >> self._shift))
            first = self._mapped.find(1, beyond) if beyond < self._blocks else -1
        return clean

    def dirty(self) -> bool:
        """Tell whether any block may differ."""
        return self._mapped_count > 0

    def remaining(self) -> int:
        """Return how many bytes may differ: what is still to copy and what is being copied."""
        return self._bytes(self._mapped, self._mapped_count)

    def todo(self) -> int:
        """Return how many bytes `take` could still give out now."""
        return self._bytes(self._todo, self._todo_count)

    def runs(
        self, offset: int, length: int, runs_max: int | None = None
    ) -> list[tuple[int, int, bool]]:
        """Return (offset, length, dirty) that cover the range in order, dirty and clean in turn.

        With `runs_max` the answer may stop early.
        """
        end = offset + length
        runs: list[tuple[int, int, bool]] = []
        _, stop = self._touched(offset, length)
        while offset < end and (runs_max is None or len(runs) < runs_max):
            first = offset >> self._shift
            value = self._mapped[first]
            change = self._mapped.find(not value, first, stop)
            run_end = end if change < 0 else change << self._shift
            runs.append((offset, run_end - offset, bool(value)))
            offset = run_end
        return runs

    # -- the whole

    def mark_all(self) -> None:
        """Make every block one to copy: nothing is known about the target."""
        self._set(0, self._blocks)

    def clear(self) -> None:
        """Make every block clean: both sides are equal, or there is no target."""
        self._todo.setall(0)
        self._mapped[:] = 0
        self._mapped_count = self._todo_count = 0

    def reset(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Make exactly the blocks of `ranges` ((offset, length) in order) ones to copy.

        For recovery, when the buffer's content can't be believed. No block of `ranges` is clean at
        any moment, if the buffer came full of ones (as it does after a power cut).
        """
        stop = 0
        for offset, length in ranges:
            first, end = self._touched(offset, length)
            self._drop(stop, first)
            self._set(first, end)
            stop = end
        self._drop(stop, self._blocks)

    def validate(self) -> None:
        """Assert the invariants. For tests: it counts the whole bitmap."""
        assert self._mapped_count == self._mapped.count()
        assert self._todo_count == self._todo.count()
        assert not (self._todo & ~self._mapped).any(), "a block to copy is not mapped as dirty"
        assert not self._mapped[self._blocks :].any(), "a bit behind the last block is set"

    def _set(self, first: int, stop: int) -> int:
        """Set both bits of the blocks; return how many were not to be copied before."""
        added = stop - first - self._todo.count(1, first, stop)
        if added:
            self._mapped_count += stop - first - self._mapped.count(1, first, stop)
            self._mapped[first:stop] = 1
            self._todo[first:stop] = 1
            self._todo_count += added
        return added

    def _drop(self, first: int, stop: int) -> None:
        """Clear both bits of the blocks, if there are any."""
        if stop - first == 1:
            self._todo_count -= self._todo[first]
            self._mapped_count -= self._mapped[first]
            self._todo[first] = 0
            self._mapped[first] = 0
        elif first < stop:
            self._todo_count -= self._todo.count(1, first, stop)
            self._mapped_count -= self._mapped.count(1, first, stop)
            self._todo[first:stop] = 0
            self._mapped[first:stop] = 0

    def _touched(self, offset: int, length: int) -> tuple[int, int]:
        """Return the blocks [first, stop) of which the range has at least one byte."""
        first = offset >> self._shift
        return first, max(first, ((offset + length - 1) >> self._shift) + 1)

    def _inside(self, offset: int, length: int) -> tuple[int, int]:
        """Return the blocks [first, stop) that lie in the range whole; may be none."""
        end = offset + length
        stop = self._blocks if end >= self.size else end >> self._shift
        return -(-offset >> self._shift), stop

    def _bytes(self, bits: bitarray, count: int) -> int:
        missing = (self._blocks << self._shift) - self.size
        return (count << self._shift) - (missing if bits[self._blocks - 1] else 0)


class IntentMap:
    """The regions in which the target may differ after a power cut, and what of that is durable.

    R1  A guest write reaches the source only when the bit of each region it touches is 1
        *durably*. Only the first write of a clean region waits for that.
    R2  A bit is cleared only after a target flush that began after the region's last target
        write had ended, and never while a guest write to the region is in flight. Clearing needs
        no flush: a bit that is still 1 after a power cut costs a copy, nothing else.

    Two bits a region are kept: `wanted`, the map as it should be, and `durable`, set only while
    every version of the map that a power cut could leave has the region's bit. One writer serves
    everybody who waits (group commit):

        if not intent.marked(offset, length):       # the guest's write
            intent.want(offset, length)
            ...wake the writer, wait until marked...

        while pages := intent.pages():              # the writer: one at a time, ever
            ...write each page, durably...          # after a failure nothing is told: still wanted
            intent.made_durable(pages)

    A page is a copy of the map as it was when `pages` was called, so what is wanted later is not
    taken for durable. Lazily cleared bits go out with the next page, or by `cleared_pages`.

    A map made without `initial` (a new job, or one whose map was lost) is all ones, and nothing
    of it is durable until its pages were written: after `store.create(intent.content())` call
    `made_durable([(0, content)])`.
    """

    def __init__(
        self, size: int, region_bytes: int = REGION_BYTES, initial: bytes | None = None
    ) -> None:
        if size <= 0:
            raise ValueError("a disk has at least one byte")
        self.size = size
        self.region_bytes = region_bytes
        self.count = -(-size // region_bytes)
        length = map_bytes_for(size, region_bytes)
        self._wanted = bitarray(length * 8, endian="little")
        self._durable = bitarray(length * 8, endian="little")
        self._wanted.setall(0)
        self._durable.setall(0)
        self._pending: set[int] = set()  # pages with a bit that is wanted and not durable
        self._cleared: set[int] = set()  # pages whose stored version has a bit too many
        if initial is not None and len(initial) == length:
            self._wanted[:] = self._bits(initial)
            self._wanted[self.count :] = 0
            self._durable[:] = self._wanted
        else:
            self._wanted[: self.count] = 1
            self._pending = set(range(length // PAGE_BYTES))

    def regions(self, offset: int, length: int) -> range:
        """Return the indexes of the regions that the range touches."""
        return range(offset // self.region_bytes, -(-(offset + length) // self.region_bytes))

    def marked(self, offset: int, length: int) -> bool:
        """Tell whether a guest write here may go to the source: all its regions are durable."""
        first = offset // self.region_bytes
        last = (offset + length - 1) // self.region_bytes
        if first == last:
            return bool(self._durable[first])
        return self._durable.find(0, first, last + 1) < 0

    def want(self, offset: int, length: int) -> None:
        """Mark the range's regions. Not durable before `made_durable` says so."""
        regions = self.regions(offset, length)
        self._wanted[regions.start : regions.stop] = 1
        start = self._durable.find(0, regions.start, regions.stop)
        while start >= 0:
            page = start // PAGE_BITS
            self._pending.add(page)
            start = self._durable.find(0, (page + 1) * PAGE_BITS, regions.stop)

    def pages(self) -> Pages:
        """Return copies of the pages, as (offset, bytes), that must be written durably."""
        return [self._page(index) for index in sorted(self._pending)]

    def made_durable(self, pages: Pages) -> None:
        """Say that these pages are on storage, after a write and flush that both succeeded."""
        for offset, data in pages:
            stored = self._bits(data)
            start = offset * 8
            stop = start + len(stored)
            self._durable[start:stop] |= stored & self._wanted[start:stop]
            missing = self._wanted[start:stop] & ~self._durable[start:stop]
            for page in range(offset // PAGE_BYTES, stop // PAGE_BITS):
                first = page * PAGE_BITS - start
                if missing.find(1, first, first + PAGE_BITS) < 0:
                    self._pending.discard(page)
        self.written(pages)

    def clear(self, region: int) -> None:
        """Clear the region's bit; rule R2 is the caller's. Pays a durable write when wanted again.

        The bit stops counting as durable at once, because from now on a write may remove it.
        """
        self._wanted[region] = 0
        self._durable[region] = 0
        self._cleared.add(region // PAGE_BITS)

    def cleared_pages(self) -> Pages:
        """Return copies of the pages to write, without a flush, so that cleared bits go out."""
        return [self._page(index) for index in sorted(self._cleared)]

    def written(self, pages: Pages) -> None:
        """Say that these pages were written, durably or not."""
        for offset, data in pages:
            for start in range(0, len(data), PAGE_BYTES):
                index = (offset + start) // PAGE_BYTES
                if self._page(index)[1] == data[start : start + PAGE_BYTES]:
                    self._cleared.discard(index)

    def wanted(self, region: int) -> bool:
        """Tell whether the region's bit is set, durably or not yet."""
        return bool(self._wanted[region])

    def marked_regions(self) -> Iterator[int]:
        """Yield the indexes of marked regions, in order. The map may change meanwhile."""
        region = self._wanted.find(1)
        while region >= 0:
            yield region
            region = self._wanted.find(1, region + 1)

    def marked_bits(self) -> bitarray:
        """Return a copy of the map: a bit for each region, 1 where it is marked."""
        return self._wanted[: self.count]

    def marked_count(self) -> int:
        """Return how many regions are marked, of `count`."""
        return self._wanted.count()

    def ranges(self) -> list[tuple[int, int]]:
        """Return (offset, length) of the marked parts of the disk: what to copy after a power
        cut."""
        ranges = []
        start = self._wanted.find(1)
        while start >= 0:
            stop = self._wanted.find(0, start)
            stop = self.count if stop < 0 else stop
            offset = start * self.region_bytes
            ranges.append((offset, min(self.size, stop * self.region_bytes) - offset))
            start = self._wanted.find(1, stop)
        return ranges

    def content(self) -> bytes:
        """Return the whole map as it should be on storage."""
        return self._wanted.tobytes()

    def _page(self, index: int) -> tuple[int, bytes]:
        bits = self._wanted[index * PAGE_BITS : (index + 1) * PAGE_BITS]
        return index * PAGE_BYTES, bits.tobytes()

    @staticmethod
    def _bits(data: bytes) -> bitarray:
        bits = bitarray(endian="little")
        bits.frombytes(data)
        return bits
