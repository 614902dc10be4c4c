"""Credentials of SMB shares: read late, shown never. What is here is all that knows secrets.

A credential is a file: one of systemd's (a name in $CREDENTIALS_DIRECTORY), or one at an absolute
path that only its owner can read. It has lines as those of mount.cifs (`username=`, `password=`,
`domain=`), or else it is the password, less one newline at the end.

Nothing that raises here has the content in its frame, and no error has it in its text: tracebacks
are printed, sometimes with the variables of each frame. So `_parse`, the only function that sees
the content, never raises; what it returns keeps the password in a `Secret`.

Replacing the file is safe at any moment: it is read through one descriptor. `fingerprint` tells
that it was replaced, or changed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import msgspec

from mirrord.errors import RefusedError
from mirrord.service.shares import ShareConfig

DIRECTORY_VARIABLE = "CREDENTIALS_DIRECTORY"  # systemd.exec(5)
CONTENT_BYTES_MAX = 64 << 10
HIDDEN = "***"

_LINE = re.compile(r"[ \t]*(user|pass|dom)(?:name|word|ain)?[ \t]*=(.*)", re.ASCII)
_DOMAIN = re.compile(r"([^\\;]+)[\\;](.+)")  # DOMAIN\user, and DOMAIN;user as in a URL
_PR_SET_DUMPABLE = 4


class Secret:
    """Text that doesn't show itself: only `reveal` returns it. It can't be pickled or encoded."""

    __slots__ = ("__text",)

    def __init__(self, text: str) -> None:
        self.__text = text

    def reveal(self) -> str:
        """Return the text, for the one call that needs it; keep it in no variable."""
        return self.__text

    def __repr__(self) -> str:
        return HIDDEN

    def __format__(self, specification: str) -> str:
        return HIDDEN

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a secret can't be pickled or copied")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a secret can't be pickled or copied")


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """Who to be at a server. Either `password` is there, or `kerberos` is true."""

    user: str | None  # None: Kerberos's default principal
    domain: str | None = None
    password: Secret | None = None
    kerberos: bool = False
    keytab: str | None = None
    ccache: str | None = None

    @property
    def account(self) -> str | None:
        return f"{self.domain}\\{self.user}" if self.user and self.domain else self.user


class _Source(NamedTuple):
    """A file with something secret. A strict one has to be a file of ours alone."""

    path: str
    label: str
    strict: bool


class _Content(NamedTuple):
    """What a credential file has, or what is wrong with it: code and words."""

    user: str | None = None
    domain: str | None = None
    password: Secret | None = None
    problem: tuple[str, str] | None = None


def load(
    config: ShareConfig, environ: Mapping[str, str] = os.environ, location_user: str | None = None
) -> Credential:
    """Read the credential of a share.

    The user is the section's, else the location's, else the file's.

    Raises RefusedError: `credential-missing`, `credential-unreadable`, `credential-unsafe`,
    `credential-malformed`, `credential-empty`, `credential-no-user`. Blocks.
    """
    if config.kerberos:
        return _kerberos(config, location_user)
    source = _locate(config, environ)
    with open(source.path, "rb", opener=lambda *_: _open(source)) as file:
        content = _parse(file.read(CONTENT_BYTES_MAX + 1))
    return _conclude(config, location_user, source, content)


async def load_async(
    config: ShareConfig, environ: Mapping[str, str] = os.environ, location_user: str | None = None
) -> Credential:
    """Do what `load` does beside the event loop."""
    import aiofiles  # the daemon, and disks on no share, do without

    if config.kerberos:
        return _kerberos(config, location_user)
    source = _locate(config, environ)
    async with aiofiles.open(source.path, "rb", opener=lambda *_: _open(source)) as file:
        content = _parse(await file.read(CONTENT_BYTES_MAX + 1))
    return _conclude(config, location_user, source, content)


def fingerprint(
    config: ShareConfig, environ: Mapping[str, str] = os.environ
) -> tuple[tuple[int, ...], ...]:
    """Return a value that differs when the credential was replaced or changed. Never raises.

    For "the server refused the password: try again when there is another". Blocks shortly.
    """
    paths: list[str] = []
    if config.kerberos:
        ccache = config.ccache or ""
        paths = [config.keytab or "", ccache.removeprefix("FILE:")]
    else:
        try:
            paths = [_locate(config, environ).path]
        except RefusedError:
            pass
    return tuple(_stamp(path) for path in paths)


def _stamp(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _locate(config: ShareConfig, environ: Mapping[str, str]) -> _Source:
    name = config.credential
    if name.startswith("/"):
        return _Source(name, f"the credential file {name}", strict=True)
    directory = environ.get(DIRECTORY_VARIABLE)
    if not directory:
        raise RefusedError(
            "credential-missing",
            f"there is no credential {name}: ${DIRECTORY_VARIABLE} is not set; the service gets it "
            f"by LoadCredential={name}:PATH in its unit, or name a file by its absolute path",
        )
    # systemd gives access by ACLs, which look like a group's permission
    return _Source(os.path.join(directory, name), f"the credential {name}", strict=False)


def _open(source: _Source) -> int:
    """Open a secret file once it is known to be safe. Raises RefusedError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        descriptor = os.open(source.path, flags | (os.O_NOFOLLOW if source.strict else 0))
    except FileNotFoundError as error:
        raise RefusedError(
            "credential-missing", f"there is no {source.label.removeprefix('the ')}"
        ) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RefusedError(
                "credential-unsafe",
                f"{source.label} is a symbolic link; name the file itself, with chmod 600",
            ) from error
        raise RefusedError(
            "credential-unreadable", f"{source.label} can't be read: {error.strerror}"
        ) from error
    try:
        _check_status(source, os.fstat(descriptor))
    except RefusedError:
        os.close(descriptor)
        raise
    return descriptor


