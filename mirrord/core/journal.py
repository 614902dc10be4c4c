"""The journal of a job: its durable decisions, and what they say after a crash. Pure.

A journal is a file of `CAPACITY_BYTES`, filled with zeroes before its first record, so that no
record can fail for lack of room. It is a row of records, then zeroes:

    header  "mirJ" | payload length u32 | kind, four letters | sequence u32
            | xxh3 of the payload u64 | xxh3 of the header before this u64   (little endian)
    payload JSON, an object
    zeroes  up to a multiple of 4 KiB

Torn and damaged are different things. A torn record was never durable, so nothing was built on
it: it is dropped. A damaged one may have been the commit point: nobody may go on. A power cut
leaves each aligned word (8 bytes) of a write as it was or as it should be, or cuts it off at any
byte. So a bad record is torn if a word of it is missing, still zero, and nothing valid comes after
it: no word of a header or of JSON is zero, and no single flipped bit makes it so. Recovery makes
the rest of a torn record zero again (`repair`) before it goes on. Damage is: a bad record that is
all there, a valid record behind a bad one, a hole in the numbers, a journal of the wrong length,
an order that no run can have written.

Unknown outcome (rule R15): when writing a record fails, keep the `Log` from before it and either
write the same bytes in the same place again, or zeroes of the same length; go on when one of the
two succeeded. Another record on top of it could be torn into a mixture that looks like damage.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest as xxh3

from mirrord.core.geometry import KIB, MIB, round_up
from mirrord.errors import DamagedError, RefusedError

# 256 records of one block. A move writes four; each target created again and each change by the
# operator adds one.
CAPACITY_BYTES = MIB
BLOCK_BYTES = 4 * KIB
WORD_BYTES = 8  # what a power cut never divides, except at the end of what was written
# A payload holds a few paths (4 KiB each at most) and a summary; 16 such records always fit.
PAYLOAD_BYTES_MAX = 64 * KIB - 64
# Room that PREP and SET must leave: COMMIT, RETIRED, ABORT and DONE of the largest size.
RESERVED_BYTES = 4 * 64 * KIB

MAGIC = b"mirJ"
_FIELDS = struct.Struct("<4sI4sIQ")
_HEADER_CHECK = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _HEADER_CHECK.size

Payload = dict[str, Any]


class Kind(Enum):
    """What a record says. The values are on disk and never change."""

    PREP = b"PREP"  # the target was created (or created again); copying starts over
    COMMIT = b"COMM"  # the commit point: from here on the target is the truth
    RETIRED = b"RETI"  # the source was renamed aside and will be deleted
    DONE = b"DONE"  # nothing is left to do; the payload is the summary
    ABORT = b"ABOR"  # the move ends without a commit; the source stays
    SET = b"SETT"  # the operator changed something (paused, limit, mode); the last one counts


class State(Enum):
    """How far a job has come, by its journal alone."""

    EMPTY = "empty"
    PREPARED = "prepared"
    COMMITTED = "committed"
    RETIRED = "retired"
    ABORTED = "aborted"
    DONE = "done"


class Authority(Enum):
    """The side that holds the truth."""

    SOURCE = "source"
    TARGET = "target"


# COMMIT -> ABORT is legal only as the answer to a commit whose outcome was unknown (rule R15:
# both sides were kept equal); its payload must say so, see UNKNOWN_COMMIT.
LEGAL: dict[State, dict[Kind, State]] = {
    State.EMPTY: {Kind.PREP: State.PREPARED},
    State.PREPARED: {
        Kind.PREP: State.PREPARED,
        Kind.SET: State.PREPARED,
        Kind.COMMIT: State.COMMITTED,
        Kind.ABORT: State.ABORTED,
    },
    State.COMMITTED: {
        Kind.RETIRED: State.RETIRED,
        Kind.DONE: State.DONE,
        Kind.ABORT: State.ABORTED,
    },
    State.RETIRED: {Kind.DONE: State.DONE},
    State.ABORTED: {Kind.DONE: State.DONE},
    State.DONE: {},
}
UNKNOWN_COMMIT = "unknown_commit"


@dataclass(frozen=True, slots=True)
class Record:
    """One durable decision."""

    sequence: int
    kind: Kind
    payload: Payload


@dataclass(frozen=True, slots=True)
class Log:
    """What a journal holds.

    `end` is where the next record goes. With `torn` the bytes from `end` on for `junk_bytes`
    are what is left of a record that was never durable: `repair` comes before `append`.
    """

    records: tuple[Record, ...] = ()
    end: int = 0
    torn: bool = False
    junk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the records mean, folded: where the job stands, who has the truth, the payloads."""

    state: State = State.EMPTY
    authority: Authority = Authority.SOURCE
    prep: Payload | None = None  # the last one: a target created again replaces the first
    commit: Payload | None = None
    retired: Payload | None = None
    abort: Payload | None = None
    done: Payload | None = None
    settings: Payload = field(default_factory=dict)  # of the last SET
    story: tuple[Kind, ...] = field(default=())

    @property
    def finished(self) -> bool:
        return self.state is State.DONE


