"""What is fuzzed: each parser of bytes that somebody else wrote, with what must hold for any bytes.

A target is a function of bytes. Whatever they are it returns, or raises a bug. So it can be run by
a fuzzer (`python -m tests.fuzz`), by hypothesis and over its seeds (`test_targets.py`). Its seeds
are what `record.py` kept in `seeds/`, recorded from real sessions, and what is built here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mirrord.control.messages import Job
from mirrord.core import journal, units
from mirrord.errors import DamagedError, ProtocolError, RefusedError, UsageError
from mirrord.nbd import wire as nbd
from mirrord.nbd.client import ClientSession
from mirrord.nbd.limits import Limits
from mirrord.service import credentials, mounts
from mirrord.service.config import read_config
from mirrord.service.places import check_location
from mirrord.service.shares import ShareConfig
from mirrord.service.state import DiskRecord, JobRecord, read_record
from mirrord.smb import wire as smb
from mirrord.smb.channel import Channel
from mirrord.smb.lanes import Request
from mirrord.smb.location import parse_location
from tests.fuzz.http import HttpServer
from tests.nbd.speaking import STRUCTURED, Server, contexts, flags, go
from tests.smb import speaking

SEEDS = Path(__file__).parent / "seeds"
NAMES = [nbd.CONTEXT_ALLOCATION.encode(), nbd.CONTEXT_DIRTY.encode()]
LIMITS = Limits()


@dataclass(frozen=True)
class Target:
    """A parser. `built` are seeds beside those that were recorded."""

    run: Callable[[bytes], None]
    built: Callable[[], list[bytes]]

    @property
    def name(self) -> str:
        """Return its name: the function's."""
        return self.run.__name__

    def seeds(self) -> list[bytes]:
        """Return all seeds."""
        recorded = sorted((SEEDS / self.name).glob("*.bin"))
        return [path.read_bytes() for path in recorded] + self.built()


@cache
def scratch() -> Path:
    """Return a file that a target may fill: only its owner can read it."""
    folder = tempfile.TemporaryDirectory(prefix="mirrord-fuzz-")
    scratch.folder = folder  # type: ignore[attr-defined]  # goes with the process
    descriptor = os.open(Path(folder.name) / "file", os.O_CREAT | os.O_WRONLY, 0o600)
    os.close(descriptor)
    return Path(folder.name) / "file"


def as_file(data: bytes) -> Path:
    """Return the path of a file with this content."""
    scratch().write_bytes(data)
    return scratch()


def as_text(data: bytes) -> str:
    """Return bytes as Python has them from a command line."""
    return data.decode(errors="surrogateescape")


# NBD


def nbd_server(data: bytes) -> None:
    """Take what a client says, handshake included, in pieces whose size the first byte gives."""
    server, step = Server(), (data[0] if data else 0) * 16 + 1
    for at in range(1, len(data), step):
        server.receive(data[at : at + step])
    assert server.handshake.ended or len(server.sent) >= nbd.GREETING.size
    session = server.session
    if session is not None:
        assert session.in_flight == 0
        assert 0 <= session.held_bytes <= LIMITS.held_bytes_max


def nbd_client(data: bytes) -> None:
    """Take what a server says; two requests are asked as soon as the handshake is done."""
    client = ClientSession("disk", structured=True, contexts=tuple(map(bytes.decode, NAMES)))
    asked = False
    with suppress(ProtocolError):
        while data:
            buffer = client.buffer()
            count = min(len(buffer), len(data), 4096)
            buffer[:count] = data[:count]
            data = data[count:]
            for reply in client.received(count):
                assert reply.cookie in (1, 2)
            if client.info is not None and not asked and client.info.size >= 1 << 20:
                client.read(0, 4096)
                client.command(nbd.CMD_BLOCK_STATUS, 0, 1 << 20)
                asked = True
            client.outgoing.clear()


def nbd_client_seeds() -> list[bytes]:
    """Return what our own server says to such a client."""
    server = Server()
    server.receive(flags() + STRUCTURED + contexts(NAMES) + go())
    server.receive(nbd.pack_request(nbd.CMD_READ, 1, 0, 4096))
    server.receive(nbd.pack_request(nbd.CMD_BLOCK_STATUS, 2, 0, 1 << 20))
    return [server.sent]


# SMB


