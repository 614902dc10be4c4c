"""Numbers of statuses are Microsoft's, and each is the errno that a disk's user expects."""

from __future__ import annotations

import errno

import pytest
from smbprotocol.header import NtStatus

from mirrord.smb import status

# What smbprotocol calls otherwise, or doesn't know: [MS-ERREF] 2.3.1.
OTHER_NAMES = {
    "NAME_INVALID": "OBJECT_NAME_INVALID",
    "NAME_NOT_FOUND": "OBJECT_NAME_NOT_FOUND",
    "NAME_COLLISION": "OBJECT_NAME_COLLISION",
    "PATH_NOT_FOUND": "OBJECT_PATH_NOT_FOUND",
}
UNKNOWN_TO_SMBPROTOCOL = {
    "QUOTA_EXCEEDED": 0xC0000044,
    "MEDIA_WRITE_PROTECTED": 0xC00000A2,
    "NETWORK_SESSION_EXPIRED": 0xC000035C,
    "FILE_NOT_AVAILABLE": 0xC0000467,
    "FILE_TOO_LARGE": 0xC0000904,
}

NUMBERS = {
    name: value for name, value in vars(status).items() if name.isupper() and isinstance(value, int)
}
THEIRS = {name.removeprefix("STATUS_"): value for name, value in vars(NtStatus).items()}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_that_of_the_specification(name: str) -> None:
    number = THEIRS.get(OTHER_NAMES.get(name, name), UNKNOWN_TO_SMBPROTOCOL.get(name))
    assert NUMBERS[name] == number


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (status.ACCESS_DENIED, errno.EACCES),
        (status.NAME_INVALID, errno.EINVAL),
        (status.NAME_NOT_FOUND, errno.ENOENT),
        (status.PATH_NOT_FOUND, errno.ENOENT),
        (status.BAD_NETWORK_NAME, errno.ENOENT),
        (status.NAME_COLLISION, errno.EEXIST),
        (status.SHARING_VIOLATION, errno.EBUSY),
        (status.DELETE_PENDING, errno.EBUSY),
        (status.DISK_FULL, errno.ENOSPC),
        (status.QUOTA_EXCEEDED, errno.EDQUOT),
        (status.FILE_TOO_LARGE, errno.EFBIG),
        (status.MEDIA_WRITE_PROTECTED, errno.EROFS),
        (status.FILE_IS_A_DIRECTORY, errno.EISDIR),
        (status.NOT_A_DIRECTORY, errno.ENOTDIR),
        (status.INVALID_DEVICE_REQUEST, errno.EOPNOTSUPP),
        (status.NOT_SUPPORTED, errno.EOPNOTSUPP),
        (status.INVALID_PARAMETER, errno.EINVAL),
        (status.INSUFFICIENT_RESOURCES, errno.ENOMEM),
        (status.INSUFF_SERVER_RESOURCES, errno.ENOMEM),
        (status.END_OF_FILE, errno.ESTALE),
        (status.REQUEST_NOT_ACCEPTED, errno.EIO),
        (0xC0001234, errno.EIO),
    ],
    ids=hex,
)
def test_a_status_is_an_errno(number: int, error: int) -> None:
    assert status.errno_of(number) == error
    assert status.failure(number, "read").errno == error


def test_names_are_those_that_the_server_documents() -> None:
    assert status.name_of(status.SUCCESS) == "STATUS_SUCCESS"
    assert status.name_of(status.DISK_FULL) == "STATUS_DISK_FULL"
    assert status.name_of(0xC0001234) == "NTSTATUS 0xc0001234"
    assert status.name_of(0x34) == "NTSTATUS 0x00000034"
    text = status.failure(status.ACCESS_DENIED, "nas1: write").strerror
    assert text == "nas1: write: STATUS_ACCESS_DENIED"


def test_what_is_lost_is_asked_again_and_no_refusal_is() -> None:
    assert status.NETWORK_SESSION_EXPIRED in status.LOST
    assert status.FILE_CLOSED in status.LOST
    assert not status.LOST & {status.SUCCESS, status.PENDING, status.ACCESS_DENIED}
    assert not status.LOST & status.UNSUPPORTED
    assert not {status.DISK_FULL, status.ACCESS_DENIED} & status.UNSUPPORTED
