"""Settings of SMB shares: the sections [smb."host/share"] of mirrord.toml. No input, no output.

The sections are an allow list: a location on a share that no section covers is refused, and so no
password ever goes to a server that the operator didn't name. A section of a share comes before
the one of its server. Host and share don't depend on upper and lower case, as in SMB itself.

Everything is the strictest by default. What weakens it has to be written down, key by key, and
`weaknesses` says it wherever the share is shown.

A section has the *name* of a credential, never the secret: it may be logged and handed on.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NamedTuple

import msgspec

from mirrord.core.units import parse_size
from mirrord.errors import RefusedError, UsageError

DEFAULT_PORT = 445
KERBEROS = "kerberos"  # as a credential: tickets instead of a password
UNFLUSHED_BYTES_MIN = 1 << 20  # one large write has to fit
UNFLUSHED_BYTES_MAX = 16 << 30  # it is memory

Dialect = Literal["3.1.1", "3.0.2", "3.0", "2.1"]
Channels = Annotated[int, msgspec.Meta(ge=1, le=8)] | Literal["auto"]
Timeout = Annotated[float, msgspec.Meta(gt=0, le=86400)]

_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", re.IGNORECASE | re.ASCII)
_SECTION = re.compile(r"(\[[^\]/]*\]|[^\[\]:/]*)(?::([0-9]{1,5}))?(?:/([^/]*))?", re.ASCII)
_SHARE = re.compile(r'[^\x00-\x1f\x7f"/\\:|<>+=;,*?\[\]]{1,80}')
_PLAIN_NAME = re.compile(r"[^\x00-\x1f\x7f/]{1,255}")


class ShareConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One section. Raises ValueError for values that contradict each other.

    msgspec makes that an error with the place; `decode_shares` and `read_config` a UsageError.
    """

    credential: str  # a name in $CREDENTIALS_DIRECTORY, an absolute path, or "kerberos"
    user: str | None = None  # else the location's, else the credential file's
    keytab: str | None = None  # with Kerberos; else the tickets that are there
    ccache: str | None = None
    channels: Channels = 1
    encryption: Literal["required", "allow-plaintext"] = "required"
    signing: Literal["required", "allow-unsigned"] = "required"
    min_dialect: Dialect = "3.1.1"
    io_timeout: Timeout = 60.0  # how long a guest's request waits for the server, committed
    unflushed_max: int | str = "64M"  # acknowledged writes that are kept for replay
    write_through: bool = False
    fast: bool = True  # False: only smbprotocol's documented interface

    def __post_init__(self) -> None:
        _check_credential(self)
        _check_strength(self)
        try:
            size = self.unflushed_bytes
        except UsageError as error:
            raise ValueError(f"unflushed_max: {error}") from error
        if not UNFLUSHED_BYTES_MIN <= size <= UNFLUSHED_BYTES_MAX:
            raise ValueError("unflushed_max has to be between 1M and 16G")

    @property
    def kerberos(self) -> bool:
        return self.credential == KERBEROS

    @property
    def unflushed_bytes(self) -> int:
        value = self.unflushed_max
        return value if isinstance(value, int) else parse_size(value)


def _check_credential(config: ShareConfig) -> None:
    for key in ("user", "keytab", "ccache"):
        value = getattr(config, key)
        if value is not None and (not value or not value.isprintable()):
            raise ValueError(f"{key} is empty or has control characters")
    name = config.credential
    if "\0" in name or not (name.startswith("/") or is_plain_name(name)):
        raise ValueError(
            f"credential {name!r} has to be a name in $CREDENTIALS_DIRECTORY, an absolute path, "
            f'or "{KERBEROS}"'
        )
    if config.keytab is not None and not config.keytab.startswith("/"):
        raise ValueError("keytab has to be an absolute path")
    if not config.kerberos and (config.keytab is not None or config.ccache is not None):
        raise ValueError(f'keytab and ccache are for credential = "{KERBEROS}" alone')


def _check_strength(config: ShareConfig) -> None:
    if config.encryption == "allow-plaintext":
        return
    if config.min_dialect == "2.1":
        raise ValueError(
            'min_dialect = "2.1" can\'t encrypt: it needs encryption = "allow-plaintext"'
        )
    if config.signing == "allow-unsigned":
        raise ValueError(
            'signing = "allow-unsigned" means nothing without encryption = "allow-plaintext": '
            "what is encrypted is authenticated"
        )


