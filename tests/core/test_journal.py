"""The journal: nothing that was durable is ever misread, and nothing torn is ever believed."""

from __future__ import annotations

import itertools
import re
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrord.core.journal import (
    BLOCK_BYTES,
    CAPACITY_BYTES,
    HEADER_BYTES,
    LEGAL,
    PAYLOAD_BYTES_MAX,
    RESERVED_BYTES,
    UNKNOWN_COMMIT,
    WORD_BYTES,
    Authority,
    Kind,
    Log,
    Payload,
    Record,
    State,
    _check,
    append,
    encode,
    fold,
    parse,
    repair,
)
from mirrord.errors import DamagedError, RefusedError

text = st.text(max_size=40)
payloads: st.SearchStrategy[Payload] = st.dictionaries(
    text, st.one_of(st.integers(-(1 << 60), 1 << 60), text, st.booleans()), max_size=5
)
# One that fills its first block, so that records of several blocks are met too.
big_payloads = payloads.map(lambda payload: payload | {"pad": "é x" * 1500})
any_payloads = st.one_of(payloads, big_payloads)
stories = st.sampled_from([
    (Kind.PREP,),
    (Kind.PREP, Kind.COMMIT),
    (Kind.PREP, Kind.SET, Kind.PREP, Kind.ABORT),
    (Kind.PREP, Kind.COMMIT, Kind.RETIRED, Kind.DONE),
])  # fmt: skip


class Paper:
    """A journal file."""

    def __init__(self) -> None:
        self.data = bytearray(CAPACITY_BYTES)
        self.log = Log()

    def append(self, kind: Kind, payload: Payload) -> tuple[int, bytes]:
        at = self.log.end
        data, self.log = append(self.log, kind, payload)
        self.data[at : at + len(data)] = data
        return at, data

    def parse(self) -> Log:
        return parse(bytes(self.data))


@st.composite
def papers(draw: st.DrawFn) -> Paper:
    paper = Paper()
    for kind in draw(stories):
        paper.append(kind, draw(any_payloads))
    return paper


def length_of(record: Record) -> int:
    return HEADER_BYTES + len(msgspec.json.encode(record.payload))


# -- reading back


@given(papers())
@settings(deadline=None, max_examples=40)
def test_what_was_written_is_read_back(paper: Paper) -> None:
    assert paper.parse() == paper.log
    assert not paper.log.torn


def test_a_journal_that_was_never_created_is_empty() -> None:
    assert parse(b"") == parse(bytes(CAPACITY_BYTES)) == Log()


def test_the_format_is_fixed() -> None:
    data = encode(7, Kind.COMMIT, {"a": 1})
    assert len(data) == BLOCK_BYTES
    assert data[:16] == b"mirJ\x07\0\0\0COMM\x07\0\0\0"
    assert data[HEADER_BYTES:].rstrip(b"\0") == b'{"a":1}'


def test_a_full_journal_is_read_to_its_end() -> None:
    paper = Paper()
    records = CAPACITY_BYTES // BLOCK_BYTES
    for sequence in range(records):
        at = sequence * BLOCK_BYTES
        paper.data[at : at + BLOCK_BYTES] = encode(sequence, Kind.PREP, {})
    log = paper.parse()
    assert len(log.records) == records
    assert log.end == CAPACITY_BYTES


# -- damage


@given(papers(), st.data())
@settings(deadline=None, max_examples=60)
def test_every_truncation_is_noticed(paper: Paper, data: st.DataObject) -> None:
    length = data.draw(
        st.one_of(
            st.integers(1, paper.log.end + 1),
            st.integers(1, CAPACITY_BYTES // BLOCK_BYTES - 1).map(lambda n: n * BLOCK_BYTES),
        )
    )
    with pytest.raises(DamagedError, match=f"has {length} bytes"):
        parse(bytes(paper.data[:length]))


@given(papers(), st.data())
@settings(deadline=None, max_examples=200)
def test_every_flipped_bit_of_a_record_is_damage(paper: Paper, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, paper.log.end * 8 - 1))
    paper.data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DamagedError):
        paper.parse()


