"""Signing and encrypting: every message that leaves is sealed, every one that comes is opened.

A `Seal` belongs to one connection of one session. What it opens was made by the server that
proved to know the user's key, and was not changed on the way; anything else is a ProtocolError.
Of signed messages the specification exempts two (3.2.5.1.3): an interim answer, whose signature
means nothing, and a break that nobody asked for. Encrypted sessions get lease breaks in plain, too
(Samba's belong to no session). Both pass, and nothing else does: whoever forges them can make us
wait, or give up a promise of the server's, but never answers a request.

Nonces: AES-GCM breaks when one repeats under a key, and all connections of a session share the
encryption key. So a nonce is (number of the connection in its session, a counter): two
connections never have the same number, one connection never the same count. Signing keys are each
connection's own, and their nonce is the message id, which is used once (3.1.4.1).
"""

from __future__ import annotations

import hashlib
import hmac
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import IntEnum
from struct import Struct
from typing import Final, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM
from cryptography.hazmat.primitives.cmac import CMAC

from mirrord.errors import ProtocolError
from mirrord.smb import status, wire
from mirrord.smb.wire import Bytes, frame

TRANSFORM_BYTES: Final = 52
TAG_BYTES: Final = 16
# Above this the pieces are fed one by one; below, joining them first is 4 us quicker.
JOIN_BYTES_MAX: Final = 32 * 1024

_TRANSFORM = Struct("<4s16s16sIHHQ")
# Fields of a header, as they lie there: parsing all of it takes longer than a signature.
_STATUS, _MESSAGE_ID, _SIGNATURE = slice(8, 12), slice(24, 32), slice(48, 64)
_PENDING = status.PENDING.to_bytes(4, "little")
_UNSOLICITED = wire.UNSOLICITED.to_bytes(8, "little")
_NO_SIGNATURE = bytes(16)
_WITH_SIGNED = [bytes((flags | wire.SIGNED,)) for flags in range(256)]  # the first byte of flags


class Signing(IntEnum):
    """The algorithms of signing, by their numbers on the wire (2.2.3.1.7)."""

    HMAC_SHA256 = 0
    AES_CMAC = 1
    AES_GMAC = 2


class Encryption(IntEnum):
    """The ciphers, by their numbers on the wire (2.2.3.1.2)."""

    AES_128_CCM = 1
    AES_128_GCM = 2
    AES_256_CCM = 3
    AES_256_GCM = 4


class Seal(ABC):
    """Makes messages ready to be sent, and believes what comes or doesn't."""

    name: str  # what `show` says: AES-128-GCM, AES-GMAC, none

    @abstractmethod
    def close(self, head: bytes, data: Bytes = b"") -> list[Bytes]:
        """Return one message, header and body in `head` and what follows, as it is sent.

        `data` must not change until it was sent.
        """

    @abstractmethod
    def open(self, message: Bytes) -> Bytes:
        """Return a message from its SMB header on. Raises ProtocolError."""

    def open_read(self, head: bytes, data: Bytes) -> None:
        """Believe a reply to a READ that came in two parts, or raise ProtocolError.

        Only asked where `splits`: with encryption the parts can't be told before it is opened.
        """
        raise ProtocolError("a reply in two parts")

    splits: bool = True  # whether a plain header stands in front of what was read


class Unsealed(Seal):
    """Neither signed nor encrypted: only where an administrator allowed it for a share."""

    name = "none"

    def close(self, head: bytes, data: Bytes = b"") -> list[Bytes]:
        return frame(head, data) if len(data) else frame(head)

    def open(self, message: Bytes) -> Bytes:
        if message[:4] != wire.SMB2_MAGIC:
            raise ProtocolError("not a plain SMB 2 message")
        return message

    def open_read(self, head: bytes, data: Bytes) -> None:
        return


class Signed(Seal):
    """Each message has a signature over all of it (3.1.4.1)."""

    def __init__(self, algorithm: Signing, key: bytes) -> None:
        self.name = algorithm.name.replace("_", "-")
        self._sign = _SIGNERS[algorithm](key)

    def close(self, head: bytes, data: Bytes = b"") -> list[Bytes]:
        before, after = head[:16] + _WITH_SIGNED[head[16]] + head[17:48], head[64:]
        parts: tuple[Bytes, ...] = (before + _NO_SIGNATURE + after,)
        if len(data):
            parts = (*parts, data)
        return frame(before + self._sign(parts, server=False) + after, *parts[1:])

    def open(self, message: Bytes) -> Bytes:
        head = bytes(message[: wire.HEADER_BYTES])
        if len(head) < wire.HEADER_BYTES:
            raise ProtocolError(f"a message of {len(head)} bytes has no header")
        if head[_STATUS] == _PENDING or head[_MESSAGE_ID] == _UNSOLICITED:
            return message
        if not head[16] & wire.SIGNED:
            raise ProtocolError("an unsigned answer on a signed session")
        self._check(head[_SIGNATURE], head, memoryview(message)[wire.HEADER_BYTES :])
        return message

    def open_read(self, head: bytes, data: Bytes) -> None:
        if not head[16] & wire.SIGNED:
            raise ProtocolError("an unsigned answer on a signed session")
        self._check(head[_SIGNATURE], head, data)

    def _check(self, signature: bytes, head: bytes, rest: Bytes) -> None:
        zeroed = head[:48] + _NO_SIGNATURE + head[64:]
        if not hmac.compare_digest(self._sign((zeroed, rest), server=True), signature):
            raise ProtocolError("a message with a wrong signature: it was changed on the way")


Sign = Callable[..., bytes]


