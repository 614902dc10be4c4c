"""Bad input about shares: one line that names it and what to do, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.test_refusals import refuse
from tests.daemon import Daemon
from tests.samba import Samba, reserve_port
from tests.shares import keep_password, section
from tests.storage.places import mounted
from tests.tcp_proxy import Proxy

MIB = 1 << 20


@dataclass
class Site:
    """A daemon with a disk `vm` of 4 MiB, and servers of several kinds."""

    daemon: Daemon
    samba: Samba
    weak: Samba
    closed_port: int

    def names(self) -> list[str]:
        """Return every file and folder on the shares."""
        folders = [*self.samba.shares.values(), *self.weak.shares.values()]
        return sorted(str(path) for folder in folders for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Start all of it once: every test leaves it as it was."""
    with contextlib.ExitStack() as ends:
        yield from _site(ends)


def _site(ends: contextlib.ExitStack) -> Iterator[Site]:
    samba = Samba()
    ends.callback(samba.close)
    for name in ("locked", "read-only", "forbidden", "elsewhere"):
        samba.shares[name] = samba.root / name
        samba.shares[name].mkdir()
    samba.reconfigure(share_lines={
        "read-only": ["read only = yes"],
        "forbidden": ["valid users = nobody"],
    })  # fmt: skip
    samba.start()
    weak = Samba(encrypt="off", max_protocol="SMB2_10", min_protocol="SMB2_10")
    ends.callback(weak.close)
    weak.start()
    (held,) = reserve_port(["127.0.0.1"])
    ends.callback(held.close)
    closed = int(held.getsockname()[1])
    wrong = samba.root / "wrong"
    wrong.write_text("not the password")
    wrong.chmod(0o600)
    open_to_all = samba.root / "open-to-all"
    open_to_all.write_text("secret-of-all")
    open_to_all.chmod(0o644)
    config = "".join(
        [
            *(section(samba, name) for name in ("disks", "read-only", "forbidden", "missing")),
            section(samba, "locked", credential=str(wrong)),
            section(samba, "elsewhere", credential=str(open_to_all)),
            section(weak),
            section(samba, port=closed),
            f'[smb."no-such-host.invalid"]\ncredential = "{samba.root}/secret"\n',
        ]
    )
    daemon = Daemon(config)
    ends.callback(daemon.close)
    daemon.expect_log("disk refused", " refused disk=", "unreachable disk=")
    (daemon.root / "disks").mkdir()
    (daemon.root / "disks" / "vm.raw").write_bytes(b"v" * 4 * MIB)
    daemon.start()
    daemon.attach("vm", daemon.root / "disks" / "vm.raw")
    yield Site(daemon, samba, weak, closed)
    assert not daemon.unannounced()


Where = Callable[[Site], str]

