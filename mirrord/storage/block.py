"""A disk on a block device (a LUN, a logical volume, a partition).

The device is opened O_EXCL: refused while it is mounted, part of another device, or claimed by
another exclusive opener. What it can do is read from sysfs, never found out by trying, since a
try would change it; its content is never looked at, and nothing is ever formatted.

A device is not created, renamed or deleted, so most steps of a move do nothing: retiring one
only releases it, unless it shall be wiped. The disk may be smaller than the device it lies on;
what is behind its end is left alone.

`location` stays the name that was given (`/dev/disk/by-id/…`), since the kernel's names and
numbers (`/dev/sdb`, 8:16) change over a boot.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass, replace

from mirrord.core.geometry import MIB, split
from mirrord.core.units import format_bytes
from mirrord.errors import RefusedError
from mirrord.storage.backend import Backend, Cache, Capabilities, Identity, Place
from mirrord.storage.descriptor import DescriptorBackend
from mirrord.storage.fileio import FileIo
from mirrord.storage.memory_pool import PAGE_BYTES
from mirrord.storage.names import NotADiskError, check_name, open_inode, reopen

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268

# A wipe goes in steps, so that a cancelled one ends soon: 64 MiB take a slow disk half a second.
_WIPE_STEP_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the kernel says about an open block device."""

    identity: Identity
    capabilities: Capabilities
    unit_bytes: int  # logical block: the least that can be read or written


def examine_device(descriptor: int) -> DeviceFacts:
    """Ask the kernel about an open block device. Blocks."""
    number = os.fstat(descriptor).st_rdev
    (size,) = struct.unpack("Q", fcntl.ioctl(descriptor, _BLKGETSIZE64, bytes(8)))
    (unit,) = struct.unpack("i", fcntl.ioctl(descriptor, _BLKSSZGET, bytes(4)))
    zeroes = _queue_limit(number, "write_zeroes_max_bytes") > 0
    return DeviceFacts(
        identity=Identity("block", number, 0, size),
        capabilities=Capabilities(
            punches_holes=zeroes and _queue_limit(number, "discard_max_bytes") > 0,
            fast_zeroes=zeroes,
            starts_zeroed=False,
            durable_flush=True,
        ),
        unit_bytes=unit,
    )


def _queue_limit(number: int, name: str) -> int:
    """Read a limit of the device's queue, which for a partition is its disk's; 0 if unknown."""
    device = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for directory in (device, os.path.dirname(device)):
        try:
            with open(f"{directory}/queue/{name}", encoding="ascii") as limit:
                return int(limit.read())
        except (FileNotFoundError, NotADirectoryError):
            continue
    return 0


class BlockBackend(DescriptorBackend):
    """A disk on a block device, or on the beginning of one."""

    def __init__(
        self,
        descriptor: int,
        io: FileIo,
        facts: DeviceFacts,
        *,
        cache: Cache,
        name: str = "",
        read_only: bool = False,
    ) -> None:
        """Take over an open descriptor, as `examine_device` found it to be."""
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
        # The kernel refuses to zero parts of blocks, at the disk's end as elsewhere.
        self._zero_unit = PAGE_BYTES if self._direct else facts.unit_bytes
        self._zeroes_any_end = False
        self._zeroes_ranges = True  # the kernel writes them itself where the device can't

    async def check_unchanged(self) -> None:
        facts = await self._io.call(examine_device, self._descriptor)
        if facts.identity.size < self.size:
            raise OSError(
                errno.ESTALE,
                f"the device shrank from {self.size} to {facts.identity.size} bytes",
            )


