"""The fuzzer's targets over their seeds, so that they don't rot, and over changes of these.

The changes are hypothesis': a short run of every parser with each run of the suite. The long one is
`make fuzz`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, Target

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@every_target
def test_a_target_takes_its_seeds(target: Target) -> None:
    seeds = target.seeds()
    assert seeds
    for seed in [*seeds, b""]:
        target.run(seed)


def changed(seed: bytes) -> st.SearchStrategy[bytes]:
    """Return changes of a seed: cut, with bytes put over others, put between, or repeated."""
    places = st.integers(0, len(seed))
    pieces = st.binary(max_size=12) | st.sampled_from([b"\xff" * 4, b"\0" * 8, b"\x7f\xff\xff\xff"])
    over = st.tuples(places, pieces).map(
        lambda change: seed[: change[0]] + change[1] + seed[change[0] + len(change[1]) :]
    )
    between = st.tuples(places, places, pieces).map(
        lambda change: seed[: change[0]] + change[2] + seed[change[1] :]
    )
    return st.one_of(places.map(lambda at: seed[:at]), over, between, st.binary(max_size=200))


@every_target
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_target_takes_anything(target: Target, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(target.seeds()))
    target.run(data.draw(changed(seed)))


def test_a_crash_is_repeated_without_a_fuzzer(tmp_path: Path) -> None:
    crash = tmp_path / "crash"
    crash.write_bytes(b"/disks/vm.raw")
    fuzz = [sys.executable, "-m", "tests.fuzz"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*fuzz, "location", "--repeat", crash], cwd=root, timeout=60)
    assert done.returncode == 0
