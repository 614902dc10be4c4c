"""What may be in flight: credits, lanes, and how much of the bulk."""

from __future__ import annotations

import pytest

from mirrord.errors import ProtocolError
from mirrord.smb import wire
from mirrord.smb.channel import CREDITS_ASKED_MAX, CREDITS_WANTED, Channel
from mirrord.smb.lanes import (
    BULK_BYTES_BESIDE_SMALL,
    BULK_BYTES_MAX,
    OVERTAKEN_BYTES_MAX,
    SMALL_BYTES_MAX,
    SMALL_REMEMBERED,
    Request,
)  # fmt: skip
from tests.smb.speaking import FILE, Asked, answer, feed, framed, read, said, started
from tests.smb.test_channel import control

OVERTAKES_MAX = OVERTAKEN_BYTES_MAX // 4096  # of `read`

BULK = 256 << 10
ENOUGH = 2000


def pump(channel: Channel) -> list[Asked]:
    """Send what may be sent."""
    channel.pump(0)
    return said(channel)


def reply(channel: Channel, asked: Asked, credits: int | None = None) -> None:
    """Answer with a refusal, and give back the credits that it cost."""
    credits = max(asked.charge, 1) if credits is None else credits
    feed(channel, framed(answer(asked.command, asked.message_id, credits=credits)))


def commands(asked: list[Asked]) -> list[int]:
    """Return what was asked."""
    return [one.command for one in asked]


def flush() -> Request:
    """Return a request that moves nothing."""
    return Request(wire.FLUSH, wire.flush_body(FILE))


# Credits


def test_the_window_is_never_overrun() -> None:
    channel = started(credits=3)
    for _ in range(5):
        channel.submit(read())
    first = pump(channel)
    assert [one.message_id for one in first] == [1, 2, 3]
    assert pump(channel) == []
    reply(channel, first[1], credits=0)
    assert pump(channel) == []
    reply(channel, first[0], credits=1)
    assert [one.message_id for one in pump(channel)] == [4]
    assert channel.waiting == 1


def test_credits_are_asked_for_until_there_are_enough() -> None:
    channel = started(credits=2)
    channel.submit(read(3 * wire.CREDIT_BYTES))
    channel.submit(read())
    (first,) = pump(channel)
    assert (first.charge, first.credits) == (1, 1 + CREDITS_ASKED_MAX)
    reply(channel, first, credits=1 + CREDITS_ASKED_MAX)
    (bulk,) = pump(channel)
    assert (bulk.message_id, bulk.charge) == (2, 3)
    assert bulk.credits == 3 + CREDITS_ASKED_MAX
    reply(channel, bulk, credits=CREDITS_WANTED - CREDITS_ASKED_MAX + 1)
    channel.submit(read())
    (last,) = pump(channel)
    assert last.credits == 1 + 1  # 511 are left: one more is wanted
    reply(channel, last, credits=9)
    channel.submit(read())
    assert pump(channel)[0].credits == 1


