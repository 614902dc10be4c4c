"""Give a domain's disks to mirrord, and take them back: which steps, in which order.

Import: serve the disks, then define the domain that uses them. Export, disk by disk: define the
domain that uses the file itself, then stop serving it. A step that is refused takes back the one
before it. A kill between the two leaves a domain with a file that mirrord has locked: QEMU doesn't
start with it, nothing is lost, and the same command once more completes what was begun.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

import msgspec

from mirrord.control.client import Client
from mirrord.control.messages import AttachRequest, Disk, Service
from mirrord.core.units import NAME_LENGTH_MAX, format_bytes
from mirrord.errors import RefusedError
from mirrord.libvirt.domains import Domain, Host
from mirrord.libvirt.rewriting import (
    DomainDisk,
    Served,
    Source,
    difference,
    read_disks,
    redirect,
    restore,
)
from mirrord.service.places import is_share, same_location

SECTOR_BYTES = 512  # of sysfs, whatever the device's are


class HandedOver(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of the domain, and what became of it."""

    target: str  # as the domain calls it
    outcome: Literal["imported", "exported", "already", "skipped"]
    disk: str | None = None  # as mirrord calls it
    location: str | None = None  # where its bytes are
    reason: str | None = None  # why it was skipped


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """What was done to a domain; what would be done where `diff` is not None."""

    domain: str
    disks: list[HandedOver]
    advice: list[str]
    diff: str | None = None


# Import.


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A disk to be served; it is already where `disk` is not None."""

    each: DomainDisk
    path: str
    name: str
    disk: Disk | None

    def planned(self, service: Service) -> Served:
        """Return how the daemon will serve it."""
        if self.disk is not None:
            return _served(self.disk)
        return Served(self.name, f"{service.nbd_dir}/{self.name}.sock", self.path)


def import_disks(
    client: Client, host: Host, name: str, targets: Sequence[str], *, dry_run: bool = False
) -> Handover:
    """Serve a domain's disks and have it use them. Raises MirrordError; then nothing has changed.

    With `dry_run` nothing is changed in any case.
    """
    domain = host.domain(name)
    domain.refuse_unless_off()
    xml, known = domain.xml(), client.disks()
    said: dict[str, HandedOver] = {}
    wanted: dict[str, _Wanted] = {}
    for each in _chosen(name, xml, targets):
        disk = _disk_of(each, known)
        if disk is not None:
            said[each.target] = _say(each.target, "already", _served(disk))
            continue
        try:
            one = _examine(each, host, name, known)
        except RefusedError as error:
            said[each.target] = _skip(each.target, error, named=bool(targets))
        else:
            wanted[each.target] = one
            said[each.target] = HandedOver(target=each.target, outcome="imported")
    if all(one.outcome == "skipped" for one in said.values()):
        why = "; ".join(f"{target}: {one.reason}" for target, one in said.items())
        raise RefusedError(
            "nothing-to-import", f"domain {name} has no disk to import ({why or 'none at all'})"
        )
    reconnect = host.knows_reconnect
    advice = [] if reconnect or not wanted else [_without_reconnect(name)]
    diff = None
    if dry_run:
        service = client.service()
        served = {target: one.planned(service) for target, one in wanted.items()}
        shown = domain.shown_xml()
        diff = difference(shown, redirect(shown, served, reconnect=reconnect), f"{name}.xml")
    else:
        served = _serve(client, domain, xml, wanted, reconnect=reconnect)
        permissions = (host.advice(by.socket) for by in served.values())
        advice += [text for text in permissions if text is not None][:1]
    said |= {target: _say(target, "imported", by) for target, by in served.items()}
    return Handover(domain=name, disks=list(said.values()), advice=advice, diff=diff)


def _examine(each: DomainDisk, host: Host, name: str, known: Sequence[Disk]) -> _Wanted:
    """Return how a disk is to be served. Raises RefusedError where it can't be imported."""
    if each.obstacle is not None:
        raise RefusedError("disk-unfit", each.obstacle)
    path = each.path if each.volume is None else host.volume_path(*each.volume)
    assert path is not None  # its absence is an obstacle
    disk = _disk_at(path, known)
    others = host.users(path, None if disk is None else (disk.name, _socket(disk))) - {name}
    if others:
        raise RefusedError(
            "disk-shared",
            f"{path} is a disk of domain {', '.join(sorted(others))} too: take it from one of them",
        )
    called = _name(name, each.target)
    if disk is not None:
        _refuse_unusable(disk, each)
    elif called in {one.name for one in known}:
        raise RefusedError(
            "name-in-use",
            f"mirrord has another disk {called}: attach {path} under a name of your choice "
            f"('mirrord attach NAME {path}'), then import it",
        )
    return _Wanted(each, path, called, disk)


