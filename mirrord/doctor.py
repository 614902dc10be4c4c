"""`mirrord doctor`: looks whether this host, its configuration and its shares are in order.

It changes nothing, and needs neither root nor a daemon. Each line says how a thing is and what to
do about it: `ok`, `advice` (it works, and could be better), `problem` (something won't work, or
something will be lost). A problem is exit code 1. After that come the mounted shares: what serves
a disk better, the mount or smb://, and why.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from mirrord import display
from mirrord.control.client import Client
from mirrord.control.messages import Disk, Service
from mirrord.errors import MirrordError, NoDaemonError, RefusedError, UsageError
from mirrord.service import checks, host_checks, record_checks, storage_checks
from mirrord.service.checks import Check
from mirrord.service.config import Config, default_runtime_dir, default_state_dir
from mirrord.service.logs import printable
from mirrord.service.mounts import MOUNTINFO, ShareMount, advise, read_mounts
from mirrord.service.places import check_location, is_share
from mirrord.service.state import Directories

EXIT_PROBLEM = 1
ANSWER_S = 15.0  # a daemon that takes longer to list its disks hangs
NAME_COLUMNS = 12  # longer names are those of shares
INDENT = " " * 9  # what levels take
CONTINUED = INDENT + "  "


class Diagnosis(msgspec.Struct, frozen=True):
    """All that was found."""

    checks: list[Check]
    mounts: list[ShareMount]


def run(config: Path | None, socket: Path | None, places: Sequence[str], json: bool) -> int:
    """Look at everything and print it; return the exit code. Raises UsageError."""
    found = diagnose(config, socket, [_folder(place) for place in places])
    display.put(found, json, lambda shown: describe(shown, display.terminal_columns()))
    return EXIT_PROBLEM if any(check.level == "problem" for check in found.checks) else 0


def diagnose(
    config: Path | None,
    socket: Path | None,
    places: Sequence[Path] = (),
    *,
    mountinfo: Path = MOUNTINFO,
    environ: Mapping[str, str] = os.environ,
) -> Diagnosis:
    """Look at everything, and at the folders `places` beside those of disks. Changes nothing."""
    mounts = read_mounts(mountinfo)
    settings, read = checks.check_config(config)
    credentials = {
        section: checks.check_credential(section, share, environ)
        for section, share in settings.smb.items()
    }
    usable = {
        section: share
        for section, share in settings.smb.items()
        if credentials[section].level != "problem"
    }
    daemon, service = check_daemon(settings, socket)
    directories = Directories(
        Path(service.state_dir if service else settings.state_dir or default_state_dir()),
        Path(service.runtime_dir if service else settings.runtime_dir or default_runtime_dir()),
    )
    known = record_checks.recall(directories)
    roots = {Path(r) for grant in settings.grant for r in grant.roots if not is_share(r)}
    folders = known.folders() | roots | set(places)
    found = [
        host_checks.check_python(),
        host_checks.check_kernel(),
        host_checks.check_io(),
        *host_checks.check_limits(),
        host_checks.check_fuse(),
        host_checks.check_clock(),
        host_checks.check_systemd(),
        read,
        *daemon,
        checks.check_state(directories.state, mounts),
        *record_checks.check_records(directories, known),
        *storage_checks.check_folders({*folders, *_state_folder(directories)}, mounts, known.disks),
        *record_checks.check_leftovers(directories, folders | known.former_folders(), mounts),
        *checks.check_libraries(settings.smb),
    ]
    for section, share in settings.smb.items():
        found += [credentials[section], checks.check_strength(section, share)]
    return Diagnosis(found, advise(mounts, usable))


def _folder(place: str) -> Path:
    """Return the folder that a place is, or that it lies in."""
    if is_share(place):
        raise UsageError(f"{place} lies on a share: 'mirrord credential test {place}' looks at it")
    path = Path(check_location(str(Path(place).absolute())))
    try:
        is_folder = stat.S_ISDIR(checks.look_at(os.stat, path).st_mode)
    except OSError:  # which is told when it is looked at as a folder
        return path
    return path if is_folder else path.parent


def _state_folder(directories: Directories) -> list[Path]:
    """Return the state directory, if a daemon has made it: its journals need a flush, too."""
    try:
        checks.look_at(os.stat, directories.state)
    except OSError as error:
        return [directories.state] if isinstance(error, TimeoutError) else []
    return [directories.state]


def check_daemon(config: Config, socket: Path | None) -> tuple[list[Check], Service | None]:
    """Look whether a daemon answers where a client would look for it, and what it says of disks."""
    runtime = Path(config.runtime_dir or default_runtime_dir())
    address = (socket or Path(config.socket or runtime / "control.sock")).absolute()
    try:
        with contextlib.closing(Client(address, deadline_s=ANSWER_S)) as client:
            served, service = client.disks(), client.service()
    except NoDaemonError:
        start = "start one: systemctl start mirrord, or mirrord daemon"
        return [Check("daemon", "advice", f"no daemon answers at {address}", start)], None
    except RefusedError as error:
        return [Check("daemon", "advice", str(error), "it runs; ask as a user who may")], None
    except MirrordError as error:
        advice = "look at its log: journalctl -u mirrord"
        return [Check("daemon", "problem", str(error), advice)], None
    disks = "1 disk" if len(served) == 1 else f"{len(served)} disks"
    found = [Check("daemon", "ok", f"the daemon at {address} serves {disks}")]
    return found + [check for disk in served for check in _trouble(disk)], service


def _trouble(disk: Disk) -> list[Check]:
    """Return what is wrong with a disk, as the daemon knows it."""
    away = disk.share is not None and disk.share.state != "connected"
    if disk.state == "serving" and disk.reason is None and not away:
        return []
    why = disk.reason or (disk.share.reason if disk.share is not None else None)
    state = disk.state if disk.state != "serving" or disk.share is None else disk.share.state
    text = f"{state}: {why}" if why else state
    return [Check(f"disk {disk.name}", "problem", text, f"see 'mirrord show {disk.name}'")]


def describe(found: Diagnosis, columns: int | None = None) -> str:
    """Return a line a check, and a block for each mounted share.

    Lines longer than `columns` are continued below their own text.
    """
    lines = []
    for check in found.checks:
        text = f"{check.level:<7}  {check.name:<{NAME_COLUMNS}}  {check.text}"
        text += f" — {check.advice}" if check.advice else ""
        lines.append(display.wrapped(printable(text), CONTINUED, columns))
    for mount in found.mounts:
        text = f"{mount.level:<7}  mount {mount.mount} of {mount.source} — {mount.advice}"
        lines += ["", display.wrapped(text, CONTINUED, columns)]
        lines += [
            display.wrapped(f"{INDENT}· {reason}", CONTINUED, columns) for reason in mount.why
        ]
    return "\n".join(lines)
