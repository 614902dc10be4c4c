"""The tie of one disk to its server: the open file, or the wait until it is open again.

    connected ──lost──▸ away ──opened again──▸ on trial ──taken──▸ connected
                          ▲                     │    │
                          └────────lost─────────┘    └──refused──▸ failed

`SteadyBackend` says what the trial is (proof, replay, flush) and what a loss means to it. Requests
wait here, each until its own moment. A server that says no (`DeniedError`) is asked again when
something was changed, or rarely; whoever isn't `patient` is told so at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from mirrord.storage.backend import UnreachableError
from mirrord.storage.remote import DeniedError, Door, ForgottenError, LostError, RemoteFile

log = logging.getLogger(__name__)

RETRY_FIRST_S: Final = 0.05
RETRY_MAX_S: Final = 5.0
# A server that says no is asked again this rarely: accounts get locked. Not by asking for a share.
DENIED_RETRY_S: Final = 20.0
SHARE_RETRY_S: Final = 2.0
DENIED_LOOK_S: Final = 0.5  # whether there is another one


class Tie:
    """Keeps a file open, life after life. `life` grows at each loss."""

    def __init__(
        self,
        file: RemoteFile,
        door: Door,
        *,
        trial: Callable[[RemoteFile], Awaitable[str | None]],
        on_lost: Callable[[], None],
        wanted: Callable[[], bool],
    ) -> None:
        """`trial` returns why a file that was opened again is refused for good, or None; `wanted`
        tells whether a lost one is to be opened again at all."""
        self.file: RemoteFile | None = file
        self.former = file  # the last one, while there is none
        self.life = 0
        self.reason: str | None = None  # why requests wait, or fail
        self.failed = False
        self.door = door
        self._trial = trial
        self._on_lost = on_lost
        self._wanted = wanted
        self._closed = False
        self._denied: DeniedError | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._recovery: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        file.when_lost(lambda why: self.lost(file, why))

    async def wait(self, until_s: float, *, patient: bool) -> RemoteFile:
        """Return the file once it is open again.

        Raises UnreachableError when that takes long, `OSError` when it never will be; what the
        server said to somebody who isn't patient.
        """
        while self.file is None:
            if self.failed:  # ESTALE: no job need try this target again
                raise OSError(errno.EIO if patient else errno.ESTALE, self.reason)
            if self._closed:
                raise OSError(errno.EBADF, "the disk is closed")
            if self._denied is not None and not patient and not self.door.changed():
                raise OSError(self._denied.errno, self._denied.strerror)
            waiting: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(waiting)
            timer = self._loop.call_at(until_s, _end_wait, waiting)
            try:
                await waiting
            except TimeoutError as error:
                raise self.unreachable() from error
            finally:
                timer.cancel()
        return self.file

    def unreachable(self) -> UnreachableError:
        """Return the error of a request that has waited long enough."""
        return UnreachableError(f"{self.door.where} could not be reached in time: {self.reason}")

    def lost(self, file: RemoteFile, why: LostError) -> None:
        """Note that the connection of `file` is lost. Idempotent."""
        if self.file is not file:
            return
        self.file = None
        self.former = file
        self.life += 1
        self.reason = why.strerror
        self._on_lost()
        log.warning("connection lost server=%s error=%s", self.door.where, why.strerror)
        if self._wanted() and (self._recovery is None or self._recovery.done()):
            self._recovery = self._loop.create_task(self._recover())

    async def close(self) -> None:
        """Stop opening it again, and close it. Nobody waits any more."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait((self._recovery,))
        file, self.file = self.file, None
        self.life += 1
        self._closed = True
        self._wake()
        await (file or self.former).close()

    async def _recover(self) -> None:
        """Open the file again, however long it takes, and bring it to where it was."""
        delay_s = 0.0
        while self.file is None and not self.failed:
            await asyncio.sleep(delay_s)
            delay_s = min(max(2 * delay_s, RETRY_FIRST_S), RETRY_MAX_S)
            try:
                await self._try(await self.door.reopen(self.former))
                delay_s = 0.0
            except DeniedError as why:
                self.reason = why.strerror
                self._denied = why
                self._wake()  # who isn't patient needn't wait for this
                logged_on = why.code in ("share-denied", "target-missing")
                await self._changed(SHARE_RETRY_S if logged_on else DENIED_RETRY_S)
            except ForgottenError as why:
                self.reason = why.strerror
                delay_s = RETRY_FIRST_S
            except OSError as why:
                self.reason = why.strerror
            except Exception as why:  # a defect must not be the last attempt
                log.exception("opening again failed server=%s", self.door.where)
                self.reason = f"a defect: {why!r}"

    async def _changed(self, limit_s: float) -> None:
        """Return when it may be worth asking again after the server said no."""
        for _ in range(round(limit_s / DENIED_LOOK_S)):
            if self.door.changed():
                break
            await asyncio.sleep(DENIED_LOOK_S)
        self._denied = None

    async def _try(self, file: RemoteFile) -> None:
        """Put a file on trial; then requests go on, or fail for good."""
        try:
            doubt = await self._trial(file)
        except BaseException:
            await asyncio.shield(file.close())
            raise
        if doubt is not None:
            await file.close()
            self.failed = True
            self.reason = doubt
            log.error("storage failed server=%s reason=%s", self.door.where, doubt)
        else:
            # no await below
            self.file = file
            self.reason = None
            log.warning("connected again server=%s", self.door.where)
            file.when_lost(lambda why: self.lost(file, why))
        self._wake()

    def _wake(self) -> None:
        """Let everybody who waits look again."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)


def _end_wait(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_exception(TimeoutError())
