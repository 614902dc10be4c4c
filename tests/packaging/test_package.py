"""The Debian package on a machine: installed, confined, upgraded under a guest, removed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import mirrord
from mirrord.core.geometry import MIB
from tests.helpers import eventually, have_io_uring, require_loop_devices
from tests.nbd_writer import Client, Writer
from tests.packaging.conftest import NEWER
from tests.packaging.machine import Machine

# Under load: a build, installations and starts, each of a few seconds alone.
pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

ATTACHED = "/var/lib/mirrord/disks/vm"


def install(host: Machine, package: Path) -> str:
    """Install a package; return what that prints."""
    shutil.copy(package, host.shared / "mirrord.deb")
    done = host.run("dpkg --install /mnt/shared/mirrord.deb")
    assert "warning" not in done.stderr, done.stderr
    return done.stdout


def told(host: Machine, words: str) -> Any:
    """Return the document that a command prints."""
    return json.loads(host.ask(f"mirrord {words} --json"))


def make_disk(host: Machine, name: str = "vm") -> Path:
    """Make a disk of somebody else's where the unit lets disks lie."""
    path = host.shared / f"{name}.raw"
    path.write_bytes(os.urandom(8 * MIB))
    path.chmod(0o600)
    os.chown(path, 64055, 64055)
    return path


def nbd_socket(host: Machine, name: str) -> str:
    """Return where a disk's socket is to be found from outside."""
    return host.open(f"/run/mirrord/nbd/{name}.sock")


def processes(host: Machine, what: str) -> list[str]:
    """Return the processes whose command line has `what`."""
    return host.run(f"pgrep --full '[m]irrord.*{what}'", check=False).stdout.split()


def test_an_upgrade_under_a_guest_and_a_removal(
    host: Machine, package: Path, newer_package: Path
) -> None:
    install(host, package)
    assert host.ask("systemctl is-active mirrord.service mirrord.socket") == "active\nactive"
    assert host.ask("systemctl is-enabled mirrord.service mirrord.socket") == "enabled\nenabled"
    assert host.ask("mirrord --version") == f"mirrord {mirrord.__version__}"
    host.run("echo 'max_moves = 3' >>/etc/mirrord/mirrord.toml")  # ours from now on
    make_disk(host)
    told(host, "attach vm /mnt/shared/vm.raw")
    writer = Writer(nbd_socket(host, "vm"), "vm", seed=6)
    writer.start()
    writer.wait_acknowledged(50)

    printed = install(host, newer_package)
    assert f"mirrord {mirrord.__version__} still serves these disks" in printed
    assert "max_moves = 3" in host.ask("cat /etc/mirrord/mirrord.toml")
    writer.wait_acknowledged(50)
    assert writer.reconnects == 0, "a guest noticed the restart"
    assert told(host, "show vm")["version"] == mirrord.__version__
    assert [each["version"] for each in told(host, "upgrade")] == [NEWER]
    writer.wait_acknowledged(50)
    assert told(host, "move vm /mnt/")["phase"] == "done"
    writer.wait_acknowledged(50)
    writer.stop()
    assert writer.reconnects == 1

    refused = host.run("dpkg --remove mirrord", check=False)
    assert refused.returncode == 1
    assert "mirrord serves these disks: vm" in refused.stderr
    client = Client(nbd_socket(host, "vm"), "vm")
    writer.check(client.read)
    client.close()
    host.run("systemctl stop mirrord-disks")
    assert host.run("mirrord ls", check=False).returncode == 5, "a client started it again"
    assert processes(host, "daemon") + processes(host, "disk_process") == []
    host.run("dpkg --remove mirrord")
    for path in ("/usr/lib/mirrord", "/usr/bin/mirrord", "/run/mirrord"):
        assert host.run(f"test -e {path}", check=False).returncode == 1, path
    assert "kept /var/lib/mirrord" in host.run("dpkg --purge mirrord").stderr
    host.run(f"test -e {ATTACHED}/disk.json && test ! -e /etc/mirrord && test ! -e /run/mirrord")
    assert "mirrord" not in host.ask("systemctl list-units --all --no-legend 'mirrord*'")


def test_what_the_unit_grants_until_the_shutdown(
    host: Machine, package: Path, loop_device: Path
) -> None:
    """On one machine, as each costs a start and an installation."""
    install(host, package)
    host.put("/usr/local/bin/tell", "#!/bin/sh\n(cat; id -un) >/var/lib/mirrord/told")
    host.run(
        "chmod +x /usr/local/bin/tell; mkdir /srv/vms; "
        "(echo 'on_done = [\"/usr/local/bin/tell\"]'; echo 'nbd_socket_group = \"disk\"'; "
        "echo 'nbd_socket_mode = \"0660\"') >>/etc/mirrord/mirrord.toml; "
        "systemctl restart mirrord"
    )
    content = make_disk(host).read_bytes()
    told(host, "attach vm /mnt/shared/vm.raw --cache direct")
    moves_files(host)
    refuses_other_places(host)
    grant_more(host, loop_device)
    assert told(host, f"move vm {loop_device}")["phase"] == "done"
    assert told(host, "move vm /opt/vms/vm.raw --keep-source")["phase"] == "done"
    assert Path(host.open("/opt/vms/vm.raw")).read_bytes() == content
    told(host, "move vm /mnt/shared/")
    ends_the_guests_first(host)
    assert (host.shared / "vm.raw").read_bytes() == b"\x5a" * MIB + content[MIB:]


