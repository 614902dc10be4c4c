"""Scenarios on an SMB share: a private smbd on loopback, as the tests have it.

Signing is mandatory on every row; encryption is off but where a row says "encrypted", which is
how mirrord is by default. The share's folder lies beside the other disks, in memory where that
can be had: what is measured is the protocol and both ends, not a disk.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.loads import loaded as _load
from bench.loads import quantile_ms
from bench.model import MIB, Measure, Scenario, Target
from bench.places import had_memory
from bench.scenarios import DISK_BYTES, fio, make_disk
from bench.servers import attach, mirrord, run
from mirrord.control.client import Client
from mirrord.control.messages import Job, MoveRequest
from tests.samba import Samba

SEQUENTIAL_BYTES = 2048 * MIB
MOVED_BYTES = 512 * MIB
COPIED_BYTES = 2048 * MIB  # so that a copy lasts some seconds
PAUSED_BYTES = 64 * MIB
PAUSES = 50
MOVE_RATE, PAUSE_RATE, CALM_RATE = 3000, 500, 500  # requests a second
AT_ONCE = 1_000_000  # more than anything answers one at a time: the next follows each answer
CALM_S = 5
QUIET_S = 0.5  # after a start, before what counts
LOOK_S = 0.05
MOVE_S = 120
ROUNDS = 3  # of scenarios that last minutes; the files are warm from being written


@contextlib.contextmanager
def _samba(folder: Path, *, encrypted: bool = False) -> Iterator[Samba]:
    """A server whose share is a folder that stays from round to round."""
    share = folder / "share"
    share.mkdir(exist_ok=True)
    samba = Samba(encrypt="desired" if encrypted else "off", shares={"disks": share})
    try:
        yield samba.start()
    finally:
        samba.close()


@contextlib.contextmanager
def _mirrord(folder: Path, samba: Samba, *, encrypted: bool) -> Iterator[Path]:
    """A daemon that may use the share; yields its control socket."""
    credential, config = samba.root / "credential", samba.root / "mirrord.toml"
    credential.touch(mode=0o600)
    credential.write_text(samba.password)
    weaker = "" if encrypted else 'encryption = "allow-plaintext"\n'
    section = f'[smb."{samba.addresses[0]}:{samba.port}/disks"]\n'
    config.write_text(f'{section}credential = "{credential}"\n{weaker}')
    with mirrord(folder, config) as control:
        yield control


# A program and a file on the share.


def _peer(name: str, work: str, size: int) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        figures = {}
        for encrypted in (False, True):
            with _samba(folder, encrypted=encrypted) as samba:
                disk = make_disk(samba.folder(), size, 1.0)
                errand = {
                    "host": samba.addresses[0], "port": samba.port, "share": "disks",
                    "name": disk.name, "size": size, "user": samba.user,
                    "password": samba.password, "encrypted": encrypted,
                }  # fmt: skip
                command = [sys.executable, "-m", "bench.smb_peers", name, work]
                done = subprocess.run(
                    command, input=json.dumps(errand), text=True, capture_output=True
                )
            if done.returncode:
                raise RuntimeError(f"{name} failed: {done.stderr[-500:]}")
            for row, figure in json.loads(done.stdout).items():
                figures[f"{row}, encrypted" if encrypted else row] = figure
        return figures

    return measure


# A guest.


def _guest(where: str) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        encrypted = where == "encrypted"
        with (
            _samba(folder, encrypted=encrypted) as samba,
            _mirrord(folder, samba, encrypted=encrypted) as control,
        ):
            disk = make_disk(samba.folder(), DISK_BYTES, 1.0)
            location = disk if where == "local" else samba.url(disk.name)
            uri = f"nbd+unix:///vm?socket={attach(control, 'vm', location)}"
            return {
                f"{rw} 4k, depth 16": fio(uri, rw, 16, "4k") for rw in ("randread", "randwrite")
            }

    return measure


# Moves.


def _move(client: Client, name: str, target: str) -> Job:
    """Move a disk and return the job at its end, looking rarely: that costs the daemon time."""
    job = client.move(name, MoveRequest(target, verify="full", force=True))
    give_up_s = time.monotonic() + MOVE_S
    while not job.ended_already and time.monotonic() < give_up_s:
        time.sleep(LOOK_S)
        job = client.job(job.id)
    if job.phase != "done":
        story = "\n".join(f"{step.time} {step.phase}: {step.text}" for step in job.story)
        raise RuntimeError(f"the move is {job.phase} after {MOVE_S} s:\n{story}")
    return job


def _entered_s(job: Job, phase: str) -> float:
    """Return the time of day at which a job entered a phase."""
    told = next(step.time for step in job.story if step.phase == phase)
    return datetime.datetime.fromisoformat(told).timestamp()


@contextlib.contextmanager
def _moving(folder: Path, where: str, size: int) -> Iterator[tuple[Path, str, Path]]:
    """A disk `vm` on a local file, and a target; yields control socket, target, NBD socket."""
    encrypted = where == "encrypted"
    with (
        _samba(folder, encrypted=encrypted) as samba,
        _mirrord(folder, samba, encrypted=encrypted) as control,
    ):
        copy, target = folder / "vm.raw", samba.folder() / "moved.raw"
        shutil.copyfile(make_disk(folder, size, 1.0), copy)
        socket = attach(control, "vm", copy)
        try:
            yield control, str(target) if where == "local" else samba.url(target.name), socket
        finally:
            run("rm", "-f", copy, target)


def _live(where: str) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        with _moving(folder, where, MOVED_BYTES) as (control, target, socket):
            client, memory = Client(control), had_memory(MOVED_BYTES)
            with _load(socket, "vm", "--rate", str(MOVE_RATE)) as measured:
                time.sleep(QUIET_S)
                began_s = time.time()
                time.sleep(QUIET_S)
                memory.close()
                job = _move(client, "vm", target)
        before = [took for at, took, _ in measured if began_s < at < began_s + QUIET_S]
        first_s, last_s = _entered_s(job, "copying"), _entered_s(job, "cutting-over")
        during = [took for at, took, _ in measured if first_s < at < last_s]
        return {
            "p99 without a move": quantile_ms(before, 0.99),
            "p50 before the commit": quantile_ms(during, 0.5),
            "p99 before the commit": quantile_ms(during, 0.99),
            "p99.9 before the commit": quantile_ms(during, 0.999),
            "the move took": 1000 * (last_s - first_s),
        }

    return measure


def _pause(where: str) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        pauses = []
        with _moving(folder, where, PAUSED_BYTES) as (control, target, socket):
            client = Client(control)
            with _load(socket, "vm", "--rate", str(PAUSE_RATE), "--reads", "0.5"):
                for _ in range(PAUSES):
                    pauses.append((_move(client, "vm", target).pause_ms or 0) / 1000)
                    _move(client, "vm", str(folder / "vm.raw"))
        return {
            "p50": quantile_ms(pauses, 0.5),
            "p99": quantile_ms(pauses, 0.99),
            "most": quantile_ms(pauses, 1),
        }

    return measure


def _beside(copy: str, rate: int = CALM_RATE) -> Measure:
    """A guest on the share, and a copy to the same server: of another disk, or of its own."""

    def measure(folder: Path) -> dict[str, float]:
        with _samba(folder) as samba, _mirrord(folder, samba, encrypted=False) as control:
            disk = make_disk(samba.folder(), COPIED_BYTES, 1.0)
            mine, other = samba.folder() / "vm.raw", folder / "other.raw"
            target = samba.folder() / "moved.raw"
            shutil.copyfile(disk, mine)
            socket = attach(control, "vm", samba.url(mine.name))
            if copy == "other":
                shutil.copyfile(disk, other)
                attach(control, "other", other)
            client = Client(control)
            options = ("--rate", str(rate), "--reads", "0.5", "--closed")
            memory = had_memory(COPIED_BYTES)
            with _load(socket, "vm", *options) as measured:
                time.sleep(QUIET_S)
                memory.close()
                first_s = time.time()
                if copy == "none":
                    time.sleep(CALM_S)
                    last_s = time.time()
                else:
                    moved = "vm" if copy == "own" else "other"
                    job = _move(client, moved, samba.url(target.name))
                    first_s, last_s = _entered_s(job, "copying"), _entered_s(job, "cutting-over")
            run("rm", "-f", mine, other, target)
        during = [(took, read) for at, took, read in measured if first_s < at < last_s]
        figures: dict[str, float] = {}
        for word, wanted in (("read", 1), ("write", 0)):
            took = [took for took, read in during if read == wanted]
            figures |= {
                f"{word} p50": quantile_ms(took, 0.5),
                f"{word} p99": quantile_ms(took, 0.99),
            }
        return figures | {"it took": 1000 * (last_s - first_s)}

    return measure


_CLIENTS = {
    "mirrord": "mirrord",
    "libsmbclient": "libsmbclient",
    "smbprotocol": "smbprotocol",
    "smbprotocol, pipelined": "smbprotocol-pipelined",
}

ALL: dict[str, Scenario] = {
    "smb-sequential": Scenario(
        "2 GiB of a file on a share in requests of 1 MiB, depth 4 where the peer can, signed",
        "MB/s",
        {
            shown: _peer(name, "sequential", SEQUENTIAL_BYTES)
            for shown, name in ({**_CLIENTS, "mirrord, a target": "mirrord-target"}).items()
        },
        in_memory=True,
        rounds=ROUNDS,
        targets=(
            Target("write*", ("libsmbclient",), least=1.5),
            Target("write*", ("smbprotocol",), least=2),
            Target("read*", ("libsmbclient",), least=1),
        ),
    ),
    "smb-random": Scenario(
        "4 KiB anywhere in a file on a share, depth 16 where the peer can, signed",
        "requests a second",
        {shown: _peer(name, "random", DISK_BYTES) for shown, name in _CLIENTS.items()},
        in_memory=True,
        rounds=ROUNDS,
        targets=(
            Target("*", ("smbprotocol", "smbprotocol, pipelined"), least=8),
            Target("*", least=20_000),
        ),
    ),
    "smb-guest": Scenario(
        "a disk on a share over NBD on a unix socket, warm",
        "requests a second",
        {
            "on a share": _guest("share"),
            "on an encrypted share": _guest("encrypted"),
            "on a local file": _guest("local"),
        },
        in_memory=True,
        rounds=ROUNDS,
        targets=(Target("*", least=15_000, subject="on a share"),),
    ),
    "smb-move": Scenario(
        f"writes of a guest, {MOVE_RATE} a second, while its disk is moved",
        "milliseconds",
        {
            "to a share": _live("share"),
            "to an encrypted share": _live("encrypted"),
            "to a local file": _live("local"),
        },
        in_memory=True,
        small_pages=True,
        rounds=ROUNDS,
        less_is_better=("*",),
        targets=(
            Target("p99 before the commit", ("to a local file",), most=1.3, subject="to a share"),
        ),
    ),
    "smb-pause": Scenario(
        f"pause of a guest at the cutover, of {PAUSES} moves under {PAUSE_RATE} requests a second",
        "milliseconds",
        {
            "onto a share": _pause("share"),
            "onto an encrypted share": _pause("encrypted"),
            "onto a local file": _pause("local"),
        },
        in_memory=True,
        small_pages=True,
        rounds=1,
        less_is_better=("*",),
        targets=(Target("p99", most=50, subject="onto a share"),),
    ),
    "smb-beside": Scenario(
        f"4 KiB, one at a time, {CALM_RATE} a second or at once, beside a copy to the same server",
        "milliseconds",
        {
            "no copy": _beside("none"),
            "another disk's copy": _beside("other"),
            "its own disk's copy": _beside("own"),
            "no copy, at once": _beside("none", AT_ONCE),
            "another's, at once": _beside("other", AT_ONCE),
            "its own, at once": _beside("own", AT_ONCE),
        },
        in_memory=True,
        small_pages=True,
        rounds=ROUNDS,
        less_is_better=("*",),
        targets=(Target("* p99", most=1.5, subject="another's, at once"),),
    ),
}
