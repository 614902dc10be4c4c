"""Logging on by tickets: from a cache, from a keytab; and what is said when there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mirrord.core.geometry import MIB
from tests.kdc import Kdc
from tests.samba import Samba
from tests.storage.conformance import pattern
from tests.storage.shares import Client, Login, MakeClient, refusal_of
from tests.storage.shares import make_client as make_client

pytest.importorskip("gssapi", reason="needs smbprotocol[kerberos]")
SIZE = MIB
HOST = "files.mirrord.test"  # a name that Samba deems fit for Kerberos
NAMES = (HOST, "127.0.0.1")


@pytest.fixture
def realm(kdc: Kdc, monkeypatch: pytest.MonkeyPatch) -> Kdc:
    """A realm of this process, with no tickets."""
    for name, value in kdc.environment("nothing").items():
        monkeypatch.setenv(name, value)
    return kdc


@pytest.fixture
def server(realm: Kdc, make_samba: Callable[..., Samba]) -> Samba:
    """A server in the realm, with a disk."""
    one = make_samba(**realm.server_options(*NAMES))
    one.put("disk.raw", pattern(SIZE))
    return one


async def works(client: Client) -> None:
    """Use a disk over several lines, each of which logs on."""
    backend = await client.open(authoritative=True)
    assert backend.facts()["channels"] == client.server.settings.channels
    await backend.write(0, b"x" * 100_000)
    await backend.flush()
    assert bytes(await backend.read(0, SIZE)) == b"x" * 100_000 + pattern(SIZE)[100_000:]


@pytest.mark.parametrize("encrypt", [True, False])
@pytest.mark.parametrize("way", ["ccache", "keytab", "default"])
async def test_a_ticket_lets_in(
    realm: Kdc, server: Samba, make_client: MakeClient, way: str, encrypt: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    password = realm.add(server.user)
    login = Login(None, kerberos=True)
    if way == "keytab":
        login.user = f"{server.user}@{realm.realm}"
        login.keytab = str(realm.keytab("client.keytab", server.user))
    else:
        realm.login(server.user, password, cache="given")
        cache = realm.environment("given")["KRB5CCNAME"]
        if way == "ccache":
            login.ccache = cache
        else:
            monkeypatch.setenv("KRB5CCNAME", cache)
    await works(make_client(server, login=login, encrypt=encrypt, channels=2))


async def test_without_a_ticket_it_is_said_in_a_line(
    realm: Kdc, server: Samba, make_client: MakeClient, tmp_path: Path
) -> None:
    logins = [
        Login(None, kerberos=True),
        Login("nobody-here", kerberos=True, keytab=str(tmp_path / "missing.keytab")),
        Login(None, kerberos=True, ccache=f"FILE:{tmp_path / 'missing'}"),
    ]
    for login in logins:
        error = await refusal_of(make_client(server, login=login).open())
        assert error.code == "credential-refused"
        assert f"127.0.0.1:{server.port}" in str(error)
