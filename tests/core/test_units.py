"""Sizes, rates, durations and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrord.core.units import (
    SIZE_MAX_BYTES,
    check_name,
    format_bytes,
    format_duration,
    format_rate,
    parse_rate,
    parse_size,
)
from mirrord.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("1k", 1024),
        ("100M", 100 << 20),
        ("1.5GiB", 3 << 29),
        (" 2 tb ", 2 * 10**12),
        ("3kB", 3000),
        ("1.3K", 1331),
        ("4P", 4 << 50),
        ("9223372036854775807", SIZE_MAX_BYTES),
    ],
)
def test_sizes_are_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a size"),
        ("M", "is not a size"),
        ("-1", "is not a size"),
        ("+1", "is not a size"),
        ("1e3", "is not a size"),
        ("1 000", "is not a size"),
        ("1.M", "is not a size"),
        ("10X", "is not a size"),
        ("1Ki", "is not a size"),
        ("1M/s", "is not a size"),
        ("nan", "is not a size"),
        ("٣", "is not a size"),
        ("1.5", "whole number of bytes"),
        ("0.0001K", "less than one byte"),
        ("9223372036854775808", "more than any disk"),
        ("99999P", "more than any disk"),
        ("9" * 1000, "is not a size"),
    ],
)
def test_other_texts_are_wrong_usage(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100M", 100 << 20), ("1.5GiB/s", 3 << 29), ("10 MB/S", 10**7), ("0", 0), (" None ", 0)],
)
def test_rates_are_understood(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["fast", "10M/h", "-5M", "/s", "", "1.5"])
def test_other_rates_are_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="is not a rate"):
        parse_rate(text)


@pytest.mark.parametrize("name", ["a", "0", "vm-1.root_disk", "A" * 64])
def test_names_of_disks(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-x", "_x", "a/b", "a b", "a\n", "ä", "..", "A" * 65, "a\0"]
)
def test_what_is_not_a_name_of_a_disk(name: str) -> None:
    with pytest.raises(UsageError, match="is not a disk name"):
        check_name(name)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1126, "1.1 KiB"),
        (102400, "100 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        (1000 * 1024, "0.98 MiB"),
        (20 << 30, "20 GiB"),
        (1 << 40, "1 TiB"),
        (1 << 62, "4096 PiB"),
        (-2048, "-2 KiB"),
        (12.5, "12 B"),
    ],
)
def test_sizes_are_short_to_read(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, SIZE_MAX_BYTES - SIZE_MAX_BYTES // 100))  # what is shown may be rounded up
def test_a_size_is_read_back_nearly(size: int) -> None:
    assert abs(parse_size(format_bytes(size)) - size) <= size / 100


def test_a_rate_is_a_size_a_second() -> None:
    assert format_rate(100 << 20) == "100 MiB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.00012, "0.12 ms"),
        (0.85, "850 ms"),
        (0.9996, "1.0 s"),
        (4.25, "4.2 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (75, "1 min 15 s"),
        (3600, "1 h"),
        (7800, "2 h 10 min"),
        (86399.9, "1 d"),
        (270000, "3 d 3 h"),
        (-5, "-5.0 s"),
    ],
)
def test_durations_are_short_to_read(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
