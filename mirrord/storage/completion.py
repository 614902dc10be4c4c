"""A future that whoever drives a coroutine by hand can go on from at once.

An event loop lets a round pass between the end of a future and the next step of the task that
waits for it, and most requests have little left to do then. So a frontend that meets a
`Completion` in a coroutine it has started by hand sets `then`, and takes the next step itself when
it is called. In a task, a `Completion` is a future like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Completion(asyncio.Future[Any]):
    """The end of one operation, for one who waits. `then` is called at the end, from the loop."""

    then: Callable[[], None] | None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.then = None

    def end(self, result: Any) -> None:
        """Say how it ended. Without effect when who waited was cancelled.

        What `then` raises is a defect, and the loop's to tell of, as with any callback.
        """
        if self.done():
            return
        self.set_result(result)
        if self.then is not None:
            try:
                self.then()
            except (Exception, asyncio.CancelledError) as error:
                self.get_loop().call_exception_handler(
                    {"message": "going on failed", "exception": error, "future": self}
                )
