"""Whether one series of figures is better than another, or only looks so. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.model import ratio_of

SAMPLES = 2000  # of the bootstrap: the interval's ends are steady to a percent
ROUNDS_MIN = 3  # with fewer there is no spread to speak of
CONFIDENCE = 0.95
SEED = 1


@dataclass(frozen=True)
class Verdict:
    """The ratio of medians, after by before, and the interval in which it lies."""

    word: str  # faster, slower, no difference beyond the spread, too few rounds, both never end
    ratio: float
    low: float
    high: float


def judge(before: Sequence[float], after: Sequence[float], *, less_is_better: bool) -> Verdict:
    """Compare two series by a bootstrap of the ratio of their medians.

    The same figures give the same verdict: the seed is fixed. A difference counts when the whole
    interval lies on one side of 1. What never ends (infinite) is slower than what does.

    Raises:
        ValueError: A series is empty or has a figure that isn't above zero.
    """
    if not before or not after or min(*before, *after, 1) <= 0:
        raise ValueError("only figures above zero can be compared")
    if math.isinf(median(before)) and math.isinf(median(after)):
        return Verdict("both never end", 1.0, 0.0, math.inf)
    ratio = median(after) / median(before)
    if len(before) < ROUNDS_MIN or len(after) < ROUNDS_MIN:
        return Verdict("too few rounds", ratio, 0.0, math.inf)
    chance = random.Random(SEED)
    ratios = sorted(
        ratio_of(
            median(chance.choices(after, k=len(after))),
            median(chance.choices(before, k=len(before))),
        )
        for _ in range(SAMPLES)
    )
    outside = int(SAMPLES * (1 - CONFIDENCE) / 2)
    low, high = ratios[outside], ratios[-1 - outside]
    if low <= 1 <= high:
        return Verdict("no difference beyond the spread", ratio, low, high)
    better = high < 1 if less_is_better else low > 1
    return Verdict("faster" if better else "slower", ratio, low, high)
