"""Programs that read and write a file on a share, each measured in a process of its own.

    python -m bench.smb_peers PEER sequential|random   with an `Errand` as JSON on standard input

Every peer does the same on the same file: `transfer` has one request after another done, up to
`depth` at a time where the peer can, and ends when all were answered. The time of writes includes
a flush, where the peer has one. Figures are printed as JSON.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import random
import sys
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvloop

MIB = 1 << 20
BLOCK_BYTES = 4096
RANDOM_S = 2.0
SEQUENTIAL_DEPTH, RANDOM_DEPTH = 4, 16


class Errand(msgspec.Struct):
    """Where the file is, and who asks."""

    host: str
    port: int
    share: str
    name: str
    size: int
    user: str
    password: str
    encrypted: bool


class Peer(ABC):
    """A file on a share, open."""

    @abstractmethod
    def transfer(self, offsets: Iterator[int], length: int, depth: int, *, write: bool) -> None:
        """Read or write `length` bytes at each offset."""

    def flush(self) -> None:
        """Make what was written durable at the server, where that can be asked for."""
        return


class Mirrord(Peer):
    """The backend as a disk process has it: on uvloop, what is there at the start frozen.

    A guest's disk (`authoritative`) keeps every write until it is flushed. A move's target doesn't,
    and has little in flight, so that others who use the server wait little.
    """

    def __init__(self, errand: Errand, *, authoritative: bool = True) -> None:
        from mirrord.service.places import PlaceFactory
        from mirrord.service.shares import ShareConfig

        descriptor, name = tempfile.mkstemp()  # mode 0600, which is asked for
        with os.fdopen(descriptor, "w") as credential:
            credential.write(errand.password)
        weak: Any = {} if errand.encrypted else {"encryption": "allow-plaintext"}
        config = ShareConfig(credential=name, user=errand.user, **weak)
        where = f"{errand.host}:{errand.port}/{errand.share}"
        places = PlaceFactory({where: config})
        self._loop = uvloop.new_event_loop()
        asyncio.set_event_loop(self._loop)
        try:
            place = places.make(f"smb://{errand.user}@{where}/{errand.name}")
            self._disk = self._loop.run_until_complete(place.open())
        finally:
            os.unlink(name)
        self._disk.authoritative = authoritative
        gc.collect()
        gc.freeze()

    def transfer(self, offsets: Iterator[int], length: int, depth: int, *, write: bool) -> None:
        disk, data = self._disk, os.urandom(length)
        ours = disk.authoritative
        put, get = (disk.write, disk.read) if ours else (disk.write_once, disk.read_once)

        async def work() -> None:
            for offset in offsets:
                if write:
                    await put(offset, data)
                else:
                    await get(offset, length)

        async def works() -> None:
            await asyncio.gather(*(work() for _ in range(depth)))

        self._loop.run_until_complete(works())

    def flush(self) -> None:
        self._loop.run_until_complete(self._disk.flush())


class LibSmbClient(Peer):
    """Samba's own library, by its file interface: one request at a time."""

    def __init__(self, errand: Errand) -> None:
        home = tempfile.mkdtemp()
        os.environ["HOME"] = home
        settings = Path(home, ".smb", "smb.conf")
        settings.parent.mkdir()
        settings.write_text(
            "[global]\nclient signing = required\nclient min protocol = SMB3_11\n"
            f"client smb encrypt = {'required' if errand.encrypted else 'off'}\n"
        )
        self._library = library = ctypes.CDLL("libsmbclient.so.0", use_errno=True)
        library.smbc_lseek.argtypes = [ctypes.c_int, ctypes.c_longlong, ctypes.c_int]
        library.smbc_lseek.restype = ctypes.c_longlong
        for name in ("smbc_read", "smbc_write"):
            getattr(library, name).argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
            getattr(library, name).restype = ctypes.c_ssize_t
        texts, lengths = [ctypes.c_void_p] * 3, [ctypes.c_int] * 3
        pairs = [kind for pair in zip(texts, lengths, strict=True) for kind in pair]
        kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, *pairs)
        self._callback = kind(
            lambda server, share, group, a, user, b, password, c: _fill_in(
                errand, user, b, password, c
            )
        )
        self._check(library.smbc_init(self._callback, 0))
        where = f"smb://{errand.host}:{errand.port}/{errand.share}/{errand.name}"
        self._file = self._check(library.smbc_open(where.encode(), os.O_RDWR, 0))

    def _check(self, result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), "libsmbclient")
        return result

    def transfer(self, offsets: Iterator[int], length: int, depth: int, *, write: bool) -> None:
        library, file = self._library, self._file
        data, room = os.urandom(length), ctypes.create_string_buffer(length)
        for offset in offsets:
            self._check(library.smbc_lseek(file, offset, os.SEEK_SET))
            if write:
                done = library.smbc_write(file, data, length)
            else:
                done = library.smbc_read(file, room, length)
            if done != length:
                raise OSError(ctypes.get_errno(), f"libsmbclient moved {done} bytes")


