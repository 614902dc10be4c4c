"""Connecting, authenticating and binding by smbprotocol. Every function blocks: run it in a thread.

What is relied on in smbprotocol beyond its documented classes, and pinned by
`tests/storage/test_smb_contract.py`: `Connection.transport` is assigned by `connect` and used by
its four methods; `Session` has `signing_key`, `encryption_key`, `decryption_key` and
`encrypt_data`; `Connection` has `session_table`, `preauth_integrity_hash_value`,
`preauth_integrity_session_hash_value`, `client_capabilities` and what was negotiated.

After authentication smbprotocol neither signs nor encrypts any more: the line does both, for its
messages too, so that there is one place where every answer is verified and one count of nonces.
"""

from __future__ import annotations

import errno
import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import spnego
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode
from smbprotocol.connection import Capabilities, Connection, Dialects
from smbprotocol.exceptions import MoreProcessingRequired, SMBConnectionClosed
from smbprotocol.session import Session, SMB2SessionSetupRequest, SMB2SessionSetupResponse

from mirrord.smb import wire
from mirrord.smb.seal import Encrypted, Encryption, Seal, Signed, Signing, Unsealed
from mirrord.smb.wire import Bytes
from mirrord.storage.remote import DeniedError, LostError
from mirrord.storage.smb.line import Line, LineTransport
from mirrord.storage.smb.trouble import Step, told

DIALECTS: Final = {
    "2.1": Dialects.SMB_2_1_0,
    "3.0": Dialects.SMB_3_0_0,
    "3.0.2": Dialects.SMB_3_0_2,
    "3.1.1": Dialects.SMB_3_1_1,
}
PERSISTENT_HANDLES: Final = 0x10
CREDITS_ASKED: Final = 64
BINDING: Final = 1  # flag of a SESSION_SETUP (2.2.5)
_MULTI_CHANNEL = Capabilities.SMB2_GLOBAL_CAP_MULTI_CHANNEL


class Password(Protocol):
    """What shows a password to nobody by accident."""

    def reveal(self) -> str:
        """Return it."""


