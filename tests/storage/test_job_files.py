"""The real files of a job: what they hold, survive, and refuse to believe."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mirrord.core.bitmap import DirtyBitmap, IntentMap, bitmap_bytes_for, map_bytes_for
from mirrord.core.geometry import GIB, KIB, MIB
from mirrord.core.journal import CAPACITY_BYTES, Kind, Log, append, parse
from mirrord.errors import DamagedError, RefusedError
from mirrord.storage import job_files
from mirrord.storage.job_files import HEADER_BYTES, JobFiles, read_boot_id

SIZE = GIB + 512
MAP = IntentMap(SIZE).content()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "1b4e28ba"
    path.mkdir()
    return path


@pytest.fixture
async def files(directory: Path) -> AsyncIterator[JobFiles]:
    opened = await JobFiles.open(directory, SIZE, "boot")
    yield opened
    await opened.close()


async def reopened(files: JobFiles, directory: Path, boot: str = "boot") -> JobFiles:
    await files.close()
    return await JobFiles.open(directory, SIZE, boot)


def modes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}


async def test_a_new_job_has_an_empty_journal_and_everything_marked(files: JobFiles) -> None:
    assert files.job_id == "1b4e28ba"
    assert await files.read_log() == b""
    assert await files.read_map() is None
    await files.create(MAP)
    assert await files.read_log() == bytes(CAPACITY_BYTES)
    assert await files.read_map() == MAP
    assert len(MAP) == map_bytes_for(SIZE)


async def test_only_private_files_are_made(files: JobFiles, directory: Path) -> None:
    await files.create(MAP)
    assert modes(directory) == dict.fromkeys(("dirty", "lock", "log", "map"), 0o600)


async def test_the_journal_is_allocated_to_its_end(files: JobFiles, directory: Path) -> None:
    await files.create(MAP)
    for name, length in (("log", CAPACITY_BYTES), ("dirty", bitmap_bytes_for(SIZE))):
        assert (directory / name).stat().st_blocks * 512 >= length


async def test_records_survive_reopening(files: JobFiles, directory: Path) -> None:
    await files.create(MAP)
    log = Log()
    for kind in (Kind.PREP, Kind.COMMIT):
        data, after = append(log, kind, {"kind": kind.name})
        await files.write_log(log.end, data)
        log = after
    again = await reopened(files, directory)
    assert parse(await again.read_log()) == log
    await again.close()


async def test_a_page_of_the_map_survives_reopening(files: JobFiles, directory: Path) -> None:
    await files.create(MAP)
    page = bytes(range(256)) * 16
    await files.write_map(0, page, durable=True)
    await files.write_map(0, page[:8], durable=False)
    again = await reopened(files, directory)
    assert await again.read_map() == page
    await again.close()


async def test_creating_again_replaces_an_attempt_without_a_record(files: JobFiles) -> None:
    await files.create(bytes(len(MAP)))
    assert await files.read_map() == bytes(len(MAP))
    await files.create(MAP)
    assert await files.read_map() == MAP


async def test_a_map_of_the_wrong_length_is_not_created(files: JobFiles) -> None:
    with pytest.raises(ValueError, match="bytes"):
        await files.create(b"short")


@pytest.mark.parametrize("length", [0, 100, CAPACITY_BYTES - 1, CAPACITY_BYTES + 1])
async def test_a_journal_of_another_length_is_damaged(
    files: JobFiles, directory: Path, length: int
) -> None:
    await files.create(MAP)
    os.truncate(directory / "log", length)
    with pytest.raises(DamagedError, match="bytes"):
        await files.read_log()


@pytest.mark.parametrize("length", [0, 100, len(MAP) + 1])
async def test_a_map_of_another_length_counts_as_lost(
    files: JobFiles, directory: Path, length: int
) -> None:
    await files.create(MAP)
    os.truncate(directory / "map", length)
    assert await files.read_map() is None


async def test_an_unreadable_map_counts_as_lost(files: JobFiles, directory: Path) -> None:
    (directory / "map").symlink_to("nowhere")
    assert await files.read_map() is None


async def test_reading_writes_what_it_read_once_more_and_makes_file_and_name_durable(
    files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    await files.create(MAP)
    steps: list[str] = []
    fsync, pread, pwrite = os.fsync, os.pread, os.pwrite

    def traced_fsync(descriptor: int) -> None:
        steps.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def traced_pread(descriptor: int, length: int, offset: int) -> bytes:
        steps.append("read")
        return pread(descriptor, length, offset)

    def traced_pwrite(descriptor: int, data: bytes, offset: int) -> int:
        steps.append("write")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(job_files.os, "fsync", traced_fsync)
    monkeypatch.setattr(job_files.os, "pread", traced_pread)
    monkeypatch.setattr(job_files.os, "pwrite", traced_pwrite)
    await files.read_log()
    assert steps == ["read", "read", "write", "sync log", "sync 1b4e28ba"]


async def test_a_failed_sync_of_a_record_is_told(
    files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    await files.create(MAP)

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(job_files.os, "fdatasync", fails)
    with pytest.raises(OSError, match="Input/output"):
        await files.write_log(0, b"x")
    with pytest.raises(OSError, match="Input/output"):
        await files.write_map(0, b"x", durable=True)
    await files.write_map(0, b"x", durable=False)  # needs no sync


async def test_a_cancelled_record_is_written_nevertheless(
    files: JobFiles, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await files.create(MAP)
    started, go_on = threading.Event(), threading.Event()
    fdatasync = os.fdatasync

    def slow(descriptor: int) -> None:
        started.set()
        assert go_on.wait(10)
        fdatasync(descriptor)

    monkeypatch.setattr(job_files.os, "fdatasync", slow)
    writing = asyncio.create_task(files.write_log(0, b"record"))
    assert await asyncio.to_thread(started.wait, 10)
    waiting = asyncio.create_task(files.write_log(4 * KIB, b"next"))
    await asyncio.sleep(0)
    for task in (writing, waiting):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    go_on.set()
    await files.close()
    data = (directory / "log").read_bytes()
    assert data.startswith(b"record")
    assert data[4 * KIB :].startswith(b"next")


async def test_a_second_opener_is_refused(files: JobFiles, directory: Path) -> None:
    with pytest.raises(RefusedError, match="1b4e28ba") as refused:
        await JobFiles.open(directory, SIZE, "boot")
    assert refused.value.code == "in-use"
    again = await reopened(files, directory)
    await again.close()
    await again.close()  # idempotent


async def test_cancelled_opening_leaves_no_lock(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on, closed = threading.Event(), threading.Event(), asyncio.Event()
    really, close = job_files._map_dirty, JobFiles._close

    def slow(*arguments: object) -> object:
        started.set()
        assert go_on.wait(10)
        return really(*arguments)  # type: ignore[arg-type]

    def told(self: JobFiles) -> None:
        close(self)
        closed.set()

    monkeypatch.setattr(job_files, "_map_dirty", slow)
    monkeypatch.setattr(JobFiles, "_close", told)
    opening = asyncio.create_task(JobFiles.open(directory, SIZE, "boot"))
    assert await asyncio.to_thread(started.wait, 10)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    go_on.set()
    async with asyncio.timeout(10):
        await closed.wait()
    await (await JobFiles.open(directory, SIZE, "boot")).close()


async def test_the_dirty_map_is_believed_on_the_same_boot_only(
    files: JobFiles, directory: Path
) -> None:
    assert not files.same_boot
    assert bytes(files.dirty) == b"\xff" * bitmap_bytes_for(SIZE)
    bitmap = DirtyBitmap(SIZE, files.dirty)
    bitmap.reset([(MIB, KIB)])
    files.vouch()
    again = await reopened(files, directory)
    assert again.same_boot
    assert DirtyBitmap(SIZE, again.dirty).runs(0, 2 * MIB) == [
        (0, MIB, False), (MIB, 4 * KIB, True), (MIB + 4 * KIB, MIB - 4 * KIB, False)
    ]  # fmt: skip
    other = await reopened(again, directory, "another boot")
    assert not other.same_boot
    assert bytes(other.dirty) == b"\xff" * bitmap_bytes_for(SIZE)
    await other.close()


async def test_nobody_believes_what_nobody_vouched_for(files: JobFiles, directory: Path) -> None:
    DirtyBitmap(SIZE, files.dirty).clear()
    again = await reopened(files, directory)
    assert not again.same_boot
    assert bytes(again.dirty) == b"\xff" * bitmap_bytes_for(SIZE)
    await again.close()


@pytest.mark.parametrize("boot", ["boot", ""])
async def test_an_unknown_boot_is_never_the_same(directory: Path, boot: str) -> None:
    files = await JobFiles.open(directory, SIZE, "")
    files.vouch()
    await files.close()
    again = await JobFiles.open(directory, SIZE, boot)
    assert not again.same_boot
    await again.close()


async def test_the_dirty_map_of_another_size_is_not_believed(directory: Path) -> None:
    for size in (SIZE, SIZE + 4 * KIB * 8, SIZE + 1):  # the last has a bitmap as long as SIZE's
        files = await JobFiles.open(directory, size, "boot")
        assert not files.same_boot
        assert bytes(files.dirty) == b"\xff" * bitmap_bytes_for(size)
        files.vouch()
        await files.close()


async def test_there_may_be_more_behind_the_bitmap(directory: Path) -> None:
    length = bitmap_bytes_for(SIZE) + 24
    files = await JobFiles.open(directory, SIZE, "boot", dirty_bytes=length)
    assert len(files.dirty) == length
    files.dirty[-1] = 7
    files.vouch()
    await files.close()
    again = await JobFiles.open(directory, SIZE, "boot", dirty_bytes=length)
    assert again.same_boot
    assert again.dirty[-1] == 7
    await again.close()


@pytest.mark.parametrize("position", [0, 20, 60])
async def test_a_damaged_header_is_not_believed(
    files: JobFiles, directory: Path, position: int
) -> None:
    files.vouch()
    await files.close()
    with open(directory / "dirty", "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    again = await JobFiles.open(directory, SIZE, "boot")
    assert not again.same_boot
    assert again.dirty[0] == 0xFF
    await again.close()


async def test_a_bitmap_outlives_close(files: JobFiles, directory: Path) -> None:
    bitmap = DirtyBitmap(SIZE, files.dirty)
    bitmap.clear()
    await files.close()
    bitmap.mark(0, 1)
    assert len(files.dirty) == 0
    assert (directory / "dirty").read_bytes()[HEADER_BYTES] == 1


CHILD = """
import asyncio, sys
from pathlib import Path
from mirrord.core.bitmap import DirtyBitmap
from mirrord.storage.job_files import JobFiles

async def main():
    files = await JobFiles.open(Path(sys.argv[1]), 1 << 30, "boot")
    bitmap = DirtyBitmap(1 << 30, files.dirty)
    bitmap.clear()
    bitmap.mark(8192, 4096)
    files.vouch()
    print("marked", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def mark_and_die(directory: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "marked\n"
        child.kill()


async def test_marks_survive_a_kill(directory: Path) -> None:
    await asyncio.to_thread(mark_and_die, directory)
    files = await JobFiles.open(directory, 1 << 30, "boot")
    assert files.same_boot
    bitmap = DirtyBitmap(1 << 30, files.dirty)
    assert bitmap.remaining() == 4096
    assert bitmap.take(0, MIB) == (8192, 4096)
    await files.close()


def test_the_boot_id_comes_from_the_kernel_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = read_boot_id({})
    assert len(kernels) == 32
    assert read_boot_id({"MIRRORD_BOOT_ID": "AB-cd\n"}) == "abcd"
    monkeypatch.setattr(job_files, "BOOT_ID_FILE", tmp_path / "hidden")
    assert read_boot_id({}) == ""
