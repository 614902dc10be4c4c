"""The three requests that change a disk, as values that can be applied to either side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from mirrord.storage.backend import Backend, Buffer


class Mutation(ABC):
    """A guest's change of one range. Applying it twice is the same as applying it once."""

    __slots__ = ()
    offset: int
    length: int
    fua: bool  # durable before it is answered

    @abstractmethod
    async def apply(self, backend: Backend) -> None:
        """Do it as the guest asked, FUA included."""

    @abstractmethod
    async def mirror(self, backend: Backend) -> None:
        """Do it to the other leg: same content, no durability of its own (rule R10)."""

    def begin_mirror(self, backend: Backend, ended: Callable[[OSError | None], None]) -> bool:
        """Begin what `mirror` does, as `Backend.begin_write` does; False where that can't be."""
        return False


@dataclass(slots=True)
class Write(Mutation):
    """Write `data`, which nobody changes any more."""

    offset: int
    length: int
    data: Buffer
    fua: bool

    async def apply(self, backend: Backend) -> None:
        await backend.write(self.offset, self.data, fua=self.fua)

    async def mirror(self, backend: Backend) -> None:
        await backend.write(self.offset, self.data)

    def begin_mirror(self, backend: Backend, ended: Callable[[OSError | None], None]) -> bool:
        return backend.begin_write(self.offset, self.data, ended)


@dataclass(slots=True)
class Zeroes(Mutation):
    """Make the range read as zeroes."""

    offset: int
    length: int
    fua: bool
    punch: bool
    fast: bool

    async def apply(self, backend: Backend) -> None:
        await backend.write_zeroes(
            self.offset, self.length, fua=self.fua, punch=self.punch, fast=self.fast
        )

    async def mirror(self, backend: Backend) -> None:
        await backend.write_zeroes(self.offset, self.length, punch=self.punch)


@dataclass(slots=True)
class Trim(Mutation):
    """Give the range's storage back."""

    offset: int
    length: int
    fua: bool

    async def apply(self, backend: Backend) -> None:
        await backend.trim(self.offset, self.length, fua=self.fua)

    async def mirror(self, backend: Backend) -> None:
        await backend.trim(self.offset, self.length)