def is_plain_name(name: str) -> bool:
    """Tell whether it names a file in a directory, and nothing elsewhere."""
    return name not in {".", ".."} and _PLAIN_NAME.fullmatch(name) is not None


def weaknesses(config: ShareConfig) -> list[str]:
    """Return in words what the section allows that it shouldn't have to."""
    found = []
    if config.encryption == "allow-plaintext":
        found.append("plaintext allowed")
    if config.signing == "allow-unsigned":
        found.append("unsigned allowed")
    if config.min_dialect != "3.1.1":
        found.append(f"dialect {config.min_dialect} allowed")
    return found


class ShareName(NamedTuple):
    """What a section is for, in normal form. `share` is None for all shares of the server."""

    host: str
    port: int
    share: str | None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{host}{port}" + ("" if self.share is None else f"/{self.share}")


class SectionError(UsageError):
    """The name of the section `section` can't be one."""

    def __init__(self, section: str, problem: str) -> None:
        super().__init__(f'[smb."{section}"]: {problem}')
        self.section = section


def parse_section(section: str) -> ShareName:
    """Return what `host[:port][/share]` means. Raises SectionError."""
    found = _SECTION.fullmatch(section)
    if found is None:
        raise SectionError(
            section, "write the section as host/share, host, host:port/share or host:port"
        )
    host, port, share = found.groups()
    normal = _normal_host(host)
    if normal is None:
        raise SectionError(section, f"{host!r} is neither a host's name nor its address")
    number = DEFAULT_PORT if port is None else int(port)
    if not 0 < number < 65536:
        raise SectionError(section, f"{port} is no port")
    if share is not None and _SHARE.fullmatch(share) is None:
        raise SectionError(section, f"{share!r} is no name of a share")
    return ShareName(normal, number, share if share is None else share.lower())


def _normal_host(host: str) -> str | None:
    """Return a host as it is compared, or None for what can't be one."""
    if host.startswith("["):
        try:
            packed = socket.inet_pton(socket.AF_INET6, host[1:-1])
        except (OSError, ValueError):
            return None
        return socket.inet_ntop(socket.AF_INET6, packed)
    return host.lower() if len(host) <= 253 and _HOST.fullmatch(host) else None


def check_sections(sections: Iterable[str]) -> None:
    """Find a name that can't be a section's, or two for the same. Raises SectionError."""
    known: dict[ShareName, str] = {}
    for section in sections:
        name = parse_section(section)
        other = known.setdefault(name, section)
        if other != section:
            raise SectionError(section, f'it is the same as [smb."{other}"]')


def find_share(shares: Mapping[str, ShareConfig], host: str, port: int, share: str) -> ShareConfig:
    """Return the settings of a share, else its server's.

    Raises RefusedError (`share-not-configured`): then nothing may be sent to that server.
    """
    plain = host.strip("[]")
    normal = _normal_host(f"[{plain}]" if ":" in plain else plain) or plain.lower()
    wanted = ShareName(normal, port, share.lower())
    known = {parse_section(section): config for section, config in shares.items()}
    for name in (wanted, wanted._replace(share=None)):
        if name in known:
            return known[name]
    section = ShareName(normal, port, share)
    raise RefusedError(
        "share-not-configured",
        f'the share {section} is not configured: add a section [smb."{section}"] with its '
        "credential to mirrord.toml; a disk that is served already learns of it by "
        "'mirrord upgrade NAME --force'",
    )


def encode_shares(shares: Mapping[str, ShareConfig]) -> str:
    """Return the sections as a disk process is given them; there is no secret in it."""
    return msgspec.json.encode(shares).decode()


def decode_shares(text: str) -> dict[str, ShareConfig]:
    """Return what `encode_shares` was given. Raises UsageError."""
    try:
        shares = msgspec.json.decode(text, type=dict[str, ShareConfig])
    except msgspec.MsgspecError as error:
        raise UsageError(f"the settings of the shares are wrong: {error}") from error
    check_sections(shares)
    return shares
