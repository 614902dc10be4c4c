"""One simulated move, from its seed to a verdict.

The machine runs the real engine, journal and recovery in one life after another until the job has
ended and the guests are done; `Crash` plans end lives. After each crash the content of whatever
the journal makes the authority is checked before anything runs again, and at the end everything
that may be left on disk.
"""

from __future__ import annotations

import asyncio
import logging
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mirrord.core.journal import Authority, Outcome, State, fold, parse
from mirrord.core.migration import Phase
from mirrord.engine.disk import Disk
from mirrord.engine.job import Job
from mirrord.engine.recovery import Places, recover, start
from mirrord.engine.request import JobRequest, JobStatus, dirty_bytes_for
from mirrord.engine.surroundings import Surroundings
from mirrord.errors import DamagedError, RefusedError
from tests.sim.checker import Checker
from tests.sim.disk import SimDirectory, SimFile
from tests.sim.guest import Guest
from tests.sim.loop import DeadlockError, HaltedError, LivelockError, SimLoop, elapse
from tests.sim.place import SimPlace
from tests.sim.remote import INODES, Loss, ServedDirectory, ServedFile, SimServer, SimShare
from tests.sim.scenario import CALM_S, Scenario, draw
from tests.sim.shrink import shrunk, watched
from tests.sim.store import SimFiles, SimStore
from tests.sim.verdict import complain, complain_of_delay, has_given_up, verdict
from tests.sim.world import REBOOT_S, World

JOB_ID = "job"
LIFE_MAX_S = 400.0  # of virtual time; by then the operator has cancelled whatever still runs
CANCEL_S = 150.0  # a job that hasn't ended by itself by then is cancelled, and the run has failed
PATIENCE_S = 2.0  # how long the operator leaves a paused or held job alone when nothing is broken
LATE_S = 20.0  # twice the longest hang


@dataclass(frozen=True)
class Report:
    """What came of one seed."""

    seed: int
    violation: str | None
    story: str
    phase: str
    lives: int
    points: int
    faults_hit: frozenset[tuple[str, str]]
    phases: frozenset[str]

    def tell(self) -> str:
        return f"{self.story}\n\nseed {self.seed}: {self.violation}"


