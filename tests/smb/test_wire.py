"""Bodies against smbprotocol's own structures, and replies that lie."""

from __future__ import annotations

from struct import Struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from smbprotocol.connection import SMB2Echo
from smbprotocol.header import SMB2HeaderRequest
from smbprotocol.ioctl import (
    CtlCode,
    SMB2IOCTLRequest,
    SMB2IOCTLResponse,
    SMB2SrvCopyChunk,
    SMB2SrvCopyChunkCopy,
    SMB2SrvCopyChunkResponse,
    SMB2SrvRequestResumeKey,
)  # fmt: skip
from smbprotocol.open import SMB2FlushRequest, SMB2ReadRequest, SMB2WriteRequest

from mirrord.errors import ProtocolError
from mirrord.smb import status, wire
from tests.smb.speaking import FILE, HEADER, SESSION, answer, lease_break, read_body, write_body

FUZZ = st.binary(max_size=200)


def filled(structure: Any, **fields: Any) -> bytes:
    """Return a message of smbprotocol's."""
    for name, value in fields.items():
        structure[name] = value
    return bytes(structure.pack())


def ioctl_body(output: bytes, at: int = 112, length: int | None = None) -> bytes:
    """Return the body of an IOCTL reply."""
    length = len(output) if length is None else length
    fixed = Struct("<HHI16sIIIIII").pack(49, 0, wire.SRV_COPYCHUNK, FILE, 112, 0, at, length, 0, 0)
    return fixed + output


# Headers


def test_a_header_is_what_smbprotocol_makes() -> None:
    made = wire.pack_header(
        wire.READ, charge=3, credits=9, message_id=1 << 40, tree_id=5, session_id=SESSION,
        sequence=0xFFFE,
    )  # fmt: skip
    theirs = SMB2HeaderRequest()
    expected = filled(
        theirs, credit_charge=3, channel_sequence=0xFFFE, command=8, credit_request=9,
        message_id=1 << 40, tree_id=5, session_id=SESSION,
    )  # fmt: skip
    assert made == expected


def test_a_header_is_read() -> None:
    signature = bytes(range(16))
    packed = HEADER.pack(b"\xfeSMB", 64, 3, 0xC0000022, 8, 9, 11, 128, 77, 0, 5, SESSION, signature)
    for buffer in (bytes, bytearray, memoryview):
        assert wire.parse_header(buffer(packed + b"more")) == wire.Header(
            charge=3, status=0xC0000022, command=8, credits=9, flags=11, next_command=128,
            message_id=77, session_id=SESSION, signature=signature,
        )  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        b"",
        answer(wire.READ, 1, b"")[:63],
        b"\xfdSMB" + answer(wire.READ, 1)[4:],
        b"\xffSMB" + answer(wire.READ, 1)[4:],
        answer(wire.READ, 1)[:4] + b"\x41\0" + answer(wire.READ, 1)[6:],
    ],
)
def test_what_is_no_header_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.parse_header(message)


@pytest.mark.parametrize(
    ("payload_bytes", "credits"),
    [(0, 1), (1, 1), (65_536, 1), (65_537, 2), (131_072, 2), (1 << 20, 16), (8 << 20, 128)],
)
def test_a_credit_pays_for_64_kib(payload_bytes: int, credits: int) -> None:
    assert wire.charge_of(payload_bytes) == credits


# Requests


def test_requests_are_what_smbprotocol_makes() -> None:
    assert wire.read_body(FILE, 1 << 50, 4096, 1) == filled(
        SMB2ReadRequest(), padding=80, flags=1, length=4096, offset=1 << 50, file_id=FILE
    )
    assert wire.write_body(FILE, 1 << 50, 4, 1) + b"data" == filled(
        SMB2WriteRequest(), flags=1, length=4, offset=1 << 50, file_id=FILE, buffer=b"data"
    )
    assert wire.flush_body(FILE) == filled(SMB2FlushRequest(), file_id=FILE)
    assert wire.echo_body() == filled(SMB2Echo())
    assert wire.ioctl_body(FILE, wire.SET_ZERO_DATA, b"given", 77) == filled(
        SMB2IOCTLRequest(), file_id=FILE, ctl_code=wire.SET_ZERO_DATA, buffer=b"given",
        max_output_response=77, flags=1, output_offset=0,
    )  # fmt: skip


def test_the_answers_to_breaks_are_those_of_the_specification() -> None:
    lease = bytes.fromhex("2400 0000 00000000") + FILE + bytes.fromhex("03000000 0000000000000000")
    assert wire.lease_ack_body(FILE, 3) == lease
    assert wire.oplock_ack_body(FILE, 1) == bytes.fromhex("1800 01 00 00000000") + FILE


