"""Locations below a root: no name in it leads out, whoever changes what, and when."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from mirrord.errors import RefusedError
from mirrord.storage.backend import Backend, Cache
from mirrord.storage.file_place import FilePlace
from mirrord.storage.fileio import FileIo
from tests.storage.conformance import pattern
from tests.storage.places import make_file

JOB = "0d4fbd9c-7a52-4f7c-9d2b-5e1c8f6a3b70"
PART = f".new.raw.mirrord-{JOB}.part"
TRIES = 300

# Exchanges two names for ever: each is the directory half of the time, and a link out otherwise.
SWAPPING = """
import ctypes, sys
swap = ctypes.CDLL(None).renameat2
one, other = (word.encode() for word in sys.argv[1:])
print("swapping", flush=True)
while swap(-100, one, -100, other, 2) == 0:
    pass
"""


class Tree:
    """A root with a directory and a link out of it; both ends have a disk of the same name."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.inside = self.root / "d"
        self.outside = folder / "outside"
        for each in (self.inside, self.outside):
            each.mkdir(parents=True)
            make_file(each / "vm.raw", pattern(MIB))
        (self.root / "link").symlink_to(self.outside)

    def place(self, location: str, io: FileIo, *, rooted: bool = True) -> FilePlace:
        """Return a place below the root."""
        return FilePlace(f"{self.root}/{location}", io, root=str(self.root) if rooted else None)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Have somebody exchange the directory for the link, again and again."""
        words = [sys.executable, "-c", SWAPPING, str(self.inside), str(self.root / "link")]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as swapping:
            assert swapping.stdout is not None
            swapping.stdout.readline()
            try:
                yield
            finally:
                assert swapping.poll() is None, "it goes on until it is ended"
                swapping.kill()
                swapping.wait()
                if self.inside.is_symlink():
                    self.inside.unlink()
                    (self.root / "link").rename(self.inside)
                    (self.root / "link").symlink_to(self.outside)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Make the tree."""
    return Tree(tmp_path)


@pytest.fixture
async def source(tmp_path: Path, some_io: FileIo):
    """A disk that is to be moved, open."""
    opened = await FilePlace(str(make_file(tmp_path / "new.raw", pattern(MIB))), some_io).open()
    yield opened
    await opened.close()


async def code_of(awaitable) -> str:
    """Return the code of the refusal, which has to be one line."""
    with pytest.raises(RefusedError) as caught:
        await awaitable
    assert "\n" not in str(caught.value)
    return caught.value.code


async def check(place: FilePlace, source: Backend) -> None:
    """Look whether a target can be made there."""
    await place.check_target(source, needed=0)


class TestWithoutARace:
    """What is found below a root, and what isn't."""

    async def test_a_disk(self, tree: Tree, some_io: FileIo) -> None:
        place = tree.place("d/vm.raw", some_io)
        backend = await place.open()
        assert place.location == str(tree.inside / "vm.raw")
        await backend.close()

    @pytest.mark.parametrize("root", ["/", "the folder itself"])
    async def test_other_roots(self, tree: Tree, some_io: FileIo, root: str) -> None:
        root = str(tree.inside) if root != "/" else root
        backend = await FilePlace(str(tree.inside / "vm.raw"), some_io, root=root).open()
        await backend.close()

    @pytest.mark.parametrize(
        ("location", "code"),
        [
            ("link/vm.raw", "leaves-root"),
            ("../outside/vm.raw", "leaves-root"),
            ("missing.raw", "location-missing"),
            ("no/vm.raw", "location-missing"),
            ("d", "is-directory"),
        ],
    )
    async def test_no_disk(self, tree: Tree, some_io: FileIo, location: str, code: str) -> None:
        assert await code_of(tree.place(location, some_io).open()) == code

    async def test_a_link_instead_of_a_disk(self, tree: Tree, some_io: FileIo) -> None:
        (tree.root / "vm.raw").symlink_to("d/vm.raw")
        assert await code_of(tree.place("vm.raw", some_io).open()) == "not-a-disk"

    async def test_a_link_instead_of_the_root(
        self, tree: Tree, some_io: FileIo, source: Backend
    ) -> None:
        tree.root.rename(tree.root.with_name("was"))
        tree.root.symlink_to("was")
        assert await code_of(tree.place("d/vm.raw", some_io).open()) == "leaves-root"
        assert await code_of(check(tree.place("d/new.raw", some_io), source)) == "leaves-root"
        target = tree.place("d/new.raw", some_io)
        assert await code_of(target.create(JOB, source, cache=Cache.WRITEBACK)) == "leaves-root"

    async def test_a_magic_link(self, tree: Tree, some_io: FileIo) -> None:
        outside = os.open(tree.outside, os.O_RDONLY)
        place = FilePlace(f"/proc/self/fd/{outside}/vm.raw", some_io, root="/proc")
        assert await code_of(place.open()) == "leaves-root"
        os.close(outside)

    @pytest.mark.parametrize("location", ["d/new.raw", "d/", "d", "", "new.raw"])
    async def test_a_target(
        self, tree: Tree, some_io: FileIo, source: Backend, location: str
    ) -> None:
        place = tree.place(location, some_io)
        await check(place, source)
        await (await place.create(JOB, source, cache=Cache.WRITEBACK)).close()
        await place.publish(JOB)
        folder = tree.inside if location.startswith("d") else tree.root
        assert place.location == str(folder / "new.raw")
        assert (folder / "new.raw").stat().st_size == MIB

    @pytest.mark.parametrize(
        ("location", "code"),
        [
            ("link/new.raw", "leaves-root"),
            ("link/", "leaves-root"),
            ("link", "leaves-root"),
            ("../outside/", "leaves-root"),
            ("../outside/new.raw", "leaves-root"),
            ("no/", "directory-missing"),
            ("no/new.raw", "directory-missing"),
            ("d/vm.raw", "target-exists"),
        ],
    )
    async def test_no_target(
        self, tree: Tree, some_io: FileIo, source: Backend, location: str, code: str
    ) -> None:
        assert await code_of(check(tree.place(location, some_io), source)) == code
        assert os.listdir(tree.outside) == ["vm.raw"]