class Login(Protocol):
    """Who logs on, and how."""

    @property
    def user(self) -> str | None:
        """DOMAIN\\user, user@realm or user; None: whoever the Kerberos tickets are of."""

    @property
    def password(self) -> Password | None: ...
    @property
    def kerberos(self) -> bool: ...
    @property
    def keytab(self) -> str | None: ...
    @property
    def ccache(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Security:
    """What a server has to be able to do, at least."""

    encrypt: bool = True
    sign: bool = True
    min_dialect: str = "3.1.1"


@dataclass(slots=True)
class Seat:
    """One line and the smbprotocol connection that is at home on it."""

    connection: Connection
    line: Line
    number: int  # among all lines that its session ever had: nonces begin with it
    signing_key: bytes = field(default=b"", repr=False)


class _Connection(Connection):  # type: ignore[misc]  # smbprotocol has no types
    """A connection whose transport is a line, and which can name the session it succeeds."""

    def __init__(self, line_maker: Callable[[], Line], timeout_s: float, *args: Any, **kwargs: Any):
        self._line_maker = line_maker
        self._timeout_s = timeout_s
        self._line_transport: LineTransport | None = None
        self.previous_session_id = 0
        super().__init__(*args, **kwargs)

    @property
    def transport(self) -> LineTransport | None:
        return self._line_transport

    @transport.setter
    def transport(self, made: Any) -> None:
        if made is not None:
            made = LineTransport(self._line_maker, made.server, made.port, self._timeout_s)
        self._line_transport = made

    def send(self, message: Any, *args: Any, **kwargs: Any) -> Any:
        if self.previous_session_id and isinstance(message, SMB2SessionSetupRequest):
            message["previous_session_id"] = self.previous_session_id
        return super().send(message, *args, **kwargs)


def connect(
    line_maker: Callable[[], Line],
    host: str,
    port: int,
    client_guid: uuid.UUID,
    security: Security,
    timeout_s: float,
    server: str,
) -> Connection:
    """Connect and negotiate. Raises LostError, DeniedError (`server-too-weak`)."""
    connection = _Connection(
        line_maker, timeout_s, client_guid, host, port, require_signing=security.sign
    )
    connection.client_capabilities |= _MULTI_CHANNEL | PERSISTENT_HANDLES
    connection.client_capabilities |= Capabilities.SMB2_GLOBAL_CAP_LEASING
    try:
        connection.connect(timeout=timeout_s)
        require(connection, security, server)
    except Exception as error:
        why = told(_line_error(connection, error, server), Step(server, "connecting"))
        hang_up(connection)
        raise why from error
    return connection


def _line_error(connection: Connection, error: Exception, server: str) -> Exception:
    """Return why the line was lost, where smbprotocol knows only that it was."""
    line: Line | None = getattr(connection.transport, "line", None)
    if isinstance(error, SMBConnectionClosed) and line is not None and line.why is not None:
        return LostError(f"{server}: {line.why.strerror}")
    return error


def require(connection: Connection, security: Security, server: str) -> None:
    """Refuse a server that is weaker than allowed, before it learns anything of the user."""
    found = next((n for n, d in DIALECTS.items() if d == connection.dialect), "2.0.2")
    if connection.dialect < DIALECTS[security.min_dialect]:
        raise DeniedError(
            errno.EPROTONOSUPPORT,
            "server-too-weak",
            f"{server} speaks SMB {found} at most, {security.min_dialect} is required: upgrade it, "
            "or allow it by `min_dialect` of this share",
        )
    if security.encrypt and not connection.supports_encryption:
        raise DeniedError(
            errno.EPROTONOSUPPORT,
            "server-too-weak",
            f"{server} offers no encryption: enable it there, or allow plaintext by "
            '`encryption = "allow-plaintext"` of this share',
        )


def hang_up(connection: Connection) -> None:
    """End a connection whatever its state is."""
    if connection.transport is not None:
        connection.transport.close()


def authenticate(
    connection: Connection, login: Login, security: Security, server: str, previous: int = 0
) -> Session:
    """Log on. `previous` is a session of ours that the server may believe alive: it ends it.

    Raises LostError, DeniedError (`credential-refused`, `guest-refused`, …).
    """
    connection.previous_session_id = previous
    session = Session(
        connection,
        _username(login),
        login.password.reveal() if login.password is not None else None,
        require_encryption=security.encrypt,
        auth_protocol="kerberos" if login.kerberos else "negotiate",
    )
    try:
        session.connect()
    except Exception as error:
        why = told(_line_error(connection, error, server), Step(server, "logging on"))
        raise why from _without_frames(error)
    finally:
        session.password = None
    if session.signing_key is None:
        raise DeniedError(
            errno.EACCES, "guest-refused", f"{server} takes this user for a guest: refused"
        )
    return session


def _without_frames(error: Exception) -> Exception:
    """Return the cause without its frames: their variables have the password."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def _username(login: Login) -> Any:
    if login.kerberos and login.keytab:
        return spnego.KerberosKeytab(login.keytab, principal=login.user)
    if login.kerberos and login.ccache:
        return spnego.KerberosCCache(login.ccache, principal=login.user)
    return login.user


def seal_of(connection: Connection, session: Session, *, encrypt: bool, seat: Seat) -> Seal:
    """Return what signs, or encrypts, the messages of one line."""
    if encrypt:
        cipher = connection.cipher_id if connection.dialect >= Dialects.SMB_3_1_1 else None
        return Encrypted(
            Encryption(cipher or Encryption.AES_128_CCM),
            session.encryption_key,
            session.decryption_key,
            session.session_id,
            seat.number,
        )
    signed = Signed(_signing(connection), seat.signing_key)
    return signed if connection.require_signing else BarelySigned(signed)


class BarelySigned(Unsealed):
    """Signs all but reads and writes: where an administrator allowed that for a share.

    Servers want the rest signed ([MS-SMB2] 3.3.5.7), and it costs nothing.
    """

    def __init__(self, signed: Signed) -> None:
        self._signed = signed

    def close(self, head: bytes, data: Bytes = b"") -> list[Bytes]:
        bulk = wire.parse_header(head).command in (wire.READ, wire.WRITE)
        return super().close(head, data) if bulk else self._signed.close(head, data)

    def open(self, message: Bytes) -> Bytes:
        message = super().open(message)
        header = wire.parse_header(message)
        bulk = header.command in (wire.READ, wire.WRITE)
        return message if bulk else self._signed.open(message)


def _signing(connection: Connection) -> Signing:
    if connection.dialect >= Dialects.SMB_3_1_1 and connection.signing_algorithm_id is not None:
        return Signing(connection.signing_algorithm_id)
    return Signing.AES_CMAC if connection.dialect >= Dialects.SMB_3_0_0 else Signing.HMAC_SHA256


def bind(session: Session, connection: Connection, login: Login, server: str) -> bytes:
    """Make a second connection one more channel of the session; return its signing key.

    [MS-SMB2] 3.2.4.2.3: the exchange is signed with the session's key, and the channel's own key
    comes from what this authentication agreed on (3.2.5.3.3).
    """
    try:
        return _bind(session, connection, login)
    except Exception as error:
        why = told(_line_error(connection, error, server), Step(server, "logging on"))
        raise why from _without_frames(error)


class _Binding:
    """What `Connection.send` looks up to sign a binding: the session's own key, no trees."""

    def __init__(self, signing_key: bytes) -> None:
        self.signing_key = signing_key
        self.signing_required = True
        self.encrypt_data = False
        self.tree_connect_table: dict[int, Any] = {}


def _bind(session: Session, connection: Connection, login: Login) -> bytes:
    session_id = session.session_id
    connection.session_table[session_id] = _Binding(session.signing_key)
    context = spnego.client(
        _username(login),
        login.password.reveal() if login.password is not None else None,
        service="cifs",
        hostname=connection.server_name,
        options=spnego.NegotiateOptions.session_key,
        protocol="kerberos" if login.kerberos else "negotiate",
    )
    heard: list[bytes] = []
    token = None if login.kerberos else connection.gss_negotiate_token
    while not context.complete and (out := context.step(token)):
        message = SMB2SessionSetupRequest()
        message["flags"] = BINDING
        message["capabilities"] = Capabilities.SMB2_GLOBAL_CAP_DFS
        message["security_mode"] = connection.client_security_mode
        message["buffer"] = out
        request = connection.send(
            message, sid=session_id, credit_request=CREDITS_ASKED, force_signature=True
        )
        try:
            response = connection.receive(request)
        except MoreProcessingRequired as more:
            response = more.header
        number = request.message["message_id"].get_value()
        heard += connection.preauth_integrity_session_hash_value.pop(number)
        answer = SMB2SessionSetupResponse()
        answer.unpack(response["data"].get_value())
        token = answer["buffer"].get_value()
    key = context.session_key[:16].ljust(16, b"\0")
    binding = connection.session_table[session_id]
    binding.signing_key = _channel_key(connection, key, heard)
    connection.verify_signature(response, session_id, force=True)
    return bytes(binding.signing_key)


def _channel_key(connection: Connection, key: bytes, heard: list[bytes]) -> bytes:
    """Derive a channel's signing key (3.1.4.2)."""
    if connection.dialect < Dialects.SMB_3_1_1:
        return _derive(key, b"SMB2AESCMAC\0", b"SmbSign\0")
    preauth = bytes(64)
    for message in (*connection.preauth_integrity_hash_value, *heard):
        preauth = hashlib.sha512(preauth + message).digest()
    return _derive(key, b"SMBSigningKey\0", preauth)


def _derive(key: bytes, label: bytes, context: bytes) -> bytes:
    """SP800-108 in counter mode, as 3.1.4.2 asks for it."""
    return KBKDFHMAC(
        algorithm=hashes.SHA256(),
        mode=Mode.CounterMode,
        length=16,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=label,
        context=context,
        fixed=None,
    ).derive(key)
