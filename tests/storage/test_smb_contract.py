"""What mirrord relies on in smbprotocol beyond its documented classes.

A failure here means that another version of smbprotocol needs a look at `dial`, `control`, `plain`
and `session` before it may be used.
"""

from __future__ import annotations

import inspect
import logging
import uuid
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
from smbprotocol import connection as smb_connection
from smbprotocol.connection import Capabilities, Connection, Dialects, SecurityMode
from smbprotocol.exceptions import (
    EndOfFile,
    MoreProcessingRequired,
    SMBAuthenticationError,
    SMBConnectionClosed,
    SMBException,
    SMBResponseException,
)
from smbprotocol.open import Open
from smbprotocol.session import Session, SMB2SessionSetupRequest, SMB2SessionSetupResponse
from smbprotocol.tree import TreeConnect

from mirrord.smb import status as st
from mirrord.smb import wire
from mirrord.storage.smb import control, dial
from mirrord.storage.smb.line import LineTransport
from tests.samba import Samba
from tests.storage.shares import MakeClient
from tests.storage.shares import make_client as make_client


class Transport:
    """Takes what is sent, and gives what a test puts in."""

    connected = True

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.sent: list[bytes] = []
        self.closed = False

    def connect(self) -> None:
        """Do nothing."""

    def send(self, message: bytes) -> None:
        """Keep it."""
        self.sent.append(bytes(message))

    def recv(self, timeout: float) -> bytes:
        """Say that the connection has ended."""
        self.connected = False
        return b""

    def close(self) -> None:
        """Note it."""
        self.closed = True
        self.connected = False


def fresh() -> Any:
    """Return a connection that is connected to nothing."""
    made = Connection(uuid.uuid4(), "server", 4450, require_signing=True)
    made.transport = Transport()
    return made


def test_the_version_is_one_that_was_looked_at() -> None:
    assert version("smbprotocol").startswith("1.17."), "look at all that is listed in dial.py"


def test_connect_assigns_a_transport_and_uses_four_methods(monkeypatch: Any) -> None:
    made: list[Transport] = []
    real = smb_connection.Tcp

    def tcp(*arguments: Any) -> Transport:
        made.append(Transport(*arguments))
        return made[-1]

    monkeypatch.setattr(smb_connection, "Tcp", tcp)
    one = Connection(uuid.uuid4(), "server", 4450)
    with pytest.raises(SMBConnectionClosed):
        one.connect(timeout=5)
    assert made[0].arguments == ("server", 4450, 5)
    assert one.transport is made[0], "`transport` is not what `connect` made"
    needed = {"connect", "send", "recv", "close", "connected"}
    assert needed <= set(dir(LineTransport))
    tcp_source = inspect.getsource(Connection)
    used = {word for word in (*dir(real), "connected") if f"self.transport.{word}" in tcp_source}
    assert used <= needed, f"smbprotocol uses more of its transport: {used - needed}"
    attributes = inspect.signature(real.__init__).parameters
    assert {"server", "port", "timeout"} <= set(attributes)


def test_what_is_sent_has_the_numbers_that_lines_translate() -> None:
    one = fresh()
    for number in range(3):
        one.sequence_window["high"] = number + 1
        one.send(SMB2SessionSetupRequest(), sid=0, credit_request=64)
        header = wire.parse_header(one.transport.sent[-1])
        assert header.message_id == number
        assert header.command == wire.SESSION_SETUP
        assert header.credits == 64
        assert one.transport.sent[-1][:4] == wire.SMB2_MAGIC, "it is framed by now"


def test_a_previous_session_can_be_named() -> None:
    message = SMB2SessionSetupRequest()
    message["previous_session_id"] = 0x1122334455667788
    assert (0x1122334455667788).to_bytes(8, "little") in message.pack()
    message["flags"] = dial.BINDING
    assert message.pack()[2] == 1
    assert SMB2SessionSetupResponse()["buffer"].get_value() == b""


def test_a_connection_has_what_dial_reads() -> None:
    one = fresh()
    for name in (
        "session_table", "preauth_integrity_hash_value", "preauth_integrity_session_hash_value",
        "client_capabilities", "client_security_mode", "dialect", "max_read_size",
        "max_write_size", "supports_encryption", "supports_multi_channel",
        "supports_multi_credit", "require_signing", "cipher_id", "signing_algorithm_id",
        "gss_negotiate_token", "server_name", "sequence_window", "outstanding_requests",
    ):  # fmt: skip
        assert hasattr(one, name), f"Connection.{name} is gone"
    assert one.preauth_integrity_hash_value == []
    assert one.preauth_integrity_session_hash_value == {}
    assert one.client_security_mode == SecurityMode.SMB2_NEGOTIATE_SIGNING_REQUIRED
    one.client_capabilities |= Capabilities.SMB2_GLOBAL_CAP_MULTI_CHANNEL


