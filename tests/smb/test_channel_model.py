"""A channel against a model of a server that grants what it likes and answers as it likes.

The server keeps its own account of the window ([MS-SMB2] 3.3.1.1): each message id is granted
before it is used, and used once. It delays, reorders and compounds, says PENDING first, takes
leases back, and grants down to one credit in all. However it behaves, each request is answered
once, with its own answer, or refused as too large; and all are in the end.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)  # fmt: skip

from mirrord.smb import status, wire
from mirrord.smb.lanes import BULK_BYTES_MAX, SMALL_BYTES_MAX, Request
from mirrord.smb.seal import Encryption
from tests.smb.speaking import (
    FILE,
    KINDS,
    Asked,
    Peer,
    answer,
    compound,
    feed,
    framed,
    lease_break,
    read_body,
    said,
    started,
)  # fmt: skip
from tests.smb.test_channel import control

SIZES = [1, 4096, SMALL_BYTES_MAX, SMALL_BYTES_MAX + 1, 200_000, 1 << 20]


class Server:
    """What a server knows of one connection."""

    def __init__(self, credits: int, credits_max: int, multi_credit: bool) -> None:
        self.granted = 1 + credits  # ids below this
        self.used = 1
        self.credits_max = credits_max
        self.multi_credit = multi_credit
        self.open: list[Asked] = []
        self.pending: set[int] = set()

    def take(self, asked: Asked) -> None:
        """Take a request; the window is the client's promise."""
        cost = asked.charge if self.multi_credit else 1
        assert cost >= 1
        assert asked.credits >= 1
        assert asked.message_id == self.used
        self.used += cost
        assert self.used <= self.granted, "the window was overrun"
        self.open.append(asked)

    def grant(self, wanted: int) -> int:
        """Return credits for one answer: what is wanted, but never none in all."""
        credits = min(max(wanted, 0), self.credits_max - (self.granted - self.used))
        if self.granted == self.used and len(self.open) <= 1:
            credits = max(credits, 1)
        credits = max(credits, 0)
        self.granted += credits
        return credits


