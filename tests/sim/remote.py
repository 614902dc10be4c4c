"""Simulated servers: machines of their own, at the other end of a connection that may die.

A server has files and forgets as a machine does, but not together with our host: a power cut of
the host only ends its connections. A `Loss` is what happens to one:

* `cut`: the connection alone. What was on its way may still have its effect, until the file is
  open again. The handle may have been kept.
* `killed`: the server's process. What it had taken is in the machine's cache; the handle is gone.
* `reboot`: the machine. Each block keeps any of its versions since the last flush.

The server then is away for a while. With `tamper` somebody uses that: the file is replaced by
another, or an older content of it is put back.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from xxhash import xxh3_64_intdigest

from mirrord.core.geometry import Extent
from mirrord.errors import RefusedError
from mirrord.storage.backend import Backend, Buffer, Capabilities, UnreachableError
from mirrord.storage.remote import DeniedError, Door, LostError, RemoteFile, SteadySettings
from mirrord.storage.steady import SteadyBackend
from tests.sim.disk import SimBackend, SimDirectory, SimFile
from tests.sim.loop import elapse
from tests.sim.place import SimPlace
from tests.sim.world import World

NAMES_WAIT_S = 1.0  # how long a question about names waits for a server that is away
SNAPSHOTS_MAX = 6
INODES = 100  # the first number of a new file


@dataclass(slots=True)
class Loss:
    """One misfortune of a server: at a time, or at the `nth` point of an operation.

    Both count from the moment `since`: the beginning of all, of the move, its commit, or our
    process's first death.
    """

    kind: str  # cut, killed, reboot
    away_s: float
    keeps: bool = False  # the handle, over a cut
    tamper: str = ""  # replaced, older
    since: str = "beginning"  # move, commit, kill
    at_s: float | None = None
    nth: int = 1
    who: str = ""
    operation: str = ""
    stage: str = ""

    def hits(self, who: str, operation: str, stage: str) -> bool:
        if (self.who, self.operation, self.stage) != (who, operation, stage):
            return False
        self.nth -= 1
        return self.nth == 0


class ServedFile(SimFile):
    """A file of a server, and what became of our connection to it."""

    def __init__(self, server: SimServer, inode: int, size: int, content: bytes = b"") -> None:
        super().__init__(server.world, inode, size, content or None)
        self.server = server
        self.exposed = False  # a process died that kept what isn't durable here
        self.owes = False  # the server forgot, and our process has not put it right yet
        self.lost_s: float | None = None  # when the connection was lost
        self.worst_s = 0.0  # the longest time without one
        self.calm_s = -1.0  # when the last such time ended
        self.kept = False  # the handle can be had again
        self.orphans: list[SimHandle] = []  # whose calls may still have effects
        self.older = False  # somebody means to put an older content back
        self.tampered = False
        self.snapshots = [bytes(self.view)]
        self.backend: SteadyBackend | None = None
        server.files.append(self)

    def crash(self, power: bool) -> None:
        """Our host died: that is not the server's concern."""
        self.open_in.clear()
        self.orphans.clear()
        self.kept = False
        self.worst_s, self.lost_s = self.away_s(), None
        self.exposed = self.exposed or bool(self.versions)

    def reboot(self) -> None:
        super().crash(power=True)

    def sync(self, tick: int, only: range | None = None) -> None:
        super().sync(tick, only)
        if only is None:
            self.exposed = False
            if len(self.snapshots) < SNAPSHOTS_MAX:
                self.snapshots.append(bytes(self.platter))

    def lose(self, handle: SimHandle, loss: Loss) -> None:
        """The connection of its one handle is lost."""
        now_s = self.world.loop.time()
        self.lost_s = now_s if self.lost_s is None else self.lost_s
        self.kept = loss.kind == "cut" and loss.keeps and not loss.tamper
        self.open_in.clear()
        if loss.kind == "cut":
            self.orphans.append(handle)

    def connected(self) -> None:
        """Our process serves it again, and says so by that to have put everything right."""
        self.owes = False
        if self.lost_s is not None:
            self.calm_s = self.world.loop.time()
            self.worst_s = max(self.worst_s, self.calm_s - self.lost_s)
            self.lost_s = None

    def away_s(self) -> float:
        """Return the longest time without a connection, up to now."""
        now_s = self.world.loop.time()
        return max(self.worst_s, 0.0 if self.lost_s is None else now_s - self.lost_s)

    def was_calm_since(self, began_s: float) -> bool:
        return self.lost_s is None and self.calm_s < began_s

    def put_older_back(self) -> None:
        """Put an older content in the file's place, if the proof that comes now must tell.

        The first sample that is looked at decides that: what comes later may be overtaken.
        """
        sample = _first_sample(self.backend)
        if self.tampered and (sample is None or _tells(sample, bytes(self.view))):
            return
        if sample is None:
            return
        for content in self.snapshots:
            if _tells(sample, content):
                self.world.tell("somebody puts an older content back")
                self.view[:] = self.platter[:] = content
                self.versions.clear()
                self.tampered = True
                return


