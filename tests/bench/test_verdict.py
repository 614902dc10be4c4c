"""A difference counts when it is beyond the spread."""

from __future__ import annotations

from math import inf

import pytest

from bench.verdict import judge

STEADY = [100.0, 101.0, 99.0, 100.5, 99.5]
WIDE = [60.0, 140.0, 100.0, 80.0, 120.0]


def times(series: list[float], factor: float) -> list[float]:
    return [value * factor for value in series]


@pytest.mark.parametrize(
    ("before", "after", "less", "word"),
    [
        (STEADY, times(STEADY, 1.2), False, "faster"),
        (STEADY, times(STEADY, 1.2), True, "slower"),
        (STEADY, times(STEADY, 0.8), False, "slower"),
        (STEADY, times(STEADY, 0.8), True, "faster"),
        (STEADY, STEADY, False, "no difference beyond the spread"),
        (WIDE, times(WIDE, 1.2), False, "no difference beyond the spread"),
        (STEADY, [200.0, 200.0], False, "too few rounds"),
        ([1.0], [2.0], True, "too few rounds"),
        ([inf] * 3, [inf] * 3, True, "both never end"),
        (STEADY, [inf] * 5, True, "slower"),
        ([inf] * 5, STEADY, True, "faster"),
    ],
)
def test_verdict(before: list[float], after: list[float], less: bool, word: str) -> None:
    assert judge(before, after, less_is_better=less).word == word


def test_the_same_figures_have_the_same_interval_around_their_ratio() -> None:
    first = judge(STEADY, times(WIDE, 1.5), less_is_better=False)
    assert first == judge(STEADY, times(WIDE, 1.5), less_is_better=False)
    assert first.low <= first.ratio <= first.high
    assert first.ratio == 1.5


@pytest.mark.parametrize(("before", "after"), [([], STEADY), (STEADY, []), (STEADY, [0.0] * 5)])
def test_what_has_no_ratio_is_refused(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="above zero"):
        judge(before, after, less_is_better=False)