class World(RuleBasedStateMachine):
    """Requests, and a server's moods."""

    @initialize(
        kind=st.sampled_from(KINDS),
        credits=st.integers(1, 20),
        credits_max=st.one_of(st.integers(1, 40), st.integers(1, 5000)),
        multi_credit=st.booleans(),
    )
    def begin(self, kind: Any, credits: int, credits_max: int, multi_credit: bool) -> None:
        self.peer = Peer(kind)
        self.channel = started(kind, credits=credits, multi_credit=multi_credit)
        self.server = Server(credits, credits_max, multi_credit)
        self.sequence = 0
        self.submitted: list[Request] = []
        self.controls: list[int] = []  # smbprotocol's message ids
        self.done: list[Request] = []
        self.acks = self.breaks = 0

    # The client

    @rule(size=st.sampled_from(SIZES), count=st.integers(1, 30))
    def submit(self, size: int, count: int) -> None:
        for _ in range(count):
            offset = len(self.submitted)
            body = wire.read_body(FILE, offset, size)
            request = Request(wire.READ, body, payload_bytes=size, owner=offset)
            self.submitted.append(request)
            self.channel.submit(request)

    @rule()
    def ask_by_smbprotocol(self) -> None:
        self.controls.append(5000 + len(self.controls))
        self.channel.control(control(message_id=self.controls[-1]))

    @rule(sequence=st.integers(0, 0xFFFF))
    def lose_a_channel_beside(self, sequence: int) -> None:
        self.sequence = self.channel.sequence = sequence

    @rule()
    def keep_alive(self) -> None:
        self.channel.keep_alive(0)
        self._hear()

    @rule()
    def pump(self) -> None:
        self.channel.pump(0)
        self._hear()
        self.submitted = [r for r in self.submitted if r not in self.channel.refused]
        for request in self.channel.refused:
            assert request.payload_bytes > SMALL_BYTES_MAX
            assert wire.charge_of(request.payload_bytes) > 1
            assert self.server.multi_credit
        self.channel.refused.clear()

    def _hear(self) -> None:
        for asked in said(self.channel, self.peer):
            assert asked.sequence == self.sequence
            self.server.take(asked)

    # The server

    @precondition(lambda self: self.server.open)
    @rule(data=st.data(), together=st.integers(1, 5), asked_for=st.booleans())
    def answer(self, data: st.DataObject, together: int, asked_for: bool) -> None:
        replies = []
        for _ in range(min(together, len(self.server.open))):
            asked = data.draw(st.sampled_from(self.server.open))
            wanted = asked.credits if asked_for else data.draw(st.integers(0, 10))
            replies.append(self._reply(asked, wanted))
        self._send(replies, as_compound=data.draw(st.booleans()))

    @precondition(lambda self: self.server.open)
    @rule(data=st.data(), wanted=st.integers(0, 10))
    def say_that_it_takes_long(self, data: st.DataObject, wanted: int) -> None:
        asked = data.draw(st.sampled_from(self.server.open))
        if asked.message_id in self.server.pending:
            return
        self.server.pending.add(asked.message_id)
        credits = self.server.grant(wanted)
        flags = wire.FROM_SERVER | wire.ASYNC
        interim = answer(
            asked.command, asked.message_id, status=status.PENDING, credits=credits, flags=flags
        )
        self._send([interim], as_compound=False)

    @rule(key=st.binary(min_size=16, max_size=16))
    def take_a_lease_back(self, key: bytes) -> None:
        self._send([lease_break(key)], as_compound=False)
        (broken,) = self.channel.breaks
        self.channel.breaks.clear()
        assert broken.key == key
        self.breaks += 1
        self.channel.acknowledge(broken, 1)

    def _reply(self, asked: Asked, wanted: int) -> bytes:
        self.server.open.remove(asked)
        self.server.open.insert(0, asked)  # counts as open while its credits are reckoned
        credits = self.server.grant(wanted)
        self.server.open.pop(0)
        if asked.command == wire.READ:
            body = read_body(asked.body[8:16])  # its offset
        else:
            self.acks += asked.command == wire.OPLOCK_BREAK
            body = b"\4\0\0\0"
        return answer(asked.command, asked.message_id, body, credits=credits)

    def _send(self, replies: list[bytes], *, as_compound: bool) -> None:
        if not as_compound:
            data = framed(*map(self.peer.close, replies))
        elif isinstance(self.peer.kind, Encryption):
            data = framed(self.peer.close(b"".join(compound(*replies))))
        else:
            data = framed(b"".join(map(self.peer.close, compound(*replies))))
        for reply in feed(self.channel, data):
            assert reply.status == status.SUCCESS
            if reply.request.control is not None:
                self.controls.remove(wire.parse_header(reply.message).message_id)
                continue
            read = wire.read_reply(reply.message, 8)
            assert int.from_bytes(read, "little") == reply.request.owner
            assert reply.request in self.submitted
            assert reply.request not in self.done
            self.done.append(reply.request)

    # What holds

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        if not hasattr(self, "server"):
            return
        channel = self.channel
        assert channel.in_flight == len(self.server.open)
        ours = len(self.submitted) - len(self.done) + len(self.controls) + self.breaks - self.acks
        echoes = sum(asked.command == wire.ECHO for asked in self.server.open)
        assert channel.in_flight + channel.waiting == ours + echoes
        bulk = sum(
            int.from_bytes(asked.body[4:8], "little")
            for asked in self.server.open
            if asked.command == wire.READ
            and int.from_bytes(asked.body[4:8], "little") > SMALL_BYTES_MAX
        )
        assert bulk < BULK_BYTES_MAX + max(SIZES)

    def teardown(self) -> None:
        if not hasattr(self, "server"):
            return
        asked = len(self.submitted) + len(self.controls) + self.breaks
        for _ in range(len(self.server.open) + 3 * asked + 10):
            self.pump()
            if not self.server.open:
                break  # one more pump would do no more, either
            self._send([self._reply(self.server.open[0], 3)], as_compound=False)
        self.nothing_is_lost_or_doubled()
        assert (self.channel.in_flight, self.channel.waiting) == (0, 0)
        assert sorted(r.owner for r in self.done) == sorted(r.owner for r in self.submitted)
        assert self.controls == []


def test_a_server_that_does_as_it_likes() -> None:
    run_state_machine_as_test(
        World, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
