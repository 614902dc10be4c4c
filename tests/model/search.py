"""The search through the model: every reachable state, nearest first, so that stories are short."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

from tests.model.cutover_model import (
    DONE,
    Bounds,
    Mistakes,
    State,
    ViolationError,
    begin,
    crashes,
    steps,
    target_restarts,
)


@dataclass(frozen=True, slots=True)
class Result:
    """What the search found. `trace` leads to the violation, by the shortest way."""

    states: int
    ends: int  # states in which the move is done and nothing is in flight
    violation: str | None = None
    trace: tuple[State, ...] = ()

    def story(self) -> str:
        """Return the trace for people: what changed in each step."""
        lines = [f"{self.violation}, after {len(self.trace) - 1} steps:"]
        for before, after in itertools.pairwise(self.trace):
            changes = [
                f"{name}: {old} -> {new}"
                for name, old, new in zip(State._fields, before, after, strict=True)
                if old != new
            ]
            lines.append("  " + "; ".join(changes))
        return "\n".join(lines)


def explore(mistakes: Mistakes, bounds: Bounds) -> Result:
    """Visit every reachable state, nearest first, until a promise is broken."""
    first = begin(bounds)
    came_from: dict[State, State | None] = {first: None}
    queue = deque([first])
    ends = 0
    while queue:
        state = queue.popleft()
        try:
            if state.at == DONE and state.request is None:
                ends += 1
                if state.target != state.acknowledged:
                    raise ViolationError(
                        f"the move is done, the target holds {state.target}, "
                        f"the guest believes in {state.acknowledged}"
                    )
            for after in itertools.chain(
                steps(state, mistakes), crashes(state, mistakes), target_restarts(state, mistakes)
            ):
                if after not in came_from:
                    came_from[after] = state
                    queue.append(after)
        except ViolationError as violation:
            return Result(len(came_from), ends, str(violation), path(came_from, state))
    return Result(len(came_from), ends)


def path(came_from: dict[State, State | None], state: State) -> tuple[State, ...]:
    found = [state]
    before = came_from[state]
    while before is not None:
        found.append(before)
        before = came_from[before]
    return tuple(reversed(found))
