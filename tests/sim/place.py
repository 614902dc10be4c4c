"""Simulated names of a disk: `Place` on `SimDirectory`, step by step as system calls would go."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from mirrord.errors import RefusedError
from mirrord.storage.backend import Backend, Cache, Capabilities, Identity, Place
from tests.sim.disk import SimBackend, SimDirectory, SimFile
from tests.sim.world import World


class SimPlace(Place):
    """A file name in a directory; with `device` a block device, which has one name for ever."""

    def __init__(
        self,
        world: World,
        directory: SimDirectory,
        name: str,
        who: str,
        capabilities: Capabilities,
        *,
        committed: Callable[[], bool],
        device: bool = False,
    ) -> None:
        self.world = world
        self.directory = directory
        self.name = name
        self.location = f"/{who}/{name}"
        self.who = who
        self.capabilities = capabilities
        self.device = device
        self._committed = committed

    def part(self, job_id: str) -> str:
        return f".{self.name}.mirrord-{job_id}.part"

    def retired(self, job_id: str) -> str:
        return f".{self.name}.mirrord-{job_id}.retired"

    async def open(self, *, read_only: bool = False, cache: Cache = Cache.WRITEBACK) -> Backend:
        await self._step("open")
        file = self.directory.names.get(self.name)
        if file is None:
            raise RefusedError("missing", f"{self.location} is missing")
        return self._open(file)

    async def check_target(self, source: Backend, *, needed: int, force: bool = False) -> None:
        await self._step("check")
        if self.name in self.directory.names and not self.device:
            raise RefusedError("target-exists", f"{self.location} exists")

    async def create(self, job_id: str, source: Backend, *, cache: Cache) -> Backend:
        if self.device:
            return self._open(self.directory.names[self.name])
        name = self.part(job_id)
        file = self._new_file(source.size)

        def make() -> None:
            if name not in self.directory.names:
                self.directory.change(None, name, file)

        await self._step("create", make)
        if self.directory.names.get(name) is not file:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        await self._sync()
        return self._open(file)

    async def find(
        self, job_id: str, identity: Identity, *, cache: Cache, same_boot: bool = False
    ) -> Backend | None:
        await self._sync()
        await self._step("find")
        for name in (self.part(job_id), self.name):
            file = self.directory.names.get(name)
            if file is not None and self._is(file, identity):
                return self._open(file)
        return None

    async def publish(self, job_id: str) -> None:
        if self.device:
            return

        def rename() -> None:
            file = names.get(self.part(job_id))
            if file is not None and self.name not in names:
                self.directory.change(self.part(job_id), self.name, file)

        names = self.directory.names
        await self._step("publish", rename)
        if self.part(job_id) in names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        await self._sync()

    async def withdraw(self, job_id: str) -> None:
        if self.device:
            return
        self._must_not_be_committed("withdraw")
        names = self.directory.names

        def rename() -> None:
            file = names.get(self.name)
            if file is not None and self.part(job_id) not in names:
                self.directory.change(self.name, self.part(job_id), file)

        await self._step("withdraw", rename)
        await self._sync()

    async def discard(self, job_id: str, identity: Identity | None = None) -> None:
        if self.device:
            return
        self._must_not_be_committed("discard")
        names = self.directory.names

        def unlink(name: str) -> None:
            file = names.get(name)
            if file is None or (name == self.name and identity and not self._is(file, identity)):
                return
            self.directory.change(name, None, file)

        for name in (self.part(job_id), self.name):
            await self._step("discard", lambda name=name: unlink(name))
        await self._sync()

    async def confirm(self, job_id: str, identity: Identity) -> str | None:
        await self._step("confirm")
        file = self.directory.names.get(self.name)
        return None if file is not None and self._is(file, identity) else "it is not there"

    async def retire(self, job_id: str, identity: Identity, *, wipe: bool = False) -> str | None:
        self._must_be_committed("retire")
        if self.device:
            return None
        names = self.directory.names
        file = names.get(self.name)
        if self.retired(job_id) in names:
            await self._sync()
            return None
        if file is None:
            return None
        if not self._is(file, identity):
            return "it was replaced"
        if file.open_in:
            return "another program has it open"

        def rename() -> None:
            if names.get(self.name) is file:
                self.directory.change(self.name, self.retired(job_id), file)

        await self._step("retire", rename)
        await self._sync()
        return None

    async def delete_retired(self, job_id: str, identity: Identity) -> None:
        self._must_be_committed("delete")
        if self.device:
            return
        names = self.directory.names

        def unlink() -> None:
            file = names.get(self.retired(job_id))
            if file is not None and self._is(file, identity):
                self.directory.change(self.retired(job_id), None, file)

        await self._step("delete", unlink)
        await self._sync()

    def _must_be_committed(self, doing: str) -> None:
        """The promise "source deleted last", looked at from outside the engine."""
        if not self._committed():
            self.world.violate(f"{doing} of the source while COMMIT is not durable")

    def _must_not_be_committed(self, doing: str) -> None:
        if self._committed():
            self.world.violate(f"{doing} of the target although COMMIT is durable")

    def _is(self, file: SimFile, identity: Identity) -> bool:
        if identity.device != self.world.boots and identity.device > self.world.boots:
            return False
        return (file.inode, file.size) == (identity.inode, identity.size)

    def _new_file(self, size: int) -> SimFile:
        return SimFile(self.world, self.world.tick(), size)

    def _open(self, file: SimFile) -> Backend:
        if file.open_in:
            raise RefusedError("in-use", f"{self.location} is open already")
        return SimBackend(self.world, file, self.who, self.capabilities)

    async def _step(self, operation: str, effect: Callable[[], None] | None = None) -> None:
        effects = [] if effect is None else [effect]
        await self.world.call(f"{self.who}-place", operation, effects, failed=lambda: None)

    async def _sync(self) -> None:
        await self._step("dirsync", self.directory.sync)
