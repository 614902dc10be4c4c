"""The product's constants, made small: a simulated disk has a few hundred bytes.

Nothing but numbers is changed. What the sizes are for stays true: a chunk has several bits of
the bitmap, a region several chunks or the other way round, a journal record several sectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mirrord.core import bitmap, journal, ranges

NUMBERS = (
    (bitmap, "GRANULARITY_MIN_BYTES", 16),
    (journal, "CAPACITY_BYTES", 1 << 17),
    (journal, "BLOCK_BYTES", 512),
    (journal, "PAYLOAD_BYTES_MAX", 16_000),
    (journal, "RESERVED_BYTES", 4 * 16_384),
    (ranges, "BUCKET_SHIFT", 5),
    (ranges, "BUCKETS_MAX", 4),
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
