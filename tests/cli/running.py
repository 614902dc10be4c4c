"""Run the command line inside this process: what a command costs is mostly its start."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

from mirrord.cli import main


def run(*words: str | Path) -> tuple[int, str, str]:
    """Run `mirrord WORDS`; return exit code, standard output and standard error."""
    out, error = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["mirrord", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        code = main()
    return code, out.getvalue(), error.getvalue()
