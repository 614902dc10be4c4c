"""What the README says is so: its diagram, its table of commands, its exit codes, its links."""

from __future__ import annotations

import itertools
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from mirrord import errors
from tests.style.sources import ROOT

README = (ROOT / "README.md").read_text()
LATER = {"plan"}  # of the contract, not built yet


def command_rows() -> list[str]:
    """Return the first cells of the README's table of commands."""
    return [
        cell.replace("\\|", "|") for cell in re.findall(r"^\| `(mirrord [^`]*)` \|", README, re.M)
    ]


@cache
def help_of(*words: str) -> str:
    """Return what `mirrord WORDS --help` prints, on a wide terminal without colours."""
    return subprocess.run(
        [str(Path(sys.executable).parent / "mirrord"), *words, "--help"],
        capture_output=True, text=True, check=True, timeout=30,
        env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1", "PATH": "/usr/bin"},
    ).stdout  # fmt: skip


def test_the_diagram_is_the_table() -> None:
    tool = runpy.run_path(str(ROOT / "tests" / "style" / "update_readme.py"))
    assert tool["with_phases"](README) == README, "run tests/style/update_readme.py"


@pytest.mark.parametrize("row", command_rows(), ids=lambda row: str(row).split()[1])
def test_a_command_has_the_options_that_its_row_shows(row: str) -> None:
    words = itertools.takewhile(re.compile("[a-z]+").fullmatch, row.split()[1:])
    printed = help_of(*words)
    for option in re.findall(r"--[a-z-]+", row):
        assert option in printed, f"{row}: no {option}"
    for values in re.findall(r"--[a-z-]+ ([a-z|]+)\]", row):
        for value in values.split("|"):
            assert value in printed, f"{row}: no value {value}"


def test_every_command_has_a_row() -> None:
    rows = {row.split()[1] for row in command_rows()}
    shown = set(re.findall(r"^\W*([a-z]+)  ", help_of().split("Commands", 1)[1], re.M))
    assert rows == shown - LATER


def test_exit_codes_are_those_of_the_errors() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.M)}
    raised = {
        cls.exit_code
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.MirrordError)
    }
    assert raised <= codes


def test_paths_that_the_readme_names_exist() -> None:
    named = re.findall(r"`((?:tests|tools|systemd|mirrord|bench)/[\w./-]+)`", README)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path
