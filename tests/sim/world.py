"""The simulated machine: who may die when, which call fails, and what was in flight.

Every effect on the world goes through `World.call`, which makes it a crash point twice: before
the effect and after it, before the acknowledgement. What a crash then leaves behind is decided
by the objects that register with the world (`disk.SimFile`, `disk.SimDirectory`, `store.SimFiles`):

* `kill`: the process dies. Everything written stays visible, its memory is gone; of the calls
  in flight each part lands or doesn't.
* `power`: the machine dies. Also, what was not made durable is kept, lost or torn, piece by piece.

Once `dead` is set nothing has an effect any more; the loop stops after the present callback.
`tests/README.md` has the whole fault model.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mirrord.storage.completion import Completion
from tests.sim.loop import SimLoop

# Seconds a call may take: none, a fast disk, a busy one, a very busy one.
DELAYS_S = (0.0, 0.0, 0.0002, 0.001, 0.001, 0.005, 0.03)
REBOOT_S = 3.0  # from a crash to the next start, so that no timer of one life looks like another's


class ViolationError(Exception):
    """The simulated run broke a promise."""


class Survivor(Protocol):
    """Something that outlives the process."""

    def crash(self, power: bool) -> None:
        """Forget what a crash of this kind takes away."""


class Owner(Protocol):
    """What a call belongs to: it may not be closed before its calls have ended."""

    def began(self) -> None: ...

    def ended(self) -> None: ...


@dataclass(slots=True)
class CrashPlan:
    """When the process or the machine dies: at the `nth` point that fits.

    `who` and `operation` are None for any point; `stage` is "before" or "after".
    """

    power: bool
    nth: int
    who: str | None = None
    operation: str | None = None
    stage: str | None = None

    def hits(self, who: str, operation: str, stage: str) -> bool:
        if self.who is not None and (self.who, self.operation, self.stage) != (
            who,
            operation,
            stage,
        ):
            return False
        self.nth -= 1
        return self.nth == 0


@dataclass(slots=True)
class Fault:
    """The `nth` call of one operation fails (or hangs); `until_s` > 0 makes it go on failing."""

    who: str
    operation: str
    nth: int
    errno: int = errno.EIO
    until_s: float = 0.0
    hang_s: float = 0.0
    lands: float = 0.5  # how likely each part of a failed call has its effect all the same

    def hits(self, now_s: float) -> bool:
        self.nth -= 1
        return self.nth == 0 or (self.nth < 0 and now_s < self.until_s)


class World:
    """What outlives a process, and the chance that rules it."""

    def __init__(self, rng: random.Random, *, keep_story: bool = True) -> None:
        self.rng = rng
        self.random = rng.random
        self.survivors: list[Survivor] = []
        self.faults: list[Fault] = []
        self.faults_hit: set[tuple[str, str]] = set()
        self.eager: dict[str, float] = {}  # how often a call of `who` is done without waiting
        self.slow: dict[str, float] = {}  # factor on the delays of `who`
        self.plan: CrashPlan | None = None
        self.lookouts: list[Callable[[str, str, str], None]] = []  # told of each point
        self.life = 0
        self.boots = 1  # changes with each power cut
        self.dead = True
        self.points = 0
        self.loop: SimLoop
        self.flush_failed: Callable[[object], None] = lambda file: None  # told of each
        self.violation: str | None = None
        self._tick = 0
        self._in_flight: dict[_Call, None] = {}
        self._story: list[tuple[float, tuple[Any, ...]]] = []
        self._keep_story = keep_story

    def boot(self, loop: SimLoop, plan: CrashPlan | None) -> None:
        """Begin a life in `loop`, which `plan` may end."""
        self.loop = loop
        self.plan = plan
        self.life += 1
        self.dead = False
        self.tell("life", self.life, "begins")

    def tick(self) -> int:
        """Return the next number; the order of everything that matters is told by these."""
        self._tick += 1
        return self._tick

    def tell(self, *words: Any) -> None:
        """Add a line to the story."""
        if self._keep_story:
            self._story.append((self.loop.time(), words))

    def story(self, last: int = 400) -> str:
        """Return the last lines of the story."""
        return "\n".join(
            f"{now_s:10.4f}  {' '.join(map(str, words))}" for now_s, words in self._story[-last:]
        )

    def violate(self, text: str) -> None:
        """A promise is broken: remember the first one and stop."""
        if self.violation is None and not self.dead:
            self.violation = text
            self.tell("VIOLATION", text)
            self.loop.halt()

    def crash(self, power: bool) -> None:
        """The process dies now; with `power` the whole machine."""
        if self.dead:
            return
        self.tell("CRASH", "power cut" if power else "kill")
        self.dead = True
        self.plan = None
        self.loop.halt()
        for call in self._in_flight:
            call.land(self.random)
        self._in_flight.clear()
        self.boots += power
        for survivor in self.survivors:
            survivor.crash(power)

    def point(self, who: str, operation: str, stage: str) -> bool:
        """Tell whether the process is dead; this may be where it dies."""
        self.points += 1
        if self.dead:
            return True
        if self.plan is not None and self.plan.hits(who, operation, stage):
            self.tell("at", stage, who, operation)
            self.crash(self.plan.power)
            return True
        for lookout in self.lookouts:
            lookout(who, operation, stage)
        return False

    def lose(self, owner: Owner, why: Callable[[], OSError], *, gone: bool) -> None:
        """Nobody will hear the answers to the calls of `owner`: they fail by `why`.

        With `gone` each part that had no effect yet has it now, or never; else they go on.
        """
        for call in [call for call in self._in_flight if call.owner is owner]:
            call.lose(why, gone=gone)

    async def call(
        self,
        who: str,
        operation: str,
        effects: Sequence[Callable[[], None]],
        *,
        failed: Callable[[], None] | None = None,
        told: object = "",
        owner: Owner | None = None,
        by_hand: bool = False,
    ) -> None:
        """Have the effects, at one or two moments, then return; or fail as the faults say.

        Cancelling abandons the answer, never the effects. `failed` is run when a fault says so,
        instead of some of the effects. `owner` hears when the call really begins and ends. With
        `by_hand` the answer is a completion.
        """
        if self.dead or self.point(who, operation, "before"):
            await self.never()
        fault = self._fault(who, operation)
        if fault is None and self.random() < self.eager.get(who, 0.0):
            for effect in effects:
                effect()
            self.tell(who, operation, told)
            if self.point(who, operation, "after"):
                await self.never()
            return
        call = _Call(self, who, operation, effects, fault, failed, told, owner)
        if by_hand:
            call.answer = Completion(self.loop)
        self._in_flight[call] = None
        self.loop.call_later(call.delay_s(), call.step)
        if (error := await call.answer) is not None:
            raise error

    async def never(self) -> None:
        """Wait for what never comes: the dead do nothing."""
        await asyncio.get_running_loop().create_future()

    def _fault(self, who: str, operation: str) -> Fault | None:
        found = None
        for fault in self.faults:
            if fault.who == who and fault.operation == operation and fault.hits(self.loop.time()):
                found = fault
        if found is not None:
            self.faults_hit.add((who, operation))
            self.tell(
                "FAULT",
                who,
                operation,
                f"hangs {found.hang_s} s" if found.hang_s else os.strerror(found.errno),
            )
        return found


class _Call:
    """One call in flight: it goes on whether or not somebody waits for it."""

    __slots__ = (
        "answer",
        "effects",
        "failed",
        "fault",
        "hung",
        "lost",
        "operation",
        "over",
        "owner",
        "told",
        "who",
        "world",
    )

    def __init__(
        self,
        world: World,
        who: str,
        operation: str,
        effects: Sequence[Callable[[], None]],
        fault: Fault | None,
        failed: Callable[[], None] | None,
        told: object,
        owner: Owner | None,
    ) -> None:
        self.world = world
        self.who = who
        self.operation = operation
        self.effects = list(effects)
        self.fault = fault
        self.failed = failed
        self.told = told
        self.owner = owner
        self.hung = False
        self.lost = False  # nobody hears the answer
        self.over = False  # and it has no more effects
        if owner is not None:
            owner.began()
        self.answer: asyncio.Future[OSError | None] = world.loop.create_future()
        if len(self.effects) > 1 and world.random() < 0.5:
            world.rng.shuffle(self.effects)

    def delay_s(self) -> float:
        world = self.world
        delay_s = DELAYS_S[int(world.random() * len(DELAYS_S))] * world.slow.get(self.who, 1.0)
        if self.fault is not None and not self.hung:
            self.hung = True
            delay_s += self.fault.hang_s
        return delay_s

    def step(self) -> None:
        """Have some of the effects; the last ones come before the answer."""
        world = self.world
        if world.dead or self.over:
            return
        if self.fault is not None and not self.fault.hang_s:
            self._fail(self.fault)
            return
        now, later = self.effects, []
        if len(now) > 1 and world.random() < 0.3:
            half = len(now) // 2
            now, later = now[:half], now[half:]
        for effect in now:
            effect()
        self.effects = later
        if later:
            world.loop.call_later(self.delay_s(), self.step)
            return
        world.tell(self.who, self.operation, self.told)
        if world.point(self.who, self.operation, "after"):
            return
        if world.random() < 0.5:
            self.reply()
        else:
            world.loop.call_later(DELAYS_S[int(world.random() * len(DELAYS_S))], self.reply)

    def reply(self) -> None:
        if not self.world.dead:
            self._end()
            self._answer(None)

    def _answer(self, error: OSError | None) -> None:
        if isinstance(self.answer, Completion):
            self.answer.end(error)
        elif not self.answer.done():
            self.answer.set_result(error)

    def _end(self) -> None:
        self.world._in_flight.pop(self, None)
        if self.owner is not None and not self.lost:
            self.owner.ended()

    def lose(self, why: Callable[[], OSError], *, gone: bool) -> None:
        """The connection to the other side is gone; see `World.lose`."""
        if not self.lost:
            self.lost = True
            if self.owner is not None:
                self.owner.ended()
            self._answer(why())
        if gone:
            self.land(self.world.random)
            self.over = True
            self.world._in_flight.pop(self, None)

    def land(self, chance: Callable[[], float]) -> None:
        """The process died: each part of the call that had no effect yet has it, or never."""
        if self.fault is not None and not self.fault.hang_s:
            return
        for effect in self.effects:
            if chance() < 0.5:
                effect()
        self.effects = []

    def _fail(self, fault: Fault) -> None:
        world = self.world
        if self.failed is not None:
            self.failed()
        else:
            for effect in self.effects:
                if world.random() < fault.lands:
                    effect()
        if world.point(self.who, self.operation, "after"):
            return
        self._end()
        self._answer(OSError(fault.errno, os.strerror(fault.errno)))
