"""What goes wrong before a file is open, in words for an administrator.

smbprotocol tells of trouble by exceptions of its own, `ValueError`s and `OSError`s; `told` turns
each into `LostError` (try again) or `DeniedError` (somebody has to do something), with a line that
names the server and what to do. No text of an authentication library is passed on: it could quote
what it was given.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from smbprotocol.exceptions import SMBAuthenticationError, SMBException, SMBResponseException

from mirrord.errors import ProtocolError, RefusedError
from mirrord.smb import status as st
from mirrord.smb.location import ShareLocation
from mirrord.storage.remote import DeniedError, LostError

LOGON_FAILURE: Final = 0xC000006D
PASSWORD_EXPIRED: Final = 0xC0000071
PASSWORD_MUST_CHANGE: Final = 0xC0000224
ACCOUNT_DISABLED: Final = 0xC0000072
ACCOUNT_LOCKED_OUT: Final = 0xC0000234
ACCOUNT_EXPIRED: Final = 0xC0000193
ACCOUNT_RESTRICTION: Final = 0xC000006E
LOGON_TYPE_NOT_GRANTED: Final = 0xC000015B
PATH_NOT_COVERED: Final = 0xC0000257

_LOGON: Final = {
    LOGON_FAILURE: "wrong user or password: put the right one where `credential` says",
    st.ACCESS_DENIED: "the server lets this user not in: check its rights, and wrong passwords",
    PASSWORD_EXPIRED: "the password has expired: set a new one and put it where `credential` says",
    PASSWORD_MUST_CHANGE: "the password must be changed first: do that, then put in the new one",
    ACCOUNT_DISABLED: "the account is disabled: enable it",
    ACCOUNT_LOCKED_OUT: "the account is locked: unlock it, and check the password",
    ACCOUNT_EXPIRED: "the account has expired: extend it",
    ACCOUNT_RESTRICTION: "the account may not log on so: check its restrictions",
    LOGON_TYPE_NOT_GRANTED: "the account may not log on from a network: grant that",
}


@dataclass(frozen=True, slots=True)
class Step:
    """What was being done, for the words about its failure."""

    server: str
    doing: str  # connecting, logging on, share NAME, …
    share: str = ""


def told(error: BaseException, step: Step) -> OSError:
    """Return what an exception of smbprotocol or the system means."""
    if isinstance(error, LostError):  # a new one: whoever raises it `from error` makes no circle
        return LostError(error.strerror or "lost")
    if isinstance(error, DeniedError):
        return DeniedError(error.errno or errno.EACCES, error.code, error.strerror or error.code)
    if isinstance(error, SMBResponseException):
        return _answered(error.status, step)
    if isinstance(error, SMBAuthenticationError) or _is_kerberos(error):
        return DeniedError(
            errno.EACCES,
            "credential-refused",
            f"{step.server}: authentication failed ({_why(error)}): check the share's `credential`",
        )
    if isinstance(error, ProtocolError):
        return LostError(f"{step.server} broke the protocol: {error}")
    if isinstance(error, OSError):
        return LostError(f"{step.server} can't be reached ({error.strerror or error})")
    if isinstance(error, SMBException) and "guest" in str(error):
        return DeniedError(
            errno.EACCES,
            "guest-refused",
            f"{step.server} takes this user for a guest, which has no keys to sign or encrypt "
            "with: use an account of its own",
        )
    return LostError(f"{step.server}: {step.doing} failed ({type(error).__name__}: {error})")


def _is_kerberos(error: BaseException) -> bool:
    """Tell whether a library of smbprotocol's, which need not be there, refused the credential."""
    return type(error).__module__.partition(".")[0] in ("krb5", "gssapi", "spnego")


def _why(error: BaseException) -> str:
    """Name the kind of trouble, by its class alone."""
    cause = error.__cause__ if isinstance(error, SMBAuthenticationError) else error
    return type(cause).__name__ if cause is not None else "no mechanism that both sides have"


def _answered(number: int, step: Step) -> OSError:
    name = st.name_of(number)
    if step.doing == "logging on":
        if number in _LOGON:
            return DeniedError(
                errno.EACCES, "credential-refused", f"{step.server}: {_LOGON[number]}"
            )
        return LostError(f"{step.server}: logging on failed ({name})")
    if step.doing == "the share":
        if number == st.BAD_NETWORK_NAME:
            return DeniedError(
                errno.ENOENT,
                "share-missing",
                f"{step.server} has no share {step.share}: check its name",
            )
        if number == st.ACCESS_DENIED:
            return DeniedError(
                errno.EACCES,
                "share-denied",
                f"{step.server}: this user may not use the share {step.share}: grant that",
            )
    if number in st.LOST:
        return LostError(f"{step.server}: {step.doing}: {name}")
    if step.doing == "connecting":
        return DeniedError(
            errno.EPROTONOSUPPORT,
            "server-too-weak",
            f"{step.server} speaks no dialect that this share's settings allow ({name}): enable "
            "SMB 3.1.1 there, or lower `min_dialect`",
        )
    return st.failure(number, f"{step.server}: {step.doing}")


def unopened(location: str, error: OSError) -> RefusedError:
    """Say why a disk on a share can't be opened."""
    known = {
        errno.ENOENT: ("location-missing", "doesn't exist: check the path"),
        errno.EBUSY: ("in-use", "is in use by another client: stop that first"),
        errno.EISDIR: ("is-directory", "is a folder: name a file"),
        errno.EACCES: (
            "unreadable",
            "can't be opened by this user: check its permissions, or attach it with --read-only",
        ),
    }
    code, reason = known.get(
        error.errno or 0, ("unreadable", f"can't be opened ({error.strerror})")
    )
    return RefusedError(code, f"{location} {reason}")


def not_creatable(at: ShareLocation, error: OSError) -> RefusedError:
    """Say why a disk can't be made there."""
    folder = at.folder or at.share
    known = {
        errno.EEXIST: ("target-exists", "its temporary name is taken: discard the old job"),
        errno.ENOENT: ("directory-missing", f"there is no folder {folder}: create it first"),
        errno.ENOTDIR: ("directory-missing", f"{folder} is not a folder: name another"),
        errno.EACCES: ("directory-not-writable", f"this user can't write to {folder}"),
        errno.EROFS: ("directory-not-writable", f"{folder} is read-only"),
        errno.ENOSPC: ("no-space", "the server's file system is full: free some space"),
        errno.EDQUOT: ("no-space", "the quota is used up: free some space"),
        errno.EFBIG: (
            "too-large",
            "the server's file system takes no file of that size, or would allocate all of it and "
            "is full: choose another",
        ),
        errno.EINVAL: ("bad-name", "the server doesn't take that name: choose another"),
    }
    code, reason = known.get(
        error.errno or 0, ("target-unusable", f"{error.strerror}: choose another target")
    )
    return RefusedError(code, f"{at} can't be created: {reason}")


def words_for(work: Callable[..., object]) -> str:
    """Return what messages call a function of `control`."""
    return getattr(work, "__name__", "a request").replace("_", " ")