CASES: dict[str, tuple[str, Where, str]] = {
    "unknown server": (
        "unreachable", lambda s: "smb://no-such-host.invalid/disks/x.raw", "no-such-host.invalid"),
    "closed port": (
        "unreachable", lambda s: s.samba.url("x.raw", port=s.closed_port), "can't be reached"),
    "share missing": ("share-missing", lambda s: s.samba.url("x.raw", "missing"), "no share"),
    "share denied": ("share-denied", lambda s: s.samba.url("x.raw", "forbidden"), "grant"),
    "share not configured": (
        "share-not-configured", lambda s: s.samba.url("x.raw", "unknown"), "add a section"),
    "folder missing": (
        "directory-missing", lambda s: s.samba.url("no/such/x.raw"), "create it first"),
    "folder missing with a slash": (
        "directory-missing", lambda s: s.samba.url("nothing/"), "create it first"),
    "read-only share": (
        "directory-not-writable", lambda s: s.samba.url("x.raw", "read-only"), "can't write"),
    "password wrong": (
        "credential-refused", lambda s: s.samba.url("x.raw", "locked"), "wrong user or password"),
    "credential for all": (
        "credential-unsafe", lambda s: s.samba.url("x.raw", "elsewhere"), "chmod 600"),
    "server too weak": ("server-too-weak", lambda s: s.weak.url("x.raw"), "min_dialect"),
    "stream": ("bad-name", lambda s: s.samba.url("x.raw:stream"), "stream"),
    "backslash": ("bad-name", lambda s: s.samba.url("a\\b.raw"), "not allowed"),
    "trailing dot": ("bad-name", lambda s: s.samba.url("x.raw."), "at its end"),
    "reserved name": ("bad-name", lambda s: s.samba.url("aux.raw"), "device"),
    "dots": ("bad-name", lambda s: s.samba.url("a/../x.raw"), "without it"),
    "too long a name": ("bad-name", lambda s: s.samba.url("x" * 256), "longer"),
    "ours": ("bad-name", lambda s: s.samba.url(".mirrord-x/y.raw"), "mirrord's own"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["move", "attach"])
@pytest.mark.parametrize("case", CASES)
def test_a_share_that_can_not_be_used_is_refused(site: Site, case: str, verb: str) -> None:
    code, where, words = CASES[case]
    if verb == "attach" and code == "directory-missing":
        code, words = {
            "folder missing": ("location-missing", "check the path"),
            "folder missing with a slash": ("is-directory", "name a file"),
        }[case]
    if verb == "attach" and case == "read-only share":
        code, words = "location-missing", "check the path"
    before = site.names()
    name = "vm" if verb == "move" else "other"
    message = refuse(site.daemon, code, verb, name, where(site))
    assert words in message
    assert site.names() == before
    for secret in (site.samba.password, "not the password", "secret-of-all"):
        assert secret not in message
        assert secret not in site.daemon.log()


@pytest.mark.parametrize("location", ["smb://", "smb://server", "smb:///x/y", "smb://h:x/s/d.raw"])
def test_a_malformed_location_is_wrong_usage(site: Site, location: str) -> None:
    refuse(site.daemon, "usage", "move", "vm", location, status=2)


def test_a_password_in_a_location_is_refused_and_not_repeated(site: Site) -> None:
    message = refuse(site.daemon, "usage", "attach", "x", "smb://me:hunter2@h/s/d.raw", status=2)
    assert "hunter2" not in message + site.daemon.log()
    assert "credential" in message


def test_a_target_that_exists_and_the_source_itself(site: Site) -> None:
    path = site.samba.put("taken.raw", b"t" * MIB)
    refuse(site.daemon, "target-exists", "move", "vm", site.samba.url("taken.raw"))
    assert path.read_bytes() == b"t" * MIB
    site.daemon.attach("share", site.samba.url("taken.raw"))
    refuse(site.daemon, "target-is-source", "move", "share", site.samba.url("taken.raw"))
    refuse(site.daemon, "target-is-source", "move", "share", site.samba.url("TAKEN.raw"))
    refuse(site.daemon, "already-served", "attach", "again", site.samba.url("taken.raw"))
    refuse(site.daemon, "already-served", "attach", "again", site.samba.url("Taken.RAW"))
    site.daemon.json("detach", "share")
    path.unlink()


def test_a_file_that_another_client_has_open(site: Site) -> None:
    site.samba.put("locked.raw", b"l" * MIB)
    site.daemon.attach("one", site.samba.url("locked.raw"))
    with_other_daemon = Daemon(section(site.samba))
    try:
        with_other_daemon.start()
        message = refuse(with_other_daemon, "in-use", "attach", "x", site.samba.url("locked.raw"))
        assert "another client" in message
    finally:
        with_other_daemon.close()
        site.daemon.json("detach", "one")


def test_a_disk_larger_than_the_servers_file_system_takes(site: Site, tmp_path: Path) -> None:
    """Samba takes files of up to 16 TiB; ext4 takes no larger ones, so the source is on tmpfs."""
    before = site.names()
    with mounted("tmpfs", tmp_path) as roomy:
        source = roomy / "huge.raw"
        with source.open("wb") as file:
            file.truncate(20 << 40)
        site.daemon.attach("huge", source)
        try:
            message = refuse(site.daemon, "too-large", "move", "huge", site.samba.url("huge.raw"))
            assert "no file of that size" in message
        finally:
            site.daemon.json("detach", "huge")
    assert site.names() == before


def test_a_credential_is_tested(site: Site) -> None:
    before = site.names()
    done = site.daemon.run("credential", "test", site.samba.url(""))
    assert done.returncode == 0, done.stderr
    for words in ("SMB 3.1.1", "AES-128-GCM", "durable handles", "strict sync"):
        assert words in done.stdout
    found = site.daemon.json("credential", "test", site.samba.url(""))
    assert found["writable"]
    assert found["durable_handle"]
    assert found["sparse"]
    assert found["server_side_copy"]
    assert found["folder_flush"]
    assert found["weaknesses"] == []
    found = site.daemon.json("credential", "test", site.samba.url("", "read-only"))
    assert not found["writable"]
    assert site.names() == before
    refuse(site.daemon, "credential-refused", "credential", "test", site.samba.url("", "locked"))
    refuse(site.daemon, "directory-missing", "credential", "test", site.samba.url("nowhere/"))
    refuse(site.daemon, "usage", "credential", "test", "/a/path", status=2)


def test_a_weak_server_is_used_where_that_is_allowed_and_shown(site: Site) -> None:
    site.weak.put("vm.raw", b"w" * MIB)
    allowed = section(
        site.weak, credential=str(site.samba.root / "secret"), min_dialect="2.1",
        encryption="allow-plaintext",
    )  # fmt: skip
    keep_password(site.weak)
    daemon = Daemon(allowed.replace(str(site.samba.root / "secret"), f"{site.weak.root}/secret"))
    try:
        daemon.start()
        daemon.attach("vm", site.weak.url("vm.raw"))
        share = daemon.json("show", "vm")["share"]
        assert (share["dialect"], share["encryption"]) == ("2.1", "none")
        assert share["signing"] == "HMAC-SHA256"
        assert share["weaknesses"] == ["plaintext allowed", "dialect 2.1 allowed"]
        assert "WEAK" in daemon.run("show", "vm").stdout
        assert json.loads(daemon.run("credential", "test", site.weak.url(""), "--json").stdout)[
            "weaknesses"
        ]
    finally:
        daemon.close()


@pytest.mark.parametrize("count", range(2400, 3800, 350))
def test_a_test_whose_connection_breaks_leaves_nothing(site: Site, count: int) -> None:
    before = site.names()
    with Proxy(site.samba.port) as proxy:
        daemon = Daemon(section(site.samba, port=proxy.port))
        try:
            daemon.start()
            proxy.cut_after(count, "to_client")
            done = daemon.run("credential", "test", site.samba.url("", port=proxy.port) + "/")
        finally:
            daemon.close()
    assert done.returncode in (0, 4), done.stderr
    assert (done.returncode == 0) == ("writable" in done.stdout)
    assert site.names() == before
