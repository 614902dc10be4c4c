"""The limits agree with one another."""

from __future__ import annotations

from mirrord.core.inbox import INBOX_BYTES, SPARE_BYTES
from mirrord.nbd.limits import Limits

MIB = 1 << 20


def test_limits_leave_room_for_the_largest_request() -> None:
    limits = Limits()
    assert limits.payload_bytes_max >= 32 * MIB  # N13
    assert limits.payload_bytes_max <= limits.held_bytes_max <= limits.held_total_bytes_max


def test_memory_stays_below_256_mib_when_every_client_holds_what_it_may() -> None:
    limits = Limits()
    interpreter = 48 * MIB
    inboxes = limits.connections_max * INBOX_BYTES
    allowances = limits.clients_max * limits.held_allowance_bytes
    assert interpreter + inboxes + allowances + limits.held_total_bytes_max < 256 * MIB


def test_an_option_fits_into_the_inbox() -> None:
    assert Limits().option_bytes_max + 16 <= INBOX_BYTES - SPARE_BYTES
