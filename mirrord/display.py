"""What people see: tables, one disk, one job, and how a move is getting on.

Plain text throughout; only a progress bar on a terminal needs more, and imports it then.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TextIO, TypeVar

import msgspec

from mirrord.control.messages import CredentialTest, Disk, Job, Share, Step
from mirrord.core.units import format_bytes, format_duration, format_rate

Shown = TypeVar("Shown")

ID_LENGTH = 8  # of an id that only has to be told from others
STORY_INDENT = " " * 10  # what a time takes
WORTH_S = 0.1  # a phase that is shorter, and was thought to be, was predicted well enough
LINE_EVERY_S = 1.0  # progress lines where no terminal is


def put(value: Shown, json: bool, text: Callable[[Shown], str]) -> None:
    """Print the value as JSON or as text."""
    if json:
        print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
    else:
        print(text(value))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the rows in columns, left-aligned."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def disks(found: list[Disk]) -> str:
    """Return the table of `ls`."""
    if not found:
        return "no disks; 'mirrord attach NAME LOCATION' serves one"
    rows = [
        (
            each.name,
            _state(each),
            _size(each),
            str(each.clients),
            each.job or "-",
            each.location or "-",
        )
        for each in found
    ]
    return table(("NAME", "STATE", "SIZE", "CLIENTS", "JOB", "LOCATION"), rows)


def _state(disk: Disk) -> str:
    """Return a disk's state; of one that is served from a share, that of its connection if bad."""
    bad = disk.state == "serving" and disk.share is not None and disk.share.state != "connected"
    return disk.share.state if bad and disk.share is not None else disk.state


def _size(disk: Disk) -> str:
    return "-" if disk.size is None else format_bytes(disk.size)


def attached(disk: Disk) -> str:
    """Say that a disk is served, and where; the URI has a line of its own."""
    return f"disk {disk.name} of {_size(disk)} is served\n{disk.uris.nbd}"


def detached(disk: Disk) -> str:
    """Say that a disk is served no more."""
    where = "" if disk.location is None else f"; its bytes are at {disk.location}"
    return f"disk {disk.name} is no longer served{where}"


def upgraded(shown: Sequence[Disk]) -> str:
    """Say which version serves each disk now."""
    rows = [(disk.name, disk.state, disk.version or "-") for disk in shown]
    return table(("NAME", "STATE", "VERSION"), rows)


def disk(shown: Disk) -> str:
    """Return all about one disk."""
    lines = [
        ("name", shown.name),
        ("state", shown.state if shown.reason is None else f"{shown.state}: {shown.reason}"),
        ("location", shown.location or "-"),
        ("size", "-" if shown.size is None else f"{_size(shown)} ({shown.size} bytes)"),
        ("access", "read-only" if shown.read_only else "read and write"),
        ("cache", shown.cache),
        ("clients", str(shown.clients)),
        ("job", shown.job or "-"),
        ("nbd", shown.uris.nbd or "-"),
    ]
    lines += [("share", _share(one)) for one in (shown.share,) if one is not None]
    if shown.target_share is not None:
        lines.append(("target share", _share(shown.target_share, wait=False)))
    text = pairs(lines)
    if shown.snippets is not None:
        text += (
            f"\n\nQEMU\n{shown.snippets.qemu}"
            f"\n\nlibvirt\n{shown.snippets.libvirt}"
            f"\n\nnbd-client\n{shown.snippets.nbd_client}"
        )
    return text


def _share(share: Share, *, wait: bool = True) -> str:
    """Return one line about the connection to a share, and how long a guest may `wait` for it."""
    said = [f"{share.state}: {share.reason}" if share.reason else share.state]
    if share.dialect:
        said.append(f"SMB {share.dialect}")
        said.append(f"encryption {share.encryption}, signing {share.signing}")
        said.append(f"{share.channels} channel{'' if share.channels == 1 else 's'}")
        said.append(f"{share.handle} handle")
    if share.state == "failed":
        said.append("every request fails")
    elif wait:
        said.append(f"a guest waits up to {share.io_timeout_s:g} s for it")
    if share.unflushed_bytes:
        said.append(f"{format_bytes(share.unflushed_bytes)} not flushed")
    if share.weaknesses:
        said.append(f"WEAK: {', '.join(share.weaknesses)}")
    return "; ".join(said)


