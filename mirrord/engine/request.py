"""What a job was asked to do, how far it is, and the little that survives a kill of its process."""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, replace
from typing import Any

from mirrord.core.bitmap import bitmap_bytes_for
from mirrord.core.migration import Event, Phase, Step


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One move, as it was asked for. Rates in bytes a second, 0 is no limit."""

    job_id: str
    disk: str
    source: str
    target: str
    keep_source: bool = False
    verify: str = "full"  # full, none
    limit: int = 0
    mode: str = "auto"  # auto, passes, mirror
    cutover: str = "auto"  # auto, manual
    force: bool = False  # start without enough space
    wipe: bool = False  # overwrite a source block device before it is released
    created_s: float = 0.0  # seconds since 1970

    def changed(self, settings: dict[str, Any]) -> JobRequest:
        """Return the request with what the operator changed since."""
        known = {key: settings[key] for key in ("limit", "mode", "cutover") if key in settings}
        return replace(self, **known)

    def left_over(self, location: str, error: Exception) -> str:
        """Say what stays of a target that can't be deleted, and is no disk."""
        part = f".{location.rpartition('/')[2]}.mirrord-{self.job_id}.part"
        return f"the target {location} is left over, as {part} or as itself ({error}): don't use it"


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How a job is. Bytes, bytes a second, seconds; None where nothing true can be said."""

    job_id: str
    disk: str
    phase: Phase
    source: str
    target: str
    bytes_total: int
    bytes_copied: int
    bytes_remaining: int
    copy_rate: float | None
    dirty_rate: float | None
    eta_s: float | None
    passes: int
    pause_ms: float | None
    verified: bool
    reason: str
    created_s: float
    started_s: float | None
    ended_s: float | None
    limit: int
    source_kept: str | None
    story: tuple[Step, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return what the DONE record keeps: everything, of a long story its first step and the
        last ones."""
        kept = asdict(replace(self, story=()))
        kept["phase"] = self.phase.value
        story = self.story
        if len(story) > SUMMARY_STEPS_MAX:
            story = (story[0], *story[1 - SUMMARY_STEPS_MAX :])
        kept["story"] = [tell(step) for step in story]
        return kept


# Together they keep the DONE record below its 64 KiB, beside paths of 4 KiB each. A reason is a
# line or two; one with long paths is cut.
SUMMARY_STEPS_MAX = 60
REASON_BYTES_MAX = 400


def tell(step: Step) -> dict[str, Any]:
    """Return a step as it is kept in files."""
    return {
        "time_s": step.time_s,
        "phase": step.phase.value,
        "event": step.event.value,
        "reason": step.reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore"),
        "predicted_s": step.predicted_s,
    }


def hear(told: dict[str, Any]) -> Step:
    """Return the step that was told. Raises KeyError, ValueError, TypeError for what is none."""
    return Step(
        time_s=float(told["time_s"]),
        phase=Phase(told["phase"]),
        event=Event(told["event"]),
        reason=str(told["reason"]),
        predicted_s=None if told["predicted_s"] is None else float(told["predicted_s"]),
    )


_TAIL = struct.Struct("<QQII")  # bytes_total, bytes_copied, passes, scanned


def dirty_bytes_for(size: int) -> int:
    """Return the length of a job's mapped memory: the dirty bitmap and `Progress` behind it."""
    return -(-bitmap_bytes_for(size) // 8) * 8 + _TAIL.size


class Progress:
    """Counters that survive a kill, in the mapped memory behind the dirty bitmap.

    Like the bitmap they are worthless after a power cut: then `reset` them. `scanned` says that
    the bitmap has everything that was data when the job began; without it, scan again.
    """

    def __init__(self, dirty: memoryview) -> None:
        self._tail = dirty[len(dirty) - _TAIL.size :]
        self.bytes_total, self.bytes_copied, self.passes, scanned = _TAIL.unpack(self._tail)
        self.scanned = scanned == 1

    def reset(self) -> None:
        """Start from nothing."""
        self.bytes_total = self.bytes_copied = self.passes = 0
        self.scanned = False
        self.save()

    def summary(self) -> dict[str, int]:
        """Return the counters as the commit record keeps them, for a summary after a crash."""
        return {
            "bytes_total": self.bytes_total,
            "bytes_copied": self.bytes_copied,
            "passes": self.passes,
        }

    def restore(self, summary: dict[str, Any]) -> None:
        """Take the counters from a commit record."""
        self.bytes_total = int(summary.get("bytes_total", 0))
        self.bytes_copied = int(summary.get("bytes_copied", 0))
        self.passes = int(summary.get("passes", 0))

    def save(self) -> None:
        """Put the counters where a kill doesn't reach them."""
        _TAIL.pack_into(
            self._tail, 0, self.bytes_total, self.bytes_copied, self.passes, int(self.scanned)
        )
