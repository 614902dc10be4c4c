"""Power cuts on real file systems, while a disk moves under a writer that flushes.

A move is recorded once: what each file system wrote and flushed, and what the guest was promised
at which place of that. Then it is cut at many places. After each cut the file systems are sound,
exactly one side is the disk, no write that a flush or FUA covers is lost, each sector holds
something that was written there, and the move goes on and ends.

`MIRRORD_CUTS` is how many cuts (default 30), `MIRRORD_CUT_SEED` says which (default 1).
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from mirrord.control import client as control_client
from mirrord.control.messages import AttachRequest, Job, MoveRequest
from mirrord.core.geometry import MIB
from mirrord.core.journal import Authority, Kind
from mirrord.service import history
from mirrord.service.state import Directories, read_record
from mirrord.storage.job_files import BOOT_ID_VARIABLE
from tests.daemon import Daemon, kill_and_wait
from tests.forked import Forked
from tests.helpers import eventually
from tests.nbd_writer import BLOCK_BYTES, FLUSH, FUA, WRITE, Client, Request, Writer, content
from tests.one_process import attach
from tests.power import LoggedDisk, Position, log_position, require_logged_disks

# The unit of `content`. A cut may tear a sector, too: the kernel lets a page be written to while it
# is on its way to the device, and the log has what the device was given.
STAMP_BYTES = 16
CUTS = int(os.environ.get("MIRRORD_CUTS", "30"))
SEED = int(os.environ.get("MIRRORD_CUT_SEED", "1"))
SIZE_BYTES = 5 * MIB + 512  # the last region and the last block are short
HOT_BLOCKS = 600
# The guest works in a window that moves on, so that regions are left alone for long enough to
# become clean, and are written again (rule R1).
WINDOW_BLOCKS = 40
WINDOW_REQUESTS = 60
LIMIT_BYTES = 8 * MIB  # a second: the move takes long enough for some thousand writes
NEAR = 40  # requests around a record of the journal: the steps that it stands between
SAMPLE_PAUSE_S = 0.0002
DAEMON_EVERY = 7  # cuts; after the others its parts live in one process

pytestmark = pytest.mark.timeout(120 + 2 * CUTS)

Life = tuple[list[str], str | None]  # how its moves ended, and where the disk was at its end


class Guest(Writer):
    """A writer that flushes and writes with FUA, and knows where in the logs which promise is."""

    def __init__(self, path: str, seed: int, where: Callable[[], Position]) -> None:
        super().__init__(path, "vm", seed, WINDOW_BLOCKS)
        self.promises: list[tuple[Position, dict[int, int]]] = []  # block: the write that is kept
        self._asked: dict[int, list[Request]] = {}
        self._answered: dict[int, int] = {}
        self._flushing: dict[int, dict[int, int]] = {}
        self._where = where
        self._window = 0

    def _choose(self) -> Request | None:
        request = super()._choose()
        if request is None:
            return None
        if request.cookie % WINDOW_REQUESTS == 0:
            self._window = self._chance.randrange(HOT_BLOCKS - WINDOW_BLOCKS)
        request = replace(request, block=self._window + request.block)
        if any(request.overlaps(other) for other in self._in_flight.values()):
            return None
        kind = self._chance.random()
        if kind < 0.05:
            return replace(request, flags=FUA)
        if kind < 0.1:
            return replace(request, command=FLUSH, block=0, blocks=0)
        return request

    def _send(self, request: Request) -> None:
        if request.command == FLUSH:
            self._flushing[request.cookie] = dict(self._answered)
        for block in range(request.block, request.block + request.blocks):
            self._asked.setdefault(block, []).append(request)
        super()._send(request)

    def _finish(self, cookie: int, error: int) -> None:
        request = self._in_flight[cookie]
        super()._finish(cookie, error)
        written = dict.fromkeys(range(request.block, request.block + request.blocks), cookie)
        self._answered |= written
        if request.command == FLUSH:
            self.promises.append((self._where(), self._flushing.pop(cookie)))
        elif request.flags & FUA:
            self.promises.append((self._where(), written))

    def check_promises(self, found: bytes, before: bytes, cut: Position) -> None:
        """Assert that a disk is one that a cut may leave."""
        kept: dict[int, int] = {}
        for position, promised in self.promises:
            if all(place <= at for place, at in zip(position, cut, strict=True)):
                for block, cookie in promised.items():
                    kept[block] = max(kept.get(block, 0), cookie)
        untouched = slice(HOT_BLOCKS * BLOCK_BYTES, None)
        assert found[untouched] == before[untouched]
        for block in range(HOT_BLOCKS):
            first = kept.get(block, 0)
            may = [r for r in self._asked.get(block, ()) if r.cookie >= first]
            versions = {content(block, r.cookie if r.command == WRITE else 0) for r in may}
            start = block * BLOCK_BYTES
            if not first:
                versions.add(before[start : start + BLOCK_BYTES])
            if found[start : start + BLOCK_BYTES] in versions:
                continue
            for at in range(0, BLOCK_BYTES, STAMP_BYTES):
                stamp = found[start + at : start + at + STAMP_BYTES]
                assert stamp in {version[at : at + STAMP_BYTES] for version in versions}, (
                    f"block {block}, byte {at}: found {stamp!r}, promised write {first}, "
                    f"written since: {[r.cookie for r in may]}"
                )


class Recording:
    """One recorded move: source, state and target on one file system, or the target on another."""

    def __init__(self, folder: Path, disks: list[LoggedDisk], runtime: Path) -> None:
        self.disks = disks
        self.directories = Directories(disks[0].mount / "state", runtime)
        self.source = disks[0].mount / "source.raw"
        self.target = disks[-1].mount / "target.raw"
        self.before = random.Random(SEED).randbytes(SIZE_BYTES)
        self.places: list[Position] = []  # moments of all logs, in order
        self.guest: Guest
        self.asked: Position  # here the move was known to the user
        self.ended: Position  # here it had ended
        self._logs = [str(disk.log) for disk in disks]
        self._copy = folder / "found.raw"

    def where(self) -> Position:
        """Return where all logs are now: everything that has ended is before it."""
        return log_position(self._logs)

    def record_by_daemon(self, daemon: Daemon) -> None:
        """Move by a real daemon, whose state directory is the recorded one."""
        self.source.write_bytes(self.before)
        os.sync()
        daemon.start()
        control = control_client.Client(daemon.socket)
        control.attach(AttachRequest("vm", str(self.source)))
        self.guest = Guest(daemon.nbd_socket("vm"), SEED, self.where)
        first = self.where()
        self.guest.start()
        job = control.move("vm", MoveRequest(str(self.target), limit=LIMIT_BYTES))
        self.asked = self.where()
        eventually(lambda: control.job(job.id).ended_already, 30, "the end")
        self.ended = self.where()
        control.close()
        self.guest.wait_acknowledged(50)
        self.guest.stop()
        (last,) = self.where()
        self.places = [(place,) for place in range(first[0], last + 1)]
        daemon.kill()
        kill_and_wait(daemon.disk_pid("vm"))

    def record_small(self, forked: Forked) -> None:
        """Move with small regions and many checkpoints, the logs sampled together."""
        self.source.write_bytes(self.before)
        attach(self.directories, self.source)
        os.sync()
        with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as at_the_end:
            moving = pool.submit(
                forked.call, "record", state=str(self.directories.state),
                runtime=str(self.directories.runtime), target=str(self.target),
                logs=self._logs, limit=LIMIT_BYTES,
            )  # fmt: skip
            path = self.directories.nbd_socket("vm")
            eventually(lambda: path.exists() or moving.done())
            self.guest = Guest(str(path), SEED, self.where)
            at_the_end.callback(self.guest.stop)
            stop = threading.Event()
            pool.submit(self._sample, stop)
            at_the_end.callback(stop.set)
            self.guest.start()
            ended = self.directories.state.glob
            eventually(lambda: moving.done() or list(ended("jobs/*/ended.json")), 30, "the end")
            assert not moving.done() or moving.result()
            self.guest.wait_acknowledged(50)
        self.asked, self.ended = map(tuple, moving.result().result)

    def _sample(self, stop: threading.Event) -> None:
        """Note moments of which it is known how far each log was."""
        while not stop.wait(SAMPLE_PAUSE_S):
            place, again = self.where(), self.where()
            if place == again and self.places[-1:] != [place]:
                self.places.append(place)

    def choose(self, number: int, chance: random.Random) -> Position:
        """Return where to cut: a third each anywhere, when the job begins, and at the commit."""
        kind = (None, Kind.PREP, Kind.COMMIT)[number % 3]
        if kind is not None:
            at = self.disks[0].find(kind.value)
            near = [place for place in self.places if abs(place[0] - at) < NEAR]
            return chance.choice(near or self.places)
        return chance.choice(self.places)

    def cut(self, place: Position, chance: random.Random) -> None:
        """Cut all file systems at one moment."""
        for disk, position in zip(self.disks, place, strict=True):
            disk.cut(position, chance)

    def live_on(self, forked: Forked, *, small: bool) -> Life:
        """Be the next process; return how moves ended, and where the disk is."""
        ended = forked.call(
            "live_on", state=str(self.directories.state), runtime=str(self.directories.runtime),
            copy_to=str(self._copy), small=small,
        )  # fmt: skip
        assert (ended.status, ended.logged) == (0, [])
        return ended.result["phases"], ended.result["location"]

    def live_on_by_daemon(self, daemon: Daemon) -> Life:
        """Be the next daemon; return the same."""
        daemon.start()
        client = Client(daemon.nbd_socket("vm"), "vm")
        with self._copy.open("wb") as copy:
            for offset in range(0, SIZE_BYTES, MIB):
                copy.write(client.read(offset, min(MIB, SIZE_BYTES - offset)))
        client.close()
        control = control_client.Client(daemon.socket)
        eventually(lambda: all(job.ended_already for job in control.jobs()), 30, "the end")
        phases = [job.phase for job in control.jobs()]
        location = control.disk("vm").location
        control.close()
        daemon.kill()
        kill_and_wait(daemon.disk_pid("vm"))
        return phases, location

    def check_authority(self, place: Position) -> None:
        """Exactly one side is the disk, by the journal alone, and has what was promised."""
        committed = False
        for job_id in self.directories.job_ids():
            directory = self.directories.job(job_id)
            ended = (directory / "ended.json").exists()  # durable before the journal is cut short
            committed |= (
                read_record(directory / "ended.json", Job).phase == "done"
                if ended
                else history.read_outcome(directory / "log").authority is Authority.TARGET
            )
        authority = self.target if committed else self.source
        self.guest.check_promises(authority.read_bytes(), self.before, place)

    def check_end(self, place: Position, phases: list[str], location: str | None) -> None:
        """The move has gone on and ended, unless it was never asked for."""
        moved = place >= self.asked and all(a <= b for a, b in zip(self.asked, place, strict=True))
        assert phases in (["done"], *([] if moved else [[]])), phases
        there = self.target if phases else self.source
        assert location == str(there)
        found = self._copy.read_bytes()
        self.guest.check_promises(found, self.before, place)
        assert there.read_bytes() == found
        names = {path.name for disk in self.disks for path in disk.mount.iterdir()}
        assert names == {"lost+found", "state", there.name}


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    """A process that forks the lives after the cuts."""
    server = Forked("tests.e2e.power_lives")
    yield server
    server.close()


def cut_often(recording: Recording, live_on: Callable[[int], Life]) -> None:
    """Cut a recorded move, and live on after each cut."""
    chance = random.Random(SEED)
    places = sorted(recording.choose(number, chance) for number in range(CUTS // 2))
    for number, place in enumerate(places):
        recording.cut(place, chance)
        with contextlib.ExitStack() as mounts:
            for disk in recording.disks:
                mounts.enter_context(disk.mounted())
            try:
                recording.check_authority(place)
                phases, location = live_on(number)
                recording.check_end(place, phases, location)
            except BaseException as error:
                error.add_note(f"MIRRORD_CUT_SEED={SEED}, cut {number} at {place}")
                raise


def test_everything_on_one_file_system(
    make_daemon: Callable[..., Daemon],
    tmp_path: Path,
    forked: Forked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real daemon moves, and after some of the cuts a real daemon goes on."""
    require_logged_disks()
    disk = LoggedDisk(tmp_path, "disk")
    daemon = make_daemon()
    daemon.state = disk.mount / "state"
    recording = Recording(tmp_path, [disk], daemon.runtime)
    with disk.recording():
        recording.record_by_daemon(daemon)
    monkeypatch.setenv(BOOT_ID_VARIABLE, "after-the-cut")

    def live_on(number: int) -> Life:
        if number % DAEMON_EVERY == DAEMON_EVERY // 2:
            return recording.live_on_by_daemon(daemon)
        return recording.live_on(forked, small=False)

    cut_often(recording, live_on)


def test_the_target_on_a_file_system_of_its_own(tmp_path: Path, forked: Forked) -> None:
    """Both lose their power at the same moment, and each forgets what it likes."""
    require_logged_disks()
    disks = [LoggedDisk(tmp_path, name) for name in ("old", "new")]
    recording = Recording(tmp_path, disks, tmp_path / "run")
    with disks[0].recording(), disks[1].recording():
        recording.record_small(forked)
    cut_often(recording, lambda _: recording.live_on(forked, small=True))
