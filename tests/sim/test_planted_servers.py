"""Planted defects of what stands between the engine and a server: see `test_planted`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from mirrord.engine.cutover import Cutover
from mirrord.storage import kept
from mirrord.storage.kept import Change, ChangeLocks, apply, latest
from mirrord.storage.remote import LostError, RemoteFile, SteadySettings
from mirrord.storage.steady import SteadyBackend
from tests.sim.remote import Loss
from tests.sim.run import simulate
from tests.sim.scenario import Load, Scenario, draw
from tests.sim.test_planted import SEEDS_MAX, Patch, aim, find
from tests.sim.world import CrashPlan, Fault

CLEAN_SEEDS = 10  # each; test_sim.py has the thousands

pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.timeout(300),
]


def nothing_is_replayed(patch: pytest.MonkeyPatch) -> None:
    """What a restarted server forgot stays forgotten."""

    async def replay(self: SteadyBackend, file: RemoteFile) -> None:
        await file.flush()

    patch.setattr(SteadyBackend, "_replay", replay)


def what_was_in_flight_is_not_replayed(patch: pytest.MonkeyPatch) -> None:
    """A read saw a write that was not answered yet; after the server's restart it is gone."""

    async def replay(self: SteadyBackend, file: RemoteFile) -> None:
        mark = self._kept.mark()
        for change in latest(tuple(self._kept)):
            await apply(file, change, through=False)
        await file.flush()
        self._flushed(mark)

    patch.setattr(SteadyBackend, "_replay", replay)


def the_oldest_is_replayed_last(patch: pytest.MonkeyPatch) -> None:
    """Overlapping changes are repeated in the wrong order."""

    def reverse(changes: Sequence[Change]) -> list[Change]:
        return [change for change in reversed(changes) if change.again]

    patch.setattr(kept, "latest", reverse)
    patch.setattr(kept, "REPEATED_AT_ONCE", 1)


def old_content_is_replayed_over_newer(patch: pytest.MonkeyPatch) -> None:
    """Everything is repeated in its order, until we die in the middle (was in it once)."""
    patch.setattr(kept, "latest", lambda changes: [c for c in changes if c.again])
    patch.setattr(kept, "REPEATED_AT_ONCE", 1)


def an_answer_of_an_earlier_life_is_believed(patch: pytest.MonkeyPatch) -> None:
    """A write was answered, then the server forgot it, then we heard of the answer, too late to
    keep it."""

    async def carry_out(self: SteadyBackend, change: Change) -> None:
        until_s = self._until_s()
        while True:
            file = self._tie.file or await self._wait_up(until_s)
            life = self._tie.life
            change.sent = True
            try:
                await apply(file, change, through=change.fua)
            except LostError as why:
                self._tie.lost(file, why)
                continue
            if life == self._tie.life:
                self._kept.add(change)
            return

    patch.setattr(SteadyBackend, "_carry_out", carry_out)


def a_target_that_may_have_forgotten_is_trusted(patch: pytest.MonkeyPatch) -> None:
    """R13: the first flush after a loss says nothing of what was written before it."""
    honest = SteadyBackend._flush_target

    async def flush(self: SteadyBackend) -> None:
        self._suspect = False
        await honest(self)

    patch.setattr(SteadyBackend, "_flush_target", flush)


def a_flush_covers_what_was_written_after_it_began(patch: pytest.MonkeyPatch) -> None:
    """A change that was answered while the flush was under way is kept no more."""

    async def flush(self: SteadyBackend) -> None:
        await self._steadily(lambda file: file.flush())
        self._flushed(self._kept.mark())

    patch.setattr(SteadyBackend, "_flush_kept", flush)


def nothing_is_proven(patch: pytest.MonkeyPatch) -> None:
    """Whatever has the name now is served."""

    async def doubt(self: SteadyBackend, file: RemoteFile) -> str | None:
        return None

    patch.setattr(SteadyBackend, "_doubt", doubt)


