"""Random kills of disk processes and daemon while a disk moves under a writer.

Nothing acknowledged is lost, and the move resumes instead of starting again. Each run is a
function of its seed as far as processes allow; `MIRRORD_KILL_SEED` runs another one, and
`MIRRORD_KILLS` more of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.helpers import eventually
from tests.nbd_writer import BLOCK_BYTES, Writer

MIB = 1 << 20
SIZE_BYTES = 128 * MIB
HOT_BLOCKS = 2048  # 8 MiB: what is written again and again adds little to what has to be copied
KILLS = int(os.environ.get("MIRRORD_KILLS", "8"))
SEED = int(os.environ.get("MIRRORD_KILL_SEED", "1"))
COPIED_MAX = 1.5  # times the disk: a move that started again would pass it at the second kill
LIMIT = "12MiB"  # a bulk pass of ten seconds, so that the kills fall into it


def make_disk(path: Path) -> None:
    """Fill a disk with data, no hole: so that each byte has to be copied."""
    chance = random.Random(3)
    with path.open("wb") as file:
        for _ in range(SIZE_BYTES // MIB):
            file.write(chance.randbytes(MIB))


def read_from(path: Path) -> Callable[[int, int], bytes]:
    """Return a function that reads ranges of a file."""
    file = path.open("rb")

    def read(offset: int, length: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    return read


def kill_something(daemon: Daemon, chance: random.Random) -> None:
    """Kill the disk process, the daemon, or both; start the daemon again."""
    victim = chance.choices(["disk", "daemon", "both"], [4, 2, 1])[0]
    if victim in ("daemon", "both"):
        daemon.kill()
    if victim in ("disk", "both"):
        pid = daemon.find_disk_pid("vm")  # none while the last one is being replaced
        if pid is not None:
            daemon.kill_disk("vm")
    if victim in ("daemon", "both"):
        daemon.start()


@pytest.mark.parametrize("mode", ["auto", "mirror"])
def test_no_acknowledged_write_is_lost_and_the_move_resumes(
    daemon: Daemon, tmp_path: Path, mode: str
) -> None:
    daemon.expect_log("disk-process", "disk process", "connection")
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    make_disk(source)
    untouched = read_from(source)  # stays readable after the source is deleted
    chance = random.Random(f"{SEED} {mode}")
    writer = Writer(daemon.attach("vm", source), "vm", SEED, HOT_BLOCKS)
    writer.start()
    job_id = daemon.move("vm", target, "--limit", LIMIT, "--mode", mode)
    for _ in range(KILLS):
        writer.wait_acknowledged(chance.randint(50, 2000))
        kill_something(daemon, chance)
    writer.wait_acknowledged(100)
    assert daemon.job(job_id)["phase"] not in ("done", "failed"), "the kills came too late"
    eventually(lambda: daemon.run("limit", "vm", "4GiB").returncode == 0, what="limit is lifted")
    daemon.wait("vm")
    writer.wait_acknowledged(100)
    writer.stop()

    job = daemon.job(job_id)
    assert writer.reconnects > 0
    assert job["bytes_copied"] <= COPIED_MAX * SIZE_BYTES, job
    assert not source.exists()
    moved = read_from(target)
    writer.check(moved)
    for block in range(SIZE_BYTES // BLOCK_BYTES):
        if block not in writer.expected:
            offset = block * BLOCK_BYTES
            assert moved(offset, BLOCK_BYTES) == untouched(offset, BLOCK_BYTES), f"block {block}"
