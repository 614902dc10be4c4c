"""NTSTATUS values that a disk meets, and the errno that each one is.

Sources: [MS-ERREF] 2.3.1 for the numbers; the errnos are those that Linux's own client answers with
(fs/smb/client/smb2maperror.c) where the engine doesn't need another one.
"""

from __future__ import annotations

import errno
from typing import Final

SUCCESS: Final = 0
PENDING: Final = 0x00000103
BUFFER_OVERFLOW: Final = 0x80000005  # a warning: there is more than the room that was given
NO_MORE_FILES: Final = 0x80000006
INVALID_PARAMETER: Final = 0xC000000D
INVALID_DEVICE_REQUEST: Final = 0xC0000010
END_OF_FILE: Final = 0xC0000011
MORE_PROCESSING_REQUIRED: Final = 0xC0000016
ACCESS_DENIED: Final = 0xC0000022
BUFFER_TOO_SMALL: Final = 0xC0000023
NAME_INVALID: Final = 0xC0000033
NAME_NOT_FOUND: Final = 0xC0000034
NAME_COLLISION: Final = 0xC0000035
PATH_NOT_FOUND: Final = 0xC000003A
SHARING_VIOLATION: Final = 0xC0000043
QUOTA_EXCEEDED: Final = 0xC0000044
DELETE_PENDING: Final = 0xC0000056
DISK_FULL: Final = 0xC000007F
MEDIA_WRITE_PROTECTED: Final = 0xC00000A2
FILE_IS_A_DIRECTORY: Final = 0xC00000BA
NOT_SUPPORTED: Final = 0xC00000BB
NETWORK_NAME_DELETED: Final = 0xC00000C9
BAD_NETWORK_NAME: Final = 0xC00000CC
REQUEST_NOT_ACCEPTED: Final = 0xC00000D0
INSUFFICIENT_RESOURCES: Final = 0xC000009A
INSUFF_SERVER_RESOURCES: Final = 0xC0000205
NOT_A_DIRECTORY: Final = 0xC0000103
FILE_CLOSED: Final = 0xC0000128
INVALID_HANDLE: Final = 0xC0000008
USER_SESSION_DELETED: Final = 0xC0000203
NETWORK_SESSION_EXPIRED: Final = 0xC000035C
FILE_NOT_AVAILABLE: Final = 0xC0000467
FILE_TOO_LARGE: Final = 0xC0000904

# The server dropped what the request names: reconnect, open again, ask again.
LOST: Final = frozenset(
    {
        NETWORK_NAME_DELETED,
        FILE_CLOSED,
        INVALID_HANDLE,
        USER_SESSION_DELETED,
        NETWORK_SESSION_EXPIRED,
        FILE_NOT_AVAILABLE,
    }
)

# The server has no such operation, or not for this file.
UNSUPPORTED: Final = frozenset({INVALID_DEVICE_REQUEST, NOT_SUPPORTED, INVALID_PARAMETER})

_ERRNOS: Final = {
    ACCESS_DENIED: errno.EACCES,
    NAME_INVALID: errno.EINVAL,
    NAME_NOT_FOUND: errno.ENOENT,
    PATH_NOT_FOUND: errno.ENOENT,
    BAD_NETWORK_NAME: errno.ENOENT,
    NAME_COLLISION: errno.EEXIST,
    SHARING_VIOLATION: errno.EBUSY,
    DELETE_PENDING: errno.EBUSY,
    DISK_FULL: errno.ENOSPC,
    QUOTA_EXCEEDED: errno.EDQUOT,
    FILE_TOO_LARGE: errno.EFBIG,
    MEDIA_WRITE_PROTECTED: errno.EROFS,
    FILE_IS_A_DIRECTORY: errno.EISDIR,
    NOT_A_DIRECTORY: errno.ENOTDIR,
    INVALID_DEVICE_REQUEST: errno.EOPNOTSUPP,
    NOT_SUPPORTED: errno.EOPNOTSUPP,
    INVALID_PARAMETER: errno.EINVAL,
    INSUFFICIENT_RESOURCES: errno.ENOMEM,
    INSUFF_SERVER_RESOURCES: errno.ENOMEM,
    END_OF_FILE: errno.ESTALE,
}

_NAMES: Final = {
    value: name for name, value in tuple(globals().items()) if name.isupper() and type(value) is int
}


def errno_of(status: int) -> int:
    """Return the errno of a failed request; EIO for what has none of its own."""
    return _ERRNOS.get(status, errno.EIO)


def name_of(status: int) -> str:
    """Return what an administrator finds in the server's documentation."""
    return f"STATUS_{_NAMES[status]}" if status in _NAMES else f"NTSTATUS {status:#010x}"


def failure(status: int, doing: str) -> OSError:
    """Return the error of a request that a server refused."""
    return OSError(errno_of(status), f"{doing}: {name_of(status)}")
