"""What is wrong with a run: what guests may complain about, and what is left at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrord.core.journal import Authority, Kind, State
from mirrord.core.migration import Phase
from mirrord.storage.backend import UnreachableError
from tests.sim.remote import ServedFile

if TYPE_CHECKING:
    from tests.sim.run import Machine

# What a guest may have to wait: the target's budget, the gate, the slowest disk, and some room.
LATENCY_MAX_S = 1.5


def served(machine: Machine, side: str) -> list[ServedFile]:
    """Return the files of a side that is on a server."""
    if side not in machine.servers:
        return []
    names = machine.source_names if side == "source" else machine.target_names
    files = [file for file in names.names.values() if isinstance(file, ServedFile)]
    return [*files, *(file for file in machine.tampered if file not in files)]


def has_given_up(machine: Machine, side: str) -> bool:
    """Tell whether a side's disk had a reason to: its server away for long, or tampered with."""
    limit_s = 0.9 * machine.scenario.steady.io_timeout_s
    return any(file.tampered or file.away_s() > limit_s for file in served(machine, side))


def complain_of_delay(machine: Machine, took_s: float) -> None:
    """A guest's request took so long. Before the commit only the source may be to blame."""
    if took_s <= LATENCY_MAX_S or Kind.COMMIT in machine.files.kinds:
        return
    began_s = machine.world.loop.time() - took_s
    if all(file.was_calm_since(began_s) for file in served(machine, "source")):
        machine.world.violate(f"a guest's request took {took_s:.2f} s before the commit")


def complain(machine: Machine, doing: str, error: OSError, took_s: float) -> None:
    """A guest's request failed."""
    hit = {who for who, _ in machine.world.faults_hit}
    committed = Kind.COMMIT in machine.files.kinds
    if "source" in hit or ("store", "write_log") in machine.world.faults_hit:
        return
    if ("store", "sync_write_log") in machine.world.faults_hit:
        return
    if "target" in hit and committed:
        return
    sides = ("source", "target") if committed else ("source",)
    files = [file for side in sides for file in served(machine, side)]
    if any(file.tampered for file in files):
        return
    timeout_s = machine.scenario.steady.io_timeout_s
    began_s = machine.world.loop.time() - took_s
    calm = all(file.was_calm_since(began_s) for file in files)
    if isinstance(error, UnreachableError) and took_s > 0.99 * timeout_s and not calm:
        return
    machine.world.violate(f"a guest's {doing} failed after {took_s:.2f} s: {error!r}")


def verdict(machine: Machine) -> str | None:
    """Return what is wrong when everything has ended, or None."""
    if machine.tampered:
        return _check_tampered(machine)
    return _check_ending(machine) or _check_names(machine) or _check_content(machine)


def _check_tampered(machine: Machine) -> str | None:
    for file in machine.tampered:
        backend = file.backend
        if file.tampered and backend is not None and backend._tie.file is not None:
            return "it serves what is not its own"
    return None


def _check_ending(machine: Machine) -> str | None:
    outcome = machine.outcome()
    if machine.ended is Phase.DONE:
        if outcome.authority is not Authority.TARGET or not outcome.finished:
            return f"the journal says {outcome.story}"
        return None if machine.location == "/target/disk" else "the registry was not told"
    if outcome.state is not State.EMPTY and not outcome.finished:
        return f"the journal says {outcome.story}"
    if outcome.authority is not Authority.SOURCE:
        return f"the journal says {outcome.story}"
    if machine.ended is Phase.CANCELLED:
        return None if machine.cancelled else "nobody cancelled it"
    hit = {who for who, _ in machine.world.faults_hit}
    if not hit - {"target"} and not has_given_up(machine, "source"):
        return f"it failed; faults: {machine.world.faults_hit}"
    return None


def _check_names(machine: Machine) -> str | None:
    scenario = machine.scenario
    source, target = set(machine.source_names.names), set(machine.target_names.names)
    done = machine.ended is Phase.DONE
    hit = {who for who, _ in machine.world.faults_hit}
    if (
        done
        and machine.kept is not None
        and not scenario.keep_source
        and "source-place" not in hit
        and "target-place" not in hit
        and machine.replaced is None
    ):
        return f"the source was kept: {machine.kept}"
    if machine.replaced is not None:
        stays = machine.source_names.names.get("disk") is machine.replaced
        return None if stays else "a file that was not ours is gone"
    kept = not done or scenario.source_device or machine.kept is not None
    if source != ({"disk"} if kept else set()) and not hit & {"source-place", "target-place"}:
        return f"the source's directory has {source}"
    there = done or scenario.target_device
    if target != ({"disk"} if there else set()) and "target-place" not in hit:
        return f"the target's directory has {target}"
    return None


def _check_content(machine: Machine) -> str | None:
    file = machine.authority()
    if file is None:
        return "no authority"
    if isinstance(file, ServedFile) and file.owes:  # whoever kept what it forgot has ended
        machine.checker.crash(power=True)
    for index in list(file.forgettable) if not machine.checker.shaky else ():
        file.drop(index)
    return machine.checker.check(bytes(file.view), "at rest")
