"""The project's own files, as the style tests look at them."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mirrord"


@cache
def project_files() -> tuple[Path, ...]:
    """Return every file of the project that git knows or would add.

    Where git doesn't know the folder (an unpacked archive), every file that isn't hidden.
    """
    if not (ROOT / ".git").exists():
        relative = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
        return tuple(ROOT / p for p in relative if not _is_made_here(p))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True, timeout=30,
    ).stdout.decode()  # fmt: skip
    return tuple(ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file())


def _is_made_here(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts[:-1]) or any(
        part.endswith(".egg-info") for part in path.parts
    )


def python_files(folder: str) -> list[Path]:
    """Return the Python files below `folder`."""
    return [p for p in project_files() if p.suffix == ".py" and p.is_relative_to(ROOT / folder)]


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a Python file."""
    return ast.parse(path.read_text(), str(path))


def module_name(path: Path) -> str:
    """Return the dotted name of a module of the package."""
    words = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def imports(path: Path) -> set[str]:
    """Return the dotted names that a module imports, wherever in it, also for types only."""
    names: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names.add(module)
            # `from mirrord.core import bitmap` imports a module
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def show(path: Path) -> str:
    """Return a path as a message shows it."""
    return str(path.relative_to(ROOT))
