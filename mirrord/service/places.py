"""Locations: which text names what kind of place, and whether it can be one yet.

Locations come from users and from records; a path is absolute by then (the command line makes it
so). The composition root turns a location into a `Place` here; nobody else names a backend.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from mirrord.errors import RefusedError, UsageError
from mirrord.service.shares import ShareConfig, find_share
from mirrord.smb.location import parse_location
from mirrord.storage.names import open_below

if TYPE_CHECKING:  # the daemon, which opens no disk, does without
    from mirrord.storage.backend import Place
    from mirrord.storage.fileio import FileIo
    from mirrord.storage.smb.server import ShareServer

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://|(mem):", re.IGNORECASE | re.ASCII)
_LATER = {
    "nbd": "an NBD export",
    "nbds": "an NBD export",
    "nbd+unix": "an NBD export",
    "nbds+unix": "an NBD export",
    "mirrord": "another host",
    "mem": "a memory disk",  # for tests of the engine; it would not outlive its process
}
# What a killed disk process had in flight may hold its files, and their locks, a moment longer
# than it lived; its successor must not take that for another program.
PATIENCE_S = 1.0
LOOK_S = 2.0  # that a look at what a path leads to may take
# A server may take so long to see that a client is gone whose process was killed.
SHARE_PATIENCE_S = 10.0
PATH_BYTES_MAX = 4095  # PATH_MAX without its terminating zero


class Found(NamedTuple):
    """What lies at a path: equal for two paths of one thing."""

    device: int  # that a file is on, or that a block device is
    inode: int  # 0 for a block device


def absolute(location: str) -> str:
    """Return what a user typed as the daemon has to see it, which has a directory of its own.

    Raises what `check_location` raises.
    """
    if location and _SCHEME.match(location) is None:
        made = os.path.abspath(location)
        location = made + "/" if location.endswith("/") and made != "/" else made
    return check_location(location)


def check_location(location: str) -> str:
    """Return a well-formed location in its normal form.

    Raises UsageError (malformed), RefusedError (`not-supported-yet`).
    """
    if not location:
        raise UsageError("the location is empty; give a path such as /disks/vm.raw")
    if location.lower().startswith("smb:"):  # it knows which part must not be repeated
        return str(parse_location(location))
    if any(ord(c) < 32 or ord(c) == 127 for c in location):
        raise UsageError(f"{location!r} has control characters, which no location may have")
    scheme = _SCHEME.match(location)
    if scheme is not None:
        name = (scheme[1] or scheme[2]).lower()
        kind = _LATER.get(name)
        if kind is not None:
            raise RefusedError(
                "not-supported-yet",
                f"{location}: {kind} can't be used yet; use a file, a block device or a share",
            )
        raise UsageError(
            f"{location!r} is no location mirrord knows; give the path of a file or block device, "
            "or smb://server/share/path"
        )
    if not location.startswith("/"):
        raise UsageError(f"{location!r} is not an absolute path")
    if len(os.fsencode(location)) > PATH_BYTES_MAX:
        raise UsageError(f"the path of {len(location)} characters is longer than any can be")
    normal = os.path.normpath(location)
    if normal.startswith("//"):
        normal = normal[1:]
    if location.endswith("/") and normal != "/":
        normal += "/"  # a directory is meant
    return normal


def same_location(one: str, other: str) -> bool:
    """Tell whether two locations are one thing, by path and by what lies there now. Blocks."""
    return same_name(one, other) or find(one) == find(other) is not None


def same_name(one: str, other: str) -> bool:
    """Tell whether two locations are one thing by their texts alone."""
    if is_share(one) and is_share(other):
        return parse_location(one).same_place(parse_location(other))
    return one == other


def find(location: str, root: str | None = None) -> Found | None:
    """Return what lies at a path now, None for nothing and for a share. Blocks while storage does.

    It is looked for as whoever opens it will: below `root`, if that is given, and no link leads
    to what lies elsewhere. Two device nodes of one block device are one thing.
    """
    if is_share(location):
        return None
    try:
        if root is None:
            status = os.stat(location)
        else:
            inode = open_below(root, location, os.O_PATH | os.O_NOFOLLOW)
            try:
                status = os.fstat(inode)
            finally:
                os.close(inode)
    except OSError:
        return None
    if stat.S_ISBLK(status.st_mode):
        return Found(status.st_rdev, 0)
    return Found(status.st_dev, status.st_ino)


def is_share(location: str) -> bool:
    """Tell whether a checked location lies on a share."""
    return location.startswith("smb://")


class PlaceFactory:
    """Makes places. They share one way of doing file operations, and one connection to a server,
    each opened at the first use."""

    def __init__(self, shares: Mapping[str, ShareConfig] | None = None) -> None:
        """`shares` are the sections of the configuration: other shares are refused."""
        self._io: FileIo | None = None
        self._shares = shares or {}
        self._servers: dict[tuple[str, ...], ShareServer] = {}

    async def ready(self, location: str, size: int | None = None, root: str | None = None) -> Place:
        """Return the same as `make`, for whoever serves guests meanwhile.

        The code for shares takes 0.2 s to load, and a place that hangs has no end: threads see to
        both. What isn't known in time is told by the path alone.
        """
        import asyncio

        if is_share(location):
            await asyncio.to_thread(_load_shares)
            return self.make(location, size, root)
        device = False
        if root is None:
            try:
                async with asyncio.timeout(LOOK_S):
                    device = await asyncio.to_thread(_is_device, location)
            except TimeoutError:
                device = _is_named_as_device(location)
        return self.make(location, size, root, device=device)

    def make(
        self,
        location: str,
        size: int | None = None,
        root: str | None = None,
        *,
        device: bool | None = None,
    ) -> Place:
        """Return the place that a checked location names; nothing is touched yet.

        `size` is the disk's where it may lie on a larger device. A path with a `root` is never
        looked for outside of that, and is no device. On a share the server sees to it that no
        path leads out. `device` is whether a block device is there, if that is known: a look
        takes as long as storage does. Raises RefusedError (`share-not-configured`, `bad-name`).
        """
        if is_share(location):
            return self._make_share(location)
        from mirrord.storage.fileio import open_io

        if self._io is None:
            self._io = open_io()
        if root is None and (_is_device(location) if device is None else device):
            from mirrord.storage.block import BlockPlace

            block = BlockPlace(location, self._io, size=size)
            block.patience_s = PATIENCE_S
            return block
        from mirrord.storage.file_place import FilePlace

        file = FilePlace(location, self._io, root=root)
        file.patience_s = PATIENCE_S
        return file

    def _make_share(self, location: str) -> Place:
        from mirrord.service.share_login import make_server
        from mirrord.storage.smb.place import SharePlace

        at = parse_location(location)
        config = find_share(self._shares, at.host, at.port, at.share)
        key = (at.server, at.user, repr(config))
        if key not in self._servers:
            self._servers[key] = make_server(at, config)
        share = SharePlace(at, self._servers[key])
        share.patience_s = SHARE_PATIENCE_S
        return share


def _load_shares() -> None:
    import mirrord.service.share_login
    import mirrord.storage.smb.place  # noqa: F401


def _is_device(location: str) -> bool:
    """Tell whether a block device is meant: one is there, or the path is one of devices."""
    try:
        return stat.S_ISBLK(os.stat(location).st_mode)
    except OSError:
        return _is_named_as_device(location)


def _is_named_as_device(location: str) -> bool:
    return location.startswith("/dev/") and not location.startswith("/dev/shm/")
