"""What is done with names and handles on a share, by smbprotocol's documented classes. All block.

Each function takes a connected tree and makes one or a few requests. Failures are smbprotocol's
exceptions; `trouble.told` says what they mean. Used by the fast path and by the plain one.
"""

from __future__ import annotations

import logging
import socket
import uuid
from dataclasses import dataclass
from errno import EFBIG
from typing import Any, Final

from smbprotocol.create_contexts import (
    DurableHandleFlags,
    SMB2CreateDurableHandleReconnectV2,
    SMB2CreateDurableHandleRequestV2,
    SMB2CreateDurableHandleResponseV2,
    SMB2CreateRequestLeaseV2,
)
from smbprotocol.exceptions import SMBResponseException
from smbprotocol.file_info import (
    FileAttributes,
    FileBasicInformation,
    FileDispositionInformation,
    FileEndOfFileInformation,
    FileFsFullSizeInformation,
    FileFsVolumeInformation,
    FileInternalInformation,
    FileRenameInformation,
    FileStandardInformation,
)
from smbprotocol.ioctl import (
    IOCTLFlags,
    SMB2IOCTLRequest,
    SMB2IOCTLResponse,
    SMB2NetworkInterfaceInfo,
    SockAddrFamily,
)
from smbprotocol.open import (
    CreateDisposition,
    CreateOptions,
    FilePipePrinterAccessMask,
    ImpersonationLevel,
    Open,
    RequestedOplockLevel,
    ShareAccess,
    SMB2CloseRequest,
    SMB2FlushRequest,
    SMB2QueryInfoRequest,
    SMB2QueryInfoResponse,
    SMB2SetInfoRequest,
    SMB2WriteRequest,
)

from mirrord.smb import wire
from mirrord.storage.remote import DeniedError

log = logging.getLogger(__name__)

Access = FilePipePrinterAccessMask
READ: Final = Access.FILE_READ_DATA | Access.FILE_READ_ATTRIBUTES | Access.SYNCHRONIZE
WRITE: Final = READ | Access.FILE_WRITE_DATA | Access.FILE_WRITE_ATTRIBUTES | Access.DELETE
LOOK: Final = Access.FILE_READ_ATTRIBUTES | Access.SYNCHRONIZE
REMOVE: Final = LOOK | Access.DELETE
ADD_FILE: Final = 2  # FILE_ADD_FILE, of a folder
NOT_SHARED: Final = 0
SHARED: Final = (
    ShareAccess.FILE_SHARE_READ | ShareAccess.FILE_SHARE_WRITE | ShareAccess.FILE_SHARE_DELETE
)
SHARED_FOR_READING: Final = ShareAccess.FILE_SHARE_READ

DURABLE_MS: Final = 120_000  # that a server keeps a handle for us: longer than `io_timeout`
LEASE_RWH: Final = 7
OUTPUT_BYTES_MAX: Final = 64 * 1024
NO_FILE: Final = b"\xff" * 16  # where an ioctl concerns no file
_NORMAL: Final = 0x80  # FILE_ATTRIBUTE_NORMAL
_SPARSE: Final = 0x200  # FILE_ATTRIBUTE_SPARSE_FILE
_NANOSECONDS_A_TICK: Final = 100
_EPOCH_TICKS: Final = 116_444_736_000_000_000  # 1970 in FILETIME


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says of an open file."""

    size: int
    number: int  # of the file on its volume
    volume: int
    born_ns: int  # since 1970; 0 where the server doesn't keep it
    links: int
    is_folder: bool
    is_sparse: bool


@dataclass(slots=True)
class Handle:
    """An open file at the server: its id, and what survives the connection."""

    file_id: bytes
    guid: uuid.UUID
    durable: bool = False
    persistent: bool = False


def open_handle(
    tree: Any,
    path: str,
    access: int,
    *,
    share: int = NOT_SHARED,
    create: bool = False,
    folder: bool | None = False,
    delete: bool = False,
    durable: bool = False,
) -> Handle:
    """Open or create (never both). `path` has slashes. `delete`: it goes when it is closed.

    `folder` None opens whatever it is. A durable handle outlives its connection, where the server
    grants that.
    """
    guid = uuid.uuid4()
    kinds = {True: CreateOptions.FILE_DIRECTORY_FILE, False: CreateOptions.FILE_NON_DIRECTORY_FILE}
    contexts = [_lease(guid), _durable(tree, guid)] if durable else None
    return _create(
        tree, path, access, share, guid, contexts,
        CreateDisposition.FILE_CREATE if create else CreateDisposition.FILE_OPEN,
        (0 if folder is None else kinds[folder])
        | (CreateOptions.FILE_DELETE_ON_CLOSE if delete else 0),
    )  # fmt: skip


def reopen_handle(tree: Any, path: str, access: int, former: Handle, *, share: int) -> Handle:
    """Take a durable handle over, on a new connection of the same client.

    The server grants it only if nobody else has opened the file meanwhile.
    """
    reconnect = SMB2CreateDurableHandleReconnectV2()
    reconnect["file_id"] = former.file_id
    reconnect["create_guid"] = former.guid
    if former.persistent:
        reconnect["flags"] = DurableHandleFlags.SMB2_DHANDLE_FLAG_PERSISTENT
    again = _create(
        tree, path, access, share, former.guid, [reconnect, _lease(former.guid)],
        CreateDisposition.FILE_OPEN, CreateOptions.FILE_NON_DIRECTORY_FILE,
    )  # fmt: skip
    again.durable, again.persistent = True, former.persistent
    return again


def _create(
    tree: Any, path: str, access: int, share: int, guid: uuid.UUID, contexts: list[Any] | None,
    disposition: int, options: int,
) -> Handle:  # fmt: skip
    file = Open(tree, path.replace("/", "\\"))
    answers = file.create(
        ImpersonationLevel.Impersonation,
        access,
        0 if options & CreateOptions.FILE_DIRECTORY_FILE else _NORMAL,
        share,
        disposition,
        options,
        create_contexts=contexts,
        oplock_level=(
            RequestedOplockLevel.SMB2_OPLOCK_LEVEL_LEASE
            if contexts
            else RequestedOplockLevel.SMB2_OPLOCK_LEVEL_NONE
        ),
    )
    tree.session.open_table.pop(file.file_id, None)  # it is ours to close
    handle = Handle(file.file_id, guid)
    for answer in answers or ():
        if isinstance(answer, SMB2CreateDurableHandleResponseV2):
            handle.durable = True
            handle.persistent = bool(answer["flags"].get_value())
    return handle


def _lease(guid: uuid.UUID) -> Any:
    """Ask for all that a durable handle needs; the key is the handle's own."""
    lease = SMB2CreateRequestLeaseV2()
    lease["lease_key"] = guid.bytes
    lease["lease_state"] = LEASE_RWH
    lease["parent_lease_key"] = bytes(16)
    lease["epoch"] = bytes(2)
    return lease


