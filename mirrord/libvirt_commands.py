"""`mirrord libvirt …`: nothing of libvirt is imported before one of them runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mirrord import display
from mirrord.control.client import Client
from mirrord.errors import RefusedError
from mirrord.options import Json, Socket, open_client

if TYPE_CHECKING:
    from mirrord.libvirt.domains import Host
    from mirrord.libvirt.handover import Handover

commands = typer.Typer(help="Give disks of libvirt's domains to mirrord.", no_args_is_help=True)

DomainName = Annotated[
    str, typer.Argument(metavar="DOMAIN", help="As in 'virsh list --all'; shut off.")
]
Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="[DISK]...", help="Such as vda; all that can be, if none is named."),
]
Connect = Annotated[
    str,
    typer.Option(
        "--connect", "-c", envvar="LIBVIRT_DEFAULT_URI", metavar="URI", help="Which libvirt."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the change, make none.")]


@commands.command("import")
def import_domain(
    domain: DomainName,
    targets: Targets = None,
    connect: Connect = "qemu:///system",
    dry_run: DryRun = False,
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Serve a domain's disks, and have it use them.

    The domain is shut off, and its disks are raw: files, block devices, volumes of pools.
    """
    with _both(connect, socket) as (client, host):
        from mirrord.libvirt.handover import import_disks

        done = import_disks(client, host, domain, targets or (), dry_run=dry_run)
        display.put(done, json, _words)


@commands.command("export")
def export_domain(
    domain: DomainName,
    targets: Targets = None,
    connect: Connect = "qemu:///system",
    dry_run: DryRun = False,
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Give a domain its disks back, where they are.

    The domain is shut off; it uses the files or block devices itself then.
    """
    with _both(connect, socket) as (client, host):
        from mirrord.libvirt.handover import export_disks

        done = export_disks(client, host, domain, targets or (), dry_run=dry_run)
        display.put(done, json, _words)


@contextlib.contextmanager
def _both(uri: str, socket: Path | None) -> Iterator[tuple[Client, Host]]:
    """Connect to the daemon and to libvirt."""
    try:
        from mirrord.libvirt.domains import Host
    except ModuleNotFoundError as error:
        raise RefusedError(
            "libvirt-missing",
            f"the Python module {error.name} is missing: install python3-libvirt and python3-lxml, "
            "or 'mirrord[libvirt]' by pip (built with gcc, pkg-config and libvirt-dev)",
        ) from error
    with contextlib.closing(open_client(socket)) as client, contextlib.closing(Host(uri)) as host:
        yield client, host


def _words(done: Handover) -> str:
    """Return a line for each disk, then what to do, then the change that was only shown."""
    lines = [] if done.diff is None else ["nothing was changed; this would be:"]
    for one in done.disks:
        if one.outcome == "imported":
            text = f"disk {one.disk} of mirrord, at {one.location}"
        elif one.outcome == "exported":
            text = f"{one.location}, no longer served by mirrord"
        elif one.outcome == "already":
            text = f"already {one.location if one.disk is None else f'disk {one.disk} of mirrord'}"
        else:
            text = f"left as it is: {one.reason}"
        lines.append(f"{one.target}: {text}")
    lines += done.advice
    return "\n".join(lines + ([] if not done.diff else [done.diff.rstrip()]))
