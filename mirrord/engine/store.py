"""The files of one job, as the engine sees them: journal, intent map, dirty map.

The real ones lie in the state directory (`storage/job_files.py`), the simulated ones forget
what was not made durable. What each method promises about durability is the whole interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from mirrord.errors import RefusedError


class JobStore(ABC):
    """One job's durable state. One process has it open (a lock sees to that).

    `dirty` is writable memory, mapped over a file: it survives a kill of this process on the
    same boot, and must not be believed after a power cut. `same_boot` says which it was: True
    only if somebody vouched for the memory on this very boot.
    """

    job_id: str
    dirty: memoryview
    same_boot: bool

    @abstractmethod
    def vouch(self) -> None:
        """Say that `dirty` is right now, so that after a kill it may be believed.

        Until then a kill leaves memory that nobody believes, however far its rebuilding was."""

    @abstractmethod
    async def read_log(self) -> bytes:
        """Return the whole journal file, after making it durable (rule R12)."""

    @abstractmethod
    async def write_log(self, offset: int, data: bytes) -> None:
        """Write inside the preallocated journal; durable on return.

        After an `OSError` it is unknown whether the bytes are durable (rule R15).
        """

    @abstractmethod
    async def read_map(self) -> bytes | None:
        """Return the intent map, after making it durable; None when it is missing, short or
        unreadable (then every region counts as marked, row C23)."""

    @abstractmethod
    async def write_map(self, offset: int, data: bytes, *, durable: bool) -> None:
        """Write a part of the intent map. Without `durable` it may or may not survive."""

    @abstractmethod
    async def create(self, map_bytes: bytes) -> None:
        """Create journal and intent map, preallocated, with everything durable on return:
        the files, their contents, their directory entries."""

    @abstractmethod
    async def close(self) -> None:
        """Release the files and the lock. Idempotent."""


def unwritable(error: OSError) -> RefusedError:
    """Return the refusal of a job whose files can't be made."""
    return RefusedError(
        "state-error",
        f"the state directory can't be written ({error.strerror}): "
        "make room there or mend it, then try again",
    )
