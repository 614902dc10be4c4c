"""A result in words: the table on the terminal, with ratios, targets and doubts. Pure."""

from __future__ import annotations

import math
from statistics import median

from bench import machine
from bench.model import ratio_of, spread
from bench.runner import WIDE_SPREAD, Result, figures_of

NEVER = "never"
COLUMNS_MAX = 160  # of a table: what a wide terminal shows


def number(value: float | None) -> str:
    """Return a figure with as many digits as mean something; 'never' for one without an end."""
    if value is None or math.isinf(value):
        return NEVER
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"


def table(result: Result) -> str:
    """Return everything a reader needs to judge a result, as text of several lines."""
    lines = [
        f"{result['scenario']}: {result['title']}",
        f"({result['unit']}; median of {result['rounds']}, least to most; ~ has a wide spread)",
        *_figures(result),
    ]
    lines += [f"without {peer}: {why}" for peer, why in result["missing"].items()]
    lines += [f"left out: {note}" for note in result["notes"]]
    lines += [_target(outcome) for outcome in result["targets"]]
    lines += ["versions: " + "; ".join(f"{p}: {v}" for p, v in result["versions"].items())]
    lines.append(
        f"{machine.in_words(result['machine'])}, disks on {result['on']}, "
        f"load {result['load']:.2f} before, commit {result['commit']}, "
        f"it took {result['took_s']:.0f} s"
    )
    if result["busy"]:
        lines.append("the machine was busy: read the ratios, not the figures")
    if result["quick"]:
        lines.append("quick: tiny sizes and one round, which say that it works and nothing else")
    return "\n".join(lines)


def _figures(result: Result) -> list[str]:
    """Return the figures with the ratios beside them, or below where that is too wide."""
    rows = _cells(result)
    lines = _grid(rows)
    if max(map(len, lines)) <= COLUMNS_MAX:
        return lines
    first_ratio = 1 + len(result["peers"])
    figures = [row[:first_ratio] for row in rows]
    ratios = [row[:1] + row[first_ratio:] for row in rows]
    return [*_grid(figures), "", f"{result['peers'][0]}:", *_grid(ratios)]


def _cells(result: Result) -> list[list[str]]:
    peers = result["peers"]
    rows = [["", *peers, *(f"/ {peer}" for peer in peers[1:])]]
    for row, by_peer in figures_of(result).items():
        cells = [row]
        cells += [_figure(by_peer[peer]) if peer in by_peer else "" for peer in peers]
        for peer in peers[1:]:
            both = peers[0] in by_peer and peer in by_peer
            cells.append(_ratio(by_peer[peers[0]], by_peer[peer]) if both else "")
        rows.append(cells)
    return rows


def _figure(values: list[float]) -> str:
    if len(values) == 1:
        return number(values[0])
    doubt = "~" if spread(values) > WIDE_SPREAD else ""
    return f"{doubt}{number(median(values))} ({number(min(values))}-{number(max(values))})"


def _ratio(one: list[float], other: list[float]) -> str:
    return number(ratio_of(median(one), median(other)))


def _grid(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _target(outcome: Result) -> str:
    word = "reached" if outcome["reached"] else "missed"
    beside = f" of {outcome['peer']}" if outcome["peer"] else ""
    return (
        f"{word}: {outcome['row']}, {outcome['subject']}: "
        f"{number(outcome['ratio'])}{beside}, wanted {outcome['wanted']}"
    )
