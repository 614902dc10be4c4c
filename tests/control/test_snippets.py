"""Lines to paste: each is what its program takes, also for odd paths."""

from __future__ import annotations

import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from mirrord.control.snippets import nbd_uri, snippets

PATHS = [Path("/run/mirrord/nbd/vm.sock"), Path("/odd, 'path'/<&\"x.sock")]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_uri_names_the_socket(path: Path) -> None:
    parts = urlsplit(nbd_uri("vm", path))
    assert (parts.scheme, unquote(parts.path)) == ("nbd+unix", "/vm")
    assert parse_qs(parts.query) == {"socket": [str(path)]}


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("read_only", [False, True])
def test_the_lines_name_the_socket(path: Path, read_only: bool) -> None:
    lines = snippets("vm", path, read_only=read_only)
    words = shlex.split(lines.qemu)
    assert words[0] == "-blockdev"
    assert f"server.path={str(path).replace(',', ',,')},export=vm,reconnect-delay=" in words[1]
    assert ("read-only=on" in words[1]) is read_only
    assert words[2:] == ["-device", "virtio-blk-pci,drive=disk-vm"]
    disk = ElementTree.fromstring(lines.libvirt)
    host = disk.find("source/host")
    assert host is not None
    assert host.get("socket") == str(path)
    assert (disk.find("readonly") is not None) is read_only
    words = shlex.split(lines.nbd_client)
    assert words[:3] == ["nbd-client", "-unix", str(path)]
    assert ("-readonly" in words) is read_only


def test_a_node_name_is_as_long_as_qemu_takes() -> None:
    words = shlex.split(snippets("n" * 64, PATHS[0], read_only=False).qemu)
    assert len(words[3].partition("drive=")[2]) == 31