def test_file_system_controls_have_their_numbers() -> None:
    assert wire.SRV_COPYCHUNK == CtlCode.FSCTL_SRV_COPYCHUNK
    assert wire.SRV_COPYCHUNK_WRITE == CtlCode.FSCTL_SRV_COPYCHUNK_WRITE
    assert wire.REQUEST_RESUME_KEY == CtlCode.FSCTL_SRV_REQUEST_RESUME_KEY
    assert wire.QUERY_NETWORK_INTERFACES == CtlCode.FSCTL_QUERY_NETWORK_INTERFACE_INFO
    # [MS-FSCC] 2.3: of devices of the file system, functions 49, 50, 51 and 209
    assert [(n >> 16, n >> 2 & 0xFFF) for n in (
        wire.SET_SPARSE, wire.SET_ZERO_DATA, wire.QUERY_ALLOCATED_RANGES, wire.DUPLICATE_EXTENTS
    )] == [(9, 49), (9, 50), (9, 51), (9, 209)]  # fmt: skip
    assert (wire.SET_SPARSE, wire.SET_ZERO_DATA) == (0x900C4, 0x980C8)
    assert (wire.QUERY_ALLOCATED_RANGES, wire.DUPLICATE_EXTENTS) == (0x940CF, 0x98344)


# Replies


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_a_read_brings_its_data(buffer: type) -> None:
    reply = buffer(answer(wire.READ, 1, read_body(b"data")))
    assert wire.read_reply(reply, 4) == b"data"
    assert wire.read_reply(reply, 5) == b"data"


def test_a_read_may_put_its_data_further_on() -> None:
    body = Struct("<HBBIII").pack(17, 96, 0, 4, 0, 0) + bytes(16) + b"data"
    assert wire.read_reply(answer(wire.READ, 1, body), 4) == b"data"


@pytest.mark.parametrize("at", [0, 64, 80, 255])
def test_where_nothing_was_read_lies_nowhere(at: int) -> None:
    body = Struct("<HBBIII").pack(17, at, 0, 0, 0, 0)
    assert wire.read_reply(answer(wire.READ, 1, body), 4) == b""


@pytest.mark.parametrize(
    ("size", "at", "length", "says"),
    [
        (17, 80, 5, "brought 5"),
        (17, 80, 0xFFFFFFFF, "brought"),
        (17, 81, 4, "not in a reply"),
        (17, 255, 4, "not in a reply"),
        (17, 79, 4, "not in a reply"),
        (17, 0, 1, "not in a reply"),
        (16, 80, 4, "where 17 belongs"),
    ],
)
def test_a_read_that_lies_is_refused(size: int, at: int, length: int, says: str) -> None:
    body = Struct("<HBBIII").pack(size, at, 0, length, 0, 0) + b"data"
    with pytest.raises(ProtocolError, match=says):
        wire.read_reply(answer(wire.READ, 1, body), 4)


def test_a_write_says_how_much() -> None:
    assert wire.write_reply(answer(wire.WRITE, 1, write_body(4096))) == 4096
    with pytest.raises(ProtocolError, match="where 17 belongs"):
        wire.write_reply(answer(wire.WRITE, 1))


def test_an_empty_reply_is_empty() -> None:
    wire.empty_reply(answer(wire.FLUSH, 1, b"\4\0\0\0"))
    for body in (b"", b"\4\0\0", b"\5\0\0\0"):
        with pytest.raises(ProtocolError):
            wire.empty_reply(answer(wire.FLUSH, 1, body))


def test_an_ioctl_brings_its_output() -> None:
    assert wire.ioctl_reply(answer(wire.IOCTL, 1, ioctl_body(b"output")), 6) == b"output"
    theirs = SMB2IOCTLResponse()
    theirs.unpack(ioctl_body(b"output"))
    assert theirs["buffer"].get_value() == b"output"


def test_where_an_ioctl_without_output_puts_it_means_nothing() -> None:
    for at in (0, 112, 1 << 31):
        assert wire.ioctl_reply(answer(wire.IOCTL, 1, ioctl_body(b"", at)), 6) == b""


@pytest.mark.parametrize(
    ("at", "length"), [(112, 7), (113, 6), (111, 6), (0, 6), (0xFFFFFFFF, 1), (112, 0xFFFFFFFF)]
)
def test_an_ioctl_that_lies_is_refused(at: int, length: int) -> None:
    with pytest.raises(ProtocolError):
        wire.ioctl_reply(answer(wire.IOCTL, 1, ioctl_body(b"output", at, length)), 1 << 20)
    with pytest.raises(ProtocolError, match="5 bytes of room"):
        wire.ioctl_reply(answer(wire.IOCTL, 1, ioctl_body(b"output")), 5)


def test_a_lease_is_taken_back() -> None:
    assert wire.parse_break(lease_break(FILE, 3)) == wire.Break(True, FILE, 3, True)
    without = wire.parse_break(memoryview(lease_break(FILE, 1, wants_ack=False)))
    assert without == wire.Break(True, FILE, 1, False)


def test_an_oplock_is_taken_back() -> None:
    body = Struct("<HBBI16s").pack(24, 1, 0, 0, FILE)
    found = wire.parse_break(answer(wire.OPLOCK_BREAK, wire.UNSOLICITED, body))
    assert found == wire.Break(False, FILE, 1, True)


