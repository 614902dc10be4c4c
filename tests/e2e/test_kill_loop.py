"""Random kills of disk processes and daemon while a disk moves under a writer.

Nothing acknowledged is lost, and the move resumes instead of starting again. Each run is a
function of its seed as far as processes allow; `MIRRORD_KILL_SEED` runs another one, and
`MIRRORD_KILLS` more of them.
"""

from __future__ import annotations

import json
import os
import random
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
# What a kill may add to what is left: what was in flight, and what the writer wrote meanwhile.
AGAIN_MAX_BYTES = 24 * MIB
# So slow that all kills fall into the bulk pass, on a busy machine too; each process starts with a
# burst of some MiB beside it.
LIMIT = "1MiB"


def make_disk(path: Path) -> bytes:
    """Fill a disk with data, no hole, so that each byte has to be copied; return the content."""
    content = random.Random(3).randbytes(SIZE_BYTES)
    path.write_bytes(content)
    return content


def remaining(daemon: Daemon, job_id: str) -> int:
    """Return how many bytes are left to copy, as soon as somebody can tell."""

    def ask() -> int | None:
        done = daemon.run("job", job_id, "--json")
        if done.returncode != 0:
            return None
        job = json.loads(done.stdout)
        return None if job["phase"] == "queued" else int(job["bytes_remaining"])

    return eventually(lambda: (ask() or 0) + 1, what="the job tells what remains") - 1


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


@pytest.mark.fault(1)
@pytest.mark.parametrize("mode", ["auto", "mirror"])
def test_no_acknowledged_write_is_lost_and_the_move_resumes(
    daemon: Daemon, tmp_path: Path, mode: str
) -> None:
    daemon.expect_log("disk-process", "disk process", "connection")
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    before = make_disk(source)
    chance = random.Random(f"{SEED} {mode}")
    writer = Writer(daemon.attach("vm", source), "vm", SEED, HOT_BLOCKS)
    writer.start()
    job_id = daemon.move("vm", target, "--limit", LIMIT, "--mode", mode)
    for _ in range(KILLS):
        writer.wait_acknowledged(chance.randint(50, 2000))
        left = remaining(daemon, job_id)
        kill_something(daemon, chance)
        assert remaining(daemon, job_id) <= left + AGAIN_MAX_BYTES, "the move started again"
    writer.wait_acknowledged(100)
    assert daemon.job(job_id)["phase"] not in ("done", "failed"), "the kills came too late"
    daemon.json("limit", "vm", "4GiB")
    daemon.wait("vm")
    writer.wait_acknowledged(100)
    writer.stop()

    job = daemon.job(job_id)
    assert writer.reconnects > 0
    assert job["bytes_copied"] <= COPIED_MAX * SIZE_BYTES, job
    assert not source.exists()
    after = target.read_bytes()
    writer.check(lambda offset, length: after[offset : offset + length])
    for block in range(SIZE_BYTES // BLOCK_BYTES):
        where = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
        assert block in writer.expected or after[where] == before[where], f"block {block}"
