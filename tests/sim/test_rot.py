"""What rots on the target before it is compared is copied again, whatever else happens."""

from __future__ import annotations

import random

import pytest

from mirrord.engine.verify import Verdict, Verifier
from tests.sim.disk import BLOCK, SimBackend
from tests.sim.run import simulate
from tests.sim.scenario import draw

BATCH_RUNS = 200

pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.timeout(300),
]


class Rot:
    """Changes a byte of the target, once, as a verification begins that has yet to compare it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"rot {seed}")
        self.struck = False
        self.found = False

    def strike(self, verifier: Verifier) -> None:
        """Change one byte in what both sides hold durably and no verification has compared."""
        tracker = verifier._tracker
        target, digests = tracker.target, tracker.digests
        if self.struck or not isinstance(target, SimBackend) or target.world.dead:
            return
        unverified = digests.unverified_bits()
        blocks = [
            (offset, min(BLOCK, tracker.source.size - offset))
            for offset in range(0, tracker.source.size, BLOCK)
            if unverified[offset // digests.chunk_bytes]
        ]
        file = target.file
        able = [
            (offset, length)
            for offset, length in blocks
            if offset // BLOCK not in file.versions and tracker.bitmap.clean(offset, length)
        ]
        if not able:
            return
        offset, length = self.rng.choice(able)
        file.view[offset + self.rng.randrange(length)] ^= 1 + self.rng.randrange(255)
        file.platter[offset : offset + length] = file.view[offset : offset + length]
        if any(file.block(offset // BLOCK)):
            file.allocated.add(offset // BLOCK)
        self.struck = True


@pytest.mark.parametrize("first", range(40_000_000, 40_000_600, BATCH_RUNS))
def test_no_rot_outlasts_a_verification(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Verifier.run
    rot = Rot(0)

    async def run(self: Verifier) -> Verdict:
        rot.strike(self)
        verdict = await honest(self)
        rot.found |= bool(verdict.mismatches)
        return verdict

    monkeypatch.setattr(Verifier, "run", run)
    struck = found = 0
    for seed in range(first, first + BATCH_RUNS):
        scenario = draw(seed)
        scenario.verify, scenario.cutover, scenario.meddling = "full", "auto", ""
        rot = Rot(seed)
        report = simulate(seed, scenario=scenario)
        assert report.violation is None, report.tell()
        struck += rot.struck
        found += rot.found
    assert found > struck / 2 > BATCH_RUNS / 10  # others die before, or are written over
