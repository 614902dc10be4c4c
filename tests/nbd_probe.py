"""A guest that measures: it writes, reads back and flushes, and knows its longest wait.

One request at a time, over the tests' own small client, in a thread. It never connects again: a
connection that breaks is an error like any other.
"""

from __future__ import annotations

import random
import threading
import time
from types import TracebackType

from tests.helpers import eventually
from tests.nbd_writer import BLOCK_BYTES, FLUSH, READ, WRITE, Client

PACE_S = 0.002  # between requests, so that it leaves a processor to those it measures


class Probe:
    """Works on `blocks` blocks of an export, from `first` on, while the `with` block runs."""

    def __init__(self, path: str, export: str = "vm", blocks: int = 64, first: int = 0) -> None:
        self.worst_s = 0.0
        self.requests = 0
        self.errors: list[str] = []
        self.written: dict[int, bytes] = {}
        self._client = Client(path, export)
        self._blocks = range(first, min(first + blocks, self._client.size // BLOCK_BYTES))
        self._chance = random.Random(blocks)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Probe:
        self._thread.start()
        self.wait(3)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.join(timeout=60)
        self._client.close()
        assert kind is not None or not self._thread.is_alive(), "the guest still waits"

    def wait(self, more: int) -> None:
        """Wait until the guest got so many further answers."""
        wanted = self.requests + more
        eventually(lambda: self.requests >= wanted or self.errors, 30, "the guest goes on")
        assert not self.errors, self.errors

    def begin_again(self) -> None:
        """Forget the longest wait so far."""
        self.worst_s = 0.0

    def check(self, content: bytes) -> None:
        """Assert that a disk's content has everything that was written, and nothing failed."""
        assert not self.errors, self.errors
        for block, data in self.written.items():
            assert content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] == data, (
                f"block {block}"
            )

    def _run(self) -> None:
        pace_delay_s = PACE_S
        try:
            while not self._ending.is_set():
                self._step()
                time.sleep(pace_delay_s)
        except BaseException as trouble:
            self.errors.append(repr(trouble))

    def _step(self) -> None:
        block = self._chance.choice(self._blocks)
        kind = self._chance.choices([WRITE, READ, FLUSH], [6, 3, 1])[0]
        data = self._chance.randbytes(BLOCK_BYTES) if kind == WRITE else b""
        began = time.monotonic()
        if kind == READ:
            found = self._client.read(block * BLOCK_BYTES, BLOCK_BYTES)
            assert found == self.written.get(block, found), f"block {block} is another one"
        else:
            length = len(data)
            self._client.send(kind, 1, block * BLOCK_BYTES if length else 0, length, data)
            _, error = self._client.receive()
            assert not error, f"{'write' if length else 'flush'}: error {error}"
            if length:
                self.written[block] = data
        self.worst_s = max(self.worst_s, time.monotonic() - began)
        self.requests += 1
