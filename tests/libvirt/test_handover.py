"""Disks given to mirrord and taken back: the steps, and what is left when one doesn't succeed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from mirrord.control.client import Client
from mirrord.control.messages import AttachRequest, Disk
from tests.helpers import require_loop_devices, require_program
from tests.libvirt.conftest import MIB, Libvirt, definition, file_disk, outcomes
from tests.nbd_writer import Client as NbdClient


def test_import_move_export(host: Libvirt) -> None:
    root, data = host.make_disk(), host.make_disk()
    disks = [file_disk(root, driver=" cache='none' io='native'"), file_disk(data, "vdb")]
    domain = host.define(*disks)
    before = definition(domain)

    done = host.json("import", "web")
    assert set(done) == {"domain", "disks", "advice", "diff"}
    assert done["disks"][0] == {
        "target": "vda", "outcome": "imported", "disk": "web-vda", "location": str(root),
        "reason": None,
    }  # fmt: skip
    assert outcomes(done) == {"vda": "imported", "vdb": "imported"}
    assert done["diff"] is None
    imported = definition(domain)
    assert f"socket='{host.daemon.nbd_socket('web-vda')}'" in imported
    assert "passwd='secret'" in imported
    assert host.mirrord("show", "web-vda")["cache"] == "direct"
    assert host.mirrord("show", "web-vdb")["cache"] == "writeback"

    again = host.json("import", "web")
    assert outcomes(again) == {"vda": "already", "vdb": "already"}
    assert again["disks"][0]["disk"] == "web-vda"
    assert definition(domain) == imported

    target = host.folder / "moved.raw"
    host.mirrord("move", "web-vda", target)
    done = host.json("export", "web")
    assert outcomes(done) == {"vda": "exported", "vdb": "exported"}
    assert done["disks"][0]["location"] == str(target)
    assert definition(domain) == before.replace(str(root), str(target))
    assert host.names() == []
    assert outcomes(host.json("export", "web")) == {"vda": "already", "vdb": "already"}
    assert definition(domain) == before.replace(str(root), str(target))


def test_what_people_read(host: Libvirt) -> None:
    path, image = host.make_disk(), host.make_disk()
    qcow = file_disk(image, "vdb").replace("'raw'", "'qcow2'")
    host.define(file_disk(path), qcow, name="web server")
    code, out, error = host.run("import", "web server")
    assert (code, error) == (0, "")
    first, second, *advice = out.splitlines()
    assert first == f"vda: disk web-server-vda of mirrord, at {path}"
    assert second.startswith("vdb: left as it is: it is qcow2, mirrord moves raw disks: 'qemu-img")
    assert all("virsh resume 'web server'" in line for line in advice)
    code, out, _ = host.run("import", "web server", "vda")
    assert (code, out) == (0, "vda: already disk web-server-vda of mirrord\n")
    code, out, _ = host.run("export", "web server")
    assert (code, out) == (0, f"vda: {path}, no longer served by mirrord\n")
    code, out, _ = host.run("export", "web server")
    assert (code, out) == (0, f"vda: already {path}\n")


def test_a_dry_run_changes_nothing_and_shows_what_would(host: Libvirt) -> None:
    path = host.make_disk()
    domain = host.define(file_disk(path))
    before, disks = definition(domain), host.names()

    code, out, _ = host.run("import", "web", "--dry-run")
    elsewhere = host.folder / "control.sock"  # the disks' sockets don't lie beside it
    elsewhere.symlink_to(host.daemon.socket)
    planned = host.json("import", "web", "--dry-run", "--socket", str(elsewhere))
    assert code == 0
    assert out.splitlines()[0] == "nothing was changed; this would be:"
    assert planned["diff"].rstrip() in out
    assert "secret" not in out
    assert (definition(domain), host.names()) == (before, disks)
    host.run("import", "web")
    assert_changed(planned["diff"], domain.XMLDesc())

    imported, disks = definition(domain), host.names()
    planned = host.json("export", "web", "--dry-run")
    assert (definition(domain), host.names()) == (imported, disks)
    host.run("export", "web")
    assert_changed(planned["diff"], domain.XMLDesc())
    assert definition(domain) == before


def assert_changed(diff: str, xml: str) -> None:
    """Assert that a domain has what a diff adds and not what it takes away."""
    has = {line.strip().replace("'", '"') for line in xml.splitlines()}
    lines = diff.splitlines()[2:]
    added = {line[1:].strip() for line in lines if line.startswith("+")}
    assert added
    assert added <= has
    taken = {line[1:].strip() for line in lines if line.startswith("-")} - added
    assert taken
    assert not taken & has


def test_only_the_disks_that_are_named(host: Libvirt) -> None:
    read_only = file_disk(host.make_disk(), "vdb", more="<readonly/>")
    domain = host.define(file_disk(host.make_disk()), read_only)
    before = definition(domain)
    assert outcomes(host.json("import", "web", "vdb")) == {"vdb": "imported"}
    assert host.names() == ["web-vdb"]
    assert host.mirrord("show", "web-vdb")["read_only"] is True
    host.json("import", "web")
    assert outcomes(host.json("export", "web", "vda")) == {"vda": "exported"}
    assert host.names() == ["web-vdb"]
    assert outcomes(host.json("export", "web")) == {"vda": "already", "vdb": "exported"}
    assert definition(domain) == before


def test_a_link_is_given_back_while_it_leads_to_the_disk(host: Libvirt) -> None:
    path, other = host.make_disk(), host.make_disk()
    link = host.folder / "link.raw"
    link.symlink_to(path)
    domain = host.define(file_disk(link))
    before = definition(domain)
    host.json("import", "web")
    host.json("export", "web")
    assert definition(domain) == before
    host.json("import", "web")
    link.unlink()
    link.symlink_to(other)
    host.json("export", "web")
    assert definition(domain) == before.replace(str(link), str(path))


def test_a_volume_of_a_pool(host: Libvirt) -> None:
    pool = host.connection.storagePoolCreateXML(
        f"<pool type='dir'><name>fast</name><target><path>{host.folder}</path></target></pool>"
    )
    try:
        pool.createXML("<volume><name>v.raw</name><capacity>1048576</capacity></volume>")
        path = host.make_disk("v.raw")
        disk = file_disk(path).replace("type='file'", "type='volume'")
        disk = disk.replace(f"file='{path}'", "pool='fast' volume='v.raw'")
        domain = host.define(disk)
        before = definition(domain)
        assert host.json("import", "web")["disks"][0]["location"] == str(path)
        host.json("export", "web")
        assert definition(domain) == before
        other = host.define(file_disk(path), name="other")
        assert "domain web too" in host.refuse("disk-shared", "import", "other", "vda")
        host.forget(other)
        host.json("import", "web")
    finally:
        pool.destroy()
    assert host.json("export", "web")["disks"][0]["location"] == str(path)
    assert f"<source file='{path}' startupPolicy='optional'/>" in definition(domain)
    host.connection.defineXML(before)
    assert "volume v.raw of pool fast" in host.refuse("libvirt-refused", "import", "web", "vda")


def test_onto_a_block_device_and_back_from_it(host: Libvirt) -> None:
    require_loop_devices()
    losetup = require_program("losetup")
    domain = host.define(file_disk(host.make_disk()))
    behind = host.make_disk()
    os.truncate(behind, 2 * MIB)
    made = subprocess.run(
        [losetup, "--show", "-f", behind], capture_output=True, text=True, check=True, timeout=10
    )
    device = made.stdout.strip()
    try:
        host.json("import", "web")
        host.mirrord("move", "web-vda", device)
        done = host.json("export", "web")
        assert "<disk type='block'" in definition(domain)
        assert f"<source dev='{device}' startupPolicy='optional'/>" in definition(domain)
        assert done["advice"] == [
            f"{device} has 2 MiB, disk web-vda 1 MiB: the guest will see a disk that has grown"
        ]
    finally:
        subprocess.run([losetup, "-d", device], check=True, timeout=10)


# A step that isn't made, or not to its end.


def test_a_killed_import_is_completed(host: Libvirt) -> None:
    """It came as far as the attach, by its own name or by one that somebody chose."""
    first, second = host.make_disk(), host.make_disk()
    host.define(file_disk(first), file_disk(second, "vdb"))
    host.mirrord("attach", "web-vda", first)
    host.mirrord("attach", "mine", second)
    done = host.json("import", "web")
    assert [(one["outcome"], one["disk"]) for one in done["disks"]] == [
        ("imported", "web-vda"), ("imported", "mine")
    ]  # fmt: skip
    assert host.names() == ["mine", "web-vda"]


Meanwhile = Callable[[], object]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Meanwhile], None]:
    """Have something happen just after an attach, or just before a detach."""
    attach, detach = Client.attach, Client.detach

    def arrange(step: str, happens: Meanwhile) -> None:
        def attached(client: Client, request: AttachRequest) -> Disk:
            disk = attach(client, request)
            happens()
            return disk

        def detached(client: Client, name: str, *, force: bool = False) -> Disk:
            monkeypatch.setattr(Client, "detach", detach)  # once
            happens()
            return detach(client, name, force=force)

        monkeypatch.setattr(Client, step, attached if step == "attach" else detached)

    return arrange


def test_a_domain_that_was_started_meanwhile(host: Libvirt, meanwhile: Any) -> None:
    domain = host.define(file_disk(host.make_disk()))
    before = definition(domain)
    meanwhile("attach", domain.create)
    status, _, error = host.run("import", "web")
    assert (status, error.count("\n")) == (4, 1)
    assert "domain web runs" in error
    assert (definition(domain), host.names()) == (before, [])


def test_a_domain_that_was_changed_meanwhile(host: Libvirt, meanwhile: Any) -> None:
    path = host.make_disk()
    domain = host.define(file_disk(path))
    changed = definition(domain).replace("</name>", "</name><title>new</title>")
    meanwhile("attach", lambda: host.connection.defineXML(changed))
    status, _, error = host.run("import", "web")
    assert status == 4
    assert error == "mirrord: domain web was changed meanwhile: run this again\n"
    assert "<title>new</title>" in definition(domain)
    assert "nbd" not in definition(domain)
    assert host.names() == ["web-vda"]  # who changed it may have given it that disk
    assert outcomes(host.json("import", "web")) == {"vda": "imported"}


def test_a_second_disk_that_cannot_be_served(host: Libvirt) -> None:
    host.daemon.expect_log("none.raw doesn't exist")
    domain = host.define(file_disk(host.make_disk()), file_disk(host.folder / "none.raw", "vdb"))
    before = definition(domain)
    status, _, error = host.run("import", "web")
    assert (status, error.count("\n")) == (4, 1)
    assert "none.raw doesn't exist" in error
    assert (definition(domain), host.names()) == (before, [])


def test_a_guest_that_came_meanwhile_and_a_move_that_ended(host: Libvirt, meanwhile: Any) -> None:
    path, target = host.make_disk(), host.folder / "moved.raw"
    domain = host.define(file_disk(path))
    before = definition(domain)
    host.json("import", "web")
    imported = definition(domain)
    clients: list[NbdClient] = []
    socket = host.daemon.nbd_socket("web-vda")
    meanwhile("detach", lambda: clients.append(NbdClient(socket, "web-vda")))
    status, _, error = host.run("export", "web")
    assert (status, error.count("\n")) == (4, 1)
    assert (definition(domain), host.names()) == (imported, ["web-vda"])
    assert "in use" in host.refuse("clients-connected", "export", "web")
    clients[0].close()

    meanwhile("detach", lambda: host.mirrord("move", "web-vda", target))
    host.json("export", "web")
    assert definition(domain) == before.replace(str(path), str(target))
    assert host.names() == []


def test_an_export_that_was_broken_off_is_completed(host: Libvirt, meanwhile: Any) -> None:
    """It came as far as the domain: mirrord still serves, and has locked, the file."""
    domain = host.define(file_disk(host.make_disk()))
    before = definition(domain)
    host.json("import", "web")
    meanwhile("detach", host.daemon.kill)
    assert host.run("export", "web")[0] == 5
    assert definition(domain) == before
    host.daemon.start()
    assert outcomes(host.json("export", "web")) == {"vda": "exported"}
    assert (definition(domain), host.names()) == (before, [])
