"""A domain's XML in, the same with other disks out. Talks to nobody.

What isn't a disk that was asked for stays as it was: order, comments, and namespaces with their
prefixes (`qemu:commandline` is one). What `redirect` replaces of a disk it remembers below the
domain's `<metadata>`, which libvirt keeps for applications, so that `restore` gives back a disk
that wasn't moved exactly as it was: a path that is a symbolic link, a volume of a pool, a seclabel.

The formats are those of https://libvirt.org/formatdomain.html.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lxml import etree

from mirrord.control.snippets import RECONNECT_DELAY_S

NAMESPACE = "urn:mirrord:libvirt"
_DISKS, _DISK = f"{{{NAMESPACE}}}disks", f"{{{NAMESPACE}}}disk"

# What may lie in the source of a disk that is imported; anything else (slices, reservations,
# encryption …) means something to QEMU that it would lose.
_HARMLESS = {"seclabel"}
# <metadata> comes after these.
_BEFORE_METADATA = {"name", "uuid", "genid", "title", "description"}

Element = Any  # lxml has no types


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """One disk of a domain: what its XML says."""

    target: str  # as the guest has it: vda
    path: str | None = None  # of a file or a block device
    volume: tuple[str, str] | None = None  # pool and volume
    nbd: tuple[str, str] | None = None  # export and unix socket
    read_only: bool = False
    cache: Literal["writeback", "direct"] = "writeback"
    obstacle: str | None = None  # why it can't be imported, and what to do


@dataclass(frozen=True, slots=True)
class Served:
    """How mirrord serves a disk, and from where."""

    name: str
    socket: str
    location: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a disk's bytes are, as a source of libvirt's."""

    kind: Literal["file", "block"]
    path: str


def read_disks(xml: str) -> list[DomainDisk]:
    """Return every disk of a domain, in its order."""
    return [_read(disk) for disk in _parse(xml).iterfind("devices/disk")]


def backing_paths(xml: str) -> set[str]:
    """Return the files and devices that lie behind a domain's disks, as far as its XML says."""
    sources = _parse(xml).iterfind("devices/disk//backingStore/source")
    found = {each.get("file") or each.get("dev") for each in sources}
    return {path for path in found if path is not None}


def dac_label(capabilities: str) -> tuple[int, int] | None:
    """Return the user and group that a host starts QEMU as, if its capabilities say so."""
    for model in _parse(capabilities).iterfind("host/secmodel"):
        label = model.findtext("baselabel")
        if model.findtext("model") == "dac" and label is not None:
            uid, gid = label.split(":")  # +64055:+108
            return int(uid), int(gid)
    return None


def _read(disk: Element) -> DomainDisk:
    source, driver = disk.find("source"), disk.find("driver")
    cache = "" if driver is None else driver.get("cache", "")
    return DomainDisk(
        target=_target(disk),
        path=None if source is None else source.get("file") or source.get("dev"),
        volume=None if source is None else _volume(source),
        nbd=None if source is None else _nbd(source),
        read_only=disk.find("readonly") is not None,
        cache="direct" if cache in ("none", "directsync") else "writeback",
        obstacle=_obstacle(disk, source, driver),
    )


def _target(disk: Element) -> str:
    return str(disk.find("target").get("dev"))


def _volume(source: Element) -> tuple[str, str] | None:
    pool, volume = source.get("pool"), source.get("volume")
    return None if pool is None or volume is None else (pool, volume)


def _nbd(source: Element) -> tuple[str, str] | None:
    host = source.find("host")
    if source.get("protocol") != "nbd" or host is None or host.get("socket") is None:
        return None
    return source.get("name", ""), host.get("socket")


def _obstacle(disk: Element, source: Element, driver: Element) -> str | None:
    """Say why a disk can't be imported, if so."""
    device, kind = disk.get("device", "disk"), disk.get("type", "file")
    if device != "disk":
        return f"it is a {device}: only disks are moved"
    if kind not in ("file", "block", "volume"):
        return _other_kind(kind, None if source is None else _nbd(source))
    if source is None or not (source.get("file") or source.get("dev") or _volume(source)):
        return "it has no source: nothing is there to be served"
    if source.get("mode") == "direct":
        return "QEMU itself speaks iSCSI for it: give the pool's volume the mode host first"
    format_name = "raw" if driver is None else driver.get("type", "raw")
    if format_name != "raw":
        return (
            f"it is {format_name}, mirrord moves raw disks: 'qemu-img convert -O raw' makes a "
            "raw one, which 'virsh edit' puts in its place"
        )
    backing = disk.find("backingStore")
    if backing is not None and len(backing):
        return "it has a backing file: 'qemu-img convert -O raw' makes one disk of both"
    if disk.find("encryption") is not None or source.find("encryption") is not None:
        return "QEMU encrypts it, and can't where NBD is its source: let the guest encrypt"
    if disk.find("shareable") is not None:
        return "it is shareable: a disk that several guests write to can't be moved"
    if disk.find("transient") is not None:
        return "it is transient: what the guest writes is thrown away, there is nothing to move"
    special = [str(each.tag) for each in source.iterchildren("*") if each.tag not in _HARMLESS]
    special += [name for name in ("fdgroup",) if source.get(name) is not None]
    if special:
        return f"its source has {', '.join(special)}, which an NBD source can't have"
    return None