def smb_channel(data: bytes) -> None:
    """Take what a server says to a channel that waits for a few answers."""
    channel = speaking.started()
    channel.submit(speaking.read(4096))
    channel.submit(speaking.write(b"y" * 20))
    channel.submit(Request(smb.FLUSH, smb.flush_body(speaking.FILE), tree_id=5))
    channel.pump(0)
    with suppress(ProtocolError):
        for reply in speaking.feed(channel, data[1:], step=(data[0] if data else 0) * 16 + 1):
            assert reply.request.command in (smb.READ, smb.WRITE, smb.FLUSH)
    assert 0 <= channel.in_flight <= 3


def smb_channel_seeds() -> list[bytes]:
    """Return answers to what is asked, in and out of compounds, and a break."""
    answers = [
        speaking.answer(smb.READ, 1, speaking.read_body(b"x" * 4096)),
        speaking.answer(smb.WRITE, 2, speaking.write_body(20)),
        speaking.answer(smb.FLUSH, 3, b"\x04\0\0\0"),
        speaking.lease_break(),
    ]
    return [
        b"\xff" + speaking.framed(*answers),
        b"\x01" + speaking.framed(b"".join(speaking.compound(*answers))),
    ]


def smb_replies(data: bytes) -> None:
    """Read a message as each of the answers that it could be."""
    for parse in (
        smb.parse_header, smb.write_reply, smb.empty_reply, smb.parse_break, smb.parse_ranges,
        smb.parse_copied, smb.parse_resume_key,
        lambda message: smb.read_reply(message, 4096),
        lambda message: smb.ioctl_reply(message, 4096),
    ):  # fmt: skip
        with suppress(ProtocolError):
            parse(data)


def smb_replies_seeds() -> list[bytes]:
    """Return one of each kind."""
    return [
        speaking.answer(smb.READ, 1, speaking.read_body(b"x" * 40)),
        speaking.answer(smb.WRITE, 2, speaking.write_body(20)),
        speaking.lease_break(),
        bytes(16),
    ]


def smb_seal(data: bytes) -> None:
    """Open what claims to be sealed. That anything but the server's own is refused: test_seal."""
    for kind in (*speaking.Signing, *speaking.Encryption):
        with suppress(ProtocolError):
            speaking.seal_of(kind).open(data)


def smb_seal_seeds() -> list[bytes]:
    """Return a message sealed in each way."""
    message = speaking.answer(smb.WRITE, 2, speaking.write_body(20))
    kinds = (*speaking.Signing, *speaking.Encryption)
    return [speaking.Peer(kind).close(message) for kind in kinds]


def smb_greeting(data: bytes) -> None:
    """Take what a server says before anything was agreed on."""
    channel = Channel()
    channel.greet(speaking.answer(smb.NEGOTIATE, 0, flags=0))
    with suppress(ProtocolError):
        speaking.feed(channel, data)


# Durable state


def journal_bytes(data: bytes) -> None:
    """Read a journal that begins with these bytes: one side is the truth, or it is refused."""
    content = data[: journal.CAPACITY_BYTES].ljust(journal.CAPACITY_BYTES, b"\0")
    with suppress(DamagedError):
        log = journal.parse(content)
        zeroes, repaired = journal.repair(log)
        mended = content[: log.end] + zeroes + content[log.end + len(zeroes) :]
        assert journal.parse(mended) == repaired
        outcome = journal.fold(log.records)
        committed = any(record.kind is journal.Kind.COMMIT for record in log.records)
        assert outcome.authority in journal.Authority
        assert committed or outcome.authority is journal.Authority.SOURCE


def journal_story(data: bytes) -> None:
    """Write records of kinds that the bytes choose: what is read back is what was written."""
    log, content = journal.Log(), b""
    kinds = list(journal.Kind)
    for number in data[:100]:
        payload: journal.Payload = {"n": number, journal.UNKNOWN_COMMIT: number > 0x7F}
        with suppress(DamagedError, RefusedError):  # out of order, no room: nothing is written
            encoded, log = journal.append(log, kinds[number % len(kinds)], payload)
            content += encoded
    found = journal.parse(content.ljust(journal.CAPACITY_BYTES, b"\0"))
    assert found.records == log.records
    journal.fold(found.records)


def state_file(data: bytes) -> None:
    """Read a record as each of those that the state directory has."""
    path = as_file(data)
    for kind in (DiskRecord, JobRecord, Job):
        with suppress(DamagedError):
            read_record(path, kind)


# What an administrator wrote


def configuration(data: bytes) -> None:
    """Read mirrord.toml: what is wrong is told in one line."""
    told = str(as_file(data))
    try:
        read_config(scratch()).disk_options()
    except (UsageError, RefusedError) as error:
        told = str(error)
    assert str(scratch()) in told


