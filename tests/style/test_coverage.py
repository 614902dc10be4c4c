"""Core and wire modules are covered to the last branch, each by its own test file.

"Its own": `core/bitmap.py` by `tests/core/test_bitmap*.py`, run alone. What other tests happen
to pass through proves nothing about a module's edges.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.style.sources import ROOT, python_files, show

MODULES = [
    path
    for folder in ("mirrord/core", "mirrord/nbd", "mirrord/smb")
    for path in python_files(folder)
    if path.name != "__init__.py"
]


def own_tests(module: Path) -> list[Path]:
    """Return the test files of one module."""
    folder = ROOT / "tests" / module.parent.name
    return sorted(folder.glob(f"test_{module.stem}.py")) + sorted(
        folder.glob(f"test_{module.stem}_*.py")
    )


@pytest.mark.parametrize("module", MODULES, ids=show)
def test_a_module_is_covered_by_its_own_tests(module: Path, tmp_path: Path) -> None:
    tests = own_tests(module)
    assert tests, f"no tests/{module.parent.name}/test_{module.stem}.py"
    environment = {**os.environ, "COVERAGE_FILE": str(tmp_path / "coverage")}
    for name in ("COVERAGE_PROCESS_START", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    coverage = [sys.executable, "-m", "coverage"]
    ran = subprocess.run(
        [*coverage, "run", "--branch", f"--include={module}",
         "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, tests)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    report = subprocess.run(
        [*coverage, "report", "--show-missing", "--fail-under=100"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert report.returncode == 0, report.stdout + report.stderr
