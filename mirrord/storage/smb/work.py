"""Blocking work beside the loop, and work that ends by itself when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

_RUNNING: Final[set[asyncio.Task[Any]]] = set()  # the loop itself would forget them


async def in_thread(work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run blocking work in a thread of its own, which keeps no process from ending.

    A caller that is cancelled leaves it behind.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work(*args, **kwargs)
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop is closed: nobody waits
            pass

    threading.Thread(target=run, name="smb", daemon=True).start()
    return await done


def from_thread(
    loop: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, T]], limit_s: float
) -> T:
    """Do work on the loop, from a thread, which waits. Raises OSError when the loop has ended."""
    answer: concurrent.futures.Future[T] = concurrent.futures.Future()

    def begin() -> None:
        _keep(loop.create_task(make())).add_done_callback(settle)

    def settle(task: asyncio.Task[T]) -> None:
        if task.cancelled():
            answer.set_exception(OSError(errno.ECANCELED, "cancelled"))
        elif (error := task.exception()) is not None:
            answer.set_exception(error)
        else:
            answer.set_result(task.result())

    try:
        loop.call_soon_threadsafe(begin)
    except RuntimeError as error:
        raise OSError(errno.ECANCELED, "this process is ending") from error
    return answer.result(limit_s)


def aside(work: Coroutine[Any, Any, object]) -> None:
    """Do work whose end is of no interest to anybody, however it ends."""
    _keep(asyncio.get_running_loop().create_task(work)).add_done_callback(_forget_failure)


async def to_the_end(
    work: Coroutine[Any, Any, T], release: Callable[[T], Awaitable[None]] | None = None
) -> T:
    """Do work that ends by itself even if whoever waits is cancelled.

    `release` then gets what it returned: a handle that nobody took has to be closed.
    """
    task = _keep(asyncio.get_running_loop().create_task(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if release is not None:
            _keep(asyncio.get_running_loop().create_task(_give_back(task, release)))
        else:
            task.add_done_callback(_forget_failure)
        raise


async def _give_back(task: asyncio.Task[T], release: Callable[[T], Awaitable[None]]) -> None:
    await asyncio.wait((task,))
    if not _forget_failure(task):
        await release(task.result())


def _forget_failure(task: asyncio.Task[Any]) -> bool:
    """Tell whether it failed, without anybody being told."""
    return task.cancelled() or task.exception() is not None


def _keep(task: asyncio.Task[Any]) -> asyncio.Task[Any]:
    _RUNNING.add(task)
    task.add_done_callback(_RUNNING.discard)
    return task
