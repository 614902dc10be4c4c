"""Thousands of simulated moves. A failure prints its seed and its story; see tests/README.md.

`MIRRORD_SIM_RUNS` is how many (default 10,000), `MIRRORD_SIM_SEED` the first seed (default 0).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from mirrord.core.migration import Phase
from tests.sim.run import simulate
from tests.sim.scenario import DECISIONS, FAULTY

RUNS = int(os.environ.get("MIRRORD_SIM_RUNS", "10000"))
FIRST_SEED = int(os.environ.get("MIRRORD_SIM_SEED", "0"))
BATCH_RUNS = 250  # a few seconds, so that workers share evenly

pytestmark = [
    # A crash throws tasks away in the middle; what they had not begun is never awaited.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def few_collections() -> Iterator[None]:
    """Collect garbage once a batch: abandoned tasks are many cycles, and cost a fifth."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


@pytest.mark.fault(1, 3)
@pytest.mark.parametrize(
    "first", range(FIRST_SEED, FIRST_SEED + RUNS, BATCH_RUNS), ids=lambda seed: f"from-{seed}"
)
def test_no_move_breaks_a_promise(first: int, few_collections: None) -> None:
    for seed in range(first, min(first + BATCH_RUNS, FIRST_SEED + RUNS)):
        report = simulate(seed)
        assert report.violation is None, report.tell()


def test_the_scenarios_reach_every_corner() -> None:
    """Every phase is entered, most faults strike, and jobs end in every way."""
    phases, faults, ends, lives = set[str](), set[tuple[str, str]](), set[str](), set[int]()
    for seed in range(20_000_000, 20_000_700):
        report = simulate(seed)
        phases |= report.phases
        faults |= report.faults_hit
        ends.add(report.phase)
        lives.add(report.lives)
    assert phases == {phase.value for phase in Phase} - {Phase.QUEUED.value}
    assert {"done", "cancelled", "failed"} <= ends
    assert {1, 2, 3} <= lives
    known = {(who, operation) for who, operations in FAULTY.items() for operation in operations}
    assert len(faults) > len(known) * 0.7, known - faults


@pytest.mark.parametrize("seed", range(8))
def test_the_same_seed_is_the_same_run(seed: int) -> None:
    assert simulate(seed, keep_story=True) == simulate(seed, keep_story=True)


def test_decisions_are_where_crashes_are_aimed() -> None:
    """A misspelt crash point would never be hit, in silence."""
    told = "".join(simulate(seed, keep_story=True).story for seed in range(3))
    seen = {(who, operation) for who, operation in DECISIONS if f" {who} {operation} " in told}
    assert len(seen) > len(DECISIONS) / 2