def test_a_session_setup_is_kept_for_the_hash() -> None:
    one = fresh()
    request = one.send(SMB2SessionSetupRequest(), sid=0)
    number = request.message["message_id"].get_value()
    assert one.preauth_integrity_session_hash_value[number] == [one.transport.sent[0]]


def test_a_binding_is_signed_by_what_the_table_has() -> None:
    one = fresh()
    one.dialect = Dialects.SMB_3_0_0
    one.session_table[5] = dial._Binding(bytes(16))
    one.send(SMB2SessionSetupRequest(), sid=5, force_signature=True)
    header = wire.parse_header(one.transport.sent[0])
    assert header.flags & wire.SIGNED
    assert header.signature != bytes(16)


def test_a_session_has_what_sealing_needs() -> None:
    session = Session(fresh(), "user", "words")
    for name in (
        "signing_key", "encryption_key", "decryption_key", "encrypt_data", "signing_required",
        "session_id", "tree_connect_table", "open_table", "connection", "password", "username",
    ):  # fmt: skip
        assert hasattr(session, name), f"Session.{name} is gone"
    assert session.signing_required
    session.signing_required = session.encrypt_data = False
    tree = TreeConnect(session, r"\\server\share")
    for name in ("tree_connect_id", "encrypt_data", "is_dfs_share", "is_ca_share"):
        assert hasattr(tree, name), f"TreeConnect.{name} is gone"
    assert "require_secure_negotiate" in inspect.signature(TreeConnect.connect).parameters
    assert callable(tree._verify_dialect_negotiate)
    session.signing_key = None
    with pytest.raises(SMBException):
        tree._verify_dialect_negotiate()


def test_an_open_can_be_made_of_a_handle() -> None:
    session = Session(fresh(), "user", "words")
    file = Open(TreeConnect(session, r"\\server\share"), "")
    file.file_id = b"12345678abcdefgh"
    file.connection.max_write_size = 1 << 20
    file.connection.dialect = Dialects.SMB_3_1_1
    message, _ = file.write(b"data", 5, write_through=True, send=False)
    assert message["file_id"].get_value() == b"12345678abcdefgh"
    assert "unbuffered" in inspect.signature(Open.read).parameters


def test_exceptions_are_what_trouble_takes_them_for() -> None:
    assert issubclass(SMBConnectionClosed, SMBException)
    assert issubclass(SMBAuthenticationError, SMBException)
    for kind in (EndOfFile, MoreProcessingRequired):
        assert issubclass(kind, SMBResponseException)
    assert issubclass(SMBResponseException, SMBException)
    header = {"status": SimpleNamespace(get_value=lambda: st.ACCESS_DENIED)}
    assert SMBResponseException(header).status == st.ACCESS_DENIED


def test_it_dumps_no_messages_into_logs() -> None:
    for name in ("smbprotocol", "spnego"):
        assert logging.getLogger(f"{name}.session").getEffectiveLevel() == logging.CRITICAL


def test_create_contexts_can_be_packed() -> None:
    lease = control._lease(uuid.uuid4())
    assert len(lease.pack()) == 52
    durable = control._durable(SimpleNamespace(is_ca_share=True), uuid.uuid4())
    assert len(durable.pack()) == 32


async def test_after_logging_on_it_neither_signs_nor_encrypts(
    samba: Samba, make_client: MakeClient, monkeypatch: Any
) -> None:
    samba.put("contract.raw", b"x" * 512)
    seen: list[bytes] = []
    real = LineTransport.send

    def send(self: LineTransport, message: bytes) -> None:
        seen.append(bytes(message))
        real(self, message)

    monkeypatch.setattr(LineTransport, "send", send)
    for encrypt in (True, False):
        seen.clear()
        backend = await make_client(samba, encrypt=encrypt).open("contract.raw")
        await backend.close()
        later = [message for message in seen if wire.parse_header(message).command > 1]
        assert later
        assert not any(wire.parse_header(message).flags & wire.SIGNED for message in later)
