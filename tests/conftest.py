"""Fixtures of the whole suite, and two rules it enforces on itself.

* A WARNING that a test did not announce fails that test (fixture `announced_logs`; announce with
  `expect_log`). The same holds for the log of a `daemon`.
* In CI (`CI` is set) a skip fails the run, unless this machine really can't run the test.
"""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.daemon import Daemon
from tests.helpers import (
    NEEDS_FUSE,
    NEEDS_LOOP,
    NEEDS_ROOT,
    NEEDS_URING,
    have_fuse,
    have_io_uring,
    have_loop_devices,
)

REALLY_MISSING: dict[str, Callable[[], bool]] = {
    NEEDS_ROOT: lambda: os.geteuid() != 0,
    NEEDS_LOOP: lambda: not have_loop_devices(),
    NEEDS_FUSE: lambda: not have_fuse(),
    NEEDS_URING: lambda: not have_io_uring(),
}


# A suite that was started in the background ignores SIGINT, and so would the programs it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.expected: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")

    def unannounced(self) -> list[str]:
        return [line for line in self.lines if not any(re.search(p, line) for p in self.expected)]


@pytest.fixture(autouse=True)
def announced_logs() -> Iterator[_Recorder]:
    """Fail the test when mirrord logged a warning or an error that it did not announce."""
    recorder = _Recorder()
    logger = logging.getLogger("mirrord")
    logger.addHandler(recorder)
    try:
        yield recorder
    finally:
        logger.removeHandler(recorder)
    assert not recorder.unannounced(), "unannounced in the log: " + "; ".join(
        recorder.unannounced()
    )


@pytest.fixture
def expect_log(announced_logs: _Recorder) -> Callable[..., None]:
    """Announce patterns of warnings and errors that this test brings about."""
    return lambda *patterns: announced_logs.expected.extend(patterns)


@pytest.fixture
def make_daemon() -> Iterator[Callable[..., Daemon]]:
    """Make daemons, not yet started, that end with the test."""
    made: list[Daemon] = []

    def make(config: str = "") -> Daemon:
        made.append(Daemon(config))
        return made[-1]

    yield make
    unannounced = [line for one in made for line in one.unannounced()]
    for one in made:
        one.close()
    assert not unannounced, "unannounced in the daemon's log: " + "\n".join(unannounced)


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    """Start a daemon of its own for the test."""
    one = make_daemon()
    one.start()
    return one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what may take long: at the end, all processes but one would wait for it."""

    def limit_s(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return mark.args[0] if mark else 0.0

    items.sort(key=limit_s, reverse=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI, fail a run that skipped what this machine could have run."""
    if not os.environ.get("CI") or hasattr(session.config, "workerinput"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    wrong = []
    for report in reporter.stats.get("skipped", []) if reporter else []:
        reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else "")
        if not any(key in reason and missing() for key, missing in REALLY_MISSING.items()):
            wrong.append(f"{report.nodeid}: {reason}")
    if wrong:
        reporter.write_line("\nskipped although CI has to run it:\n" + "\n".join(wrong), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
