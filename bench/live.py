"""Moves of a disk that a guest writes to, beside blockdev-mirror in qemu-storage-daemon."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from bench.loads import LoadFailedError, between, loaded, move, quantile_ms, wait_for_phase
from bench.model import MIB, Measure, MissingPeerError, Scenario, Target, pick
from bench.nbd_load import Measured
from bench.qmp import Qmp, mirror, qemu
from bench.scenarios import DISK_BYTES, SMALL_BYTES, fio, make_disk
from bench.servers import attach, mirrord, run
from mirrord.control.client import Client
from mirrord.control.messages import MoveRequest

LIVE_BYTES, QUICK_LIVE_BYTES = 1024 * MIB, 32 * MIB
LIVE_RATE, QUICK_LIVE_RATE = 3000, 300  # 4 KiB writes a second
QUIET_S = 0.5  # of load before a move
GIVE_UP_S, QUICK_GIVE_UP_S = 120.0, 5.0

LIMIT, QUICK_LIMIT = 40 * MIB, 16 * MIB  # bytes a second, of the move
# Too many for a mirror whose bitmap has 64 KiB a bit: it dirties 62 MiB a second. 4 MiB are new.
CONVERGE_RATE, QUICK_CONVERGE_RATE = 1000, 500
CONVERGE_TIMES, QUICK_CONVERGE_TIMES = 3.0, 2.0  # the ideal time, then a mirror is given up

PAUSED_BYTES = 64 * MIB
PAUSES, QUICK_PAUSES = 100, 3
PAUSE_RATE = 500
LIVE_SHARES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
LIVE_ROWS = "the move, seconds", *(f"guest writes, {word}" for word in LIVE_SHARES)
CONVERGE_ROWS = "seconds", "by S / (B - d)"
HELD_LIMIT = 4096  # bytes a second: a move that is copying and gets nowhere

MODES = {"blockdev-mirror, background": "background", "blockdev-mirror, blocking": "write-blocking"}


def _copy(folder: Path, size: int) -> Path:
    """Return a warm disk of its own, which is on storage: no peer is to write it there first."""
    mine = folder / "vm.raw"
    run("cp", "--reflink=never", make_disk(folder, size, 1.0), mine)
    os.sync()
    return mine


@contextlib.contextmanager
def attached(folder: Path, size: int) -> Iterator[tuple[Client, Path, Path]]:
    """A disk `vm` of mirrord's; yields the client, the NBD socket and a target."""
    mine, target = _copy(folder, size), folder / "moved.raw"
    try:
        with mirrord(folder) as control:
            socket = attach(control, "vm", mine)
            client = Client(control)
            try:
                yield client, socket, target
            finally:
                client.close()
    finally:
        run("rm", "-f", mine, target)


@contextlib.contextmanager
def mirrored(folder: Path, size: int) -> Iterator[tuple[Qmp, Path, Path]]:
    """A disk `disk0` of qemu-storage-daemon's; yields QMP, the NBD socket and a target."""
    mine, target = _copy(folder, size), folder / "moved.raw"
    try:
        with qemu(folder, mine) as (qmp, socket):
            yield qmp, socket, target
    finally:
        run("rm", "-f", mine, target)


def _rows(measured: Measured, first_s: float, last_s: float, took_s: float) -> dict[str, float]:
    during = between(measured, first_s, last_s)
    figures = took_s, *(quantile_ms(during, share) for share in LIVE_SHARES.values())
    return dict(zip(LIVE_ROWS, figures, strict=True))


def _live_mirrord(folder: Path) -> dict[str, float]:
    with (
        attached(folder, pick(LIVE_BYTES, QUICK_LIVE_BYTES)) as (client, socket, target),
        loaded(socket, "vm", "--rate", str(pick(LIVE_RATE, QUICK_LIVE_RATE))) as measured,
    ):
        time.sleep(QUIET_S)
        first_s = time.time()
        job = move(client, "vm", MoveRequest(str(target), keep_source=True, verify="none"))
        last_s = time.time()
    figures = _rows(measured, first_s, last_s, last_s - first_s)
    return figures | {"pause by the job's own figure": job.pause_ms or math.inf}


def _served(peer: Measure) -> Measure:
    """Return a measurement that is left out, and never counts, when the load itself failed."""

    def measure(folder: Path) -> dict[str, float]:
        try:
            return peer(folder)
        except (LoadFailedError, TimeoutError) as error:
            raise MissingPeerError("qemu-storage-daemon", f"can't be compared: {error}") from error

    return measure


def _live_mirror(mode: str) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        size = pick(LIVE_BYTES, QUICK_LIVE_BYTES)
        with (
            mirrored(folder, size) as (qmp, socket, target),
            loaded(socket, "disk0", "--rate", str(pick(LIVE_RATE, QUICK_LIVE_RATE))) as measured,
        ):
            time.sleep(QUIET_S)
            first_s = time.time()
            took_s = mirror(qmp, target, size, mode, pick(GIVE_UP_S, QUICK_GIVE_UP_S))
            last_s = time.time()
        return _rows(measured, first_s, last_s, took_s)

    return _served(measure)


def _converge_bytes() -> int:
    return pick(DISK_BYTES, SMALL_BYTES)


