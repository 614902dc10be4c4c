"""A disk on a block device (a LUN, a logical volume, a partition).

The device is opened O_EXCL: refused while it is mounted, part of another device, or claimed by
another exclusive opener. What it can do is read from sysfs, never found out by trying, since a
try would change it; its content is never looked at, and nothing is ever formatted.

A device is not created, renamed or deleted, so most steps of a move do nothing: retiring one
only releases it, unless it shall be wiped.

The disk may be smaller than the device it lies on: it is the device's first `size` bytes, in
everything that its backend says and does. What is behind its end is left alone; that the device
grows is no change, that it shrinks below the disk is one.

`location` stays the name that was given (`/dev/disk/by-id/…`), since the kernel's names and
numbers (`/dev/sdb`, 8:16) change over a boot. Which device it is, sysfs may know (`_serial`); where
it doesn't, the number tells on one boot, and over a boot only a name that udev keeps to one
device. Otherwise it is taken for another one, and not touched.
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
from mirrord.storage import durable
from mirrord.storage.backend import Backend, Cache, Capabilities, Identity, Place
from mirrord.storage.descriptor import DescriptorBackend
from mirrord.storage.fileio import FileIo
from mirrord.storage.memory_pool import PAGE_BYTES
from mirrord.storage.names import NotADiskError, check_name, open_inode, reopen

_SYS = "/sys"
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268

# Names that lead to the same device on every boot.
_LASTING_NAMES = (
    "/dev/disk/by-id/",
    "/dev/disk/by-path/",
    "/dev/disk/by-partuuid/",
    "/dev/mapper/",
)

# Where sysfs says which device it is, the most certain first: below a device's own directory.
_SERIALS = (
    "dm/uuid",
    "md/uuid",
    "wwid",
    "serial",
    "device/wwid",
    "device/serial",
    "loop/backing_file",
)
_LOOP_GET_STATUS64 = 0x4C05  # linux/loop.h
_LOOP_INFO64_BYTES = 232
_SERIAL_CHARACTERS_MAX = 200  # they go into a journal's record; names differ at their end

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
        identity=Identity(
            "block", number, 0, size, serial=_serial(number, _behind_loop(descriptor))
        ),
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
    device = _sysfs(number)
    for directory in (device, os.path.dirname(device)):
        limit = _attribute(directory, f"queue/{name}")
        if limit:
            return int(limit)
    return 0


def _behind_loop(descriptor: int) -> str:
    """Return which file a loop device has: it may be renamed. "" if it is no loop device."""
    try:
        told = fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
    except OSError:
        return ""
    device, inode = struct.unpack_from("QQ", told)
    return f"inode {inode} of {device:x}"


def _serial(number: int, behind_loop: str = "") -> str:
    """Return what the device is called on every boot, "" if it isn't known."""
    device = _sysfs(number)
    partition = _attribute(device, "partition")
    whole = os.path.dirname(device) if partition else device
    for name in _SERIALS:
        found = _attribute(whole, name)
        if found and name.startswith("loop/"):
            found = behind_loop or found
        if found:
            part = f" partition {partition}" if partition else ""
            offset = _attribute(whole, "loop/offset") if name.startswith("loop/") else ""
            behind = f" at {offset}" if offset not in ("", "0") else ""
            return f"{name} {found}{behind}{part}"[-_SERIAL_CHARACTERS_MAX:]
    return ""


def _sysfs(number: int) -> str:
    return os.path.realpath(f"{_SYS}/dev/block/{os.major(number)}:{os.minor(number)}")


