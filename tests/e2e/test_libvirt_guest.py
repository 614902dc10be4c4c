"""A domain boots from an imported disk, goes on while that moves, and takes it back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.daemon import Daemon
from tests.e2e.guest import (
    ACKED,
    BOOT_S,
    COMPLAINT,
    check_file_system,
    make_file_system,
    make_initramfs,
    read_records,
    replay_journal,
)
from tests.helpers import eventually
from tests.libvirtd import GROUP, USER, Libvirtd

MakeDaemon = Callable[..., Daemon]

SIZE_BYTES = 64 << 20
# From here on libvirt knows <reconnect delay=…/>: the guest waits. Before, it stops.
KNOWS_RECONNECT = 9_002_000

DOMAIN = """
<domain type='qemu'>
  <name>guest</name>
  <memory unit='MiB'>192</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{root}/vmlinuz</kernel>
    <initrd>{root}/initramfs.cpio</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 nokaslr tsc=reliable mitigations=off</cmdline>
  </os>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
      <source file='{root}/disk.raw' startupPolicy='optional'/>
      <target dev='vda' bus='virtio'/>
      <boot order='1'/>
      <serial>kept</serial>
    </disk>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{root}/console'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""


@pytest.fixture
def served(make_daemon: MakeDaemon) -> Daemon:
    """Start a daemon whose disks every user may use: this QEMU is another user's."""
    daemon = make_daemon('nbd_socket_mode = "0666"\n')
    daemon.root.chmod(0o755)
    daemon.start()
    return daemon


@pytest.fixture
def host(served: Daemon) -> Iterator[Libvirtd]:
    """Start a libvirtd, which ends before the daemon."""
    one = Libvirtd()
    yield one
    one.close()


class Guest:
    """The domain, and what it says on its console."""

    def __init__(self, domain: Any, console: Path) -> None:
        self.domain = domain
        self._console = console

    def lines(self) -> list[str]:
        """Return what it said."""
        said = self._console.read_text(errors="replace") if self._console.exists() else ""
        return [line.strip() for line in said.splitlines()]

    def acked(self) -> int:
        """Return the last record that it knows to be on its disk."""
        return max((int(said[1]) for said in map(ACKED.match, self.lines()) if said), default=0)

    def wait_acked(self, more: int) -> None:
        """Wait until so many further records are on its disk."""
        wanted = self.acked() + more
        eventually(lambda: self.acked() >= wanted, BOOT_S, f"guest acks record {wanted}")

    def is_stopped(self) -> bool:
        """Tell whether it stands still."""
        return bool(self.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED)


def define(host: Libvirtd, folder: Path) -> Any:
    """Define the domain, with a file system on its disk."""
    kernel, initramfs = make_initramfs(folder)
    shutil.copy(kernel, host.root / "vmlinuz")
    shutil.copy(initramfs, host.root / "initramfs.cpio")
    make_file_system(host.root / "disk.raw", SIZE_BYTES)
    shutil.chown(host.root / "disk.raw", USER, GROUP)
    return host.connection.defineXML(DOMAIN.format(root=host.root))


def test_a_domain_of_libvirts(served: Daemon, host: Libvirtd, tmp_path: Path) -> None:
    served.expect_log("disk process")
    domain = define(host, tmp_path)
    before = domain.XMLDesc()
    disk, target = host.root / "disk.raw", host.root / "moved.raw"

    # an import that was killed after its first step: QEMU doesn't get what mirrord serves
    served.attach("guest-vda", disk, "--cache", "direct")
    with pytest.raises(libvirt.libvirtError, match="lock"):
        domain.create()
    done = served.json("libvirt", "import", "guest", "--connect", host.uri)
    assert done["disks"][0]["outcome"] == "imported"
    domain.create()
    guest = Guest(domain, host.root / "console")
    guest.wait_acked(10)

    served.move("guest-vda", target)
    served.wait("guest-vda")
    guest.wait_acked(10)
    served.kill_disk("guest-vda")
    if host.connection.getLibVersion() < KNOWS_RECONNECT:
        eventually(guest.is_stopped, what="the guest stops at the error")
        eventually(lambda: served.json("show", "guest-vda")["state"] == "serving")
        domain.resume()
    guest.wait_acked(10)
    assert not guest.is_stopped()
    refused = served.run("libvirt", "export", "guest", "--connect", host.uri)
    assert (refused.returncode, "domain guest runs" in refused.stderr) == (4, True)

    domain.destroy()
    acked = guest.acked()
    served.json("libvirt", "export", "guest", "--connect", host.uri)
    assert domain.XMLDesc() == before.replace(str(disk), str(target))
    assert not disk.exists()
    replay_journal(target)
    check_file_system(target)
    assert read_records(target)[:acked] == list(range(1, acked + 1))
    assert not [line for line in guest.lines() if COMPLAINT.search(line)]
    domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)  # QEMU gets its file again
    assert served.json("ls") == []
