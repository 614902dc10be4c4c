"""Functions of the tests, each in a process of its own that costs some ten milliseconds.

A server imports what they need once and forks for each call. It has no threads, so a fork of it
is a whole process, which may be killed at any instant and leaves what a killed process leaves.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

CALL_S = 30  # each takes well under a second; a machine under load may take longer


@dataclass(frozen=True)
class Ended:
    """How a call ended: its exit status, negative for a signal; what it returned; what it logged
    as a warning or worse (nothing is known of either when it was killed)."""

    status: int
    result: Any
    logged: list[str]


class Forked:
    """A server that has imported `module`; its functions are called by name. `close` it."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def call(self, function: str, **params: Any) -> Ended:
        """Run `function(**params)` in a process of its own; what it raises fails the test."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, params]).encode() + b"\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        assert told["error"] is None, told["error"]
        return Ended(told["status"], told["result"], told["logged"])

    def close(self) -> None:
        """End the server. Idempotent."""
        self._process.communicate(timeout=CALL_S)


def _serve(module: str) -> None:
    namespace = vars(importlib.import_module(module))
    answers, sys.stdout = sys.stdout, sys.stderr
    gc.freeze()  # a collection in a fork would touch, and so copy, all of this
    for line in sys.stdin:
        function, params = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _run(namespace[function], params, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            told = json.loads(pipe.read() or b"{}")
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer = {"status": status, "result": None, "error": None, "logged": []} | told
        print(json.dumps(answer), file=answers, flush=True)


def _run(function: Any, params: dict[str, Any], writer: int) -> NoReturn:
    """Be the process of one call."""
    signal.alarm(CALL_S)
    signal.signal(signal.SIGALRM, _hangs)
    recorder = _Recorder()
    logging.getLogger("mirrord").addHandler(recorder)
    told: dict[str, Any] = {"logged": recorder.lines}
    try:
        result = function(**params)
        told["result"] = asyncio.run(result) if inspect.iscoroutine(result) else result
    except BaseException:
        told["error"] = f"{function.__name__}({params}): {traceback.format_exc()}"
    os.write(writer, json.dumps(told).encode())
    os._exit(0)


def _hangs(number: int, frame: Any) -> NoReturn:
    raise TimeoutError(f"not within {CALL_S} s")


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


if __name__ == "__main__":
    _serve(sys.argv[1])
