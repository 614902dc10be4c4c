"""The intent map, against a model that is too simple to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mirrord.core.bitmap import (
    PAGE_BITS,
    PAGE_BYTES,
    IntentMap,
    Pages,
    map_bytes_for,
)
from mirrord.core.geometry import GIB, KIB, MIB, TIB

# -- the intent map, by example


def test_the_intent_map_of_a_terabyte_is_small() -> None:
    assert map_bytes_for(TIB) == 128 * KIB
    assert map_bytes_for(1) == PAGE_BYTES
    with pytest.raises(ValueError, match="at least one byte"):
        IntentMap(0)


def test_a_new_map_is_all_ones_and_not_durable_yet() -> None:
    intent = IntentMap(3 * MIB + 1)
    assert intent.count == intent.marked_count() == 4
    assert list(intent.marked_regions()) == [0, 1, 2, 3]
    assert intent.marked_bits().to01() == "1111"
    assert intent.ranges() == [(0, 3 * MIB + 1)]
    assert not intent.marked(0, 1)
    content = intent.content()
    assert content == b"\x0f" + bytes(PAGE_BYTES - 1)
    assert intent.pages() == [(0, content)]
    intent.made_durable([(0, content)])
    assert intent.marked(0, 3 * MIB + 1)
    assert intent.pages() == intent.cleared_pages() == []


def test_a_stored_map_is_believed_a_short_one_is_not() -> None:
    stored = b"\x05" + b"\xff" * (PAGE_BYTES - 1)  # bits behind the last region mean nothing
    intent = IntentMap(4 * MIB, initial=stored)
    assert intent.ranges() == [(0, MIB), (2 * MIB, MIB)]
    assert intent.marked(2 * MIB, MIB)
    assert not intent.marked(0, 2 * MIB)
    assert intent.wanted(0)
    assert not intent.wanted(1)
    lost = IntentMap(4 * MIB, initial=stored[:-1])
    assert lost.marked_count() == 4
    assert not lost.marked(0, 1)


def test_a_mark_counts_once_it_is_durable() -> None:
    intent = IntentMap(64 * GIB, initial=bytes(map_bytes_for(64 * GIB)))
    intent.want(32 * GIB - 1, 2)  # the last region of one page, the first of the next
    first = intent.pages()
    assert [offset for offset, _ in first] == [0, PAGE_BYTES]
    intent.want(0, 1)  # too late for what is being written
    intent.made_durable(first)
    assert intent.marked(32 * GIB - 1, 2)
    assert not intent.marked(0, 1)
    intent.made_durable(intent.pages())
    assert intent.marked(0, 1)
    intent.want(0, 1)
    assert intent.pages() == []


def test_a_failed_write_is_wanted_again() -> None:
    intent = IntentMap(GIB, initial=bytes(PAGE_BYTES))
    intent.want(0, 1)
    assert intent.pages() == intent.pages() != []


def test_a_cleared_bit_is_not_durable_at_once() -> None:
    intent = IntentMap(2 * MIB, initial=b"\x03".ljust(PAGE_BYTES, b"\0"))
    intent.clear(1)
    assert not intent.marked(MIB, 1)
    assert intent.marked(0, 1)
    stale = intent.cleared_pages()
    assert stale == [(0, b"\x01".ljust(PAGE_BYTES, b"\0"))]
    intent.want(MIB, 1)
    intent.written(stale)
    assert intent.cleared_pages() != []  # what was written isn't what the map is now
    intent.made_durable(intent.pages())
    assert intent.cleared_pages() == []


# -- the intent map, as a machine, with storage that may lose what was not flushed

WATCHED = [0, 1, PAGE_BITS - 1, PAGE_BITS, 2 * PAGE_BITS + 4]
REGIONS = 2 * PAGE_BITS + 5


class IntentMachine(RuleBasedStateMachine):
    """R1: whatever a power cut leaves, each region that counts as marked is marked in it."""

    @initialize(known=st.booleans())
    def start(self, known: bool) -> None:
        length = map_bytes_for(REGIONS, 1)
        self.intent = IntentMap(REGIONS, 1, bytes(length) if known else None)
        # The values of each bit that a power cut could leave, and what the cache holds.
        self.possible = {region: {0} if known else {0, 1} for region in WATCHED}
        self.writing: Pages | None = None
        self.wanted: set[int] = set() if known else set(WATCHED)

    @rule(region=st.sampled_from(WATCHED))
    def want(self, region: int) -> None:
        self.intent.want(region, 1)
        self.wanted.add(region)

    @rule(region=st.sampled_from(WATCHED))
    def clear(self, region: int) -> None:
        self.intent.clear(region)
        self.wanted.discard(region)

    @precondition(lambda self: self.writing is None)
    @rule(durable=st.booleans())
    def begin(self, durable: bool) -> None:
        pages = self.intent.pages() if durable else self.intent.cleared_pages()
        for region, bit in self.bits(pages):
            self.possible[region].add(bit)
        if durable:
            self.writing = pages
        else:
            self.intent.written(pages)

    @precondition(lambda self: self.writing is not None)
    @rule(works=st.booleans())
    def end(self, works: bool) -> None:
        assert self.writing is not None
        if works:
            for region, bit in self.bits(self.writing):
                self.possible[region] = {bit}
            self.intent.made_durable(self.writing)
        self.writing = None

    @rule(data=st.data())
    def power_cut(self, data: st.DataObject) -> None:
        left = bytearray(map_bytes_for(REGIONS, 1))
        for region, bits in self.possible.items():
            bit = data.draw(st.sampled_from(sorted(bits)))
            left[region // 8] |= bit << region % 8
            self.possible[region] = {bit}
            assert bit or not self.intent.marked(region, 1)
        self.wanted = {region for region in WATCHED if self.possible[region] == {1}}
        self.intent = IntentMap(REGIONS, 1, bytes(left))
        self.writing = None

    @invariant()
    def what_counts_as_marked_is_durable(self) -> None:
        for region in WATCHED:
            if self.intent.marked(region, 1):
                assert self.possible[region] == {1}
                assert self.intent.wanted(region)
            assert self.intent.wanted(region) == (region in self.wanted)

    def teardown(self) -> None:
        """However it got here, one good write of what is asked for ends all waiting."""
        if hasattr(self, "intent"):
            self.intent.made_durable(self.intent.pages())
            assert self.intent.pages() == []
            assert all(self.intent.marked(region, 1) for region in self.wanted)

    @staticmethod
    def bits(pages: Pages) -> list[tuple[int, int]]:
        return [
            (region, data[region // 8 - offset] >> region % 8 & 1)
            for offset, data in pages
            for region in WATCHED
            if offset <= region // 8 < offset + len(data)
        ]


TestIntentMap = IntentMachine.TestCase
TestIntentMap.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
