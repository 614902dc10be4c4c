"""libnbd's tools, and the library itself with its client-side checks off."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from tests.interop.conftest import MIB, NAME, SIZE_BYTES, Served, digest

SYSTEM_PYTHON = "/usr/bin/python3"  # the one that Debian's python3-libnbd belongs to


def extents(served: Served, context: str) -> list[dict[str, object]]:
    """Return what `nbdinfo --map` says."""
    printed = served.run("nbdinfo", f"--map={context}", "--json", served.uri)
    found: list[dict[str, object]] = json.loads(printed)
    return found


def test_nbdinfo_lists_the_export(served: Served) -> None:
    printed = served.run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={served.socket}")
    exports = json.loads(printed)["exports"]
    assert [export["export-name"] for export in exports] == [NAME]
    assert exports[0]["export-size"] == SIZE_BYTES


def test_nbdinfo_finds_every_feature(served: Served) -> None:
    info = json.loads(served.run("nbdinfo", "--no-content", "--json", served.uri))
    export = info["exports"][0]
    assert info["protocol"] == "newstyle-fixed"
    assert info["structured"] is True
    assert {"base:allocation", "mirrord:dirty"} <= set(export["contexts"])
    for feature in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{feature}"] is True, feature
    assert export["is_read_only"] is False
    assert export["block_size_maximum"] == 32 * MIB


def test_nbdinfo_maps_allocation_to_the_end(served: Served) -> None:
    found = extents(served, "base:allocation")
    assert sum(int(str(extent["length"])) for extent in found) == SIZE_BYTES
    assert {extent["type"] for extent in found} >= {0}  # some data


def test_nbdinfo_maps_what_differs_from_the_target(served: Served) -> None:
    found = extents(served, "mirrord:dirty")
    assert sum(int(str(extent["length"])) for extent in found) == SIZE_BYTES
    dirty = sum(int(str(extent["length"])) for extent in found if extent["type"])
    if served.moment == "copying":
        assert dirty > 0
    if served.moment == "after":
        assert dirty == 0


def test_nbdcopy_reads_over_several_connections(served: Served, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    served.run("nbdcopy", "--connections=4", "--requests=16", served.uri, str(copy))
    assert digest(copy) == served.content()


def test_nbdcopy_writes_over_several_connections(served: Served, tmp_path: Path) -> None:
    pattern = tmp_path / "pattern.raw"
    chance = random.Random(served.moment)
    with pattern.open("wb") as file:
        file.truncate(SIZE_BYTES)
        for _ in range(12):
            file.seek(chance.randrange(SIZE_BYTES - MIB))
            file.write(chance.randbytes(chance.randrange(MIB)))
    served.run("nbdcopy", "--connections=4", "--flush", str(pattern), served.uri)
    assert served.content() == digest(pattern)


# What the server has to answer to a client that breaks the rules: rule N12 of the protocol
# document's error table, as errno names. None: it has to succeed.
MISUSE = [
    ("h.pread(512, size)", "EINVAL"),
    ("h.pread(512, size - 1)", "EINVAL"),
    ("h.pread(512, 2 ** 63)", "EINVAL"),
    ("h.pwrite(b'x' * 512, size - 256)", "ENOSPC"),
    ("h.pwrite(b'x' * 512, 2 ** 64 - 256)", "ENOSPC"),
    ("h.zero(4096, size)", "ENOSPC"),
    ("h.trim(1 << 20, size - 4096)", "EINVAL"),
    ("h.cache(4096, size)", "EINVAL"),
    ("h.block_status(4096, size, lambda *_: 0)", "EINVAL"),
    ("h.pwrite(b'a', 0, 1 << 9)", "EINVAL"),
    ("h.pread(512, 0, 1 << 9)", "EINVAL"),
    ("h.flush(1 << 9)", "EINVAL"),
    ("h.pread(33 << 20, 0)", "EINVAL"),
    ("h.pread(32 << 20, 0)", None),
    ("h.pwrite(bytes(h.pread(32 << 20, 0)), 0)", None),
    ("h.pread(512, 0, nbd.CMD_FLAG_FUA)", None),
    ("h.pread(65536, 7, nbd.CMD_FLAG_DF)", None),
    ("h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE)", None),
]
SCRIPT = """
import json, sys, nbd
uri, size, cases = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(uri)
answers = []
for case in cases:
    try:
        eval(case)
        answers.append(None)
    except nbd.Error as error:
        answers.append(error.errno)
assert h.aio_is_ready(), "the connection broke"
h.shutdown()
print(json.dumps(answers))
"""


def test_misuse_is_answered_by_the_book_and_the_connection_lives(served: Served) -> None:
    probe = subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, timeout=30)
    if probe.returncode != 0:
        pytest.skip("needs the package python3-libnbd")
    cases = [case for case, _ in MISUSE]
    printed = served.run(
        SYSTEM_PYTHON, "-c", SCRIPT, served.uri, str(SIZE_BYTES), json.dumps(cases)
    )
    answers = dict(zip(cases, json.loads(printed), strict=True))
    assert answers == dict(MISUSE)
