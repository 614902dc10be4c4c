"""What the control interface offers, as a table: the server's routes and `/v1/openapi.json`.

OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0); the schemas are those of the messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

import mirrord
from mirrord.control.messages import (
    AttachRequest,
    CredentialTest,
    CredentialTestRequest,
    Disk,
    Job,
    LimitRequest,
    MoveRequest,
    Problem,
    Service,
)

STEERING = ("pause", "resume", "cancel", "cutover")

_JSON = "application/json"
_TEXT = {"type": "string"}
_PARAMETERS: dict[str, dict[str, Any]] = {
    "name": _TEXT,
    "id": _TEXT,
    "verb": {"type": "string", "enum": list(STEERING)},
    "force": {"type": "boolean", "default": False},
    "disk": _TEXT,
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `name` is the handler's, `answer` None where it isn't JSON."""

    name: str
    method: str
    path: str
    summary: str
    answer: Any
    status: int = 200
    body: type | None = None
    query: tuple[str, ...] = ()
    media: str = _JSON

    @property
    def parameters(self) -> list[str]:
        """Return the names in the path, in order."""
        parts = self.path.split("/")
        return [part[1:-1] for part in parts if part.startswith("{")]


OPERATIONS = (
    Operation("service", "GET", "/v1/service", "The daemon, and where it keeps things.", Service),
    Operation("disks", "GET", "/v1/disks", "Every disk, by name.", list[Disk]),
    Operation("attach", "POST", "/v1/disks", "Serve a location as a disk.", Disk, 201,
              AttachRequest),
    Operation("disk", "GET", "/v1/disks/{name}", "One disk.", Disk),
    Operation("detach", "DELETE", "/v1/disks/{name}", "Stop serving a disk.", Disk,
              query=("force",)),
    Operation("upgrade", "POST", "/v1/disks/{name}/upgrade",
              "Replace the disk's process by one of the daemon's version, if it is of another.",
              Disk, query=("force",)),
    Operation("move", "POST", "/v1/disks/{name}/move", "Move a disk.", Job, 202, MoveRequest),
    Operation("test_credential", "POST", "/v1/credential-test",
              "Log on to a share; what its server gives.", CredentialTest,
              body=CredentialTestRequest),
    Operation("jobs", "GET", "/v1/jobs", "Every move, or a disk's, newest first.", list[Job],
              query=("disk",)),
    Operation("job", "GET", "/v1/jobs/{id}", "One move, by its id or the beginning of it.", Job),
    Operation("limit", "PATCH", "/v1/jobs/{id}", "Change a move's bandwidth limit.", Job,
              body=LimitRequest),
    Operation("steer", "POST", "/v1/jobs/{id}/{verb}", "Pause, resume, cancel or cut over.", Job),
    Operation("events", "GET", "/v1/events",
              "The moves that are under way, then each as it changes: server-sent events named "
              "`job`, whose data is a Job.", None, query=("disk",), media="text/event-stream"),
    Operation("metrics", "GET", "/metrics", "Everything that is counted, for Prometheus.", None,
              media="text/plain"),
    Operation("openapi", "GET", "/v1/openapi.json", "This document.", None),
)  # fmt: skip


def openapi() -> dict[str, Any]:
    """Return the document."""
    kinds = {kind for each in OPERATIONS for kind in (each.answer, each.body) if kind is not None}
    ordered = sorted(kinds | {Problem}, key=str)
    schemas, components = msgspec.json.schema_components(
        ordered, ref_template="#/components/schemas/{name}"
    )
    of = dict(zip(map(str, ordered), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method.lower()] = _described(each, of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mirrord",
            "version": mirrord.__version__,
            "description": "Live moves of virtual disks, over a unix socket.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }


def _described(each: Operation, of: dict[str, Any]) -> dict[str, Any]:
    schema = _TEXT if each.answer is None else of[str(each.answer)]
    if each.answer is None and each.media == _JSON:
        schema = {"type": "object"}
    failed = {"description": "Why not.", "content": {_JSON: {"schema": of[str(Problem)]}}}
    told: dict[str, Any] = {
        "operationId": each.name,
        "summary": each.summary,
        "parameters": [
            *(_parameter(name, "path") for name in each.parameters),
            *(_parameter(name, "query") for name in each.query),
        ],
        "responses": {
            str(each.status): {
                "description": each.summary,
                "content": {each.media: {"schema": schema}},
            },
            "4XX": failed,
            "5XX": failed,
        },
    }
    if each.body is not None:
        told["requestBody"] = {
            "required": True,
            "content": {_JSON: {"schema": of[str(each.body)]}},
        }
    return told


def _parameter(name: str, place: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "schema": _PARAMETERS[name],
    }
