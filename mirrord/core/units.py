"""Sizes, rates, durations and names as people write and read them. Pure.

K, M, G, T and P are powers of 1024, as in qemu-img, dd and truncate; KiB, MiB … say the same; KB,
MB … are powers of 1000. Upper and lower case don't matter. A rate is a size a second, "/s" or
not; 0 (or "none") means no limit everywhere.
"""

from __future__ import annotations

import re
from fractions import Fraction

from mirrord.errors import UsageError

SIZE_MAX_BYTES = (1 << 63) - 1  # what an off_t holds
NAME_LENGTH_MAX = 64  # leaves room for the prefixes and suffixes of file names made of it (255)

_PREFIXES = "KMGTP"
_NUMBER = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?) ?(?:([KMGTP])(IB|B)?|B)?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes that `text` names: "4096", "100M", "1.5GiB", "2 TB".

    A fraction of a byte is dropped, but never so that nothing remains.

    Raises: UsageError.
    """
    found = _NUMBER.fullmatch(text.strip().upper())
    if found is None:
        raise UsageError(
            f"{text!r} is not a size: write a number and a unit, such as 100M or 1.5GiB"
        )
    number, prefix, suffix = found.groups()
    base = 1000 if suffix == "B" else 1024
    exact = Fraction(number) * base ** (_PREFIXES.index(prefix) + 1 if prefix else 0)
    if prefix is None and exact.denominator != 1:
        raise UsageError(f"{text!r} is not a whole number of bytes")
    if exact > SIZE_MAX_BYTES:
        raise UsageError(f"{text!r} is more than any disk can hold")
    if 0 < exact < 1:
        raise UsageError(f"{text!r} is less than one byte")
    return int(exact)


def parse_rate(text: str) -> int:
    """Return the bytes a second that `text` names; 0 is no limit.

    Raises: UsageError.
    """
    stripped = text.strip()
    if stripped.lower() == "none":
        return 0
    try:
        return parse_size(stripped[:-2] if stripped.lower().endswith("/s") else stripped)
    except UsageError as error:
        raise UsageError(
            f"{text!r} is not a rate: write 100M, 1.5GiB/s, or 0 for no limit"
        ) from error


def check_name(name: str) -> str:
    """Return `name` if a disk may be called that.

    Raises: UsageError.
    """
    if len(name) > NAME_LENGTH_MAX or _NAME.fullmatch(name) is None:
        raise UsageError(
            f"{name!r} is not a disk name: up to {NAME_LENGTH_MAX} letters, digits, "
            "'.', '_' and '-', beginning with a letter or digit"
        )
    return name


def format_bytes(count: float) -> str:
    """Return "0 B", "1.5 KiB", "20 GiB": with three digits that matter."""
    if count < 0:
        return "-" + format_bytes(-count)
    if count < 1024:
        return f"{int(count)} B"
    value, unit = count / 1024, 0
    while value >= 1000 and unit < len(_PREFIXES) - 1:
        value, unit = value / 1024, unit + 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    number = f"{value:.{digits}f}"
    if digits:
        number = number.rstrip("0").rstrip(".")
    return f"{number} {_PREFIXES[unit]}iB"


def format_rate(bytes_s: float) -> str:
    """Return "100 MiB/s"."""
    return f"{format_bytes(bytes_s)}/s"


def format_duration(seconds: float) -> str:
    """Return "0.12 ms", "850 ms", "4.2 s", "3 min 5 s", "2 h 10 min", "3 d 4 h"."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 0.9995:
        ms = seconds * 1000
        return f"{ms:.2f} ms" if 0 < ms < 9.995 else f"{ms:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit_s, unit, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"),
                                       (60, "min", 1, "s")):  # fmt: skip
        if whole >= unit_s:
            rest = whole % unit_s // part_s
            return (
                f"{whole // unit_s} {unit} {rest} {part}" if rest else f"{whole // unit_s} {unit}"
            )
    return f"{whole} s"
