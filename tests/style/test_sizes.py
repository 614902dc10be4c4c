"""Small files with a reason on top, small functions, short lines."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.style.sources import parse, python_files, show

MODULE_LINES_MAX = 500  # aim at 250
FUNCTION_LINES_MAX = 70  # aim at 25: what one screen holds
LINE_COLUMNS_MAX = 100

EVERY = [p for folder in ("mirrord", "tests", "bench", "tools") for p in python_files(folder)]
CODE = [p for p in EVERY if p.stat().st_size]


@pytest.mark.parametrize("path", CODE, ids=show)
def test_module_is_small_and_says_why_it_is_there(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MODULE_LINES_MAX, f"{len(lines)} lines"
    too_long = [n for n, line in enumerate(lines, 1) if len(line) > LINE_COLUMNS_MAX]
    assert not too_long, f"lines over {LINE_COLUMNS_MAX} columns: {too_long}"
    assert ast.get_docstring(parse(path)), "no reason on top"


@pytest.mark.parametrize("path", CODE, ids=show)
def test_functions_are_small(path: Path) -> None:
    functions = [
        node
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    wrong = {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES_MAX}
    assert not wrong, f"functions over {FUNCTION_LINES_MAX} lines: {wrong}"


@pytest.mark.parametrize("path", [p for p in CODE if "mirrord" in p.parts], ids=show)
def test_what_others_call_has_a_docstring(path: Path) -> None:
    if path not in python_files("mirrord"):
        return
    missing = [
        node.name
        for scope in [parse(path), *(n for n in parse(path).body if isinstance(n, ast.ClassDef))]
        for node in scope.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and not _is_explained_elsewhere(scope, node)
        and not _is_a_name_for_a_value(node)
    ]
    assert not missing, f"no docstring: {missing}"


def _is_explained_elsewhere(scope: ast.AST, node: ast.AST) -> bool:
    """Tell whether a method only fulfils an interface, whose docstring holds."""
    return isinstance(scope, ast.ClassDef) and bool(scope.bases or scope.decorator_list)


def _is_a_name_for_a_value(node: ast.AST) -> bool:
    """Tell whether it is a property or an enumeration: its name and values say what it is."""
    if isinstance(node, ast.ClassDef):
        return any("Enum" in ast.unparse(base) for base in node.bases)
    return any(ast.unparse(one) == "property" for one in getattr(node, "decorator_list", []))
