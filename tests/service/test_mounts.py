"""Mounted shares: what mountinfo says, and when the mount or smb:// serves better."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirrord.service.mounts import ShareMount, advise, mount_of, read_mounts
from mirrord.service.shares import ShareConfig

# As Linux 6.1 writes it, less what nobody looks at.
OPTIONS = (
    "rw,vers=3.1.1,cache=strict,username=backup,uid=0,noforceuid,gid=0,noforcegid,"
    "addr=192.0.2.7,file_mode=0755,dir_mode=0755,{},nounix,serverino,rsize=4194304,actimeo=1"
)
ROOT = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"
SHARES = {"vault.example.com/vms": ShareConfig(credential="vault")}


def line(
    options: str, source: str = "//Vault.example.com/vms", point: str = "/mnt/vms",
    kind: str = "cifs", root: str = "/",
) -> str:  # fmt: skip
    """Return a line of mountinfo."""
    return f"90 22 0:55 {root} {point} rw,relatime shared:9 - {kind} {source} {options}\n"


def judge(tmp_path: Path, *lines: str, shares: dict[str, ShareConfig] = SHARES) -> list[ShareMount]:
    """Return the advice for a system with these mounts."""
    path = tmp_path / "mountinfo"
    path.write_text(ROOT + "".join(lines))
    return advise(read_mounts(path), shares)


def why(mount: ShareMount) -> str:
    """Return the reasons in one text."""
    return "\n".join(mount.why)


def test_lines_of_mountinfo(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(
        ROOT.encode()
        + rb"23 22 0:4 /a\040b /mnt/x\134y\040z rw - smb3 //h/s\040t rw,seal,vers=3.0" + b"\n"
        + b"24 22 0:5 / /proc rw,nosuid master:1 shared:2 - proc proc rw\n25 22 0:6\n\n"
    )  # fmt: skip
    _, share, proc = read_mounts(path)
    assert share[:4] == ("/a b", "/mnt/x\\y z", "smb3", "//h/s t")
    assert share.options == {"rw": "", "seal": "", "vers": "3.0"}
    assert (proc.point, proc.kind, proc.source) == ("/proc", "proc", "proc")
    assert read_mounts(tmp_path / "none") == []
    assert read_mounts(), "this system's"


def test_the_mount_that_a_path_lies_on(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_text(ROOT + line("rw", point="/nowhere/a") + line("rw", point="/nowhere/a"))
    mounts = read_mounts(path)
    assert mount_of(Path("/nowhere/a/b/c"), mounts) is mounts[2], "the later one covers it"
    assert mount_of(Path("/nowhere/a"), mounts) is mounts[2]
    assert mount_of(Path("/nowhere/ab"), mounts) is mounts[0]
    assert mount_of(Path("/x"), []) is None


def test_a_share_that_mirrord_reaches_itself(tmp_path: Path) -> None:
    (found,) = judge(tmp_path, line(OPTIONS.format("soft")))
    assert (found.better, found.level) == ("smb", "advice")
    assert found.location == "smb://vault.example.com/vms/"
    assert found.advice == "use smb://vault.example.com/vms/ rather than the mount"
    for reason in (
        "forgot writes that weren't flushed: they are lost silently", "soft: ", "cache=strict: ",
        "no copy inside the server", "no seal: neither encrypted nor signed",
        "no persistenthandles",
    ):  # fmt: skip
        assert reason in why(found)


def test_the_strongest_mount_still_forgets(tmp_path: Path) -> None:
    options = OPTIONS.format("seal,hard,persistenthandles").replace("=strict", "=none")
    (found,) = judge(tmp_path, line(options, kind="smb3"))
    assert found.better == "smb"
    assert "they are lost silently" in found.why[0]
    assert "hard: a server that is away hangs requests" in why(found)
    for absent in ("cache=", "seal", "persistenthandles", "soft"):
        assert absent not in why(found)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("cache=strict", "cache=loose"), "cache=loose: reads may be older"),
        (("vers=3.1.1", "vers=2.1"), "vers=2.1: it can't encrypt"),
        (("username", "sec=krb5i,username"), "no seal: signed but not encrypted"),
        (("rw", "rw,sign"), "no seal: signed but not encrypted"),
        (("rw", "rw,multichannel,max_channels=4"), "write channels = 4 into the section"),
        (("rw", "rw,multichannel"), "write channels = 2 into the section"),
    ],
)
def test_what_options_mean(tmp_path: Path, change: tuple[str, str], reason: str) -> None:
    (found,) = judge(tmp_path, line(OPTIONS.format("hard").replace(*change)))
    assert reason in why(found)
    (other,) = judge(tmp_path, line(OPTIONS.format("hard")))
    assert reason not in why(other)


def test_as_many_channels_as_the_mount(tmp_path: Path) -> None:
    shares = {"vault.example.com": ShareConfig(credential="vault", channels="auto")}
    options = OPTIONS.format("hard,multichannel,max_channels=4")
    (found,) = judge(tmp_path, line(options), shares=shares)
    assert "multichannel" not in why(found)


def test_what_only_the_kernel_can(tmp_path: Path) -> None:
    (found,) = judge(tmp_path, line(OPTIONS.format("hard,rdma")))
    assert (found.better, found.level) == ("mount", "ok")
    assert found.why[0].startswith("RDMA (SMB Direct)")
    (found,) = judge(tmp_path, line(OPTIONS.format("soft,rdma")))
    assert found.level == "advice"
    assert "hard instead of soft" in found.advice


def test_a_link_of_dfs(tmp_path: Path) -> None:
    link = line(OPTIONS.format("hard"), "//other.example.com/vms", "/mnt/vms/link")
    above, below = judge(tmp_path, line(OPTIONS.format("hard")), link)
    assert (above.better, below.better) == ("smb", "mount")
    assert below.why[0].startswith("DFS: ")


def test_a_share_without_a_section(tmp_path: Path) -> None:
    (found,) = judge(tmp_path, line(OPTIONS.format("hard")), shares={})
    assert (found.better, found.level) == ("mount", "advice")
    assert '[smb."vault.example.com/vms"]' in found.why[0]
    assert "for now" in found.advice


@pytest.mark.parametrize(
    ("source", "root", "options", "location"),
    [
        ("//NAS/VMs/deep/er", "/", "rw", "smb://nas/VMs/deep/er/"),
        ("//nas/vms/deep", "/deep", "rw", "smb://nas/vms/deep/"),
        ("//nas/vms", "/bound", "rw", "smb://nas/vms/bound/"),
        ("//nas/vms/", "/", "rw,port=4450", "smb://nas:4450/vms/"),
        ("//2001:db8::1/vms", "/", "rw", "smb://[2001:db8::1]/vms/"),
        (r"\134\134nas\134vms", "/", "rw", "smb://nas/vms/"),
    ],
)
def test_the_same_place_by_smb(
    tmp_path: Path, source: str, root: str, options: str, location: str
) -> None:
    (found,) = judge(tmp_path, line(options, source, root=root))
    assert found.location == location


def test_other_mounts_are_not_shares(tmp_path: Path) -> None:
    assert judge(tmp_path, line("rw", "nas:/vms", kind="nfs4"), line("rw", "odd")) == []