def overlapping_changes_are_in_flight_together(patch: pytest.MonkeyPatch) -> None:
    """The server carries them out in one order, the replay in another."""

    async def acquire(self: ChangeLocks, offset: int, length: int) -> object:
        return object()

    patch.setattr(ChangeLocks, "acquire", acquire)
    patch.setattr(ChangeLocks, "release", lambda self, ticket: None)


def the_bitmap_is_believed_after_a_kill(patch: pytest.MonkeyPatch) -> None:
    """R13: while we were dead a server forgot what the bitmap calls equal (was in it once)."""
    patch.setattr(SteadyBackend, "forgets", False)


def reads_are_answered_before_all_is_durable(patch: pytest.MonkeyPatch) -> None:
    """What an earlier process wrote is read, then a server forgets it (was in it once)."""

    async def settle(self: SteadyBackend) -> None:
        self._settled = True

    patch.setattr(SteadyBackend, "_settle", settle)


def a_flush_is_believed_though_another_failed(patch: pytest.MonkeyPatch) -> None:
    """The server tells of an error once; somebody else was told (was in it once)."""

    async def flush(self: SteadyBackend) -> None:
        self._refuse_if_poisoned()
        mark = self._kept.mark()
        await self._steadily(lambda file: file.flush())
        self._flushed(mark)

    patch.setattr(SteadyBackend, "_flush_kept", flush)


def a_late_abort_is_interrupted(patch: pytest.MonkeyPatch) -> None:
    """The job goes on after ABORT, for the target's name is being taken back (was in it once)."""
    patch.setattr(Cutover, "withdrawable", property(lambda self: not self.committing))


def serve_aimed(scenario: Scenario, side: str) -> random.Random:
    """Put a side on a server, and nothing else in the way of seeing what comes of it."""
    aim(scenario, mode="mirror")
    scenario.source_device = scenario.target_device = False
    scenario.servers = {side: []}
    scenario.crashes = []
    scenario.steady = SteadySettings(io_timeout_s=60.0, target_wait_s=0.8)
    scenario.eager[f"{side}-server"] = 0.9
    return random.Random(f"servers {scenario.seed}")


def aim_after_the_commit(
    scenario: Scenario, *kinds: str, tamper: tuple[str, ...] = ("",), power: bool | None = None
) -> Scenario:
    """Losses under a busy guest while the server has the truth."""
    rng = serve_aimed(scenario, "target")
    scenario.loads = [Load(80, 6, rng.choice((0.0, 0.005)), hot=0.8, late=True)] * 2
    scenario.servers["target"] = [
        Loss(rng.choice(kinds), 0.0, since="commit", at_s=0.3 * rng.random(),
             tamper=rng.choice(tamper), keeps=rng.random() < 0.3)
        for _ in range(rng.randrange(1, 6))
    ]  # fmt: skip
    if power is not None:
        scenario.crashes = [CrashPlan(power, rng.randrange(100, 500))]
    return scenario


def aim_at_answers(scenario: Scenario, operation: str) -> Scenario:
    """Restarts just when an operation has been answered, or has had its effect."""
    rng = serve_aimed(scenario, "target")
    scenario.eager["target"] = 0.0
    scenario.loads = [Load(80, 8, 0.0, hot=1.0, late=True)] * 2
    loss = Loss("reboot", 0.0, since="commit", who="target", operation=operation, stage="after")
    scenario.servers["target"] = [replace(loss, nth=nth) for nth in rng.sample(range(1, 90), 20)]
    return scenario


def aim_before_the_commit(scenario: Scenario) -> Scenario:
    """Restarts of the target's server while it is written."""
    rng = serve_aimed(scenario, "target")
    scenario.content = rng.randbytes(scenario.size)
    scenario.servers["target"] = [Loss("reboot", 0.0, since="move", at_s=0.2 * rng.random())]
    return scenario


def aim_at_both(scenario: Scenario) -> Scenario:
    """The source's server is restarted while our process is dead."""
    rng = serve_aimed(scenario, "source")
    scenario.crashes = [CrashPlan(False, rng.randrange(80, 600))]
    loss = Loss("reboot", 0.0, who="source-place", operation="open", stage="before", nth=2)
    scenario.servers["source"] = [loss]
    return scenario


