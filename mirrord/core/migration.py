"""The phases of a move, as a table. Pure: no clock, no I/O.

    queued → copying → catching-up → mirroring → verifying → cutting-over → retiring → done

`MOVES` is the whole truth: a pair that isn't in it raises `InvalidTransitionError`, prints the
job's story and changes nothing. The README's diagram is made from it. Three groups of phases:

* before the commit point (`REVERSIBLE`): the source is the truth; every trouble ends in `paused`,
  `degraded`, `cancelled` or `failed`, and the guest goes on with the source;
* `retiring`: the commit record is durable, the target is the truth, there is no way back;
* `TERMINAL`: done, cancelled, failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from mirrord.errors import MirrordError


class Phase(Enum):
    """Where a job is. The values are what users and programs see."""

    QUEUED = "queued"  # waits for a free place among `max_moves`
    COPYING = "copying"  # the bulk pass
    CATCHING_UP = "catching-up"  # passes over what the guest wrote meanwhile
    MIRRORING = "mirroring"  # guest writes go to both sides; the rest is copied
    VERIFYING = "verifying"  # the target is read back and compared
    CUTTING_OVER = "cutting-over"  # quiesce, drain, flush, commit
    RETIRING = "retiring"  # committed; the source is being deleted
    PAUSED = "paused"  # by the operator, or until there is space
    DEGRADED = "degraded"  # the target fails; tried again with growing delays
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Event(Enum):
    """What happened to a job."""

    STARTED = "started"
    PASS_ENDED = "pass ended"
    MIRROR_CHOSEN = "mirroring chosen"
    SYNCED = "synced"
    VERIFIED = "verified"
    MISMATCH_FOUND = "mismatch found"
    CUTOVER_HELD = "cutover held for the operator"
    GATE_TIMED_OUT = "gate timed out"
    COMMITTED = "committed"
    SOURCE_RETIRED = "source retired"
    PAUSE_REQUESTED = "pause requested"
    RESUMED = "resumed"
    RESUMED_IN_BULK = "resumed in the bulk pass"
    SPACE_EXHAUSTED = "space exhausted"
    TARGET_FAILED = "target failed"
    TARGET_AWAY = "target away"
    CANCEL_REQUESTED = "cancel requested"
    ABORTED = "aborted"


_LEAVE: dict[Event, Phase] = {
    Event.PAUSE_REQUESTED: Phase.PAUSED,
    Event.SPACE_EXHAUSTED: Phase.PAUSED,
    Event.TARGET_FAILED: Phase.DEGRADED,
    Event.TARGET_AWAY: Phase.DEGRADED,
    Event.CANCEL_REQUESTED: Phase.CANCELLED,
    Event.ABORTED: Phase.FAILED,
}
_RETURN: dict[Event, Phase] = {
    Event.RESUMED: Phase.CATCHING_UP,
    Event.RESUMED_IN_BULK: Phase.COPYING,
}

MOVES: dict[Phase, dict[Event, Phase]] = {
    Phase.QUEUED: {
        Event.STARTED: Phase.COPYING,
        **_RETURN,
        Event.COMMITTED: Phase.RETIRING,
        Event.CANCEL_REQUESTED: Phase.CANCELLED,
        Event.ABORTED: Phase.FAILED,
    },
    Phase.COPYING: {
        Event.PASS_ENDED: Phase.CATCHING_UP,
        Event.MIRROR_CHOSEN: Phase.MIRRORING,
        **_LEAVE,
    },
    Phase.CATCHING_UP: {
        Event.PASS_ENDED: Phase.CATCHING_UP,
        Event.MIRROR_CHOSEN: Phase.MIRRORING,
        **_LEAVE,
    },
    Phase.MIRRORING: {
        Event.SYNCED: Phase.VERIFYING,
        **_LEAVE,
    },
    Phase.VERIFYING: {
        Event.VERIFIED: Phase.CUTTING_OVER,
        Event.MISMATCH_FOUND: Phase.MIRRORING,
        Event.CUTOVER_HELD: Phase.MIRRORING,
        **_LEAVE,
    },
    Phase.CUTTING_OVER: {
        Event.COMMITTED: Phase.RETIRING,
        Event.GATE_TIMED_OUT: Phase.MIRRORING,
        **_LEAVE,
    },
    Phase.PAUSED: {
        **_RETURN,
        Event.CANCEL_REQUESTED: Phase.CANCELLED,
        Event.ABORTED: Phase.FAILED,
    },
    Phase.DEGRADED: {
        **_RETURN,
        Event.PAUSE_REQUESTED: Phase.PAUSED,
        Event.SPACE_EXHAUSTED: Phase.PAUSED,
        Event.CANCEL_REQUESTED: Phase.CANCELLED,
        Event.ABORTED: Phase.FAILED,
    },
    Phase.RETIRING: {Event.SOURCE_RETIRED: Phase.DONE},
    Phase.DONE: {},
    Phase.CANCELLED: {},
    Phase.FAILED: {},
}

TERMINAL = frozenset(phase for phase, moves in MOVES.items() if not moves)
COUNTED = frozenset({Phase.COPYING, Phase.CATCHING_UP, Phase.MIRRORING})  # end at 0 bytes left
MIRRORED = frozenset({Phase.MIRRORING, Phase.VERIFYING, Phase.CUTTING_OVER})
REVERSIBLE = frozenset(MOVES) - TERMINAL - {Phase.RETIRING}


class InvalidTransitionError(MirrordError):
    """A bug: an event that the table doesn't allow in this phase. Nothing was changed."""

    code = "invalid-transition"


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a job's story."""

    time_s: float  # seconds since 1970
    phase: Phase  # the phase entered
    event: Event
    reason: str  # why, with the numbers
    predicted_s: float | None = None  # how long it was thought to take, as soon as that was known


