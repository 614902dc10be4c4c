"""Bad input: each is refused in one line that says what to do, and changes nothing."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrord.libvirt.domains import permission_advice
from tests.cli.running import run
from tests.libvirt.conftest import URI, Libvirt, definition, file_disk, outcomes
from tests.shares import section
from tests.smb_fixtures import make_samba

__all__ = ["make_samba"]

VERBS = ("import", "export")


@pytest.mark.parametrize("verb", VERBS)
def test_a_domain_that_runs(host: Libvirt, verb: str) -> None:
    domain = host.define(file_disk(host.make_disk()))
    domain.create()
    told = host.refuse("domain-active", verb, "web")
    assert told == "mirrord: domain web runs: shut it down first ('virsh shutdown web')\n"
    domain.suspend()
    assert "domain web is paused" in host.refuse("domain-active", verb, "web")


@pytest.mark.parametrize("verb", VERBS)
def test_a_domain_with_saved_states(host: Libvirt, verb: str) -> None:
    domain = host.define(file_disk(host.make_disk()))
    domain.create()
    domain.managedSave()
    told = host.refuse("domain-has-state", verb, "web")
    assert "'virsh managedsave-remove web'" in told
    domain.managedSaveRemove()
    domain.snapshotCreateXML("<domainsnapshot/>")
    assert "'virsh snapshot-list web'" in host.refuse("domain-has-state", verb, "web")
    domain.snapshotCurrent().delete()
    domain.create()
    domain.checkpointCreateXML("<domaincheckpoint/>")
    domain.destroy()
    assert "'virsh checkpoint-list web'" in host.refuse("domain-has-state", verb, "web")
    assert host.names() == []


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_not_known(host: Libvirt, verb: str) -> None:
    host.define(file_disk(host.make_disk()))
    told = host.refuse("unknown-domain", verb, "wbe")
    assert told == f"mirrord: there is no domain wbe at {URI} (test, web)\n"
    assert "web has no disk vdb (vda)" in host.refuse("unknown-disk", verb, "web", "vdb")
    options = ("--socket", host.daemon.socket, "--connect")
    for uri, said in (
        ("test:///nowhere.xml", "mirrord: no libvirt at test:///nowhere.xml ("),
        ("qemu+ssh://web.example.com/system", "run this on the domain's host"),
    ):
        status, out, error = run("libvirt", verb, "web", *options, uri)
        assert (status, out, error.count("\n")) == (4, "", 1)
        assert said in error
    status, _, error = run("libvirt", verb, "web", "--connect", URI, "--socket", "/nowhere.sock")
    assert (status, error.count("\n")) == (5, 1)


def test_disks_that_cannot_be_imported(host: Libvirt) -> None:
    """By name they are refused, else they stay, and a domain has to have one that can."""
    qcow = file_disk(host.make_disk()).replace("type='raw'", "type='qcow2'")
    cdrom = "<disk device='cdrom'><target dev='hdc' bus='ide'/></disk>"
    domain = host.define(qcow, cdrom)
    before = definition(domain)
    told = host.refuse("disk-unfit", "import", "web", "vda")
    assert told.startswith("mirrord: disk vda: it is qcow2")
    told = host.refuse("nothing-to-import", "import", "web")
    assert "(vda: it is qcow2" in told
    assert "; hdc: it is a cdrom" in told
    assert definition(domain) == before
    assert "disk hdc: it is a cdrom" in host.refuse("not-imported", "export", "web", "hdc")
    host.define(name="bare")
    assert "(none at all)" in host.refuse("nothing-to-import", "import", "bare")
    assert "(none at all)" in host.refuse("nothing-to-export", "export", "bare")


def test_one_disk_of_two_domains(host: Libvirt) -> None:
    path = host.make_disk()
    link = host.folder / "link.raw"
    link.symlink_to(path)
    host.define(file_disk(path))
    other = host.define(file_disk(link), name="other")
    told = host.refuse("disk-shared", "import", "web", "vda")
    assert f"{path} is a disk of domain other too" in told
    other.create()  # what runs may have another disk than what is defined
    host.connection.defineXML(definition(other).replace(str(link), str(host.make_disk())))
    host.refuse("disk-shared", "import", "web", "vda")
    host.forget(other)
    host.json("import", "web")
    other = host.define(file_disk(path), name="other")  # over NBD it is the same disk, too
    assert "domain web too" in host.refuse("disk-shared", "import", "other", "vda")
    assert outcomes(host.json("export", "other")) == {"vda": "already"}
    assert host.names() == ["web-vda"]


def test_what_mirrord_has_already(host: Libvirt) -> None:
    path, other = host.make_disk(), host.make_disk()
    host.define(file_disk(path))
    host.mirrord("attach", "web-vda", other)
    told = host.refuse("name-in-use", "import", "web", "vda")
    assert f"'mirrord attach NAME {path}'" in told
    host.mirrord("attach", "mine", path, "--read-only")
    told = host.refuse("disk-attached", "import", "web", "vda")
    assert "mirrord's disk mine already, which is read-only: 'mirrord show mine'" in told


def test_an_export_of_what_cannot_be_exported(
    make_samba: Callable[..., object], make_daemon: Callable[..., object], tmp_path: Path
) -> None:
    """A disk on a share; one that is being moved; one that another daemon serves."""
    samba = make_samba()
    daemon = make_daemon(section(samba))
    daemon.start()
    host = Libvirt(daemon, tmp_path)
    try:
        domain = host.define(file_disk(host.make_disk()))
        host.json("import", "web")
        imported = definition(domain)
        move = ("move", "web-vda", samba.url("web.raw"), "--no-wait", "--cutover", "manual")
        host.mirrord(*move)
        told = host.refuse("job-running", "export", "web")
        assert "'mirrord wait web-vda'" in told
        host.mirrord("wait", "web-vda", "--phase", "mirroring")
        host.mirrord("cutover", "web-vda")
        host.mirrord("wait", "web-vda")
        told = host.refuse("on-a-share", "export", "web")
        assert f"is at {samba.url('web.raw')}, which QEMU can't open" in told
        assert "'mirrord move web-vda TARGET'" in told
        assert definition(domain) == imported
        host.mirrord("detach", "web-vda")
        told = host.refuse("not-imported", "export", "web", "vda")
        assert "which is no disk's of this daemon" in told
        assert "no disk's of this daemon" in host.refuse("nothing-to-export", "export", "web")
        assert "no disk's of this daemon" in host.refuse("nothing-to-import", "import", "web")
    finally:
        host.close()


def test_who_may_use_a_socket(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    path = tmp_path / "vm.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        told = permission_advice(str(path), nobody.pw_uid, nobody.pw_gid)
        assert told is not None
        assert "QEMU runs as nobody, who may not use" in told
        assert f"'chgrp nogroup {path}' and 'chmod 660 {path}'" in told
        assert 'nbd_socket_group = "nogroup"' in told
        assert permission_advice(str(path), 0, 0) is None
        assert permission_advice(str(path), os.geteuid(), nobody.pw_gid) is None
        path.chmod(0o666)
        assert permission_advice(str(path), nobody.pw_uid, nobody.pw_gid) is None
        assert "QEMU runs as 999999" in str(permission_advice_of_a_stranger(path))


def permission_advice_of_a_stranger(path: Path) -> str | None:
    """Ask for a user that the system has no name for."""
    path.chmod(0o600)
    return permission_advice(str(path), 999999, 999999)


def test_without_the_binding() -> None:
    program = (
        "import sys; sys.modules['libvirt'] = None; sys.argv[0] = 'mirrord'\n"
        "from mirrord.cli import main; sys.exit(main())"
    )
    for verb in VERBS:
        done = subprocess.run(
            [sys.executable, "-c", program, "libvirt", verb, "web"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (4, "")
        assert done.stderr.count("\n") == 1
        assert "module libvirt is missing: install python3-libvirt and python3-lxml" in done.stderr