def encode(sequence: int, kind: Kind, payload: Payload) -> bytes:
    """Return the record's bytes, padded to whole blocks.

    Raises: RefusedError (`journal-full`) for a payload over `PAYLOAD_BYTES_MAX`.
    """
    body = msgspec.json.encode(payload)
    if len(body) > PAYLOAD_BYTES_MAX:
        raise RefusedError(
            "journal-full",
            f"a {kind.name} record of {len(body)} bytes exceeds {PAYLOAD_BYTES_MAX}",
        )
    fields = _FIELDS.pack(MAGIC, len(body), kind.value, sequence, _check(body))
    record = fields + _HEADER_CHECK.pack(_check(fields)) + body
    return record.ljust(round_up(len(record), BLOCK_BYTES), b"\0")


def append(log: Log, kind: Kind, payload: Payload) -> tuple[bytes, Log]:
    """Return the bytes to write at `log.end`, and the log as it is once they are durable.

    Raises: DamagedError when the record may not follow (a bug of the caller: nothing is written);
    RefusedError (`journal-full`) when there is no room, which only PREP and SET can meet.
    """
    record = Record(len(log.records), kind, payload)
    fold((*log.records, record))
    if log.torn:
        raise ValueError("a torn journal must be repaired first")
    data = encode(record.sequence, kind, payload)
    reserved = RESERVED_BYTES if kind in (Kind.PREP, Kind.SET) else 0
    if log.end + len(data) + reserved > CAPACITY_BYTES:
        raise RefusedError("journal-full", "the job's journal has no room for another change")
    return data, Log((*log.records, record), log.end + len(data))


def repair(log: Log) -> tuple[bytes, Log]:
    """Return the zeroes to write, durably, at `log.end` of a torn log, and the log after that.

    Without it a second torn write on top of the first could look like damage. A crash while the
    zeroes are written leaves a torn log again.
    """
    return bytes(log.junk_bytes), Log(log.records, log.end)


def parse(data: bytes) -> Log:
    """Read a journal; `b""` is one that was never created.

    Raises: DamagedError when a record was there and can't be read any more.
    """
    if not data:
        return Log()
    if len(data) != CAPACITY_BYTES:
        raise DamagedError(f"the journal has {len(data)} bytes instead of {CAPACITY_BYTES}")
    records: list[Record] = []
    position = 0
    while position < len(data):
        length = _payload_length(data, position)
        if length is None or not _payload_intact(data, position, length):
            return _tail(data, position, length, tuple(records))
        records.append(_record(data, position, length, len(records)))
        position += round_up(HEADER_BYTES + length, BLOCK_BYTES)
    return Log(tuple(records), position)


