"""Who may do what at the control socket, and the log of who did.

Root and the daemon's own user may do everything; whoever is let in beside them sees and changes
what a [[grant]] gives (`grants`). Every request of anybody goes through a `View`, made for its
peer and its operation. What it doesn't have, a request can't reach: an operation without a grant
is refused before its method is called, a disk without one before it is looked up, so that a
refusal tells nothing about which there are. Jobs are looked up first, as their disk decides: that
an id is somebody's can be found out, but nothing else about it.
"""

from __future__ import annotations

import logging

from mirrord.control.messages import (
    AttachRequest,
    CredentialTest,
    CredentialTestRequest,
    Disk,
    Job,
    LimitRequest,
    MoveRequest,
    Service,
)
from mirrord.control.server import Api
from mirrord.control.sockets import Peer
from mirrord.core.units import check_name
from mirrord.errors import RefusedError
from mirrord.service.grants import READ, Right, root_of
from mirrord.service.logs import fields
from mirrord.service.places import check_location
from mirrord.service.registry import Registry

log = logging.getLogger(__name__)

_ADVICE = "root can give one, by [[grant]] in mirrord.toml"


class Gate:
    """Implements `control.server.Gate`."""

    def __init__(self, registry: Registry, rights: tuple[Right, ...]) -> None:
        self._registry = registry
        self._rights = rights

    def admits(self, peer: Peer) -> bool:
        """Tell whether `peer` may do anything at all."""
        return peer.unrestricted or any(right.is_for(peer) for right in self._rights)

    def view(self, peer: Peer, operation: str) -> View:
        """Return what `peer` may do by one operation. Raises RefusedError (`forbidden`)."""
        if peer.unrestricted:
            return View(self._registry, peer.uid, operation, None)
        rights = [r for r in self._rights if r.is_for(peer) and operation in r.verbs]
        view = View(self._registry, peer.uid, operation, rights)
        if not rights:
            raise view.refusal()
        return view


class View(Api):
    """The control interface for one peer and one operation.

    Every method that concerns a disk raises RefusedError (`forbidden`) beside what the registry's
    raises. `rights` are those for that peer and operation, None where everything is allowed.
    """

    def __init__(
        self, registry: Registry, uid: int, operation: str, rights: list[Right] | None
    ) -> None:
        self._registry = registry
        self._uid = uid
        self._operation = operation
        self._rights = rights

    async def service(self) -> Service:
        return self._registry.service()

    async def disks(self) -> list[Disk]:
        return [disk for disk in await self._registry.disks() if self._covers(disk.name)]

    async def disk(self, name: str) -> Disk:
        self._check(name)
        return await self._registry.disk(name)

    async def attach(self, request: AttachRequest) -> Disk:
        check_name(request.name)
        root = self._root(request.location, request.name)
        self._asked(disk=request.name, location=request.location)
        return await self._registry.attach(request, root)

    async def detach(self, name: str, *, force: bool) -> Disk:
        self._check(name)
        self._asked(disk=name, force=force)
        return await self._registry.detach(name, force=force)

    async def upgrade(self, name: str, *, force: bool) -> Disk:
        self._check(name)
        self._asked(disk=name, force=force)
        return await self._registry.upgrade(name, force=force)

    async def move(self, name: str, request: MoveRequest) -> Job:
        root = self._root(request.target, name)
        self._asked(disk=name, target=request.target)
        return await self._registry.move(name, request, root)

    async def test_credential(self, request: CredentialTestRequest) -> CredentialTest:
        self._root(request.location)
        self._asked(location=request.location)
        return await self._registry.test_credential(request)

    async def jobs(self, disk: str | None) -> list[Job]:
        if disk is not None:
            self._check(disk)
        return [job for job in await self._registry.jobs(disk) if self._covers(job.disk)]

    async def jobs_changed(self, disk: str | None, within_s: float) -> list[Job]:
        found = await self._registry.jobs_changed(disk, within_s)
        return [job for job in found if self._covers(job.disk)]

    async def job(self, job_id: str) -> Job:
        covers = None if self._rights is None else self._covers
        job = await self._registry.job(job_id, covers)
        if not self._covers(job.disk):
            raise self.refusal(job=job_id)
        return job

    async def steer(self, job_id: str, verb: str) -> Job:
        job = await self.job(job_id)
        self._asked(to=verb, disk=job.disk, job=job.id)
        return await self._registry.steer(job.id, verb)

    async def limit(self, job_id: str, request: LimitRequest) -> Job:
        job = await self.job(job_id)
        self._asked(disk=job.disk, job=job.id, limit=request.limit)
        return await self._registry.limit(job.id, request)

    async def metrics(self) -> bytes:
        return await self._registry.metrics(self._covers)

    def _covers(self, disk: str) -> bool:
        return self._rights is None or any(right.covers(disk) for right in self._rights)

    def _check(self, disk: str) -> None:
        if not self._covers(disk):
            raise self.refusal(disk=disk)

    def _root(self, location: str, disk: str | None = None) -> str | None:
        """Return the root below which a location has to stay. Raises RefusedError, UsageError."""
        if disk is not None:
            self._check(disk)
        location = check_location(location)
        if self._rights is None:
            return None
        rights = [right for right in self._rights if disk is None or right.covers(disk)]
        roots = sorted({root for right in rights for root in right.roots})
        root = root_of(location, roots)
        if root is None:
            raise self.refusal(f"it has to lie below {' or '.join(roots)}", location=location)
        return root

    def refusal(self, advice: str = _ADVICE, **about: str) -> RefusedError:
        """Return, and log, why this peer's request is refused."""
        verb = "read" if self._operation in READ else self._operation
        log.info("forbidden %s", fields(uid=self._uid, verb=verb, **about))
        what = "".join(f" of {kind} {name}" for kind, name in about.items())
        return RefusedError(
            "forbidden", f"user {self._uid} has no grant for {verb}{what}: {advice}"
        )

    def _asked(self, **about: object) -> None:
        """Log who changes what; what comes of it, the registry and the disk's process log."""
        log.info("asked %s", fields(uid=self._uid, verb=self._operation, **about))
