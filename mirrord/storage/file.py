"""A disk in a regular file: holes, reflinks, and the notice that somebody changed its size.

What is common with block devices (the page cache, O_DIRECT, unaligned ranges) is in
`descriptor`. The name and everything that is done with it is `FilePlace`, in `file_place`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import stat
import struct
from dataclasses import dataclass, replace

from mirrord.core.geometry import Extent, Status
from mirrord.storage import durable
from mirrord.storage.backend import Backend, Cache, Capabilities, Identity
from mirrord.storage.carrying import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, Side
from mirrord.storage.descriptor import DescriptorBackend
from mirrord.storage.fileio import FileIo
from mirrord.storage.holes import HoleFinder
from mirrord.storage.memory_pool import PAGE_BYTES

# What the kernel may want O_DIRECT to be aligned to, smallest first.
DIRECT_UNITS = (512, 1024, 2048, PAGE_BYTES)

# NFS, CIFS and Ceph: copy_file_range(2) has their server copy. Elsewhere it goes through the page
# cache of this machine like read and write, but fills it, which costs more than it spares.
COPYING_SERVERS = frozenset({0x6969, 0xFF534D42, 0xFE534D42, 0x00C36400})

_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")  # descriptor, offset, length, target offset

# What the kernel says where a range can't be copied below: not the same file system (EXDEV), no
# such operation (EOPNOTSUPP, ENOSYS, ENOTTY), not whole blocks (EINVAL), a swap file (ETXTBSY).
_NOT_BELOW = frozenset(
    {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.ETXTBSY}
)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What `examine` found out about an open file."""

    identity: Identity
    capabilities: Capabilities
    unit_bytes: int


def examine(descriptor: int, cache: Cache, *, read_only: bool) -> FileFacts:
    """Find out by trying what an open regular file can do. Blocks."""
    punches = not read_only and _punches(descriptor)
    return FileFacts(
        identity=identify(descriptor),
        capabilities=Capabilities(
            punches_holes=punches,
            fast_zeroes=punches,
            starts_zeroed=True,
            durable_flush=not durable.is_volatile(descriptor),
        ),
        unit_bytes=find_unit(descriptor) if cache is Cache.DIRECT else PAGE_BYTES,
    )


def identify(descriptor: int) -> Identity:
    """Return the identity of an open file. O_PATH descriptors will do."""
    status = os.fstat(descriptor)
    born_ns = durable.birth_ns(descriptor)
    return Identity("file", status.st_dev, status.st_ino, status.st_size, born_ns)


def find_unit(descriptor: int) -> int:
    """Return what O_DIRECT wants offsets and lengths to be multiples of. Blocks.

    Raises:
        OSError: EINVAL when no unit is accepted, EIO and others when reading fails.
    """
    with mmap.mmap(-1, PAGE_BYTES) as page, memoryview(page) as view:
        for unit in DIRECT_UNITS:
            try:
                os.preadv(descriptor, [view[:unit]], 0)
            except OSError as error:
                if error.errno != errno.EINVAL or unit == DIRECT_UNITS[-1]:
                    raise
            else:
                return unit
    raise AssertionError("unreachable")


def _punches(descriptor: int) -> bool:
    """Try a hole behind the end of the file, where nothing is."""
    size = os.fstat(descriptor).st_size
    end = -(-size // PAGE_BYTES) * PAGE_BYTES
    try:
        durable.fallocate(descriptor, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, end, PAGE_BYTES)
    except OSError:
        return False
    return True


class FileBackend(DescriptorBackend):
    """A disk in a regular file."""

    def __init__(
        self,
        descriptor: int,
        io: FileIo,
        facts: FileFacts,
        *,
        cache: Cache,
        name: str = "",
        read_only: bool = False,
    ) -> None:
        """Take over an open, locked descriptor, as `examine` found it to be."""
        super().__init__(
            descriptor,
            io,
            identity=facts.identity,
            capabilities=facts.capabilities,
            cache=cache,
            unit_bytes=facts.unit_bytes,
            name=name,
            read_only=read_only,
        )
        self._holes = HoleFinder(descriptor)
        self._has_server = durable.file_system_of(descriptor) in COPYING_SERVERS
        self._no_clone_from: set[int] = set()  # devices whose files can't be cloned to here

    def _side(self) -> Side:
        return replace(super()._side(), holes=self._holes)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        end = offset + length
        if self._holes.known.end(offset) >= end:  # a call of a thread costs more than the look
            return [Extent(offset, length, Status.DATA)]
        return await self._own(self._io.call(self._holes.find, offset, end))

    async def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        done = await super()._fallocate(mode, offset, length)
        self._holes.known.forget(offset, length)
        return done

    async def copy_from(self, source: Backend, offset: int, length: int) -> bool:
        """Share the source's blocks (reflink), else have the file server copy them.

        Reflinks are tried first, and need whole blocks of the file system or the file's end.
        """
        if not isinstance(source, FileBackend):
            return False
        copying = self._task(self._io.call(self._copy_below, source, offset, length))
        source.lend_to(copying)
        done = await asyncio.shield(copying)
        self._holes.known.forget(offset, length)  # the source's may have come with it
        return done

    def _copy_below(self, source: FileBackend, offset: int, length: int) -> bool:
        device = source.identity.device
        if device not in self._no_clone_from:
            try:
                span = _CLONE_RANGE.pack(source._descriptor, offset, length, offset)
                fcntl.ioctl(self._descriptor, _FICLONERANGE, span)
                return True
            except OSError as error:
                if error.errno not in _NOT_BELOW:
                    raise
                if error.errno != errno.EINVAL:
                    self._no_clone_from.add(device)
        if self._direct or source._direct or not self._has_server:
            return False
        done = 0
        while done < length:
            at = offset + done
            try:
                moved = os.copy_file_range(
                    source._descriptor, self._descriptor, length - done, at, at
                )
            except OSError as error:
                if error.errno in _NOT_BELOW:
                    return False
                raise
            if moved == 0:
                raise OSError(errno.EIO, "nothing was moved: the source is shorter now")
            done += moved
        return True

    async def check_unchanged(self) -> None:
        status = await self._own(self._io.call(os.fstat, self._descriptor))
        if status.st_size != self.size or not stat.S_ISREG(status.st_mode):
            raise OSError(
                errno.ESTALE,
                f"somebody changed the size from {self.size} to {status.st_size} bytes",
            )

    def copy_attributes_to(self, descriptor: int) -> None:
        """Give another open file the attributes of this one. Blocks."""
        durable.copy_attributes(self._descriptor, descriptor)
