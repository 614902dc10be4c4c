"""`mirrord doctor`: what it finds in order, what it advises, what it calls a problem."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirrord import doctor
from mirrord.doctor import Diagnosis, describe, diagnose
from mirrord.errors import MirrordError, RefusedError
from mirrord.service import checks
from mirrord.service.checks import Check
from tests.cli.running import run
from tests.daemon import Daemon
from tests.helpers import eventually

SECRET = "Tr0ub4dor&3"
MOUNTS = "22 1 254:0 / / rw - ext4 /dev/vda1 rw\n"
SHARE = (
    "90 22 0:55 / /mnt/vms rw,relatime - cifs //vault.example.com/vms "
    "rw,vers=3.1.1,cache=strict,soft\n"
)
Look = Callable[..., Diagnosis]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """Return a way to run all checks on a made-up host, with a real configuration file."""

    def diagnose_host(
        text: str = "", mounts: str = MOUNTS, environ: dict[str, str] | None = None
    ) -> Diagnosis:
        config, mountinfo = tmp_path / "mirrord.toml", tmp_path / "mountinfo"
        config.write_text(text)
        mountinfo.write_text(mounts)
        socket = tmp_path / "none.sock"
        return diagnose(config, socket, mountinfo=mountinfo, environ=environ or {})

    return diagnose_host


@pytest.fixture
def credential(tmp_path: Path) -> Path:
    """Make a credential file that is as it should be."""
    path = tmp_path / "vault"
    path.touch(0o600)
    path.write_text(f"username=backup\npassword={SECRET}\n")
    return path


def section(credential: object, values: str = "") -> str:
    """Return a configuration with one share."""
    return f'[smb."vault.example.com/vms"]\ncredential = "{credential}"\n{values}\n'


def the(found: Diagnosis, name: str) -> Check:
    """Return the one check of that name."""
    (check,) = [check for check in found.checks if check.name == name]
    return check


def problems(found: Diagnosis) -> list[str]:
    """Return the names of the checks that found one."""
    return [check.name for check in found.checks if check.level == "problem"]


def test_without_a_daemon_all_is_well(tmp_path: Path) -> None:
    config = tmp_path / "mirrord.toml"
    config.write_text(f'state_dir = "{tmp_path}/new/state"\nruntime_dir = "{tmp_path}"\n')
    code, out, error = run("doctor", "--config", config)
    where = checks.mount_of(tmp_path, doctor.read_mounts())
    assert where is not None
    assert code == (1 if where.kind in checks.VOLATILE else 0), out
    assert error == ""
    lines = out.splitlines()
    first = [one for one in lines if one and not one.startswith(" ")]
    assert all(re.match(r"(ok|advice|problem) +\S", one) for one in first), out
    (daemon,) = [one for one in lines if re.match(r"\w+ +daemon ", one)]
    assert daemon.startswith("advice ")
    assert f"{tmp_path}/control.sock — start one: " in daemon


def test_json_has_checks_and_mounts(tmp_path: Path) -> None:
    code, out, _ = run("doctor", "--json", "--config", tmp_path / "missing.toml")
    assert code == 1
    found = json.loads(out)
    assert set(found) == {"checks", "mounts"}
    for check in found["checks"]:
        assert set(check) == {"name", "level", "text", "advice"}
    checks = {check["name"]: check for check in found["checks"]}
    assert set(checks) >= {
        "python", "kernel", "io", "descriptors", "file size", "memlock", "fuse", "clock",
        "systemd", "config", "daemon", "state", "records",
    }  # fmt: skip
    assert checks["config"]["level"] == "problem"
    assert "missing.toml" in checks["config"]["text"]


def test_the_daemon_answers(daemon: Daemon, tmp_path: Path) -> None:
    disk = tmp_path / "vm.raw"
    disk.write_bytes(bytes(1 << 20))
    daemon.attach("vm", disk)
    config = tmp_path / "mirrord.toml"
    config.write_text(f'state_dir = "{daemon.state}"\nruntime_dir = "{daemon.runtime}"\n')
    before = sorted(daemon.root.rglob("*"))
    done = daemon.run("doctor", tmp_path / "gone", config, "--config", config)
    assert f"the daemon at {daemon.socket} serves 1 disk\n" in done.stdout
    assert re.search(r"^ok +records +disks: 1; moves: 0 that haven't ended, 0 ", done.stdout, re.M)
    assert re.search(r"^\w+ +storage +/\S+: \w+, ", done.stdout, re.M), "where its disk lies"
    assert f"{tmp_path}/gone isn't there — mount it, or make it\n" in done.stdout
    assert done.returncode == 1, "for a place that isn't there"
    assert sorted(daemon.root.rglob("*")) == before
    assert sorted(os.listdir(tmp_path)) == ["mirrord.toml", "vm.raw"], "nothing was changed"


def test_a_disk_that_is_in_trouble(daemon: Daemon, tmp_path: Path) -> None:
    daemon.expect_log("restarting disk process", "disk refused")
    for name in ("well", "lost"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
        daemon.attach(name, tmp_path / name)
    (tmp_path / "lost").unlink()
    daemon.kill_disk("lost")
    eventually(lambda: daemon.json("show", "lost")["state"] == "refused", what="it is refused")
    done = daemon.run("doctor", "--config", "/dev/null")
    told = [line for line in done.stdout.splitlines() if re.match(r"\w+ +disk ", line)]
    assert len(told) == 1, done.stdout
    assert re.match(r"problem +disk lost +refused: .*see 'mirrord show lost'", told[0])
    assert done.returncode == 1


def test_the_daemon_knows_its_directories_best(daemon: Daemon, tmp_path: Path) -> None:
    """They may have been named on its command line."""
    done = daemon.run("doctor", "--config", "/dev/null")
    assert re.search(rf"^\w+ +state +{daemon.state} is on ", done.stdout, re.M), done.stdout


def test_a_daemon_that_does_not_answer_us(monkeypatch: pytest.MonkeyPatch, look: Look) -> None:
    for error, level in (
        (RefusedError("forbidden", "no"), "advice"),
        (MirrordError("x"), "problem"),
    ):

        def fail(_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(doctor.Client, "disks", fail)
        assert the(look(), "daemon").level == level


def test_a_wrong_configuration_is_a_problem(look: Look) -> None:
    found = look("max_move = 3\n")
    assert problems(found) == ["config"]
    assert "line 1: unknown key max_move" in the(found, "config").text
    assert problems(look('socket_group = "no such group"\n')) == ["config"]


def test_what_a_grant_opens_is_looked_at(look: Look, tmp_path: Path) -> None:
    root = tmp_path / "vms"
    root.mkdir()
    grant = f'[[grant]]\nuser = "root"\nverbs = ["*"]\nroots = ["{root}", "smb://vault/vms"]\n'
    found = look(f'{grant}[smb."vault/vms"]\ncredential = "/nowhere"\n')
    told = " ".join(check.text for check in found.checks)
    assert str(root) in told
    assert str(root) not in " ".join(check.text for check in look("").checks)


@pytest.mark.parametrize(
    ("kind", "level"),
    [("ext4", "ok"), ("xfs", "ok"), ("tmpfs", "problem"), ("nfs4", "advice"),
     ("fuse.sshfs", "advice"), ("overlay", "advice")],
)  # fmt: skip
def test_where_the_state_lies(look: Look, kind: str, level: str) -> None:
    mounts = f"{MOUNTS}23 22 0:9 / /nowhere/state rw - {kind} x rw\n"
    found = the(look('state_dir = "/nowhere/state/new"\n', mounts), "state")
    assert (found.level, bool(found.advice)) == (level, level != "ok")
    assert the(look(mounts=""), "state").level == "advice"


def test_a_share_in_order(look: Look, credential: Path) -> None:
    found = look(section(credential), MOUNTS + SHARE)
    assert problems(found) == []
    assert the(found, "credential vault.example.com/vms").level == "ok"
    assert "for user backup" in the(found, "credential vault.example.com/vms").text
    assert the(found, "share vault.example.com/vms").level == "ok"
    assert "smbprotocol 1" in the(found, "smbprotocol").text
    assert re.search(r"OpenSSL \d.*AES-GCM, .*/s", the(found, "cryptography").text)
    (mount,) = found.mounts
    assert (mount.better, mount.location) == ("smb", "smb://vault.example.com/vms/")
    told = describe(found)
    assert SECRET not in told
    assert "\nadvice   mount /mnt/vms of //vault.example.com/vms — use smb://vault" in told
    assert "\n         · soft: " in told
    wrapped = describe(found, 80)
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in wrapped.splitlines())
    assert "".join(wrapped.split()) == "".join(told.split())


def test_a_credential_that_is_unsafe(look: Look, credential: Path) -> None:
    credential.chmod(0o644)
    found = look(section(credential), MOUNTS + SHARE)
    assert problems(found) == ["credential vault.example.com/vms"]
    assert f"chmod 600 {credential}" in the(found, "credential vault.example.com/vms").text
    assert found.mounts[0].better == "mount", "mirrord can't reach it"


def test_a_credential_of_the_service(
    look: Look, credential: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "UNIT_CREDENTIALS", str(tmp_path / "none"))
    found = look(section("vault"))
    assert the(found, "credential vault.example.com/vms").level == "advice"
    assert "LoadCredential=vault:" in the(found, "credential vault.example.com/vms").advice
    environ = {"CREDENTIALS_DIRECTORY": str(credential.parent)}
    assert (
        the(look(section("vault"), environ=environ), "credential vault.example.com/vms").level
        == "ok"
    )
    assert problems(look(section("other"), environ=environ))
    monkeypatch.setattr(checks, "UNIT_CREDENTIALS", str(credential.parent))
    assert the(look(section("vault")), "credential vault.example.com/vms").level == "ok"


def test_a_credential_without_a_user(look: Look, credential: Path) -> None:
    credential.write_text(SECRET)
    found = the(look(section(credential)), "credential vault.example.com/vms")
    assert found.level == "advice"
    assert "smb://USER@vault.example.com/" in found.advice


def test_weak_settings_are_told(look: Look, credential: Path) -> None:
    values = 'encryption = "allow-plaintext"\nmin_dialect = "2.1"'
    found = the(look(section(credential, values)), "share vault.example.com/vms")
    assert (found.level, found.text) == ("advice", "plaintext allowed, dialect 2.1 allowed")


def missing(*names: str) -> Callable[[str], Any]:
    """Return an import by which these modules can't be found."""
    real = checks._import

    def load(name: str) -> Any:
        if name.startswith(names):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name)

    return load


