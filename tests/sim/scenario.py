"""What a seed means: one disk, one move, its guests, its operator, its faults and its deaths.

Everything is drawn at once and up front, so that a scenario can be printed, and so that a change
in the engine doesn't change what is tried.
"""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field

from mirrord.engine.settings import EngineSettings
from mirrord.storage.backend import Capabilities
from mirrord.storage.remote import SteadySettings
from tests.sim.disk import BLOCK
from tests.sim.remote import Loss
from tests.sim.world import CrashPlan, Fault

# Faults end at the latest then, and the operator then sees to it that the move ends.
CALM_S = 20.0
# Where a crash is worth most: at every step that changes a name or a record.
DECISIONS = (
    ("store", "create"),
    ("store", "write_log"),
    ("store", "sync_write_log"),
    ("store", "write_map"),
    ("store", "sync_write_map"),
    ("store", "read_log"),
    ("target", "flush"),
    ("source", "flush"),
    ("target-place", "create"),
    ("target-place", "publish"),
    ("target-place", "withdraw"),
    ("target-place", "discard"),
    ("target-place", "find"),
    ("target-place", "dirsync"),
    ("source-place", "retire"),
    ("source-place", "delete"),
    ("source-place", "dirsync"),
    ("memory", "clear"),
    ("memory", "put_back"),
    ("memory", "copied"),
    ("memory", "unmark"),
    ("memory", "reset"),
    ("memory", "save"),
)
FAULTY = {
    "source": ("read", "write", "zeroes", "trim", "flush", "extents"),
    "target": ("read", "write", "zeroes", "trim", "flush", "extents"),
    "store": ("write_log", "sync_write_log", "write_map", "sync_write_map"),
    "target-place": ("publish", "dirsync", "withdraw", "discard"),
    "source-place": ("retire", "delete", "dirsync"),
}
COMMANDS = ("pause", "resume", "cancel", "cutover", "limit", "stop")
SERVED = 0.2  # share of the runs with a side on a server
# Where a loss of a server is worth most.
LOSSES = (
    ("source", "write"),
    ("source", "read"),
    ("source", "flush"),
    ("target", "write"),
    ("target", "read"),
    ("target", "flush"),
    ("target-place", "publish"),
    ("source-place", "retire"),
    ("source-server", "open"),
    ("target-server", "open"),
    ("store", "write_log"),
    ("store", "sync_write_log"),
    ("memory", "copied"),
    ("memory", "clear"),
)
# What an operator does to the files while the process is dead.
MEDDLING = ("target removed", "source replaced", "map lost")


@dataclass(frozen=True)
class Load:
    """One guest."""

    requests: int
    depth: int
    think_s: float
    hot: float
    late: bool = False  # it begins after the commit, or whatever else ends the job


@dataclass
class Scenario:
    """One simulated move."""

    seed: int
    size: int
    content: bytes
    mode: str
    verify: str
    cutover: str
    limit: int
    keep_source: bool
    fair: bool  # the event loop keeps asyncio's order
    settings: EngineSettings
    source_able: Capabilities
    target_able: Capabilities
    source_device: bool
    target_device: bool
    loads: list[Load]
    eager: dict[str, float]
    slow: dict[str, float]
    crashes: list[CrashPlan] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    commands: list[tuple[float, str]] = field(default_factory=list)
    meddling: str = ""
    servers: dict[str, list[Loss]] = field(default_factory=dict)  # by what is on it, and its fate
    steady: SteadySettings = field(default_factory=SteadySettings)

    def server_of(self, side: str) -> str | None:
        """Return which server a side is on: "source", "target" or "both"."""
        return next((name for name in self.servers if name in (side, "both")), None)


