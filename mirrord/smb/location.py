"""Locations on shares: `smb://[user@]server[:port]/share/path/disk.raw`, and which names may be.

The rules of names are Windows' ([MS-FSCC] 2.1.5, and "Naming Files, Paths, and Namespaces"), since
a disk has to keep its name on any server. A path is taken as it is written: `%` means itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv6Address
from typing import Final
from urllib.parse import quote, unquote

from mirrord.errors import RefusedError, UsageError

PORT: Final = 445
NAME_BYTES_MAX: Final = 255  # Samba counts bytes, Windows characters, of which there are fewer
PATH_MAX: Final = 1024  # characters: below every server's limit

_LOCATION = re.compile(
    r"smb://(?:(?P<user>[^@/:\ud800-\udfff]*)@)?"
    r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<host>[^:/@\[\]\x00-\x20\x7f\ud800-\udfff]+))"
    r"(?::(?P<port>[0-9]{1,5}))?/+(?P<share>[^/]+)(?P<path>/.*)?",
    re.IGNORECASE | re.DOTALL,
)
_FORM: Final = "smb://[user@]server[:port]/share/path/disk.raw"
_FORBIDDEN: Final = '<>:"|?*\\'
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ShareLocation:
    """A path on a share. `path` has components joined by `/`; empty is the share's root."""

    host: str  # lower case; an IPv6 address without its brackets
    port: int
    share: str
    path: str
    user: str = ""
    is_folder: bool = False  # written with a slash at its end, or the share's root

    @property
    def name(self) -> str:
        """Return the last component."""
        return self.path.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """Return what the name lies in; empty is the share's root."""
        return self.path.rpartition("/")[0]

    def beside(self, name: str) -> ShareLocation:
        """Return the location of another name in the same folder."""
        return replace(self, path=f"{self.folder}/{name}" if self.folder else name)

    def inside(self, name: str) -> ShareLocation:
        """Return the location of a name in this folder. Raises what `check_names` raises."""
        path = f"{self.path}/{name}" if self.path else name
        check_names(path)
        return replace(self, path=path, is_folder=False)

    @property
    def server(self) -> str:
        """Return host and port as people write them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORT else f"{host}:{self.port}"

    def __str__(self) -> str:
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        end = "/" if self.is_folder and self.path else ""
        return f"smb://{user}{self.server}/{self.share}/{self.path}{end}"

    def same_place(self, other: ShareLocation) -> bool:
        """Tell whether both name one file, as far as names tell: servers ignore case."""
        return self._key() == other._key()

    def _key(self) -> tuple[str, int, str, str]:
        return self.host, self.port, self.share.casefold(), self.path.casefold()


def parse_location(location: str) -> ShareLocation:
    """Read a location. Raises UsageError (malformed), RefusedError (`bad-name`)."""
    found = _LOCATION.fullmatch(location)
    user = unquote(found["user"] or "") if found else ""
    # Of what isn't well formed, all that may be user:password@, whatever is in either.
    if ":" in user or (found is None and location.rpartition("@")[0].count(":") > 1):
        # Not repeated: the password would be in a log and on the screen once more.
        raise UsageError(
            "a password has no place in a location, where others can read it: "
            f"write {_FORM}, and put the password where `credential` of the share says"
        )
    if found is None:
        raise UsageError(f"{location!r} is not of the form {_FORM}")
    port = int(found["port"] or PORT)
    if not 0 < port < 1 << 16:
        raise UsageError(f"{location!r}: there is no port {port}")
    host = _ipv6(found["ipv6"]) if found["ipv6"] else found["host"].lower()
    path = "/".join(part for part in (found["path"] or "").split("/") if part)
    check_names(found["share"])
    check_names(path)
    is_folder = not path or found["path"].endswith("/")
    return ShareLocation(host, port, found["share"], path, user.replace(";", "\\"), is_folder)


def _ipv6(text: str) -> str:
    try:
        return str(IPv6Address(text))
    except AddressValueError as error:
        raise UsageError(f"{text!r} is no IPv6 address") from error


def check_names(path: str) -> None:
    """Refuse (`bad-name`) what no server, or not every one, would take as it is written."""
    if len(path) > PATH_MAX:
        raise RefusedError("bad-name", f"a path of {len(path)} characters: {PATH_MAX} at most")
    for name in path.split("/") if path else ():
        wrong = _what_is_wrong(name)
        if wrong:
            raise RefusedError("bad-name", f"{name!r} can't be a name on a share: {wrong}")


def _what_is_wrong(name: str) -> str:
    forbidden = next((c for c in name if c in _FORBIDDEN or ord(c) < 32 or ord(c) == 127), "")
    if forbidden == ":":
        return "`:` would name a stream of the file; leave it out"
    if forbidden:
        return f"{forbidden!r} is not allowed there; leave it out"
    if any(0xD800 <= ord(c) < 0xE000 for c in name):
        return "it is not UTF-8, which servers want names to be"
    if name in ("", ".", ".."):
        return "write the path without it"
    if name[-1] in ". ":
        return "servers drop a dot or a space at its end; leave it out"
    if _RESERVED.fullmatch(name):
        return "Windows keeps that name for a device; choose another"
    if len(name.encode()) > NAME_BYTES_MAX:
        return f"it is longer than {NAME_BYTES_MAX} bytes; shorten it"
    if name.lower().startswith(".mirrord"):
        return "names that start with .mirrord are mirrord's own"
    return ""
