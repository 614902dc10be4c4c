"""libvirt's own test driver, whose domains live in this process, and commands against it.

`test:///default` is one host for all connections of a process, for as long as one is open.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.cli.running import run
from tests.daemon import Daemon

URI = "test:///default"
MIB = 1 << 20

DOMAIN = """
<domain type='test'>
  <name>{name}</name>
  <memory unit='MiB'>8</memory>
  <os><type>hvm</type></os>
  <devices>
    {disks}
    <graphics type='vnc' port='-1' passwd='secret'/>
  </devices>
</domain>
"""
DISK = """
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'{driver}/>
  <source file='{path}' startupPolicy='optional'/>
  <target dev='{target}' bus='virtio'/>
  {more}
</disk>
"""


def file_disk(path: Path, target: str = "vda", driver: str = "", more: str = "") -> str:
    """Return the XML of a disk in a file."""
    return DISK.format(path=path, target=target, driver=driver, more=more)


def definition(domain: Any) -> str:
    """Return what a domain will start from, passwords included."""
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    return str(domain.XMLDesc(flags))


class Libvirt:
    """The test driver's host, and `mirrord libvirt` against it and a daemon."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.daemon = daemon
        self.folder = folder
        self.connection: Any = libvirt.open(URI)
        self._numbers = itertools.count()
        self._there = {domain.name() for domain in self.connection.listAllDomains()}

    def close(self) -> None:
        """Remove the domains and mirrord's disks."""
        for domain in self.connection.listAllDomains():
            if domain.name() not in self._there:
                self.forget(domain)
        self.connection.close()
        for name in self.names():
            self.mirrord("detach", name, "--force")

    def forget(self, domain: Any) -> None:
        """Undefine a domain, whatever it is."""
        if domain.isActive():
            domain.destroy()
        if domain.hasManagedSaveImage():
            domain.managedSaveRemove()
        for state in (*domain.listAllSnapshots(), *domain.listAllCheckpoints()):
            state.delete()
        domain.undefine()

    def make_disk(self, name: str = "") -> Path:
        """Make a disk of a MiB."""
        path = self.folder / (name or f"disk{next(self._numbers)}.raw")
        path.write_bytes(b"x" * MIB)
        return path

    def define(self, *disks: str, name: str = "web") -> Any:
        """Define a domain; return it."""
        return self.connection.defineXML(DOMAIN.format(name=name, disks="".join(disks)))

    def mirrord(self, *words: str | Path) -> Any:
        """Run a command of mirrord's that has to succeed; return its document."""
        code, out, error = run(*words, "--json", "--socket", self.daemon.socket)
        assert code == 0, error
        return json.loads(out)

    def run(self, verb: str, *words: str) -> tuple[int, str, str]:
        """Run `mirrord libvirt VERB WORDS`; return exit code, standard output and error."""
        options = ("--connect", URI, "--socket", self.daemon.socket)
        return run("libvirt", verb, *options, *words)

    def json(self, verb: str, *words: str) -> Any:
        """Run a command that has to succeed; return its document."""
        code, out, error = self.run(verb, *words, "--json")
        assert code == 0, error
        return json.loads(out)

    def refuse(self, code: str, verb: str, *words: str) -> str:
        """Run a command that has to be refused with `code`, in one line; return that."""
        status, out, error = self.run(verb, *words)
        assert (status, out, error.count("\n")) == (4, "", 1), error
        status, out, as_json = self.run(verb, *words, "--json")
        assert (status, out, json.loads(as_json)["code"]) == (4, "", code), as_json
        return error

    def names(self) -> list[str]:
        """Return mirrord's disks."""
        return [disk["name"] for disk in self.mirrord("ls")]


@pytest.fixture(scope="module")
def served() -> Iterator[Daemon]:
    """Start a daemon for the tests of a module."""
    daemon = Daemon()
    daemon.start()
    yield daemon
    wrong = daemon.unannounced()
    daemon.close()
    assert not wrong


@pytest.fixture
def host(served: Daemon, tmp_path: Path) -> Iterator[Libvirt]:
    """Return libvirt beside a daemon."""
    one = Libvirt(served, tmp_path)
    yield one
    one.close()


def outcomes(document: Any) -> dict[str, str]:
    """Return what became of each disk."""
    return {one["target"]: one["outcome"] for one in document["disks"]}