def draw(seed: int) -> Scenario:
    """Return the scenario of a seed."""
    rng = random.Random(f"scenario {seed}")
    chance = rng.random
    size = rng.randrange(2, 25) * BLOCK * 2
    if chance() < 0.4:
        size += rng.randrange(1, 2 * BLOCK)  # the last blocks are short
    device = chance() < 0.15
    scenario = Scenario(
        seed=seed,
        size=size,
        content=_content(rng, size),
        mode=rng.choice(("auto", "passes", "mirror", "mirror")),
        verify=rng.choice(("full", "none")),
        cutover="manual" if chance() < 0.15 else "auto",
        limit=rng.choice((0, 0, 0, 1000, 20_000)),
        keep_source=chance() < 0.15,
        fair=chance() < 0.25,
        settings=_settings(rng),
        source_able=Capabilities(chance() < 0.8, chance() < 0.5, True, True),
        target_able=Capabilities(chance() < 0.8, chance() < 0.5, not device, True),
        source_device=chance() < 0.1,
        target_device=device,
        loads=_loads(rng),
        eager={"source": rng.choice((0.0, 0.5, 0.95)), "target": rng.choice((0.0, 0.0, 0.5))},
        slow={"target": rng.choice((1, 1, 3, 10)), "source": rng.choice((1, 1, 1, 4))},
    )
    if chance() < 0.65:
        scenario.crashes = [_crash(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    if chance() < 0.35:
        scenario.faults = [_fault(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    if chance() < 0.3:
        scenario.commands = sorted(
            (rng.choice((0.02, 0.2, 1.0, 4.0)) * chance(), rng.choice(COMMANDS))
            for _ in range(rng.randrange(1, 5))
        )
    if chance() < 0.1:
        scenario.meddling = rng.choice(MEDDLING)
    if chance() < 0.04:
        _make_the_commit_doubtful(rng, scenario)
    rng = random.Random(f"servers {seed}")  # its own, so that the other runs stay what they are
    if rng.random() < SERVED:
        serve(rng, scenario)
    return scenario


def serve(rng: random.Random, scenario: Scenario, sides: tuple[str, ...] = ()) -> None:
    """Put sides on servers, which have their misfortunes."""
    sides = sides or rng.choice((("target",), ("target",), ("source",), ("source", "target")))
    if scenario.source_device:
        sides = tuple(side for side in sides if side != "source")
    if scenario.target_device:
        sides = tuple(side for side in sides if side != "target")
    names = ("both",) if len(sides) == 2 and rng.random() < 0.4 else sides
    for name in names:
        scenario.servers[name] = [_loss(rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 5)))]
    scenario.steady = SteadySettings(
        io_timeout_s=rng.choice((2.0, 8.0, 60.0)),
        target_wait_s=0.8,
        unflushed_bytes_max=rng.choice((1500, 6000, 1 << 26)),
        write_through=rng.random() < 0.08,
    )
    for side in sides:
        scenario.eager[f"{side}-server"] = rng.choice((0.0, scenario.eager[side]))
    if rng.random() < 0.6:  # a guest whose server is the target's
        think_s = rng.choice((0.0, 0.005, 0.03))
        late = Load(rng.choice((30, 60)), rng.choice((1, 3, 6)), think_s, rng.random(), late=True)
        scenario.loads = [*scenario.loads, late]


def _loss(rng: random.Random) -> Loss:
    kind = rng.choice(("cut", "cut", "killed", "reboot", "reboot", "reboot"))
    loss = Loss(kind, away_s=rng.choice((0.0, 0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 10.0)))
    if rng.random() < 0.06:
        loss.away_s = rng.choice((30.0, 100.0))
    loss.keeps = rng.random() < 0.5
    loss.since = rng.choice(("beginning", "move", "move", "move", "commit", "commit", "commit"))
    if rng.random() < 0.08:
        loss.tamper = rng.choice(("replaced", "older"))
    if rng.random() < 0.5:
        loss.at_s = rng.choice((0.02, 0.2, 0.2, 1.0, 4.0)) * rng.random()
    else:
        loss.who, loss.operation = rng.choice(LOSSES)
        loss.stage = rng.choice(("before", "after"))
        loss.nth = rng.choice((1, 1, 2, 3, 5, 9, 20))
    return loss


def _make_the_commit_doubtful(rng: random.Random, scenario: Scenario) -> None:
    """Rule R15: nobody knows whether COMMIT is durable, and then somebody dies."""
    until_s = rng.choice((0.0, 3.0, CALM_S))
    scenario.commands = []
    scenario.faults = [Fault("store", "sync_write_log", 2, until_s=until_s)]
    if rng.random() < 0.5:
        scenario.faults.append(Fault("target", "flush", rng.randrange(2, 12)))
    if rng.random() < 0.3:
        scenario.faults.append(Fault("target", "write", rng.randrange(5, 30)))
    power, stage = rng.random() < 0.6, rng.choice(("before", "after"))
    nth = rng.randrange(2, 5)
    if rng.random() < 0.5:
        plan = CrashPlan(power, nth, "store", rng.choice(("write_log", "sync_write_log")), stage)
    else:
        plan = CrashPlan(power, rng.randrange(50, 600))
    scenario.crashes = [plan, *scenario.crashes]


def _content(rng: random.Random, size: int) -> bytes:
    """Return what the disk holds at first: data with holes."""
    full = rng.choice((0.0, 0.3, 0.7, 1.0))
    content = bytearray()
    while len(content) < size:
        length = BLOCK * rng.randrange(1, 5)
        content += rng.randbytes(length) if rng.random() < full else bytes(length)
    return bytes(content[:size])


def _settings(rng: random.Random) -> EngineSettings:
    return EngineSettings(
        chunk_bytes=rng.choice((32, 32, 64, 16)),
        region_bytes=rng.choice((32, 64, 128)),
        zero_bytes=rng.choice((8, 16, 32)),
        scan_bytes=rng.choice((32, 128)),
        hole_chunks_min=1,
        piece_s=rng.choice((0, 0.1, 10)),
        checkpoint_s=rng.choice((0.01, 0.05, 0.5)),
        checkpoint_bytes=rng.choice((64, 256)),
        hot_checkpoints=rng.choice((0, 0, 1, 3)),
        target_budget_s=0.5,
        target_stall_s=1.0,
        gate_s=0.5,
        retry_first_s=0.05,
        retry_max_s=1.0,
        target_attempts_max=rng.choice((2, 4)),
        space_probe_s=0.5,
        sample_s=0.1,
        verify_passes_max=rng.choice((1, 3)),
        verify_width=2,
        drain_s=0.3,
        watch_s=1.0,
    )


def _loads(rng: random.Random) -> list[Load]:
    return [
        Load(
            requests=rng.choice((5, 20, 40, 80)),
            depth=rng.choice((1, 2, 4)),
            think_s=rng.choice((0.0, 0.002, 0.02)),
            hot=rng.choice((0.2, 0.7)),
        )
        for _ in range(rng.choice((0, 1, 1, 1, 2)))
    ]


def _crash(rng: random.Random) -> CrashPlan:
    power = rng.random() < 0.5
    if rng.random() < 0.45:
        return CrashPlan(power, int(rng.expovariate(1 / 120)) + 1)
    who, operation = rng.choice(DECISIONS)
    return CrashPlan(
        power, rng.choice((1, 1, 1, 2, 2, 3, 4)), who, operation, rng.choice(("before", "after"))
    )


def _fault(rng: random.Random) -> Fault:
    who = rng.choice(("source", "target", "target", "target", "store", *FAULTY))
    operation = rng.choice(FAULTY[who])
    for_ever = rng.random() < 0.3
    fault = Fault(
        who,
        operation,
        rng.choice((1, 1, 2, 3, 5, 9)),
        errno=errno.EIO,
        until_s=rng.choice((0.5, 3.0, CALM_S)) if for_ever else 0.0,
    )
    if who.startswith("target") and operation != "flush" and rng.random() < 0.3:
        fault.errno = errno.ENOSPC
    if who == "target" and rng.random() < 0.25:
        fault.hang_s = rng.choice((0.4, 1.5, 10.0))
        fault.until_s = 0.0
    return fault