def configuration_seeds() -> list[bytes]:
    """Return the commented one, and one with everything."""
    shipped = Path(__file__).parents[2] / "systemd" / "mirrord.toml"
    everything = (
        'socket_mode = "0660"\nmax_moves = 3\nverify = "none"\non_done = ["/bin/true", "x"]\n'
        "[nbd]\nstall_s = 3.5\nclients_max = 4\n"
        '[smb."vault.example.com/vms"]\ncredential = "vault"\nuser = "D\\\\u"\nchannels = 2\n'
    )
    return [shipped.read_bytes(), everything.encode(), b"[smb.x]\ncredential = 1\n"]


def credential_file(data: bytes) -> None:
    """Read a credential: its password is in no text that is made of it."""
    config = ShareConfig(credential=str(as_file(data)))
    try:
        found = credentials.load(config, {})
    except RefusedError as error:
        told = str(error)
        assert told.count("\n") == 0
        return
    assert found.password is not None
    assert found.password.reveal()
    assert f"password={credentials.HIDDEN}" in repr(found)


def location(data: bytes) -> None:
    """Read a location: what is accepted is read back as the same one."""
    text = as_text(data)
    with suppress(UsageError, RefusedError):
        normal = check_location(text)
        assert check_location(normal) == normal
    with suppress(UsageError, RefusedError):
        share = parse_location(text)
        assert parse_location(str(share)).same_place(share)


def location_seeds() -> list[bytes]:
    """Return one of each kind."""
    return [
        b"/disks/vm.raw", b"/disks/../x//y/", b"smb://D;u@[::1]:445/share/a/b.raw",
        b"smb://vault/vms/", b"nbd+unix:///vm?socket=/x", b"smb://u:p@h/s/x", b"smb://h/s/%41.raw",
    ]  # fmt: skip


def sizes_and_names(data: bytes) -> None:
    """Read a size, a rate and a name as a user types them."""
    text = as_text(data)
    for read in (units.parse_size, units.parse_rate, units.check_name):
        with suppress(UsageError):
            read(text)


def sizes_and_names_seeds() -> list[bytes]:
    """Return some of each."""
    return [b"100M", b"1.5GiB/s", b"0", b"vm-1_a.b", b"1e400", b"12 parsecs", b"-3"]


def mount_table(data: bytes) -> None:
    """Read a mountinfo, and what each mount of a share means. No path in it has a NUL."""
    if b"\0" in data or b"\\000" in data:
        return
    found = mounts.read_mounts(as_file(data))
    mounts.advise(found, {"vault/vms": ShareConfig(credential="x")})


def mount_table_seeds() -> list[bytes]:
    """Return a local mount and two of shares."""
    return [
        b"22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        b"30 22 0:40 / /mnt/a\\040b rw - cifs //vault/vms rw,vers=3.1.1,seal,username=u,port=445\n"
        b"31 22 0:41 / /mnt/c rw - smb3 //vault/vms/x rw,vers=2.1,sec=ntlmssp\n"
    ]


# The control socket

_http = HttpServer()


def control_http(data: bytes) -> None:
    """Send bytes to the control socket: it answers HTTP or hangs up, and logs no failure."""
    _http.ask(data)


def control_http_seeds() -> list[bytes]:
    """Return requests as curl sends them."""
    return [
        b"GET /v1/disks HTTP/1.1\r\nHost: x\r\n\r\n",
        b'POST /v1/disks/vm/move HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n{"target": "/x"}',
        b"DELETE /v1/disks/vm?force=true HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/disks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\n{}\r\n0\r\n\r\n",
    ]


def none() -> list[bytes]:
    """Return no further seeds."""
    return []


TARGETS = {
    target.name: target
    for target in (
        Target(nbd_server, none),
        Target(nbd_client, nbd_client_seeds),
        Target(smb_channel, smb_channel_seeds),
        Target(smb_replies, smb_replies_seeds),
        Target(smb_seal, smb_seal_seeds),
        Target(smb_greeting, lambda: [speaking.framed(speaking.answer(smb.NEGOTIATE, 0))]),
        Target(journal_bytes, none),
        Target(journal_story, lambda: [bytes(range(8)), bytes([0, 1, 2, 4]), bytes([0, 3, 4])]),
        Target(state_file, none),
        Target(configuration, configuration_seeds),
        Target(credential_file, lambda: [b"password\n", b"username=D\\u\npassword=secret\n#x\n"]),
        Target(location, location_seeds),
        Target(sizes_and_names, sizes_and_names_seeds),
        Target(mount_table, mount_table_seeds),
        Target(control_http, control_http_seeds),
    )
}
