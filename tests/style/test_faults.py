"""Every fault of the table in tests/README.md is shown by a real test that bears its number."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.style.sources import ROOT, parse, python_files

ROW = re.compile(r"^\| (\d+) \| .+ \| .+ \|$", re.M)
NUMBERS = [int(number) for number in ROW.findall((ROOT / "tests" / "README.md").read_text())]
# Between two hosts: there is no such move.
LATER = {29}
OUT_OF_THE_RUN = re.compile(r"mark\.(skip|xfail)\b")

Test = ast.FunctionDef | ast.AsyncFunctionDef


def numbers_of(decorators: list[ast.expr]) -> set[int]:
    """Return the numbers of `pytest.mark.fault(…)` among these."""
    return {
        argument.value
        for call in decorators
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault"
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int)
    }


def marked(path: Path) -> Iterator[tuple[Test, set[int]]]:
    """Yield each test of a module with its numbers: its own, and the module's."""
    module = parse(path)
    everywhere: set[int] = set()
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            everywhere |= numbers_of([node.value])
    for node in ast.walk(module):
        if isinstance(node, Test) and node.name.startswith("test_"):
            yield node, everywhere | numbers_of(node.decorator_list)


def is_real(test: Test) -> bool:
    """Tell whether a test is run and does something beside its docstring."""
    decorators = " ".join(map(ast.unparse, test.decorator_list))
    does = [node for node in ast.walk(test) if isinstance(node, ast.Call | ast.Assert)]
    return not OUT_OF_THE_RUN.search(decorators) and len(does) > len(test.decorator_list)


SHOWN = {
    number
    for path in python_files("tests")
    for test, numbers in marked(path)
    if is_real(test)
    for number in numbers
}


def test_the_table_has_every_fault() -> None:
    assert set(range(1, 31)) - LATER == set(NUMBERS)
    assert len(NUMBERS) == len(set(NUMBERS))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_fault_is_shown_by_a_test(number: int) -> None:
    assert number in SHOWN


def test_no_test_shows_a_fault_that_is_not_in_the_table() -> None:
    assert set(NUMBERS) >= SHOWN


def test_what_is_no_test_does_not_count() -> None:
    source = (
        '@pytest.mark.fault(1)\n@pytest.mark.skip\ndef test_x():\n    """Say."""\n    assert f()'
    )
    (skipped,) = ast.parse(source).body
    empty = ast.parse('@pytest.mark.fault(1)\ndef test_x():\n    """Say."""').body[0]
    assert isinstance(skipped, Test)
    assert isinstance(empty, Test)
    assert numbers_of(skipped.decorator_list) == {1}
    assert not is_real(skipped)
    assert not is_real(empty)
