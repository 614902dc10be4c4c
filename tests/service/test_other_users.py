"""Other users at a real daemon: what a [[grant]] gives them, what not, and no way around it."""

from __future__ import annotations

import grp
import json
import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mirrord.core.geometry import MIB
from tests.cli.running import run
from tests.cli.test_refusals import everything
from tests.daemon import Daemon
from tests.helpers import eventually, require_root
from tests.service.other_user import acting_as, ask, connect_as
from tests.storage.test_roots import Tree

NEWS = pwd.getpwnam("news")
STRANGER = 4711
GAMES = grp.getgrnam("games").gr_gid
MANY_GROUPS = [10000 + number for number in range(1000)]

CONFIG = """
socket_mode = "0666"

[[grant]]
user = "news"
verbs = ["read", "attach", "move", "steer", "detach"]
disks = ["web*"]
roots = ["{root}"]

[[grant]]
group = "games"
verbs = ["read"]
"""


class Served:
    """A daemon with the disks `db`, which is root's, and `web`, which news may move."""

    def __init__(self, daemon: Daemon, tree: Tree) -> None:
        self.daemon = daemon
        self.tree = tree

    def ask(self, method: str, target: str, body: Any = None, **who: Any) -> tuple[int, Any]:
        """Make a request as news, or as `uid` in `groups`."""
        uid, groups = who.get("uid", NEWS.pw_uid), who.get("groups", [NEWS.pw_gid])
        connection = connect_as(self.daemon.socket, uid, groups)
        try:
            return ask(connection, method, target, body)
        finally:
            connection.close()

    def refused(self, code: str, method: str, target: str, body: Any = None, **who: Any) -> str:
        """Make a request that is refused with `code` and changes nothing."""
        before = everything(self.daemon), sorted(self.tree.root.parent.rglob("*"))
        status, problem = self.ask(method, target, body, **who)
        assert problem["code"] == code, (status, problem)
        assert (status == 403) is (code == "forbidden")
        assert 400 <= status < 500
        assert (everything(self.daemon), sorted(self.tree.root.parent.rglob("*"))) == before
        return str(problem["message"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve both disks."""
    require_root()
    tree = Tree(tmp_path_factory.mktemp("served"))
    daemon = Daemon(CONFIG.format(root=tree.root))
    daemon.expect_log("refused")
    daemon.start()
    for name in ("db", "web"):
        path = daemon.root / f"{name}.raw"
        path.write_bytes(os.urandom(12 * MIB))  # more than a limited move copies at once
        daemon.attach(name, path)
    yield Served(daemon, tree)
    unannounced = daemon.unannounced()
    daemon.close()
    assert not unannounced


def test_a_stranger_can_only_be_told_so(served: Served) -> None:
    for target in ("/v1/disks", "/v1/openapi.json", "/metrics", "/"):
        told = served.refused("forbidden", "GET", target, uid=STRANGER, groups=[STRANGER])
        assert told.startswith(f"user {STRANGER} may do nothing here; ")
    assert f"turned away uid={STRANGER} code=forbidden" in served.daemon.log()


@pytest.mark.parametrize("others", [[], MANY_GROUPS], ids=["few", "many"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "supplementary"])
def test_a_group_of_a_peer(served: Served, own: bool, others: list[int]) -> None:
    groups = [GAMES, *others] if own else [STRANGER, *others, GAMES]
    status, disks = served.ask("GET", "/v1/disks", uid=STRANGER, groups=groups)
    assert status == 200
    assert {"db", "web"} <= {disk["name"] for disk in disks}
    who = {"uid": STRANGER, "groups": groups}
    assert "no grant for detach" in served.refused("forbidden", "DELETE", "/v1/disks/db", **who)


def test_what_news_sees(served: Served) -> None:
    assert {"web"} == {disk["name"] for disk in served.ask("GET", "/v1/disks")[1]}
    for name in ("db", "no-such"):
        assert f"read of disk {name}" in served.refused("forbidden", "GET", f"/v1/disks/{name}")
    served.refused("unknown-disk", "GET", "/v1/disks/web-no-such")
    assert "db" not in served.refused("unknown-disk", "GET", "/v1/jobs?disk=web-no-such")


def test_what_news_may_not_do(served: Served) -> None:
    target = {"target": f"{served.tree.root}/"}
    served.refused("forbidden", "POST", "/v1/disks/db/move", target)
    served.refused("forbidden", "DELETE", "/v1/disks/db?force=true")
    served.refused("forbidden", "POST", "/v1/disks/web/upgrade")
    elsewhere = {"name": "web2", "location": f"{served.daemon.root}/db.raw"}
    assert "has to lie below" in served.refused("forbidden", "POST", "/v1/disks", elsewhere)
    for target in ("/etc/", f"{served.tree.root}/../outside/", f"{served.tree.root}x/y"):
        served.refused("forbidden", "POST", "/v1/disks/web/move", {"target": target})


def test_a_link_out_of_the_root(served: Served) -> None:
    location = f"{served.tree.root}/link/vm.raw"
    served.refused("leaves-root", "POST", "/v1/disks", {"name": "web2", "location": location})
    for target in ("link/", "link", "link/new.raw"):
        wanted = {"target": f"{served.tree.root}/{target}"}
        served.refused("leaves-root", "POST", "/v1/disks/web/move", wanted)


def test_links_tell_nothing_of_other_disks(served: Served) -> None:
    other = served.daemon.root / "db.raw"
    link, hard = served.tree.root / "linked.raw", served.tree.root / "hard.raw"
    link.symlink_to(other)
    hard.hardlink_to(other)
    folder = served.tree.root / "folder"
    folder.symlink_to(other.parent)
    try:
        for location, code in (
            (link, "not-a-disk"),
            (folder / "db.raw", "leaves-root"),
            (hard, "already-served"),
        ):
            wanted = {"name": "web2", "location": str(location)}
            told = served.refused(code, "POST", "/v1/disks", wanted)
            assert "disk db" not in told
    finally:
        for each in (link, hard, folder):
            each.unlink()


def test_the_command_line_of_another_user(served: Served) -> None:
    socket = ("--socket", served.daemon.socket)
    with acting_as(NEWS.pw_uid, [NEWS.pw_gid]):
        status, out, error = run("ls", "--json", *socket)
        assert (status, error) == (0, "")
        assert [disk["name"] for disk in json.loads(out)] == ["web"]
        for words in (("show", "db"), ("detach", "db"), ("upgrade",), ("limit", "web", "1M")):
            status, out, error = run(*words, *socket)
            assert (status, out) == (4, "")
            assert error.startswith("mirrord: ")
            assert error.count("\n") == 1
    with acting_as(STRANGER, [STRANGER]):
        status, out, error = run("ls", "--json", *socket)
        assert (status, json.loads(error)["code"]) == (4, "forbidden")


def test_a_granted_move_and_its_log(served: Served) -> None:
    there = {"name": "web-2", "location": f"{served.tree.root}/d/vm.raw"}
    assert served.ask("POST", "/v1/disks", there)[0] == 201
    status, job = served.ask(
        "POST", "/v1/disks/web-2/move", {"target": f"{served.tree.root}/moved.raw"}
    )
    assert status == 202
    served.daemon.wait("web-2")
    assert (served.tree.root / "moved.raw").exists()
    assert served.ask("GET", f"/v1/jobs/{job['id']}")[1]["phase"] == "done"
    assert served.ask("DELETE", "/v1/disks/web-2")[0] == 200
    (served.tree.root / "moved.raw").rename(served.tree.inside / "vm.raw")
    log = served.daemon.log()
    who = f"asked uid={NEWS.pw_uid} verb="
    assert f"{who}attach disk=web-2 location={there['location']}" in log
    assert f"{who}move disk=web-2 target={served.tree.root}/moved.raw" in log
    assert f"{who}detach disk=web-2" in log


ROOT = {"uid": 0, "groups": [0]}
MOVE = "/v1/disks/web/move"


@pytest.mark.parametrize("who", [ROOT, {}], ids=["root", "news"])
@pytest.mark.parametrize(
    ("method", "target", "body", "code"),
    [
        pytest.param("GET", "/v1/" + "x" * MIB, None, "usage", id="long"),
        ("POST", MOVE, b'{"target": ', "usage"),
        ("POST", MOVE, b"\xff\xfe", "usage"),
        ("POST", MOVE, {"target": 5}, "usage"),
        ("POST", MOVE, {"target": "/x", "fast": True}, "usage"),
        ("POST", MOVE, {"target": "/usr/\0"}, "usage"),
        ("POST", MOVE, {"target": "usr"}, "usage"),
        ("POST", "/v1/disks", {"name": "web\0", "location": "{root}/x"}, "usage"),
        ("POST", "/v1/disks", {"name": "web/../x", "location": "{root}/x"}, "usage"),
        ("POST", "/v1/disks/web/fly", {}, "unknown-path"),
        ("POST", "/v1/jobs/1/fly", None, "unknown-path"),
        ("PUT", "/v1/disks/web", {}, "method"),
        ("GET", "/v1/disks/web%2f..%2f..%2fetc", None, "unknown-disk"),
        ("GET", "/v1/disks/web%00", None, "unknown-disk"),
        ("GET", "/v1/../../etc/passwd", None, "unknown-path"),
        ("GET", "/v1/jobs/no-such", None, "unknown-job"),
        ("POST", "/v1/jobs/no-such/cancel", None, "unknown-job"),
        ("POST", "/v1/jobs/..%2f..%2flock/cancel", None, "unknown-job"),
    ],
)  # fmt: skip
def test_row_28_bad_requests(
    served: Served, who: Any, method: str, target: str, body: Any, code: str
) -> None:
    """One error with a code, in one line; nothing has changed."""
    if isinstance(body, dict) and "location" in body:
        body = body | {"location": f"{served.tree.root}/x"}
    told = served.refused(code, method, target, body, **who)
    assert "\n" not in told
    assert len(told) < 400
    assert "Traceback" not in served.daemon.log()


def test_row_28_twice(served: Served) -> None:
    """A second move and a second cancel are refused; the first goes on, and has its effect."""
    wanted = {"target": f"{served.tree.root}/twice.raw", "limit": MIB // 4}
    job = served.ask("POST", MOVE, wanted)[1]
    for target in ("twice.raw", "other.raw"):
        status, problem = served.ask("POST", MOVE, {"target": f"{served.tree.root}/{target}"})
        assert (status, problem["code"]) == (409, "job-running")
    assert [each["id"] for each in served.ask("GET", "/v1/jobs?disk=web")[1]] == [job["id"]]
    status, cancelled = served.ask("POST", f"/v1/jobs/{job['id']}/cancel")
    assert (status, cancelled.get("phase")) == (200, "cancelled"), cancelled
    assert served.refused("wrong-phase", "POST", f"/v1/jobs/{job['id']}/cancel")
    assert served.ask("GET", f"/v1/jobs/{job['id']}")[1]["phase"] == "cancelled"
    assert sorted(os.listdir(served.tree.root)) == ["d", "link"]


@pytest.fixture
def own(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Served:
    """A daemon with the disk `web`, 12 MiB, for a test that kills it."""
    require_root()
    tree = Tree(tmp_path)
    daemon = make_daemon(CONFIG.format(root=tree.root))
    daemon.start()
    (daemon.root / "web.raw").write_bytes(os.urandom(12 * MIB))
    daemon.attach("web", daemon.root / "web.raw")
    return Served(daemon, tree)


def link_out(tree: Tree) -> None:
    """Put a link out of the root in the directory's place, to the same files."""
    for path in tree.inside.iterdir():
        (tree.outside / path.name).unlink(missing_ok=True)
        (tree.outside / path.name).hardlink_to(path)
    tree.inside.rename(tree.inside.with_name("was"))
    tree.inside.symlink_to(tree.outside)


@pytest.mark.parametrize("committed", [False, True])
def test_a_link_while_the_process_is_dead(own: Served, committed: bool) -> None:
    """Recovery doesn't follow it, though the very files of the move are there."""
    daemon, tree = own.daemon, own.tree
    daemon.expect_log("disk process", "leave job=", "refused")
    wanted = {"target": f"{tree.inside}/", "limit": 0 if committed else MIB // 4}
    job = own.ask("POST", "/v1/disks/web/move", wanted)[1]["id"]
    daemon.wait("web") if committed else daemon.wait("web", "copying")
    daemon.kill()
    daemon.kill_disk("web")
    link_out(tree)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tree.outside.iterdir())
    daemon.start()
    if committed:
        eventually(lambda: daemon.json("show", "web")["state"] == "refused")
        assert "symbolic link" in daemon.json("show", "web")["reason"]
    else:
        ended = eventually(lambda: daemon.json("job", job)["phase"] == "failed" and daemon.job(job))
        assert "symbolic link" in ended["reason"]
        shown = daemon.json("show", "web")
        assert (shown["state"], shown["location"]) == ("serving", str(daemon.root / "web.raw"))
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in tree.outside.iterdir())


def test_moves_while_somebody_exchanges_the_directory_for_a_link(own: Served) -> None:
    """Whatever comes of a move, nothing is made or removed outside."""
    daemon, tree = own.daemon, own.tree
    daemon.expect_log(".")
    before = sorted(tree.outside.iterdir()), tree.outside.stat().st_mtime_ns
    codes: list[str] = []
    with tree.swapped():
        while len(codes) < 6 or (len(set(codes)) < 2 and len(codes) < 100):
            wanted = {"target": f"{tree.inside}/{len(codes)}.raw"}
            status, told = own.ask("POST", "/v1/disks/web/move", wanted)
            codes.append(told.get("code", "moved"))
            if status == 202:
                daemon.run("wait", "web")
    assert set(codes) == {"moved", "leaves-root"}
    assert (sorted(tree.outside.iterdir()), tree.outside.stat().st_mtime_ns) == before
    assert len(daemon.json("ls")) == 1