def test_every_flipped_bit_of_the_commit_point_is_damage() -> None:
    paper = Paper()
    paper.append(Kind.PREP, {})
    at, _ = paper.append(Kind.COMMIT, {"path": "/a b"})
    for bit in range(at * 8, (at + length_of(paper.log.records[-1])) * 8):
        paper.data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError):
            paper.parse()
        paper.data[bit // 8] ^= 1 << bit % 8


@given(papers(), st.data())
@settings(deadline=None, max_examples=60)
def test_a_flipped_bit_behind_the_end_is_noticed(paper: Paper, data: st.DataObject) -> None:
    bit = data.draw(st.integers(paper.log.end * 8, CAPACITY_BYTES * 8 - 1))
    paper.data[bit // 8] ^= 1 << bit % 8
    try:
        log = paper.parse()
    except DamagedError:
        return
    assert log.torn
    assert log.records == paper.log.records


def test_a_bad_record_before_a_good_one_is_damage() -> None:
    paper = Paper()
    paper.append(Kind.PREP, {})
    at, data = paper.append(Kind.PREP, {"n": 2})
    paper.append(Kind.COMMIT, {})
    for lost in (at, at + HEADER_BYTES):  # the header, or the payload: as if torn
        torn = bytearray(paper.data)
        torn[lost : at + len(data)] = bytes(at + len(data) - lost)
        with pytest.raises(DamagedError, match="one follows"):
            parse(bytes(torn))


def test_a_complete_record_with_a_wrong_checksum_is_damage() -> None:
    paper = Paper()
    at, _ = paper.append(Kind.PREP, {"n": 10})
    paper.data[at + HEADER_BYTES + 5] ^= 1
    with pytest.raises(DamagedError, match="complete but its checksum is wrong"):
        paper.parse()


def forged(kind: bytes, sequence: int, body: bytes, length: int | None = None) -> bytes:
    """Return a journal of one record with right checksums."""
    fields = struct.pack(
        "<4sI4sIQ", b"mirJ", len(body) if length is None else length, kind, sequence, _check(body)
    )
    return (fields + struct.pack("<Q", _check(fields)) + body).ljust(CAPACITY_BYTES, b"\0")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (forged(b"PREP", 1, b"{}"), "has number 1 instead of 0"),
        (forged(b"WHAT", 0, b"{}"), "can't be understood"),
        (forged(b"PREP", 0, b"[]"), "can't be understood"),
        (forged(b"PREP", 0, b"{"), "can't be understood"),
        (forged(b"PREP", 0, b"{}", CAPACITY_BYTES), "claims"),
        (forged(b"PREP", 0, b"{}", PAYLOAD_BYTES_MAX + 1), "claims"),
    ],
)
def test_what_nobody_can_have_written_is_damage(data: bytes, why: str) -> None:
    with pytest.raises(DamagedError, match=why):
        parse(data)


def test_a_record_that_would_end_behind_the_journal_is_damage() -> None:
    record = forged(b"PREP", 0, b"{}", BLOCK_BYTES)[:BLOCK_BYTES]
    with pytest.raises(DamagedError, match="claims"):
        parse(bytes(CAPACITY_BYTES - BLOCK_BYTES) + record)


def test_bytes_between_records_are_damage() -> None:
    paper = Paper()
    paper.append(Kind.PREP, {})
    paper.data[BLOCK_BYTES - 1] = 1
    with pytest.raises(DamagedError, match="nobody wrote"):
        paper.parse()


# -- torn writes


@given(papers(), any_payloads, st.data())
@settings(deadline=None, max_examples=150)
def test_a_torn_record_is_dropped(paper: Paper, payload: Payload, data: st.DataObject) -> None:
    before = paper.log
    kind = next(iter(LEGAL[fold(before.records).state]), None)
    if kind is None:
        return
    at, record = paper.append(kind, payload)
    used = length_of(paper.log.records[-1])
    if data.draw(st.booleans(), label="cut off"):
        cut = data.draw(st.integers(0, used - 1))
        paper.data[at + cut : at + used] = bytes(used - cut)
    else:
        words = range(at, at + used, WORD_BYTES)
        for word in data.draw(st.sets(st.sampled_from(words), min_size=1, max_size=len(words))):
            paper.data[word : word + WORD_BYTES] = bytes(WORD_BYTES)
    log = paper.parse()
    assert (log.records, log.end) == (before.records, before.end)
    assert log.torn == bool(paper.data[at:].strip(b"\0"))

    with_end = repair(log) if log.torn else (b"", log)
    paper.data[at : at + len(with_end[0])] = with_end[0]
    assert paper.parse() == with_end[1] == before
    assert not paper.data[at:].strip(b"\0")
    assert len(with_end[0]) <= len(record)


