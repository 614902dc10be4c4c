"""One disk, met by real clients at four moments of a move.

`served` is made once a moment and worker: every client test runs against it, and the end of the
moment finishes the move and compares the target with what the clients were served last. So each
client is tested for what it sees, and for what its writes become.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.helpers import require_program

MIB = 1 << 20
SIZE_BYTES = 48 * MIB
NAME = "vm"
MOMENTS = ("before", "copying", "mirroring", "after")


@dataclass
class Served:
    """The disk as it is served at one moment."""

    daemon: Daemon
    moment: str
    folder: Path
    target: Path

    @property
    def uri(self) -> str:
        """Return the disk's NBD address."""
        return f"nbd+unix:///{NAME}?socket={self.socket}"

    @property
    def socket(self) -> str:
        """Return the path of the disk's NBD socket."""
        return self.daemon.nbd_socket(NAME)

    def phase(self) -> str:
        """Return the phase of the disk's job; empty when it has none."""
        jobs = self.daemon.json("jobs", NAME)
        return str(jobs[0]["phase"]) if jobs else ""

    def run(self, *words: str, timeout_s: float = 60) -> str:
        """Run a client, which has to succeed; return what it printed."""
        done = subprocess.run(
            [require_program(words[0]), *words[1:]],
            capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}\n{self.daemon.log()}"
        return done.stdout

    def content(self) -> str:
        """Return a digest of the disk as it is served now."""
        copy = self.folder / "content.raw"
        self.run("qemu-img", "convert", "-f", "raw", "-O", "raw", self.uri, str(copy))
        return digest(copy)


def digest(path: Path) -> str:
    """Return a digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def make_disk(path: Path) -> None:
    """Make a sparse disk with data in some places and holes in the others."""
    chance = random.Random(7)
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
        for offset in range(0, SIZE_BYTES, 4 * MIB):
            file.seek(offset + 4096 * chance.randrange(64))
            file.write(chance.randbytes(MIB))


@pytest.fixture(scope="module", params=MOMENTS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Serve the disk at one moment of its move, and check the move's result at the end."""
    daemon, folder = Daemon(), tmp_path_factory.mktemp("interop")
    try:
        one = Served(daemon, request.param, folder, folder / "target.raw")
        make_disk(folder / "source.raw")
        daemon.start()
        daemon.attach(NAME, folder / "source.raw")
        reach(one)
        yield one
        finish(one)
        assert not daemon.unannounced()
    finally:
        daemon.close()


def reach(served: Served) -> None:
    """Bring the move to the moment."""
    daemon, target = served.daemon, served.target
    if served.moment == "copying":
        # slow enough to be copying through all tests of this moment
        daemon.move(NAME, target, "--limit", "64KiB")
        daemon.wait(NAME, "copying")
    elif served.moment == "mirroring":
        daemon.move(NAME, target, "--mode", "mirror", "--cutover", "manual")
        daemon.wait(NAME, "mirroring")
    elif served.moment == "after":
        daemon.move(NAME, target)
        daemon.wait(NAME)


def finish(served: Served) -> None:
    """End the move from wherever it is; the target holds what was served last."""
    daemon, moment = served.daemon, served.moment
    content = served.content()
    if moment == "before":
        daemon.move(NAME, served.target)
    elif moment == "copying":
        assert served.phase() in ("copying", "catching-up")
        daemon.json("limit", NAME, "4GiB")
    elif moment == "mirroring":
        daemon.json("cutover", NAME)
    daemon.wait(NAME)
    assert digest(served.target) == content, "the target differs from what was served"
    assert not (served.folder / "source.raw").exists(), "the source is still there"
    assert served.content() == content, "the disk reads otherwise after the move"
