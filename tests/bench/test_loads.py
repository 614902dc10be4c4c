"""Quantiles by nearest rank, and requests of a while."""

from __future__ import annotations

import pytest

from bench.loads import between, quantile_ms


@pytest.mark.parametrize(
    ("count", "share", "rank"),
    [(100, 0.99, 99), (100, 1, 100), (100, 0.5, 50), (50, 0.99, 50), (1000, 0.999, 999), (1, 0, 1)],
)
def test_quantile(count: int, share: float, rank: int) -> None:
    assert quantile_ms([n / 1000 for n in range(count, 0, -1)], share) == pytest.approx(rank)


def test_only_answers_of_the_while_count() -> None:
    assert between([(1.0, 0.1, 0), (2.0, 0.2, 1), (3.0, 0.3, 0)], 1.5, 2.5) == [0.2]