def moves_files(host: Machine) -> None:
    """Under the unit's filter, with its capabilities and folders."""
    job = told(host, "move vm /srv/vms/")
    assert (job["phase"], job["verified"]) == ("done", True)
    assert host.ask("stat -c '%u %g %a' /srv/vms/vm.raw") == "64055 64055 600"
    assert host.ask("stat -c '%G %a' /run/mirrord/nbd/vm.sock") == "disk 660"
    (pid,) = processes(host, "disk_process")
    status = host.ask(f"cat /proc/{pid}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    # CAP_CHOWN, _DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER, _LEASE; a filter
    assert (fields["CapEff"], fields["CapBnd"]) == 2 * ("000000001000000f",)
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    if have_io_uring():
        assert "io_uring" in host.ask(f"ls -l /proc/{pid}/fd"), "the filter forbids it"
    assert 'mirrord_process_resident_memory_bytes{disk="vm"}' in host.ask(
        "curl -sS --fail --unix-socket /run/mirrord/control.sock http://localhost/metrics"
    )
    done = Path(host.open("/var/lib/mirrord/told"))
    eventually(
        lambda: done.exists() and done.read_text().endswith("}mirrord\n"), what="on_done ran"
    )


def refuses_other_places(host: Machine) -> None:
    """Say in one line where a place is granted."""
    host.run("mkdir /opt/vms; truncate -s 1M /opt/vms/x.raw ~/x.raw")
    for words in ("attach x /opt/vms/x.raw", "attach x ~/x.raw", "attach x /dev/loop0",
                  "move vm /opt/vms/", "move vm /tmp/", "move vm /var/tmp/x.raw",
                  "move vm /run/"):  # fmt: skip
        refused = host.run(f"mirrord {words}", check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (4, 1), refused
        assert "places.conf" in refused.stderr


def grant_more(host: Machine, loop_device: Path) -> None:
    """Install the drop-in as its own text says."""
    text = Path(host.open("/usr/share/doc/mirrord/places.conf")).read_text()
    text = re.sub(r"^#(ReadWritePaths=).*", r"\1/opt/vms", text, flags=re.M)
    text = re.sub(r"^#(PrivateDevices=no)", r"\1", text, flags=re.M)
    text = text.replace("#DeviceAllow=block-device-mapper", "DeviceAllow=block-loop")
    host.put("/etc/systemd/system/mirrord.service.d/places.conf", text)
    number = os.stat(loop_device).st_rdev
    host.run(
        f"mknod {loop_device} b {os.major(number)} {os.minor(number)}; "
        "systemctl daemon-reload && systemctl restart mirrord && mirrord upgrade --force"
    )


def ends_the_guests_first(host: Machine) -> None:
    """At its very end a guest still writes; then its disk flushes and ends, and nothing is left."""
    write = "qemu-io -f raw -c 'write -P 0x5a 0 1M' nbd+unix:///vm?socket=/run/mirrord/nbd/vm.sock"
    host.put(
        "/etc/systemd/system/libvirt-guests.service",
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"
        f'ExecStop=/bin/sh -c "{write} >/mnt/shared/guest 2>&1"\n',
    )
    host.put(
        "/etc/systemd/system/mirrord-disks.service.d/test.conf",
        "[Service]\nReadWritePaths=/mnt\n"
        "ExecStopPost=+/bin/sh -c \"pgrep -af '[m]irrord.*(disk_process|daemon)' "
        '>/mnt/shared/left"\n',
    )
    host.run("systemctl daemon-reload; systemctl start libvirt-guests")
    host.shut_down()
    assert "wrote 1048576/1048576" in (host.shared / "guest").read_text()
    assert (host.shared / "left").read_text() == ""


@pytest.fixture
def loop_device(tmp_path: Path) -> Any:
    """Make a block device of eight MiB."""
    require_loop_devices()
    store = tmp_path / "store"
    store.write_bytes(bytes(8 * MIB))
    found = subprocess.run(
        ["losetup", "--find", "--show", store], check=True, capture_output=True, text=True
    ).stdout.strip()
    yield Path(found)
    subprocess.run(["losetup", "--detach", found], check=True)
