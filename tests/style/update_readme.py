#!/usr/bin/env python3
"""Write the diagram of phases into README.md, from the table that the program obeys.

Run it with the virtual environment's Python after a change of `mirrord/core/migration.py`;
a test compares.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- phases: [^\n]*-->\n```mermaid\n).*?(```\n<!-- end of phases -->)", re.S)


def with_phases(text: str) -> str:
    """Return the README's text with the diagram as the table has it now."""
    sys.path.insert(0, str(ROOT))
    from mirrord.core.migration import mermaid

    assert BLOCK.search(text), "README.md has lost its marks"
    return BLOCK.sub(lambda found: f"{found[1]}{mermaid()}\n{found[2]}", text)


if __name__ == "__main__":
    README.write_text(with_phases(README.read_text()))
