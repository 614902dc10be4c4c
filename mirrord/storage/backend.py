"""What stores a disk's bytes, as the engine sees it: `Backend` holds them, `Place` names them.

One conformance suite (`tests/storage/conformance.py`) runs against every backend. The engine
knows only this module; concrete backends are known to the composition root alone.

What a backend promises:

* A failure is an `OSError` with an errno. Nothing else is raised for trouble below.
* Completed means whole: short reads and writes are looped, an operation that moves nothing is
  EIO (CVE-2022-0485 is what happens otherwise).
* An operation that has started ends by itself. Cancelling the coroutine abandons the answer,
  never the operation: its memory stays alive, and `close` waits for it.
* Ranges are inside the disk: the door has checked them. Offsets and lengths need not be aligned;
  a backend that needs alignment (O_DIRECT) widens the range itself, and serialises what that
  makes overlap.
"""

from __future__ import annotations

import errno
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from mirrord.core.geometry import Extent

Buffer = bytes | bytearray | memoryview


class Hasher(Protocol):
    """What is fed with the bytes of a copy."""

    def update(self, data: Buffer, /) -> None: ...


class Watch:
    """Tells since when one side owes an answer: a context around every wait for it.

    `due_s` is when `clock` has it overdue, and infinite while nothing is waited for. Whoever waits
    may be a thread; whoever looks, another. `given_up` tells that nobody waits any more.
    """

    __slots__ = ("_clock", "_limit_s", "due_s", "given_up")

    def __init__(self, limit_s: float, clock: Callable[[], float]) -> None:
        self.due_s = math.inf
        self.given_up = False
        self._limit_s = limit_s
        self._clock = clock

    def __enter__(self) -> None:
        self.due_s = self._clock() + self._limit_s

    def __exit__(self, *_: object) -> None:
        self.due_s = math.inf


class UnreachableError(OSError):
    """The storage could not be reached in time, and nothing that it acknowledged is lost.

    Unlike any other failure of a flush, this one says nothing about what was written: the flush
    may be asked for again.
    """

    def __init__(self, why: str) -> None:
        super().__init__(errno.ETIMEDOUT, why)


