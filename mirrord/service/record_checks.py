"""What `mirrord doctor` looks at in the state directory, and what moves left behind elsewhere.

A daemon may be at work there meanwhile: what may just be made or removed is no finding.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mirrord.control.messages import Job
from mirrord.core.bitmap import map_bytes_for
from mirrord.core.journal import CAPACITY_BYTES
from mirrord.core.units import format_bytes
from mirrord.engine.request import dirty_bytes_for
from mirrord.errors import DamagedError
from mirrord.service import history, state
from mirrord.service.checks import Check, look_at, look_at_all
from mirrord.service.mounts import Mount
from mirrord.service.places import is_share
from mirrord.service.state import Directories, DiskRecord, JobRecord
from mirrord.service.storage_checks import available_bytes, is_elsewhere, look_at_disks

_LEFT = re.compile(r"\..*\.mirrord-([0-9a-f-]{36})\.(part|retired)")
LEFTOVERS_SHOWN = 20  # each with what to do; of more, their number is told
_MORE = "remove those that are shown, then ask again"
_KINDS = {"part": "an unfinished target", "retired": "a former source"}


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the state directory knows."""

    disks: list[DiskRecord] = field(default_factory=list)
    unfinished: dict[str, JobRecord] = field(default_factory=dict)  # by id, the queued ones too
    ended: dict[str, Job] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    unreadable: str = ""  # why nothing else is known

    def folders(self) -> set[Path]:
        """Return where disks lie, and where they are going to."""
        locations = [disk.location for disk in self.disks]
        locations += [job.target for job in self.unfinished.values()]
        return _folders(locations)

    def former_folders(self) -> set[Path]:
        """Return where moves that ended came from and went to."""
        return _folders(place for job in self.ended.values() for place in (job.source, job.target))


def _folders(locations: Iterable[str]) -> set[Path]:
    local = (Path(each) for each in locations if not is_share(each))
    return {
        path.parent for path in local if path.is_absolute() and Path("/dev") not in path.parents
    }


def recall(directories: Directories) -> Remembered:
    """Read the state directory; a daemon may be at work there."""
    try:
        return look_at(lambda _: _recall(directories), directories.state)
    except TimeoutError as error:
        return Remembered(unreadable=f"{directories.state} hangs: {error}")


def _recall(directories: Directories) -> Remembered:
    found = Remembered()
    try:
        names, job_ids = directories.disk_names(), directories.job_ids()
    except FileNotFoundError:
        return found
    except OSError as error:
        return Remembered(unreadable=f"{directories.state} can't be read ({error.strerror})")
    for name in names:
        try:
            path = directories.disk(name) / "disk.json"
            found.disks.append(state.read_record(path, DiskRecord))
        except FileNotFoundError:
            continue  # it is just being attached or detached
        except DamagedError as error:
            found.damaged.append(str(error))
    for job_id in job_ids:
        _recall_job(directories, job_id, found)
    return found


def _recall_job(directories: Directories, job_id: str, found: Remembered) -> None:
    directory = directories.job(job_id)
    try:
        entry = history.read_job(directories, job_id)
    except DamagedError as error:
        asked = any((directory / name).exists() for name in ("job.json", "log"))
        if asked and not job_id.startswith("."):  # else a daemon is making or forgetting it
            found.damaged.append(str(error))
        return
    if entry.standing == "ended":
        found.ended[job_id] = entry.job
    else:
        found.unfinished[job_id] = entry.record


def check_records(directories: Directories, found: Remembered) -> list[Check]:
    """Look at what the state directory remembers: damage, moves whose disk is gone, room."""
    if found.unreadable:
        advice = "ask as root, or as the user that the daemon runs as"
        return [Check("records", "advice", found.unreadable, advice)]
    checks = [
        Check("records", "problem", text, "what it concerns is refused until then")
        for text in found.damaged
    ]
    attached = {disk.name for disk in found.disks}
    checks += [
        Check(
            "records",
            "advice",
            f"job {job.id} is unfinished, but its disk {job.disk} isn't attached",
            f"attach {job.disk} again, from {job.source}: the move then goes on",
        )
        for job in found.unfinished.values()
        if job.disk not in attached
    ]
    numbers = f"{len(found.unfinished)} that haven't ended, {len(found.ended)} that have"
    checks.append(Check("records", "ok", f"disks: {len(found.disks)}; moves: {numbers}"))
    files = look_at_disks(found.disks)
    checks += [
        Check("records", "problem", f"{path}, a disk, hangs: {look}", "look at its storage: dmesg")
        for path, look in files.items()
        if isinstance(look, TimeoutError)
    ]
    sizes = [file.st_size for file in files.values() if not isinstance(file, OSError)]
    return [*checks, *_check_room(directories.state, max(sizes, default=0))]


def _check_room(directory: Path, largest: int) -> list[Check]:
    """Look whether the journal and the maps of a move of the largest disk fit."""
    needed = CAPACITY_BYTES + map_bytes_for(largest) + dirty_bytes_for(largest)
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        available = available_bytes(directory)
    except OSError as error:
        return [Check("room", "advice", f"{directory} can't be looked at ({error.strerror})")]
    text = f"{format_bytes(available)} are free at {directory}, a move needs {format_bytes(needed)}"
    if available < needed:
        return [Check("room", "problem", text, "no move can begin there: free some")]
    return [Check("room", "ok", text)]


def check_leftovers(
    directories: Directories, folders: Iterable[Path], mounts: Sequence[Mount]
) -> list[Check]:
    """Look for files that moves made under names of their own, and that no move needs any more."""
    left: list[tuple[Path, str, str]] = []
    here = sorted(folder for folder in folders if not is_elsewhere(folder, mounts))
    for folder, names in look_at_all(os.listdir, here).items():
        if isinstance(names, OSError):
            continue  # what is wrong with it is said elsewhere, if a disk lies there
        for name in sorted(names):
            if match := _LEFT.fullmatch(name):
                left.append((folder / name, match[1], match[2]))
    # Read after the folders: a move that has begun meanwhile is known here.
    known = recall(directories)
    if known.unreadable:
        return []
    left = [each for each in left if each[1] not in known.unfinished]
    if not left:
        return [Check("leftovers", "ok", "no move has left a file behind on this host")]
    shown = [_leftover(*each, known.ended) for each in left[:LEFTOVERS_SHOWN]]
    more = Counter(path.parent for path, _, _ in left[LEFTOVERS_SHOWN:])
    return shown + [
        Check("leftovers", "advice", f"{number} more of these are in {folder}", _MORE)
        for folder, number in more.items()
    ]


def _leftover(path: Path, job_id: str, kind: str, ended: Mapping[str, Job]) -> Check:
    remove = f"rm {shlex.quote(str(path))}"
    job = ended.get(job_id)
    if job is None:
        text = f"{path} is {_KINDS[kind]} of job {job_id}, which nobody here remembers"
        advice = f"is it another daemon's? if not: {remove}"
    else:
        text = f"{path} is {_KINDS[kind]} of job {job_id}, which is {job.phase}"
        advice = remove
    return Check("leftovers", "advice", text, advice)