@pytest.mark.parametrize("body", [b"", b"\x18\0", b"\x2c\0" + bytes(29), b"\x19\0" + bytes(60)])
def test_a_break_that_lies_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.parse_break(answer(wire.OPLOCK_BREAK, wire.UNSOLICITED, body))


@given(FUZZ, st.integers(0, 200))
def test_garbage_is_a_protocol_error_and_nothing_else(garbage: bytes, room: int) -> None:
    for read in (
        lambda m: wire.read_reply(m, room),
        lambda m: wire.ioctl_reply(m, room),
        wire.write_reply, wire.empty_reply, wire.parse_break, wire.parse_header,
        wire.parse_ranges, wire.parse_copied, wire.parse_resume_key,
    ):  # fmt: skip
        for message in (garbage, answer(wire.READ, 1, garbage)):
            try:
                found = read(message)  # type: ignore[operator]
            except ProtocolError:
                continue
            if isinstance(found, bytes | memoryview):
                assert len(found) <= max(room, 24)


# Changes


def test_a_request_gets_another_number_and_its_sequence_but_keeps_the_rest() -> None:
    packed = HEADER.pack(b"\xfeSMB", 64, 3, 0, 17, 1, 8 | 1 << 28, 0, 7, 9, 5, SESSION, b"s" * 16)
    made = wire.patched(memoryview(packed + b"body"), 1 << 40, 33, 0xFFFF)
    assert HEADER.unpack_from(made) == (
        b"\xfeSMB", 64, 3, 0xFFFF, 17, 33, 1 << 28, 0, 1 << 40, 9, 5, SESSION, bytes(16),
    )  # fmt: skip
    assert made[64:] == b"body"


def test_a_reply_gets_another_number_but_keeps_its_status() -> None:
    part = answer(wire.READ, 7, b"body", status=status.DISK_FULL, credits=9, following=72)
    made = wire.patched(part, 2, 1)
    assert made == answer(wire.READ, 2, b"body", status=status.DISK_FULL, credits=1)


def test_a_frame_has_its_length_in_front() -> None:
    assert b"".join(wire.frame(b"abc", memoryview(b"de"))) == b"\0\0\0\5abcde"
    largest = bytes(0xFFFFFF)
    assert wire.frame(largest)[0] == b"\0\xff\xff\xff"
    with pytest.raises(ValueError, match="longer than any"):
        wire.frame(largest, b"x")


# Payloads of file system controls


def test_ranges_are_from_and_to_or_from_and_how_many() -> None:
    assert Struct("<QQ").unpack(wire.zero_data(4096, 512)) == (4096, 4608)
    assert Struct("<QQ").unpack(wire.ranges_query(4096, 512)) == (4096, 512)
    assert wire.parse_ranges(b"") == []
    assert wire.parse_ranges(Struct("<QQQQ").pack(1, 2, 3, 4)) == [(1, 2), (3, 4)]
    with pytest.raises(ProtocolError, match="no list"):
        wire.parse_ranges(bytes(24))


def test_copies_are_what_smbprotocol_makes() -> None:
    key = bytes(range(24))
    chunks = []
    for source, target, length in ((0, 1 << 40, 4096), (4096, 512, 1)):
        chunk = SMB2SrvCopyChunk()
        chunk["source_offset"], chunk["target_offset"], chunk["length"] = source, target, length
        chunks.append(chunk)
    made = wire.copy_chunks(key, [(0, 1 << 40, 4096), (4096, 512, 1)])
    assert made == filled(SMB2SrvCopyChunkCopy(), source_key=key, chunks=chunks)


def test_a_copy_says_how_far_it_came() -> None:
    fields = {"chunks_written": 1, "chunk_bytes_written": 2, "total_bytes_written": 3}
    output = filled(SMB2SrvCopyChunkResponse(), **fields)
    assert wire.parse_copied(output) == (1, 2, 3)
    with pytest.raises(ProtocolError):
        wire.parse_copied(output[:11])


def test_a_resume_key_has_24_bytes() -> None:
    key = bytes(range(24))
    output = filled(SMB2SrvRequestResumeKey(), resume_key=key, context=b"more")
    assert wire.parse_resume_key(output) == key
    with pytest.raises(ProtocolError):
        wire.parse_resume_key(key[:23])


def test_extents_are_duplicated_by_the_file_that_has_them() -> None:
    bodies = {
        wire.READ: wire.read_body(FILE, 1, 2), wire.WRITE: wire.write_body(FILE, 1, 2),
        wire.FLUSH: wire.flush_body(FILE), wire.IOCTL: wire.ioctl_body(FILE, 1, b"", 0),
    }  # fmt: skip
    assert {wire.file_id_of(command, body) for command, body in bodies.items()} == {FILE}
    assert wire.file_id_of(wire.ECHO, wire.echo_body()) == b""
    assert wire.duplicate_extents(FILE, 1, 2, 3) == FILE + Struct("<QQQ").pack(1, 2, 3)