async def outcomes(attempt: Callable[[], Awaitable[object]]) -> set[object]:
    """Try TRIES times, and on until it came out in two ways: then the race was met."""
    found: list[object] = []
    while len(found) < TRIES or (len(set(found)) < 2 and len(found) < 50 * TRIES):
        try:
            found.append(await attempt())
        except RefusedError as error:
            found.append(error.code)
        except OSError as error:
            found.append(error.errno)
    return set(found)


class TestWithARace:
    """The same while somebody exchanges the directory for a link out of the root."""

    @pytest.mark.parametrize("rooted", [True, False])
    async def test_a_disk(self, tree: Tree, some_io: FileIo, rooted: bool) -> None:
        """Without a root the very same tries do get out: the race is real."""
        inside, outside = ((d / "vm.raw").stat().st_ino for d in (tree.inside, tree.outside))

        async def attempt() -> int:
            backend = await tree.place("d/vm.raw", some_io, rooted=rooted).open()
            await backend.close()
            return backend.identity.inode

        with tree.swapped():
            found = await outcomes(attempt)
        if rooted:
            assert found == {inside, "leaves-root"}
        else:
            assert {inside, outside} <= found

    async def test_a_target(self, tree: Tree, some_io: FileIo, source: Backend) -> None:
        """Made and published inside or not at all; another life discards nothing elsewhere."""
        make_file(tree.outside / PART, b"somebody's")
        make_file(tree.outside / "new.raw", b"somebody's")
        before = sorted(tree.outside.iterdir()), tree.outside.stat().st_mtime_ns

        async def make() -> str:
            place = tree.place("d/new.raw", some_io)
            await check(place, source)
            await (await place.create(JOB, source, cache=Cache.WRITEBACK)).close()
            await place.publish(JOB)
            await place.confirm(JOB, source.identity)
            await place.withdraw(JOB)
            await place.discard(JOB)
            return "made"

        async def discard() -> None:
            await tree.place("d/new.raw", some_io).discard(JOB)

        with tree.swapped():
            assert await outcomes(make) == {"made", "leaves-root"}
            assert await outcomes(discard) == {None, errno.ELOOP}
        assert (sorted(tree.outside.iterdir()), tree.outside.stat().st_mtime_ns) == before
        assert sorted(os.listdir(tree.inside)) == ["vm.raw"]

    async def test_a_source(self, tree: Tree, some_io: FileIo) -> None:
        """Deleted inside or kept, never elsewhere, even where the file there is the same one."""
        kept = tree.outside / "old.raw"
        kept.hardlink_to(make_file(tree.inside / "old.raw", pattern(MIB)))
        backend = await tree.place("d/old.raw", some_io).open()
        await backend.close()
        (tree.inside / "old.raw").unlink()

        async def retire() -> str | None:
            place = tree.place("d/old.raw", some_io)
            why = await place.retire(JOB, backend.identity)
            await place.delete_retired(JOB, backend.identity)
            return why and "kept"

        with tree.swapped():
            assert await outcomes(retire) <= {None, "kept", errno.ELOOP}
        assert kept.exists()
