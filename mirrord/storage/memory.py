"""A disk in memory, for tests and benchmarks (`mem:NAME`).

Disks live in a `MemoryShelf`, which plays the file system: names, renames, identities, locks.
Nothing is durable, which `capabilities` says. What was never written is a hole, in blocks of
64 KiB, so sparse copies can be seen. All operations end at once; `close` has nothing to wait for.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from mirrord.core.geometry import KIB, Extent, Status, merge, split
from mirrord.errors import RefusedError
from mirrord.storage.backend import Backend, Buffer, Cache, Capabilities, Identity, Place

# As fine as a guest's file system allocates, coarse enough to walk.
BLOCK_BYTES = 64 * KIB

# Blocks that one `extents` answer walks: 256 MiB of disk, about a millisecond.
_EXTENT_BLOCKS_MAX = 4096

_ZEROES = bytes(BLOCK_BYTES)


@dataclass(eq=False)
class _Content:
    """What a name on the shelf leads to: the blocks that were written, by number."""

    size: int
    number: int
    made_by: str = ""  # the job that made it as its target
    blocks: dict[int, bytearray] = field(default_factory=dict)
    opened: bool = False


class MemoryShelf:
    """The names and contents of memory disks of one process."""

    def __init__(self) -> None:
        self._contents: dict[str, _Content] = {}
        self._last_number = 0

    def add(self, name: str, size: int) -> None:
        """Put a disk of zeroes on the shelf, as an operator would make a file."""
        if name in self._contents:
            raise FileExistsError(errno.EEXIST, "a memory disk of that name exists", name)
        self._last_number += 1
        self._contents[name] = _Content(size, self._last_number)

    def get(self, name: str) -> _Content | None:
        """Return what `name` leads to."""
        return self._contents.get(name)

    def rename(self, old: str, new: str) -> None:
        """Rename, never over an existing name."""
        if old not in self._contents:
            raise FileNotFoundError(errno.ENOENT, "no such memory disk", old)
        if new in self._contents:
            raise FileExistsError(errno.EEXIST, "a memory disk of that name exists", new)
        self._contents[new] = self._contents.pop(old)

    def remove(self, name: str) -> None:
        """Take a disk from the shelf; who has it open keeps it."""
        self._contents.pop(name, None)

    def names(self) -> list[str]:
        """Return every name, in order."""
        return sorted(self._contents)


SHELF = MemoryShelf()  # what `mem:NAME` of a running disk process means


def _identity(content: _Content) -> Identity:
    return Identity("memory", 0, content.number, content.size)


class MemoryBackend(Backend):
    """A disk in memory."""

    def __init__(self, content: _Content, name: str = "", *, read_only: bool = False) -> None:
        """Open `content`; `open_memory` makes one without a shelf."""
        self._content = content
        self._blocks = content.blocks
        self._read_only = read_only
        self._closed = False
        content.opened = True
        self.size = content.size
        self.name = name
        self.identity = _identity(content)
        self.capabilities = Capabilities(
            punches_holes=True, fast_zeroes=True, starts_zeroed=True, durable_flush=False
        )

    async def read(self, offset: int, length: int) -> Buffer:
        parts: list[Buffer] = []
        for at, count in split(offset, length, BLOCK_BYTES):
            block = self._blocks.get(at // BLOCK_BYTES)
            start = at % BLOCK_BYTES
            parts.append(_ZEROES[:count] if block is None else block[start : start + count])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        self._check_writable()
        view = memoryview(data)
        for at, count in split(offset, len(view), BLOCK_BYTES):
            start = at % BLOCK_BYTES
            self._block(at // BLOCK_BYTES)[start : start + count] = view[at - offset :][:count]

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, punch: bool = True, fast: bool = False
    ) -> None:
        self._check_writable()
        for at, count in split(offset, length, BLOCK_BYTES):
            number, start = divmod(at, BLOCK_BYTES)
            if punch and (count == BLOCK_BYTES or (at + count == self.size and not start)):
                self._blocks.pop(number, None)
            elif number in self._blocks or not punch:
                self._block(number)[start : start + count] = _ZEROES[:count]

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self.write_zeroes(offset, length)

    async def flush(self) -> None:
        self._check_open()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        stop = min(offset + length, offset + _EXTENT_BLOCKS_MAX * BLOCK_BYTES)
        return merge(
            Extent(at, count, Status.DATA if at // BLOCK_BYTES in self._blocks else Status.HOLE)
            for at, count in split(offset, stop - offset, BLOCK_BYTES)
        )

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._content.opened = False

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory that blocks take."""
        return len(self._blocks) * BLOCK_BYTES

    def _block(self, number: int) -> bytearray:
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = bytearray(BLOCK_BYTES)
        return block

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, "the disk is closed")

    def _check_writable(self) -> None:
        self._check_open()
        if self._read_only:
            raise OSError(errno.EROFS, "the disk is read-only")