class SimServer:
    """A machine with files. `noticed` is told of each loss, before handles and callers are."""

    def __init__(
        self,
        world: World,
        losses: list[Loss],
        settings: SteadySettings,
        noticed: Callable[[ServedFile, Loss], None],
    ) -> None:
        self.world = world
        self.losses = losses
        self.settings = settings
        self.files: list[ServedFile] = []
        self.handles: list[SimRemoteFile] = []
        self._noticed = noticed
        self._back_s = 0.0
        self._armed = {"beginning"}
        world.survivors.append(self)
        if any(loss.at_s is None for loss in losses):
            world.lookouts.append(self._look)

    @property
    def away(self) -> bool:
        return self.world.loop.time() < self._back_s

    def crash(self, power: bool) -> None:
        self.handles.clear()
        self._armed.add("kill")

    def boot(self) -> None:
        """A life of our process begins: arm what is to happen in it, or happened before it."""
        for moment in sorted(self._armed):
            self._arm(moment)

    def arm(self, moment: str) -> None:
        """Let what was to happen after this moment happen."""
        if moment not in self._armed:
            self._armed.add(moment)
            self._arm(moment)

    def _arm(self, moment: str) -> None:
        for loss in self.losses:
            if loss.at_s is not None and loss.since == moment:
                self.world.loop.call_later(loss.at_s, self._lose, loss)

    def _look(self, who: str, operation: str, stage: str) -> None:
        for loss in self.losses:
            if loss.at_s is not None or loss.since not in self._armed:
                continue
            if loss.hits(who, operation, stage):
                self.world.loop.call_soon(self._lose, loss)

    def _lose(self, loss: Loss) -> None:
        if loss not in self.losses or self.world.dead:
            return
        self.losses.remove(loss)
        world = self.world
        world.tell("SERVER", loss.kind, f"away for {loss.away_s} s", "kept" * loss.keeps)
        self._back_s = max(self._back_s, world.loop.time() + loss.away_s)
        handles, self.handles = self.handles, []
        world.lose(self, lambda: LostError(loss.kind), gone=True)
        for handle in handles:
            handle.file.lose(handle.inner, loss)
            handle.inner.lost = loss.kind
            world.lose(handle.inner, lambda: LostError(loss.kind), gone=loss.kind != "cut")
        for file in self.files:
            if loss.kind == "reboot":
                file.reboot()
            self._noticed(file, loss)
        for handle in handles:
            handle.lose()

    def open(
        self, file: ServedFile, who: str, able: Capabilities, *, again: bool = False
    ) -> SimRemoteFile:
        if self.away:
            raise UnreachableError("the server is away")
        for orphan in file.orphans:  # the server sees to it that these come no more
            self.world.lose(orphan, lambda: LostError("cut"), gone=True)
        file.orphans.clear()
        kept, file.kept = again and file.kept, False
        handle = SimRemoteFile(file, who, able, kept=kept)
        self.handles.append(handle)
        return handle

    def began(self) -> None:
        """A question about names began; see `world.Owner`."""

    def ended(self) -> None:
        """It ended."""


class SimHandle(SimBackend):
    """An open file at the server's end."""

    lost: str | None = None

    def __init__(self, world: World, file: SimFile, who: str, able: Capabilities) -> None:
        super().__init__(world, file, who, able)
        self._carries = False  # it answers as servers do

    async def _call(
        self,
        operation: str,
        effects: list[Callable[[], None]],
        *,
        failed: Callable[[], None] | None = None,
        told: object = "",
    ) -> None:
        if self.lost is not None:
            raise LostError(self.lost)
        await super()._call(operation, effects, failed=failed, told=told)