def _refuse_unusable(disk: Disk, each: DomainDisk) -> None:
    faults = {
        disk.state: disk.state != "serving",
        "in use": disk.clients > 0,
        "read-only": disk.read_only and not each.read_only,
    }
    found = [fault for fault, is_so in faults.items() if is_so]
    if not found:
        return
    raise RefusedError(
        "disk-attached",
        f"{disk.location} is mirrord's disk {disk.name} already, which is {found[0]}: "
        f"'mirrord show {disk.name}' says more, 'mirrord detach {disk.name}' frees it",
    )


def _name(domain: str, target: str) -> str:
    """Return what mirrord calls a domain's disk; it allows fewer characters than libvirt."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", domain).strip("-._") or "domain"
    return f"{plain[: NAME_LENGTH_MAX - len(target) - 1]}-{target}"


def _serve(
    client: Client, domain: Domain, xml: str, wanted: dict[str, _Wanted], *, reconnect: bool
) -> dict[str, Served]:
    """Serve the disks, then define the domain that uses them: all of it or nothing."""
    served = {}
    with contextlib.ExitStack() as undo:
        for target, one in wanted.items():
            disk = one.disk
            if disk is None:
                request = AttachRequest(one.name, one.path, one.each.cache, one.each.read_only)
                disk = client.attach(request)
                undo.callback(_detach_unused, client, domain, xml, disk.name)
            served[target] = _served(disk)
        if served:
            domain.define(xml, redirect(xml, served, reconnect=reconnect))
        undo.pop_all()
    return served


def _detach_unused(client: Client, domain: Domain, xml: str, name: str) -> None:
    """Take back an attach, unless the domain may have come to use it all the same."""
    if domain.xml() == xml:
        client.detach(name)


def _without_reconnect(name: str) -> str:
    return (
        "this libvirt has no <reconnect> for NBD (9.2 has): should a disk's process have to start "
        f"again, the guest stops, and 'virsh resume {shlex.quote(name)}' lets it go on"
    )


# Export.


def export_disks(
    client: Client, host: Host, name: str, targets: Sequence[str], *, dry_run: bool = False
) -> Handover:
    """Have a domain use its files and devices itself, where they are now; stop serving them.

    Raises MirrordError; then at most disks before the one that it names have been exported.
    """
    domain = host.domain(name)
    domain.refuse_unless_off()
    xml, known = domain.xml(), client.disks()
    said: list[HandedOver] = []
    ours: dict[str, tuple[Disk, Source]] = {}
    left: list[Disk] = []  # a killed export came as far as the domain
    for each in _chosen(name, xml, targets):
        disk = _disk_of(each, known)
        if disk is not None:
            ours[each.target] = disk, _source_of(disk)
        elif (disk := _left_over(each, host, name, known)) is not None:
            left.append(disk)
        elif each.obstacle is not None:  # never imported
            if targets or each.nbd is not None:
                error = RefusedError("not-imported", each.obstacle)
                said.append(_skip(each.target, error, named=bool(targets)))
            continue
        if disk is None:
            said.append(HandedOver(target=each.target, outcome="already", location=each.path))
        else:
            said.append(_say(each.target, "exported", _served(disk)))
    if all(one.outcome == "skipped" for one in said):
        why = "; ".join(f"{one.target}: {one.reason}" for one in said) or "none at all"
        raise RefusedError("nothing-to-export", f"domain {name} has no disk to export ({why})")
    advice = [line for disk, source in ours.values() for line in _growth(disk, source)]
    if dry_run:
        new = shown = domain.shown_xml()
        for target, (_, source) in ours.items():
            new = _restored(host, new, target, source)
        diff = difference(shown, new, f"{name}.xml")
        return Handover(domain=name, disks=said, advice=advice, diff=diff)
    for target, (disk, source) in ours.items():
        xml = _take_back(client, host, domain, xml, target, disk, source)
    for disk in left:
        client.detach(disk.name)
    return Handover(domain=name, disks=said, advice=advice)


def _left_over(each: DomainDisk, host: Host, name: str, known: Sequence[Disk]) -> Disk | None:
    """Return mirrord's disk at the path that this domain, and no other, uses by itself."""
    disk = None if each.path is None else _disk_at(each.path, known)
    if disk is None or host.users(disk.location or "", (disk.name, _socket(disk))) != {name}:
        return None
    return disk


