"""A gate that is closed again and again without a commit: the guest must get its turn."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest

from mirrord.core.migration import Event
from tests.engine.crashes import SMALL, CrashBench
from tests.engine.rules import NEW, story

Turns = list[tuple[float, float]]


def watch_gate(bench: CrashBench, monkeypatch: pytest.MonkeyPatch) -> Turns:
    """Note when the gate was closed, and when it was opened again."""
    clock = asyncio.get_running_loop().time
    turns: Turns = []
    close_gate, open_gate = bench.disk.close_gate, bench.disk.open_gate
    closed_s = 0.0

    def close() -> None:
        nonlocal closed_s
        closed_s = clock()
        close_gate()

    def open_() -> None:
        turns.append((closed_s, clock()))
        open_gate()

    monkeypatch.setattr(bench.disk, "close_gate", close)
    monkeypatch.setattr(bench.disk, "open_gate", open_)
    return turns


async def test_the_guest_is_held_a_fifth_of_the_time(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target whose cache takes longer to empty than the gate may be closed: each gate times
    out. The guest's writes go on four times as long in between."""
    bench.settings = replace(SMALL, gate_s=0.03, retry_first_s=0.001, retry_max_s=0.001)
    await bench.begin(verify="none")
    turns = watch_gate(bench, monkeypatch)
    flush, misses = bench.target.inner.flush, 4

    async def slow() -> None:
        gate = bench.disk._gate
        if gate is not None and len(turns) < misses:
            await gate.wait()
        await flush()

    monkeypatch.setattr(bench.target.inner, "flush", slow)
    status = await bench.finish()
    assert story(bench).count(Event.GATE_TIMED_OUT) >= misses
    for (closed_s, opened_s), (next_s, _) in itertools.pairwise(turns):
        assert next_s - opened_s > 3.9 * (opened_s - closed_s)
    await bench.write(0, NEW)
    await bench.assert_moved(status)


async def test_each_rest_is_longer_than_the_one_before(
    bench: CrashBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something is dirty whenever the gate closes: no time is lost behind it, and still the rests
    double up to their maximum."""
    bench.settings = replace(SMALL, retry_first_s=0.02, retry_max_s=0.1)
    await bench.begin(verify="none")
    turns = watch_gate(bench, monkeypatch)
    settle, misses = bench.disk.settle, 5

    async def dirty() -> None:
        await settle()
        if bench.gate_closed and len(turns) < misses:
            bench.tracker.bitmap.mark(0, 1)

    monkeypatch.setattr(bench.disk, "settle", dirty)
    status = await bench.finish()
    assert story(bench).count(Event.GATE_TIMED_OUT) == misses
    rests_s = [after - before for (_, before), (after, _) in itertools.pairwise(turns)]
    for rest_s, least_s in zip(rests_s, (0.02, 0.04, 0.08, 0.1, 0.1), strict=True):
        assert rest_s > 0.95 * least_s
    await bench.assert_moved(status)
