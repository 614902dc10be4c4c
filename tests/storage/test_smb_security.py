"""Every dialect, signature and cipher that a server can be made to choose; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from mirrord.core.geometry import MIB, Status
from mirrord.errors import RefusedError
from mirrord.storage.backend import UnreachableError
from mirrord.storage.remote import LostError
from mirrord.storage.smb import server as server_module
from tests.samba import Samba, reserve_port
from tests.storage.conformance import pattern
from tests.storage.shares import JOB, QUICK, Login, MakeClient, Words, refusal_of
from tests.storage.shares import make_client as make_client
from tests.tcp_proxy import Proxy

SIZE = 2 * MIB

SERVER = {
    "signing": "auto", "encrypt": "if_required", "min_protocol": "SMB2_10",
    "max_protocol": "SMB3_11", "multichannel": "yes",
}  # fmt: skip


@pytest.fixture(scope="module")
def changing() -> Iterator[Samba]:
    """A server whose settings a test may change."""
    server = Samba(signing="auto", min_protocol="SMB2_10")
    try:
        yield server.start()
    finally:
        server.close()


class Case(NamedTuple):
    """What the server is told, what the client wants, and what both agree on."""

    name: str
    server: dict[str, Any]
    client: dict[str, Any]
    expected: tuple[str, str, str]  # dialect, signing, encryption


def chooses(kind: str, algorithm: str) -> dict[str, Any]:
    """Return the settings of a server that knows one algorithm alone."""
    return {"global_lines": [f"server smb3 {kind} algorithms = {algorithm}"]}


SIGNED = {"encrypt": False}
UNSIGNED = {"encrypt": False, "sign": False}
OLDER = {"encrypt": False, "min_dialect": "2.1"}
OLD_UNSIGNED = {**UNSIGNED, **OLDER}
NONE = ("none", "none")
CASES = [
    *(
        Case(cipher, chooses("encryption", cipher), {}, ("3.1.1", "by encryption", cipher))
        for cipher in ("AES-128-GCM", "AES-128-CCM", "AES-256-GCM", "AES-256-CCM")
    ),
    *(
        Case(name, chooses("signing", name), SIGNED, ("3.1.1", name, "none"))
        for name in ("AES-128-GMAC", "AES-128-CMAC", "HMAC-SHA256")
    ),
    *(
        Case(
            f"{dialect}-encrypted",
            {"max_protocol": name},
            {"min_dialect": dialect},
            (dialect, "by encryption", "AES-128-CCM"),
        )
        for name, dialect in (("SMB3_02", "3.0.2"), ("SMB3_00", "3.0"))
    ),
    *(
        Case(f"{dialect}-signed", {"max_protocol": name}, OLDER, (dialect, signing, "none"))
        for name, dialect, signing in (
            ("SMB3_02", "3.0.2", "AES-128-CMAC"),
            ("SMB3_00", "3.0", "AES-128-CMAC"),
            ("SMB2_10", "2.1", "HMAC-SHA256"),
        )
    ),
    Case("unsigned", {}, UNSIGNED, ("3.1.1", "none", "none")),
    Case("unsigned-3.0", {"max_protocol": "SMB3_00"}, OLD_UNSIGNED, ("3.0", *NONE)),
    Case("unsigned-2.1", {"max_protocol": "SMB2_10"}, OLD_UNSIGNED, ("2.1", *NONE)),
    Case("server-signs", {"signing": "mandatory"}, UNSIGNED, ("3.1.1", "AES-128-GMAC", "none")),
    Case("server-encrypts", {"encrypt": "required"}, UNSIGNED,
         ("3.1.1", "by encryption", "AES-128-GCM")),
    Case("share-encrypts", {"share_lines": ["smb encrypt = required"]}, SIGNED,
         ("3.1.1", "by encryption", "AES-128-GCM")),
    Case("share-encrypts-3.0",
         {"share_lines": ["smb encrypt = required"], "max_protocol": "SMB3_00"}, OLDER,
         ("3.0", "by encryption", "AES-128-CCM")),
]  # fmt: skip


def told(server: Samba, **settings: Any) -> None:
    """Give the server settings, and the usual ones for all the others."""
    lists: dict[str, Any] = {"global_lines": (), "share_lines": ()}
    server.reconfigure(**{**SERVER, **lists, **settings})


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_bytes_arrive_however_they_are_sealed(
    changing: Samba, make_client: MakeClient, case: Case, channels: int, expect_log: Any
) -> None:
    single = case.expected[0] == "2.1" or case.name == "server-encrypts"
    if channels > 1 and single:  # no such thing in 2.1; Samba wants the binding encrypted as well
        expect_log("single channel", "channel missing")
    told(changing, **case.server)
    name = f"{case.name}-{channels}.raw"
    client = make_client(changing, channels=channels, **case.client)
    backend = await client.create(name, SIZE, authoritative=True)
    facts = backend.facts()
    assert tuple(str(facts[key]) for key in ("dialect", "signing", "encryption")) == tuple(
        word.replace("AES-128-GMAC", "AES-GMAC").replace("AES-128-CMAC", "AES-CMAC")
        for word in case.expected
    )
    assert facts["channels"] == (1 if single else channels)
    expected = bytearray(SIZE)
    for offset, length in ((0, 1), (511, 4098), (100_000, 700_001), (SIZE - 70_000, 70_000)):
        expected[offset : offset + length] = pattern(length)
        await backend.write(offset, pattern(length), fua=length == 1)
    assert bytes(await backend.read(0, SIZE)) == expected
    await backend.write_zeroes(200_000, 300_000)
    expected[200_000:500_000] = bytes(300_000)
    await backend.flush()
    assert bytes(await backend.read_stored(0, SIZE)) == expected
    assert changing.file(f".{name}.mirrord-{JOB}.part").read_bytes() == expected
    extents = await backend.extents(0, SIZE)
    assert Status.HOLE in {extent.status for extent in extents}
    # a second share of the same session, and the name once more
    await (await client.session()).tree("IPC$")
    await backend.check_unchanged()


class TestRefusals:
    """What is weaker than the settings allow is refused before it learns anything."""

    @pytest.mark.fault(17)
    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize(
        ("server", "client", "words"),
        [
            ({"encrypt": "off"}, {}, "offers no encryption"),
            ({"max_protocol": "SMB3_02"}, {}, "speaks SMB 3.0.2 at most, 3.1.1 is required"),
            ({"max_protocol": "SMB2_10"}, {"encrypt": False, "min_dialect": "3.0"}, "SMB 2.1 at"),
            ({"max_protocol": "SMB2_10"}, {"min_dialect": "2.1"}, "offers no encryption"),
        ],
    )
    async def test_a_weak_server(
        self, changing: Samba, make_client: MakeClient, server: Any, client: Any, words: str,
        fast: bool,
    ) -> None:  # fmt: skip
        told(changing, **server)
        error = await refusal_of(make_client(changing, fast=fast, **client).open())
        assert error.code == "server-too-weak"
        assert words in str(error)
        assert f"127.0.0.1:{changing.port}" in str(error)

    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize("encrypt", [True, False])
    async def test_a_guest(
        self, changing: Samba, make_client: MakeClient, encrypt: bool, fast: bool
    ) -> None:
        told(
            changing,
            global_lines=["map to guest = bad user", "restrict anonymous = 0"],
            share_lines=["guest ok = yes"],
        )
        changing.put("disk.raw", b"x" * 512)
        for sign in (True, False):
            client = make_client(
                changing, fast=fast, encrypt=encrypt, sign=sign,
                login=Login("nosuchuser", Words("whatever")),
            )  # fmt: skip
            error = await refusal_of(client.open())
            assert error.code == "guest-refused", str(error)

    @pytest.mark.parametrize("fast", [True, False])
    async def test_whom_the_server_lets_not_in(
        self, changing: Samba, make_client: MakeClient, fast: bool
    ) -> None:
        told(changing)
        wrong = Login(changing.user, Words("not the password"))
        error = await refusal_of(make_client(changing, fast=fast, login=wrong).open())
        assert error.code == "credential-refused"
        assert "wrong user or password" in str(error)
        assert "not the password" not in str(error)
        changing.edit_account("-c", "[D]")
        error = await refusal_of(make_client(changing, fast=fast).open())
        changing.edit_account("-c", "[]")
        assert (error.code, "disabled" in str(error)) == ("credential-refused", True)
        changing.want_new_password()
        error = await refusal_of(make_client(changing, fast=fast).open())
        changing.want_new_password(False)
        assert (error.code, "must be changed" in str(error)) == ("credential-refused", True)

    async def test_a_credential_that_can_t_be_read(
        self, changing: Samba, make_client: MakeClient
    ) -> None:
        told(changing)
        client = make_client(changing)

        def refuse() -> Login:
            raise RefusedError("credential-missing", "there is no credential file")

        client.server._login = refuse
        error = await refusal_of(client.open())
        assert error.code == "credential-missing"

    @pytest.mark.parametrize("fast", [True, False])
    async def test_nobody_there(
        self, changing: Samba, make_client: MakeClient, fast: bool, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(server_module, "PATIENCE_S", 0)
        (held,) = reserve_port(["127.0.0.1"])
        with held:
            client = make_client(changing, fast=fast, port=held.getsockname()[1])
            with pytest.raises(UnreachableError, match="can't be reached") as caught:
                await client.open()
            assert f"127.0.0.1:{client.port}" in str(caught.value)
            with pytest.raises(LostError):
                await client.server.session()

    @pytest.mark.parametrize("encrypt", [True, False])
    @pytest.mark.parametrize("dialect", ["SMB3_11", "SMB3_00"])
    async def test_a_negotiation_that_was_changed_on_the_way(
        self, changing: Samba, make_client: MakeClient, monkeypatch: Any, dialect: str,
        encrypt: bool,
    ) -> None:  # fmt: skip
        """3.0 asks for it again, signed; 3.1.1 hashes it into the keys."""
        monkeypatch.setattr(server_module, "PATIENCE_S", 0)
        told(changing, max_protocol=dialect)
        with Proxy(changing.port) as proxy:
            client = make_client(
                changing, port=proxy.port, min_dialect="3.0", encrypt=encrypt, line=QUICK
            )
            proxy.corrupt("to_client", 4 + 64 + 12)  # a byte of the server's GUID
            with pytest.raises((RefusedError, UnreachableError)) as caught:
                await client.open()
            assert "\n" not in str(caught.value)
            assert f"127.0.0.1:{proxy.port}" in str(caught.value)
