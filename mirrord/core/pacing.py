"""How fast to copy, how long it will take, and whether another pass pays. Pure.

The clock comes in as `now_s`, any monotonic clock. Nothing here waits: `TokenBucket` says how
long to, `Window` says whether there is room, the rest are numbers for decisions and for people,
and a number that isn't true is not given (None).
"""

from __future__ import annotations

from mirrord.core.geometry import MIB
from mirrord.core.units import format_bytes, format_duration, format_rate

# One chunk of the largest size goes at once, whatever the rate.
BURST_BYTES = 4 * MIB
# Mirrored writes are charged without waiting. What they owe beyond this is forgotten, or the
# copier would stand still for minutes after a guest wrote for a while above the limit.
DEBT_MAX_S = 2.0
# More in flight gains nothing on any storage we know (10 Gbit/s over 50 ms is 62 MiB).
WINDOW_MAX_BYTES = 64 * MIB
# Waiting in a queue: below the first grow, above the second shrink (TCP Vegas has 1 and 3; four
# chunks keep a disk busy while one finished chunk is being accounted for).
QUEUED_CHUNKS = (1.0, 4.0)
# Fewer completions than this say nothing about latency.
ROUND_CHUNKS_MIN = 4
# A round that moved this much more than the one before it has proved that growing helps.
GAIN = 1.1
# Every so many rounds the least latency is measured anew, with a short queue: storage changes, and
# one lucky round must not rule for ever. Costs less than 2 % of the throughput.
PROBE_ROUNDS = 64
# A round of `Climb` has so many pieces. In models of copies to, from and inside a server, over
# links of 1 and 10 Gbit/s, with answers of a kind or spread as those of disks, 1 GiB moves with
# 0.90 of the rate that 4 MiB in flight give (geometric mean of 48, the least 0.64); with half as
# many pieces 0.89, with twice as many 0.91. The first rounds, which double what is in flight, are
# shorter, unless they fail. After something wider and something narrower have failed it stands
# still for some rounds: each trial costs latency or rate.
CLIMB_PIECES = 64
CLIMB_FIRST_PIECES = 16
CLIMB_POWER = 1 / 3
CLIMB_STILL_ROUNDS = 6
# What is sent so long after the last answer comes after a pause: what isn't copying says nothing.
CLIMB_PAUSE_S = 0.25
# Rates follow a change within seconds, and don't show single requests.
HALF_LIFE_S = 3.0
SAMPLE_MIN_S = 0.1
# A pass must be expected to leave at most this part of what it began with. Above it, passes get
# longer than the mirror phase they save: five of them would leave a quarter.
PASS_LEAVES_MAX = 0.75
# What is copied within a second needs no further pass: mirroring lasts no longer than it would.
PASS_MIN_S = 1.0


class TokenBucket:
    """A limit in bytes a second over everything a job writes to its target. Rate 0 is no limit.

    Over any stretch of time, what `delay_s` let through is at most rate x time + the burst, if no
    single amount exceeds the burst. `charge` never waits, so mirrored writes may push the balance
    below zero; the copier then pays for them by waiting.
    """

    def __init__(self, rate_bytes_s: int, now_s: float, burst_bytes: int = BURST_BYTES) -> None:
        self.rate_bytes_s = rate_bytes_s
        self.burst_bytes = burst_bytes
        self._balance = float(burst_bytes)
        self._at_s = now_s

    def delay_s(self, amount: int, now_s: float) -> float:
        """Return the seconds until `amount` may go; 0 means now: then `charge` it.

        Ask again after waiting: others may have been charged, or the rate changed.
        """
        self._refill(now_s)
        missing = min(amount, self.burst_bytes) - self._balance
        # The tolerance: a wait of exactly the answer must be enough in spite of rounding.
        if not self.rate_bytes_s or missing <= 1e-3:
            return 0.0
        return missing / self.rate_bytes_s

    def charge(self, amount: int, now_s: float) -> None:
        """Take `amount` out of the bucket, whether it is there or not."""
        self._refill(now_s)
        owed_max = self.rate_bytes_s * DEBT_MAX_S
        self._balance = max(self._balance - amount, min(self._balance, -owed_max))

    def set_rate(self, rate_bytes_s: int, now_s: float) -> None:
        """Change the limit from now on. What was saved up or is owed stays."""
        self._refill(now_s)
        self.rate_bytes_s = rate_bytes_s

    def _refill(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._at_s)
        self._at_s = max(self._at_s, now_s)
        saved = self._balance + elapsed_s * self.rate_bytes_s
        self._balance = min(float(self.burst_bytes), saved)