def simulate(
    seed: int,
    *,
    scenario: Scenario | None = None,
    keep_story: bool = False,
    look: Callable[[Machine], None] | None = None,
) -> Report:
    """Run the seed's scenario. A violation is told again with its whole story."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # thousands of announced warnings would say nothing
    try:
        with shrunk():
            machine = Machine(scenario or draw(seed), keep_story=keep_story)
            with watched(machine.world):
                machine.run()
    finally:
        logging.disable(before)
    if look is not None:
        look(machine)
    if machine.world.violation is not None and not keep_story and scenario is None:
        return simulate(seed, keep_story=True, look=look)
    return machine.report()


class Machine:
    """A host with one disk and one move."""

    def __init__(self, scenario: Scenario, *, keep_story: bool = True) -> None:
        self.scenario = scenario
        rng = random.Random(f"run {scenario.seed}")
        self.rng = rng
        self.world = world = World(rng, keep_story=keep_story)
        world.eager, world.slow = scenario.eager, scenario.slow
        world.faults = scenario.faults
        self._make_servers()
        self.source_names, self.target_names = self._names("source"), self._names("target")
        if (server := self.servers.get("source")) is None:
            source = SimFile(world, 1, scenario.size, scenario.content)
        else:
            source = ServedFile(server, 1, scenario.size, scenario.content)
        self.source_names.names["disk"] = source
        self.source_names.sync()
        if scenario.target_device:
            size = scenario.size + rng.choice((0, 0, 1, 40))  # a device may be larger
            old = SimFile(world, 2, size, rng.randbytes(size))
            self.target_names.names["disk"] = old
            self.target_names.sync()
        world.flush_failed = self._flush_failed
        self.files = SimFiles(world, JOB_ID, dirty_bytes_for(scenario.size))
        self.checker = Checker(world, scenario.content)
        complaints: dict[str, Any] = {
            "slow": lambda took_s: complain_of_delay(self, took_s),
            "failed": lambda *what: complain(self, *what),
        }
        self.guests = [
            Guest(
                world,
                self.checker,
                random.Random(f"guest {scenario.seed} {number}"),
                requests=load.requests,
                depth=load.depth,
                think_s=load.think_s,
                hot=load.hot,
                late=load.late,
                **complaints,
            )
            for number, load in enumerate(scenario.loads)
        ]
        self.reader = Guest(
            world, self.checker, rng, requests=0, depth=0, think_s=0, hot=0, **complaints,
        )  # fmt: skip
        self.location = "source"  # what the registry says; durable at once, by an atomic rename
        self.ended: Phase | None = None
        self.replaced: SimFile | None = None  # somebody else's file under the source's name
        self.kept: str | None = None  # why the source was not deleted
        self.tampered: list[ServedFile] = []  # files that are not to be served any more
        self.cancelled = False
        self.phases: set[str] = set()
        self._boots = world.boots
        self.commands = list(scenario.commands)

    def _make_servers(self) -> None:
        scenario = self.scenario
        made = {
            name: SimServer(self.world, losses, scenario.steady, self._server_lost)
            for name, losses in scenario.servers.items()
        }
        sides = {side: scenario.server_of(side) for side in ("source", "target")}
        self.servers = {side: made[name] for side, name in sides.items() if name is not None}
        lost_s = sum(loss.away_s for losses in scenario.servers.values() for loss in losses)
        self.cancel_s = CANCEL_S + lost_s
        self.life_max_s = LIFE_MAX_S + 3 * lost_s

    def _names(self, side: str) -> SimDirectory:
        return ServedDirectory(self.world) if side in self.servers else SimDirectory(self.world)

    def report(self) -> Report:
        world = self.world
        return Report(
            self.scenario.seed,
            world.violation,
            world.story(100_000),
            self.ended.value if self.ended else "never ended",
            world.life,
            world.points,
            frozenset(world.faults_hit),
            frozenset(self.phases),
        )

    # From life to life

    def run(self) -> None:
        plans = list(self.scenario.crashes)
        now_s = 0.0
        while self.world.violation is None:
            loop = SimLoop(
                self.rng, start_s=now_s, fair=self.scenario.fair, end_s=now_s + self.life_max_s
            )
            self.world.boot(loop, plans.pop(0) if plans else None)
            for server in dict.fromkeys(self.servers.values()):
                server.boot()
            self._live(loop)
            now_s = loop.time() + REBOOT_S
            if self.world.violation is None and self.tampered:
                self._at_the_end()
                return
            if self.world.violation is None and self.world.dead:
                self._after_crash()
            elif self.world.violation is None:
                self._at_the_end()
                return

    def _live(self, loop: SimLoop) -> None:
        try:
            loop.run(self._life())
            if loop.errors:
                self.world.violate(f"the loop heard of {loop.errors[0]}")
            elif loop.alive():
                self.world.violate(f"tasks are left over: {loop.stacks()}")
        except HaltedError:
            pass
        except (DeadlockError, LivelockError) as error:
            self.world.violate(f"{type(error).__name__}: {error}")
        except Exception as error:
            self.world.violate("".join(traceback.format_exception(error)))
        finally:
            loop.abandon()

    def _after_crash(self) -> None:
        """Look at the disks as the crash left them, before anything repairs them."""
        self.world.dead = False  # so that a violation counts
        found = self.authority()
        lost = self.world.boots > self._boots
        if isinstance(found, ServedFile):
            lost, found.owes = found.owes, False
        self.checker.crash(power=lost)
        self._boots = self.world.boots
        if self.scenario.meddling:
            self._meddle(self.scenario.meddling)
        if found is not None and (wrong := self.checker.check(bytes(found.view), "after a crash")):
            self.world.violate(wrong)

    def _flush_failed(self, file: object) -> None:
        """A flush failed, whoever asked for it; of the authority it may take back what was read."""
        if file is self.authority():
            self.checker.flush_failed()

    def _server_lost(self, file: ServedFile, loss: Loss) -> None:
        """A server had a misfortune; the file has seen it already."""
        if loss.kind == "reboot":
            file.owes = True
            if file.exposed and file is self.authority():
                self.checker.lose()
            file.exposed = False
        if loss.tamper and file.lost_s is not None:
            self._tamper(file, loss.tamper)

    def _tamper(self, file: ServedFile, how: str) -> None:
        """Somebody uses a server's absence. Nothing else happens in this run any more."""
        world, server = self.world, file.server
        if how == "older":
            file.older = True
        else:
            for names in (self.source_names.names, self.target_names.names):
                for name in [name for name, value in names.items() if value is file]:
                    content = world.rng.randbytes(file.size)
                    names[name] = ServedFile(server, INODES + world.tick(), file.size, content)
            file.tampered = True
        world.tell("somebody tampers:", how)
        self.tampered.append(file)
        world.plan = None
        server.losses = [one for one in server.losses if not one.tamper]

    def _meddle(self, what: str) -> None:
        """Somebody changes the files while nobody is looking."""
        committed = self.outcome().authority is Authority.TARGET
        part = f".disk.mirrord-{JOB_ID}.part"
        if what == "map lost":
            self.files.map_lost = True
        elif what == "target removed" and part in self.target_names.names and not committed:
            self.target_names.change(part, None, self.target_names.names[part])
            self.target_names.sync()
        elif (
            what == "source replaced"
            and "disk" in self.source_names.names
            and committed
            and not self.scenario.source_device
        ):
            file = SimFile(self.world, self.world.tick(), self.scenario.size)
            self.source_names.names["disk"] = file
            self.source_names.sync()
            self.replaced = file
        else:
            return
        self.scenario.meddling = ""
        self.world.tell("somebody meddles:", what)

    def outcome(self, *, durable: bool = False) -> Outcome:
        """Fold the journal, as it is seen or as a power cut would leave it at worst."""
        log = self.files.log
        if log is None:
            return Outcome()
        return fold(parse(bytes(log.durable if durable else log.view)).records)

    def authority(self) -> SimFile | None:
        """Return the file that the journal makes the truth."""
        try:
            target = self.outcome().authority is Authority.TARGET
        except DamagedError as error:
            self.world.violate(f"the journal is damaged: {error}")
            return None
        names = (self.target_names if target else self.source_names).names
        if "disk" not in names:
            self.world.violate(f"the {'target' if target else 'source'} is gone: {list(names)}")
            return None
        return names["disk"]

    def committed(self) -> bool:
        """Whether COMMIT is durable, looked at from outside of the engine."""
        try:
            return self.outcome(durable=True).authority is Authority.TARGET
        except DamagedError:
            return False

    # One life

    async def _life(self) -> None:
        """What the disk's process does, with the guests and the operator around it."""
        self._adopted: list[asyncio.Task[None]] = []
        self._moved_on = asyncio.Event()  # the disk is where it will stay
        disk, job = await self._open()
        if self.ended is not None:
            self._moved_on.set()
        if disk.size != self.scenario.size:
            self.world.violate(f"the disk's size changed to {disk.size}")
        async with asyncio.TaskGroup() as group:
            for guest in self.guests:
                group.create_task(self._use(guest, disk), name="guest")
            if job is None and self.ended is None:
                job = await self._begin(disk)
            if job is not None:
                operator = group.create_task(self._operate(job), name="operator")
                self._running = asyncio.create_task(job.run(), name="job")
                status = await self._ending(self._running)
                operator.cancel()
                self._concluded(status.phase)
                if status.source_kept is not None:
                    self.kept = status.source_kept
        await self.reader.read_all(disk)
        await asyncio.gather(*self._adopted)
        await disk.backend.close()
        late = {task for task in self.world.loop.alive() if task is not asyncio.current_task()}
        if late:  # a call that nobody waits for any more ends by itself
            await asyncio.wait(late, timeout=LATE_S)

    async def _ending(self, running: asyncio.Task[JobStatus]) -> JobStatus:
        """Wait for the job; when the process is asked to stop, it dies once the job has let go."""
        await asyncio.wait({running})
        if running.cancelled():
            self.world.crash(power=False)
            await self.world.never()
        return running.result()

    async def _open(self) -> tuple[Disk, Job | None]:
        try:
            if self.world.life == 1:
                return Disk("disk", await self._places().source.open()), None
            recovered = await recover(
                "disk", self._places(), SimStore(self.files), self._request(), self._around()
            )
        except OSError as error:
            # The process ends with an error and is started again.
            self.world.tell("recovery failed", error)
            if not self.world.faults_hit:
                self.world.violate(f"recovery failed without a fault: {error}")
            self.world.crash(power=False)
            await self.world.never()
        if recovered.job is None and self.outcome().state is not State.EMPTY:
            done = self.outcome().done or {}
            self.kept = done.get("source_kept", self.kept)
            self._concluded(Phase(done.get("phase", "done")))
        self.world.tell("serves", recovered.location)
        return recovered.disk, recovered.job

    async def _begin(self, disk: Disk) -> Job | None:
        """Ask for the move while the guests are at work."""
        await elapse(self.rng.choice((0.0, 0.01)))
        try:
            return await start(
                disk, self._places(), SimStore(self.files), self._request(), self._around()
            )
        except (OSError, RefusedError) as error:
            if not self.world.faults_hit and not has_given_up(self, "source"):
                self.world.violate(f"the move was refused without a fault: {error}")
            self.world.tell("refused", error)
            self.files.log = self.files.map = None  # a refused job's directory is removed
            self._concluded(Phase.FAILED)
            return None

    async def _use(self, guest: Guest, disk: Disk) -> None:
        if self.world.life > 1:
            await guest.read_all(disk)
        if guest.late:
            await self._moved_on.wait()
        await guest.run(disk)

    async def _operate(self, job: Job) -> None:
        """Give the scenario's commands, and later see to it that the move ends."""
        world = self.world
        began_s = world.loop.time()
        while self.commands:
            at_s, name = self.commands[0]
            await elapse(max(0.0, began_s + at_s - world.loop.time()))
            self.commands.pop(0)
            await self._command(job, name)
        await elapse(CALM_S if self.scenario.faults else PATIENCE_S)
        while world.loop.time() - began_s < self.cancel_s:
            if job.migration.phase in (Phase.PAUSED, Phase.DEGRADED):
                await self._command(job, "resume")
            elif self.scenario.cutover == "manual":
                await self._command(job, "cutover")
            await elapse(3.0)
        world.violate(f"the job does not end: {job.migration.tell()}")

    async def _command(self, job: Job, name: str) -> None:
        self.world.tell("operator", name)
        try:
            if name == "stop":
                self._running.cancel()
            elif name == "limit":
                await job.limit(self.rng.choice((0, 2000)))
            else:
                await getattr(job, name)()
        except RefusedError as error:
            self.world.tell("refused:", error)
        else:
            self.cancelled |= name == "cancel"

    def _concluded(self, phase: Phase) -> None:
        self.world.tell("the job ended:", phase.value)
        if self.ended not in (None, phase):
            self.world.violate(f"the job ended {self.ended.value}, and now {phase.value}")
        self.ended = phase
        self._moved_on.set()

    def _arm(self, moment: str) -> None:
        for server in dict.fromkeys(self.servers.values()):
            server.arm(moment)

    # What the engine is given

    def _places(self) -> Places:
        """Return both places, as a process makes them."""
        return Places(self._place("source"), self._place("target"))

    def _place(self, side: str) -> SimPlace:
        scenario, source = self.scenario, side == "source"
        able = scenario.source_able if source else scenario.target_able
        names = self.source_names if source else self.target_names
        server = self.servers.get(side)
        if server is not None:
            return SimShare(server, names, "disk", side, able, committed=self.committed)
        device = scenario.source_device if source else scenario.target_device
        return SimPlace(
            self.world, names, "disk", side, able, committed=self.committed, device=device
        )

    def _request(self) -> JobRequest:
        scenario = self.scenario
        return JobRequest(
            JOB_ID, "disk", "/source/disk", "/target/disk", keep_source=scenario.keep_source,
            verify=scenario.verify, limit=scenario.limit, mode=scenario.mode,
            cutover=scenario.cutover,
        )  # fmt: skip

    def _around(self) -> Surroundings:
        return Surroundings(
            wall=self.world.loop.time,
            moved=self._moved,
            adopt=lambda work: self._adopted.append(self.world.loop.create_task(work)),
            changed=self._changed,
            settings=self.scenario.settings,
        )

    async def _moved(self, location: str) -> None:
        await self.world.call("store", "moved", [lambda: setattr(self, "location", location)])

    def _changed(self, job: Job) -> None:
        migration = job.migration
        reason = migration.story[-1].reason
        self.phases.add(migration.phase.value)
        self.world.tell("phase", migration.phase.value, ":", reason)
        if reason.startswith("internal error"):
            self.world.violate(reason)
        self._arm("move")
        if migration.phase is Phase.RETIRING:
            self._moved_on.set()
            self._arm("commit")
        status = job.status()
        if not 0 <= status.bytes_remaining <= self.scenario.size:
            self.world.violate(f"{status.bytes_remaining} bytes are said to remain")

    # The end

    def _at_the_end(self) -> None:
        wrong = verdict(self)
        if wrong is not None:
            self.world.violate(f"at the end ({self.ended}): {wrong}")
        elif not self.tampered:
            self.world.crash(self.rng.random() < 0.5)
            self._after_crash()
