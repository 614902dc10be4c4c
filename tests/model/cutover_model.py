"""An exhaustive check of the protocol of copy, mirror and cutover, on the smallest useful disk.

Two chunks, a few guest writes and flushes, a few crashes: every order in which the guest's
request, the copier, the checkpoint and the cutover can take their steps, with a crash possible in
each state. Two kinds of crash:

    kill        the process dies: memory is gone, everything written is still in the page cache
    power cut   also every effect that was not synced is lost or kept, each by itself

What must hold at every recovery: the side that the journal names exists under its name, and each
chunk of it is at least as new as the guest was promised (its last acknowledged write after a
kill, its last flushed write after a power cut). What a recovery has shown never becomes older
again, and a write that it has shown to be lost never comes back. At the end the target holds
exactly what the guest believes in.

`Mistakes` are sixteen ways to break the protocol, each a rule not kept; each must be found. When
the code's protocol changes, this model changes first.

    here                    the code that does it
    guest_steps             engine/tracking.py, engine/disk.py, engine/intents.py
    copier_steps            engine/copier.py
    checkpoint              engine/tracking.py (checkpoint)
    cutover_steps           engine/cutover.py
    retire_steps            engine/retire.py
    recovered               engine/recovery.py, core/journal.py (fold)
    target_restarts         engine/tracking.py (distrust_target)

Simpler than the code: one guest request at a time (the halves of a mirrored write land in either
order); a rename with its directory sync, and a mark with its sync, are one step; writes are not
torn and nothing fails with an error. Those are for the simulator (`tests/sim`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

CHUNKS = 2
NEVER_WRITTEN = -1  # what a new target holds

Values = tuple[int, ...]  # one a chunk: the number of the write that it holds
Possible = tuple[frozenset[int], ...]  # one a chunk: what a power cut may leave


@dataclass(frozen=True, slots=True)
class Mistakes:
    """Rules that are not kept. None of them is the recommended protocol."""

    no_intent: bool = False  # R1
    intent_unsynced: bool = False  # R1
    clear_bit_before_target_sync: bool = False  # R2
    clear_bit_before_source_sync: bool = False  # R2
    clear_bit_with_write_in_flight: bool = False  # R2
    dirty_set_before_write_only: bool = False  # R3
    no_range_lock: bool = False  # R4
    no_target_sync_before_commit: bool = False  # R5
    gate_without_drain: bool = False  # R5
    no_dirsync_before_commit: bool = False  # R6
    serve_target_before_commit_synced: bool = False  # R7
    delete_before_commit_synced: bool = False  # R8
    flush_target_only_when_mirrored: bool = False  # R10
    resume_ignores_map: bool = False  # R11
    recovery_acts_on_unsynced_journal: bool = False  # R12
    target_restart_trusts_unflushed: bool = False  # R13


MISTAKES = tuple(field.name for field in fields(Mistakes))


class Write(NamedTuple):
    """A guest's write on its way, which began while mirroring or not."""

    chunk: int
    value: int
    progress: str
    mirrored: bool


# The progress of a write.
ADMITTED = "admitted"
MARKED = "marked"  # its region is marked, in memory and durably
FIRST_LEG = "on the serving side"  # written there, but not mirrored or entered as dirty yet
TARGET_LEG = "on the target only"
COMPLETE = "complete"


class Flush(NamedTuple):
    """A guest's flush on its way; it promises what was acknowledged when it began."""

    promises: Values
    done: bool


class Copying(NamedTuple):
    """The copier has read this value of this chunk and not written it yet."""

    chunk: int
    value: int


# Where the job is, when it isn't Copying.
START = "nothing recorded"
IDLE = "between two chunks"
CHECKPOINT = "checkpoint"
GATED = "gate closed"
RENAME = "give the target its name"
COMMIT = "append COMMIT"
SYNC_COMMIT = "sync COMMIT"
SYNC_COMMIT_LATE = "sync COMMIT, source already deleted"
PIVOT = "serve the target"
RETIRE = "delete the source"
FINISH = "make the deletion durable"
DONE = "done"

SOURCE, TARGET = "source", "target"
TEMPORARY, FINAL = "temporary", "final"