def _durable(tree: Any, guid: uuid.UUID) -> Any:
    durable = SMB2CreateDurableHandleRequestV2()
    durable["timeout"] = DURABLE_MS
    durable["create_guid"] = guid
    if tree.is_ca_share:  # it keeps handles even over its own restart
        durable["flags"] = DurableHandleFlags.SMB2_DHANDLE_FLAG_PERSISTENT
    return durable


def _ask(tree: Any, message: Any) -> Any:
    connection = tree.session.connection
    request = connection.send(message, tree.session.session_id, tree.tree_connect_id)
    return connection.receive(request)


def disconnect(tree: Any) -> None:
    """Leave the share; what is open by this tree is closed with it."""
    tree.disconnect()


def close(tree: Any, handle: Handle) -> None:
    """Close a handle; one that asked for it deletes its file by this."""
    message = SMB2CloseRequest()
    message["file_id"] = handle.file_id
    _ask(tree, message)


def flush(tree: Any, handle: Handle) -> None:
    """Make a file durable, or a folder's names where the server does that."""
    message = SMB2FlushRequest()
    message["file_id"] = handle.file_id
    _ask(tree, message)


def rename(tree: Any, handle: Handle, path: str) -> None:
    """Rename an open file, never over another."""
    information = FileRenameInformation()
    information["replace_if_exists"] = False
    information["file_name"] = path.replace("/", "\\")
    _set(tree, handle, information)


def dispose(tree: Any, handle: Handle) -> None:
    """Have the file deleted when its last handle is closed."""
    information = FileDispositionInformation()
    information["delete_pending"] = True
    _set(tree, handle, information)


def set_size(tree: Any, handle: Handle, size: int) -> None:
    """Set where the file ends."""
    information = FileEndOfFileInformation()
    information["end_of_file"] = size
    _set(tree, handle, information)


def unhide(tree: Any, handle: Handle, *, sparse: bool) -> None:
    """Say that the file is none to be hidden: Samba hides what is made under a name with a dot,
    also when it has another name later (`hide dot files`).

    It then forgets that the file is sparse; and once more with the next write, if that isn't an
    archived file already.
    """
    information = FileBasicInformation()
    information["file_attributes"] = FileAttributes.FILE_ATTRIBUTE_ARCHIVE
    try:
        _set(tree, handle, information)
    except SMBResponseException as error:
        log.info("not unhidden error=%s", error)
    if sparse:
        make_sparse(tree, handle)


def _set(tree: Any, handle: Handle, information: Any) -> None:
    message = SMB2SetInfoRequest()
    message["info_type"] = information.INFO_TYPE
    message["file_info_class"] = information.INFO_CLASS
    message["file_id"] = handle.file_id
    message["buffer"] = information.pack()
    _ask(tree, message)