def _take_back(
    client: Client, host: Host, domain: Domain, xml: str, target: str, disk: Disk, source: Source
) -> str:
    """Define the domain with a disk of its own, then stop serving that: both or nothing.

    Return its definition.
    """
    new = domain.define(xml, _restored(host, xml, target, source))
    try:
        gone = client.detach(disk.name)
    except RefusedError:  # it is still served: a guest came, a move was started
        domain.define(new, xml)
        raise
    if gone.location is not None and gone.location != disk.location:  # a move has ended meanwhile
        return domain.define(new, _restored(host, xml, target, _source_at(gone.location)))
    return new


def _restored(host: Host, xml: str, target: str, source: Source) -> str:
    """Return the domain with a disk of its own: as it was, unless that leads elsewhere now."""
    new = restore(xml, target, source, as_it_was=True)
    (each,) = (disk for disk in read_disks(new) if disk.target == target)
    path = each.path
    with contextlib.suppress(RefusedError):  # its pool is gone
        path = path if each.volume is None else host.volume_path(*each.volume)
    if path is not None and same_location(path, source.path):
        return new
    return restore(xml, target, source, as_it_was=False)


def _source_of(disk: Disk) -> Source:
    """Return where a disk is, for QEMU. Raises RefusedError where it can't be exported now."""
    if disk.state != "serving" or disk.location is None:
        raise RefusedError(
            "disk-not-serving",
            f"disk {disk.name} is {disk.state}: {disk.reason or 'see the log of the daemon'}",
        )
    if disk.job is not None:
        raise RefusedError(
            "job-running",
            f"disk {disk.name} is being moved: wait for it ('mirrord wait {disk.name}') or cancel "
            "it first",
        )
    if disk.clients:
        raise RefusedError(
            "clients-connected", f"disk {disk.name} is in use ('mirrord ls'): end its clients first"
        )
    if is_share(disk.location):
        raise RefusedError(
            "on-a-share",
            f"disk {disk.name} is at {disk.location}, which QEMU can't open: move it to a file or "
            f"a block device first ('mirrord move {disk.name} TARGET')",
        )
    return _source_at(disk.location)


def _source_at(path: str) -> Source:
    try:
        device = stat.S_ISBLK(os.stat(path).st_mode)
    except OSError as error:
        raise RefusedError("location-missing", f"{path}: {error.strerror}") from error
    return Source("block" if device else "file", path)


def _growth(disk: Disk, source: Source) -> list[str]:
    """Say that a device is larger than the disk on it: QEMU gives a guest the whole of it."""
    if source.kind != "block" or disk.size is None:
        return []
    number = os.stat(source.path).st_rdev
    sectors = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size").read_text()
    size = int(sectors) * SECTOR_BYTES
    if size == disk.size:
        return []
    return [
        f"{source.path} has {format_bytes(size)}, disk {disk.name} {format_bytes(disk.size)}: the "
        "guest will see a disk that has grown"
    ]


# What both do.


def _chosen(name: str, xml: str, targets: Sequence[str]) -> list[DomainDisk]:
    """Return the disks that were asked for, in the domain's order: all, or those of `targets`."""
    disks = read_disks(xml)
    names = [each.target for each in disks]
    for target in targets:
        if target not in names:
            raise RefusedError(
                "unknown-disk",
                f"domain {name} has no disk {target} ({', '.join(names) or 'none at all'})",
            )
    return [each for each in disks if not targets or each.target in targets]


def _disk_of(each: DomainDisk, known: Sequence[Disk]) -> Disk | None:
    """Return mirrord's disk that the domain uses."""
    return next((disk for disk in known if each.nbd == (disk.name, _socket(disk))), None)


def _disk_at(path: str, known: Sequence[Disk]) -> Disk | None:
    """Return mirrord's disk that lies at a path."""
    return next((d for d in known if d.location and same_location(path, d.location)), None)


def _socket(disk: Disk) -> str:
    """Return the path of a disk's socket, which its URI has as its query."""
    return parse_qs(urlsplit(disk.uris.nbd or "").query)["socket"][0]


def _served(disk: Disk) -> Served:
    return Served(disk.name, _socket(disk), disk.location or "")


def _say(
    target: str, outcome: Literal["imported", "exported", "already"], by: Served
) -> HandedOver:
    return HandedOver(target=target, outcome=outcome, disk=by.name, location=by.location)


def _skip(target: str, error: RefusedError, *, named: bool) -> HandedOver:
    """Leave a disk as it is and say why, or refuse where it was asked for by name."""
    if named:
        raise RefusedError(error.code, f"disk {target}: {error}") from error
    return HandedOver(target=target, outcome="skipped", reason=str(error))
