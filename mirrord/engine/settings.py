"""The engine's numbers, each with its reason. Tests shrink them; users change few of them."""

from __future__ import annotations

from dataclasses import dataclass

from mirrord.core.geometry import KIB, MIB


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Sizes in bytes, times in seconds."""

    # Unit of copying, verifying and digests: large enough to amortise a request, small enough
    # that a guest's write waits at most about a millisecond for the copy of its chunk.
    chunk_bytes: int = MIB
    # A worker costs some 0.2 ms whatever it copies, so it takes some chunks that lie together, as
    # many as it copies in so long: a guest may wait for its lock when mirroring begins.
    piece_s: float = 0.01
    # One bit of the intent map; 1 MiB keeps the map of a 1 TiB disk at 128 KiB.
    region_bytes: int = MIB
    # Zero detection inside a chunk: the usual largest block of file systems.
    zero_bytes: int = 64 * KIB
    # Extents are asked for in steps, so that a huge sparse disk never blocks the loop for long.
    scan_bytes: int = 1024 * 1024 * MIB
    # A hole of so many chunks is compared as one; smaller ones are left to the walk, so that a
    # fragmented disk isn't asked for each of them.
    hole_chunks_min: int = 16
    # The target is flushed in the background this often (or after so many bytes), so that the
    # intent map can be cleared and the flush at the gate has little to do.
    checkpoint_s: float = 5.0
    checkpoint_bytes: int = 256 * MIB
    # A region stays marked for so many checkpoints after a guest's write (30 s): a hot region
    # pays its durable mark once, not again and again.
    hot_checkpoints: int = 6
    # What the guest uses is read into the target's cache before the cutover, up to so much and for
    # so long. It is read while the guest still works on the source.
    warm_bytes: int = 1024 * MIB
    warm_s: float = 5.0
    # The guest waits at most so long for the target (rule R14).
    target_budget_s: float = 2.0
    # No completion from the target for so long, while something is in flight: it hangs.
    target_stall_s: float = 5.0
    # The same for a flush, which may have a checkpoint's worth to write to a slow disk.
    flush_stall_s: float = 60.0
    # After a crash the guest waits so long for a move's target to be found, and for its removal:
    # then the move is given up and the source served. A slow disk has a checkpoint's worth to write
    # first; what is remote has less patience of its own.
    find_s: float = 20.0
    discard_s: float = 2.0
    # The gate reopens after this long without a commit (section 4 of the protocol).
    gate_s: float = 5.0
    # Delays between attempts after target trouble or a gate that timed out, doubling.
    retry_first_s: float = 0.5
    retry_max_s: float = 30.0
    # Sticky errors of the target: after so many attempts in a row the job pauses and waits
    # for the operator instead of hammering a broken device.
    target_attempts_max: int = 8
    # How often a paused-for-space job looks whether there is space again.
    space_probe_s: float = 5.0
    # Rates are sampled this often.
    sample_s: float = 1.0
    # Verification walks the chunks that were written since they were compared, at most so often.
    verify_passes_max: int = 4
    # Verification reads so many chunks at a time. One gives 1.0 GiB/s on a virtual disk where two
    # give 1.3, four and eight 1.7.
    verify_width: int = 4
    # How long an activity that was told to stop may take to finish what it has in flight.
    drain_s: float = 2.0
    # How often the sizes of both sides are checked against their sizes at the start.
    watch_s: float = 5.0
