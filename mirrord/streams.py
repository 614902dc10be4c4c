"""Standard streams as a program finds them: closed, full, or read by nobody any more."""

from __future__ import annotations

import os
import sys


def open_missing() -> None:
    """Open what was closed when the program was started.

    Else the next file or socket gets its number, and a child writes its output there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def output_failure() -> OSError | None:
    """Return why standard output can't be written, if that is so; else an empty line is."""
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as error:
        return error
    return None


def discard_output() -> None:
    """Write no more to standard output, so that the interpreter has nothing to say of it later."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
