"""What goes onto the wire, and what an errno becomes there."""

from __future__ import annotations

import errno

import pytest

from mirrord.nbd import wire


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, 1),
        (errno.EROFS, 1),
        (errno.EIO, 5),
        (errno.EINVAL, 22),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.ESHUTDOWN, 108),
        (errno.ENOMEM, 5),  # never ENOMEM
        (errno.ESTALE, 5),
        (errno.EOPNOTSUPP, 22),
        (errno.EOVERFLOW, 22),
        (None, 5),
        (0, 5),
    ],
)
def test_n12_an_errno_becomes_one_of_the_few_errors_of_nbd(number: int | None, error: int) -> None:
    assert wire.to_wire(number) == error


def test_n8_enotsup_is_an_answer_to_fast_zero_alone() -> None:
    assert wire.to_wire(errno.EOPNOTSUPP, wire.CMD_FLAG_FAST_ZERO) == 95
    assert wire.to_wire(errno.EIO, wire.CMD_FLAG_FAST_ZERO) == 5


def test_a_client_gets_its_own_errno_and_eio_for_what_nbd_does_not_define() -> None:
    assert wire.from_wire(28) == errno.ENOSPC
    assert wire.from_wire(4711) == errno.EIO


def test_layouts_are_those_of_the_protocol() -> None:
    assert wire.GREETING.pack(wire.GREETING_MAGIC, wire.OPTION_MAGIC, 3) == (
        b"NBDMAGICIHAVEOPT\x00\x03"
    )
    assert wire.pack_option(7, b"ab") == b"IHAVEOPT\0\0\0\x07\0\0\0\x02ab"
    reply = bytes.fromhex("0003e889045565a9 00000007 80000001 00000001") + b"x"
    assert wire.pack_option_reply(7, wire.REP_ERR_UNSUP, b"x") == reply
    assert wire.pack_string(b"abc") == b"\0\0\0\x03abc"
    request = bytes.fromhex("25609513 0001 0001 0000000000000009 0000000000001000 00000200")
    assert wire.pack_request(1, 9, 0x1000, 0x200, 1) == request
    chunk = bytes.fromhex("668e33ef 0001 8001 0000000000000009 00000008 00000005 0002") + b"no"
    assert wire.pack_error(9, 5, "no") == chunk


def test_cve_2020_10761_an_error_text_is_short() -> None:
    assert len(wire.pack_error(1, 5, "x" * 5000)) == wire.CHUNK.size + 6 + wire.TEXT_BYTES_MAX
