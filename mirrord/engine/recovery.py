"""How a job begins, and how it goes on after a crash: the crash-point table in code.

What is found on storage decides, nothing else (rules R11, R12). The journal is made durable
before anything is believed; then:

    journal            authority   action                                               rows
    no record          source      delete our target; the job was never begun           C0
    PREP               source      target found: take its final name back, go on from   C1-C9
                                   the maps; not found: create it again, copy all;
                                   out of reach, or no answer in time: ABORT
    COMMIT, RETIRED    target      target found: serve it, finish the retirement;       C10-C16
                                   not found: refuse to serve, touch nothing            C13
    ABORT              source      delete the target, DONE                              C17
    DONE               by COMMIT   nothing
    damaged            none        refuse to serve, touch nothing                       C23

After a kill on the same boot the dirty bitmap says what may differ; after a power cut, and where
a side is another machine, the intent map does; without a readable map everything is copied again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from errno import ETIMEDOUT
from typing import Any

from mirrord.core.bitmap import DirtyBitmap, IntentMap
from mirrord.core.journal import Authority, Kind, Payload, State, parse, repair
from mirrord.engine.disk import Disk
from mirrord.engine.intents import Intents
from mirrord.engine.job import Job
from mirrord.engine.ledger import Ledger
from mirrord.engine.request import JobRequest, Progress
from mirrord.engine.store import JobStore, unwritable
from mirrord.engine.surroundings import Surroundings
from mirrord.errors import RefusedError
from mirrord.storage.backend import Backend, Cache, Identity, Place

_log = logging.getLogger("mirrord.engine")


@dataclass(frozen=True, slots=True)
class Places:
    """Both ends of a move, and how they are opened."""

    source: Place
    target: Place
    cache: Cache = Cache.WRITEBACK


@dataclass(frozen=True, slots=True)
class Recovered:
    """What to serve, and the job to run on beside it (None: it has ended)."""

    disk: Disk
    location: str
    job: Job | None


async def check(disk: Disk, target: Place, request: JobRequest) -> None:
    """Refuse what can't be moved there. Changes nothing."""
    if disk.read_only:
        raise RefusedError("read-only", f"disk {disk.name} is read-only: attach it writable")
    if request.wipe and disk.backend.identity.kind != "block":
        raise RefusedError(
            "not-wiped", f"{request.source} is no block device: it can be deleted, not wiped"
        )
    needed = await _data_bytes(disk.backend)
    await target.check_target(disk.backend, needed=needed, force=request.force)


async def start(
    disk: Disk, places: Places, store: JobStore, request: JobRequest, around: Surroundings
) -> Job:
    """Create the target and make PREP durable; the job that is returned is ready to `run`.

    Whatever fails leaves no target behind (after a crash, `recover` deletes it). The caller
    removes the job's files: a record may be in them whose durability is not known.
    """
    await check(disk, places.target, request)
    target = await places.target.create(request.job_id, disk.backend, cache=places.cache)
    try:
        region_bytes = around.settings.region_bytes
        intent_map = IntentMap(disk.size, region_bytes)
        content = intent_map.content()
        await store.create(content)
        intent_map.made_durable([(0, content)])
        ledger = Ledger(store)
        bitmap, progress = _bitmap(disk.size, store)
        bitmap.clear()
        progress.reset()
        store.vouch()
        await ledger.append(Kind.PREP, _prep(disk.backend, target))
    except BaseException as error:
        await target.close()
        await _discard(places, request, around, target.identity)
        if isinstance(error, OSError):
            raise unwritable(error) from error
        raise
    return _job(
        request, disk, places, (disk.backend.identity, target.identity), store, ledger, around,
        target, (bitmap, intent_map, progress),
    )  # fmt: skip


async def recover(
    name: str, places: Places, store: JobStore, request: JobRequest, around: Surroundings
) -> Recovered:
    """Act on what a crash left, before anything is served.

    Raises DamagedError for a journal that can't be believed and RefusedError (`target-lost`)
    when the disk was committed to a target that isn't there: then nothing may be served.
    """
    log = parse(await store.read_log())
    if log.torn:
        zeroes, log = repair(log)
        await store.write_log(log.end, zeroes)
    ledger = Ledger(store, log)
    outcome = ledger.outcome
    if outcome.authority is Authority.TARGET:
        return await _recover_committed(name, places, store, request, around, ledger)
    source = await places.source.open(cache=places.cache)
    disk = Disk(name, source)
    try:
        if outcome.state is State.PREPARED:
            job = await _recover_prepared(disk, places, store, request, around, ledger)
        elif outcome.state is State.EMPTY:
            # The job is still a wish: whoever wished it asks again.
            await _discard(places, request, around, None)
            job = None
        else:
            job = None
            await _conclude_aborted(places, request, around, ledger)
    except BaseException:
        await source.close()
        raise
    return Recovered(disk, places.source.location, job)


