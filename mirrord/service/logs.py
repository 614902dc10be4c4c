"""Log lines: `time level process verb key=value …` on standard error, or fields in the journal.

Under systemd the lines go to the journal by its own protocol, with what they are about as fields:
`journalctl JOB=…`, `DISK=vm`, `PHASE=mirroring` (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/).
A line of the engine, which knows nothing of that, is about the job that `concern` named.

A reader that went away must not stop a disk: a line that can't be written is dropped.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import traceback

JOURNAL = "/run/systemd/journal/socket"

# syslog(3)
_PRIORITIES = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


ENGINE = "mirrord.engine"  # its loggers are named so
_job: dict[str, str] = {}  # what the engine's lines are about, as fields of the journal


class Fields(str):
    """The text of some values, which stay known."""

    __slots__ = ("values",)
    values: dict[str, str]


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        return


class _Journal(logging.Handler):
    """Sends each line as a datagram. What doesn't get through goes to standard error."""

    def __init__(self, process: str, address: str, otherwise: logging.Handler) -> None:
        super().__init__()
        self._process = process
        self._otherwise = otherwise
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._address = address

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._socket.sendto(self._datagram(record), self._address)
        except OSError:  # gone, full, or the line is too long for a datagram
            self._otherwise.handle(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _datagram(self, record: logging.LogRecord) -> bytes:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        kind, _, name = self._process.partition("/")
        told = {
            "MESSAGE": message,
            "PRIORITY": str(_PRIORITIES.get(record.levelno, 6)),
            "SYSLOG_IDENTIFIER": "mirrord",
            "MIRRORD_PROCESS": kind,
        }
        if name:
            told["DISK"] = name
        if record.name.startswith(ENGINE):
            told |= _job
        for argument in record.args if isinstance(record.args, tuple) else ():
            if isinstance(argument, Fields):
                told |= {key.upper(): value for key, value in argument.values.items()}
        return b"".join(_field(key, value.encode(errors="replace")) for key, value in told.items())


def _field(key: str, value: bytes) -> bytes:
    if b"\n" not in value:
        return b"%s=%s\n" % (key.encode(), value)
    return b"%s\n%s%s\n" % (key.encode(), struct.pack("<Q", len(value)), value)


def set_up(process: str, level: str = "info") -> None:
    """Send this process's log lines where they belong, marked with `process`."""
    handler: logging.Handler = _Lines(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s {process} %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    )
    if _is_journal(sys.stderr.fileno()):
        handler = _Journal(process, JOURNAL, handler)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _is_journal(descriptor: int) -> bool:
    """Tell whether what is written there gets into the journal (systemd.exec(5))."""
    status = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def concern(job: str, phase: str) -> None:
    """Name the job, of which a disk's process has one at a time, and the phase it is in now."""
    _job.update(JOB=job, PHASE=phase)


def fields(**values: object) -> Fields:
    """Return `key=value …`; a value with blanks is quoted."""
    texts = {key: str(value) for key, value in values.items()}
    told = Fields(" ".join(f"{key}={_quoted(text)}" for key, text in texts.items()))
    told.values = texts
    return told


def _quoted(text: str) -> str:
    """Return a text as part of one line: what a client sent can't make it look like several."""
    if text and text.isprintable() and not any(c.isspace() or c in '"=' for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(escaped)}"'


def printable(text: str) -> str:
    """Return a text on one line, with escapes for what can't be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
