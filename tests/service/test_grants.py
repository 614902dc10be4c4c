"""Grants: what a section may say, whom it is for, and what it gives."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from mirrord.control.messages import (
    AttachRequest,
    CredentialTestRequest,
    Disk,
    Job,
    LimitRequest,
    MoveRequest,
    Uris,
)
from mirrord.control.operations import OPERATIONS
from mirrord.control.sockets import Peer
from mirrord.errors import MirrordError, RefusedError, UsageError
from mirrord.service import grants
from mirrord.service.config import Config, read_config
from mirrord.service.gate import Gate
from mirrord.service.grants import root_of

NEWS = pwd.getpwnam("news").pw_uid
GROUP = grp.getgrnam("games")
SHARE = '[smb."vault/vms"]\ncredential = "vault"\n'


def read(tmp_path: Path, text: str) -> Config:
    """Read a configuration that nobody else can write."""
    path = tmp_path / "mirrord.toml"
    path.write_text(text)
    path.chmod(0o640)
    return read_config(path)


def grant(**values: Any) -> str:
    """Return a section for the user news, with a root unless it says otherwise."""
    given = {"user": "news", "roots": ["/usr"], "verbs": ["*"]} | values
    lines = [f"{key} = {value!r}" for key, value in given.items() if value is not None]
    return "[[grant]]\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("section", "line", "problem"),
    [
        (grant(user="no-such"), 2, "there is no user no-such on this system"),
        (grant(user=None, group="no-such"), 4, "there is no group no-such on this system"),
        (grant(user="nobody"), 2, "user 65534 stands for every unknown user: name another"),
        (grant(user=None, group="nogroup"), 4, "group 65534 stands for every unknown group"),
        (grant(user=None), 1, "name a user or a group"),
        (grant(group="games"), 1, "name a user or a group"),
        (grant(verbs=[]), 4, "verbs is empty"),
        (grant(verbs=["read", "fly"]), 4, "there is no verb 'fly'; known are: *, read, attach, "),
        (grant(verbs=None), 1, "it has no verbs, which it needs"),
        (grant(verbs="read"), 4, "verbs: Expected `array`, got `str`"),
        (grant(verbs=[1]), 4, "verbs: Expected `str`, got `int`"),
        (grant(disks=[]), 5, "disks is empty"),
        (grant(disks=["web-[12"]), 5, "'web-[12' can't be a disk's name"),
        (grant(disks=["../x"]), 5, "'../x' can't be a disk's name"),
        (grant(disks=[""]), 5, "'' can't be a disk's name"),
        (grant(colour="red"), 5, "unknown key colour; known are: verbs, user, group, disks, roots"),
        (grant(roots=[]), 4, "attach, move, test_credential without roots: name the directories"),
        (grant(roots=None, verbs=["move"]), 3, "move without roots: name the directories"),
        (grant(roots=["vms"]), 3, "root 'vms': 'vms' is not an absolute path"),
        (grant(roots=["/no/such"]), 3, "the root /no/such is no directory (No such file"),
        (grant(roots=["/etc/passwd"]), 3, "the root /etc/passwd is no directory (Not a dir"),
        (grant(roots=["/proc/self"]), 3, "the root /proc/self leads through a symbolic link"),
        (grant(roots=["nbd://x/y"]), 3, "can't be used yet"),
        (grant(roots=["smb://vault/other"]), 3, "the share vault/other is not configured"),
        (grant(roots=["smb://vault"]), 3, "is not of the form smb://"),
        ("grant = [5]\n", 1, "Expected `object`, got `int`"),
        ("[grant]\nuser = 'news'\n", 1, "write [[grant]] with two brackets"),
    ],
)  # fmt: skip
def test_a_section_that_can_not_be_one(
    tmp_path: Path, section: str, line: int, problem: str
) -> None:
    """It is told in one line, with the line of the second section, as the first is right."""
    first = "" if section.startswith(("grant", "[grant")) else grant(verbs=["read"])
    with pytest.raises(UsageError) as caught:
        read(tmp_path, first + section + SHARE)
    told = str(caught.value)
    line += first.count("\n")
    assert told.startswith(f"{tmp_path / 'mirrord.toml'}, line {line}: "), told
    assert problem in told
    assert "\n" not in told


@pytest.mark.parametrize("mode", [0o660, 0o602])
def test_a_file_that_others_can_write(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "mirrord.toml"
    path.write_text(grant())
    path.chmod(mode)
    with pytest.raises(RefusedError, match="can be written by others"):
        read_config(path)
    path.write_text("max_moves = 3\n")
    assert read_config(path).max_moves == 3, "without grants that is the owner's affair"


def test_whom_a_grant_is_for(tmp_path: Path) -> None:
    text = grant(verbs=["read"]) + grant(user=None, group=GROUP.gr_name, verbs=["read"])
    gate = Gate(None, read(tmp_path, text).rights())  # type: ignore[arg-type]
    assert gate.admits(Peer(1, NEWS, frozenset()))
    assert gate.admits(Peer(1, 4711, frozenset({4711, GROUP.gr_gid})))
    assert gate.admits(Peer(1, 0, frozenset()))
    assert gate.admits(Peer(1, os.geteuid(), frozenset()))
    assert not gate.admits(Peer(1, 4711, frozenset({4711})))


@pytest.mark.parametrize(
    ("location", "root"),
    [
        ("/a", "/a"),
        ("/a/", "/a"),
        ("/a/x", "/a"),
        ("/a/b/x", "/a/b"),
        ("/ab", None),
        ("/", None),
        ("/b", None),
        ("smb://vault/vms/web/x.raw", "smb://vault/vms/web/"),
        ("smb://Vault/VMS/web/x.raw", "smb://vault/vms/web/"),
        ("smb://vault/vms/Web/x.raw", None),
        ("smb://vault/vms/web/", "smb://vault/vms/web/"),
        ("smb://vault/vms/web", None),
        ("smb://vault/vms/website/x.raw", None),
        ("smb://vault/vms/x.raw", None),
        ("smb://bob@vault/vms/web/x.raw", None),
        ("smb://vault:4450/vms/web/x.raw", None),
        ("smb://vault2/vms/web/x.raw", None),
    ],
)
def test_the_root_of_a_location(location: str, root: str | None) -> None:
    assert root_of(location, ["/a", "/a/b", "smb://vault/vms/web/"]) == root
    assert root_of(location, ["/"]) == (None if location.startswith("smb") else "/")
    share = "smb://vault/vms/"
    assert root_of(location, [share]) == (share if location.lower().startswith(share) else None)


def disk(name: str) -> Disk:
    """Return a disk as the registry would show it."""
    return Disk(
        name=name, state="serving", reason=None, location="/x", size=1, read_only=False,
        cache="writeback", uris=Uris(), clients=0, job=None,
    )  # fmt: skip


def job(name: str) -> Job:
    """Return a job of that disk, whose id is the disk's name."""
    return Job(id=name, disk=name, phase="done", source="", target="")


