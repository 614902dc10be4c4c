"""`mirrord demo`: a disk, a guest that writes to it, a daemon, and a live move, in a few seconds.

Everything lies in a temporary folder and is gone afterwards, however this ends. It uses what users
use: the command `mirrord daemon`, the control socket, NBD. Nothing else has to be installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mirrord import display
from mirrord.control.client import Client
from mirrord.control.messages import AttachRequest, Job, MoveRequest
from mirrord.control.sockets import SOCKET_PATH_BYTES_MAX, dial, peer
from mirrord.core.geometry import MIB, round_down
from mirrord.core.units import format_bytes, format_duration
from mirrord.errors import MirrordError, UsageError
from mirrord.service.demo_guest import BLOCK_BYTES, FILL_BLOCKS, Guest, find_differences, make_disk

NAME = "vm"
SIZE_BYTES_MIN = 16 * MIB  # smaller, and nothing is to be seen
COPY_S = 4.0  # the move is slowed down to about this, so that there is something to watch
READY_S = 15.0
AFTERWARDS_S = 0.5  # the guest goes on for a while at the target
LOOK_EVERY_S = 0.1
LINE_EVERY_S = 1.0
END_S = 10.0
# What a socket's path needs below the folder: run/disks/vm.sock
LONGEST_BELOW = len("/run/control.sock")


class Story:
    """Prints what happens, with the time since the beginning."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def tell(self, text: str) -> None:
        """Print one line."""
        print(f"{time.monotonic() - self._began_s:5.1f} s  {text}", flush=True)


def run(size: int) -> int:
    """Run the demo with a disk of `size` bytes; return 0 when every byte was right."""
    if size < SIZE_BYTES_MIN:
        raise UsageError(f"the demo's disk needs at least {format_bytes(SIZE_BYTES_MIN)}")
    size = round_down(size, MIB)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _folder() as folder, _daemon(folder) as client:
        return asyncio.run(_demo(folder, client, size, Story()))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > SOCKET_PATH_BYTES_MAX - LONGEST_BELOW - len("/mirrord-12345678"):
        base = "/tmp"  # a socket's path is short by law
    folder = Path(tempfile.mkdtemp(prefix="mirrord-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _daemon(folder: Path) -> Iterator[Client]:
    """Run a daemon of its own; end it, and every disk process, at the end."""
    socket = folder / "run" / "control.sock"
    log = folder / "daemon.log"
    empty = folder / "mirrord.toml"
    empty.touch()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "mirrord", "daemon", "--config", str(empty)),
                *("--state-dir", str(folder / "state")),
                *("--runtime-dir", str(folder / "run"), "--socket", str(socket)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C ends the demo, and the demo ends the daemon
        )
    client = Client(socket)
    try:
        _wait_until_ready(process, log)
        yield client
    except BaseException:
        sys.stderr.write(log.read_text(errors="replace"))
        raise
    finally:
        client.close()
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _end_disk(folder / "run" / "disks" / f"{NAME}.sock")


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_s = time.monotonic() + READY_S
    while "ready socket=" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > give_up_s:
            raise MirrordError("the demo's daemon did not start; its log is above")
        time.sleep(LOOK_EVERY_S / 4)


def _end_disk(channel: Path) -> None:
    """End the disk's process, which the daemon's end leaves serving, and wait for that."""
    try:
        with dial(channel) as connection:
            pid = peer(connection).pid
        pidfd = os.pidfd_open(pid)
    except OSError:
        return  # it was detached
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    give_up_s = time.monotonic() + END_S
    while channel.exists() and time.monotonic() < give_up_s:
        time.sleep(LOOK_EVERY_S / 4)
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)


async def _demo(folder: Path, client: Client, size: int, story: Story) -> int:
    source, target = folder / "ssd" / "vm.raw", folder / "hdd" / "vm.raw"
    for path in (source, target):
        path.parent.mkdir()
    filled = round_down(size * 3 // 4, FILL_BLOCKS * BLOCK_BYTES)
    make_disk(source, size, filled)
    story.tell(f"made {source}: {format_bytes(size)}, {format_bytes(filled)} of it data")
    served = client.attach(AttachRequest(NAME, str(source)))
    story.tell(f"served as {served.uris.nbd}")
    guest = Guest(folder / "run" / "nbd" / f"{NAME}.sock", NAME)
    await guest.start()
    story.tell("a guest writes numbered blocks to it, and goes on doing so")
    wanted = MoveRequest(str(target), limit=int(size / COPY_S))
    job = await asyncio.to_thread(client.move, NAME, wanted)
    writes_before = guest.writes
    story.tell(f"moving it to {target}, at most {format_bytes(size / COPY_S)}/s to be seen")
    job = await _watch(client, job, story)
    writes_meanwhile = guest.writes - writes_before
    if job.phase != "done":
        await guest.stop()
        story.tell(display.outcome(job))
        return 1
    await asyncio.sleep(AFTERWARDS_S)
    await guest.stop()
    story.tell(f"the guest made {guest.writes - writes_before - writes_meanwhile} more writes")
    client.detach(NAME)
    wrong = find_differences(target, size, filled, guest.written)
    gone = not source.exists()
    story.tell("compared every byte of the target with what was written")
    print(_table(job, guest, writes_meanwhile, wrong, gone))
    return 0 if gone and not wrong else 1


async def _watch(client: Client, job: Job, story: Story) -> Job:
    """Tell each phase as it comes, with the reason, and a line a second between."""
    told = 0
    last_s = time.monotonic()
    while True:
        for step in job.story[told:]:
            story.tell(f"{step.phase}: {step.text}")
        told = len(job.story)
        if job.ended_already:
            return job
        if time.monotonic() - last_s >= LINE_EVERY_S:
            last_s = time.monotonic()
            story.tell(f"  {display.progress_line(job)}")
        await asyncio.sleep(LOOK_EVERY_S)
        job = await asyncio.to_thread(client.job, job.id)


def _table(job: Job, guest: Guest, meanwhile: int, wrong: list[int], gone: bool) -> str:
    missing = "every one found" if not wrong else f"{len(wrong)} BLOCKS ARE WRONG: {wrong[:5]}"
    rows = [
        ("copied", f"{format_bytes(job.bytes_copied)} in {display.passes(job)}"),
        ("guest paused for", format_duration((job.pause_ms or 0) / 1000)),
        ("guest's longest write", format_duration(guest.longest_s)),
        ("guest writes during the move", str(meanwhile)),
        ("guest writes in all", f"{guest.writes}, at the target: {missing}"),
        ("source", "deleted" if gone else "STILL THERE"),
    ]
    return "\n" + display.pairs(rows)