def _attribute(directory: str, name: str) -> str:
    """Read a file of sysfs; "" where there is none or it can't tell."""
    try:
        with open(f"{directory}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _same_storage(device: Identity, source: Identity) -> bool:
    """Tell whether a device's bytes are the source's: two paths to one LUN, a loop over a file."""
    if source.kind == "block":
        return device.serial != "" and device.serial == source.serial
    behind = _attribute(_sysfs(device.device), "loop/backing_file")
    try:
        status = os.stat(behind)
    except OSError:
        return False
    return source.kind == "file" and (status.st_dev, status.st_ino) == (
        source.device, source.inode
    )  # fmt: skip


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
        facts = await self._own(self._io.call(examine_device, self._descriptor))
        if facts.identity.size < self.size:
            raise OSError(
                errno.ESTALE,
                f"the device shrank from {self.size} to {facts.identity.size} bytes",
            )


class BlockPlace(Place):
    """A block device by its name."""

    def __init__(self, location: str, io: FileIo, *, size: int | None = None) -> None:
        """Touch nothing.

        `size` is for `open`: the disk is the device's first `size` bytes, not all of it. A disk
        that was moved onto a larger device has to keep its size. A target's is the source's.
        """
        self.location = os.path.abspath(location)
        self.patience_s = 0.0  # how long a claim that another has may still go away
        self._io = io
        self._size = size
        self._is_another = False  # `find` met a device that isn't the one it looked for
        check_name(self.location)

    async def open(self, *, read_only: bool = False, cache: Cache = Cache.WRITEBACK) -> Backend:
        descriptor, facts = await self._opening(read_only, cache)
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
        if self._is_another:
            raise RefusedError(
                "target-lost",
                f"{self.location} can't be told to be the device that it was, so nothing is"
                " written to it: start again, with a name from /dev/disk/by-id",
            )
        await self._io.call(self._check_target, source)
        descriptor, facts = await self._opening(False, cache)
        return self._adopt(descriptor, facts, source.size, cache)

    async def find(
        self, job_id: str, identity: Identity, *, cache: Cache, same_boot: bool = False
    ) -> Backend | None:
        """Open the device if it is the one of `identity`; else `create` refuses it from now on.

        Its content belongs to somebody else then, so a job can't begin again on it either.
        """
        try:
            descriptor, facts = await self._opening(False, cache)
        except RefusedError as error:
            if error.code == "location-missing":
                return None
            raise
        if not self._is_still(identity, facts.identity, same_boot):
            self._is_another = True
            await self._io.call(os.close, descriptor)
            return None
        return self._adopt(descriptor, facts, identity.size, cache)

    async def publish(self, job_id: str) -> None:
        """Do nothing: a device has its name."""

    async def withdraw(self, job_id: str) -> None:
        """Do nothing: a device keeps its name."""

    async def discard(self, job_id: str, identity: Identity | None = None) -> None:
        """Do nothing: the device was released when its backend was closed."""

    async def confirm(self, job_id: str, identity: Identity) -> str | None:
        return await self._io.call(self._confirm, identity)

    async def retire(self, job_id: str, identity: Identity, *, wipe: bool = False) -> str | None:
        if not wipe:
            return None
        try:
            descriptor, facts = await self._opening(False, Cache.WRITEBACK)
        except RefusedError as error:
            return f"not wiped: {error}"
        backend = self._adopt(descriptor, facts, facts.identity.size, Cache.WRITEBACK)
        try:
            if not _holds(identity, facts.identity):
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

    async def _opening(self, read_only: bool, cache: Cache) -> tuple[int, DeviceFacts]:
        """Open the device; it is closed again when the caller is cancelled meanwhile."""
        opening = self._io.submit(self._open, read_only, cache)
        return await self._io.take(opening, lambda opened: os.close(opened[0]))

    def _is_still(self, identity: Identity, found: Identity, same_boot: bool) -> bool:
        """Tell whether `found` is known to be the device of `identity`."""
        if not (same_boot or (identity.serial and found.serial)):
            # Nothing to compare but the size: then the name has to be one that lasts.
            return self.location.startswith(_LASTING_NAMES) and found.size >= identity.size
        return _holds(identity, found)

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
        flags |= os.O_DIRECT if cache is Cache.DIRECT else 0
        try:
            descriptor = self._claim(inode, flags)
        except OSError as error:
            raise self._unopened(error) from error
        finally:
            os.close(inode)
        try:
            return descriptor, examine_device(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise self._unopened(error) from error

    def _claim(self, inode: int, flags: int) -> int:
        claimed = -1

        def claim() -> bool:
            nonlocal claimed
            try:
                claimed = reopen(inode, flags)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                return False
            return True

        if not durable.try_for(self.patience_s, claim):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return claimed

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
        if _same_storage(facts.identity, identity):
            raise RefusedError(
                "target-is-source",
                f"{self.location} is the source under another name: name another target",
            )
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
            if not _holds(identity, found):
                return f"the target {self.location} is another device now"
            os.pread(descriptor, 1, 0)
        except OSError as error:
            return f"the target {self.location} can't be read ({error.strerror})"
        finally:
            os.close(descriptor)
        return None


def _holds(identity: Identity, found: Identity) -> bool:
    """Tell whether `found` is the device of `identity`, by serial or number, and no smaller."""
    large_enough = found.size >= identity.size
    return large_enough and identity.is_still(replace(found, size=identity.size), same_boot=True)