def open_memory(size: int) -> MemoryBackend:
    """Return a disk of zeroes that is on no shelf."""
    return MemoryBackend(_Content(size, 0))


class MemoryPlace(Place):
    """A name on a shelf; the steps of a move as a directory would do them."""

    def __init__(self, name: str, shelf: MemoryShelf = SHELF) -> None:
        self.name = name
        self.location = f"mem:{name}"
        self._shelf = shelf

    async def open(self, *, read_only: bool = False, cache: Cache = Cache.WRITEBACK) -> Backend:
        content = self._shelf.get(self.name)
        if content is None:
            raise RefusedError("location-missing", f"{self.location} doesn't exist: create it")
        if content.opened:
            raise RefusedError("in-use", f"{self.location} is in use: detach it there first")
        return MemoryBackend(content, self.name, read_only=read_only)

    async def check_target(self, source: Backend, *, needed: int, force: bool = False) -> None:
        content = self._shelf.get(self.name)
        if content is None:
            return
        if source.identity.same_object(_identity(content)):
            raise RefusedError("target-is-source", f"{self.location} is the source itself")
        raise RefusedError("target-exists", f"{self.location} exists: name another target")

    async def create(self, job_id: str, source: Backend, *, cache: Cache) -> Backend:
        part = self._part(job_id)
        self._shelf.add(part, source.size)
        content = self._shelf.get(part)
        assert content is not None
        content.made_by = job_id
        return MemoryBackend(content, self.name)

    async def find(
        self, job_id: str, identity: Identity, *, cache: Cache, same_boot: bool = False
    ) -> Backend | None:
        for name in (self._part(job_id), self.name):
            content = self._shelf.get(name)
            if content is not None and _identity(content) == identity:
                return MemoryBackend(content, self.name)
        return None

    async def publish(self, job_id: str) -> None:
        if not self._is_published(job_id):
            self._shelf.rename(self._part(job_id), self.name)

    async def withdraw(self, job_id: str) -> None:
        if self._is_published(job_id):
            self._shelf.rename(self.name, self._part(job_id))

    async def discard(self, job_id: str, identity: Identity | None = None) -> None:
        await self.withdraw(job_id)  # the shelf remembers who made what
        self._shelf.remove(self._part(job_id))

    def _is_published(self, job_id: str) -> bool:
        content = self._shelf.get(self.name)
        return content is not None and content.made_by == job_id

    async def confirm(self, job_id: str, identity: Identity) -> str | None:
        content = self._shelf.get(self.name)
        if content is None or _identity(content) != identity:
            return f"the target {self.location} was replaced"
        return None

    async def retire(self, job_id: str, identity: Identity, *, wipe: bool = False) -> str | None:
        content = self._shelf.get(self.name)
        if content is None:
            return None
        if _identity(content) != identity:
            return f"{self.location} was replaced meanwhile"
        self._shelf.rename(self.name, self._retired(job_id))
        return None

    async def delete_retired(self, job_id: str, identity: Identity) -> None:
        self._shelf.remove(self._retired(job_id))

    def _part(self, job_id: str) -> str:
        return f".{self.name}.mirrord-{job_id}.part"

    def _retired(self, job_id: str) -> str:
        return f".{self.name}.mirrord-{job_id}.retired"
