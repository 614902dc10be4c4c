"""QEMU's tools against the export: the client that matters most."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.helpers import require_program
from tests.interop.conftest import MIB, SIZE_BYTES, Served, digest


def qemu_io(served: Served, *commands: str) -> str:
    """Run qemu-io commands in one connection; return what they printed."""
    words = [word for command in commands for word in ("-c", command)]
    printed = served.run("qemu-io", "-f", "raw", *words, served.uri)
    assert "failed" not in printed, printed
    return printed


def test_qemu_io_reads_back_what_it_wrote_at_any_alignment(served: Served) -> None:
    qemu_io(
        served,
        "write -P 0x11 1M 1M",
        "write -P 0x22 1049087 1025",  # across blocks, aligned to nothing
        "write -f -P 0x33 1100001 7",
        "flush",
        "read -P 0x11 1M 511",
        "read -P 0x22 1049087 1025",
        "read -P 0x33 1100001 7",
        f"write -P 0x44 {SIZE_BYTES - 3} 3",
        f"read -P 0x44 {SIZE_BYTES - 3} 3",
    )


def test_qemu_io_sees_zeroes_where_it_zeroed_and_discarded(served: Served) -> None:
    qemu_io(
        served,
        "write -P 0x55 2M 2M",
        "write -z 2M 64k",
        "write -z -u 2162688 64k",
        "write -z 2228227 5001",
        "discard 2400k 256k",
        "flush",
        "read -P 0 2M 128k",
        "read -P 0 2228227 5001",
        "read -P 0x55 3M 1M",
    )


def test_qemu_io_keeps_many_writes_in_flight(served: Served) -> None:
    writes = [f"aio_write -q -P {n + 1} {8 * MIB + n * 40000} 40000" for n in range(32)]
    reads = [f"read -q -P {n + 1} {8 * MIB + n * 40000} 40000" for n in range(32)]
    qemu_io(served, *writes, "aio_flush", *reads)


def test_qemu_img_info_tells_the_size(served: Served) -> None:
    info = json.loads(served.run("qemu-img", "info", "--output=json", "-f", "raw", served.uri))
    assert info["virtual-size"] == SIZE_BYTES


def test_qemu_img_map_covers_the_disk_and_knows_the_holes(served: Served) -> None:
    printed = served.run("qemu-img", "map", "--output=json", "-f", "raw", served.uri)
    extents = json.loads(printed)
    ends = [0] + [extent["start"] + extent["length"] for extent in extents]
    assert [extent["start"] for extent in extents] == ends[:-1]
    assert ends[-1] == SIZE_BYTES
    holes = sum(extent["length"] for extent in extents if extent["zero"])
    assert holes > SIZE_BYTES // 4


def test_qemu_img_converts_and_compares(served: Served, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    served.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, str(copy))
    printed = served.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", served.uri, str(copy))
    assert "identical" in printed


def test_qemu_img_converts_onto_the_export(served: Served, tmp_path: Path) -> None:
    pattern, copy = tmp_path / "pattern.raw", tmp_path / "copy.raw"
    with pattern.open("wb") as file:
        file.truncate(SIZE_BYTES)
        file.seek(5 * MIB + 512)
        file.write(b"onto the export" * 70_000)
    served.run(
        "qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw",
        str(pattern), served.uri,
    )  # fmt: skip
    served.run("qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri, str(copy))
    assert digest(copy) == digest(pattern)


def test_qemu_img_bench_completes(served: Served) -> None:
    bench = ["qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096"]
    assert "Run completed" in served.run(*bench, served.uri)
    writing = [*bench, "-w", "--flush-interval=64", "--pattern=119", "-o", str(16 * MIB)]
    assert "Run completed" in served.run(*writing, served.uri)
    qemu_io(served, "read -P 119 16M 4M")


def test_two_processes_see_each_others_writes(served: Served) -> None:
    qemu_io(served, "write -P 0x66 24M 64k")
    assert require_program("qemu-io")
    printed = qemu_io(served, "read -v -P 0x66 24M 16")
    assert re.search(r"(66 ){16}", printed)
