"""What the simulator changes in the product: numbers, and an eye on mapped memory.

The numbers are made small, since a simulated disk has a few hundred bytes. What the sizes are for
stays true: a chunk has several bits of the bitmap, a region several chunks or the other way
round, a journal record several words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mirrord.core import bitmap, journal, ranges
from mirrord.engine import request
from mirrord.storage import kept, steady
from tests.sim.world import World

NUMBERS = (
    (bitmap, "GRANULARITY_MIN_BYTES", 16),
    (journal, "CAPACITY_BYTES", 1 << 16),
    (journal, "BLOCK_BYTES", 512),
    (journal, "PAYLOAD_BYTES_MAX", 12_000),
    (journal, "RESERVED_BYTES", 4 * 12_288),
    (ranges, "BUCKET_SHIFT", 5),
    (ranges, "BUCKETS_MAX", 4),
    (kept, "SAMPLES_MAX", 16),
    (kept, "SAMPLE_BYTES_MAX", 32),
    (kept, "ZERO_PIECE_BYTES", 16),
    (kept, "_ZEROES", bytes(16)),
    (steady, "SAMPLES_MAX", 16),
    (steady, "SAMPLE_BYTES_MAX", 32),
    (steady, "EDGE_BYTES", 16),
    (steady, "NEWER_MAX", 12),
)


@contextmanager
def shrunk() -> Iterator[None]:
    """Use the small numbers while the context lasts."""
    before = [(module, name, getattr(module, name)) for module, name, _ in NUMBERS]
    for module, name, value in NUMBERS:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


# Every step that changes memory which survives a kill.
MEMORY = (
    (bitmap.DirtyBitmap, ("mark", "hold", "unmark", "put_back", "copied", "clear", "mark_all")),
    (request.Progress, ("save", "reset")),
)


@contextmanager
def watched(world: World) -> Iterator[None]:
    """Make each change of mapped memory a crash point, before it and after it."""
    before = [(owner, name, getattr(owner, name)) for owner, names in MEMORY for name in names]

    def watch(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def watched_method(*arguments: object, **options: object) -> object:
            world.point("memory", name, "before")
            result = method(*arguments, **options)
            world.point("memory", name, "after")
            return result

        return watched_method

    for owner, name, method in before:
        setattr(owner, name, watch(name, method))
    try:
        yield
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)
