"""What `mirrord doctor` looks at: the configuration, the state directory, shares, libraries.

Each check is one function that changes nothing. None raises, and none waits for long: storage
that hangs is a finding (`look_at_all`). Heavy modules are only imported when the configuration asks
for what they are needed for.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from mirrord.core.units import format_rate
from mirrord.errors import MirrordError, RefusedError
from mirrord.service.config import Config, default_config_file, read_config
from mirrord.service.credentials import DIRECTORY_VARIABLE, load
from mirrord.service.mounts import Mount, mount_of
from mirrord.service.shares import ShareConfig, weaknesses

VOLATILE = {"tmpfs", "ramfs"}
REMOTE = {"nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "glusterfs", "afs"}
UNIT_CREDENTIALS = "/run/credentials/mirrord.service"  # where systemd puts the unit's

# AES-128-GCM of 16 zeroes with the key and the nonce zero: test case 2 of the mode's definition.
_GCM_ANSWER = "0388dace60b6a392f328c2b971b2fe78ab6e47d42cec13bdf53a67b21257bddf"
_GCM_PROBE_BYTES = 1 << 20
_GCM_RATE_MIN = 256 << 20  # below this the processor has no instructions for it


LOOK_DEADLINE_S = 5.0

Level = Literal["ok", "advice", "problem"]
T = TypeVar("T")


class Check(msgspec.Struct, frozen=True):
    """What was looked at, how it is, and what to do about it."""

    name: str
    level: Level
    text: str
    advice: str = ""


def look_at_all(look: Callable[[Path], T], places: Iterable[Path]) -> dict[Path, T | OSError]:
    """Return what `look` says of each place, all at once; a TimeoutError where it hangs.

    A look that hangs is left behind in its thread.
    """
    looks = {place: _begun(look, place) for place in places}
    wait(looks.values(), LOOK_DEADLINE_S)
    said: dict[Path, T | OSError] = {}
    for place, future in looks.items():
        try:
            said[place] = future.result(0)
        except TimeoutError:
            said[place] = TimeoutError(f"no answer within {LOOK_DEADLINE_S:.0f} s")
        except OSError as error:
            said[place] = error
    return said


def look_at(look: Callable[[Path], T], place: Path) -> T:
    """Return what `look` says of a place. Raises OSError, TimeoutError where it hangs."""
    said = look_at_all(look, [place])[place]
    if isinstance(said, OSError):
        raise said
    return said


def _begun(look: Callable[[Path], T], place: Path) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(look(place))
        except BaseException as error:
            future.set_exception(error)

    # No executor: its threads are waited for at the end. These may stay for ever.
    threading.Thread(target=run, daemon=True).start()
    return future


def check_state(directory: Path, mounts: Sequence[Mount]) -> Check:
    """Look at the storage of the state directory: what is there has to survive a reboot."""
    mount = mount_of(directory, mounts)
    if mount is None:
        return Check("state", "advice", f"{directory}: its file system is unknown")
    text = f"{directory} is on {mount.kind}"
    if mount.kind in VOLATILE:
        return Check(
            "state",
            "problem",
            f"{text}, which a reboot empties: moves would be forgotten half-way",
            "set state_dir to a directory on a disk",
        )
    if mount.kind in REMOTE or mount.kind.startswith("fuse"):
        return Check(
            "state",
            "advice",
            f"{text}, which may be away when it is needed",
            "set state_dir to a local disk: every disk waits for its journal",
        )
    if mount.kind == "overlay":
        return Check(
            "state",
            "advice",
            f"{text}: it goes when the container goes",
            "set state_dir to a volume, unless this is the host's own root",
        )
    return Check("state", "ok", text)


def check_config(path: Path | None) -> tuple[Config, Check]:
    """Read the configuration; where it is wrong, go on with the defaults."""
    file = path or default_config_file()
    try:
        config = read_config(path)
        config.control_access()
        config.nbd_access()
    except MirrordError as error:
        return Config(), Check(
            "config", "problem", str(error), "correct it: the daemon doesn't start with it"
        )
    if path is None and not file.exists():
        return config, Check("config", "ok", f"no {file}: the defaults hold")
    return config, Check("config", "ok", f"{file} is valid")


def check_credential(section: str, config: ShareConfig, environ: Mapping[str, str]) -> Check:
    """Look whether the credential of a share can be read. What it is isn't looked at."""
    name = f"credential {section}"
    if DIRECTORY_VARIABLE not in environ and os.access(UNIT_CREDENTIALS, os.X_OK):
        environ = {**environ, DIRECTORY_VARIABLE: UNIT_CREDENTIALS}
    is_named = not config.kerberos and not config.credential.startswith("/")
    if is_named and DIRECTORY_VARIABLE not in environ:
        return Check(
            name,
            "advice",
            f"{config.credential} can only be read by the service: "
            f"${DIRECTORY_VARIABLE} is not set here",
            f"see that the unit has LoadCredential={config.credential}:PATH",
        )
    try:
        found = load(config, environ)
    except RefusedError as error:
        if error.code == "credential-no-user":
            return Check(
                name,
                "advice",
                "it names no user",
                f"set user in the section, or write smb://USER@{section.partition('/')[0]}/…",
            )
        return Check(name, "problem", str(error), "the share can't be used until then")
    except OSError as error:
        return Check(name, "problem", f"it can't be read: {error.strerror}", "look at its storage")
    if found.kerberos:
        whose = found.account or "the default principal"
        return Check(name, "ok", f"Kerberos, for {whose}")
    return Check(name, "ok", f"{config.credential} is there, for user {found.account}")