class FakeRegistry:
    """Has the disks web-1 and db, each with a job of its name; remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        async def method(*words: Any, **named: Any) -> Any:
            self.asked.append((name, *words, *named.values()))
            if name in ("jobs", "jobs_changed"):
                found = [job(n) for n in ("web-1", "db")]
                return [each for each in found if words[0] in (None, each.disk)]
            if name in ("job", "steer", "limit", "move"):
                return job(words[0])
            if name == "metrics":
                return [n for n in ("web-1", "db") if words[0](n)]
            return [disk("web-1"), disk("db")] if name == "disks" else disk(str(words[0]))

        return method


class Asking:
    """A peer and the gate with its grants; runs one operation at a time."""

    def __init__(self, tmp_path: Path, text: str) -> None:
        self.registry = FakeRegistry()
        rights = read(tmp_path, text + SHARE).rights()
        self._gate = Gate(self.registry, rights)  # type: ignore[arg-type]

    def __call__(self, operation: str, *words: Any, uid: int = NEWS, **named: Any) -> Any:
        view = self._gate.view(Peer(1, uid, frozenset()), operation)
        method = "jobs" if operation == "events" else operation
        return asyncio.run(getattr(view, method)(*words, **named))

    def refused(self, operation: str, *words: Any, **named: Any) -> str:
        """Return the refusal; then the registry was not asked to do anything."""
        before = len(self.registry.asked)
        with pytest.raises(MirrordError) as caught:
            self(operation, *words, **named)
        assert caught.value.code == "forbidden"
        assert "\n" not in str(caught.value)
        assert {name for name, *_ in self.registry.asked[before:]} <= {"job"}
        return str(caught.value)


@pytest.fixture
def asking(tmp_path: Path) -> Asking:
    """News may look at all web-* and move them to below /usr, and attach below /var."""
    return Asking(
        tmp_path,
        grant(verbs=["read", "move", "steer", "limit"], disks=["web-*"])
        + grant(verbs=["attach"], disks=["web-*", "new"], roots=["/var", "smb://vault/vms/web"]),
    )


def test_lists_show_what_is_granted(asking: Asking) -> None:
    assert [each.name for each in asking("disks")] == ["web-1"]
    assert [each.disk for each in asking("jobs", None)] == ["web-1"]
    assert [each.disk for each in asking("jobs", "web-1")] == ["web-1"]
    assert [each.disk for each in asking("events", None)] == ["web-1"]
    assert asking("metrics") == ["web-1"]
    assert asking("disk", "web-1").name == "web-1"
    assert asking("job", "web-1").disk == "web-1"


@pytest.mark.parametrize(
    ("operation", "words", "what"),
    [
        ("disk", ["db"], "read of disk db"),
        ("disk", ["no-such"], "read of disk no-such"),
        ("jobs", ["db"], "read of disk db"),
        ("job", ["db"], "read of job db"),
        ("move", ["db", MoveRequest("/usr/x")], "move of disk db"),
        ("move", ["web-1", MoveRequest("/var/x")], "location /var/x: it has to lie below /usr"),
        ("move", ["web-1", MoveRequest("/usr/../var/x")], "move of location /var/x"),
        ("move", ["web-1", MoveRequest("smb://vault/vms/web/x")], "location smb://vault"),
        ("attach", [AttachRequest("db", "/var/x")], "attach of disk db"),
        ("attach", [AttachRequest("new", "/usr/x")], "attach of location /usr/x"),
        ("steer", ["db", "cancel"], "steer of job db"),
        ("limit", ["db", LimitRequest(5)], "limit of job db"),
        ("detach", ["web-1"], "no grant for detach: root can give one"),
        ("upgrade", ["web-1"], "no grant for upgrade"),
        ("test_credential", [CredentialTestRequest("smb://vault/vms/web/")], "test_credential"),
    ],
)  # fmt: skip
def test_what_no_grant_gives(asking: Asking, operation: str, words: list[Any], what: str) -> None:
    named = {"force": True} if operation in ("detach", "upgrade") else {}
    told = asking.refused(operation, *words, **named)
    assert told.startswith(f"user {NEWS} has no grant for ")
    assert what in told


def test_what_a_grant_gives(asking: Asking) -> None:
    moving, there = MoveRequest("/usr/x"), AttachRequest("new", "smb://vault/vms/web/x.raw")
    asking("move", "web-1", moving)
    asking("attach", AttachRequest("web-2", "/var/x"))
    asking("attach", there)
    asking("steer", "web-1", "cancel")
    asking("limit", "web-1", LimitRequest(5))
    assert [each for each in asking.registry.asked if each[0] != "job"] == [
        ("move", "web-1", moving, "/usr"),
        ("attach", AttachRequest("web-2", "/var/x"), "/var"),
        ("attach", there, "smb://vault/vms/web"),
        ("steer", "web-1", "cancel"),
        ("limit", "web-1", LimitRequest(5)),
    ]


def test_a_malformed_location_is_told_as_such(asking: Asking) -> None:
    with pytest.raises(UsageError, match="control characters"):
        asking("move", "web-1", MoveRequest("/usr/\0"))


def test_everything_but_a_root(tmp_path: Path) -> None:
    """With "*" for verbs and disks, locations still have to lie below the root."""
    asking = Asking(tmp_path, grant())
    asking("detach", "db", force=True)
    asking("move", "db", MoveRequest("/usr/x"))
    assert "below /usr" in asking.refused("move", "db", MoveRequest("/etc/x"))
    assert "below /usr" in asking.refused(
        "test_credential", CredentialTestRequest("smb://vault/vms/x")
    )


@pytest.mark.parametrize("own", [0, 4711])
@pytest.mark.parametrize("uid", [0, 4711])
def test_root_and_the_daemons_user_need_no_grant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int, uid: int
) -> None:
    asking = Asking(tmp_path, "")
    monkeypatch.setattr(os, "geteuid", lambda: own)
    if uid not in (0, own):
        assert "no grant" in asking.refused("disks", uid=uid)
        return
    assert [each.name for each in asking("disks", uid=uid)] == ["web-1", "db"]
    asking("attach", AttachRequest("x", "/anywhere"), uid=uid)
    asking("move", "db", MoveRequest("/anywhere"), uid=uid)
    assert asking.registry.asked[1:] == [
        ("attach", AttachRequest("x", "/anywhere"), None),
        ("move", "db", MoveRequest("/anywhere"), None),
    ]


@pytest.mark.parametrize("each", OPERATIONS, ids=lambda each: each.name)
def test_read_is_what_only_looks(each: Any) -> None:
    assert (each.name in grants.READ) is (each.method == "GET")
    assert each.name in grants.ALL


def test_changes_are_logged_with_the_user(asking: Asking, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    asking("move", "web-1", MoveRequest("/usr/x"))
    asking("steer", "web-1", "cancel")
    asking("disks")
    with pytest.raises(RefusedError):
        asking("job", "db")
    assert [record.getMessage() for record in caplog.records] == [
        f"asked uid={NEWS} verb=move disk=web-1 target=/usr/x",
        f"asked uid={NEWS} verb=steer to=cancel disk=web-1 job=web-1",
        f"forbidden uid={NEWS} verb=read job=db",
    ]
