"""Log lines, and what the journal gets of them."""

from __future__ import annotations

import ast
import logging
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from mirrord.service import logs
from mirrord.service.logs import _Journal, fields
from tests.style.sources import parse as parse_source
from tests.style.sources import python_files

PROGRAM = """
import logging, sys
from mirrord.service import logs
logs.JOURNAL = sys.argv[1]
logs.set_up("daemon")
logging.getLogger("x").info("asked %s", logs.fields(disk="vm"))
"""


def parse(datagram: bytes) -> dict[str, str]:
    """Read one entry of the journal's protocol."""
    entry = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        key, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", datagram)
            value, datagram = datagram[8 : 8 + length], datagram[8 + length + 1 :]
        entry[key.decode()] = value.decode()
    return entry


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    """Listen as the journal does, at `journal.sock`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "journal.sock"))
        listening.settimeout(5)
        yield listening


class Kept(logging.Handler):
    """Keeps the lines that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def logger(process: str, address: Path, otherwise: logging.Handler) -> Iterator[logging.Logger]:
    """A logger that writes to a journal."""
    made = logging.Logger("test")
    with closing(_Journal(process, str(address), otherwise)) as handler:
        made.addHandler(handler)
        yield made


def test_what_a_line_is_about_are_fields(journal: socket.socket, tmp_path: Path) -> None:
    about = fields(job="1-2", disk="other vm", phase="copying", error="a\nb")
    with logger("disk/vm", tmp_path / "journal.sock", Kept()) as log:
        log.warning("job changed %s", about)
        log.info("ready, 100 %")
    assert parse(journal.recv(65536)) == {
        "MESSAGE": 'job changed job=1-2 disk="other vm" phase=copying error="a\\nb"',
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "mirrord",
        "MIRRORD_PROCESS": "disk",
        "DISK": "other vm",
        "JOB": "1-2",
        "PHASE": "copying",
        "ERROR": "a\nb",
    }
    entry = parse(journal.recv(65536))
    assert (entry["MESSAGE"], entry["PRIORITY"], entry["DISK"]) == ("ready, 100 %", "6", "vm")


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "\x1b[2Jx", "a\u2028b", "\x7f", "a\0b", "\udc80"])
def test_what_a_client_sent_stays_in_its_line(text: str) -> None:
    told = fields(disk=text, verb="move")
    assert told.isprintable()
    assert told.endswith('" verb=move')
    assert told.values["disk"] == text


def test_what_the_engine_says_is_about_the_job(
    journal: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_job", {})
    with closing(_Journal("disk/vm", str(tmp_path / "journal.sock"), Kept())) as handler:
        engine, other = logging.Logger("mirrord.engine"), logging.Logger("mirrord.frontends.x")
        for one in (engine, other):
            one.addHandler(handler)
        for phase in ("copying", "mirroring"):
            logs.concern("1-2", phase)
            engine.warning("clear intent-map error=%s", "why")
            entry = parse(journal.recv(65536))
            assert (entry["JOB"], entry["DISK"], entry["PHASE"]) == ("1-2", "vm", phase)
        other.info("came client=1")
        assert not {"JOB", "PHASE"} & set(parse(journal.recv(65536)))


ABOUT_JOBS = [
    pytest.param(ast.unparse(node), id=f"{path.name}:{node.lineno}")
    for path in python_files("mirrord")
    if "log" in path.read_text()
    for node in ast.walk(parse_source(path))
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "fields"
    if "job" in {word.arg for word in node.keywords}
]


@pytest.mark.parametrize("call", ABOUT_JOBS)
def test_a_line_about_a_job_says_which_disk_and_phase(call: str) -> None:
    """But for a job of which nothing but its id can be read."""
    if call in ("fields(job=job_id, reason=error)", "fields(job=directory.name, error=error)"):
        return
    assert re.search(r"\bdisk=.*\bphase=|\bphase=.*\bdisk=", call), call


def test_an_exception_comes_with_its_traceback(journal: socket.socket, tmp_path: Path) -> None:
    with logger("daemon", tmp_path / "journal.sock", Kept()) as log:
        try:
            raise ValueError("of the test")
        except ValueError:
            log.exception("request failed path=%s", "/v1/x")
    entry = parse(journal.recv(65536))
    assert entry["MESSAGE"].startswith("request failed path=/v1/x\nTraceback (most recent")
    assert entry["MESSAGE"].endswith("ValueError: of the test")
    assert entry["PRIORITY"] == "3"
    assert "DISK" not in entry


def test_what_the_journal_does_not_take_goes_elsewhere(tmp_path: Path) -> None:
    kept = Kept()
    with logger("daemon", tmp_path / "nowhere", kept) as log:
        log.info("asked %s", fields(disk="vm"))
    assert kept.lines == ["asked disk=vm"]


@pytest.mark.parametrize("connected", [True, False])
def test_the_journal_is_used_where_standard_error_leads_there(
    journal: socket.socket, tmp_path: Path, connected: bool
) -> None:
    with (tmp_path / "stderr").open("wb") as stderr:
        status = os.fstat(stderr.fileno())
        stream = f"{status.st_dev}:{status.st_ino if connected else 1}"
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "journal.sock")],
            stderr=stderr, env=os.environ | {"JOURNAL_STREAM": stream}, check=True, timeout=30,
        )  # fmt: skip
    written = (tmp_path / "stderr").read_text()
    if connected:
        assert parse(journal.recv(65536))["DISK"] == "vm"
        assert not written
    else:
        assert written.endswith(" INFO daemon asked disk=vm\n")