def test_a_server_that_floods_with_credits_gets_no_longer_a_window() -> None:
    channel = started(credits=1)
    for _ in range(5):
        channel.submit(read())
        (one,) = pump(channel)
        reply(channel, one, credits=0xFFFF)
    for _ in range(0xFFFF // 1000 + 5):
        channel.control(control(charge=1000))
    assert len(pump(channel)) == 0xFFFF // 1000


def test_a_large_request_waits_for_what_is_in_flight() -> None:
    channel = started(credits=3)
    channel.submit(read())
    channel.submit(read())
    first, second = pump(channel)
    channel.submit(read(3 * wire.CREDIT_BYTES))
    assert pump(channel) == []
    reply(channel, first)
    assert pump(channel) == []
    reply(channel, second)
    assert [one.charge for one in pump(channel)] == [3]
    assert channel.refused == []


def test_when_nothing_is_in_flight_credits_are_asked_for() -> None:
    channel = started(credits=1)
    bulk = read(8 * wire.CREDIT_BYTES)
    channel.submit(bulk)
    (echo,) = pump(channel)
    assert (echo.command, echo.charge, echo.credits) == (wire.ECHO, 1, 8)
    assert pump(channel) == []
    reply(channel, echo, credits=8)
    (asked,) = pump(channel)
    assert asked.charge == 8
    reply(channel, asked, credits=1)  # the next time it is asked again
    channel.submit(bulk)
    assert commands(pump(channel)) == [wire.ECHO]
    assert channel.refused == []


def test_too_few_credits_refuse_all_large_requests_and_small_ones_go_on() -> None:
    channel = started(credits=2)
    bulk = [read(4 * wire.CREDIT_BYTES), read(2 * wire.CREDIT_BYTES), read(SMALL_BYTES_MAX + 1)]
    for request in bulk:
        channel.submit(request)
    (echo,) = pump(channel)
    reply(channel, echo, credits=1)
    assert pump(channel) == []
    assert channel.refused == bulk
    assert (channel.waiting, channel.in_flight) == (0, 0)
    channel.submit(read())
    (small,) = pump(channel)
    assert small.command == wire.READ
    reply(channel, small)


def test_who_tries_a_large_request_once_more_is_asked_for_once_more() -> None:
    channel = started(credits=1)
    bulk = read(4 * wire.CREDIT_BYTES)
    for credits in (1, 1, 4):
        channel.submit(bulk)
        (echo,) = pump(channel)
        assert echo.command == wire.ECHO
        reply(channel, echo, credits)
        asked = pump(channel)
        assert channel.refused == ([bulk] if credits == 1 else [])
        channel.refused.clear()
    assert [one.charge for one in asked] == [4]


def test_a_large_request_among_many_small_ones_is_sent_or_refused_in_the_end() -> None:
    for total, outcome in ((4, "sent"), (2, "refused")):
        channel = started(credits=total)
        bulk = read(4 * wire.CREDIT_BYTES)
        channel.submit(bulk)
        flying: list[Asked] = []
        for _ in range(500):
            while channel.waiting < 4:
                channel.submit(read())
            flying += pump(channel)
            if channel.refused or any(one.charge == 4 for one in flying):
                break
            reply(channel, flying.pop(0))
        else:
            pytest.fail("neither sent nor refused")
        assert (channel.refused == [bulk]) == (outcome == "refused")


def test_when_large_requests_are_refused_small_ones_are_sent_at_once() -> None:
    channel = started(credits=1)
    bulk = read(4 * wire.CREDIT_BYTES)
    for _ in range(OVERTAKES_MAX + 3):
        channel.submit(read())
    channel.submit(bulk)
    for _ in range(OVERTAKES_MAX):
        (small,) = pump(channel)
        assert small.command == wire.READ
        reply(channel, small)
    (echo,) = pump(channel)
    assert echo.command == wire.ECHO
    reply(channel, echo)
    assert commands(pump(channel)) == [wire.READ]
    assert channel.refused == [bulk]


def test_a_server_that_grants_nothing_is_given_up() -> None:
    channel = started(credits=1)
    channel.submit(read())
    (asked,) = pump(channel)
    channel.submit(read())
    assert pump(channel) == []
    reply(channel, asked, credits=0)
    with pytest.raises(ProtocolError, match="0 credits in all"):
        pump(channel)


def test_a_control_request_that_is_never_paid_for_ends_the_connection() -> None:
    channel = started(credits=2)
    channel.control(control(charge=3))
    channel.submit(read())
    (echo,) = pump(channel)
    assert (echo.command, echo.credits) == (wire.ECHO, 3)
    reply(channel, echo, credits=2)
    assert [(one.command, one.charge) for one in pump(channel)] == [(17, 3)]

    channel = started(credits=2)
    channel.control(control(charge=3))
    (echo,) = pump(channel)
    reply(channel, echo, credits=1)
    with pytest.raises(ProtocolError, match="2 credits in all"):
        pump(channel)


# Lanes


def test_control_goes_first_then_small_then_bulk() -> None:
    channel = started(credits=ENOUGH)
    channel.submit(read(BULK))
    channel.submit(read(SMALL_BYTES_MAX))
    channel.submit(flush())
    channel.control(control())
    assert commands(pump(channel)) == [17, wire.READ, wire.FLUSH, wire.READ]


def test_what_control_waits_for_others_do_not_take() -> None:
    channel = started(credits=2)
    channel.submit(read())
    (first,) = pump(channel)
    channel.control(control(charge=2))
    channel.submit(read())
    assert pump(channel) == []
    reply(channel, first)
    assert commands(pump(channel)) == [17]


def test_small_requests_overtake_bulk_only_so_often() -> None:
    channel = started(credits=ENOUGH)
    for _ in range(3 * OVERTAKES_MAX):
        channel.submit(read())
    channel.submit(read(SMALL_BYTES_MAX + 1))
    channel.submit(read(SMALL_BYTES_MAX + 1))
    overtaken = [1] * OVERTAKES_MAX
    assert [one.charge for one in pump(channel)] == [*overtaken, 2, *overtaken, 2, *overtaken]


def test_small_requests_that_overtake_nothing_are_not_counted() -> None:
    channel = started(credits=ENOUGH)
    for _ in range(2 * OVERTAKES_MAX):
        channel.submit(read())
    pump(channel)
    channel.submit(read())
    channel.submit(read(BULK))
    assert [one.charge for one in pump(channel)] == [1, 4]


def test_bulk_in_flight_is_bounded() -> None:
    channel = started(credits=ENOUGH)
    for _ in range(40):
        channel.submit(read(BULK))
    flying = pump(channel)
    assert len(flying) == BULK_BYTES_MAX // BULK
    reply(channel, flying.pop(0))
    assert len(pump(channel)) == 1


def test_bulk_in_flight_is_little_beside_small_requests() -> None:
    channel = started(credits=ENOUGH)
    for _ in range(SMALL_REMEMBERED + 60):
        channel.submit(read(BULK))
    assert not channel.beside_small
    channel.submit(read())
    small, *flying = pump(channel)
    assert small.charge == 1
    assert channel.beside_small
    assert len(flying) == BULK_BYTES_BESIDE_SMALL // BULK
    for _ in range(SMALL_REMEMBERED - 1):
        reply(channel, flying.pop(0))
        flying += pump(channel)
        assert len(flying) == BULK_BYTES_BESIDE_SMALL // BULK
    assert channel.beside_small
    reply(channel, flying.pop(0))
    assert not channel.beside_small
    assert len(flying) + len(pump(channel)) == BULK_BYTES_MAX // BULK


def test_small_requests_pass_bulk_that_may_not_go() -> None:
    channel = started(credits=ENOUGH)
    for _ in range(9):
        channel.submit(read(BULK))
    for _ in range(4 * OVERTAKES_MAX):
        channel.submit(read())
    asked = pump(channel)
    assert sum(one.charge == 1 for one in asked) == 4 * OVERTAKES_MAX
    assert sum(one.charge == 4 for one in asked) == BULK_BYTES_BESIDE_SMALL // BULK


def test_one_request_may_be_larger_than_the_bound() -> None:
    channel = started(credits=ENOUGH, piece_bytes=8 << 20)
    channel.submit(read(8 << 20))
    channel.submit(read(8 << 20))
    assert len(pump(channel)) == 1


def test_flushes_and_control_requests_hold_no_bulk_back() -> None:
    channel = started(credits=ENOUGH)
    for _ in range(40):
        channel.submit(read(BULK))
    channel.submit(flush())
    channel.control(control(charge=200))
    ours, flushed, *flying = pump(channel)
    assert len(flying) == BULK_BYTES_MAX // BULK
    reply(channel, ours)
    reply(channel, flushed)
    assert pump(channel) == []  # nor did they count as bulk
