"""Hostile clients against every limit that NBD clients meet, on a real disk process.

After each attack the process is the same one, its memory was below 256 MiB, its descriptors are
as many as before, and a guest was served all the time (`hostile.Attacked.check`). That each limit
is exact, and what happens inside: tests/frontends/test_nbd_limits.py.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrord.nbd import wire
from tests.e2e.hostile import MIB, SIZE, Attacked, is_open, option_replies, push, rest, take
from tests.helpers import eventually
from tests.nbd.speaking import STRUCTURED, contexts, go
from tests.nbd_writer import Client

pytestmark = pytest.mark.fault(27)

READ, WRITE, DISC, FLUSH = range(4)
CACHE, BLOCK_STATUS = 5, 7
DEADLINE_S = 1.0  # of a handshake and of a payload, where the configuration says so
NAMES = [wire.CONTEXT_ALLOCATION.encode(), wire.CONTEXT_DIRTY.encode()]


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """Serve a disk whose clients have little time, by the configuration."""
    config = f"[nbd]\nhandshake_s = {DEADLINE_S}\nstall_s = {DEADLINE_S}\n"
    one = Attacked(tmp_path_factory.mktemp("impatient"), config)
    yield one
    one.close()


def test_a_handshake_that_does_not_go_on_is_closed_at_its_deadline(impatient: Attacked) -> None:
    with impatient.check():
        began = time.monotonic()
        silent, half = impatient.connect(), impatient.say(STRUCTURED[:10])
        rest(silent)
        rest(half)
        assert DEADLINE_S / 2 < time.monotonic() - began < DEADLINE_S + 2


def test_100_connections_of_which_16_are_clients(attacked: Attacked) -> None:
    """300 idle handshakes displace each other; a 17th client is told that there is no room."""
    with attacked.check() as guest:
        before = attacked.descriptors()
        strangers = [attacked.connect() for _ in range(300)]
        guest.wait(20)
        assert attacked.descriptors() <= before + 100
        assert rest(strangers[0])[wire.GREETING.size :] == b""
        assert is_open(strangers[-1])
        for stranger in strangers:
            stranger.close()
        clients = [attacked.enter() for _ in range(15)]
        refused = attacked.say(go(b"vm"))
        take(refused, wire.GREETING.size)
        assert option_replies(refused, 1)[0][0] == wire.REP_ERR_POLICY
        clients[0].close()
        eventually(lambda: _enters(attacked), what="there is room again")


def _enters(attacked: Attacked) -> bool:
    try:
        Client(attacked.path, "vm").close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("talk", "answer"),
    [
        (STRUCTURED * 20_000, None),
        (wire.OPTION.pack(wire.OPTION_MAGIC, 99, (64 << 10) + 1), None),
        (wire.pack_option(99, bytes(64 << 10)), wire.REP_ERR_UNSUP),
        (go(b"x" * 4097), wire.REP_ERR_INVALID),
        (STRUCTURED + contexts([b"base:allocation"] * 33, b"vm"), wire.REP_ERR_TOO_BIG),
    ],
    ids=["64 options", "64 KiB, more", "64 KiB", "names of 4096", "32 contexts"],
)
def test_options_beyond_their_limits(attacked: Attacked, talk: bytes, answer: int | None) -> None:
    """Closed, or refused with both sides in step."""
    with attacked.check():
        for _ in range(20):
            connection = attacked.say(talk)
            if answer is None:
                assert len(rest(connection)) <= wire.GREETING.size + 64 * wire.OPTION_REPLY.size
                continue
            take(connection, wire.GREETING.size)
            kind = option_replies(connection, 1 + talk.startswith(STRUCTURED))[-1][0]
            assert kind in (answer, wire.REP_ERR_INVALID)
            push(connection, wire.pack_option(wire.OPT_ABORT))
            assert option_replies(connection, 1)[0][0] == wire.REP_ACK


def test_half_a_handshake_on_every_connection(attacked: Attacked) -> None:
    with attacked.check():
        for _ in range(90):
            attacked.say(STRUCTURED * 3 + wire.OPTION.pack(wire.OPTION_MAGIC, 7, 9))


def test_64_kib_of_an_option_on_every_connection(attacked: Attacked) -> None:
    with attacked.check():
        for _ in range(90):
            head = wire.OPTION.pack(wire.OPTION_MAGIC, 99, 64 << 10)
            attacked.say(head + bytes(65_000))


def test_floods_of_the_largest_options(attacked: Attacked) -> None:
    with attacked.check():
        for _ in range(20):
            attacked.say(contexts([b"a:" + b"x" * 1000] * 32, b"vm") * 100)


def test_a_payload_above_32_mib(attacked: Attacked) -> None:
    """A read is refused, a write ends its connection: its payload is not waited for."""
    with attacked.check():
        connection = attacked.enter()
        push(connection, wire.pack_request(READ, 7, 0, 32 * MIB + 1))
        _, error, cookie = wire.SIMPLE_REPLY.unpack(take(connection, wire.SIMPLE_REPLY.size))
        assert (error, cookie) == (wire.EINVAL, 7)
        push(connection, wire.pack_request(WRITE, 8, 0, 32 * MIB + 1))
        assert rest(connection) == b""


def test_8_clients_with_32_mib_writes_in_flight(attacked: Attacked) -> None:
    """Twice what may be held: each connection is read when there is room."""
    with attacked.check():
        payload = bytes(32 * MIB)
        connections = [attacked.enter() for _ in range(8)]
        for connection in connections:
            connection.settimeout(10)
            push(connection, wire.pack_request(WRITE, 7, 0, 32 * MIB) + payload)
        for connection in connections:
            assert take(connection, wire.SIMPLE_REPLY.size)[4:8] == bytes(4)


def test_unfinished_payloads_of_32_mib(attacked: Attacked) -> None:
    """All but the last byte, and twice as many as may be held."""
    with attacked.check():
        payload = bytes(32 * MIB - 1)
        for _ in range(8):
            push(attacked.enter(), wire.pack_request(WRITE, 7, 0, 32 * MIB) + payload)


@pytest.mark.parametrize("length", [MIB, 32 * MIB])
def test_replies_that_nobody_reads(attacked: Attacked, length: int) -> None:
    with attacked.check():
        for _ in range(15):
            push(attacked.enter(), wire.pack_request(READ, 7, 0, length) * 500)


def test_refusals_that_nobody_reads(attacked: Attacked) -> None:
    with attacked.check():
        for _ in range(15):
            push(attacked.enter(), wire.pack_request(99, 7, 0, 0) * 30_000)


def test_a_payload_that_stalls_is_closed_and_nothing_of_it_applied(impatient: Attacked) -> None:
    with impatient.check():
        stalls = []
        for length in (1000, 500_000):
            connection = impatient.enter()
            request = wire.pack_request(WRITE, 7, 0, length)
            push(connection, request + b"x" * (length - 1))
            stalls.append(connection)
        for connection in stalls:
            assert rest(connection) == b""
    assert read(impatient.disk, 0, 500_000) == bytes(500_000)


def test_a_client_may_idle_for_ever(impatient: Attacked) -> None:
    """Longer than any deadline: others meet theirs meanwhile, one after the other."""
    with impatient.check():
        idle = Client(impatient.path, "vm")
        for _ in range(2):
            rest(impatient.connect())
        assert idle.read(0, 512) == bytes(512)
        idle.close()


def test_block_status_of_a_fragmented_disk_is_bounded(attacked: Attacked) -> None:
    """10,000 extents: at most 4096 of them in an answer, and a flood of such questions."""
    step, first, length = 8192, 1 << 33, 5000 * 8192
    with attacked.disk.open("r+b") as file:
        for number in range(5000):
            file.seek(first + number * step)
            file.write(b"x")
    with attacked.check():
        connection = attacked.say(STRUCTURED + contexts(NAMES, b"vm") + go(b"vm"))
        take(connection, wire.GREETING.size)
        assert [kind for kind, _ in option_replies(connection, 7)][-1] == wire.REP_ACK
        push(connection, wire.pack_request(BLOCK_STATUS, 7, first, length))
        for _ in NAMES:
            head = wire.CHUNK.unpack(take(connection, wire.CHUNK.size))
            assert head[4] <= 4 + 8 * 4096
            take(connection, head[4])
        for _ in range(14):
            flood = attacked.say(STRUCTURED + contexts(NAMES, b"vm") + go(b"vm"))
            push(flood, wire.pack_request(BLOCK_STATUS, 7, first, length) * 2000)


def test_floods_of_cache_requests_for_4_gib(attacked: Attacked) -> None:
    """28 bytes each: not more of the disk is read for them than for as many reads."""
    with attacked.check():
        for number in range(15):
            request = wire.pack_request(CACHE, 7, number << 32, 2**32 - 1)
            push(attacked.enter(), request * 64)
        attacked.leave()
        eventually(lambda: _enters(attacked), what="there is room for clients again")


def test_lengths_and_offsets_that_lie(attacked: Attacked) -> None:
    with attacked.check():
        for command in range(10):
            for length in (2**31, 2**32 - 1):
                for offset in (0, SIZE, 2**64 - 1):
                    request = wire.pack_request(command, 7, offset, length)
                    push(attacked.enter(), request * (10 if offset else 1))
            attacked.leave()


def test_garbage(attacked: Attacked) -> None:
    chance = random.Random(27)
    with attacked.check():
        for _ in range(40):
            push(attacked.connect(), chance.randbytes(5000))
            attacked.say(b"IHAVEOPT" + chance.randbytes(3000))
            push(attacked.enter(), chance.randbytes(5000))
            head = struct.pack(
                ">IHH", wire.REQUEST_MAGIC, chance.getrandbits(5), chance.randrange(9)
            )
            push(attacked.enter(), (head + chance.randbytes(20)) * 100)
            attacked.leave()


def test_a_goodbye_and_more_behind_it(attacked: Attacked) -> None:
    with attacked.check():
        for _ in range(15):
            push(attacked.enter(), wire.pack_request(DISC, 0, 0, 0) + bytes(MIB))


def read(path: Path, offset: int, length: int) -> bytes:
    """Return a part of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)
