"""The table of phases: what it allows, what it promises, and that nothing else moves a job."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrord.core.migration import (
    MIRRORED,
    MOVES,
    REVERSIBLE,
    STORY_STEPS_MAX,
    TERMINAL,
    Event,
    InvalidTransitionError,
    Migration,
    Phase,
    Step,
    mermaid,
)


def reachable(start: Phase, avoiding: frozenset[Phase] = frozenset()) -> set[Phase]:
    found = {start}
    todo = [start]
    while todo:
        for after in MOVES[todo.pop()].values():
            if after not in found and after not in avoiding:
                found.add(after)
                todo.append(after)
    return found


def test_the_table_has_every_phase_and_uses_every_event() -> None:
    assert set(MOVES) == set(Phase)
    assert {event for moves in MOVES.values() for event in moves} == set(Event)
    assert reachable(Phase.QUEUED) == set(Phase)


def test_every_phase_can_end() -> None:
    for phase in Phase:
        assert reachable(phase) & TERMINAL


def test_after_the_commit_there_is_no_way_back() -> None:
    assert {Phase.DONE, Phase.CANCELLED, Phase.FAILED} == TERMINAL
    assert reachable(Phase.RETIRING) == {Phase.RETIRING, Phase.DONE}
    assert not REVERSIBLE & reachable(Phase.RETIRING)


def test_done_needs_a_commit() -> None:
    assert Phase.DONE not in reachable(Phase.QUEUED, avoiding=frozenset({Phase.RETIRING}))
    before = {phase for phase, moves in MOVES.items() if Phase.RETIRING in moves.values()}
    assert before == {Phase.QUEUED, Phase.CUTTING_OVER}  # queued: recovery found the commit


def test_until_the_commit_a_job_can_be_cancelled_or_fail() -> None:
    for phase in REVERSIBLE:
        assert MOVES[phase][Event.CANCEL_REQUESTED] is Phase.CANCELLED
        assert MOVES[phase][Event.ABORTED] is Phase.FAILED


def test_a_cutover_comes_from_mirroring_alone() -> None:
    unmirrored = set(Phase) - MIRRORED
    assert not any(Phase.CUTTING_OVER in MOVES[phase].values() for phase in unmirrored)


def test_the_good_way() -> None:
    migration = Migration()
    events = [
        Event.STARTED,
        Event.PASS_ENDED,
        Event.MIRROR_CHOSEN,
        Event.SYNCED,
        Event.VERIFIED,
        Event.COMMITTED,
        Event.SOURCE_RETIRED,
    ]
    for number, event in enumerate(events):
        assert migration.allows(event)
        phase = migration.handle(event, f"reason {number}", float(number))
        assert phase is migration.phase
    assert migration.phase is Phase.DONE
    assert migration.story[0] == Step(0.0, Phase.COPYING, Event.STARTED, "reason 0")
    assert migration.tell().startswith("copying: started (reason 0) | catching-up: pass ended")


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_an_event_moves_by_the_table_or_changes_nothing(events: list[Event]) -> None:
    migration = Migration()
    for event in events:
        before, steps = migration.phase, len(migration.story)
        if event in MOVES[before]:
            assert migration.handle(event, "", 0.0) is MOVES[before][event]
            assert len(migration.story) == steps + 1
        else:
            assert not migration.allows(event)
            with pytest.raises(InvalidTransitionError, match=f"{event.name} in {before.name}"):
                migration.handle(event, "", 0.0)
            assert migration.phase is before
            assert len(migration.story) == steps


def test_the_story_of_a_flapping_job_stays_short() -> None:
    migration = Migration()
    migration.handle(Event.STARTED, "the first step is kept", 0.0)
    for _ in range(STORY_STEPS_MAX):
        migration.handle(Event.TARGET_FAILED, "", 0.0)
        migration.handle(Event.RESUMED, "", 0.0)
    assert len(migration.story) == STORY_STEPS_MAX + 1
    assert migration.story[0].reason == "the first step is kept"
    assert migration.story[-1].event is Event.RESUMED


def test_the_diagram_shows_every_move() -> None:
    lines = mermaid().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> queued"]
    for phase, moves in MOVES.items():
        node = phase.value.replace("-", "_")
        for event, after in moves.items():
            arrow = f"    {node} --> {after.value.replace('-', '_')}: "
            assert any(line.startswith(arrow) and event.value in line for line in lines)
        assert (f"    {node} --> [*]" in lines) == (phase in TERMINAL)


def test_a_prediction_belongs_to_the_present_step_and_the_first_one_counts() -> None:
    migration = Migration()
    migration.handle(Event.STARTED, "", 100.0)
    assert migration.predict(9.0, 101.0)
    assert not migration.predict(5.0, 102.0)
    migration.handle(Event.PASS_ENDED, "", 110.0)
    assert migration.predict(2.0, 90.0), "somebody has set the clock back"
    assert [step.predicted_s for step in migration.story] == [10.0, 2.0]
