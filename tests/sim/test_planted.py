"""Planted defects: what the simulator is worth is what it finds.

Each takes one rule of the protocol out of the real engine and must be found within a bounded
number of seeds, with scenarios aimed at where it would show. The same aimed scenarios find
nothing in the engine as it is.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from mirrord.core.journal import Kind, Payload, append
from mirrord.engine.cutover import Cutover
from mirrord.engine.ledger import Ledger
from mirrord.engine.mutation import Mutation
from mirrord.engine.tracking import Locks, WriteTracker
from tests.sim.run import Report, simulate
from tests.sim.scenario import CALM_S, Load, Scenario, draw
from tests.sim.store import SimStore
from tests.sim.world import CrashPlan, Fault

SEEDS_MAX = 3000  # the rarest needs a few hundred; ten times that, so that luck plays no part
CLEAN_SEEDS = 40  # each; test_sim.py has the thousands

pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.timeout(300),
]

Patch = Callable[[pytest.MonkeyPatch], None]


def no_intent_bit(patch: pytest.MonkeyPatch) -> None:
    """R1: a guest's write doesn't wait for its region's durable mark."""

    async def ensure(self: WriteTracker, offset: int, length: int) -> None:
        return

    patch.setattr(WriteTracker, "_ensure", ensure)


def no_range_lock(patch: pytest.MonkeyPatch) -> None:
    """R4: copier and mirrored writes run over each other."""

    async def acquire(self: Locks, *_: object) -> object:
        return object()

    patch.setattr(Locks, "acquire", acquire)
    patch.setattr(Locks, "acquire_within", acquire)
    patch.setattr(Locks, "release", lambda self, ticket: None)


def no_target_flush_before_commit(patch: pytest.MonkeyPatch) -> None:
    """R5: what the guest was promised isn't durable on the target when it becomes the truth."""
    _spoil_cutover(patch, drain=True, flush=False)


def gate_without_drain(patch: pytest.MonkeyPatch) -> None:
    """R5: the gate closes, and writes in flight are forgotten."""
    _spoil_cutover(patch, drain=False, flush=True)


def _spoil_cutover(patch: pytest.MonkeyPatch, *, drain: bool, flush: bool) -> None:
    honest = Cutover._quiesce

    async def nothing(*_: object) -> None:
        return

    async def quiesce(self: Cutover) -> str | None:
        with pytest.MonkeyPatch.context() as inner:
            if not drain:
                inner.setattr(self._disk, "settle", nothing)
                inner.setattr(self._tracker.bitmap.__class__, "dirty", lambda _: False)
            if not flush:
                inner.setattr(self._tracker, "flush_target", nothing)
            return await honest(self)

    async def prepare(self: Cutover) -> None:
        await self._place.publish(self._job_id)

    patch.setattr(Cutover, "_quiesce", quiesce)
    if not flush:
        patch.setattr(Cutover, "_prepare", prepare)


def dirty_set_only_before_the_write(patch: pytest.MonkeyPatch) -> None:
    """R3: the copier may have read the block before the write reached it."""

    async def follow(self: WriteTracker, mutation: Mutation) -> None:
        self.bitmap.mark(mutation.offset, mutation.length)
        await self._ensure(mutation.offset, mutation.length)
        await mutation.apply(self.source)

    patch.setattr(WriteTracker, "_follow", follow)


def source_deleted_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    """R8: the job goes on, to the source's deletion, while COMMIT is only being written."""
    honest = Ledger.append
    writing: set[asyncio.Future[None]] = set()

    async def hasty(self: Ledger, kind: Kind, payload: Payload) -> None:
        if kind is not Kind.COMMIT:
            await honest(self, kind, payload)
            return
        data, after = append(self.log, kind, payload)
        write = asyncio.ensure_future(self._store.write_log(self.log.end, data))
        writing.add(write)
        write.add_done_callback(writing.discard)
        self.log = after

    patch.setattr(Ledger, "append", hasty)


def recovery_acts_on_an_unsynced_journal(patch: pytest.MonkeyPatch) -> None:
    """R12: a COMMIT that is only in the cache is believed, and a power cut takes it back."""

    async def read_log(self: SimStore) -> bytes:
        return b"" if self.files.log is None else bytes(self.files.log.view)

    patch.setattr(SimStore, "read_log", read_log)


def bit_cleared_before_the_targets_flush(patch: pytest.MonkeyPatch) -> None:
    """R2: the map calls a region equal that the target may still forget."""

    async def checkpoint(self: WriteTracker) -> None:
        await self.intents.clear(self._clearable())

    patch.setattr(WriteTracker, "checkpoint", checkpoint)


def bit_cleared_before_the_sources_flush(patch: pytest.MonkeyPatch) -> None:
    """R2: after a power cut the source may lack what the target keeps (was in the engine once)."""
    honest = WriteTracker.checkpoint

    async def checkpoint(self: WriteTracker) -> None:
        self._source_unflushed.clear()
        await honest(self)

    patch.setattr(WriteTracker, "checkpoint", checkpoint)


def bit_cleared_before_the_scan(patch: pytest.MonkeyPatch) -> None:
    """R11: what was not scanned yet has no bits, which says nothing (was in the engine once)."""
    scanned = property(lambda self: True, lambda self, value: None)
    patch.setattr(WriteTracker, "scanned", scanned, raising=False)


def a_failed_flush_forgotten_while_the_commit_is_unknown(patch: pytest.MonkeyPatch) -> None:
    """R15: the next flush of the target succeeds although what the failed one lost is lost.

    Was in the engine once, of FUA writes and checkpoints.
    """
    forgetful = property(lambda self: False, lambda self, value: None)
    patch.setattr(WriteTracker, "_strict_flush_failed", forgetful, raising=False)


