"""Credentials: where they are read, which files are refused, and that no secret ever shows."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mirrord.errors import RefusedError
from mirrord.service import credentials
from mirrord.service.credentials import Credential, Secret, fingerprint, load, load_async
from mirrord.service.shares import ShareConfig

SECRET = "Tr0ub4dor&3"
Load = Callable[..., Credential]


def load_by_loop(*arguments: object, **named: object) -> Credential:
    """Load as the event loop does."""
    return asyncio.run(load_async(*arguments, **named))  # type: ignore[arg-type]


@pytest.fixture(params=[load, load_by_loop], ids=["load", "load_async"])
def loader(request: pytest.FixtureRequest) -> Load:
    """Return each way to load."""
    found: Load = request.param
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Make a credential file that is as it should be."""
    path = tmp_path / "vault"
    path.touch(0o600)
    path.write_text(f"username=backup\npassword={SECRET}\ndomain=EXAMPLE\n")
    return path


def refuse(loader: Load, code: str, config: ShareConfig, **named: object) -> str:
    """Load what has to be refused; return the message. Nothing of it may have the secret."""
    with pytest.raises(RefusedError) as caught:
        loader(config, **named)
    assert caught.value.code == code, caught.value
    check_hidden(caught.value)
    return str(caught.value)


def check_hidden(error: BaseException) -> None:
    """Look for the secret in all that a report of the error could show, variables included."""
    seen: BaseException | None = error
    while seen is not None:
        frames = seen.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next  # the test's own variables do have it
        report = traceback.TracebackException(type(seen), seen, frames, capture_locals=True)
        shown = "".join(report.format()) + repr(seen) + repr(seen.args) + repr(vars(seen))
        assert SECRET not in shown
        seen = seen.__cause__ or seen.__context__


def at(path: Path, **settings: str) -> ShareConfig:
    """Return a section with that credential file."""
    return ShareConfig(credential=str(path), **settings)


def test_a_secret_does_not_show_itself() -> None:
    secret = Secret(SECRET)
    assert secret.reveal() == SECRET
    kept = Credential(user="u", password=secret)
    for shown in (
        repr(secret), str(secret), f"{secret}", f"{secret!r:>20}", f"{secret:>9}",
        repr(kept), str([secret]), str({"a": secret}),
    ):  # fmt: skip
        assert SECRET not in shown
        assert "***" in shown
    assert not hasattr(secret, "__dict__")
    for encode in (pickle.dumps, copy.copy, copy.deepcopy, json.dumps, msgspec.json.encode):
        for value in (secret, kept) if encode is not copy.copy else (secret,):
            with pytest.raises(TypeError) as caught:
                encode(value)  # type: ignore[operator]
            assert SECRET not in str(caught.value)


def test_a_file_as_that_of_mount_cifs(loader: Load, file: Path) -> None:
    found = loader(at(file))
    assert (found.user, found.domain, found.account) == ("backup", "EXAMPLE", "EXAMPLE\\backup")
    assert found.password is not None
    assert found.password.reveal() == SECRET
    assert not found.kerberos


@pytest.mark.parametrize(
    ("text", "user", "domain", "password"),
    [
        ("user=a\npass= b =c, \n", "a", None, " b =c, "),
        ("# of the vault\n\n  username = a\r\n\tpassword=b\r\ndom= D \r\n", "a", "D", "b"),
        ("password=b\nusername=E\\a\ndomain=D", "a", "E", "b"),
        ("password=b\nusername=a@EXAMPLE.COM", "a@EXAMPLE.COM", None, "b"),
    ],
)
def test_lines(file: Path, text: str, user: str, domain: str | None, password: str) -> None:
    file.write_bytes(text.encode())
    found = load(at(file))
    assert found.password is not None
    assert (found.user, found.domain, found.password.reveal()) == (user, domain, password)


@pytest.mark.parametrize(
    ("text", "password"),
    [("a b\n", "a b"), ("a\n\n", "a\n"), ("a\r\n", "a"), ("a", "a"), (" p=q ", " p=q "),
     ("#a", "#a"), ("ünï", "ünï"), ("\n\n", "\n"), ("passwords=1", "passwords=1")],
)  # fmt: skip
def test_a_file_that_is_the_password(file: Path, text: str, password: str) -> None:
    file.write_bytes(text.encode())
    found = load(at(file, user="D\\u"))
    assert found.password is not None
    assert found.password.reveal() == password
    assert (found.user, found.domain) == ("u", "D")


def test_whose_user_counts(loader: Load, file: Path) -> None:
    assert loader(at(file), location_user="guest").user == "guest"
    assert loader(at(file, user="backup2"), location_user="guest").user == "backup2"
    assert loader(at(file), location_user="D2;guest").account == "D2\\guest"
    file.write_text(SECRET)
    assert loader(at(file), location_user="guest").user == "guest"
    told = refuse(loader, "credential-no-user", at(file))
    assert str(file) in told
    file.write_text(f"password={SECRET}\n")
    refuse(loader, "credential-no-user", at(file))


