"""What brought other NBD servers down, done to a real disk process: by the number of each CVE.

Those of clients (2017-2630, 2021-20286, 2023-5215, 2023-5871): tests/nbd/test_client.py. 2022-0485,
errors that a copy ignored: the faults 10 to 13. 2019-14842 and TLS: there is none yet.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from mirrord.nbd import wire
from tests.daemon import command_line
from tests.e2e.hostile import (
    MIB,
    SIZE,
    Attacked,
    option_replies,
    push,
    rest,
    take,
)
from tests.helpers import eventually
from tests.nbd.speaking import STRUCTURED, contexts, flags, go
from tests.nbd_writer import Client

pytestmark = pytest.mark.fault(27)

READ, WRITE, DISC, FLUSH = range(4)
COMMANDS = range(9)
NAMES = [wire.CONTEXT_ALLOCATION.encode(), wire.CONTEXT_DIRTY.encode()]
TEXT_BYTES_MAX = 256  # of an error, whatever the client said


def test_cve_2013_7441_leaving_in_the_handshake_and_unknown_exports(attacked: Attacked) -> None:
    """A session that ends after each of its bytes; names that nobody knows."""
    talk = flags() + wire.pack_option(wire.OPT_LIST) + STRUCTURED + go(b"vm")
    talk += wire.pack_request(WRITE, 1, 0, 64) + bytes(64) + wire.pack_request(READ, 2, 0, 64)
    with attacked.check():
        for length in range(len(talk)):
            push(attacked.connect(), talk[:length])
            attacked.leave()
        for _ in range(50):
            assert rest(attacked.say(wire.pack_option(wire.OPT_EXPORT_NAME, b"nobody's")))
            connection = attacked.say(go(b"nobody's"))
            take(connection, wire.GREETING.size)
            assert option_replies(connection, 1)[0][0] == wire.REP_ERR_UNKNOWN


def test_cve_2017_9524_nothing_and_the_unexpected_in_the_handshake(attacked: Attacked) -> None:
    chance = random.Random(9524)
    with attacked.check():
        for _ in range(100):
            attacked.connect()
        attacked.leave()
        for _ in range(100):
            option = chance.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 2**32 - 1])
            data = chance.randbytes(chance.randrange(40))
            attacked.say(wire.pack_option(option, data) * 3)
            push(attacked.connect(), wire.pack_request(READ, 1, 0, 512) * 3)
            attacked.leave()


@pytest.mark.parametrize("length", [4096, 4097, 65_000])
def test_cve_2017_15118_a_long_export_name(attacked: Attacked, length: int) -> None:
    """Refused, in step: the next option is answered."""
    with attacked.check():
        assert rest(attacked.say(wire.pack_option(wire.OPT_EXPORT_NAME, b"x" * length)))
        connection = attacked.say(go(b"x" * length) + wire.pack_option(wire.OPT_ABORT))
        take(connection, wire.GREETING.size)
        refused, acknowledged = option_replies(connection, 2)
        assert refused[0] in (wire.REP_ERR_UNKNOWN, wire.REP_ERR_INVALID)
        assert acknowledged[0] == wire.REP_ACK


def test_cve_2017_15119_an_option_of_4_gib_is_not_read(attacked: Attacked) -> None:
    with attacked.check():
        for _ in range(50):
            connection = attacked.say(wire.OPTION.pack(wire.OPTION_MAGIC, 99, 2**32 - 1))
            assert rest(connection)[wire.GREETING.size :] == b""


def test_cve_2019_14850_nothing_begins_before_the_client_has_chosen(attacked: Attacked) -> None:
    """50 handshakes that go far and not to the end: they are no clients of the disk."""
    with attacked.check():
        for _ in range(50):
            talk = STRUCTURED + contexts(NAMES, b"vm") + go(b"vm", option=wire.OPT_INFO)
            connection = attacked.say(talk)
            take(connection, wire.GREETING.size)
            assert option_replies(connection, 7)[-1][0] == wire.REP_ACK
        assert attacked.daemon.json("show", "vm")["clients"] == 1, "the guest"


def test_cve_2019_14851_commands_in_odd_order(attacked: Attacked) -> None:
    """Every command twice, in any order, with one cookie and any flags; a goodbye in between."""
    chance = random.Random(14851)
    with attacked.check():
        for _ in range(60):
            connection = attacked.enter()
            for command in chance.choices(COMMANDS, k=40):
                length = chance.choice([0, 1, 512, 4096])
                data = bytes(length if command == WRITE else 0)
                flag = chance.choice([0, 0, chance.getrandbits(16)])
                push(connection, wire.pack_request(command, 7, 0, length, flag) + data)
            attacked.leave()


def test_cve_2020_10761_an_error_never_echoes_a_long_name(attacked: Attacked) -> None:
    name = b"n" * 4096
    talks = [go(name), go(name, option=wire.OPT_INFO), contexts([b"a:b"], name),
             contexts([name], b"vm"), wire.pack_option(wire.OPT_LIST, name)]  # fmt: skip
    with attacked.check():
        for talk in talks:
            connection = attacked.say(talk)
            take(connection, wire.GREETING.size)
            ((kind, text),) = option_replies(connection, 1)
            assert kind & wire.REP_ERROR
            assert len(text) <= TEXT_BYTES_MAX
            assert b"nnnn" not in text


def test_cve_2021_3716_what_lies_behind_starttls_is_not_taken_for_encrypted(
    attacked: Attacked,
) -> None:
    """TLS is refused by policy; what was agreed on before stays, and nothing is begun anew."""
    with attacked.check():
        talk = STRUCTURED + wire.pack_option(wire.OPT_STARTTLS) + go(b"vm")
        connection = attacked.say(talk * 1)
        take(connection, wire.GREETING.size)
        kinds = [kind for kind, _ in option_replies(connection, 5)]
        assert kinds[:2] == [wire.REP_ACK, wire.REP_ERR_POLICY]
        assert kinds[-1] == wire.REP_ACK
        push(connection, wire.pack_request(READ, 7, 0, 1))
        magic, *_ = wire.CHUNK.unpack(take(connection, wire.CHUNK.size))
        assert magic == wire.CHUNK_MAGIC


def test_cve_2022_26495_a_name_longer_than_its_option(attacked: Attacked) -> None:
    """2^32 - 1, and lengths that wrap when something is added: refused, in step."""
    options = (wire.OPT_GO, wire.OPT_INFO, wire.OPT_SET_META_CONTEXT, wire.OPT_LIST_META_CONTEXT)
    with attacked.check():
        for length in (2**32 - 1, 2**32 - 4, 2**31, 5):
            for option in options:
                talk = wire.pack_option(option, wire.U32.pack(length) + b"vm\0\0")
                connection = attacked.say(STRUCTURED + talk + wire.pack_option(wire.OPT_ABORT))
                take(connection, wire.GREETING.size)
                kinds = [kind for kind, _ in option_replies(connection, 3)]
                assert kinds == [wire.REP_ACK, wire.REP_ERR_INVALID, wire.REP_ACK]
        attacked.leave()


def test_cve_2025_47711_block_status_of_the_largest_length(attacked: Attacked) -> None:
    with attacked.check():
        connection = attacked.say(STRUCTURED + contexts(NAMES, b"vm") + go(b"vm"))
        take(connection, wire.GREETING.size)
        option_replies(connection, 7)
        for offset in (0, SIZE // 2, SIZE - 2**32 + 1):
            push(connection, wire.pack_request(7, 7, offset, 2**32 - 1))
            for _ in NAMES:
                head = wire.CHUNK.unpack(take(connection, wire.CHUNK.size))
                body = take(connection, head[4])
                lengths = [wire.U32.unpack_from(body, at)[0] for at in range(4, len(body), 8)]
                assert lengths
                assert all(lengths)
        push(connection, wire.pack_request(7, 7, SIZE - 1, 2**32 - 1))
        head = wire.CHUNK.unpack(take(connection, wire.CHUNK.size))
        assert head[2] & 1 << 15, "past the end: an error"


def test_86_unread_replies_of_1_mib_and_then_gone(attacked: Attacked) -> None:
    """No number: what made nbdkit 1.32 abort."""
    with attacked.check():
        for _ in range(5):
            push(attacked.enter(), wire.pack_request(READ, 7, 0, MIB) * 86)
            attacked.leave()


def test_cve_2015_0847_and_2024_7409_signals_end_it_in_order_with_idle_clients(
    tmp_path: Path,
) -> None:
    """With clients in every state; the next process serves at once."""
    attacked = Attacked(tmp_path)
    attacked.daemon.expect_log("restarting disk process")
    for number in (signal.SIGHUP, signal.SIGTERM):
        for _ in range(90):
            attacked.connect()
        idle = attacked.enter()
        push(attacked.enter(), wire.pack_request(WRITE, 7, 0, MIB) + bytes(100))
        pid = attacked.daemon.disk_pid("vm")
        os.kill(pid, signal.SIGPIPE)  # means nothing
        os.kill(pid, number)
        eventually(lambda pid=pid: command_line(pid) in ([], [""]), 10, "it ends")
        assert rest(idle) == b""
        attacked.leave()
    eventually(
        lambda: attacked.daemon.log().count("status=0") == 2, what="both ended by themselves"
    )
    client = Client(attacked.path, "vm")
    assert client.read(0, 512) == bytes(512)
    client.close()
    attacked.close()
