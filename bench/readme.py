"""Write the README's section "Performance" from kept results: the same results, the same text."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import machine
from bench.report import number
from bench.runner import NotAResultError, Result, read

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(
    r"(<!-- performance: [^\n]*-->\n).*?(<!-- end of performance -->)", re.S
)  # fmt: skip
NOTHING = "Nothing was measured yet.\n"


def write(results: Path) -> None:
    """Replace what is between the README's marks."""
    kept = []
    for path in sorted(results.glob("*.json")):
        try:
            kept.append(read(path))
        except NotAResultError as error:
            print(f"left out: {error}", file=sys.stderr)
    README.write_text(with_section(README.read_text(), kept))


def with_section(text: str, results: Sequence[Result]) -> str:
    """Return the README's text with the section as the results have it.

    Smoke tests don't count. The order of results doesn't matter, and doing it again changes
    nothing.
    """
    if not BLOCK.search(text):
        raise ValueError("README.md has lost its marks")
    return BLOCK.sub(lambda found: f"{found[1]}{section(results)}{found[2]}", text)


def section(results: Sequence[Result]) -> str:
    """Return a table with a line for each row that has a target: the one it is furthest from."""
    counted = sorted((r for r in results if not r["quick"]), key=lambda r: r["scenario"])
    lines = [_line(result, outcome) for result in counted for outcome in _strictest(result)]
    if not lines:
        return NOTHING
    machines = sorted({machine.in_words(result["machine"]) for result in counted})
    versions = sorted({told for result in counted for told in result["versions"].values()})
    head = [
        "| what | mirrord | best peer | ratio | target | reached? |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    tail = ["", *(f"Measured on {words}." for words in machines)]
    tail += [f"Versions: {'; '.join(versions)}."] if versions else []
    busy = [result["scenario"] for result in counted if result["busy"]]
    tail += [f"On a busy machine, so only the ratios count: {', '.join(busy)}."] if busy else []
    return "\n".join([*head, *lines, *tail]) + "\n"


def _strictest(result: Result) -> list[Result]:
    """Return one outcome a row and subject: the one with the least margin."""
    found: dict[tuple[str, str], Result] = {}
    for outcome in result["targets"]:
        key = outcome["row"], outcome["subject"]
        if key not in found or _margin(outcome) < _margin(found[key]):
            found[key] = outcome
    return list(found.values())


def _margin(outcome: Result) -> float:
    ratio = outcome["ratio"]
    if ratio is None:
        return float("-inf") if outcome["least"] is None else float("inf")
    if outcome["least"] is not None:
        return float(ratio / outcome["least"])
    return float(outcome["most"] / ratio) if ratio else float("inf")


def _line(result: Result, outcome: Result) -> str:
    subject = outcome["subject"]
    which = "" if subject == "mirrord" else f", {subject}"
    peer = "" if outcome["peer"] is None else f"{number(outcome['peer_figure'])}, {outcome['peer']}"
    ratio = "" if outcome["peer"] is None else number(outcome["ratio"])
    cells = [
        f"{result['scenario']}: {outcome['row']}{which}",
        number(outcome["figure"]),
        peer,
        ratio,
        outcome["wanted"],
        "yes" if outcome["reached"] else "no",
    ]
    return "| " + " | ".join(cells) + " |"
