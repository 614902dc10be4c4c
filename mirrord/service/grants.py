"""The sections [[grant]] of mirrord.toml: what others than root and the daemon's user may do.

A grant names a user or a group, verbs, disks and roots. It gives nothing beyond that, and what no
grant gives is refused. Grants add up, but each stands for itself: the roots of one are of no use
to the verbs of another.

A root is a directory below which locations must lie that the peer gives, or the beginning of a
location on a share. Here only the text is compared, since whoever may write there can change
what it leads to at any time. So the root is kept with the disk and the job, and whoever opens a
name below it, at whatever time, has the kernel refuse to leave it (`storage.names`).
"""

from __future__ import annotations

import fnmatch
import grp
import os
import pwd
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from mirrord.control.operations import OPERATIONS
from mirrord.control.sockets import Peer
from mirrord.errors import MirrordError, UsageError
from mirrord.service.places import check_location, is_share
from mirrord.service.shares import ShareConfig, find_share
from mirrord.smb.location import parse_location

READ = frozenset(each.name for each in OPERATIONS if each.method == "GET")
ALL = frozenset(each.name for each in OPERATIONS)
WITH_LOCATION = ("attach", "move", "test_credential")

# "nobody" and "nogroup": user_namespaces(7).
_OVERFLOW_ID = 65534

# What names of disks are made of (`core.units.check_name`), and what stands for some of it.
_GLOB = re.compile(r"[A-Za-z0-9._*?-]+", re.ASCII)


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One section, as it is written."""

    verbs: tuple[str, ...]
    user: str | None = None
    group: str | None = None
    disks: tuple[str, ...] = ("*",)
    roots: tuple[str, ...] = ()


class GrantError(UsageError):
    """A section can't be one: the `number`-th, counted from 0, because of its `key`."""

    def __init__(self, number: int, key: str, problem: str) -> None:
        super().__init__(f"[[grant]]: {problem}")
        self.number = number
        self.key = key


@dataclass(frozen=True, slots=True)
class Right:
    """What a section means on this system."""

    uid: int | None
    gid: int | None
    verbs: frozenset[str]
    disks: tuple[str, ...]
    roots: tuple[str, ...]

    def is_for(self, peer: Peer) -> bool:
        """Tell whether it is given to `peer`."""
        return peer.uid == self.uid or self.gid in peer.groups

    def covers(self, disk: str) -> bool:
        """Tell whether it is given for a disk of that name, whether there is one or not."""
        return any(fnmatch.fnmatchcase(disk, glob) for glob in self.disks)


def root_of(location: str, roots: Sequence[str]) -> str | None:
    """Return the deepest root below which a checked location lies as it is written."""
    found = [root for root in roots if _lies_below(location, root)]
    return max(found, key=len, default=None)


def _lies_below(location: str, root: str) -> bool:
    if is_share(location) != is_share(root):
        return False
    if not is_share(location):
        return f"{location}/".startswith(f"{root.rstrip('/')}/")
    one, whole = parse_location(location), parse_location(root)
    place, start = ((at.server, at.user, at.share.lower()) for at in (one, whole))
    # What differs in upper and lower case may be another folder: servers differ in that.
    path = f"{one.path}/" if one.is_folder else one.path  # a file isn't below its own name
    return place == start and (not whole.path or path.startswith(f"{whole.path}/"))


def resolve(grants: Sequence[Grant], shares: Mapping[str, ShareConfig]) -> tuple[Right, ...]:
    """Return what the sections mean. Raises GrantError for the first that can't be one."""
    return tuple(_resolve(number, each, shares) for number, each in enumerate(grants))


def _resolve(number: int, grant: Grant, shares: Mapping[str, ShareConfig]) -> Right:
    if (grant.user is None) == (grant.group is None):
        raise GrantError(number, "grant", "name a user or a group, one of them")
    verbs = _verbs(number, grant)
    if not grant.disks:
        raise GrantError(number, "disks", "disks is empty: leave it out to mean all of them")
    for glob in grant.disks:
        if _GLOB.fullmatch(glob) is None:
            raise GrantError(
                number,
                "disks",
                f"{glob!r} can't be a disk's name: beside its characters (letters, digits, '.', "
                "'_', '-') a glob has '*' and '?'",
            )
    needing = [verb for verb in WITH_LOCATION if verb in verbs]
    if needing and not grant.roots:
        raise GrantError(
            number,
            "verbs",
            f"{', '.join(needing)} without roots: name the directories, or smb://… folders, that "
            'locations must lie below, or "/" for all directories',
        )
    roots = tuple(_root(number, root, shares) for root in grant.roots)
    return Right(_uid(number, grant.user), _gid(number, grant.group), verbs, grant.disks, roots)


def _verbs(number: int, grant: Grant) -> frozenset[str]:
    if not grant.verbs:
        raise GrantError(number, "verbs", 'verbs is empty: name what is granted, such as "read"')
    found: set[str] = set()
    for verb in grant.verbs:
        meant = {"*": ALL, "read": READ}.get(verb, ALL & {verb})
        if not meant:
            known = ", ".join(sorted(ALL))
            raise GrantError(
                number, "verbs", f"there is no verb {verb!r}; known are: *, read, {known}"
            )
        found |= meant
    return frozenset(found)


def _uid(number: int, name: str | None) -> int | None:
    try:
        return None if name is None else _known(number, "user", pwd.getpwnam(name).pw_uid)
    except KeyError as error:
        raise GrantError(number, "user", f"there is no user {name} on this system") from error


def _gid(number: int, name: str | None) -> int | None:
    try:
        return None if name is None else _known(number, "group", grp.getgrnam(name).gr_gid)
    except KeyError as error:
        raise GrantError(number, "group", f"there is no group {name} on this system") from error


def _known(number: int, kind: str, identity: int) -> int:
    """Refuse whom the kernel shows in the place of all that our user namespace doesn't know."""
    if identity == _OVERFLOW_ID:
        raise GrantError(
            number, kind, f"{kind} {identity} stands for every unknown {kind}: name another"
        )
    return identity


def _root(number: int, root: str, shares: Mapping[str, ShareConfig]) -> str:
    """Return a root in its normal form, without symbolic links."""
    try:
        normal = check_location(root)
        if is_share(normal):
            at = parse_location(normal)
            find_share(shares, at.host, at.port, at.share)
            return normal
    except MirrordError as error:
        raise GrantError(number, "roots", f"root {root!r}: {error}") from error
    normal = normal.rstrip("/") or "/"
    try:
        os.stat(f"{normal}/.")
    except OSError as error:
        problem = (
            f"the root {normal} is no directory ({error.strerror}): create it, or name another"
        )
        raise GrantError(number, "roots", problem) from error
    real = os.path.realpath(normal)
    if real != normal:
        problem = f"the root {normal} leads through a symbolic link: write {real}"
        raise GrantError(number, "roots", problem)
    return normal