def test_a_name_is_systemds(loader: Load, file: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(file.parent)}
    file.chmod(0o440)  # as an ACL looks
    assert loader(ShareConfig(credential="vault"), environ).user == "backup"
    told = refuse(loader, "credential-missing", ShareConfig(credential="other"), environ=environ)
    assert told == "there is no credential other"
    for none in ({}, {"CREDENTIALS_DIRECTORY": ""}):
        told = refuse(loader, "credential-missing", ShareConfig(credential="vault"), environ=none)
        assert "LoadCredential=vault:" in told
    os.mkfifo(file.parent / "fifo")
    refuse(loader, "credential-unsafe", ShareConfig(credential="fifo"), environ=environ)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o660, 0o666])
def test_a_file_that_others_can_get_at(loader: Load, file: Path, mode: int) -> None:
    file.chmod(mode)
    told = refuse(loader, "credential-unsafe", at(file))
    assert f"chmod 600 {file}" in told
    assert f"{mode:04o}" in told


def test_a_file_that_is_none(loader: Load, file: Path, tmp_path: Path) -> None:
    link, fifo = tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(file)
    os.mkfifo(fifo, 0o600)
    for path in (link, fifo, tmp_path, Path("/dev/zero")):
        assert "chmod 600" in refuse(loader, "credential-unsafe", at(path))
    refuse(loader, "credential-missing", at(tmp_path / "missing"))
    refuse(loader, "credential-unreadable", at(file / "below"))


def test_a_file_of_another_user(loader: Load, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    if own == 0:
        assert loader(at(file)).user == "backup", "root's may be used by everybody"
        os.chown(file, 65534, -1)
    assert "chown" in refuse(loader, "credential-unsafe", at(file))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "credential-empty"),
        (b"\n", "credential-empty"),
        (b"username=a\n", "credential-empty"),
        (b"username=a\npassword=\n", "credential-empty"),
        (SECRET.encode() + b"\xff", "credential-malformed"),
        (f"username=a\npassword={SECRET}\n{SECRET}\n".encode(), "credential-malformed"),
        (SECRET.encode() * 6000, "credential-malformed"),
    ],
    ids=range(7),  # not the content: pytest has the test's name in the environment
)
def test_content_that_is_none(loader: Load, file: Path, content: bytes, code: str) -> None:
    file.write_bytes(content)
    told = refuse(loader, code, at(file, user="u"))
    assert str(file) in told


def test_an_error_once_the_secret_is_known_shows_nothing(
    loader: Load, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(user: str) -> object:
        raise OSError(5, user)

    monkeypatch.setattr(credentials, "_split", fail)
    with pytest.raises(OSError, match="backup") as caught:
        loader(at(file))
    check_hidden(caught.value)


def test_the_check_for_secrets_finds_one(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(credentials, "Secret", str)
    monkeypatch.setattr(credentials, "_split", lambda user: 1 // 0)
    with pytest.raises(ZeroDivisionError) as caught:
        load(at(file))
    with pytest.raises(AssertionError):
        check_hidden(caught.value)


def test_kerberos(loader: Load, file: Path) -> None:
    found = loader(ShareConfig(credential="kerberos", ccache="FILE:/x"), location_user="u@REALM")
    assert found == Credential(user="u@REALM", kerberos=True, ccache="FILE:/x")
    assert loader(ShareConfig(credential="kerberos")).account is None
    with_keytab = ShareConfig(credential="kerberos", keytab=str(file), user="D\\svc")
    assert loader(with_keytab).keytab == str(file)
    file.chmod(0o644)
    assert "keytab" in refuse(loader, "credential-unsafe", with_keytab)
    file.unlink()
    refuse(loader, "credential-missing", with_keytab)


def test_a_fingerprint_tells_of_a_change(file: Path) -> None:
    config, environ = ShareConfig(credential="vault"), {"CREDENTIALS_DIRECTORY": str(file.parent)}
    kerberos = ShareConfig(credential="kerberos", keytab=str(file), ccache=f"FILE:{file}")
    ways = [(at(file), {}), (config, environ), (kerberos, {})]
    seen = [{fingerprint(*way)} for way in ways]
    assert [fingerprint(*way) for way in ways] == [one for each in seen for one in each]
    for change in (
        lambda: file.write_text("longer than it was, by far"),
        lambda: os.utime(file, ns=(1, 1)),
        lambda: (file.with_name("new").write_bytes(b"x"), file.with_name("new").replace(file)),
        file.unlink,
    ):
        change()
        for values, way in zip(seen, ways, strict=True):
            values.add(fingerprint(*way))
    assert [len(values) for values in seen] == [5, 5, 5]
    assert fingerprint(config, {}) == ()
    assert SECRET not in repr(seen)


def test_a_hardened_process_shows_no_memory() -> None:
    script = """
import ctypes, resource
from mirrord.service.credentials import harden_process
dumpable = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
assert dumpable() == 1
harden_process()
assert dumpable() == 0
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
open("/proc/self/fd/1", "a").close()  # what the process itself needs stays
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
