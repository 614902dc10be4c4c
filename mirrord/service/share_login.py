"""From a share's section in the configuration to a server that storage can use.

Only disk processes that use a share come here, and the helper that tests a credential: it loads
smbprotocol and cryptography, and prepares the process for both of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

from mirrord.errors import RefusedError
from mirrord.service import credentials
from mirrord.service.credentials import Secret
from mirrord.service.shares import ShareConfig, weaknesses
from mirrord.smb.location import ShareLocation
from mirrord.storage.memory_pool import keep_freed_memory
from mirrord.storage.smb.dial import Security
from mirrord.storage.smb.server import ShareServer
from mirrord.storage.smb.session import ShareSettings

# A disk on a share keeps what isn't flushed, and frees it all at once.
_KEPT_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class ShareLogin:
    """Who logs on, as storage wants it."""

    user: str | None
    password: Secret | None
    kerberos: bool
    keytab: str | None
    ccache: str | None


def make_server(at: ShareLocation, config: ShareConfig) -> ShareServer:
    """Return the server of a share. Connects to nothing and reads no credential yet."""
    _prepare_process()
    settings = ShareSettings(
        security=Security(
            encrypt=config.encryption == "required",
            sign=config.signing == "required",
            min_dialect=config.min_dialect,
        ),
        channels=config.channels,
        io_timeout_s=config.io_timeout,
        unflushed_bytes_max=config.unflushed_bytes,
        write_through=config.write_through,
        fast=config.fast,
        weaknesses=tuple(weaknesses(config)),
    )
    login = _Remembered(partial(login_of, config, at.user))
    return ShareServer(at, settings, login, partial(credentials.fingerprint, config))


class _Remembered:
    """Reads a credential, and still knows it when it isn't there any more.

    systemd takes $CREDENTIALS_DIRECTORY away when the service stops; disk processes go on, and
    have to be able to connect again.
    """

    def __init__(self, read: Callable[[], ShareLogin]) -> None:
        self._read = read
        self._last: ShareLogin | None = None

    def __call__(self) -> ShareLogin:
        try:
            self._last = self._read()
        except RefusedError as error:
            if self._last is None or error.code != "credential-missing":
                raise
        return self._last


def login_of(config: ShareConfig, user: str) -> ShareLogin:
    """Read the credential, in whatever state it is now. Raises RefusedError. Blocks."""
    found = credentials.load(config, location_user=user or None)
    return ShareLogin(found.account, found.password, found.kerberos, found.keytab, found.ccache)


@cache
def _prepare_process() -> None:
    """Keep secrets from core dumps, and large buffers in the heap. Once a process."""
    credentials.harden_process()
    keep_freed_memory(_KEPT_BYTES)