def fold(records: Iterable[Record]) -> Outcome:
    """Return what the records mean.

    Raises: DamagedError for an order that no run can have written; the message has the story.
    """
    state = State.EMPTY
    authority = Authority.SOURCE
    payloads: dict[Kind, Payload] = {}
    story: list[Kind] = []
    for record in records:
        kind = record.kind
        story.append(kind)
        after = LEGAL[state].get(kind)
        answers_unknown = record.payload.get(UNKNOWN_COMMIT) is True
        unasked = state is State.COMMITTED and kind is Kind.ABORT and not answers_unknown
        if after is None or unasked:
            told = ", ".join(each.name for each in story)
            raise DamagedError(f"{kind.name} may not follow in state {state.value}: {told}")
        payloads[kind] = record.payload
        state = after
        if kind is Kind.COMMIT:
            authority = Authority.TARGET
        elif kind is Kind.ABORT:
            authority = Authority.SOURCE
    return Outcome(
        state,
        authority,
        prep=payloads.get(Kind.PREP),
        commit=payloads.get(Kind.COMMIT),
        retired=payloads.get(Kind.RETIRED),
        abort=payloads.get(Kind.ABORT),
        done=payloads.get(Kind.DONE),
        settings=payloads.get(Kind.SET, {}),
        story=tuple(story),
    )


def _check(data: bytes) -> int:
    """Return the checksum; never one that a torn write could leave, or one bit away from it."""
    return xxh3(data) | 3


def _payload_length(data: bytes, position: int) -> int | None:
    """Return the payload's length by an intact header at `position`, else None."""
    magic, length, _, _, _ = _FIELDS.unpack_from(data, position)
    (check,) = _HEADER_CHECK.unpack_from(data, position + _FIELDS.size)
    if magic != MAGIC or check != _check(data[position : position + _FIELDS.size]):
        return None
    if length > PAYLOAD_BYTES_MAX or position + HEADER_BYTES + length > len(data):
        raise DamagedError(f"the record at {position} claims {length} bytes")
    return int(length)


def _payload_intact(data: bytes, position: int, length: int) -> bool:
    start = position + HEADER_BYTES
    _, _, _, _, check = _FIELDS.unpack_from(data, position)
    return bool(_check(data[start : start + length]) == check)


def _record(data: bytes, position: int, length: int, sequence: int) -> Record:
    """Return the intact record at `position`, which must be number `sequence`."""
    _, _, kind, stored, _ = _FIELDS.unpack_from(data, position)
    start = position + HEADER_BYTES
    stop = position + round_up(HEADER_BYTES + length, BLOCK_BYTES)
    if stored != sequence:
        raise DamagedError(f"the record at {position} has number {stored} instead of {sequence}")
    if data[start + length : stop].strip(b"\0"):
        raise DamagedError(f"the record at {position} is followed by bytes that nobody wrote")
    try:
        payload = msgspec.json.decode(data[start : start + length], type=Payload)
        return Record(sequence, Kind(kind), payload)
    except (ValueError, msgspec.DecodeError) as error:
        raise DamagedError(f"the record at {position} can't be understood: {error}") from error


def _tail(data: bytes, position: int, length: int | None, records: tuple[Record, ...]) -> Log:
    """Return the log that ends at `position`, where no intact record is."""
    rest = data[position:]
    if rest == bytes(len(rest)):
        return Log(records, position)
    junk = len(rest.rstrip(b"\0"))
    for later in range(position + BLOCK_BYTES, position + junk, BLOCK_BYTES):
        intact = _payload_length(data, later)
        if intact is not None and _payload_intact(data, later, intact):
            raise DamagedError(f"the record at {position} is bad, but one follows at {later}")
    if not _is_partial(data, position, length, junk):
        raise DamagedError(f"the record at {position} is complete but its checksum is wrong")
    return Log(records, position, torn=True, junk_bytes=round_up(junk, BLOCK_BYTES))


def _is_partial(data: bytes, position: int, length: int | None, junk: int) -> bool:
    """Tell whether a part of the bad record is missing, as after a torn write."""
    stop = position + HEADER_BYTES + (length or 0)
    if position + junk < stop:
        return True
    words = range(position, stop, WORD_BYTES)
    return any(not any(data[word : min(word + WORD_BYTES, stop)]) for word in words)
