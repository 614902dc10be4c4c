"""Trying a share's settings: logs on as a disk process would, and says what the server gives.

    python -m mirrord.service.share_test --smb SECTIONS LOCATION

runs in a process of its own, so that the daemon neither loads what talks to servers nor ever has
a secret; `ask` starts it. It writes one JSON document to its standard output: an `Outcome`.

What can only be found out with a file is tried with one, `.mirrord-test-…` in the location's
folder, which is gone afterwards; where that may not be made, the share is for reading.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import sys
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from mirrord.control.messages import CredentialTest, Problem
from mirrord.errors import MirrordError, RefusedError, UsageError
from mirrord.service.shares import (
    ShareConfig,
    decode_shares,
    encode_shares,
    find_share,
    weaknesses,
)
from mirrord.smb.location import ShareLocation, parse_location

if TYPE_CHECKING:
    from mirrord.storage.smb.desk import Desk

# Connecting, logging on, and a file: each has its own deadline below this.
TEST_DEADLINE_S = 60.0
COPY_BYTES = 65536


class Outcome(msgspec.Struct, frozen=True):
    """What the process found, or what is wrong."""

    found: CredentialTest | None = None
    problem: Problem | None = None


async def ask(location: str, shares: Mapping[str, ShareConfig]) -> CredentialTest:
    """Try a location in a process of its own. Raises UsageError, RefusedError, MirrordError."""
    if not location.startswith("smb://"):
        raise UsageError(f"{location!r} is not on a share: smb://[user@]server[:port]/share/path")
    at = parse_location(location)
    find_share(shares, at.host, at.port, at.share)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "mirrord.service.share_test"),
        *("--smb", encode_shares(shares), str(at)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
        cwd="/",
    )
    try:
        async with asyncio.timeout(TEST_DEADLINE_S):
            text, _ = await process.communicate()
    except TimeoutError as error:
        raise RefusedError(
            "unreachable", f"{at.server} has not answered within {TEST_DEADLINE_S:.0f} s"
        ) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if not text:
        raise MirrordError("the process that tests credentials died; the daemon's log says why")
    outcome = msgspec.json.decode(text, type=Outcome)
    if outcome.problem is not None:
        raise RefusedError(outcome.problem.code, outcome.problem.message)
    assert outcome.found is not None
    return outcome.found


async def examine(location: str, shares: Mapping[str, ShareConfig]) -> CredentialTest:
    """Log on and look. Raises RefusedError, DeniedError, LostError."""
    from mirrord.service.share_login import login_of, make_server
    from mirrord.storage.remote import LostError
    from mirrord.storage.smb.desk import Desk

    at = parse_location(location)
    config = find_share(shares, at.host, at.port, at.share)
    server = make_server(at, config)
    trial = f"{at.path if at.is_folder else at.folder}/.mirrord-test-{uuid.uuid4()}".lstrip("/")

    async def desk() -> Desk:
        session = await server.session()
        return Desk(session, await session.tree(at.share))

    server.use()
    try:
        first = await desk()
        found = _start(at, config, first.session.facts(), login_of(config, at.user).user)
        try:
            found |= await _look(first, at, trial)
        except LostError:
            await _remove(await desk(), trial)
            raise
        found["advice"] = _advice(found, config)
    except LostError as error:
        raise RefusedError("unreachable", error.strerror or "the server is away") from error
    finally:
        await server.close()
    return msgspec.convert(found, type=CredentialTest)


async def _remove(desk: Desk, path: str) -> None:
    """Remove the file of a test whose connection broke, by another one."""
    from mirrord.storage.smb import control

    with contextlib.suppress(FileNotFoundError):
        handle = await desk.ask(control.open_handle, path, control.REMOVE, delete=True)
        await desk.ask(control.close, handle)


def _start(
    at: ShareLocation, config: ShareConfig, facts: dict[str, object], user: str | None
) -> dict[str, Any]:
    kept = {key: facts[key] for key in ("dialect", "signing", "encryption", "channels")}
    return {
        "location": str(at),
        "server": at.server,
        "user": user,
        "weaknesses": weaknesses(config),
        **kept,
    }


async def _look(desk: Desk, at: ShareLocation, trial: str) -> dict[str, Any]:
    """Return what the server says of itself, and what the file `trial` shows."""
    from mirrord.storage.remote import LostError
    from mirrord.storage.smb import control

    share = desk.tree.share
    connection = share.session.connection
    said: dict[str, Any] = {
        "multichannel": bool(connection.supports_multi_channel),
        "addresses": [],
        "continuously_available": bool(share.is_ca_share),
        "read_bytes_max": connection.max_read_size,
        "write_bytes_max": connection.max_write_size,
        "writable": False,
    }
    if said["multichannel"]:
        with contextlib.suppress(OSError):
            said["addresses"] = await desk.ask(control.interfaces)
    folder = at.path if at.is_folder else at.folder
    try:
        handle = await desk.ask(
            control.open_handle, folder, control.LOOK, share=control.SHARED, folder=True
        )
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        raise RefusedError(
            "directory-missing", f"there is no folder {folder} on {at.server}/{at.share}: create it"
        ) from error
    with contextlib.suppress(OSError):
        said["available_bytes"] = await desk.ask(control.available_bytes, handle)
    await desk.ask(control.close, handle)
    try:
        said |= await _try_a_file(desk, trial)
    except LostError:
        raise
    except OSError:
        pass  # `writable` says it: this user makes no files there
    return said


async def _try_a_file(desk: Desk, path: str) -> dict[str, Any]:
    """Find out with a new file what is granted; it is deleted at the end."""
    from mirrord.storage.smb import control

    handle = await desk.ask(control.open_handle, path, control.WRITE, create=True, durable=True)
    try:
        found: dict[str, Any] = {
            "writable": True,
            "durable_handle": handle.durable,
            "persistent_handle": handle.persistent,
            "sparse": await desk.ask(control.make_sparse, handle),
        }
        await desk.ask(control.set_size, handle, 2 * COPY_BYTES)
        began = time.monotonic()
        await desk.ask(control.probe_end, handle, COPY_BYTES)
        await desk.ask(control.flush, handle)
        found["flush_ms"] = round((time.monotonic() - began) * 1000, 2)
        found["server_side_copy"] = await desk.ask(control.try_copy, handle, COPY_BYTES)
        found["folder_flush"] = await _flushes_folder(desk, path.rpartition("/")[0])
    finally:
        await desk.ask(control.dispose, handle)
        await desk.ask(control.close, handle)
    return found


async def _flushes_folder(desk: Desk, folder: str) -> bool:
    from mirrord.storage.smb import control

    access = control.LOOK | control.ADD_FILE
    handle = await desk.ask(control.open_handle, folder, access, share=control.SHARED, folder=True)
    try:
        await desk.ask(control.flush, handle)
    except OSError:
        return False
    finally:
        await desk.ask(control.close, handle)
    return True


def _advice(found: dict[str, Any], config: ShareConfig) -> list[str]:
    """Return what an administrator may want to change, the most important first."""
    advice = [f"this share is allowed to be weak: {weak}" for weak in found["weaknesses"]]
    if not found["writable"]:
        advice.append("this user can't create files there: a disk can only be read from it")
        return advice
    if not found["durable_handle"]:
        advice.append(
            "the server keeps no durable handle: after a broken connection the file is opened "
            "anew and compared before the guest goes on"
        )
    if not found["sparse"]:
        advice.append("files there have no holes: a sparse disk takes its whole size")
    if len(found["addresses"]) > 1 and config.channels == 1:
        advice.append('the server offers several channels: `channels = "auto"` uses them')
    if found["encryption"] not in ("none", "AES-128-GCM", "AES-256-GCM"):
        advice.append(f"{found['encryption']} costs about twice as much as AES-GCM")
    advice.append(
        "whether the server's flush reaches its disk can't be seen from here: on Samba it needs "
        "`strict sync = yes`, the default"
    )
    return advice


def main() -> int:
    """Examine one location and write the outcome."""
    from mirrord.storage.remote import DeniedError

    parser = argparse.ArgumentParser(prog="mirrord.service.share_test", allow_abbrev=False)
    parser.add_argument("--smb", required=True)
    parser.add_argument("location")
    options = parser.parse_args()
    try:
        outcome = Outcome(asyncio.run(examine(options.location, decode_shares(options.smb))))
    except DeniedError as error:
        outcome = Outcome(problem=Problem(error.code, error.strerror or error.code))
    except MirrordError as error:
        outcome = Outcome(problem=Problem(error.code, str(error)))
    except OSError as error:
        outcome = Outcome(problem=Problem("share-error", error.strerror or str(error)))
    os.write(sys.stdout.fileno(), msgspec.json.encode(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
