"""What differs between the Pythons that mirrord runs on, and must not matter."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.style.sources import parse, python_files, show

CODE = python_files("mirrord")


@pytest.mark.parametrize("path", CODE, ids=show)
def test_nothing_is_raised_inside_except_star(path: Path) -> None:
    """Python 3.11.2, Debian 12's, wraps it into one more group; later ones don't.

    A bare `raise` only puts the rest of the group back, everywhere.
    """
    wrong = [
        inner.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.TryStar)
        for handler in node.handlers
        for inner in ast.walk(handler)
        if isinstance(inner, ast.Raise) and inner.exc is not None
    ]
    assert not wrong, f"raises inside `except*` in lines {wrong}"
