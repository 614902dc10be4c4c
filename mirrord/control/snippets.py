"""How a guest uses a disk: its URI, and lines to paste for QEMU, libvirt and nbd-client."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from mirrord.control.messages import Snippets

# Long enough for a disk process to start again many times over, or for a package upgrade; a
# guest that waits for its disk is better off than one that saw an error.
RECONNECT_DELAY_S = 300


def nbd_uri(name: str, socket: Path) -> str:
    """Return the URI, as the NBD URI specification writes one of a unix socket."""
    return f"nbd+unix:///{quote(name)}?socket={quote(str(socket), safe='/')}"


def snippets(name: str, socket: Path, *, read_only: bool) -> Snippets:
    """Return ready-to-paste lines that use the disk."""
    return Snippets(
        qemu=_qemu(name, str(socket), read_only),
        libvirt=_libvirt(name, str(socket), read_only),
        nbd_client=_nbd_client(name, str(socket), read_only),
    )


def _qemu(name: str, socket: str, read_only: bool) -> str:
    path = socket.replace(",", ",,")  # QEMU's own way of quoting
    only = ",read-only=on" if read_only else ""
    node = f"disk-{name}"[:31]  # QEMU's limit of a node name
    return (
        f"-blockdev {_shell(f'driver=nbd,node-name={node},server.type=unix,server.path={path},')}"
        f"export={name},reconnect-delay={RECONNECT_DELAY_S},discard=unmap{only} "
        f"-device virtio-blk-pci,drive={node}"
    )


def _libvirt(name: str, socket: str, read_only: bool) -> str:
    only = "\n  <readonly/>" if read_only else ""
    return (
        "<disk type='network' device='disk'>\n"
        "  <driver name='qemu' type='raw' error_policy='stop' discard='unmap'/>\n"
        f"  <source protocol='nbd' name={quoteattr(name)}>\n"
        f"    <host transport='unix' socket={quoteattr(socket)}/>\n"
        f"    <reconnect delay='{RECONNECT_DELAY_S}'/>\n"
        "  </source>\n"
        f"  <target dev='vda' bus='virtio'/>{only}\n"
        "</disk>"
    )


def _nbd_client(name: str, socket: str, read_only: bool) -> str:
    only = " -readonly" if read_only else ""
    return f"nbd-client -unix {_shell(socket)} /dev/nbd0 -name {name} -persist{only}"


def _shell(text: str) -> str:
    """Quote only what a shell would change: the common case stays readable."""
    if all(c.isalnum() or c in "/._-=,:+" for c in text):
        return text
    return "'" + text.replace("'", "'\\''") + "'"