def _fill_in(errand: Errand, user: int, a: int, password: int, b: int) -> None:
    for address, room, text in ((user, a, errand.user), (password, b, errand.password)):
        plain = text.encode()[: room - 1] + b"\0"
        ctypes.memmove(address, plain, len(plain))


class SmbProtocol(Peer):
    """smbprotocol as it is: `Open.read` and `Open.write`, or pipelined by `send=False`.

    A pipeline awaits its oldest answer, as there is no way to await any. The credits for it are
    asked for by an echo: without them the fifth request of 1 MiB is an exception.
    """

    def __init__(self, errand: Errand, *, pipelined: bool) -> None:
        from smbprotocol.connection import Connection
        from smbprotocol.open import (
            CreateDisposition,
            CreateOptions,
            FileAttributes,
            FilePipePrinterAccessMask,
            ImpersonationLevel,
            Open,
        )
        from smbprotocol.session import Session
        from smbprotocol.tree import TreeConnect

        self._pipelined = pipelined
        self._connection = connection = Connection(uuid.uuid4(), errand.host, errand.port)
        connection.connect(timeout=10)
        self._session = session = Session(
            connection, errand.user, errand.password, require_encryption=errand.encrypted
        )
        session.connect()
        self._tree = tree = TreeConnect(session, rf"\\{errand.host}\{errand.share}")
        tree.connect()
        self._file = Open(tree, errand.name)
        access = FilePipePrinterAccessMask.GENERIC_READ | FilePipePrinterAccessMask.GENERIC_WRITE
        self._file.create(
            ImpersonationLevel.Impersonation, access, FileAttributes.FILE_ATTRIBUTE_NORMAL, 0,
            CreateDisposition.FILE_OPEN, CreateOptions.FILE_NON_DIRECTORY_FILE,
        )  # fmt: skip
        if pipelined:
            connection.echo(session.session_id, credit_request=512)

    def transfer(self, offsets: Iterator[int], length: int, depth: int, *, write: bool) -> None:
        data = os.urandom(length)
        if self._pipelined:
            self._pipeline(offsets, length, depth, data if write else None)
            return
        for offset in offsets:
            if write:
                self._file.write(data, offset)
            else:
                self._file.read(offset, length)

    def _pipeline(
        self, offsets: Iterator[int], length: int, depth: int, data: bytes | None
    ) -> None:
        connection, file = self._connection, self._file
        session_id, tree_id = self._session.session_id, self._tree.tree_connect_id
        credits_each = max(1, length // 65536)
        asked: deque[tuple[Any, Any]] = deque()
        for offset in offsets:
            if data is None:
                message, finish = file.read(offset, length, send=False)
            else:
                message, finish = file.write(data, offset, send=False)
            request = connection.send(message, session_id, tree_id, credit_request=credits_each)
            asked.append((request, finish))
            if len(asked) >= depth:
                request, finish = asked.popleft()
                finish(request)
        for request, finish in asked:
            finish(request)

    def flush(self) -> None:
        self._file.flush()


PEERS: dict[str, Callable[[Errand], Peer]] = {
    "mirrord": Mirrord,
    "mirrord-target": lambda errand: Mirrord(errand, authoritative=False),
    "libsmbclient": LibSmbClient,
    "smbprotocol": lambda errand: SmbProtocol(errand, pipelined=False),
    "smbprotocol-pipelined": lambda errand: SmbProtocol(errand, pipelined=True),
}


def sequential(peer: Peer, errand: Errand) -> dict[str, float]:
    """Write the whole file, then read it; MB/s."""
    figures = {}
    for word in ("write", "read"):
        offsets = iter(range(0, errand.size, MIB))
        began = time.perf_counter()
        peer.transfer(offsets, MIB, SEQUENTIAL_DEPTH, write=word == "write")
        if word == "write":
            peer.flush()
        figures[word] = errand.size / (time.perf_counter() - began) / 1e6
    return figures


def scattered(peer: Peer, errand: Errand) -> dict[str, float]:
    """Write 4 KiB blocks anywhere for a while, then read such; requests a second."""
    figures = {}
    for word in ("write", "read"):
        chance = random.Random(1)
        done = 0
        began = time.perf_counter()

        def offsets(chance: random.Random = chance, until: float = began + RANDOM_S) -> Any:
            nonlocal done
            blocks = errand.size // BLOCK_BYTES
            while time.perf_counter() < until:
                done += 1
                yield int(chance.random() * blocks) * BLOCK_BYTES

        peer.transfer(offsets(), BLOCK_BYTES, RANDOM_DEPTH, write=word == "write")
        if word == "write":
            peer.flush()
        figures[word] = done / (time.perf_counter() - began)
    return figures


def main() -> int:
    """Do one errand."""
    name, work = sys.argv[1:]
    errand = msgspec.json.decode(sys.stdin.buffer.read(), type=Errand)
    peer = PEERS[name](errand)
    measure = {"sequential": sequential, "random": scattered}[work]
    print(msgspec.json.encode(measure(peer, errand)).decode(), flush=True)
    os._exit(0)  # how a peer says good-bye isn't measured, nor waited for


if __name__ == "__main__":
    sys.exit(main())