async def _recover_committed(
    name: str,
    places: Places,
    store: JobStore,
    request: JobRequest,
    around: Surroundings,
    ledger: Ledger,
) -> Recovered:
    prep = ledger.outcome.prep
    assert prep is not None
    identity = Identity(**prep["target"])
    target = await places.target.find(
        request.job_id, identity, cache=places.cache, same_boot=store.same_boot
    )
    if target is None:
        raise RefusedError(
            "target-lost",
            f"disk {name} was moved to {places.target.location}, which is missing or is not the "
            f"disk that was written there; the old copy may be stale. Bring the target back, "
            f"then attach {name} again",
        )
    await places.target.publish(request.job_id)
    disk = Disk(name, target, size=prep["source"]["size"])
    if ledger.outcome.finished:
        return Recovered(disk, places.target.location, None)
    bitmap, progress = _bitmap(disk.size, store)
    bitmap.clear()
    progress.reset()
    progress.restore(ledger.outcome.commit or {})
    intent_map = IntentMap(disk.size, around.settings.region_bytes)
    job = _job(
        request, disk, places, (Identity(**prep["source"]), identity), store, ledger, around,
        None, (bitmap, intent_map, progress),
    )  # fmt: skip
    return Recovered(disk, places.target.location, job)


async def _recover_prepared(
    disk: Disk,
    places: Places,
    store: JobStore,
    request: JobRequest,
    around: Surroundings,
    ledger: Ledger,
) -> Job | None:
    """Find the target again, or create it again, and believe the right map."""
    source = disk.backend
    prep = ledger.outcome.prep
    assert prep is not None
    expected = Identity(**prep["source"])
    if not expected.is_still(source.identity, same_boot=store.same_boot):
        # Nothing that the maps say holds for another file, and it is not ours to delete.
        if source.size == expected.size:
            reason = f"the source {places.source.location} was replaced meanwhile"
        else:
            reason = f"the source changed size from {expected.size} to {source.size} bytes"
        await ledger.append(Kind.ABORT, {"reason": reason})
        await _conclude_aborted(places, request, around, ledger)
        return None
    try:
        async with _deadline(around.settings.find_s, f"no answer from {places.target.location}"):
            target, intent_map, bitmap, progress = await _find_target(
                disk, places, store, request, around, ledger
            )
    except (RefusedError, OSError) as error:
        # The target is out of reach; the guest must not wait for it.
        reason = f"the target could not be opened after a restart: {error}"
        await ledger.append(Kind.ABORT, {"reason": reason})
        await _conclude_aborted(places, request, around, ledger)
        return None
    return _job(
        request, disk, places, (expected, target.identity), store, ledger, around,
        target, (bitmap, intent_map, progress),
    )  # fmt: skip


def _job(
    request: JobRequest,
    disk: Disk,
    places: Places,
    identities: tuple[Identity, Identity],
    store: JobStore,
    ledger: Ledger,
    around: Surroundings,
    target: Backend | None,
    maps: tuple[DirtyBitmap, IntentMap, Progress],
) -> Job:
    bitmap, intent_map, progress = maps
    return Job(
        request,
        disk,
        (places.source, places.target),
        identities,
        store,
        ledger,
        around,
        target=target,
        bitmap=bitmap,
        intents=Intents(intent_map, store),
        progress=progress,
    )


