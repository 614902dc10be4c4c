"""libvirt itself: a connection, one domain, and who else uses its disks.

The only module that imports the binding. What libvirt can't do is a RefusedError with its words.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import pwd
import shlex
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import libvirt

from mirrord.errors import RefusedError
from mirrord.libvirt.rewriting import backing_paths, dac_label, read_disks
from mirrord.service.places import same_location

# <reconnect delay=…/> of an NBD source: libvirt 9.2.0, April 2023. Earlier ones drop it in silence.
_KNOWS_RECONNECT = 9_002_000


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn an error of libvirt's into a refusal (`libvirt-refused`) with its words."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise RefusedError("libvirt-refused", f"{what}: {error.get_error_message()}") from error


class Host:
    """libvirt at one URI."""

    def __init__(self, uri: str) -> None:
        """Connect. Raises RefusedError (`no-libvirt`, `remote-libvirt`)."""
        libvirt.registerErrorHandler(lambda *_: None, None)  # by default it prints them
        if urlsplit(uri).hostname is not None:
            raise RefusedError(
                "remote-libvirt",
                f"{uri} is libvirt through the network, and mirrord's sockets are of one host: "
                "run this on the domain's host, with a local URI",
            )
        try:
            self._connection: Any = libvirt.open(uri)
        except libvirt.libvirtError as error:
            raise RefusedError(
                "no-libvirt",
                f"no libvirt at {uri} ({error.get_error_message()}): start it, or name another "
                "with --connect",
            ) from error
        self._uri = uri

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    @property
    def knows_reconnect(self) -> bool:
        """Tell whether its guests can wait for an NBD server that starts again."""
        return bool(self._connection.getLibVersion() >= _KNOWS_RECONNECT)

    def domain(self, name: str) -> Domain:
        """Return a domain. Raises RefusedError (`unknown-domain`)."""
        with _told(f"the domains at {self._uri} can't be listed"):
            found = {each.name(): each for each in self._connection.listAllDomains()}
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise RefusedError(
                "unknown-domain", f"there is no domain {name} at {self._uri} ({known})"
            )
        return Domain(name, self._connection, found[name])

    def volume_path(self, pool: str, volume: str) -> str:
        """Return the path of a pool's volume."""
        with _told(f"volume {volume} of pool {pool}"):
            found = self._connection.storagePoolLookupByName(pool).storageVolLookupByName(volume)
            return str(found.path())

    def users(self, path: str, nbd: tuple[str, str] | None) -> set[str]:
        """Return the domains, as they are defined or run, with a disk at `path` or over `nbd`.

        They are read once: a domain that is defined after that isn't among them.
        """
        return {
            name
            for name, used, over in self._used
            if nbd in over or any(same_location(path, at) for at in used)
        }

    @functools.cached_property
    def _used(self) -> list[tuple[str, set[str], set[tuple[str, str]]]]:
        """Return what each domain uses: its name, paths, and exports over NBD."""
        found = []
        with _told("the domains can't be read"):
            for domain in self._connection.listAllDomains():
                for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
                    xml = domain.XMLDesc(flags)
                    disks = read_disks(xml)
                    used = backing_paths(xml) | {disk.path for disk in disks if disk.path}
                    for volume in (disk.volume for disk in disks if disk.volume):
                        with contextlib.suppress(RefusedError):  # its pool is off: so is the disk
                            used.add(self.volume_path(*volume))
                    over = {disk.nbd for disk in disks if disk.nbd is not None}
                    found.append((domain.name(), used, over))
        return found

    def advice(self, socket: str) -> str | None:
        """Say what to do so that QEMU may use `socket`, where the host says who QEMU is."""
        if self._connection.getType() != "QEMU":
            return None
        with _told("what the host can do can't be read"):
            label = dac_label(self._connection.getCapabilities())
        return None if label is None else permission_advice(socket, *label)


def permission_advice(socket: str, uid: int, gid: int) -> str | None:
    """Say what to do so that a user may write to a socket, unless it may. Its folders are open."""
    try:
        user, group = pwd.getpwuid(uid).pw_name, grp.getgrgid(gid).gr_name
    except KeyError:
        user, group = str(uid), str(gid)
    status = os.stat(socket)
    groups = os.getgrouplist(user, gid)  # those that libvirt gives QEMU
    shift = 6 if status.st_uid == uid else 3 if status.st_gid in groups else 0
    if uid == 0 or status.st_mode >> shift & 0o2:
        return None
    return (
        f"QEMU runs as {user}, who may not use {socket}: 'chgrp {group} {socket}' and "
        f"'chmod 660 {socket}' let it; for disks to come, nbd_socket_group = \"{group}\" and "
        'nbd_socket_mode = "0660" in mirrord.toml'
    )


class Domain:
    """One domain. Its definition is what it will start from; what runs is never touched."""

    def __init__(self, name: str, connection: Any, domain: Any) -> None:
        self.name = name
        self._connection = connection
        self._domain = domain

    def refuse_unless_off(self) -> None:
        """Raise RefusedError (`domain-active`, `domain-has-state`) where its disks are in use.

        A saved state and a snapshot have the disks as they were, with their places.
        """
        name, quoted = self.name, shlex.quote(self.name)
        with _told(f"the state of domain {name} can't be read"):
            if self._domain.isActive():
                paused = self._domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
                raise RefusedError(
                    "domain-active",
                    f"domain {name} {'is paused' if paused else 'runs'}: shut it down first "
                    f"('virsh shutdown {quoted}')",
                )
            if self._domain.hasManagedSaveImage():
                raise RefusedError(
                    "domain-has-state",
                    f"domain {name} is saved, not shut off: start it and shut it down, or give up "
                    f"what is saved with 'virsh managedsave-remove {quoted}'",
                )
            if self._domain.snapshotNum():
                raise RefusedError(
                    "domain-has-state",
                    f"domain {name} has snapshots, which know its disks by their places: delete "
                    f"them first ('virsh snapshot-list {quoted}')",
                )
            if self._checkpoints():
                raise RefusedError(
                    "domain-has-state",
                    f"domain {name} has checkpoints, which know its disks by their places: delete "
                    f"them first ('virsh checkpoint-list {quoted}')",
                )

    def _checkpoints(self) -> bool:
        try:
            return bool(self._domain.listAllCheckpoints())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
                return False
            raise

    def xml(self) -> str:
        """Return its definition, passwords included: without them they would be undefined."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        with _told(f"domain {self.name} can't be read"):
            return str(self._domain.XMLDesc(flags))

    def shown_xml(self) -> str:
        """Return its definition for people: without passwords."""
        with _told(f"domain {self.name} can't be read"):
            return str(self._domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))

    def define(self, old: str, new: str) -> str:
        """Put a definition in the place of `old`; return it as libvirt has it then.

        Raises RefusedError where libvirt doesn't take it, or where somebody started or changed the
        domain meanwhile; then it is as it was.
        """
        self.refuse_unless_off()
        if self.xml() != old:
            raise RefusedError(
                "domain-changed", f"domain {self.name} was changed meanwhile: run this again"
            )
        with _told(f"libvirt doesn't take the changed domain {self.name}"):
            self._connection.defineXML(new)
        return self.xml()