class Cache(Enum):
    """How a file or device is opened."""

    WRITEBACK = "writeback"  # through the page cache
    DIRECT = "direct"  # O_DIRECT, past it


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What is real about a backend, found out by trying, never assumed."""

    punches_holes: bool  # trim and write_zeroes(punch=True) give storage back
    fast_zeroes: bool  # write_zeroes is faster than writing zeroes
    starts_zeroed: bool  # a newly created one reads as zeroes everywhere
    durable_flush: bool  # after flush, what was written survives a power cut


@dataclass(frozen=True, slots=True)
class Identity:
    """Which thing this is, whatever its name: for "the same file?" and for the journal."""

    kind: str  # file, block, memory
    device: int  # st_dev of a file, st_rdev of a block device
    inode: int  # 0 for a block device
    size: int  # bytes
    born_ns: int = 0  # when a file was made, 0 if unknown: inode numbers are used again
    serial: str = ""  # what a block device is called by its maker or making, "" if unknown

    def same_object(self, other: Identity) -> bool:
        """Tell whether both are one object, by numbers that hold within one boot."""
        return (self.kind, self.device, self.inode) == (other.kind, other.device, other.inode)

    def is_still(self, found: Identity, *, same_boot: bool = False) -> bool:
        """Tell whether `found` is this object, met again; what nobody knows isn't held against it.

        A file is known by inode, size and birth: device numbers may change over a boot or a
        mount (btrfs). A block device is known by its serial, else, on the same boot, by its
        number; over a boot one without a serial can't be told from another of its size.
        """
        if (self.kind, self.inode, self.size) != (found.kind, found.inode, found.size):
            return False
        if self.kind == "block":
            if self.serial and found.serial:
                return self.serial == found.serial
            return not same_boot or self.device == found.device
        return self.born_ns == found.born_ns or 0 in (self.born_ns, found.born_ns)


class Backend(ABC):
    """An open disk: bytes at offsets.

    `size` is in bytes and never changes. All methods may be called concurrently; the order of
    overlapping operations in flight is not defined (the engine's range locks see to that).
    """

    size: int
    name: str = ""  # what a directory as target calls it, empty when it has no name
    capabilities: Capabilities
    identity: Identity
    # Whether the guest depends on this side; the door sets it. A file may then hold the loop up
    # for a small write, which the guest waits for anyway; a share waits for its server.
    authoritative: bool = False
    # Whether it may lose what was not flushed while this host goes on, as another machine does.
    # This object sees to that while it lives; a process that comes later can't know of it.
    forgets: bool = False

    @abstractmethod
    async def read(self, offset: int, length: int) -> Buffer:
        """Return exactly `length` bytes. The buffer is the caller's and never changes."""

    @abstractmethod
    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write all of `data`, which must not change until this returns.

        With `fua` the data is durable on return.
        """

    def begin_write(
        self, offset: int, data: Buffer, ended: Callable[[OSError | None], None]
    ) -> bool:
        """Begin what `write` does, if that goes without waiting for anything.

        `ended` is called from the loop, once, after this call has returned; it must not raise.
        `data` may change once this has returned. Return False, having begun nothing, where only
        `write` works.
        """
        return False

    @abstractmethod
    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, punch: bool = True, fast: bool = False
    ) -> None:
        """Make the range read as zeroes.

        With `punch` storage may be given back, else it stays or becomes allocated. With `fast`,
        raise ENOTSUP at once, changing nothing, when this can't beat writing zeroes.
        """

    @abstractmethod
    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Give the range's storage back. Afterwards it reads as zeroes.

        (NBD leaves the content undefined; zeroes on every backend keep two sides comparable.)
        """

    @abstractmethod
    async def flush(self) -> None:
        """Make every write that completed before this call durable.

        After a failure nothing written since the last good flush may be believed durable, and a
        second flush proves nothing (the page cache forgets: "Can Applications Recover from fsync
        Failures?", Rebello et al., USENIX ATC 2020).
        """

    @abstractmethod
    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Return extents that cover the range from `offset` on, in order, at least one.

        Statuses are DATA, ZERO or HOLE. The answer may stop early (bounded work), never late;
        "DATA" is always a safe answer.
        """

    @abstractmethod
    async def close(self) -> None:
        """Wait for operations in flight, then release everything, locks included. Idempotent."""

    async def read_stored(self, offset: int, length: int) -> Buffer:
        """Read what the storage holds, not what a cache in this machine remembers.

        Call `flush` first. Backends without a cache of their own just read.
        """
        return await self.read(offset, length)

    async def read_once(self, offset: int, length: int) -> Buffer:
        """Read as `read` does what nobody is expected to want again soon.

        A cache in this machine keeps of it what it held before, so that what a guest keeps warm
        isn't pushed out by a copy.
        """
        return await self.read(offset, length)

    async def digests_stored(self, runs: Sequence[tuple[int, int]]) -> list[int] | None:
        """Return the XXH3-64 of what `read_stored` would read of each (offset, length).

        None where nothing is won by it.
        """
        return None

    async def write_once(self, offset: int, data: Buffer) -> None:
        """Write as `write` does what nobody is expected to want again soon.

        A cache in this machine need not keep it, and begins at once to hand it on.
        """
        await self.write(offset, data)

    async def copy_from(self, source: Backend, offset: int, length: int) -> bool:
        """Copy the range from `source` without moving it through this process, if that works.

        Return False, having changed nothing that matters, where it doesn't (another file system,
        another kind of backend): then read and write.
        """
        return False

    async def carry_from(
        self,
        source: Backend,
        runs: Sequence[tuple[int, int]],
        hasher: Hasher | None,
        watch: Watch,
    ) -> int | None:
        """Copy (offset, length) from `source` in this process, but beside its loop, if that works.

        Return how much of it wasn't zeroes; those leave holes where there can be some. `hasher`
        has had every byte then, and some of them after an error. `watch` sees whatever this is
        asked for, but not what the source is. Return None, having done nothing, where it doesn't
        work: then read and write.
        """
        return None

    def copies_from(self, source: Backend) -> bool:
        """Tell whether `copy_from` is so much better that a verified copy uses it, too, and
        compares both sides afterwards: the bytes stay inside one server."""
        return False

    def facts(self) -> dict[str, object] | None:
        """Return what `show` says about a connection; None where there is none."""
        return None

    def forget_cache(self, offset: int, length: int) -> None:
        """Hint: nobody will read this range soon; give its clean page cache back."""
        return

    async def warm_from(self, source: Backend, runs: Sequence[tuple[int, int]]) -> int:
        """Read into a cache of this machine each (offset, length) of which it has some of `source`.

        Return how many bytes that was: 0 where there is no such cache. They begin where a page
        does, and are at most 1 MiB.
        """
        return 0

    async def check_unchanged(self) -> None:
        """Raise `OSError` (ESTALE) when the size was changed behind our back."""
        return

    async def has_its_name(self) -> bool:
        """Tell whether what is open still lies where it was opened, as far as that is asked here.

        The daemon looks at paths itself. Raises `OSError`: it isn't known.
        """
        return True


class Place(ABC):
    """A name under which a disk's bytes lie, or will lie.

    Making one touches nothing. Names are resolved once, at the first use; after that the parent
    directory's descriptor is held and the path is never resolved again. The durable steps of a
    move are methods here, so that the cutover reads the same for a file and a block device.
    Everything that refuses raises `RefusedError` and leaves no trace.
    """

    location: str  # canonical, as shown to users and written to the journal

    @abstractmethod
    async def open(self, *, read_only: bool = False, cache: Cache = Cache.WRITEBACK) -> Backend:
        """Open the existing disk and lock it against another opener (code `in-use`)."""

    @abstractmethod
    async def check_target(self, source: Backend, *, needed: int, force: bool = False) -> None:
        """Refuse what can't become a target of `source`: it exists, is the source, is too small,
        has no room for `needed` bytes (unless `force`), its directory is missing or read-only."""

    @abstractmethod
    async def create(self, job_id: str, source: Backend, *, cache: Cache) -> Backend:
        """Create the target under its temporary name, of the source's size, reading as zeroes
        where `starts_zeroed`; owner, mode, SELinux label and extended attributes are the
        source's. Durable on return (the file and its directory entry)."""

    @abstractmethod
    async def find(
        self, job_id: str, identity: Identity, *, cache: Cache, same_boot: bool = False
    ) -> Backend | None:
        """Open the target of an unfinished job again, under its temporary or its final name.

        None when neither name leads to what `identity` tells of (`Identity.is_still`), or when
        that can't be told: a block device without a serial, over a boot. `same_boot` says that
        the identity was written down on this boot. Makes the directory durable first (rule
        R12)."""

    @abstractmethod
    async def publish(self, job_id: str) -> None:
        """Give the target its final name, never over an existing one; durable on return.
        Idempotent. Raises `FileExistsError` when something took the name meanwhile."""

    @abstractmethod
    async def withdraw(self, job_id: str) -> None:
        """Take the final name back: the opposite of `publish`. Idempotent, durable."""

    @abstractmethod
    async def discard(self, job_id: str, identity: Identity | None = None) -> None:
        """Delete the target of a job that was not committed, under either name, if it is the one
        this job created. Idempotent, durable. A block device is only released.

        A place that neither created nor found the target knows it under its final name only by
        `identity`; without that it deletes the temporary name alone."""

    @abstractmethod
    async def confirm(self, job_id: str, identity: Identity) -> str | None:
        """Look once more, by a fresh look-up of the final name, before the source is deleted.

        Return None when the name leads to the object of `identity`, of that size and readable,
        else what is wrong. Never raises for those."""

    @abstractmethod
    async def retire(self, job_id: str, identity: Identity, *, wipe: bool = False) -> str | None:
        """First half of deleting a source: rename it aside, after every check. Durable.

        Return None when it was done (or had been), else why the source is kept: it was replaced,
        has another hard link, or another program has it open. Never raises for those.
        """

    @abstractmethod
    async def delete_retired(self, job_id: str, identity: Identity) -> None:
        """Second half: unlink what `retire` renamed, and make that durable. Idempotent."""
