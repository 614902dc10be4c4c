"""Storage at the other end of a connection that may die: what `SteadyBackend` stands on.

A `RemoteFile` is one open file in one life of a connection. When the connection is lost, so is
the `RemoteFile`; a `Door` opens the same file again and says how sure that is. Everything that
outlives a connection (waiting, replaying, proving) is `steady`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from errno import ENOTCONN

from mirrord.core.geometry import MIB, Extent
from mirrord.storage.backend import Buffer, Capabilities, Identity


class LostError(OSError):
    """The connection was lost, or can't be had now: what was asked may have been done or not."""

    def __init__(self, why: str) -> None:
        super().__init__(ENOTCONN, why)


class ForgottenError(LostError):
    """The server answers, and has kept nothing of ours: the next attempt asks for something else,
    so it need not wait."""


class DeniedError(OSError):
    """The server, or we, won't: trying again changes nothing until somebody changes something.

    `code` names the reason for programs, as `RefusedError.code` does.
    """

    def __init__(self, number: int, code: str, why: str) -> None:
        super().__init__(number, why)
        self.code = code


class RemoteFile(ABC):
    """One open file, ours alone, on one connection.

    Every method may raise `LostError`; then it is over with this object, but for `close`. Other
    `OSError`s are the storage's own. Operations that were started end by themselves, as a
    `Backend`'s do, and need `data` that nobody changes.
    """

    size: int
    identity: Identity
    capabilities: Capabilities
    path: str = ""  # the name it was opened under, or given since
    kept: bool = False  # opened again as the very handle it was: nobody else can have written

    @abstractmethod
    def when_lost(self, tell: Callable[[LostError], None]) -> None:
        """Have `tell` called when the connection is lost; at once if it is already."""

    @abstractmethod
    async def read(
        self, offset: int, length: int, *, stored: bool = False, copying: bool = False
    ) -> Buffer:
        """Read; with `stored` past the server's cache, where it has such a thing.

        With `copying` it is for a move, and so that others who use the server wait little.
        """

    @abstractmethod
    async def write(
        self, offset: int, data: Buffer, *, through: bool = False, copying: bool = False
    ) -> None:
        """Write all of it; durable on return with `through`. `copying` as in `read`."""

    @abstractmethod
    async def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeroes, giving storage back if `punches_holes`."""

    @abstractmethod
    async def flush(self) -> None:
        """Make every write that was answered before durable at the server."""

    @abstractmethod
    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As `Backend.extents`."""

    @abstractmethod
    async def size_now(self) -> int:
        """Return the size that the server knows."""

    async def copy_from(self, source: RemoteFile, offset: int, length: int) -> bool:
        """Have the server copy the range between two of its files; False where it can't."""
        return False

    def copies_from(self, source: RemoteFile) -> bool:
        """Tell whether `copy_from` is worth trying."""
        return False

    @abstractmethod
    async def close(self) -> None:
        """Give the handle back, if there still is one. Never raises; idempotent."""

    def facts(self) -> dict[str, object]:
        """Return what `show` says about the connection."""
        return {}


@dataclass(frozen=True, slots=True)
class SteadySettings:
    """How long `SteadyBackend` waits, and how much it keeps."""

    io_timeout_s: float = 60.0
    target_wait_s: float = 4.0  # of a target's request, below the engine's limit for a stall
    unflushed_bytes_max: int = 64 * MIB
    write_through: bool = False  # every write is durable before its answer, so nothing is kept


class Door(ABC):
    """Opens one file again and again, as often as its connection dies."""

    where: str  # for messages: the server
    authoritative = False  # a guest waits for the file

    @abstractmethod
    async def reopen(self, former: RemoteFile) -> RemoteFile:
        """Open the file of `former` again.

        Raises LostError: not now, try again. DeniedError: not before somebody does something.
        """

    async def is_there(self, former: RemoteFile) -> bool:
        """Tell whether the file that is open still has its name. Raises OSError: it isn't known."""
        return True

    def changed(self) -> bool:
        """Tell whether what made the last `DeniedError` may be gone: another password, say."""
        return False
