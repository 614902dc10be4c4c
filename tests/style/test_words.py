"""Words: one word a thing, nothing left undone in silence, nothing of one machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.style.sources import parse, project_files, python_files, show

TEXT = [
    p
    for p in project_files()
    if p.suffix in {".py", ".md", ".toml", ".service", ".socket", ".conf", ".svg", ""}
    and p != Path(__file__)
    and p.name != "LICENSE"
    and p.stat().st_size
]
CODE = python_files("mirrord")

UNDONE = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError")
MACHINE = re.compile(
    r"/(work|home|root|Users)/\w|/\.pyenv/|\bpypi\.org|\b(deb|security)\.debian\.org"
)

# Names of the glossary, and the words that would say the same thing another way.
NOT_OUR_WORDS = re.compile(
    r"\b(src|dst|dest|destination|switchover|downtime|scrub|changemap|cluster_size|image_path)\b"
)


@pytest.mark.parametrize("path", TEXT, ids=show)
def test_nothing_is_left_undone_or_tied_to_one_machine(path: Path) -> None:
    text = path.read_text()
    for wrong in (UNDONE, MACHINE):
        found = wrong.search(text)
        assert not found, f"line {text[: found.start()].count(chr(10)) + 1}: {found.group()!r}"


@pytest.mark.parametrize("path", CODE, ids=show)
def test_names_come_from_the_glossary(path: Path) -> None:
    names = {
        getattr(node, field)
        for node in ast.walk(parse(path))
        for field in ("id", "attr", "arg", "name")
        if isinstance(getattr(node, field, None), str)
    }
    wrong = {name for name in names if NOT_OUR_WORDS.search(name.replace("_", " "))}
    # what other programs call their own things can't be renamed
    wrong -= {"src_dir_fd", "dst_dir_fd"}
    assert not wrong, f"not in the glossary: {sorted(wrong)}"


SLEEPS = {"sleep", "usleep"}
POLLERS = {"helpers.py"}  # the one place that polls other processes


@pytest.mark.parametrize(
    "path", [p for p in python_files("tests") if p.name not in POLLERS], ids=show
)
def test_no_test_sleeps_in_order_to_wait(path: Path) -> None:
    wrong = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in SLEEPS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in {"time", "asyncio"}
        and not _is_a_pace(node)
    ]
    assert not wrong, f"sleeps in lines {wrong}"


def _is_a_pace(call: ast.Call) -> bool:
    """Tell whether it lets others run (0), or is a load's pace or a fault itself, so named."""
    (duration,) = call.args
    if isinstance(duration, ast.Constant):
        return not duration.value
    return ast.unparse(duration).endswith(("pause_s", "delay_s"))
