"""Every error mirrord raises on purpose, in one tree. The class says how to react.

    MirrordError                     has a message, a code for programs, an exit code
    ├── UsageError                   a malformed argument: nothing was asked of the daemon  (exit 2)
    ├── RefusedError                 well formed, but can't be done; nothing was changed    (exit 4)
    ├── NoDaemonError                nobody answers at the control socket                   (exit 5)
    ├── ProtocolError                the peer broke the protocol: drop its connection
    ├── DamagedError                 durable state can't be trusted: stop, touch nothing    (exit 4)
    └── SideError                    a backend failed while a job used it; has the cause's errno
        ├── SourceError              the job fails, the source stays, the guest gets the errno
        └── TargetError              fall back to the source, tell why, try again

A backend raises plain `OSError` with an errno; the engine, which knows the side, wraps it.
A guest's request fails with the errno of an `OSError` alone (see `nbd.wire` for what it becomes).
"""

from __future__ import annotations

import errno


class MirrordError(Exception):
    """The root. `str()` is one line that says what is wrong and what to do."""

    exit_code = 1
    code = "failed"


class UsageError(MirrordError):
    """A malformed argument: a rate, a name, a size."""

    exit_code = 2
    code = "usage"


class RefusedError(MirrordError):
    """A well-formed request that can't be done now. Nothing was created or changed.

    `code` names the reason for programs, such as `target-exists`; it never changes meaning.
    """

    exit_code = 4

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NoDaemonError(MirrordError):
    """No daemon answers at the control socket."""

    exit_code = 5
    code = "no-daemon"


class ProtocolError(MirrordError):
    """The peer sent what the protocol forbids; its connection can't be used further."""

    code = "protocol"


class DamagedError(MirrordError):
    """Durable state contradicts itself. Nothing was changed; an operator has to look."""

    exit_code = 4
    code = "damaged"


class SideError(MirrordError):
    """A backend failed under a running job, at `offset` where that is known."""

    def __init__(self, cause: OSError, doing: str, offset: int | None = None) -> None:
        self.errno = cause.errno or errno.EIO
        self.offset = offset
        where = "" if offset is None else f" at offset {offset}"
        super().__init__(f"{doing}{where}: {cause.strerror or cause}")


class SourceError(SideError):
    """The source failed: the job fails, nothing is deleted, the guest is told the errno."""

    code = "source-error"


class TargetError(SideError):
    """The target failed: the guest is served from the source; the job degrades or pauses."""

    code = "target-error"
