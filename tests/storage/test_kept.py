"""What is repeated after a server's restart: the last change of each byte, and nothing else."""

from __future__ import annotations

import random

import pytest

from mirrord.storage.kept import Change, latest

SIZE = 64


@pytest.mark.parametrize("seed", range(200))
def test_what_is_left_is_the_same_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    expected, found = bytearray(SIZE), bytearray(SIZE)
    changes = []
    for _ in range(rng.randrange(9)):
        offset = rng.randrange(SIZE)
        length = rng.randrange(1, SIZE + 1 - offset)
        data = rng.choice((None, rng.randbytes(length)))
        changes.append(Change(offset, length, data, fua=False))
        changes[-1].again = rng.random() < 0.9  # else the server has said no
        if changes[-1].again:
            expected[offset : offset + length] = data or bytes(length)
    left = latest(changes)
    rng.shuffle(left)
    touched: set[int] = set()
    for change in left:
        these = set(range(change.offset, change.offset + change.length))
        assert these
        assert not these & touched
        touched |= these
        found[change.offset : change.offset + change.length] = change.data or bytes(change.length)
    assert found == expected


def test_a_change_that_nothing_covers_is_left_as_it_is() -> None:
    change = Change(8, 8, b"12345678", fua=True)
    assert latest([Change(8, 4, b"abcd", fua=False), change]) == [change]
