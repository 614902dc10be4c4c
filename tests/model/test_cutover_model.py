"""The recommended protocol breaks no promise, and the model would see if it did.

The default bounds take seconds. With MIRRORD_MODEL_FULL set there are also the long ones, up to
three writes, a flush and one crash: minutes, and a gigabyte of memory.
"""

from __future__ import annotations

import os

import pytest

from mirrord.core.journal import Kind
from tests.model.cutover_model import (
    DONE,
    MISTAKES,
    Bounds,
    Flush,
    Mistakes,
    State,
    Write,
    begin,
)
from tests.model.search import explore

FULL = bool(os.environ.get("MIRRORD_MODEL_FULL"))

# Bounds, reachable states, states in which the move is over. The counts guard against a step that
# quietly got lost: whoever changes the protocol changes them, and means it.
RUNS = [
    (Bounds(writes=1, flushes=1, crashes=2), 41_950, 492),
    (Bounds(writes=2, flushes=0, crashes=1), 49_470, 396),
    (Bounds(writes=2, flushes=0, crashes=1, restarts=1), 128_730, 842),
]
LONG_RUNS = [
    (Bounds(writes=2, flushes=1, crashes=1), 160_901, 1_239),
    (Bounds(writes=2, flushes=1, crashes=2), 387_583, 2_765),
    (Bounds(writes=3, flushes=1, crashes=1), 915_689, 4_401),
]


@pytest.mark.timeout(900 if FULL else 120)
@pytest.mark.parametrize(("bounds", "states", "ends"), RUNS + (LONG_RUNS if FULL else []))
def test_the_protocol_keeps_every_promise(bounds: Bounds, states: int, ends: int) -> None:
    result = explore(Mistakes(), bounds)
    assert result.violation is None, result.story()
    assert (result.states, result.ends) == (states, ends)


def bounds_for(mistake: str) -> Bounds:
    """Return the least that shows the mistake."""
    if mistake == "target_restart_trusts_unflushed":
        return Bounds(writes=1, flushes=0, crashes=0, restarts=1)
    if mistake == "recovery_acts_on_unsynced_journal":
        return Bounds(writes=1, flushes=1, crashes=2)  # a kill, then a power cut
    return Bounds(writes=1, flushes=1, crashes=1)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_found(mistake: str) -> None:
    result = explore(Mistakes(**{mistake: True}), bounds_for(mistake))
    assert result.violation is not None, f"{result.states} states and no counter-example"
    assert len(result.trace) > 3
    assert result.violation in result.story()


def test_there_are_sixteen_mistakes() -> None:
    assert len(MISTAKES) == 16


def test_a_story_tells_what_changed() -> None:
    result = explore(Mistakes(gate_without_drain=True), Bounds(1, 0, 0))
    story = result.story().splitlines()
    assert story[0].startswith("the move is done, the target holds")
    assert len(story) == len(result.trace)
    assert any("gate_open: True -> False" in line for line in story)


def test_requests_of_different_kinds_are_different_states() -> None:
    assert len(Write._fields) != len(Flush._fields)  # named tuples compare by content alone


def test_the_model_speaks_of_the_journal_as_it_is() -> None:
    result = explore(Mistakes(gate_without_drain=True), Bounds(1, 0, 0))
    final: State = result.trace[-1]
    assert final.at == DONE
    assert set(final.journal) <= {kind.name for kind in Kind}
    assert begin(Bounds(0, 0, 0)).journal == ()
