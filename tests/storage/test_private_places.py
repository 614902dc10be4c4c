"""Folders that are a service's own, and go with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import FileIo
from tests.helpers import require_root
from tests.storage.conformance import pattern
from tests.storage.places import make_file, run
from tests.storage.test_file_place import SIZE, refusal_of


@pytest.mark.root
@pytest.mark.parametrize("private", [True, False])
async def test_a_folder_that_ends_with_the_service(
    some_io: FileIo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    private: bool,
) -> None:
    """What systemd mounts for PrivateTmp=yes, in which a moved disk once was lost."""
    require_root()
    source = await FilePlace(str(make_file(tmp_path / "vm.raw", pattern(SIZE))), some_io).open()
    folder = tmp_path / ("systemd-private-0123-mirrord.service-abcd" if private else "shared")
    (folder / "tmp/deep").mkdir(parents=True)
    make_file(folder / "tmp/deep/there.raw", pattern(SIZE))
    (tmp_path / "tmp").mkdir()
    run("mount", "--bind", str(folder / "tmp"), str(tmp_path / "tmp"))
    try:
        target = FilePlace(f"{tmp_path}/tmp/deep/", some_io)
        await target.check_target(source, needed=0)  # by hand, whoever sees it as /tmp
        monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/mirrord")
        target = FilePlace(f"{tmp_path}/tmp/deep/", some_io)
        there = FilePlace(f"{tmp_path}/tmp/deep/there.raw", some_io)
        if private:
            for refused in (target.check_target(source, needed=0), there.open()):
                refusal = await refusal_of(refused)
                assert refusal.code == "private-place"
                assert f"lies in {tmp_path}/tmp, which is the service's own" in str(refusal)
        else:
            await target.check_target(source, needed=0)
            await (await there.open()).close()
        del target, there  # a directory is held, and couldn't be unmounted
    finally:
        await source.close()
        run("umount", "--lazy", str(tmp_path / "tmp"))
