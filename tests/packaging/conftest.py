"""Packages and machines for these tests: built once, by whichever worker comes first."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import mirrord
from tests.helpers import require_program, require_root
from tests.packaging.machine import Machine, machine
from tests.style.sources import ROOT

NEWER = "999.0"


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the Debian package as a user does, but quickly compressed."""
    require_program("dpkg-buildpackage")
    require_program("dh")
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    built = ROOT / "build" / f"tested-{run}.deb"
    built.parent.mkdir(exist_ok=True)
    with (ROOT / "build" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker builds it
        if not built.exists():
            for old in built.parent.glob("tested-*.deb"):
                old.unlink()
            done = subprocess.run(
                ["make", "deb", "DEB_ARGUMENTS=-Zzstd -z1"],
                cwd=ROOT, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            (made,) = (ROOT / "dist").glob(f"mirrord_{mirrord.__version__}_*.deb")
            shutil.copy(made, built)
    return built


@pytest.fixture
def newer_package(package: Path, tmp_path: Path) -> Path:
    """Make the package of a newer version: the same one with another number."""
    tree = tmp_path / "newer"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    (init,) = tree.glob("usr/lib/mirrord/lib/python3*/site-packages/mirrord/__init__.py")
    for path in (init, tree / "DEBIAN" / "control"):
        text, count = re.subn(re.escape(mirrord.__version__), NEWER, path.read_text())
        assert count == 1, path
        path.write_text(text)
    made = tmp_path / "newer.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "--build", tree, made], check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    shutil.rmtree(tree)
    return made


@pytest.fixture
def host() -> Iterator[Machine]:
    """Boot a machine of its own for the test."""
    require_root()
    require_program("unshare")
    if not Path("/lib/systemd/systemd").exists():
        pytest.skip("needs the program systemd")
    with machine() as made:
        yield made
