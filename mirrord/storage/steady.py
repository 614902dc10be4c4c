"""A disk behind a connection that may die: waits, replays what was not flushed, proves, goes on.

Two ways of living, by whether the guest depends on it (`authoritative`, which the door sets):

*A job's target, before the commit.* A lost connection is an error at once: the job degrades and
copies again. The server may have been restarted and have forgotten what it had not flushed, so the
first flush after a loss fails, once, if anything was written since the last good one (rule R13);
whoever flushes then knows that those writes may be gone.

*The authority.* Its requests wait up to `io_timeout_s` for the connection. Every acknowledged
write is kept in memory until a flush that began after it has ended well; when the file is open
again, the newest of what is kept and of what was in flight is written again, then all is flushed,
and only then do requests go on. So a server's restart loses nothing, and no read sees a write
vanish that an earlier one saw: neither an acknowledged one nor one that was in flight.

Proof. A handle that the server kept for us (`RemoteFile.kept`) needs none. Else the identity and
the size must be the same, and a sample of what was flushed must read back as it was written:
another file under the name, an older copy, a restored snapshot is refused, and so are all requests
from then on. `reason` says why.

Order. Overlapping changes are never in flight together (a server may carry them out in any order,
and the kept ones must be repeated in the order in which they happened).

Interleavings: `Tie.life` grows when the connection is lost. A change that was answered counts as
acknowledged only in the life in which it was asked, in one stretch with keeping it; an answer of
an earlier life is not believed but waits for the replay, which has repeated it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from xxhash import xxh3_64_intdigest

from mirrord.core.geometry import KIB, Extent
from mirrord.storage.backend import Backend, Buffer, UnreachableError
from mirrord.storage.kept import (
    SAMPLE_BYTES_MAX,
    SAMPLES_MAX,
    Change,
    ChangeLocks,
    Kept,
    Samples,
    apply,
    repeat,
    touched,
)
from mirrord.storage.memory_pool import constant
from mirrord.storage.remote import Door, LostError, RemoteFile, SteadySettings
from mirrord.storage.tie import Tie

T = TypeVar("T")

log = logging.getLogger(__name__)

EDGE_BYTES: Final = 4 * KIB  # of both ends of the disk, for the first proof
NEWER_MAX: Final = 256  # changes to look through; a busier disk learns at a calmer flush


class SteadyBackend(Backend):
    """A backend over `RemoteFile`s, one after another."""

    forgets = True

    def __init__(
        self,
        file: RemoteFile,
        door: Door,
        settings: SteadySettings,
        *,
        name: str = "",
        read_only: bool = False,
    ) -> None:
        """Take over an open file; `door` opens it again."""
        self.size = file.size
        self.name = name
        self.identity = file.identity
        self.capabilities = file.capabilities
        self.settings = settings
        self.door = door
        self._read_only = read_only
        self._kept = Kept()
        self._flying: dict[int, Change] = {}
        self._next = 0
        self._samples = Samples()
        self._locks = ChangeLocks()
        self._written = 0  # grows when a target's write begins, and when it has ended
        self._durable = 0  # what it was when a flush began that ended well
        self._suspect = False  # the target may have forgotten some of them
        self._relief: asyncio.Task[None] | None = None
        self._poisoned: OSError | None = None
        self._users = 0
        self._unused: asyncio.Future[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._settled = read_only  # what was written before we came is durable, too
        self._settling: asyncio.Task[None] | None = None
        self._learning: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._tie = Tie(
            file,
            door,
            trial=self._trial,
            on_lost=self._was_lost,
            # who had begun before `close` goes on
            wanted=lambda: self._closing is None or self._users > 0,
        )

    @property
    def reason(self) -> str | None:
        """Why requests wait, or fail."""
        return self._tie.reason

    @property
    def failed(self) -> bool:
        """Whether every request fails from now on."""
        return self._tie.failed

    @property
    def authoritative(self) -> bool:
        return self.door.authoritative

    @authoritative.setter
    def authoritative(self, value: bool) -> None:
        self.door.authoritative = value
        if value and self._learning is None:
            if not self._settled:
                self._settling = self._loop.create_task(self._settle())
            self._learning = self._loop.create_task(self._learn_edges())

    # What guests and jobs ask.

    async def read(self, offset: int, length: int) -> Buffer:
        return await self._look(lambda file: file.read(offset, length))

    async def read_stored(self, offset: int, length: int) -> Buffer:
        return await self._look(lambda file: file.read(offset, length, stored=True, copying=True))

    async def read_once(self, offset: int, length: int) -> Buffer:
        return await self._look(lambda file: file.read(offset, length, copying=True))

    async def write_once(self, offset: int, data: Buffer) -> None:
        await self.write(offset, data, copying=True)

    async def write(
        self, offset: int, data: Buffer, *, fua: bool = False, copying: bool = False
    ) -> None:
        self._check_writable()
        data = constant(data)
        if len(data) <= 64 * KIB and type(data) is memoryview:
            data = bytes(data)  # it may be kept for long, and mustn't keep a whole receive alive
        await self._used(self._change(Change(offset, len(data), data, fua=fua, copying=copying)))

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, punch: bool = True, fast: bool = False
    ) -> None:
        self._check_writable()
        if fast and not self.capabilities.fast_zeroes:
            raise OSError(errno.ENOTSUP, "zeroes are not faster than writing here")
        await self._used(self._change(Change(offset, length, None, fua=fua, punch=punch)))

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self.write_zeroes(offset, length, fua=fua)

    async def flush(self) -> None:
        if not self._read_only:  # servers refuse it to whoever may not write
            await self._used(self._flush_kept() if self.authoritative else self._flush_target())

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self._look(lambda file: file.extents(offset, length))

    def connected(self) -> RemoteFile:
        """Return the file that is open now. Raises LostError."""
        if self._tie.file is not None:
            return self._tie.file
        raise LostError(f"{self.door.where} is away: {self.reason}")

    async def check_unchanged(self) -> None:
        if (file := self._tie.file) is None:
            return  # it is proven when it is open again
        try:
            size = await file.size_now()
        except LostError:
            return
        if size != self.size:
            raise OSError(errno.ESTALE, f"its size changed from {self.size} to {size} bytes")

    async def has_its_name(self) -> bool:
        file = self._tie.file
        return file is None or await self.door.is_there(file)

    def copies_from(self, source: Backend) -> bool:
        mine, other = self._tie.file, self._file_of(source)
        return mine is not None and other is not None and mine.copies_from(other)

    async def copy_from(self, source: Backend, offset: int, length: int) -> bool:
        mine, other = self._tie.file, self._file_of(source)
        if mine is None or other is None or self.authoritative:
            return False
        return await self._used(self._counted(mine.copy_from(other, offset, length)))

    def _file_of(self, backend: Backend) -> RemoteFile | None:
        return backend._tie.file if isinstance(backend, SteadyBackend) else None

    def facts(self) -> dict[str, object]:
        """Return what `show` says about the connection."""
        state = "failed" if self.failed else "connected" if self._tie.file is not None else "away"
        return {
            "state": state,
            "server": self.door.where,
            **(self._tie.file or self._tie.former).facts(),
            "io_timeout_s": self.settings.io_timeout_s,
            "unflushed_bytes": self._kept.bytes,
            "reason": self.reason,
        }

    async def _learn_edges(self) -> None:
        """Read both ends of the disk, so that there is something to prove it by."""
        if self._settling is not None:
            await asyncio.wait((self._settling,))
        length = min(EDGE_BYTES, self.size)
        for offset in sorted({0, self.size - length}):
            ticket = await self._locks.acquire(offset, length)
            try:
                self._samples.learn(offset, await self.read(offset, length))
            except OSError as error:
                log.info("no sample server=%s error=%s", self.door.where, error)
            finally:
                self._locks.release(ticket)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for task in (self._learning, self._settling):
            if task is not None:
                task.cancel()
        while self._users:
            self._unused = self._loop.create_future()
            await self._unused
        for task in (self._learning, self._settling, self._relief):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        if len(self._kept):
            log.info("closed unflushed server=%s bytes=%d", self.door.where, self._kept.bytes)
        await self._tie.close()

    # Changes.

    async def _change(self, change: Change) -> None:
        if not self.authoritative:
            await self._on_target(change)
            return
        ticket = await self._locks.acquire(change.offset, change.length)
        number, self._next = self._next, self._next + 1
        self._flying[number] = change
        try:
            self._samples.forget(change.offset, change.length)  # now: a replay may land it
            if self._kept.bytes + change.cost > self.settings.unflushed_bytes_max:
                await self._relieve()
            await self._carry_out(change)
        except BaseException as error:
            # It may be there in part, now or as soon as somebody reads: not to be forgotten.
            change.again &= not isinstance(error, OSError) or isinstance(error, UnreachableError)
            if change.sent and not change.landed:
                self._kept.add(change)
            raise
        finally:
            del self._flying[number]
            self._locks.release(ticket)

    async def _carry_out(self, change: Change) -> None:
        """Ask until it is done, or the time is over; then keep it."""
        until_s: float | None = None  # the time begins with the first wait
        through = change.fua or self.settings.write_through
        while True:
            file = self._tie.file or await self._wait_up(until_s := until_s or self._until_s())
            if change.landed:  # by the replay, and flushed
                return
            if change.refused is not None:  # by the replay's server
                raise change.refused
            life = self._tie.life
            change.sent = True
            try:
                await apply(file, change, through=through)
            except LostError as why:
                self._tie.lost(file, why)
                continue
            if life == self._tie.life:
                break
        change.acknowledged = True
        if self.settings.write_through:
            return
        self._kept.add(change)
        if self._kept.bytes > self.settings.unflushed_bytes_max // 2 and self._relief is None:
            self._relief = self._loop.create_task(self._relieving())

    async def _on_target(self, change: Change) -> None:
        file = self._tie.file or await self._wait_up(self._until_s())
        try:
            await self._counted(apply(file, change, through=change.fua))
        except LostError as why:
            self._tie.lost(file, why)
            raise

    async def _counted(self, work: Awaitable[T]) -> T:
        """Change the target. An answer of an earlier life is true, and may be forgotten by now."""
        life = self._tie.life
        self._written += 1
        try:
            return await work
        finally:
            self._written += 1
            self._suspect |= life != self._tie.life

    # Flushing.

    async def _flush_kept(self) -> None:
        self._refuse_if_poisoned()
        while True:
            mark, life = self._kept.mark(), self._tie.life
            try:
                await self._steadily(lambda file: file.flush())
            except UnreachableError:
                raise
            except OSError as error:
                self._poisoned = self._poisoned or error
                raise
            self._refuse_if_poisoned()  # one flush is told of what another has lost
            if life == self._tie.life:
                self._flushed(mark)
                return

    async def _flush_target(self) -> None:
        file = self._tie.file or await self._wait_up(self._until_s())
        if self._suspect:
            self._suspect = False
            raise OSError(
                errno.ENOTCONN,
                f"the connection to {self.door.where} was lost since the last flush: the server "
                "may have forgotten what was written",
            )
        written = self._written
        try:
            await file.flush()
        except LostError as why:
            self._tie.lost(file, why)
            raise
        self._durable = max(self._durable, written)
        self._settled = True

    async def _settle(self) -> None:
        """Make durable what a process before this one wrote: nobody keeps that any more."""
        while not self._settled:
            try:
                await self._flush_kept()
            except UnreachableError as error:
                log.warning("flush not possible server=%s error=%s", self.door.where, error)
            except OSError as error:
                log.warning("flush failed server=%s error=%s", self.door.where, error)
                self._settled = True

    def _flushed(self, mark: int) -> None:
        """A flush that began at the mark has ended well."""
        self._settled = True
        gone = self._kept.drop(mark)
        if len(self._kept) + len(self._flying) > NEWER_MAX:
            return
        for change in gone[-SAMPLES_MAX // 4 :]:
            # One of the same flush may be overwritten by this one; a refused one is not there.
            self._samples.forget(change.offset, change.length)
            known = change.acknowledged and change.length <= SAMPLE_BYTES_MAX
            if not known or change.data is None:
                continue
            if not self._is_changing(change.offset, change.length):
                self._samples.learn(change.offset, change.data)

    def _is_changing(self, offset: int, length: int) -> bool:
        """Tell whether something newer was written, or is being written, to the range."""
        return touched((*self._kept, *self._flying.values()), offset, length)

    async def _relieving(self) -> None:
        """Flush, so that less has to be kept. A failure becomes that of the guest's next flush."""
        try:
            await self._flush_kept()
        except OSError as error:
            log.warning("flush not possible server=%s error=%s", self.door.where, error)
        finally:
            self._relief = None

    async def _relieve(self) -> None:
        self._relief = self._relief or self._loop.create_task(self._relieving())
        await asyncio.shield(self._relief)
        self._refuse_if_poisoned()

    def _refuse_if_poisoned(self) -> None:
        if self._poisoned is not None:
            raise OSError(errno.EIO, f"an earlier flush failed: {self._poisoned.strerror}")

    def _until_s(self) -> float:
        settings = self.settings
        limit_s = settings.io_timeout_s if self.authoritative else settings.target_wait_s
        return self._loop.time() + limit_s

    async def _look(self, ask: Callable[[RemoteFile], Awaitable[T]]) -> T:
        """Ask for what a guest sees: not before it is sure to stay."""
        return await self._used(self._looked(ask))

    async def _looked(self, ask: Callable[[RemoteFile], Awaitable[T]]) -> T:
        settling, until_s = self._settling, None
        if settling is not None and not settling.done():
            until_s = self._until_s()
            await asyncio.wait((settling,), timeout=self.settings.io_timeout_s)
            if not settling.done():
                raise self._tie.unreachable()
        return await self._steadily(ask, until_s)

    async def _steadily(
        self, ask: Callable[[RemoteFile], Awaitable[T]], until_s: float | None = None
    ) -> T:
        """Ask; while the guest depends on it, again and again until there is an answer."""
        while True:
            file = self._tie.file or await self._wait_up(until_s := until_s or self._until_s())
            try:
                return await ask(file)
            except LostError as why:
                self._tie.lost(file, why)
                if not self.authoritative:
                    raise

    async def _wait_up(self, until_s: float) -> RemoteFile:
        return await self._tie.wait(until_s, patient=self.authoritative)

    def _was_lost(self) -> None:
        if self._written > self._durable and not self.authoritative:
            self._suspect = True

    async def _trial(self, file: RemoteFile) -> str | None:
        """Prove and replay; return why the file is refused for good."""
        doubt = await self._doubt(file)
        if doubt is None and self.authoritative and not self._read_only:
            await self._replay(file)
        return doubt

    async def _doubt(self, file: RemoteFile) -> str | None:
        """Return why this may not be the file that was open before, if so."""
        if not self.identity.is_still(file.identity):
            if file.size != self.size:
                return f"the disk on {self.door.where} has {file.size} bytes, not {self.size}"
            return f"the disk on {self.door.where} was replaced by another file"
        if file.kept or not self.authoritative:
            return None
        for offset, length, digest in self._samples.all():
            if self._is_changing(offset, length):
                continue
            if xxh3_64_intdigest(await file.read(offset, length)) != digest:
                return (
                    f"the disk on {self.door.where} is not as it was left: at offset {offset} "
                    "something else was read than what had been made durable there"
                )
        return None

    async def _replay(self, file: RemoteFile) -> None:
        """Repeat what a restarted server may have forgotten, then what was in flight."""
        mark, flying = self._kept.mark(), list(self._flying.values())
        await repeat(file, self._kept, flying)
        try:
            await file.flush()
        except OSError as error:
            if not self._settled and not isinstance(error, LostError):
                self._poisoned = self._poisoned or error  # of what nobody keeps
            raise
        # no await below: what is repeated here is acknowledged by whoever waits
        for change in flying:
            change.landed = change.refused is None
        self._flushed(mark)

    async def _used(self, work: Awaitable[T]) -> T:
        self._users += 1
        try:
            return await work
        finally:
            self._users -= 1
            if self._unused is not None and not self._users and not self._unused.done():
                self._unused.set_result(None)

    def _check_writable(self) -> None:
        if self._read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