class SimRemoteFile(RemoteFile):
    """One open file in one life of a connection."""

    def __init__(self, file: ServedFile, who: str, able: Capabilities, *, kept: bool) -> None:
        self.file = file
        self.inner = SimHandle(file.world, file, who, able)
        self.size = file.size
        self.identity = self.inner.identity
        self.capabilities = able
        self.kept = kept
        self._tell: Callable[[LostError], None] | None = None

    def when_lost(self, tell: Callable[[LostError], None]) -> None:
        self._tell = tell
        self.file.connected()
        if self.inner.lost is not None:
            self.file.lost_s = self.file.world.loop.time()
            tell(LostError(self.inner.lost))

    def lose(self) -> None:
        """Tell of the loss: at once, or a little later than those who wait for answers hear."""
        world, tell = self.inner.world, self._tell
        if tell is None:
            return
        if world.random() < 0.5:
            tell(LostError(str(self.inner.lost)))
        else:
            world.loop.call_soon(tell, LostError(str(self.inner.lost)))

    async def read(
        self, offset: int, length: int, *, stored: bool = False, copying: bool = False
    ) -> Buffer:
        if stored:
            return await self.inner.read_stored(offset, length)
        return await self.inner.read(offset, length)

    async def write(
        self, offset: int, data: Buffer, *, through: bool = False, copying: bool = False
    ) -> None:
        await self.inner.write(offset, data, fua=through)

    async def zero(self, offset: int, length: int) -> None:
        await self.inner.write_zeroes(offset, length)

    async def flush(self) -> None:
        await self.inner.flush()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self.inner.extents(offset, length)

    async def size_now(self) -> int:
        return self.file.size

    def copies_from(self, source: RemoteFile) -> bool:
        return isinstance(source, SimRemoteFile) and source.file.server is self.file.server

    async def copy_from(self, source: RemoteFile, offset: int, length: int) -> bool:
        if not isinstance(source, SimRemoteFile) or not self.copies_from(source):
            return False
        return await self.inner.copy_from(source.inner, offset, length)

    async def close(self) -> None:
        if self in self.file.server.handles:
            self.file.server.handles.remove(self)
        await self.inner.close()


class SimDoor(Door):
    """Opens the file again by the name that it has."""

    def __init__(self, place: SimShare) -> None:
        self.where = f"the {place.who}'s server"
        self._place = place

    async def reopen(self, former: RemoteFile) -> RemoteFile:
        place, server = self._place, self._place.server
        await place.world.call(f"{place.who}-server", "open", [])
        if server.away:
            raise LostError("the server is away")
        file = self._named(former.identity.inode)
        if file is None:
            raise DeniedError(errno.ENOENT, "missing", "it is not there")
        if file.older and not file.kept:
            file.put_older_back()
        return server.open(file, place.who, place.capabilities, again=True)

    def _named(self, inode: int) -> ServedFile | None:
        names = self._place.directory.names
        found = None
        for name, file in names.items():
            part = name.startswith(f".{self._place.name}.") and name.endswith(".part")
            if isinstance(file, ServedFile) and (part or name == self._place.name):
                if file.inode == inode:
                    return file
                found = file
        return found


class SimShare(SimPlace):
    """A name on a server."""

    def __init__(
        self,
        server: SimServer,
        directory: SimDirectory,
        name: str,
        who: str,
        capabilities: Capabilities,
        *,
        committed: Callable[[], bool],
    ) -> None:
        super().__init__(server.world, directory, name, who, capabilities, committed=committed)
        self.server = server

    def _new_file(self, size: int) -> SimFile:
        return ServedFile(self.server, INODES + self.world.tick(), size)

    def _open(self, file: SimFile) -> Backend:
        if not isinstance(file, ServedFile):
            raise RefusedError("missing", f"{self.location} is somebody's local file")
        if file.open_in:
            raise RefusedError("in-use", f"{self.location} is open already")
        if self.server.away:
            self._unreachable("open")
        remote = self.server.open(file, self.who, self.capabilities)
        file.backend = SteadyBackend(remote, SimDoor(self), self.server.settings)
        return file.backend

    async def _step(self, operation: str, effect: Callable[[], None] | None = None) -> None:
        effects = [] if effect is None else [effect]
        if self.server.away:
            self.world.faults_hit.add((f"{self.who}-place", operation))
            await elapse(NAMES_WAIT_S * self.world.random())
        if self.server.away:
            self._unreachable(operation)
        try:
            await self.world.call(
                f"{self.who}-place", operation, effects, failed=lambda: None, owner=self.server
            )
        except LostError:
            self._unreachable(operation)

    def _unreachable(self, operation: str) -> NoReturn:
        self.world.faults_hit.add((f"{self.who}-place", operation))
        raise UnreachableError("the server is away")


class ServedDirectory(SimDirectory):
    """Names on a server, which our host's death leaves alone; they are durable at once."""

    def crash(self, power: bool) -> None:
        return


Sample = tuple[int, int, int]


def _first_sample(backend: SteadyBackend | None) -> Sample | None:
    """Return what the proof will look at first."""
    if backend is None or not backend.authoritative:
        return None
    changing = (*backend._kept, *backend._flying.values())
    for offset, length, digest in backend._samples.all():
        if not any(c.offset < offset + length and offset < c.offset + c.length for c in changing):
            return offset, length, digest
    return None


def _tells(sample: Sample, content: bytes) -> bool:
    offset, length, digest = sample
    return xxh3_64_intdigest(content[offset : offset + length]) != digest