def test_a_torn_journal_is_repaired_first() -> None:
    log = Log(torn=True, junk_bytes=BLOCK_BYTES)
    with pytest.raises(ValueError, match="repaired first"):
        append(log, Kind.PREP, {})
    data, repaired = repair(log)
    assert data == bytes(BLOCK_BYTES)
    assert append(repaired, Kind.PREP, {})[1].end == BLOCK_BYTES


# -- room


def test_a_payload_has_a_limit() -> None:
    fits = {"a": "x" * (PAYLOAD_BYTES_MAX - len('{"a":""}'))}
    assert len(encode(0, Kind.PREP, fits)) == 64 * 1024
    with pytest.raises(RefusedError, match="exceeds") as refused:
        encode(0, Kind.PREP, {"a": fits["a"] + "x"})
    assert refused.value.code == "journal-full"


def test_starting_over_and_over_leaves_room_for_the_end() -> None:
    largest = {"a": "x" * (PAYLOAD_BYTES_MAX - len('{"a":""}'))}
    log = Log()
    while log.end + BLOCK_BYTES <= CAPACITY_BYTES - RESERVED_BYTES:
        _, log = append(log, Kind.PREP, {})
    assert len(log.records) > 100
    for kind in (Kind.PREP, Kind.SET):
        with pytest.raises(RefusedError, match="no room"):
            append(log, kind, {})
    for kind, more in (
        (Kind.COMMIT, {}),
        (Kind.ABORT, {UNKNOWN_COMMIT: True, "a": largest["a"][30:]}),
        (Kind.DONE, largest),
    ):
        _, log = append(log, kind, more or largest)
    assert log.end <= CAPACITY_BYTES


# -- meaning

LETTERS = {kind: kind.name[0] for kind in Kind}
LEGAL_STORIES = re.compile("(P[PS]*(C(R?D?|AD?)|AD?)?)?")


def story(kinds: tuple[Kind, ...], **payload: Any) -> list[Record]:
    return [Record(number, kind, {"n": number, **payload}) for number, kind in enumerate(kinds)]


@pytest.mark.parametrize("length", range(6))
def test_only_legal_orders_are_understood(length: int) -> None:
    for kinds in itertools.product(Kind, repeat=length):
        told = "".join(LETTERS[kind] for kind in kinds)
        records = story(kinds, unknown_commit=True)
        if LEGAL_STORIES.fullmatch(told):
            committed = "C" in told and "A" not in told
            outcome = fold(records)
            assert outcome.authority is (Authority.TARGET if committed else Authority.SOURCE)
            assert outcome.finished == ("D" in told)
            assert outcome.story == kinds
        else:
            with pytest.raises(DamagedError, match="may not follow"):
                fold(records)


def test_the_table_has_every_state() -> None:
    assert set(LEGAL) == set(State)


def test_nothing_means_the_source() -> None:
    assert fold([]).state is State.EMPTY
    assert fold([]).authority is Authority.SOURCE


def test_the_last_prep_counts_and_every_payload_is_kept() -> None:
    kinds = (Kind.PREP, Kind.PREP, Kind.COMMIT, Kind.RETIRED, Kind.DONE)
    outcome = fold(story(kinds))
    assert outcome.prep == {"n": 1}
    assert outcome.commit == {"n": 2}
    assert outcome.retired == {"n": 3}
    assert outcome.done == {"n": 4}
    assert outcome.abort is None
    assert outcome.settings == {}
    assert fold(story((Kind.PREP, Kind.SET, Kind.SET, Kind.PREP))).settings == {"n": 2}
    assert fold(story((Kind.PREP, Kind.ABORT))).abort == {"n": 1}


def test_an_abort_undoes_only_a_commit_of_unknown_outcome() -> None:
    records = story((Kind.PREP, Kind.COMMIT))
    with pytest.raises(DamagedError, match="PREP, COMMIT, ABORT"):
        fold([*records, Record(2, Kind.ABORT, {})])
    outcome = fold([*records, Record(2, Kind.ABORT, {UNKNOWN_COMMIT: True})])
    assert outcome.authority is Authority.SOURCE
    assert outcome.state is State.ABORTED


def test_an_illegal_record_is_not_encoded() -> None:
    with pytest.raises(DamagedError, match="may not follow"):
        append(Log(), Kind.COMMIT, {})
