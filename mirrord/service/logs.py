"""Log lines: `time level process verb key=value …` on standard error.

A reader that went away must not stop a disk: a line that can't be written is dropped.
"""

from __future__ import annotations

import logging
import sys


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        return


def set_up(process: str, level: str = "info") -> None:
    """Send this process's log lines to standard error, marked with `process`."""
    handler = _Lines(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s {process} %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def fields(**values: object) -> str:
    """Return `key=value …`; a value with blanks is quoted."""
    return " ".join(f"{key}={_quoted(str(value))}" for key, value in values.items())


def _quoted(text: str) -> str:
    if text and not any(c.isspace() or c in '"=' for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
