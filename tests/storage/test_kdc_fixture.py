"""The Kerberos realm of the SMB tests lets in whom those tests believe it lets in."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable

import pytest
from smbprotocol.connection import Connection
from smbprotocol.session import Session
from smbprotocol.tree import TreeConnect

from tests.helpers import require_program, require_root
from tests.kdc import Kdc
from tests.samba import Samba

NOBODY = 65534
HOST = "files.mirrord.test"  # a name that Samba's client deems fit for Kerberos
NAMES = (HOST, "127.0.0.1")


@pytest.fixture(params=["oneself", "nobody"])
def server(request: pytest.FixtureRequest, kdc: Kdc, make_samba: Callable[..., Samba]) -> Samba:
    """A server in the realm, which has no other way in that a test would use."""
    if request.param == "oneself":
        return make_samba(**kdc.server_options(*NAMES))
    require_root()
    return make_samba(**kdc.server_options(*NAMES, uid=NOBODY))


def smbclient(kdc: Kdc, server: Samba) -> str:
    """List the share with the tickets of the cache; return all that was printed."""
    environment = kdc.environment()
    done = subprocess.run(
        [require_program("smbclient"), f"//{HOST}/disks", "-I", "127.0.0.1",
         "-p", str(server.port), "-s", str(server.config), "--use-kerberos=required",
         f"--use-krb5-ccache={environment['KRB5CCNAME']}", "-N", "-c", "ls"],
        capture_output=True, text=True, timeout=30, env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout + done.stderr


def test_samba_s_own_client_gets_in_with_a_ticket(kdc: Kdc, server: Samba) -> None:
    assert "blocks available" not in smbclient(kdc, server)
    kdc.login(server.user, kdc.add(server.user))
    assert "blocks available" in smbclient(kdc, server)
    kdc.stop()
    assert "blocks available" in smbclient(kdc, server)  # with the ticket that there is
    kdc.start()


def test_a_keytab_gives_a_ticket_and_a_wrong_password_none(kdc: Kdc, server: Samba) -> None:
    kdc.add(server.user, "right")
    with pytest.raises(AssertionError, match="incorrect"):
        kdc.login(server.user, "wrong")
    kdc.login(server.user, kdc.keytab("client.keytab", server.user))
    assert "blocks available" in smbclient(kdc, server)


@pytest.mark.parametrize("way", ["ticket", "keytab", "password"])
def test_smbprotocol_gets_in(
    kdc: Kdc, server: Samba, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gssapi")
    for name, value in kdc.environment().items():
        monkeypatch.setenv(name, value)
    password = kdc.add(server.user)
    user = None
    if way == "ticket":
        kdc.login(server.user, password)
    elif way == "keytab":
        monkeypatch.setenv("KRB5_CLIENT_KTNAME", str(kdc.keytab("client.keytab", server.user)))
    else:
        user = f"{server.user}@{kdc.realm}"
    connection = Connection(uuid.uuid4(), "127.0.0.1", server.port)
    connection.connect(timeout=10)
    session = Session(
        connection, user, password if user else None,
        auth_protocol="kerberos", hostname_override=HOST,
    )  # fmt: skip
    session.connect()
    TreeConnect(session, r"\\127.0.0.1\disks").connect()
    connection.disconnect()