def test_missing_libraries(look: Look, credential: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_import", missing("cryptography", "smbprotocol", "gssapi", "krb5"))
    assert problems(look()) == []
    assert problems(look(section(credential))) == ["smbprotocol", "cryptography"]
    found = look(section("kerberos"))
    assert problems(found) == ["smbprotocol", "cryptography", "gssapi", "krb5"]
    assert "smbprotocol[kerberos]" in the(found, "gssapi").advice
    assert "the default principal" in the(found, "credential vault.example.com/vms").text


class Cipher:
    """An AES-GCM that is none."""

    def __init__(self, key: bytes) -> None:
        pass

    def encrypt(self, *_: object) -> bytes:
        """Answer wrong."""
        return b"wrong"


def test_an_aes_gcm_that_is_wrong_or_slow(
    look: Look, credential: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cryptography.hazmat.primitives.ciphers.aead.AESGCM", Cipher)
        assert problems(look(section(credential))) == ["cryptography"]
    monkeypatch.setattr(checks, "_measure", lambda cipher: 1e6)
    assert the(look(section(credential)), "cryptography").level == "advice"


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    config = tmp_path / "mirrord.toml"
    config.touch()
    script = f"""
import sys
import mirrord.cli
heavy = {{"smbprotocol", "cryptography", "spnego", "aiohttp", "mirrord.doctor", "rich", "lxml",
    "libvirt"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
sys.argv = ["mirrord", "doctor", "--config", {str(config)!r}]
mirrord.cli.main()
assert (heavy & set(sys.modules)) == {{"mirrord.doctor"}}, heavy & set(sys.modules)
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_changed(look: Look, tmp_path: Path) -> None:
    look(f'state_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n')
    assert sorted(os.listdir(tmp_path)) == ["mirrord.toml", "mountinfo"]


def test_a_place_with_a_line_end_is_no_place() -> None:
    code, out, error = run("doctor", "/tmp/a\nok  all is well")
    assert (code, out) == (2, "")
    assert error.count("\n") == 1


def test_no_name_breaks_a_line() -> None:
    check = Check("leftovers", "advice", "/a/\x1b[2J\nok", "rm it")
    assert describe(Diagnosis([check], [])).endswith("/a/\\x1b[2J\\nok — rm it")


def test_a_place_on_a_share_is_looked_at_by_another_command() -> None:
    code, out, error = run("doctor", "smb://vault/vms/")
    assert (code, out) == (2, "")
    assert "'mirrord credential test smb://vault/vms/' looks at it" in error
