"""Sides, places and job files that go wrong on purpose, and a trace of what was done when.

A `Faults` belongs to one thing (the source, the target, the job's files); the wrappers ask it at
each call. A rule says which call fails, hangs, or lies. A call that hangs is like a real request:
cancelling the one who waits abandons the answer, never the operation, which goes on when it is
released. After `kill` nothing happens any more, whoever asks: that is a process that has died.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mirrord.core.geometry import Extent
from mirrord.core.journal import Kind
from mirrord.engine.store import JobStore
from mirrord.storage.backend import Backend, Buffer, Cache, Hasher, Identity, Place, Watch
from mirrord.storage.file import FileBackend
from tests.helpers import tell_the_end

T = TypeVar("T")
DEADLINE_S = 10  # for what takes milliseconds
FOR_EVER = 1 << 30


@dataclass(eq=False)
class Rule:
    """What happens to the calls `at`, `at` + 1, … (`times` of them) that it is about."""

    operations: tuple[str, ...]
    at: int
    times: int
    errno: int | None  # None: hang
    after: bool  # the operation itself is done first
    within: range | None
    delay_s: float = 0.0
    seen: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def applies(self, operation: str, offset: int | None) -> bool:
        """Count the call, and tell whether it is one that goes wrong."""
        if not any(operation == one or operation.startswith(f"{one}:") for one in self.operations):
            return False
        if self.within is not None and offset is not None and offset not in self.within:
            return False
        self.seen += 1
        return self.at <= self.seen < self.at + self.times

    def release(self) -> None:
        """Let what hangs go on, and hold nothing any more."""
        self.times = 0
        self.released.set()

    async def wait(self) -> None:
        """Return once a call has met this rule."""
        await asyncio.wait_for(self.reached.wait(), DEADLINE_S)


class Faults:
    """The rules of one thing, and what was asked of it. `trace` is common to several."""

    def __init__(self, who: str, trace: list[str] | None = None) -> None:
        self.who = who
        self.trace = [] if trace is None else trace
        self.dead = False
        self._rules: list[Rule] = []
        self._running: set[asyncio.Task[Any]] = set()

    def fail(
        self,
        *operations: str,
        errno: int,
        at: int = 1,
        times: int = 1,
        after: bool = False,
        within: range | None = None,
    ) -> Rule:
        """Fail calls; with `after` they have their effect nevertheless."""
        return self._add(Rule(operations, at, times, errno, after, within))

    def hang(
        self,
        *operations: str,
        at: int = 1,
        times: int = 1,
        after: bool = False,
        within: range | None = None,
    ) -> Rule:
        """Hold calls, before or after their effect, until the rule is released."""
        return self._add(Rule(operations, at, times, None, after, within))

    def delay(self, *operations: str, seconds: float) -> Rule:
        """Make calls slow."""
        return self._add(Rule(operations, 1, FOR_EVER, None, False, None, delay_s=seconds))

    def heal(self) -> None:
        """Let everything work again, and release what hangs."""
        for rule in self._rules:
            rule.release()
        self._rules.clear()

    def heal_others(self, kept: Rule) -> None:
        """Drop and release every rule but one."""
        for rule in self._rules:
            if rule is not kept:
                rule.release()
        self._rules = [kept]

    def kill(self) -> None:
        """Do nothing from now on; what hangs never happens."""
        self.dead = True
        for task in self._running:
            task.cancel()

    def count(self, operation: str) -> int:
        """Return how many calls of the operation were begun."""
        return self.trace.count(f"+{self.who}.{operation}")

    async def settled(self) -> None:
        """Return once nothing that was asked is under way."""
        while self._running:
            await asyncio.wait(set(self._running))

    async def call(
        self, operation: str, work: Callable[[], Coroutine[Any, Any, T]], offset: int | None = None
    ) -> T:
        """Do `work`, unless a rule says otherwise."""
        if self.dead:
            raise asyncio.CancelledError
        self.trace.append(f"+{self.who}.{operation}")
        rules = [rule for rule in self._rules if rule.applies(operation, offset)]
        if not rules:
            result = await work()
            self.trace.append(f"{self.who}.{operation}")
            return result
        task = asyncio.ensure_future(self._go_wrong(rules[0], operation, work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def _go_wrong(
        self, rule: Rule, operation: str, work: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        result: T | None = None
        if rule.after:
            result = await work()
        rule.reached.set()
        if rule.delay_s:
            await asyncio.sleep(rule.delay_s)  # the fault itself, not a wait for anything
        elif rule.errno is None:
            await rule.released.wait()
        if rule.errno is not None:  # also one that was told to fail while it hung
            raise OSError(rule.errno, os.strerror(rule.errno))
        if not rule.after:
            result = await work()
        self.trace.append(f"{self.who}.{operation}")
        return result  # type: ignore[return-value]

    def _add(self, rule: Rule) -> Rule:
        self._rules.append(rule)
        return rule


class FaultyBackend(Backend):
    """Any backend, with faults. After `remember` it knows what a power cut would leave."""

    def __init__(self, inner: Backend, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults
        self.size = inner.size
        self.name = inner.name
        self.capabilities = inner.capabilities
        self.identity = inner.identity
        self.fua_writes = 0
        self.closed = False
        self.lying = False  # flushes succeed and do nothing
        self._durable: bytearray | None = None

    async def remember(self) -> None:
        """Take everything as durable now, and look at each flush from now on."""
        self._durable = bytearray(await self.inner.read(0, self.size))

    async def forget(self) -> None:
        """Lose what was not flushed: the content after a power cut."""
        assert self._durable is not None
        await self.inner.write(0, bytes(self._durable))

    async def settled_by_kill(self, *, forget: bool) -> None:
        """Release the storage as the end of the process does; with `forget`, of the machine."""
        if forget and not self.closed:
            await self.forget()
        self.closed = True
        await self.inner.close()

    async def read(self, offset: int, length: int) -> Buffer:
        return await self.faults.call("read", lambda: self.inner.read(offset, length), offset)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        async def work() -> None:
            await self.inner.write(offset, data, fua=fua)
            if fua:
                self.fua_writes += 1
                if self._durable is not None:
                    self._durable[offset : offset + len(data)] = data

        await self.faults.call("write", work, offset)

    def begin_write(
        self, offset: int, data: Buffer, ended: Callable[[OSError | None], None]
    ) -> bool:
        tell_the_end(self.write(offset, bytes(data)), ended)
        return True

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, punch: bool = True, fast: bool = False
    ) -> None:
        await self.faults.call(
            "write_zeroes",
            lambda: self.inner.write_zeroes(offset, length, fua=fua, punch=punch, fast=fast),
            offset,
        )

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self.faults.call("trim", lambda: self.inner.trim(offset, length, fua=fua), offset)

    async def flush(self) -> None:
        async def work() -> None:
            if self.lying:
                return
            await self.inner.flush()
            if self._durable is not None:
                await self.remember()

        await self.faults.call("flush", work)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self.faults.call("extents", lambda: self.inner.extents(offset, length), offset)

    async def close(self) -> None:
        await self.faults.settled()
        self.closed = True
        await self.inner.close()

    async def read_stored(self, offset: int, length: int) -> Buffer:
        return await self.faults.call(
            "read_stored", lambda: self.inner.read_stored(offset, length), offset
        )

    async def digests_stored(self, runs: Sequence[tuple[int, int]]) -> list[int] | None:
        return await self.faults.call(
            "read_stored", lambda: self.inner.digests_stored(runs), runs[0][0]
        )

    async def copy_from(self, source: Backend, offset: int, length: int) -> bool:
        inner = source.inner if isinstance(source, FaultyBackend) else source
        return await self.faults.call(
            "copy_from", lambda: self.inner.copy_from(inner, offset, length), offset
        )

    async def carry_from(
        self,
        source: Backend,
        runs: Sequence[tuple[int, int]],
        hasher: Hasher | None,
        watch: Watch,
    ) -> int | None:
        """A read of the source and a write of the target, as far as the rules are concerned."""
        inner = source.inner if isinstance(source, FaultyBackend) else source
        if not isinstance(self.inner, FileBackend) or not isinstance(inner, FileBackend):
            return None
        if isinstance(source, FaultyBackend):
            await source.faults.call("read", _nothing, runs[0][0])
        with watch:
            return await self.faults.call(
                "write", lambda: self.inner.carry_from(inner, runs, hasher, watch), runs[0][0]
            )

    def forget_cache(self, offset: int, length: int) -> None:
        self.inner.forget_cache(offset, length)

    async def check_unchanged(self) -> None:
        await self.faults.call("check_unchanged", self.inner.check_unchanged)


class FaultyPlace(Place):
    """Any place, with faults; the backends it opens are faulty too (`backend` is the last)."""

    def __init__(self, inner: Place, faults: Faults, *, remembering: bool = False) -> None:
        self.inner = inner
        self.faults = faults
        self.backend: FaultyBackend | None = None
        self._remembering = remembering

    @property
    def location(self) -> str:  # type: ignore[override]
        return self.inner.location

    async def open(self, *, read_only: bool = False, cache: Cache = Cache.WRITEBACK) -> Backend:
        work = lambda: self.inner.open(read_only=read_only, cache=cache)  # noqa: E731
        return await self._wrap(await self.faults.call("open", work))

    async def check_target(self, source: Backend, *, needed: int, force: bool = False) -> None:
        await self.inner.check_target(_inner(source), needed=needed, force=force)

    async def create(self, job_id: str, source: Backend, *, cache: Cache) -> Backend:
        work = lambda: self.inner.create(job_id, _inner(source), cache=cache)  # noqa: E731
        return await self._wrap(await self.faults.call("create", work))

    async def find(
        self, job_id: str, identity: Identity, *, cache: Cache, same_boot: bool = False
    ) -> Backend | None:
        work = lambda: self.inner.find(  # noqa: E731
            job_id, identity, cache=cache, same_boot=same_boot
        )
        found = await self.faults.call("find", work)
        return None if found is None else await self._wrap(found)

    async def publish(self, job_id: str) -> None:
        await self.faults.call("publish", lambda: self.inner.publish(job_id))

    async def withdraw(self, job_id: str) -> None:
        await self.faults.call("withdraw", lambda: self.inner.withdraw(job_id))

    async def discard(self, job_id: str, identity: Identity | None = None) -> None:
        await self.faults.call("discard", lambda: self.inner.discard(job_id, identity))

    async def confirm(self, job_id: str, identity: Identity) -> str | None:
        return await self.faults.call("confirm", lambda: self.inner.confirm(job_id, identity))

    async def retire(self, job_id: str, identity: Identity, *, wipe: bool = False) -> str | None:
        work = lambda: self.inner.retire(job_id, identity, wipe=wipe)  # noqa: E731
        return await self.faults.call("retire", work)

    async def delete_retired(self, job_id: str, identity: Identity) -> None:
        work = lambda: self.inner.delete_retired(job_id, identity)  # noqa: E731
        await self.faults.call("delete_retired", work)

    async def _wrap(self, backend: Backend) -> FaultyBackend:
        self.backend = FaultyBackend(backend, self.faults)
        if self._remembering:
            await self.backend.remember()
        return self.backend


class FaultyStore(JobStore):
    """A job's files, with faults. A journal write is called `write_log:COMMIT` and so on; a write
    of the map `write_map:durable` or `write_map:lazy`."""

    def __init__(self, inner: JobStore, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults
        self.job_id = inner.job_id
        self.same_boot = inner.same_boot

    @property
    def dirty(self) -> memoryview:  # type: ignore[override]
        return self.inner.dirty

    def vouch(self) -> None:
        if not self.faults.dead:
            self.inner.vouch()

    async def read_log(self) -> bytes:
        return await self.faults.call("read_log", self.inner.read_log)

    async def write_log(self, offset: int, data: bytes) -> None:
        work = lambda: self.inner.write_log(offset, data)  # noqa: E731
        await self.faults.call(f"write_log:{_kind(data)}", work)

    async def read_map(self) -> bytes | None:
        return await self.faults.call("read_map", self.inner.read_map)

    async def write_map(self, offset: int, data: bytes, *, durable: bool) -> None:
        work = lambda: self.inner.write_map(offset, data, durable=durable)  # noqa: E731
        await self.faults.call(f"write_map:{'durable' if durable else 'lazy'}", work)

    async def create(self, map_bytes: bytes) -> None:
        await self.faults.call("create", lambda: self.inner.create(map_bytes))

    async def close(self) -> None:
        await self.inner.close()


def _inner(backend: Backend) -> Backend:
    return backend.inner if isinstance(backend, FaultyBackend) else backend


def _kind(data: bytes) -> str:
    """Return the kind of a journal record, as its header has it."""
    return "zeroes" if not any(data) else Kind(data[8:12]).name


async def _nothing() -> None:
    """Do nothing, where a rule may do something."""
