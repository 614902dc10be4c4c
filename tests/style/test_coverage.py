"""Core and wire modules are covered to the last branch, each by its own test files.

"Its own": `core/bitmap.py` by `tests/core/test_bitmap*.py`. What other tests happen to pass
through proves nothing about a module's edges. What is run when a module is imported counts.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import coverage
import pytest

from tests.style.sources import ROOT, python_files, show

FOLDERS = ["core", "nbd", "smb"]
# Of one run: on two slow cores beside other tests.
RUN_S_MAX = 400.0


def modules(folder: str) -> list[Path]:
    """Return the modules of a folder."""
    files = python_files(f"mirrord/{folder}")
    return [path for path in files if path.name != "__init__.py"]


def own_tests(module: Path) -> list[Path]:
    """Return the test files of one module."""
    folder = ROOT / "tests" / module.parent.name
    return sorted(folder.glob(f"test_{module.stem}.py")) + sorted(
        folder.glob(f"test_{module.stem}_*.py")
    )


def by_own_tests(module: Path, data: Path) -> tuple[float, str]:
    """Return the per cent of a module that its own tests cover, and which lines they don't."""
    told = io.StringIO()
    measured = coverage.Coverage(data_file=str(data), branch=True, config_file=False)
    measured.load()
    contexts = ["^$", *(f"^{re.escape(path.name)}$" for path in own_tests(module))]
    covered = measured.report(
        include=[str(module)], contexts=contexts, show_missing=True, file=told
    )
    return covered, told.getvalue()


@pytest.mark.timeout(RUN_S_MAX + 20)
@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_are_covered_by_their_own_tests(folder: str, tmp_path: Path) -> None:
    tests: list[Path] = []
    for module in modules(folder):
        own = own_tests(module)
        assert own, f"{show(module)} has no test_{module.stem}.py"
        tests += own
    data = tmp_path / "coverage"
    environment = {**os.environ, "COVERAGE_FILE": str(data)}
    for name in ("COVERAGE_PROCESS_START", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    ran = subprocess.run(
        [sys.executable, "-m", "coverage", "run", "--branch", f"--include=mirrord/{folder}/*",
         "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-p", "tests.style.contexts", *map(str, tests)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_S_MAX,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    found = {show(module): by_own_tests(module, data) for module in modules(folder)}
    assert not [told for covered, told in found.values() if covered < 100]
