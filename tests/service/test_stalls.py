"""A stall is noticed, told of once, and over with the first request that ends."""

from __future__ import annotations

import asyncio

import pytest

from mirrord.service import stalls
from mirrord.service.stalls import STALL_S, StallWatch, reason
from tests.helpers import eventually_async


class Server:
    """What a test sets."""

    waiting = 0
    ended = 0


def test_what_is_a_stall(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    server = Server()
    watch = StallWatch("vm", server)
    for now_s in range(20):
        watch.look(now_s)
        assert watch.stalled_s == 0, "nothing waits"
    server.waiting = 2
    for now_s in range(20, 40):
        server.ended += 1
        watch.look(now_s)
        assert watch.stalled_s == 0, "something ends at each look"
    for now_s in range(40, 60):
        watch.look(now_s)
    assert watch.stalled_s == 20, "since the last look that saw one end"
    server.ended += 1
    watch.look(60)
    assert watch.stalled_s == 0
    watch.look(60 + STALL_S - 1)
    server.waiting = 0
    watch.look(70)
    assert [record.getMessage() for record in caplog.records] == [
        "storage does not answer disk=vm waiting=2",
        "storage answers again disk=vm after_s=20",
    ]


def test_what_is_shown() -> None:
    assert reason(STALL_S - 0.1) is None
    assert reason(12.4) == "its guests have had no answer for 12 s: its storage may hang"


async def test_it_looks_until_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "LOOK_S", 0.01)
    server = Server()
    server.waiting = 1
    watch = StallWatch("vm", server)
    running = asyncio.create_task(watch.run())
    await eventually_async(lambda: watch.stalled_s, what="a look has found a stall")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