class Window:
    """How many bytes the copier may have in flight: `bytes`, between one chunk and a maximum.

    After each round (a window's worth of completions) it compares the round's mean latency with
    the least one seen. What is in flight beyond rate x least latency only waits in a queue
    (TCP Vegas: Brakmo and Peterson, 1995). A short queue, or a round that moved clearly more than
    the last, makes the window grow; a long one, which is latency that the guest suffers too,
    makes it shrink. `latency_s` is the last round's mean, infinite before its end.
    """

    def __init__(self, chunk_bytes: int, max_bytes: int = WINDOW_MAX_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self._short, self._long = (chunks * chunk_bytes for chunks in QUEUED_CHUNKS)
        self.max_bytes = max(chunk_bytes, max_bytes)
        self.bytes = min(self.max_bytes, 2 * chunk_bytes)  # one being read, one being written
        self.latency_s = float("inf")
        self._least_s = float("inf")
        self._last_rate = 0.0
        self._grew = False
        self._rounds = 0
        self._probing_for = 0  # the window to come back to
        self._round_started_s: float | None = None
        self._round_bytes = 0
        self._round_count = 0
        self._round_latency_s = 0.0

    def completed(self, length: int, latency_s: float, now_s: float) -> None:
        """Count a chunk that was copied; `latency_s` is its time in flight."""
        if self._round_started_s is None:
            self._round_started_s = now_s - latency_s
        self._round_bytes += length
        self._round_count += 1
        self._round_latency_s += latency_s
        if self._round_bytes >= self.bytes and self._round_count >= ROUND_CHUNKS_MIN:
            self._end_round(now_s - self._round_started_s)
            self._round_started_s = now_s
            self._round_bytes = self._round_count = 0
            self._round_latency_s = 0.0

    def _end_round(self, elapsed_s: float) -> None:
        latency_s = self.latency_s = max(self._round_latency_s / self._round_count, 1e-9)
        rate = self._round_bytes / max(elapsed_s, 1e-9)
        self._rounds += 1
        if self._probing_for:
            self._probe(latency_s)
            return
        self._least_s = min(self._least_s, latency_s)
        queued = self.bytes * (1 - self._least_s / latency_s)
        gained = self._grew and rate > self._last_rate * GAIN
        self._last_rate = rate
        self._grew = False
        if gained or queued < self._short:
            # Half as much again: a round late is soon enough, and an error is soon undone.
            self.bytes = min(self.max_bytes, self.bytes + max(self.chunk_bytes, self.bytes // 2))
            self._grew = True
        elif queued > self._long:
            self.bytes = max(self.chunk_bytes, self.bytes - self.bytes // 4)
        if self._rounds % PROBE_ROUNDS == 0:
            self._probing_for = self.bytes
            self.bytes = max(2 * self.chunk_bytes, self.bytes // 4)

    def _probe(self, latency_s: float) -> None:
        """End one of the two rounds of a probe: the first only lets the queue get shorter."""
        if self._rounds % PROBE_ROUNDS == 2:
            self._least_s = latency_s
            self.bytes = self._probing_for
            self._probing_for = 0


class Climb:
    """How much may be in flight to a server that others use too: as little as moves as much.

    `bytes` is from one piece to a maximum. Rounds with a wider or narrower bound are compared with
    rounds of the present one. A wider one stays if it moved clearly more (half as much again in
    flight must bring a seventh), a narrower one unless it moved clearly less. So what would only
    wait in a queue isn't sent, wherever that queue is, and latencies need not be understood: those
    of a server's disks differ anyhow. Nor does it matter what else bounds a copy: what it has no
    use for brings nothing. What it climbs is rate^3 / bytes in flight; a network's "power",
    rate / latency (Kleinrock, 1979), is rate^2 / bytes in flight, and gives up more rate.
    """

    def __init__(self, piece_bytes: int, max_bytes: int) -> None:
        self.bytes = 2 * piece_bytes
        self._piece_bytes = piece_bytes
        self._max_bytes = max_bytes
        self._present = self.bytes  # what others are compared with
        self._rate: float | None = None  # of the present one; None: to be measured
        self._wider = True  # what is tried next
        self._beginning = True  # until something wider has not helped
        self._still = 0  # rounds before something else is tried
        self._round_bytes = 0
        self._round_started_s: float | None = None
        self._last_s = 0.0

    def completed(self, length: int, sent_s: float, now_s: float) -> None:
        """Count a piece that was copied, whatever bounds how many there are."""
        if self._round_started_s is None or sent_s - self._last_s > CLIMB_PAUSE_S:
            self.restart()
            self._round_started_s = self._last_s = now_s
            return
        self._last_s = now_s
        self._round_bytes += length
        least = CLIMB_FIRST_PIECES if self._beginning else CLIMB_PIECES
        if self._round_bytes < max(least * self._piece_bytes, 2 * self.bytes):
            return
        rate = self._round_bytes / max(now_s - self._round_started_s, 1e-9)
        if self._round_bytes < CLIMB_PIECES * self._piece_bytes and not self._pays(rate):
            return  # which may be chance: measured for longer
        self._end_round(rate)
        self._round_started_s = now_s
        self._round_bytes = 0

    def restart(self) -> None:
        """Begin anew with what is present: something else bounded what was in flight."""
        self.bytes, self._rate = self._present, None
        self._round_started_s = None
        self._round_bytes = 0

    def _end_round(self, rate: float) -> None:
        if self.bytes == self._present:
            self._rate = rate if self._rate is None else (self._rate + rate) / 2
        elif self._pays(rate):
            self._present, self._rate = self.bytes, rate
            if not self._beginning:
                return  # measured again before the next
        else:
            self._beginning = False
            self._still = 0 if self._wider else CLIMB_STILL_ROUNDS
            self._wider = not self._wider
            self.bytes, self._rate = self._present, None
            return
        if self._still:
            self._still -= 1
            return
        self.bytes = self._next()
        if self.bytes == self._present:
            self._wider = not self._wider

    def _pays(self, rate: float) -> bool:
        """Tell whether the bound of this round is better than the present one, or is that."""
        if self.bytes == self._present:
            return True
        clearly: float = (self.bytes / self._present) ** CLIMB_POWER
        return rate > (self._rate or 0.0) * clearly

    def _next(self) -> int:
        pieces = self._present // self._piece_bytes
        if not self._wider:
            return max(1, pieces - max(1, pieces // 3)) * self._piece_bytes
        # Callers have four at a time: between two and four nothing pays.
        step = pieces if self._beginning or pieces <= 4 else pieces // 2
        return min(self._max_bytes, (pieces + step) * self._piece_bytes)


class Rates:
    """The copy rate and the unique dirty rate in bytes a second, smoothed over some seconds.

    0 until two samples are known.
    """

    def __init__(self) -> None:
        self.copy = 0.0
        self.dirty = 0.0
        self._last: tuple[float, int, int] | None = None
        self._known = False

    def sample(self, copied_bytes: int, dirtied_bytes: int, now_s: float) -> None:
        """Tell the totals so far; neither ever gets less. Any interval will do."""
        if self._last is None:
            self._last = (now_s, copied_bytes, dirtied_bytes)
            return
        at_s, copied_before, dirtied_before = self._last
        elapsed_s = now_s - at_s
        if elapsed_s < SAMPLE_MIN_S:
            return
        self._last = (now_s, copied_bytes, dirtied_bytes)
        weight = 1 - 0.5 ** (elapsed_s / HALF_LIFE_S) if self._known else 1.0
        self._known = True
        self.copy += weight * ((copied_bytes - copied_before) / elapsed_s - self.copy)
        self.dirty += weight * ((dirtied_bytes - dirtied_before) / elapsed_s - self.dirty)


def eta(
    remaining: int, copy_rate: float, dirty_rate: float, limit: int | None = None
) -> float | None:
    """Return the seconds until nothing remains; None if that won't happen by passes alone.

    While mirroring nothing becomes dirty: give 0 as `dirty_rate`. A burst may have been copied
    faster than `limit` allows for long (0 or None is none).
    """
    if remaining == 0:
        return 0.0
    net = min(copy_rate, limit or copy_rate) - dirty_rate
    return remaining / net if net > 0 else None


def pass_pays(remaining: int, copy_rate: float, dirty_rate: float) -> tuple[bool, str]:
    """Tell whether one more pass is better than mirroring now, and why, for log and status.

    A pass over `remaining` bytes takes remaining / copy_rate, in which dirty_rate goes on.
    """
    if copy_rate <= 0:
        return False, f"{format_bytes(remaining)} are left and nothing is being copied"
    lasts_s = remaining / copy_rate
    told = (
        f"a pass over {format_bytes(remaining)} at {format_rate(copy_rate)} "
        f"would take {format_duration(lasts_s)}"
    )
    if lasts_s < PASS_MIN_S:
        return False, f"{told}, no longer than mirroring will"
    leaves = dirty_rate * lasts_s
    told += f" and leave {format_bytes(leaves)}, as the guest dirties {format_rate(dirty_rate)}"
    if leaves > PASS_LEAVES_MAX * remaining:
        return False, f"{told}: too much to pay"
    return True, told


def share_of(limit: int) -> int:
    """Return the part of a limit that mirrored writes can't take from the copier: a quarter.

    A guest that writes more than the limit is not slowed, so something has to exceed it.
    """
    return max(1, limit // 4) if limit else 0