@dataclass(slots=True)
class Migration:
    """One job's way through the table, with its story."""

    phase: Phase = Phase.QUEUED
    story: list[Step] = field(default_factory=list)

    def handle(self, event: Event, reason: str, time_s: float) -> Phase:
        """Take the move that `event` means in the present phase and return the phase entered.

        Raises InvalidTransitionError, changing nothing, where the table has no such move.
        """
        after = MOVES[self.phase].get(event)
        if after is None:
            raise InvalidTransitionError(f"{event.name} in {self.phase.name}; {self.tell()}")
        self.phase = after
        self.story.append(Step(time_s, after, event, reason))
        del self.story[1:-STORY_STEPS_MAX]
        return after

    def predict(self, left_s: float, time_s: float) -> bool:
        """Note how long the present step will take in all. The first estimate counts: it returns
        False, changing nothing, when there is one."""
        step = self.story[-1]
        if step.predicted_s is not None:
            return False
        since_s = max(0.0, time_s - step.time_s)  # people set clocks
        self.story[-1] = replace(step, predicted_s=since_s + left_s)
        return True

    def allows(self, event: Event) -> bool:
        """Tell whether `event` has a move from the present phase."""
        return event in MOVES[self.phase]

    def tell(self) -> str:
        """Return the story in one line, oldest first."""
        return " | ".join(f"{s.phase.value}: {s.event.value} ({s.reason})" for s in self.story)


STORY_STEPS_MAX = 200  # a flapping target must not grow the story without bound


def mermaid() -> str:
    """Return the table as a Mermaid state diagram, for the README."""
    lines = ["stateDiagram-v2", "    [*] --> queued"]
    for phase, moves in MOVES.items():
        labels: dict[Phase, list[str]] = {}
        for event, after in moves.items():
            labels.setdefault(after, []).append(event.value)
        lines += [
            f"    {_node(phase)} --> {_node(after)}: {', '.join(events)}"
            for after, events in labels.items()
        ]
    lines += [f"    {_node(phase)} --> [*]" for phase in MOVES if phase in TERMINAL]
    return "\n".join(lines)


def _node(phase: Phase) -> str:
    return phase.value.replace("-", "_")