def aim(
    scenario: Scenario, *, mode: str = "auto", power: bool | None = None, linger: bool = False
) -> Scenario:
    """Make the scenario a busy disk without faults, with crashes of one kind.

    With `linger` it stays mirrored for long, with checkpoints in quick succession.
    """
    rng = random.Random(f"aim {scenario.seed}")
    scenario.mode = mode
    scenario.verify = "none"  # verification hides defects: it copies again
    scenario.cutover = "manual" if linger else "auto"
    scenario.limit = 0
    if linger:
        scenario.settings = replace(
            scenario.settings, checkpoint_s=0.01, sample_s=0.02, hot_checkpoints=0
        )
    scenario.faults, scenario.commands, scenario.meddling = [], [], ""
    scenario.servers = {}
    scenario.loads = [Load(requests=60, depth=4, think_s=rng.choice((0, 0.005)), hot=0.7)] * 2
    if power is not None:
        scenario.crashes = [
            CrashPlan(power, rng.randrange(50, 900)) for _ in range(rng.randrange(1, 4))
        ]
    return scenario


def aim_at_mirror(scenario: Scenario) -> Scenario:
    """Mirrored writes into what is being copied, slowly."""
    scenario = aim(scenario, mode="mirror")
    rng = random.Random(f"mirror {scenario.seed}")
    scenario.content = rng.randbytes(scenario.size)
    scenario.slow = {"source": 4, "target": 3}
    scenario.eager = {}
    scenario.loads = [Load(requests=60, depth=4, think_s=0.002, hot=0.0)] * 2
    scenario.crashes = []
    return scenario


def aim_at_scan(scenario: Scenario) -> Scenario:
    """Checkpoints while the source is scanned, and a power cut soon after."""
    scenario = aim(scenario, power=True, linger=True)
    rng = random.Random(f"scan {scenario.seed}")
    scenario.content = rng.randbytes(scenario.size)
    scenario.slow["source"] = 4
    scenario.loads = []
    scenario.crashes = [CrashPlan(True, rng.randrange(1, 5), "store", "write_map", "after")]
    return scenario


def aim_at_commit(scenario: Scenario) -> Scenario:
    """A kill while COMMIT is written, then a power cut soon after the recovery."""
    scenario = aim(scenario)
    rng = random.Random(f"commit {scenario.seed}")
    scenario.crashes = [
        CrashPlan(False, 2, "store", "write_log", "after"),
        CrashPlan(True, rng.randrange(5, 60)),
    ]
    return scenario


def aim_at_doubt(scenario: Scenario) -> Scenario:
    """A commit that stays unknown, a flush of the target that fails, and a power cut."""
    scenario = aim(scenario, mode="mirror")
    rng = random.Random(f"doubt {scenario.seed}")
    scenario.settings = replace(scenario.settings, retry_first_s=0.5, retry_max_s=0.5)
    scenario.eager = {}
    scenario.loads = [Load(requests=100, depth=2, think_s=0.02, hot=0.0)] * 2
    scenario.faults = [
        Fault("store", "sync_write_log", 2, until_s=CALM_S, lands=1.0),
        Fault("target", "flush", rng.randrange(3, 9), lands=0.0),
    ]
    scenario.crashes = [CrashPlan(True, 4, "store", "write_log", "before")]
    return scenario


PLANTED: list[tuple[Patch, Callable[[Scenario], Scenario]]] = [
    (no_intent_bit, lambda s: aim(s, power=True, linger=True)),
    (no_range_lock, aim_at_mirror),
    (no_target_flush_before_commit, lambda s: aim(s, power=True)),
    (dirty_set_only_before_the_write, lambda s: aim(s)),
    (gate_without_drain, lambda s: aim(s, mode="mirror")),
    (source_deleted_before_the_commit, lambda s: aim(s, power=True)),
    (recovery_acts_on_an_unsynced_journal, aim_at_commit),
    (bit_cleared_before_the_targets_flush, lambda s: aim(s, power=True, linger=True)),
    (bit_cleared_before_the_sources_flush, lambda s: aim(s, power=True, linger=True)),
    (bit_cleared_before_the_scan, aim_at_scan),
    (a_failed_flush_forgotten_while_the_commit_is_unknown, aim_at_doubt),
]


def find(plant: Patch, aimed: Callable[[Scenario], Scenario]) -> Report | None:
    """Return the first run that fails with the defect and passes without it."""
    for seed in range(SEEDS_MAX):
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            report = simulate(seed, scenario=aimed(draw(seed)))
        if report.violation is None:
            continue
        if simulate(seed, scenario=aimed(draw(seed))).violation is None:
            return report
    return None


@pytest.mark.parametrize(("plant", "aimed"), PLANTED, ids=lambda value: value.__name__)
def test_a_planted_defect_is_found(plant: Patch, aimed: Callable[[Scenario], Scenario]) -> None:
    assert find(plant, aimed) is not None, f"not found in {SEEDS_MAX} seeds"


@pytest.mark.parametrize("aimed", dict.fromkeys(a for _, a in PLANTED), ids=lambda _: "aimed")
def test_without_a_defect_nothing_is_found(aimed: Callable[[Scenario], Scenario]) -> None:
    for seed in range(CLEAN_SEEDS):
        report = simulate(seed, scenario=aimed(draw(seed)), keep_story=True)
        assert report.violation is None, report.tell()


if __name__ == "__main__":  # for a look by hand at what each defect looks like
    for plant, aimed in PLANTED:
        print(plant.__name__, find(plant, aimed))