def _gmac(key: bytes) -> Sign:
    """AES-128-GMAC: the tag of an empty text; the nonce is message id and direction (3.1.4.1)."""
    whole = AESGCM(key)
    aes = algorithms.AES(key)

    def sign(parts: Sequence[Bytes], *, server: bool) -> bytes:
        nonce = bytes(parts[0][_MESSAGE_ID]) + (b"\1\0\0\0" if server else b"\0\0\0\0")
        if len(parts[-1]) <= JOIN_BYTES_MAX:
            return whole.encrypt(nonce, b"", b"".join(parts))
        encryptor = Cipher(aes, modes.GCM(nonce)).encryptor()
        for part in parts:
            encryptor.authenticate_additional_data(part)
        encryptor.finalize()
        return encryptor.tag

    return sign


def _cmac(key: bytes) -> Sign:
    """AES-128-CMAC, of SMB 3.0 and 3.0.2 (RFC 4493)."""
    aes = algorithms.AES(key)

    def sign(parts: Sequence[Bytes], *, server: bool) -> bytes:
        mac = CMAC(aes)
        for part in parts:
            mac.update(cast(bytes, part))  # it takes any buffer, whatever its annotation says
        return mac.finalize()

    return sign


def _hmac(key: bytes) -> Sign:
    """HMAC-SHA256, its first half, of SMB 2 (RFC 2104)."""

    def sign(parts: Sequence[Bytes], *, server: bool) -> bytes:
        mac = hmac.new(key, digestmod=hashlib.sha256)
        for part in parts:
            mac.update(part)
        return mac.digest()[:16]

    return sign


_SIGNERS: dict[Signing, Callable[[bytes], Sign]] = {
    Signing.AES_GMAC: _gmac,
    Signing.AES_CMAC: _cmac,
    Signing.HMAC_SHA256: _hmac,
}


class Nonces:
    """Nonces of one connection: its number, then a counter. `size` bytes each."""

    def __init__(self, connection: int, size: int) -> None:
        self._prefix = connection.to_bytes(size - 8, "little")
        self._count = 0

    def take(self) -> bytes:
        """Return a nonce that no message of this session had or will have."""
        self._count += 1
        return self._prefix + self._count.to_bytes(8, "little")


class Encrypted(Seal):
    """Each message is encrypted, which also proves where it comes from (3.1.4.3)."""

    splits = False

    def __init__(
        self, cipher: Encryption, key: bytes, peer_key: bytes, session_id: int, connection: int
    ) -> None:
        """`key` encrypts, `peer_key` decrypts; `connection` is its number in the session."""
        self.name = cipher.name.replace("_", "-")
        self._session_id = session_id
        gcm = cipher in (Encryption.AES_128_GCM, Encryption.AES_256_GCM)
        self._nonce_bytes = 12 if gcm else 11
        self._nonces = Nonces(connection, self._nonce_bytes)
        self._whole = AESGCM(key) if gcm else AESCCM(key)
        self._peer_whole = AESGCM(peer_key) if gcm else AESCCM(peer_key)
        self._aes = algorithms.AES(key) if gcm else None
        self._peer_aes = algorithms.AES(peer_key) if gcm else None

    def close(self, head: bytes, data: Bytes = b"") -> list[Bytes]:
        nonce = self._nonces.take()
        length = len(head) + len(data)
        transform = _TRANSFORM.pack(
            wire.TRANSFORM_MAGIC, b"", nonce, length, 0, 1, self._session_id
        )
        if self._aes is None or length <= JOIN_BYTES_MAX:
            text = b"".join((head, data)) if len(data) else head
            sealed = self._whole.encrypt(nonce, text, transform[20:])
            tag, parts = sealed[-TAG_BYTES:], [memoryview(sealed)[:-TAG_BYTES]]
        else:
            encryptor = Cipher(self._aes, modes.GCM(nonce)).encryptor()
            encryptor.authenticate_additional_data(transform[20:])
            parts = [memoryview(encryptor.update(part)) for part in (head, data)]
            encryptor.finalize()
            tag = encryptor.tag
        return frame(wire.TRANSFORM_MAGIC + tag + transform[20:], *parts)

    def open(self, message: Bytes) -> Bytes:
        if message[:4] != wire.TRANSFORM_MAGIC:
            header = wire.parse_header(message)
            if (header.message_id, header.command) == (wire.UNSOLICITED, wire.OPLOCK_BREAK):
                return message
            raise ProtocolError("a plain answer on an encrypted session")
        if len(message) < TRANSFORM_BYTES + wire.HEADER_BYTES:
            raise ProtocolError(f"an encrypted message of {len(message)} bytes")
        _, tag, nonce, length, _, flags, session_id = _TRANSFORM.unpack_from(message)
        if flags != 1 or session_id != self._session_id:
            raise ProtocolError("an encrypted message of another session")
        view = memoryview(message)
        if length != len(view) - TRANSFORM_BYTES:
            raise ProtocolError(f"{len(view)} bytes where {length} were encrypted")
        try:
            return self._decrypt(nonce[: self._nonce_bytes], tag, view)
        except InvalidTag as error:
            raise ProtocolError("a message that doesn't decrypt: it was changed") from error

    def _decrypt(self, nonce: bytes, tag: bytes, view: memoryview) -> bytes:
        about, text = bytes(view[20:TRANSFORM_BYTES]), view[TRANSFORM_BYTES:]
        if self._peer_aes is None or len(text) <= JOIN_BYTES_MAX:
            return self._peer_whole.decrypt(nonce, b"".join((text, tag)), about)
        decryptor = Cipher(self._peer_aes, modes.GCM(nonce, tag)).decryptor()
        decryptor.authenticate_additional_data(about)
        plain = decryptor.update(text)
        decryptor.finalize()
        return plain
