"""Limits, windows, rates and the decision for another pass, with clocks that the tests turn."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrord.core.geometry import GIB, MIB
from mirrord.core.pacing import (
    BURST_BYTES,
    CLIMB_PAUSE_S,
    DEBT_MAX_S,
    WINDOW_MAX_BYTES,
    Climb,
    Rates,
    TokenBucket,
    Window,
    eta,
    pass_pays,
    share_of,
)

# -- the limit


def test_without_a_limit_nothing_waits() -> None:
    bucket = TokenBucket(0, 0.0)
    for _ in range(5):
        bucket.charge(GIB, 0.0)
        assert bucket.delay_s(GIB, 0.0) == 0.0


@pytest.mark.parametrize(("limit", "share"), [(0, 0), (1, 1), (4 * MIB, MIB)])
def test_a_quarter_of_a_limit_is_the_copiers(limit: int, share: int) -> None:
    """Of no limit there is no part; of the smallest something, or it would be none."""
    assert share_of(limit) == share


def test_the_burst_goes_at_once_and_the_rest_at_the_rate() -> None:
    bucket = TokenBucket(MIB, 10.0)
    assert bucket.delay_s(BURST_BYTES, 10.0) == 0.0
    bucket.charge(BURST_BYTES, 10.0)
    assert bucket.delay_s(MIB, 10.0) == pytest.approx(1.0)
    assert bucket.delay_s(MIB, 10.5) == pytest.approx(0.5)
    assert bucket.delay_s(MIB, 11.0) == 0.0


def test_more_than_the_burst_waits_for_a_full_bucket() -> None:
    bucket = TokenBucket(MIB, 0.0, burst_bytes=2 * MIB)
    bucket.charge(MIB, 0.0)
    assert bucket.delay_s(100 * MIB, 0.0) == pytest.approx(1.0)


def test_mirrored_writes_are_paid_for_by_the_copier_within_reason() -> None:
    bucket = TokenBucket(10 * MIB, 0.0)
    bucket.charge(BURST_BYTES, 0.0)
    bucket.charge(5 * MIB, 0.0)
    assert bucket.delay_s(MIB, 0.0) == pytest.approx(0.6)
    for _ in range(10):
        bucket.charge(GIB, 0.0)
    assert bucket.delay_s(MIB, 0.0) == pytest.approx(DEBT_MAX_S + 0.1)


def test_the_rate_changes_at_any_time() -> None:
    bucket = TokenBucket(MIB, 0.0)
    bucket.charge(BURST_BYTES, 0.0)
    assert bucket.delay_s(2 * MIB, 0.0) == pytest.approx(2.0)
    bucket.set_rate(2 * MIB, 1.0)
    assert bucket.delay_s(2 * MIB, 1.0) == pytest.approx(0.5)
    bucket.set_rate(0, 1.0)
    assert bucket.delay_s(2 * MIB, 1.0) == 0.0


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    bucket = TokenBucket(MIB, 100.0)
    bucket.charge(BURST_BYTES, 100.0)
    assert bucket.delay_s(MIB, 50.0) == pytest.approx(1.0)
    assert bucket.delay_s(MIB, 100.0) == pytest.approx(1.0)


@given(
    st.integers(1, 100 * MIB),
    st.lists(st.tuples(st.integers(1, BURST_BYTES), st.floats(0, 10)), min_size=1, max_size=40),
)
def test_no_stretch_of_time_gets_more_than_rate_and_burst(
    rate: int, wishes: list[tuple[int, float]]
) -> None:
    bucket = TokenBucket(rate, 0.0)
    now_s = 0.0
    sent: list[tuple[float, int]] = []
    for amount, idle_s in wishes:
        now_s += idle_s
        now_s += bucket.delay_s(amount, now_s)
        assert bucket.delay_s(amount, now_s) == 0.0, "waiting as long as told was not enough"
        bucket.charge(amount, now_s)
        sent.append((now_s, amount))
    for index, (start_s, _) in enumerate(sent):
        total = 0
        for at_s, amount in sent[index:]:
            total += amount
            assert total <= rate * (at_s - start_s) + BURST_BYTES + 1


# -- the window


class Storage:
    """Serves `lanes` chunks at once, each in `chunk_s`; the others wait."""

    def __init__(self, lanes: int, chunk_s: float) -> None:
        self.lanes = lanes
        self.chunk_s = chunk_s
        self.now_s = 0.0
        self.sent_s = 0.0  # of what ended last
        self._free_s = [0.0] * lanes
        self._flight: list[tuple[float, float]] = []

    def next(self, window_bytes: int) -> float:
        """Fill the window with chunks of 1 MiB; return how long the next one took that ends."""
        while not self._flight or (len(self._flight) + 1) * MIB <= window_bytes:
            self._free_s.sort()
            ends_s = max(self.now_s, self._free_s[0]) + self.chunk_s
            self._free_s[0] = ends_s
            self._flight.append((ends_s, self.now_s))
        self._flight.sort()
        ended_s, started_s = self._flight.pop(0)
        self.now_s, self.sent_s = max(self.now_s, ended_s), started_s
        return self.now_s - started_s

    def rest(self, seconds: float) -> None:
        """Do nothing for so long."""
        self._flight.clear()
        self.now_s += seconds
        self._free_s = [self.now_s] * self.lanes

    def run(self, window: Window, chunks: int) -> None:
        for _ in range(chunks):
            window.completed(MIB, self.next(window.bytes), self.now_s)

    def climb(self, climb: Climb, pieces: int, *, rest_each: int = 0) -> list[int]:
        """Return the bound in MiB after each piece."""
        bounds = []
        for number in range(pieces):
            self.next(climb.bytes)
            if rest_each and number % rest_each == 0:
                self.rest(2 * CLIMB_PAUSE_S)
                continue
            climb.completed(MIB, self.sent_s, self.now_s)
            bounds.append(climb.bytes // MIB)
        return bounds


def test_a_window_has_a_floor_and_a_ceiling() -> None:
    assert Window(MIB).bytes == 2 * MIB
    assert Window(MIB, max_bytes=1).bytes == MIB
    window = Window(MIB)
    for step in range(1000):
        window.completed(MIB, 0.001, step / 1000)
    assert window.bytes == WINDOW_MAX_BYTES


def test_the_latency_is_the_last_rounds() -> None:
    window = Window(MIB)
    for latency_s in (0.001, 0.002, 0.003):
        window.completed(MIB, latency_s, 1.0)
        assert window.latency_s == float("inf")
    window.completed(MIB, 0.002, 1.0)
    assert window.latency_s == pytest.approx(0.002)


@pytest.mark.parametrize("lanes", [1, 4, 16, 32])
def test_the_window_keeps_every_lane_busy_and_the_queue_short(lanes: int) -> None:
    window = Window(MIB)
    storage = Storage(lanes, 0.01)
    storage.run(window, 4000)
    started_s = storage.now_s
    storage.run(window, 1000)
    assert 1000 * 0.01 / lanes / (storage.now_s - started_s) > 0.9  # of what it can do
    assert window.bytes <= (2 * lanes + 8) * MIB


def test_the_window_shrinks_when_storage_slows_down() -> None:
    window = Window(MIB)
    storage = Storage(16, 0.01)
    storage.run(window, 2000)
    wide = window.bytes
    storage.lanes = 1
    storage._free_s = [storage.now_s]
    storage.run(window, 400)
    assert window.bytes < wide / 2


# -- the climb


@pytest.mark.parametrize("lanes", [1, 3, 6, 16, 40])
def test_as_little_is_in_flight_as_moves_as_much(lanes: int) -> None:
    climb, server = Climb(MIB, 16 * MIB), Storage(lanes, 0.01)
    assert climb.bytes == 2 * MIB
    server.climb(climb, 6000)
    started_s = server.now_s
    bounds = server.climb(climb, 4000)
    useful = min(lanes, 16)
    assert 4000 / (server.now_s - started_s) > 0.85 * useful / 0.01
    assert sum(bounds) / len(bounds) < useful + 1
    assert min(bounds) >= 1
    assert max(bounds) <= 16


def test_what_is_in_flight_shrinks_when_the_server_slows_down_and_grows_again() -> None:
    climb, server = Climb(MIB, 16 * MIB), Storage(16, 0.01)
    server.climb(climb, 3000)
    server.lanes, server._free_s = 1, [server.now_s]
    bounds = server.climb(climb, 12_000)
    assert bounds[0] > 8
    assert bounds[-1] <= 3
    server.lanes, server._free_s = 16, [server.now_s] * 16
    assert max(server.climb(climb, 12_000)) > 8


def test_a_round_lasts_until_its_own_bound_is_measured() -> None:
    """Of the first ones half a bound is still what the bound before it let through."""
    climb, server = Climb(MIB, 16 * MIB), Storage(40, 0.01)
    bounds = server.climb(climb, 100)
    changes = [at for at in range(1, 100) if bounds[at] != bounds[at - 1]]
    assert [bounds[at] for at in changes] == [4, 8, 16]
    assert [b - a for a, b in itertools.pairwise(changes)] == [16, 16]
    wide = Climb(MIB, 200 * MIB)
    server = Storage(400, 0.01)
    bounds = server.climb(wide, 1000)
    changes = [at for at in range(1, 1000) if bounds[at] != bounds[at - 1]]
    assert [b - a for a, b in itertools.pairwise(changes)] == [16, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("lanes", [3, 6])
def test_trials_are_few_once_neither_way_helps(lanes: int) -> None:
    """They cost latency or rate."""
    climb, server = Climb(MIB, 16 * MIB), Storage(lanes, 0.01)
    server.climb(climb, 6000)
    bounds = server.climb(climb, 6000)
    usual = max(bounds, key=bounds.count)
    assert bounds.count(usual) > 0.7 * len(bounds)


def test_a_pause_is_no_slow_round() -> None:
    climb, server = Climb(MIB, 16 * MIB), Storage(16, 0.01)
    assert set(server.climb(climb, 2000, rest_each=15)) == {2}, "no round came to its end"
    assert max(server.climb(climb, 2000, rest_each=70)) > 8


def test_a_trial_that_cannot_be_measured_is_given_up() -> None:
    climb, server = Climb(MIB, 16 * MIB), Storage(6, 0.01)
    server.climb(climb, 3000)
    bounds = server.climb(climb, 2000)
    usual = max(bounds, key=bounds.count)
    while climb.bytes == usual * MIB:
        server.climb(climb, 1)
    climb.restart()
    assert climb.bytes == usual * MIB


def test_what_others_bound_is_not_widened_for() -> None:
    """A caller that has three at a time moves no more by more room, and no less by four."""
    climb, server = Climb(MIB, 16 * MIB), Storage(16, 0.01)
    for _ in range(6000):
        server.next(min(climb.bytes, 3 * MIB))
        climb.completed(MIB, server.sent_s, server.now_s)
    bounds = []
    for _ in range(2000):
        server.next(min(climb.bytes, 3 * MIB))
        climb.completed(MIB, server.sent_s, server.now_s)
        bounds.append(climb.bytes // MIB)
    assert max(bounds, key=bounds.count) == 3


@pytest.mark.parametrize("chunk_s", [0.3, 2.0])
def test_answers_that_are_far_away_are_no_pauses(chunk_s: float) -> None:
    climb, server = Climb(MIB, 16 * MIB), Storage(16, chunk_s)
    assert max(server.climb(climb, 500)) == 16


def test_four_at_a_time_are_found_from_one() -> None:
    """Three bring nothing where a caller waits for four before it asks for the next four."""
    climb, now_s = Climb(MIB, 16 * MIB), 0.0

    def four(latency_s: float) -> None:
        nonlocal now_s
        left = 4
        while left:
            sent_s, now_s = now_s, now_s + latency_s
            for _ in range(min(left, climb.bytes // MIB)):
                climb.completed(MIB, sent_s, now_s)
                left -= 1

    while climb.bytes > MIB:
        four(0.01 * (climb.bytes // MIB))  # one after another: more gains nothing
    bounds = []
    for _ in range(1000):
        four(0.01)
        bounds.append(climb.bytes // MIB)
    assert max(bounds[500:], key=bounds.count) == 4


def test_a_first_trial_that_chance_spoils_is_measured_for_longer() -> None:
    """Sixteen pieces among which the server is busy otherwise for a while say little."""
    climb, server = Climb(MIB, 16 * MIB), Storage(40, 0.01)
    server.climb(climb, 17)
    assert climb.bytes == 4 * MIB
    server.now_s += 0.05
    bounds = server.climb(climb, 200)
    assert 2 not in bounds
    assert bounds[-1] == 16


# -- rates and predictions


def test_rates_need_two_samples_and_then_follow() -> None:
    rates = Rates()
    assert (rates.copy, rates.dirty) == (0.0, 0.0)
    rates.sample(0, 0, 0.0)
    rates.sample(5, 5, 0.01)  # too soon: counted with the next
    assert (rates.copy, rates.dirty) == (0.0, 0.0)
    rates.sample(100, 50, 1.0)
    assert (rates.copy, rates.dirty) == (100.0, 50.0)
    rates.sample(100, 50, 4.0)  # one half-life of silence
    assert rates.copy == pytest.approx(50.0)
    assert rates.dirty == pytest.approx(25.0)


@given(st.lists(st.floats(0.1, 5), min_size=5, max_size=60), st.integers(1, 10**6))
def test_a_steady_rate_is_shown_as_it_is(steps: list[float], rate: int) -> None:
    rates = Rates()
    now_s = 0.0
    rates.sample(0, 0, now_s)
    for step in steps:
        now_s += step
        rates.sample(round(now_s * rate), 0, now_s)
    assert rates.copy == pytest.approx(rate, rel=0.01, abs=11)


def test_the_time_left_is_true_or_not_given() -> None:
    assert eta(0, 0.0, 0.0) == 0.0
    assert eta(100, 10.0, 0.0) == 10.0
    assert eta(100, 10.0, 5.0) == 20.0
    assert eta(100, 10.0, 10.0) is None
    assert eta(100, 50.0, 0.0, 10) == 10.0
    assert eta(100, 10.0, 0.0, 50) == 10.0
    assert eta(100, 0.0, 0.0) is None


@pytest.mark.parametrize(
    ("remaining", "copy_rate", "dirty_rate", "pays", "why"),
    [
        (10 * GIB, 100 * MIB, 10 * MIB, True,
         "a pass over 10 GiB at 100 MiB/s would take 1 min 42 s and leave 1 GiB, "
         "as the guest dirties 10 MiB/s"),
        (10 * GIB, 100 * MIB, 90 * MIB, False, "too much to pay"),
        (10 * GIB, 100 * MIB, 0, True, "leave 0 B"),
        (50 * MIB, 100 * MIB, 0, False, "would take 500 ms, no longer than mirroring will"),
        (10 * GIB, 0, 0, False, "10 GiB are left and nothing is being copied"),
    ],
)  # fmt: skip
def test_a_pass_must_pay(
    remaining: int, copy_rate: float, dirty_rate: float, pays: bool, why: str
) -> None:
    decided, told = pass_pays(remaining, copy_rate, dirty_rate)
    assert decided == pays
    assert why in told


@given(st.integers(0, 1 << 50), st.floats(1, 1e12), st.floats(0, 1e12))
def test_passes_that_pay_come_to_an_end(
    remaining: int, copy_rate: float, dirty_rate: float
) -> None:
    for _ in range(200):
        pays, _ = pass_pays(remaining, copy_rate, dirty_rate)
        if not pays:
            return
        remaining = int(remaining / copy_rate * dirty_rate)
    pytest.fail("passes for ever")