def _query(tree: Any, handle: Handle, kind: Any, room: int = 1024) -> Any:
    message = SMB2QueryInfoRequest()
    message["info_type"] = kind.INFO_TYPE
    message["file_info_class"] = kind.INFO_CLASS
    message["output_buffer_length"] = room
    message["file_id"] = handle.file_id
    answer = SMB2QueryInfoResponse()
    answer.unpack(_ask(tree, message)["data"].get_value())
    return answer.parse_buffer(kind)


def facts(tree: Any, handle: Handle) -> Facts:
    """Return what the server says of an open file."""
    standard = _query(tree, handle, FileStandardInformation)
    basic = _query(tree, handle, FileBasicInformation)
    born = int(basic["creation_time"].get_value())
    return Facts(
        size=standard["end_of_file"].get_value(),
        number=_query(tree, handle, FileInternalInformation)["index_number"].get_value(),
        volume=_query(tree, handle, FileFsVolumeInformation)["volume_serial_number"].get_value(),
        born_ns=(born - _EPOCH_TICKS) * _NANOSECONDS_A_TICK if born > _EPOCH_TICKS else 0,
        links=standard["number_of_links"].get_value(),
        is_folder=standard["directory"].get_value(),
        is_sparse=bool(basic["file_attributes"].get_value() & _SPARSE),
    )


def probe_end(tree: Any, handle: Handle, size: int) -> None:
    """Write a zero where a new file ends. Raises EFBIG when that can't be written."""
    message = SMB2WriteRequest()
    message["length"] = 1
    message["offset"] = size - 1
    message["file_id"] = handle.file_id
    message["buffer"] = b"\0"
    try:
        _ask(tree, message)
    except SMBResponseException as error:
        raise DeniedError(EFBIG, "too-large", "the end can't be written") from error


def size_of(tree: Any, handle: Handle) -> int:
    """Return where the file ends now."""
    return int(_query(tree, handle, FileStandardInformation)["end_of_file"].get_value())


def available_bytes(tree: Any, handle: Handle) -> int:
    """Return what this user may still write, quota included."""
    space = _query(tree, handle, FileFsFullSizeInformation)
    unit = space["sectors_per_unit"].get_value() * space["bytes_per_sector"].get_value()
    return int(space["caller_available_units"].get_value() * unit)


def ioctl(tree: Any, file_id: bytes, code: int, given: bytes, room: int = 0) -> bytes:
    """Ask for a file system control; return its output."""
    message = SMB2IOCTLRequest()
    message["ctl_code"] = code
    message["file_id"] = file_id
    message["buffer"] = given
    message["max_output_response"] = room
    message["flags"] = IOCTLFlags.SMB2_0_IOCTL_IS_FSCTL
    answer = SMB2IOCTLResponse()
    answer.unpack(_ask(tree, message)["data"].get_value())
    return bytes(answer["buffer"].get_value())


def make_sparse(tree: Any, handle: Handle) -> bool:
    """Let the file have holes; False where the server, or its file system, can't."""
    try:
        ioctl(tree, handle.file_id, wire.SET_SPARSE, b"\1")
    except SMBResponseException:
        return False
    return True


def try_copy(tree: Any, handle: Handle, length: int) -> bool:
    """Have the server copy the file's beginning behind itself; False where it doesn't."""
    try:
        room = OUTPUT_BYTES_MAX
        output = ioctl(tree, handle.file_id, wire.REQUEST_RESUME_KEY, b"", room)
        given = wire.copy_chunks(wire.parse_resume_key(output), [(0, length, length)])
        output = ioctl(tree, handle.file_id, wire.SRV_COPYCHUNK_WRITE, given, room)
    except SMBResponseException:
        return False
    return wire.parse_copied(output)[2] == length


def interfaces(tree: Any) -> list[str]:
    """Return the server's addresses that take connections of a session, quickest first.

    [MS-SMB2] 3.2.4.20.10. Addresses that can't be reached are the caller's to find out.
    """
    room = OUTPUT_BYTES_MAX
    output = ioctl(tree, NO_FILE, wire.QUERY_NETWORK_INTERFACES, b"", room)
    found: list[tuple[int, str]] = []
    while output:
        one = SMB2NetworkInterfaceInfo()
        one.unpack(output)
        storage = one["sock_addr_storage"]
        address = storage["buffer"].get_value()
        if storage["family"].get_value() == SockAddrFamily.INTER_NETWORK:
            name = socket.inet_ntop(socket.AF_INET, address["ipv4_address"].get_value())
        else:
            name = socket.inet_ntop(socket.AF_INET6, address["ipv6_address"].get_value())
        found.append((-one["link_speed"].get_value(), name))
        following = one["next"].get_value()
        output = output[following:] if following else b""
    return list(dict.fromkeys(name for _, name in sorted(found)))
