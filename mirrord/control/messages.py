"""What the control interface says: requests, answers and errors, as msgspec structs.

They are the JSON of HTTP bodies, of `--json` and of the daemon's talk with disk processes, so a
field is named once. Requests refuse unknown fields; a field is only ever added, never renamed.
No behaviour here, and nothing heavy is imported: disk processes use this module too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Limit = Annotated[int, msgspec.Meta(ge=0)]  # bytes a second; 0 is unlimited
CacheMode = Literal["writeback", "direct"]
VerifyMode = Literal["full", "none"]
CopyMode = Literal["auto", "passes", "mirror"]
CutoverMode = Literal["auto", "manual"]
DiskState = Literal["starting", "serving", "refused", "detached"]
PhaseName = Literal[
    "queued",
    "copying",
    "catching-up",
    "mirroring",
    "verifying",
    "cutting-over",
    "retiring",
    "done",
    "paused",
    "degraded",
    "cancelled",
    "failed",
]

TERMINAL_PHASES = frozenset({"done", "cancelled", "failed"})


class Uris(msgspec.Struct, frozen=True):
    """How a guest reaches a disk."""

    nbd: str | None = None
    fuse: str | None = None


class Snippets(msgspec.Struct, frozen=True):
    """Ready-to-paste ways to use the disk."""

    qemu: str
    libvirt: str
    nbd_client: str


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """The connection to a share on which a disk lies, or is going to."""

    server: str
    state: Literal["connected", "away", "failed"]
    reason: str | None = None  # why it is away, or has failed for good
    dialect: str | None = None
    signing: str | None = None
    encryption: str | None = None
    channels: int = 0
    handle: str | None = None  # plain, durable or persistent
    io_timeout_s: float = 0.0  # how long a guest's request waits for a server that is away
    unflushed_bytes: int = 0  # acknowledged, and kept to be written again after its restart
    weaknesses: list[str] = msgspec.field(default_factory=list)  # what its settings allow


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon that answers."""

    version: str
    state_dir: str  # where it keeps what has to survive a reboot
    runtime_dir: str  # where its sockets are, and those of its disks
    nbd_dir: str  # where disk NAME is served: at NAME.sock


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """One disk, as `ls` and `show` print it."""

    name: str
    state: DiskState
    reason: str | None  # why it is not serving
    location: str | None  # where its bytes are now; None when its record can't be read
    size: int | None  # bytes; None while no process has it open
    read_only: bool
    cache: CacheMode
    uris: Uris
    clients: int  # connections now
    job: str | None  # id of the unfinished job
    share: Share | None = None  # of the location, if it lies on one
    target_share: Share | None = None  # of the unfinished job's target
    snippets: Snippets | None = None
    version: str | None = None  # of its process; None while there is none, or it doesn't say


class Step(msgspec.Struct, frozen=True):
    """One phase of a job's story, or one pass."""

    time: str  # when it began
    phase: PhaseName
    text: str  # why it was entered
    predicted_s: float | None = None  # the first estimate of how long it will take; None: none
    took_s: float | None = None  # None while it is the last one


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One move of one disk, as `jobs` and `job` print it. Times are RFC 3339, in UTC."""

    id: str
    disk: str
    phase: PhaseName
    source: str
    target: str
    keep_source: bool = False
    verify: VerifyMode = "full"
    mode: CopyMode = "auto"
    cutover: CutoverMode = "auto"
    limit: int | None = None  # bytes a second; None is unlimited
    bytes_total: int = 0
    bytes_copied: int = 0
    bytes_remaining: int = 0
    copy_rate: float | None = None  # bytes a second
    dirty_rate: float | None = None  # unique bytes a second
    eta_s: float | None = None  # None: it will not finish by passes alone, or is not known
    passes: int = 0
    pause_ms: float | None = None  # None until the cutover
    verified: bool | None = None  # None until it is known; False: not asked for
    reason: str | None = None  # why it is in this phase
    created: str | None = None
    started: str | None = None
    ended: str | None = None
    story: list[Step] = msgspec.field(default_factory=list)

    @property
    def ended_already(self) -> bool:
        return self.phase in TERMINAL_PHASES


class AttachRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/disks"""

    name: str
    location: str
    cache: CacheMode = "writeback"
    read_only: bool = False


class MoveRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/disks/{name}/move"""

    target: str
    keep_source: bool = False
    verify: VerifyMode | None = None  # None: what the configuration says
    limit: Limit | None = None
    mode: CopyMode = "auto"
    cutover: CutoverMode = "auto"
    force: bool = False  # also when the target has too little room, or a reboot deletes it
    wipe: bool = False  # a source block device is overwritten with zeroes at the end


class CredentialTestRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/credential-test"""

    location: str


class CredentialTest(msgspec.Struct, frozen=True, kw_only=True):
    """What a server gives this configuration. A feature that could not be tried is None."""

    location: str
    server: str
    user: str | None
    dialect: str
    signing: str
    encryption: str
    weaknesses: list[str]
    channels: int  # connections of the session now
    addresses: list[str]  # that the server offers for more
    multichannel: bool
    continuously_available: bool
    read_bytes_max: int
    write_bytes_max: int
    available_bytes: int | None = None
    writable: bool
    durable_handle: bool | None = None
    persistent_handle: bool | None = None
    sparse: bool | None = None
    folder_flush: bool | None = None
    server_side_copy: bool | None = None
    flush_ms: float | None = None  # of one small write and its flush
    advice: list[str] = msgspec.field(default_factory=list)


class LimitRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PATCH /v1/jobs/{id}"""

    limit: Limit | None


class Problem(msgspec.Struct, frozen=True):
    """Every answer that is not a success; `code` never changes meaning."""

    code: str
    message: str


class RequestCount(msgspec.Struct, frozen=True):
    """Guests' requests of one kind, as `frontends.counters.Count` has them."""

    buckets: list[int]
    seconds: float
    bytes: int
    errors: int


class DiskStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a disk process tells the daemon about itself."""

    name: str
    location: str
    size: int
    read_only: bool
    cache: CacheMode
    clients: int
    job: Job | None  # unfinished, or the last one that ended since the process started
    share: Share | None = None
    target_share: Share | None = None
    version: str | None = None
    requests: dict[str, RequestCount] = msgspec.field(default_factory=dict)  # by kind
    stalled_s: float = 0.0  # for so long guests have had no answer at all
    opened: tuple[int, int] | None = None  # device and inode, 0 of a block device; of local ones


class Call(msgspec.Struct, frozen=True):
    """One request of the daemon to a disk process: one line on the private channel."""

    id: int
    verb: str
    params: dict[str, Any] = msgspec.field(default_factory=dict)


class Reply(msgspec.Struct, frozen=True):
    """The answer to the call of the same id; without an id it is news (a job that changed)."""

    id: int | None = None
    ok: msgspec.Raw = msgspec.Raw(b"null")
    error: Problem | None = None


class Report(msgspec.Struct, frozen=True):
    """What a starting disk process writes once: it is ready, or why it refuses to serve."""

    refused: Problem | None = None
    unreachable: Problem | None = None  # not now: to be tried again