def check_strength(section: str, config: ShareConfig) -> Check:
    """Look at what the section allows that it shouldn't have to."""
    weak = weaknesses(config)
    name = f"share {section}"
    if not weak:
        return Check(
            name,
            "ok",
            "only encrypted and signed, by SMB 3.1.1, and not asked here: 'mirrord credential test "
            "smb://…' logs on",
        )
    return Check(
        name,
        "advice",
        ", ".join(weak),
        "leave encryption, signing and min_dialect at their defaults if the server can",
    )


def check_libraries(shares: Mapping[str, ShareConfig]) -> list[Check]:
    """Look whether what the configured shares need can be imported; nothing without shares."""
    if not shares:
        return []
    found = [_check_import("smbprotocol", "pip install smbprotocol"), _check_aes_gcm()]
    if any(config.kerberos for config in shares.values()):
        advice = "pip install 'smbprotocol[kerberos]' (it needs libkrb5-dev and a compiler)"
        found += [_check_import(module, advice) for module in ("gssapi", "krb5")]
    return found


def _import(module: str) -> Any:
    return importlib.import_module(module)


def _check_import(module: str, advice: str) -> Check:
    try:
        _import(module)
        version = metadata.version(module)
    except Exception as error:  # a library built for another one raises what it likes
        return Check(module, "problem", f"{module} can't be imported: {error}", advice)
    return Check(module, "ok", f"{module} {version}")


def _check_aes_gcm() -> Check:
    """Try what encrypts shares, with a known answer, and measure it."""
    try:
        cipher = _import("cryptography.hazmat.primitives.ciphers.aead").AESGCM(bytes(16))
        backend = _import("cryptography.hazmat.backends.openssl").backend
        library = f"{backend.openssl_version_text()} by cryptography"
        right = cipher.encrypt(bytes(12), bytes(16), None).hex() == _GCM_ANSWER
        rate = _measure(cipher)
    except Exception as error:
        return Check(
            "cryptography", "problem", f"AES-GCM can't be used: {error}", "pip install cryptography"
        )
    if not right:
        return Check(
            "cryptography", "problem", f"{library}: AES-GCM answers wrong", "install it anew"
        )
    text = f"{library}: AES-GCM, {format_rate(rate)}"
    if rate < _GCM_RATE_MIN:
        return Check(
            "cryptography",
            "advice",
            text,
            "shares won't be quicker; let the virtual machine have the processor's aes flag",
        )
    return Check("cryptography", "ok", text)


def _measure(cipher: Any) -> float:
    """Return bytes a second, the best of a few."""
    data = bytes(_GCM_PROBE_BYTES)
    best_s = float("inf")
    for number in range(1, 5):
        began_s = time.perf_counter()
        cipher.encrypt(number.to_bytes(12, "big"), data, None)
        best_s = min(best_s, time.perf_counter() - began_s)
    return _GCM_PROBE_BYTES / best_s
