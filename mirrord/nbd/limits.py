"""Every limit an NBD client meets, with the reason for its number."""

from __future__ import annotations

from dataclasses import dataclass

from mirrord.core.geometry import KIB, MIB


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server grants its clients; all may be changed, the defaults suit one disk."""

    # QEMU's answers to CVE-2024-7409 (idle clients): seconds and connections.
    handshake_s: float = 10.0
    connections_max: int = 100
    clients_max: int = 16  # past the handshake, on one export: a guest uses one, multi-conn 4 to 16

    # A handshake needs fewer than ten options of less than 1 KiB; 4 GiB ones were CVE-2017-15119.
    options_max: int = 64
    option_bytes_max: int = 64 * KIB
    name_bytes_max: int = 4096  # the protocol's limit of a string
    contexts_max: int = 32  # queries in one option; two contexts exist

    # The largest payload every client may count on (protocol); what QEMU's server takes.
    payload_bytes_max: int = 32 * MIB

    # Held: payloads and data of requests in flight, and replies nobody has read. Above it the
    # connection isn't read any more, nobody is dropped.
    requests_max: int = 64  # per connection; QEMU's client keeps 16 in flight
    held_bytes_max: int = 64 * MIB  # per connection: one largest payload and one being received
    # All connections together. With the interpreter and a copy under way, memory stays below
    # 256 MiB whatever clients do.
    held_total_bytes_max: int = 128 * MIB
    # What a connection may hold although others hold the total: it goes on, in small steps.
    held_allowance_bytes: int = 1 * MIB
    unread_bytes_max: int = 8 * MIB  # replies a client hasn't read, before its requests wait

    stall_s: float = 60.0  # without a byte inside a request: closed, nothing of it applied
    extents_max: int = 4096  # in one block status chunk: 32 KiB (the protocol allows 2^20)