def _check_status(source: _Source, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError(
            "credential-unsafe", f"{source.label} is not a regular file; make it one, chmod 600"
        )
    if not source.strict:
        return
    if status.st_uid not in {os.geteuid(), 0}:
        raise RefusedError(
            "credential-unsafe",
            f"{source.label} belongs to user {status.st_uid}; it has to be root's or "
            f"mirrord's own: chown it, then chmod 600 {source.path}",
        )
    if status.st_mode & 0o077:
        raise RefusedError(
            "credential-unsafe",
            f"others can get at {source.label} (mode {stat.S_IMODE(status.st_mode):04o}): "
            f"chmod 600 {source.path}, and change the password if they might have",
        )


def _parse(raw: bytes) -> _Content:
    """Return what the content means. Never raises: see the top."""
    if len(raw) > CONTENT_BYTES_MAX:
        return _Content(problem=("credential-malformed", "is larger than 64 KiB"))
    try:
        text = raw.decode()
    except UnicodeDecodeError:  # it has the content, and must not become another's cause
        return _Content(problem=("credential-malformed", "is not UTF-8"))
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if _matters(line)]
    if not lines or _LINE.fullmatch(lines[0][1].removesuffix("\r")) is None:
        whole = text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
        return _with_password(None, None, whole)
    found = dict.fromkeys(("user", "dom", "pass"), "")
    for number, line in lines:
        match = _LINE.fullmatch(line.removesuffix("\r"))
        if match is None:
            expected = "username=, password= or domain="
            return _Content(problem=("credential-malformed", f"has no {expected} in line {number}"))
        found[match[1]] = match[2]
    return _with_password(found["user"].strip(), found["dom"].strip(), found["pass"])


def _matters(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _with_password(user: str | None, domain: str | None, password: str) -> _Content:
    if not password:
        return _Content(problem=("credential-empty", "has no password"))
    return _Content(user or None, domain or None, Secret(password))


def _conclude(
    config: ShareConfig, location_user: str | None, source: _Source, content: _Content
) -> Credential:
    if content.problem is not None:
        code, words = content.problem
        raise RefusedError(code, f"{source.label} {words}")
    user = config.user or location_user or content.user
    if user is None:
        raise RefusedError(
            "credential-no-user",
            f"nothing says whose password {source.label} has: set user in the section, use a "
            "location with a user (smb://USER@…), or add a line username= to the file",
        )
    domain, name = _split(user)
    return Credential(user=name, domain=domain or content.domain, password=content.password)


def _split(user: str) -> tuple[str | None, str]:
    """Return domain and name of DOMAIN\\name; a name@REALM stays as it is."""
    found = _DOMAIN.fullmatch(user)
    return (None, user) if found is None else (found[1], found[2])


def _kerberos(config: ShareConfig, location_user: str | None) -> Credential:
    if config.keytab is not None:  # who can read it can be us
        os.close(_open(_Source(config.keytab, f"the keytab {config.keytab}", strict=True)))
    user = config.user or location_user
    domain, name = (None, None) if user is None else _split(user)
    return Credential(
        user=name, domain=domain, kerberos=True, keytab=config.keytab, ccache=config.ccache
    )


def harden_process() -> None:
    """Keep other processes of this user, and core dumps, from this process's memory.

    For a process that holds secrets, before it has any; it lasts until the next execve. Others
    than root can't look into its /proc entries then. Raises OSError.
    """
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    library = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_ulong(value) for value in (0, 0, 0, 0)]
    if library.prctl(ctypes.c_int(_PR_SET_DUMPABLE), *arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_DUMPABLE): {os.strerror(number)}")