def aim_at_the_first_reads(scenario: Scenario) -> Scenario:
    """The server is restarted just when our process has begun anew."""
    rng = serve_aimed(scenario, "source")
    scenario.crashes = [CrashPlan(False, rng.randrange(80, 400))]
    nth = rng.choice((1, 2, 3, 5))
    loss = Loss("reboot", 0.0, who="source", operation="read", stage="after", nth=nth)
    loss.since = "kill"
    scenario.servers["source"] = [loss]
    return scenario


def aim_at_flushes(scenario: Scenario) -> Scenario:
    """A failing flush among many, and a restart soon after."""
    aim_after_the_commit(scenario, "reboot")
    rng = random.Random(f"flushes {scenario.seed}")
    scenario.eager["target"], scenario.slow["target"] = 0.0, 4.0
    scenario.steady = replace(scenario.steady, unflushed_bytes_max=3000)
    scenario.faults = [Fault("target", "flush", rng.randrange(8, 40), lands=0.0)]
    scenario.servers["target"] = [
        Loss("reboot", 0.0, since="commit", at_s=3 * rng.random()) for _ in range(3)
    ]
    return scenario


def aim_at_a_late_abort(scenario: Scenario) -> Scenario:
    """The commit record fails while the target's server is away."""
    serve_aimed(scenario, "target")
    scenario.loads = [Load(80, 4, 0.002, hot=0.5)] * 2
    scenario.faults = [Fault("store", "sync_write_log", 2)]
    loss = Loss("cut", 3.0, since="move", who="store", operation="sync_write_log", stage="before")
    scenario.servers["target"] = [loss]
    return scenario


PLANTED: list[tuple[Patch, Callable[[Scenario], Scenario]]] = [
    (nothing_is_replayed, lambda s: aim_after_the_commit(s, "reboot")),
    (what_was_in_flight_is_not_replayed, lambda s: aim_at_answers(s, "read")),
    (the_oldest_is_replayed_last, lambda s: aim_after_the_commit(s, "cut", "reboot")),
    (old_content_is_replayed_over_newer, lambda s: aim_after_the_commit(s, "cut", power=False)),
    (an_answer_of_an_earlier_life_is_believed, lambda s: aim_at_answers(s, "write")),
    (a_target_that_may_have_forgotten_is_trusted, aim_before_the_commit),
    (a_flush_covers_what_was_written_after_it_began, lambda s: aim_after_the_commit(s, "reboot")),
    (nothing_is_proven, lambda s: aim_after_the_commit(s, "cut", tamper=("replaced",))),
    (nothing_is_proven, lambda s: aim_after_the_commit(s, "cut", tamper=("older",))),
    (overlapping_changes_are_in_flight_together, lambda s: aim_after_the_commit(s, "reboot")),
    (the_bitmap_is_believed_after_a_kill, aim_at_both),
    (reads_are_answered_before_all_is_durable, aim_at_the_first_reads),
    (a_flush_is_believed_though_another_failed, aim_at_flushes),
    (a_late_abort_is_interrupted, aim_at_a_late_abort),
]


@pytest.mark.parametrize(("plant", "aimed"), PLANTED, ids=lambda value: value.__name__)
def test_a_planted_defect_is_found(plant: Patch, aimed: Callable[[Scenario], Scenario]) -> None:
    assert find(plant, aimed) is not None, f"not found in {SEEDS_MAX} seeds"


@pytest.mark.parametrize("aimed", dict.fromkeys(a for _, a in PLANTED), ids=lambda _: "aimed")
def test_without_a_defect_nothing_is_found(aimed: Callable[[Scenario], Scenario]) -> None:
    for seed in range(CLEAN_SEEDS):
        report = simulate(seed, scenario=aimed(draw(seed)), keep_story=True)
        assert report.violation is None, report.tell()