class State(NamedTuple):
    """Everything that matters. `x_left` is what a power cut may leave of `x`."""

    source: Values
    source_left: Possible
    target: Values
    target_left: Possible
    marks: Values  # the intent map
    marks_left: Possible
    name: str  # of the target
    name_left: frozenset[str]
    journal: tuple[str, ...]
    journal_synced: int  # records that no power cut takes away
    deleted: bool  # the source
    deleted_left: frozenset[bool]
    dirty: Values  # the bitmap; memory
    at: str | Copying  # where the job is; memory
    mirroring: bool
    gate_open: bool
    serving: str
    request: Write | Flush | None
    acknowledged: Values  # per chunk, the newest write the guest believes in
    flushed: Values  # and the newest that must survive a power cut
    issued: Values
    writes: int  # how many more there may be
    flushes: int
    crashes: int
    restarts: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much may happen in one run."""

    writes: int
    flushes: int
    crashes: int
    restarts: int = 0  # of a target that forgets what wasn't flushed, such as a server


class ViolationError(AssertionError):
    """A promise is broken in the state that recovery finds."""


def begin(bounds: Bounds) -> State:
    """Return the state before a move: a disk being served, and an empty target."""
    zeroes = (0,) * CHUNKS
    empty = (NEVER_WRITTEN,) * CHUNKS
    ones = (1,) * CHUNKS
    return State(
        source=zeroes, source_left=only(zeroes),
        target=empty, target_left=only(empty),
        marks=ones, marks_left=only(ones),
        name=TEMPORARY, name_left=frozenset([TEMPORARY]),
        journal=(), journal_synced=0,
        deleted=False, deleted_left=frozenset([False]),
        dirty=ones, at=START, mirroring=False, gate_open=True, serving=SOURCE,
        request=None, acknowledged=zeroes, flushed=zeroes, issued=zeroes,
        writes=bounds.writes, flushes=bounds.flushes,
        crashes=bounds.crashes, restarts=bounds.restarts,
    )  # fmt: skip


# -- small changes of a state


def only(values: Values) -> Possible:
    """Return the possibilities after a sync: what is there."""
    return tuple(frozenset([value]) for value in values)


def put(values: tuple[int, ...], chunk: int, value: int) -> Values:
    return (*values[:chunk], value, *values[chunk + 1 :])


def also(left: Possible, chunk: int, value: int) -> Possible:
    return (*left[:chunk], left[chunk] | {value}, *left[chunk + 1 :])


def written(state: State, side: str, chunk: int, value: int) -> State:
    """Write a chunk of a side, without a sync."""
    if side == SOURCE:
        return state._replace(
            source=put(state.source, chunk, value),
            source_left=also(state.source_left, chunk, value),
        )
    return state._replace(
        target=put(state.target, chunk, value), target_left=also(state.target_left, chunk, value)
    )


def synced(state: State, side: str) -> State:
    if side == SOURCE:
        return state._replace(source_left=only(state.source))
    return state._replace(target_left=only(state.target))


def marked(state: State, chunk: int, bit: int, *, durable: bool) -> State:
    left = state.marks_left
    left = (
        (*left[:chunk], frozenset([bit]), *left[chunk + 1 :]) if durable else also(left, chunk, bit)
    )
    return state._replace(marks=put(state.marks, chunk, bit), marks_left=left)


def recorded(state: State, record: str, *, durable: bool) -> State:
    state = state._replace(journal=(*state.journal, record))
    return journal_synced(state) if durable else state


def journal_synced(state: State) -> State:
    return state._replace(journal_synced=len(state.journal))


# -- the steps that can come next


def steps(state: State, mistakes: Mistakes) -> Iterator[State]:
    """Yield every state that one step of the guest or of the job leads to."""
    yield from guest_steps(state, mistakes)
    if isinstance(state.at, Copying):
        yield written(state, TARGET, *state.at)._replace(at=IDLE)
    elif state.at == START:  # the map was made durable, all ones, before this record
        yield recorded(state, "PREP", durable=True)._replace(at=IDLE)
    elif state.at == IDLE:
        yield from copier_steps(state, mistakes)
    elif state.at == CHECKPOINT:
        yield checkpoint(state, mistakes)
    elif state.at in (RETIRE, FINISH):
        yield from retire_steps(state)
    elif state.at != DONE:
        yield from cutover_steps(state, mistakes)


def guest_steps(state: State, mistakes: Mistakes) -> Iterator[State]:
    request = state.request
    if isinstance(request, Write):
        yield from write_steps(state, request, mistakes)
    elif isinstance(request, Flush):
        yield flush_step(state, request, mistakes)
    elif state.gate_open:
        if state.writes:
            mirrored = state.mirroring and state.serving == SOURCE
            for chunk in range(CHUNKS):
                value = state.issued[chunk] + 1
                yield state._replace(
                    request=Write(chunk, value, ADMITTED, mirrored),
                    writes=state.writes - 1,
                    issued=put(state.issued, chunk, value),
                )
        if state.flushes:
            yield state._replace(
                request=Flush(state.acknowledged, False), flushes=state.flushes - 1
            )


def write_steps(state: State, write: Write, mistakes: Mistakes) -> Iterator[State]:
    """A write: marks, then the serving side and the target, or the bitmap; then the answer."""
    chunk, value = write.chunk, write.value
    tracked = state.serving == SOURCE and state.at != START

    def proceed(after: State, progress: str) -> State:
        return after._replace(request=write._replace(progress=progress))

    if write.progress == ADMITTED:
        after = state
        if tracked and not mistakes.no_intent and state.marks_left[chunk] != {1}:
            after = marked(after, chunk, 1, durable=not mistakes.intent_unsynced)
        if tracked and mistakes.dirty_set_before_write_only and not write.mirrored:
            after = after._replace(dirty=put(after.dirty, chunk, 1))
        yield proceed(after, MARKED)
    elif write.progress == MARKED:
        copied_now = isinstance(state.at, Copying) and state.at.chunk == chunk
        if write.mirrored and copied_now and not mistakes.no_range_lock:
            return
        yield proceed(written(state, state.serving, chunk, value), FIRST_LEG)
        if write.mirrored:
            yield proceed(written(state, TARGET, chunk, value), TARGET_LEG)
    elif write.progress == TARGET_LEG:
        yield proceed(written(state, SOURCE, chunk, value), COMPLETE)
    elif write.progress == FIRST_LEG:
        after = state
        if write.mirrored:
            after = written(state, TARGET, chunk, value)
        elif tracked and not mistakes.dirty_set_before_write_only:
            after = state._replace(dirty=put(state.dirty, chunk, 1))
        yield proceed(after, COMPLETE)
    else:
        newest = max(value, state.acknowledged[chunk])
        yield state._replace(request=None, acknowledged=put(state.acknowledged, chunk, newest))


def flush_step(state: State, flush: Flush, mistakes: Mistakes) -> State:
    if flush.done:
        return state._replace(request=None, flushed=newer(state.flushed, flush.promises))
    side = state.serving
    if mistakes.flush_target_only_when_mirrored and state.mirroring and side == SOURCE:
        side = TARGET
    return synced(state, side)._replace(request=flush._replace(done=True))


def copier_steps(state: State, mistakes: Mistakes) -> Iterator[State]:
    """Copy a dirty chunk, begin to mirror, take a checkpoint, or close the gate."""
    write = state.request if isinstance(state.request, Write) else None
    for chunk in range(CHUNKS):
        locked = (
            write is not None
            and write.mirrored
            and write.chunk == chunk
            and write.progress != ADMITTED
        )
        if state.dirty[chunk] and (not locked or mistakes.no_range_lock):
            yield state._replace(
                dirty=put(state.dirty, chunk, 0), at=Copying(chunk, state.source[chunk])
            )
    if not state.mirroring:
        yield state._replace(mirroring=True)
    if not any(state.dirty):
        yield state._replace(at=CHECKPOINT)
        if state.mirroring and (write is None or mistakes.gate_without_drain):
            yield state._replace(gate_open=False, at=GATED)


def checkpoint(state: State, mistakes: Mistakes) -> State:
    """Flush the target, then clear marks, lazily, of chunks that are equal and at rest.

    Equal after a power cut, too: what the source may still lose must not stay on the target.
    """
    after = state if mistakes.clear_bit_before_target_sync else synced(state, TARGET)
    write = state.request if isinstance(state.request, Write) else None
    for chunk in range(CHUNKS):
        busy = write is not None and write.chunk == chunk
        at_rest = not busy or mistakes.clear_bit_with_write_in_flight
        durable = len(state.source_left[chunk]) == 1 or mistakes.clear_bit_before_source_sync
        if state.marks[chunk] and not state.dirty[chunk] and at_rest and durable:
            after = marked(after, chunk, 0, durable=False)
    return after._replace(at=IDLE)


def cutover_steps(state: State, mistakes: Mistakes) -> Iterator[State]:
    """From the closed gate to the pivot."""
    at = state.at
    if at == GATED:
        if isinstance(state.request, Write) and not mistakes.gate_without_drain:
            return
        if any(state.dirty):
            yield state._replace(gate_open=True, at=IDLE)
        else:
            after = state if mistakes.no_target_sync_before_commit else synced(state, TARGET)
            yield after._replace(at=RENAME)
    elif at == RENAME:
        left = frozenset([FINAL])
        if mistakes.no_dirsync_before_commit:
            left |= state.name_left
        yield state._replace(name=FINAL, name_left=left, at=COMMIT)
    elif at == COMMIT:
        after = recorded(state, "COMMIT", durable=False)
        yield after._replace(
            at=PIVOT if mistakes.serve_target_before_commit_synced else SYNC_COMMIT
        )
    elif at == SYNC_COMMIT:
        yield journal_synced(state)._replace(at=PIVOT)
        if mistakes.delete_before_commit_synced:
            yield state._replace(
                deleted=True, deleted_left=state.deleted_left | {True}, at=SYNC_COMMIT_LATE
            )
    elif at == SYNC_COMMIT_LATE:
        yield journal_synced(state)._replace(at=PIVOT)
    else:
        assert at == PIVOT
        yield state._replace(serving=TARGET, gate_open=True, mirroring=False, at=RETIRE)


def retire_steps(state: State) -> Iterator[State]:
    if state.at == RETIRE:
        yield journal_synced(state)._replace(
            deleted=True, deleted_left=frozenset([False, True]), at=FINISH
        )
    else:
        gone = state._replace(deleted_left=frozenset([True]))
        yield recorded(gone, "DONE", durable=True)._replace(at=DONE)


# -- crashes


def crashes(state: State, mistakes: Mistakes) -> Iterator[State]:
    """Yield the state after recovery from a crash now, for everything a crash may leave."""
    if not state.crashes:
        return
    crashed = state._replace(crashes=state.crashes - 1)
    yield recovered(crashed, mistakes, power=False)
    for source, target, marks, name, deleted, records in itertools.product(
        itertools.product(*state.source_left),
        itertools.product(*state.target_left),
        itertools.product(*state.marks_left),
        state.name_left,
        state.deleted_left,
        range(state.journal_synced, len(state.journal) + 1),
    ):
        found = crashed._replace(
            source=source, source_left=only(source),
            target=target, target_left=only(target),
            marks=marks, marks_left=only(marks),
            name=name, name_left=frozenset([name]),
            deleted=deleted, deleted_left=frozenset([deleted]),
            journal=state.journal[:records], journal_synced=records,
        )  # fmt: skip
        yield recovered(found, mistakes, power=True)


def recovered(state: State, mistakes: Mistakes, *, power: bool) -> State:
    """Begin anew from what is on storage. Raises ViolationError if a promise is broken."""
    committed = "COMMIT" in state.journal
    if committed and state.name != FINAL:
        raise ViolationError("committed, but the target is not under its final name")
    if state.deleted and not committed:
        raise ViolationError("the source is deleted, and no commit is durable")
    content = state.target if committed else state.source
    promised = state.flushed if power else state.acknowledged
    side, crash = TARGET if committed else SOURCE, "power cut" if power else "kill"
    believed = state.acknowledged
    if isinstance(state.request, Write):  # nobody can say whether this one happened
        believed = put(believed, state.request.chunk, state.request.value)
    for chunk in range(CHUNKS):
        told = f"chunk {chunk} of the {side} holds {content[chunk]} after a {crash}, the guest"
        if content[chunk] < promised[chunk]:
            raise ViolationError(f"{told} was promised {promised[chunk]}")
        if content[chunk] > believed[chunk]:
            raise ViolationError(f"{told} saw nothing newer than {believed[chunk]}")
    if not state.journal:
        at, dirty = START, (1,) * CHUNKS
    else:
        at = IDLE if not committed else DONE if "DONE" in state.journal else RETIRE
        dirty = (0,) * CHUNKS if mistakes.resume_ignores_map else state.marks
    synced_records = len(state.journal)
    if mistakes.recovery_acts_on_unsynced_journal:
        synced_records = state.journal_synced
    return state._replace(
        dirty=dirty, at=at, mirroring=False, gate_open=True, request=None,
        serving=TARGET if committed else SOURCE,
        journal_synced=synced_records,
        # What the guest has seen now it may never see older again.
        acknowledged=content if power else newer(content, state.acknowledged),
        flushed=content if power else state.flushed,
    )  # fmt: skip


def target_restarts(state: State, mistakes: Mistakes) -> Iterator[State]:
    """Yield the states after the target lost what wasn't flushed; the job lives and notices."""
    if not state.restarts or state.serving != SOURCE or "COMMIT" in state.journal:
        return
    for target in itertools.product(*state.target_left):
        if target == state.target:
            continue
        dirty = state.dirty
        if not mistakes.target_restart_trusts_unflushed:
            dirty = tuple(
                1 if len(left) > 1 else bit
                for left, bit in zip(state.target_left, state.dirty, strict=True)
            )
        yield state._replace(
            target=target, target_left=only(target), dirty=dirty, restarts=state.restarts - 1
        )


def newer(one: Values, other: Values) -> Values:
    return tuple(map(max, one, other))