def credential(found: CredentialTest) -> str:
    """Return what a server gives, and what one may want to change."""
    room = "-" if found.available_bytes is None else format_bytes(found.available_bytes)
    largest = format_bytes(min(found.read_bytes_max, found.write_bytes_max))
    lines = [
        ("location", found.location),
        ("user", found.user or "the one of the Kerberos tickets"),
        ("dialect", f"SMB {found.dialect}"),
        ("encryption", found.encryption),
        ("signing", found.signing),
        ("channels", f"{found.channels} now; offered: {', '.join(found.addresses) or 'no more'}"),
        ("largest request", largest),
        ("space", f"{room} for this user"),
        ("writable", _yes(found.writable)),
        ("durable handles", _yes(found.durable_handle)),
        ("persistent handles", _yes(found.persistent_handle)),
        ("sparse files", _yes(found.sparse)),
        ("copies inside", _yes(found.server_side_copy)),
        ("folder flush", _yes(found.folder_flush)),
        ("write and flush", "-" if found.flush_ms is None else f"{found.flush_ms:g} ms"),
    ]
    return "\n".join([pairs(lines), *(f"- {one}" for one in found.advice)])


def _yes(fact: bool | None) -> str:
    return {True: "yes", False: "no", None: "not tried"}[fact]


def pairs(lines: Sequence[tuple[str, str]]) -> str:
    """Return keys and values in two columns."""
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in lines)


def jobs(found: list[Job]) -> str:
    """Return the table of `jobs`."""
    if not found:
        return "no moves; 'mirrord move NAME TARGET' starts one"
    rows = [
        (
            each.id[:ID_LENGTH],
            each.disk,
            each.phase,
            format_bytes(each.bytes_copied),
            format_bytes(each.bytes_remaining),
            (each.created or "-")[:19],
            each.target,
        )
        for each in found
    ]
    return table(("ID", "DISK", "PHASE", "COPIED", "LEFT", "CREATED", "TARGET"), rows)


def job(shown: Job) -> str:
    """Return all about one job but its story."""
    rows = [
        ("id", shown.id),
        ("disk", shown.disk),
        ("phase", shown.phase),
        ("reason", shown.reason or "-"),
        ("source", shown.source + (" (kept)" if shown.keep_source else "")),
        ("target", shown.target),
        ("total", format_bytes(shown.bytes_total)),
        ("copied", f"{format_bytes(shown.bytes_copied)} in {passes(shown)}"),
        ("left", format_bytes(shown.bytes_remaining)),
        ("copy rate", _rate(shown.copy_rate)),
        ("dirty rate", _rate(shown.dirty_rate)),
        ("limit", _rate(shown.limit)),
        ("time left", "-" if shown.ended_already else time_left(shown) or "not known"),
        ("pause", "-" if shown.pause_ms is None else format_duration(shown.pause_ms / 1000)),
        ("verified", "yes" if shown.verified else "no"),
        ("created", shown.created or "-"),
        ("ended", shown.ended or "-"),
        ("story", f"mirrord job {shown.id[:ID_LENGTH]} --story"),
    ]
    return pairs(rows)


def story(shown: Job, columns: int | None = None) -> str:
    """Return a job's phases: when each began, how long it took and was thought to take, and why.

    Lines longer than `columns` are continued below their own text.
    """
    lines = [f"disk {shown.disk}: {shown.source} → {shown.target} (job {shown.id})", ""]
    day = ""
    for step in shown.story:
        if step.time[:10] != day:
            day = step.time[:10]
            lines.append(f"{day}, UTC")
        lines.append(f"{step.time[11:19]}  {step.phase:<12}  {_lasted(step)}".rstrip())
        lines.append(wrapped(f"{STORY_INDENT}{step.text}", STORY_INDENT, columns))
    end = outcome(shown) if shown.ended_already else f"now: {progress_line(shown)}"
    return "\n".join([*lines, "", wrapped(end, "", columns)])


def _lasted(step: Step) -> str:
    """Say how long a phase took and was thought to take, if either is worth a word."""
    said = [] if step.took_s is None else [format_duration(step.took_s)]
    if step.predicted_s is not None and max(step.took_s or 0.0, step.predicted_s) >= WORTH_S:
        said.append(f"predicted {format_duration(step.predicted_s)}")
    return ", ".join(said)


