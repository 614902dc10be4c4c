"""Kerberos for a test: a realm of its own, whose files all lie in one folder.

The KDC is MIT's. It listens on a loopback port, as whoever runs the tests. Nothing of the system's
Kerberos is read: whoever takes part is given `environment`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers import eventually, require_program
from tests.samba import reserve_port

REALM = "MIRRORD.TEST"
READY_S = 20
TOOL_S = 30

CLIENT_CONFIG = """\
[libdefaults]
    default_realm = {realm}
    dns_lookup_kdc = false
    dns_lookup_realm = false
    dns_canonicalize_hostname = false
    rdns = false
[realms]
    {realm} = {{
        kdc = 127.0.0.1:{port}
    }}
"""

# Without a PAC Samba takes a principal's name for that of a user. MIT's PAC lacks what that of an
# Active Directory says of the user, and Samba refuses it.
KDC_CONFIG = """\
[kdcdefaults]
    kdc_listen = 127.0.0.1:{port}
    kdc_tcp_listen = 127.0.0.1:{port}
[realms]
    {realm} = {{
        database_name = {root}/principals
        key_stash_file = {root}/stash
        acl_file = {root}/acl
        disable_pac = true
        max_life = 1d
    }}
[logging]
    kdc = FILE:{root}/kdc.log
"""


class Kdc:
    """One realm with its KDC. Made here, started by `start`, removed by `close`."""

    def __init__(self) -> None:
        self._krb5kdc = require_program("krb5kdc")
        self._kadmin = require_program("kadmin.local")
        self._kinit = require_program("kinit")
        self.root = Path(tempfile.mkdtemp(prefix="mirrord-kdc-"))
        self.root.chmod(0o755)
        self.realm = REALM
        (self._reserved,) = reserve_port(["127.0.0.1"])
        self.port = int(self._reserved.getsockname()[1])
        words = {"realm": REALM, "port": self.port, "root": self.root}
        (self.root / "krb5.conf").write_text(CLIENT_CONFIG.format(**words))
        (self.root / "kdc.conf").write_text(KDC_CONFIG.format(**words))
        self._process: subprocess.Popen[bytes] | None = None
        self._run(require_program("kdb5_util"), "create", "-s", "-P", secrets.token_hex(8))

    # -- its life

    def start(self) -> Kdc:
        """Start the KDC and wait until it listens."""
        assert self._process is None
        with (self.root / "stdout").open("ab") as log:
            process = subprocess.Popen(
                [self._krb5kdc, "-n"], env=self._own_environment(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._process = process
        eventually(lambda: process.poll() is not None or self._listens(), READY_S, "a KDC listens")
        assert process.poll() is None, self.log()
        return self

    def stop(self) -> None:
        """Kill the KDC: tickets that there are stay good, no new ones are given."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=10)
        self._process = None

    def close(self) -> None:
        """End the KDC and remove its folder. Idempotent."""
        if self._process is not None:
            self.stop()
        self._reserved.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def log(self) -> str:
        """Return all that it logged so far."""
        logs = [self.root / "stdout", self.root / "kdc.log"]
        return "\n".join(one.read_text() for one in logs if one.exists())

    # -- who is in the realm

    def add(self, principal: str, password: str | None = None) -> str:
        """Add a principal; return its password. A service's is random, and nobody's business."""
        password = password or secrets.token_hex(8)
        self._run(self._kadmin, "-q", f"addprinc -pw {password} {principal}")
        return password

    def keytab(self, name: str, *principals: str, uid: int | None = None) -> Path:
        """Write the keys of principals to a file, readable by `uid` alone."""
        path = self.root / name
        for principal in principals:  # their passwords stay
            self._run(self._kadmin, "-q", f"ktadd -norandkey -k {path} {principal}")
        if uid is not None and os.geteuid() == 0:
            os.chown(path, uid, -1)
        return path

    # -- who takes part

    def environment(self, cache: str = "cache") -> dict[str, str]:
        """Return what a client needs: where the realm is, and its cache of tickets."""
        return {
            "KRB5_CONFIG": str(self.root / "krb5.conf"),
            "KRB5CCNAME": f"FILE:{self.root / cache}",
        }

    def login(
        self, principal: str, key: str | Path, *, cache: str = "cache", life: str = "1h"
    ) -> None:
        """Get a ticket by a password, or by a keytab, into a cache."""
        words = ["-c", f"FILE:{self.root / cache}", "-l", life]
        if isinstance(key, Path):
            self._run(self._kinit, *words, "-k", "-t", str(key), principal)
        else:
            self._run(self._kinit, *words, principal, text=f"{key}\n")

    def server_options(self, *hosts: str, uid: int | None = None) -> dict[str, Any]:
        """Add the service of an SMB server by all its names; return options for `Samba`.

        A client asks for a ticket by the name that it was given, be it an address. The user's
        principal is named as `Samba.user`.
        """
        services = [f"cifs/{host}" for host in hosts]
        for service in services:
            self.add(service)
        path = self.keytab(f"{hosts[0]}.keytab", *services, uid=uid)
        lines = [
            f"realm = {self.realm}",
            "kerberos method = dedicated keytab",
            f"dedicated keytab file = FILE:{path}",
        ]
        return {"global_lines": lines, "environment": self.environment(), "uid": uid}

    # -- within

    def _own_environment(self) -> dict[str, str]:
        config = {"KRB5_KDC_PROFILE": str(self.root / "kdc.conf")}
        return {**os.environ, **self.environment(), **config}

    def _run(self, program: str, *words: str, text: str = "") -> None:
        done = subprocess.run(
            [program, *words], env=self._own_environment(), input=text,
            capture_output=True, text=True, timeout=TOOL_S,
        )  # fmt: skip
        failed = done.returncode != 0 or "while" in done.stderr  # kadmin.local succeeds always
        assert not failed, f"{program} {words}: {done.stdout}{done.stderr}"

    def _listens(self) -> bool:
        assert self._process is not None
        rows = Path(f"/proc/{self._process.pid}/net/tcp").read_text().splitlines()
        return any(f":{self.port:04X} 00000000:0000 0A" in row for row in rows)