class BlockPlace(Place):
    """A block device by its name."""

    def __init__(self, location: str, io: FileIo, *, size: int | None = None) -> None:
        """Touch nothing. With `size` the disk is the device's first `size` bytes."""
        self.location = os.path.abspath(location)
        self._io = io
        self._size = size
        check_name(self.location)

    async def open(self, *, read_only: bool = False, cache: Cache = Cache.WRITEBACK) -> Backend:
        descriptor, facts = await self._io.call(self._open, read_only, cache)
        size = facts.identity.size if self._size is None else self._size
        if size > facts.identity.size or size == 0:
            await self._io.call(os.close, descriptor)
            raise RefusedError(
                "empty" if size == 0 else "target-too-small",
                f"{self.location} holds {facts.identity.size} bytes, the disk has {size}:"
                " look whether it is the right device",
            )
        return self._adopt(descriptor, facts, size, cache, read_only)

    async def check_target(self, source: Backend, *, needed: int, force: bool = False) -> None:
        await self._io.call(self._check_target, source)

    async def create(self, job_id: str, source: Backend, *, cache: Cache) -> Backend:
        await self._io.call(self._check_target, source)
        descriptor, facts = await self._io.call(self._open, False, cache)
        return self._adopt(descriptor, facts, source.size, cache)

    async def find(self, job_id: str, identity: Identity, *, cache: Cache) -> Backend | None:
        try:
            descriptor, facts = await self._io.call(self._open, False, cache)
        except RefusedError as error:
            if error.code == "location-missing":
                return None
            raise
        if facts.identity.size < identity.size:
            await self._io.call(os.close, descriptor)
            return None
        return self._adopt(descriptor, facts, identity.size, cache)

    async def publish(self, job_id: str) -> None:
        """Do nothing: a device has its name."""

    async def withdraw(self, job_id: str) -> None:
        """Do nothing: a device keeps its name."""

    async def discard(self, job_id: str) -> None:
        """Do nothing: the device was released when its backend was closed."""

    async def confirm(self, job_id: str, identity: Identity) -> str | None:
        return await self._io.call(self._confirm, identity)

    async def retire(self, job_id: str, identity: Identity, *, wipe: bool = False) -> str | None:
        if not wipe:
            return None
        try:
            descriptor, facts = await self._io.call(self._open, False, Cache.WRITEBACK)
        except RefusedError as error:
            return f"not wiped: {error}"
        backend = self._adopt(descriptor, facts, facts.identity.size, Cache.WRITEBACK)
        try:
            if facts.identity.size < identity.size or facts.identity.device != identity.device:
                return f"not wiped: {self.location} is another device now"
            for offset, length in split(0, identity.size, _WIPE_STEP_BYTES):
                await backend.write_zeroes(offset, length)
            await backend.flush()
        except OSError as error:
            return f"not wiped: {self.location} failed ({error.strerror})"
        finally:
            await backend.close()
        return None

    async def delete_retired(self, job_id: str, identity: Identity) -> None:
        """Do nothing: a device isn't deleted."""

    def _adopt(
        self,
        descriptor: int,
        facts: DeviceFacts,
        size: int,
        cache: Cache,
        read_only: bool = False,
    ) -> BlockBackend:
        facts = replace(facts, identity=replace(facts.identity, size=size))
        name = os.path.basename(self.location)
        return BlockBackend(
            descriptor, self._io, facts, cache=cache, name=name, read_only=read_only
        )

    # What follows blocks.

    def _open_inode(self) -> int:
        real = os.path.realpath(self.location)
        try:
            return open_inode(None, real, block_device=True)
        except FileNotFoundError as error:
            raise RefusedError(
                "location-missing", f"{self.location} doesn't exist: check the path"
            ) from error
        except NotADiskError as error:
            raise RefusedError(
                "not-a-disk", f"{self.location} is {error.kind}, not a block device"
            ) from error
        except OSError as error:
            raise self._unopened(error) from error

    def _open(self, read_only: bool, cache: Cache) -> tuple[int, DeviceFacts]:
        inode = self._open_inode()
        flags = os.O_EXCL | (os.O_RDONLY if read_only else os.O_RDWR)
        try:
            descriptor = reopen(inode, flags | (os.O_DIRECT if cache is Cache.DIRECT else 0))
        except OSError as error:
            raise self._unopened(error) from error
        finally:
            os.close(inode)
        try:
            return descriptor, examine_device(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise self._unopened(error) from error

    def _unopened(self, error: OSError) -> RefusedError:
        if error.errno == errno.EBUSY:
            return RefusedError(
                "in-use",
                f"{self.location} is in use (mounted, or claimed by another program):"
                " release it first",
            )
        return RefusedError(
            "unreadable",
            f"{self.location} can't be opened ({error.strerror}): check its permissions",
        )

    def _check_target(self, source: Backend) -> None:
        inode = self._open_inode()
        number = os.fstat(inode).st_rdev
        os.close(inode)
        identity = source.identity
        if identity.kind == "block" and identity.device == number:
            raise RefusedError(
                "target-is-source", f"{self.location} is the source itself: name another target"
            )
        if identity.kind == "file" and identity.device == number:
            raise RefusedError(
                "target-is-source",
                f"{self.location} holds the file system of the source: name another target",
            )
        descriptor, facts = self._open(False, Cache.WRITEBACK)
        os.close(descriptor)
        if facts.identity.size < source.size:
            raise RefusedError(
                "target-too-small",
                f"{self.location} is too small: needed {format_bytes(source.size)}"
                f" ({source.size} bytes), available {format_bytes(facts.identity.size)}"
                f" ({facts.identity.size} bytes)",
            )

    def _confirm(self, identity: Identity) -> str | None:
        """Look through the name once more; the device is open, so without O_EXCL."""
        try:
            inode = self._open_inode()
            try:
                descriptor = reopen(inode, os.O_RDONLY)
            finally:
                os.close(inode)
        except RefusedError as error:
            return str(error)
        except OSError as error:
            return f"the target {self.location} can't be opened ({error.strerror})"
        try:
            found = examine_device(descriptor).identity
            if found.device != identity.device or found.size < identity.size:
                return f"the target {self.location} is another device now"
            os.pread(descriptor, 1, 0)
        except OSError as error:
            return f"the target {self.location} can't be read ({error.strerror})"
        finally:
            os.close(descriptor)
        return None