def _other_kind(kind: str, nbd: tuple[str, str] | None) -> str:
    if nbd is not None:
        return f"it uses NBD at {nbd[1]}, which is no disk's of this daemon"
    return f"its type is {kind}: only files, block devices and volumes of pools can be imported"


def redirect(xml: str, served: Mapping[str, Served], *, reconnect: bool) -> str:
    """Return the domain with these disks, by target, served by mirrord.

    `reconnect` tells whether this libvirt can let a guest wait while a disk's process starts
    again. If not, it stops at an error instead of seeing it, unless its disk says otherwise.
    """
    root = _parse(xml)
    for disk in root.iterfind("devices/disk"):
        by = served.get(_target(disk))
        if by is not None:
            record = etree.Element(_DISK, target=_target(disk), type=disk.get("type", "file"))
            record.set("location", by.location)
            record.append(copy.deepcopy(disk.find("source")))
            if not reconnect and _stop_at_errors(disk):
                record.set("error_policy", "stop")
            _forget(root, _target(disk))
            _remember(root, record)
            disk.set("type", "network")
            disk.replace(disk.find("source"), _nbd_source(by, reconnect))
    return _text(root)


def _nbd_source(by: Served, reconnect: bool) -> Element:
    source = etree.Element("source", protocol="nbd", name=by.name)
    etree.SubElement(source, "host", transport="unix", socket=by.socket)
    if reconnect:
        etree.SubElement(source, "reconnect", delay=str(RECONNECT_DELAY_S))
    return source


def _stop_at_errors(disk: Element) -> bool:
    """Let the guest stop at an error, unless what it does is said; tell whether that is new."""
    driver = disk.find("driver")
    if driver is None or driver.get("error_policy") or driver.get("rerror_policy"):
        return False
    driver.set("error_policy", "stop")
    return True


def restore(xml: str, target: str, place: Source, *, as_it_was: bool) -> str:
    """Return the domain with a disk on a file or a block device again.

    With `as_it_was` a disk that is where mirrord found it gets back the very source that it had.
    """
    root = _parse(xml)
    (disk,) = (each for each in root.iterfind("devices/disk") if _target(each) == target)
    record = _forget(root, target)
    former = None if record is None else record.find("source")
    if as_it_was and former is not None and record.get("location") == place.path:
        kind, source = record.get("type"), copy.deepcopy(former)
    else:
        kind, source = place.kind, _new_source(place, former)
    disk.set("type", kind)
    disk.replace(disk.find("source"), source)
    policy = None if record is None else record.get("error_policy")
    driver = disk.find("driver")
    if policy is not None and driver is not None and driver.get("error_policy") == policy:
        del driver.attrib["error_policy"]
    return _text(root)


def _new_source(place: Source, former: Element) -> Element:
    source = etree.Element("source", {"file" if place.kind == "file" else "dev": place.path})
    if former is not None:
        if former.get("startupPolicy"):
            source.set("startupPolicy", former.get("startupPolicy"))
        source.extend(copy.deepcopy(each) for each in former.iterchildren("seclabel"))
    return source


def difference(old: str, new: str, name: str) -> str:
    """Return a unified diff of two domains; "" where they are the same."""
    before, after = (_text(_parse(xml)).splitlines(keepends=True) for xml in (old, new))
    return "".join(difflib.unified_diff(before, after, name, f"{name} (new)"))


def _parse(xml: str) -> Element:
    """Return the root. Blanks between elements go: libvirt indents anew, and so does `_text`."""
    return etree.fromstring(xml, etree.XMLParser(resolve_entities=False, remove_blank_text=True))


def _text(root: Element) -> str:
    return str(etree.tostring(root, encoding="unicode", pretty_print=True))


# What import has replaced.


def _remember(root: Element, record: Element) -> None:
    metadata = root.find("metadata")
    if metadata is None:
        metadata = etree.Element("metadata")
        before = [each for each in root.iterchildren("*") if each.tag in _BEFORE_METADATA]
        root.insert(root.index(before[-1]) + 1 if before else 0, metadata)
    disks = metadata.find(_DISKS)
    if disks is None:
        disks = etree.SubElement(metadata, _DISKS, nsmap={"mirrord": NAMESPACE})
    disks.append(record)


def _forget(root: Element, target: str) -> Element:
    """Take a disk's record out, and what is empty without it; return the record."""
    metadata = root.find("metadata")
    disks = None if metadata is None else metadata.find(_DISKS)
    if disks is None:
        return None
    found = [each for each in disks.iterchildren(_DISK) if each.get("target") == target]
    for record in found:
        disks.remove(record)
    if not len(disks):
        metadata.remove(disks)
    if not len(metadata):
        root.remove(metadata)
    return found[-1] if found else None