def wrapped(line: str, indent: str, columns: int | None) -> str:
    """Return a line that is continued with `indent` where it is longer than `columns`."""
    if columns is None:
        return line
    return textwrap.fill(
        line, columns, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )  # a path stays one that can be copied


def terminal_columns() -> int | None:
    """Return how wide the terminal is; None where the output isn't one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _rate(rate: float | None) -> str:
    return "-" if rate is None else format_rate(rate)


def passes(shown: Job) -> str:
    """Return the number of passes, in words."""
    return "1 pass" if shown.passes == 1 else f"{shown.passes} passes"


def job_line(shown: Job) -> str:
    """Say in one line how a job is."""
    if shown.ended_already:
        return outcome(shown)
    reason = f": {shown.reason}" if shown.reason else ""
    return f"disk {shown.disk} is {shown.phase}{reason} (job {shown.id})"


def outcome(shown: Job) -> str:
    """Say in one line how a job ended."""
    if shown.phase == "done":
        pause = (
            ""
            if shown.pause_ms is None
            else (f", paused the guest for {format_duration(shown.pause_ms / 1000)}")
        )
        verified = ", verified" if shown.verified else ", not verified"
        return (
            f"disk {shown.disk} is now at {shown.target}: copied "
            f"{format_bytes(shown.bytes_copied)} in {passes(shown)}{pause}{verified}"
            + (f"; {shown.reason}" if shown.reason else "")
        )
    return (
        f"the move of disk {shown.disk} was {shown.phase}: {shown.reason or 'no reason known'}; "
        f"the disk is still at {shown.source}"
        if shown.phase == "cancelled"
        else f"the move of disk {shown.disk} failed: {shown.reason or 'no reason known'}; "
        f"the disk is still at {shown.source}"
    )


def time_left(shown: Job) -> str | None:
    """Say how long the copying will take, truthfully; None where it means nothing."""
    if shown.phase not in ("copying", "catching-up", "mirroring"):
        return None
    if shown.eta_s is not None:
        return f"{format_duration(shown.eta_s)} left"
    if shown.copy_rate and shown.dirty_rate and shown.dirty_rate >= shown.copy_rate:
        return "will not finish by passes alone"
    return None


def progress_line(shown: Job) -> str:
    """Say in one line how far a move is."""
    parts: list[str] = [shown.phase]
    if shown.bytes_total:
        parts.append(f"{100 * fraction(shown):.0f} %")
    if not shown.ended_already and shown.phase != "queued":
        parts.append(f"{format_bytes(shown.bytes_remaining)} left")
    if shown.copy_rate:
        parts.append(format_rate(shown.copy_rate))
    if shown.dirty_rate:
        parts.append(f"guest changes {format_rate(shown.dirty_rate)}")
    left = time_left(shown)
    if left:
        parts.append(left)
    elif shown.phase in ("queued", "paused", "degraded") and shown.reason:
        parts.append(shown.reason)
    return ", ".join(parts)


def fraction(shown: Job) -> float:
    """Return how much of what has to be equal is equal, from 0 to 1."""
    if shown.phase in ("done", "retiring", "cutting-over"):
        return 1.0
    if not shown.bytes_total:
        return 0.0
    return min(1.0, max(0.0, 1 - shown.bytes_remaining / shown.bytes_total))


class Progress:
    """Shows a running move: a bar on a terminal, a line a second elsewhere."""

    def __init__(self, stream: TextIO, first: Job) -> None:
        self._stream = stream
        self._bar: Any = None
        self._last_s = float("-inf")
        self._phase = ""
        if stream.isatty():
            self._bar = _bar(stream, first)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, shown: Job) -> None:
        """Show the job as it is now, if it is time to."""
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=fraction(shown),
                description=f"{shown.disk} {shown.phase}",
                told=progress_line(shown).partition(", ")[2],
            )
            return
        now_s = time.monotonic()
        if now_s - self._last_s >= LINE_EVERY_S or shown.phase != self._phase:
            self._last_s, self._phase = now_s, shown.phase
            print(progress_line(shown), file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the terminal in order. Idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(stream: TextIO, first: Job) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[told]}"),
        console=Console(file=stream),
        refresh_per_second=5,
    )
    bar.add_task(f"{first.disk} {first.phase}", total=1.0, told="")
    bar.start()
    return bar