def _ideal_s() -> float:
    """Return S / (B - d): how long a move takes that loses nothing."""
    limit = pick(LIMIT, QUICK_LIMIT)
    return _converge_bytes() / (limit - 4096 * pick(CONVERGE_RATE, QUICK_CONVERGE_RATE))


def _converge_mirrord(folder: Path) -> dict[str, float]:
    rate = str(pick(CONVERGE_RATE, QUICK_CONVERGE_RATE))
    limit = pick(LIMIT, QUICK_LIMIT)
    with (
        attached(folder, _converge_bytes()) as (client, socket, target),
        loaded(socket, "vm", "--rate", rate),
    ):
        began = time.monotonic()
        request = MoveRequest(str(target), keep_source=True, verify="none", limit=limit)
        move(client, "vm", request)
        took_s = time.monotonic() - began
    return dict(zip(CONVERGE_ROWS, (took_s, took_s / _ideal_s()), strict=True))


def _converge_mirror(mode: str) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        rate = str(pick(CONVERGE_RATE, QUICK_CONVERGE_RATE))
        size, limit = _converge_bytes(), pick(LIMIT, QUICK_LIMIT)
        give_up_s = pick(CONVERGE_TIMES, QUICK_CONVERGE_TIMES) * _ideal_s()
        with (
            mirrored(folder, size) as (qmp, socket, target),
            loaded(socket, "disk0", "--rate", rate),
        ):
            took_s = mirror(qmp, target, size, mode, give_up_s, speed=limit)
        return dict(zip(CONVERGE_ROWS, (took_s, took_s / _ideal_s()), strict=True))

    return _served(measure)


def _pauses(folder: Path) -> dict[str, float]:
    pauses_ms = []
    with attached(folder, pick(PAUSED_BYTES, SMALL_BYTES)) as (client, socket, _):
        places = folder / "moved.raw", folder / "vm.raw"
        with loaded(socket, "vm", "--rate", str(PAUSE_RATE), "--reads", "0.5"):
            for number in range(pick(PAUSES, QUICK_PAUSES)):
                job = move(client, "vm", MoveRequest(str(places[number % 2]), verify="none"))
                pauses_ms.append(job.pause_ms or math.inf)
    return {
        "p50": quantile_ms([ms / 1000 for ms in pauses_ms], 0.5),
        "p99": quantile_ms([ms / 1000 for ms in pauses_ms], 0.99),
        "most": max(pauses_ms),
    }


def _tracking(state: str) -> Measure:
    def measure(folder: Path) -> dict[str, float]:
        with attached(folder, pick(DISK_BYTES, SMALL_BYTES)) as (client, socket, target):
            job = None
            if state == "copying":
                request = MoveRequest(str(target), keep_source=True, limit=HELD_LIMIT)
                job = wait_for_phase(client, client.move("vm", request), "copying")
            elif state == "mirroring":
                request = MoveRequest(
                    str(target), keep_source=True, verify="none", mode="mirror", cutover="manual"
                )
                job = wait_for_phase(client, client.move("vm", request), "mirroring")
                time.sleep(pick(QUIET_S * 2, QUIET_S))  # what was there is copied by then
            uri = f"nbd+unix:///vm?socket={socket}"
            figures = {
                f"randwrite 4k, depth {depth}": fio(uri, "randwrite", depth, "4k")
                for depth in (1, 16)
            }
            if job is not None:
                client.steer(job.id, "cancel")
                wait_for_phase(client, client.job(job.id), "cancelled")
        return figures

    return measure


ALL: dict[str, Scenario] = {
    "live": Scenario(
        f"a move under {LIVE_RATE} random 4 KiB writes a second, each due at its time",
        "seconds, and milliseconds of a guest's write",
        {"mirrord": _live_mirrord, **{peer: _live_mirror(mode) for peer, mode in MODES.items()}},
        less_is_better=("*",),
        targets=(
            Target("the move, seconds", tuple(MODES), most=1.0),
            Target("guest writes, p99", tuple(MODES), most=0.5),
        ),
        space_mib=4 * 1024,
    ),
    "converge": Scenario(
        "a move with a limit B under writes that a 64 KiB bitmap can't catch up with",
        "seconds, and as a share of what the limit allows",
        {
            "mirrord": _converge_mirrord,
            **{peer: _converge_mirror(mode) for peer, mode in MODES.items()},
        },
        rounds=3,
        less_is_better=("*",),
        targets=(Target("by S / (B - d)", most=1.5),),
        space_mib=2 * 1024,
    ),
    "pause": Scenario(
        f"pause of a guest at the cutover, of {PAUSES} moves under {PAUSE_RATE} requests a second",
        "milliseconds",
        {"mirrord": _pauses},
        rounds=1,
        less_is_better=("*",),
        targets=(Target("p99", most=10),),
        space_mib=1024,
    ),
    "tracking": Scenario(
        "what a move costs the guest: writes while nothing moves, while a move copies, mirrors",
        "requests a second",
        {
            "not moving": _tracking("idle"),
            "copying": _tracking("copying"),
            "mirroring": _tracking("mirroring"),
        },
        targets=(
            Target("*", ("not moving",), least=0.97, subject="copying"),
            Target("*", ("not moving",), least=0.6, subject="mirroring"),
        ),
        space_mib=2 * 1024,
    ),
}
