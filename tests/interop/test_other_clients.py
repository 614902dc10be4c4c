"""fio, which verifies what it wrote, and nbd-client's handshake."""

from __future__ import annotations

import json

from tests.interop.conftest import MIB, NAME, Served


def test_fio_finds_all_that_it_wrote(served: Served) -> None:
    printed = served.run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randrw",
        "--bsrange=512-64k", f"--offset={32 * MIB}", f"--size={12 * MIB}", "--iodepth=16",
        "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=5",
        "--output-format=json",
    )  # fmt: skip
    job = json.loads(printed[printed.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 100


def test_nbd_client_lists_the_export(served: Served) -> None:
    printed = served.run("nbd-client", "-l", "-unix", served.socket)
    assert NAME in printed.split()