async def _find_target(
    disk: Disk,
    places: Places,
    store: JobStore,
    request: JobRequest,
    around: Surroundings,
    ledger: Ledger,
) -> tuple[Backend, IntentMap, DirtyBitmap, Progress]:
    region_bytes = around.settings.region_bytes
    prep = ledger.outcome.prep
    assert prep is not None
    bitmap, progress = _bitmap(disk.size, store)
    stored = await store.read_map()
    intent_map = IntentMap(disk.size, region_bytes, stored)
    target = await places.target.find(
        request.job_id,
        Identity(**prep["target"]),
        cache=places.cache,
        same_boot=store.same_boot,
    )
    if target is None:
        # C1: nothing of the old target is left, so nothing of the maps is true.
        intent_map = IntentMap(disk.size, region_bytes)
        await _write_whole(intent_map, store)
        bitmap.clear()
        progress.reset()
        store.vouch()
        await places.target.discard(request.job_id)  # of an earlier attempt at this
        target = await places.target.create(request.job_id, disk.backend, cache=places.cache)
        try:
            await ledger.append(Kind.PREP, _prep(disk.backend, target))
        except BaseException:
            async with _deadline(around.settings.discard_s, "no end of its closing"):
                await target.close()
            raise
        return target, intent_map, bitmap, progress
    try:
        await places.target.withdraw(request.job_id)
        if stored is None:
            await _write_whole(intent_map, store)
    except BaseException:
        async with _deadline(around.settings.discard_s, "no end of its closing"):
            await target.close()
        raise
    # What the bitmap calls equal may be gone from a side that forgets by itself (rule R13).
    forgotten = not store.same_boot or disk.backend.forgets or target.forgets
    if forgotten or stored is None:
        _believe_intents(intent_map, bitmap, progress)
        store.vouch()
    return target, intent_map, bitmap, progress


@contextlib.asynccontextmanager
async def _deadline(limit_s: float, told: str) -> AsyncIterator[None]:
    """Give up what a target that hangs would make the guest wait for."""
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise  # the target's own
        raise OSError(ETIMEDOUT, f"{told} within {limit_s:g} s") from error


async def _write_whole(intent_map: IntentMap, store: JobStore) -> None:
    content = intent_map.content()
    await store.write_map(0, content, durable=True)
    intent_map.made_durable([(0, content)])


def _believe_intents(intent_map: IntentMap, bitmap: DirtyBitmap, progress: Progress) -> None:
    """Mark what a power cut may have left different; holes among it are found when copying."""
    progress.reset()
    end = 0
    for offset, length in intent_map.ranges():
        # Mark first, then clear what lies between: a kill finds too much, never too little.
        bitmap.put_back(offset, length)
        bitmap.unmark(end, offset - end)
        end = offset + length
    bitmap.unmark(end, bitmap.size - end)
    progress.scanned = True
    progress.bytes_total = bitmap.remaining()
    progress.save()


async def _conclude_aborted(
    places: Places, request: JobRequest, around: Surroundings, ledger: Ledger
) -> None:
    """Row C17: the target of an aborted job is deleted, then the journal is closed."""
    outcome = ledger.outcome
    if outcome.finished:
        return
    reason = (outcome.abort or {}).get("reason", "aborted")
    assert outcome.prep is not None
    left = await _discard(places, request, around, Identity(**outcome.prep["target"]))
    summary = {"phase": _phase_of(outcome.abort), "reason": f"{reason}{left}"}
    await ledger.append(Kind.DONE, {**summary, "ended_s": around.wall()})


async def _discard(
    places: Places, request: JobRequest, around: Surroundings, identity: Identity | None
) -> str:
    """Delete what a job left as its target, or say that it can't be: the source is served anyway.

    `identity` tells it under its final name, too.
    """
    try:
        async with _deadline(around.settings.discard_s, "no answer"):
            await places.target.discard(request.job_id, identity)
    except (OSError, RefusedError) as error:
        location = places.target.location
        _log.warning("leave job=%s target=%s error=%s", request.job_id, location, error)
        return f"; {request.left_over(location, error)}"
    return ""


def _phase_of(abort: Payload | None) -> str:
    return "cancelled" if (abort or {}).get("cancelled") else "failed"


def _bitmap(size: int, store: JobStore) -> tuple[DirtyBitmap, Progress]:
    progress = Progress(store.dirty)
    return DirtyBitmap(size, store.dirty), progress


def _prep(source: Backend, target: Backend) -> dict[str, Any]:
    return {"source": asdict(source.identity), "target": asdict(target.identity)}


async def _data_bytes(backend: Backend) -> int:
    """Return how many bytes are data, for the question whether there is room."""
    offset = total = 0
    while offset < backend.size:
        for extent in await backend.extents(offset, backend.size - offset):
            if extent.status.value == "data":
                total += min(extent.end, backend.size) - extent.offset
            offset = extent.end
    return total
