"""What is mounted here, and what a mounted SMB share is good for.

A share that the kernel mounted (cifs, smb3) is a path like any other, and usable. `advise` says
for each whether the mount or `smb://server/share/…` serves a disk better, and why: by what the
kernel shows of the mount's options (cifs_show_options in its fs/smb/client/cifsfs.c).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from mirrord.errors import RefusedError
from mirrord.service.shares import DEFAULT_PORT, ShareConfig, find_share

MOUNTINFO = Path("/proc/self/mountinfo")
SHARE_KINDS = {"cifs", "smb3"}

_SOURCE = re.compile(r"[/\\]{2}([^/\\]+)[/\\]([^/\\]+)(.*)", re.DOTALL)
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


class Mount(NamedTuple):
    """One line of mountinfo. An option without a value has the value ""."""

    root: str  # what of the file system is mounted: "/", or a folder of it
    point: str
    kind: str
    source: str
    options: dict[str, str]


class ShareMount(msgspec.Struct, frozen=True):
    """A mounted share, and what serves a disk on it better."""

    mount: str
    source: str
    location: str  # the same place as mirrord reaches it itself
    better: Literal["mount", "smb"]
    level: Literal["ok", "advice"]
    advice: str
    why: list[str]


def read_mounts(path: Path = MOUNTINFO) -> list[Mount]:
    """Return what is mounted, in order; nothing where the kernel doesn't tell."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        mounted, _, rest = line.partition(b" - ")
        fields, (kind, source, *more) = mounted.split(b" "), (rest + b"  ").split(b" ")[:3]
        if len(fields) < 6:
            continue
        options = fields[5] + b"," + b"".join(more)
        pairs = (one.partition("=") for one in _plain(options).split(",") if one)
        values = {key: value for key, _, value in pairs}
        root, point = map(_plain, fields[3:5])
        found.append(Mount(root, point, _plain(kind), _plain(source), values))
    return found


def _plain(field: bytes) -> str:
    """Return a field without its escapes: a space is \\040."""
    return os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), field))


def mount_of(path: Path, mounts: Sequence[Mount]) -> Mount | None:
    """Return the mount that a path lies on, whether the path exists or not."""
    place = os.path.realpath(path)
    best: Mount | None = None
    for mount in mounts:
        within = place == mount.point or place.startswith(mount.point.rstrip("/") + "/")
        if within and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def advise(mounts: Sequence[Mount], shares: Mapping[str, ShareConfig]) -> list[ShareMount]:
    """Return each mounted share with advice. `shares` are those that have a usable credential."""
    found = []
    for mount in mounts:
        parts = _SOURCE.fullmatch(mount.source)
        if mount.kind not in SHARE_KINDS or parts is None:
            continue
        host, share = parts[1].strip("[]").lower(), parts[2]
        below = parts[3].replace("\\", "/").rstrip("/")
        if mount.root != "/" and not below.endswith(mount.root):
            below += mount.root
        port = mount.options.get("port", "")
        number = int(port) if port.isdecimal() else DEFAULT_PORT
        shown = f"[{host}]" if ":" in host else host
        shown += "" if number == DEFAULT_PORT else f":{number}"
        location = f"smb://{shown}/{share}{below}/"
        try:
            config = find_share(shares, host, number, share)
        except RefusedError:
            config = None
        reasons = _needs_the_mount(mount, mounts)
        section = f'[smb."{shown}/{share}"]'
        found.append(_advise_one(mount, location, section, config, reasons))
    return found


def _advise_one(
    mount: Mount, location: str, section: str, config: ShareConfig | None, reasons: list[str]
) -> ShareMount:
    against = _against_the_mount(mount.options)
    if reasons:
        advice = "use the mount, as a plain path"
        if "soft" in mount.options:
            advice += ", and mount it with hard instead of soft"
        level: Literal["ok", "advice"] = "advice" if "soft" in mount.options else "ok"
        why = reasons + [f"but {reason}" for reason in against]
        return ShareMount(mount.point, mount.source, location, "mount", level, advice, why)
    if config is None:
        missing = f"mirrord has no section {section} whose credential can be read"
        advice = f"use the mount for now; with such a section {location} serves better"
        why = [missing, *against]
        return ShareMount(mount.point, mount.source, location, "mount", "advice", advice, why)
    advice = f"use {location} rather than the mount"
    why = against + _same_by_smb(mount.options, config)
    return ShareMount(mount.point, mount.source, location, "smb", "advice", advice, why)


def _needs_the_mount(mount: Mount, mounts: Sequence[Mount]) -> list[str]:
    """Return what the kernel's client can do here, and mirrord can't."""
    reasons = []
    if "rdma" in mount.options:
        reasons.append("RDMA (SMB Direct): mirrord speaks SMB by TCP alone")
    if any(key.startswith("dfs") for key in mount.options) or _is_referral(mount, mounts):
        reasons.append("DFS: mirrord doesn't follow referrals to other servers")
    return reasons


def _is_referral(mount: Mount, mounts: Sequence[Mount]) -> bool:
    """Tell whether the kernel mounted it by itself inside a share: a link of DFS."""
    above = mount_of(Path(mount.point).parent, [m for m in mounts if m is not mount])
    return above is not None and above.kind in SHARE_KINDS and above.source != mount.source


def _against_the_mount(options: Mapping[str, str]) -> list[str]:
    """Return what a disk on this mount lacks, the worst first."""
    why = [
        "through a mount mirrord can't see that the server restarted and forgot writes that "
        "weren't flushed: they are lost silently"
    ]
    if "soft" in options:
        why.append("soft: a server that is away for long becomes an I/O error of the guest")
    else:
        why.append("hard: a server that is away hangs requests, with no end that mirrord could set")
    cache = options.get("cache", "strict")
    if cache == "loose":
        why.append("cache=loose: reads may be older than what the server has, verification's too")
    elif cache != "none":
        why.append(f"cache={cache}: verification can't be sure to read past this host's cache")
    why.append("no copy inside the server when a disk moves between two of its shares")
    why += _unprotected(options)
    if "persistenthandles" not in options and "resilienthandles" not in options:
        why.append("no persistenthandles: open files may not survive the server's restart")
    return why


def _unprotected(options: Mapping[str, str]) -> list[str]:
    dialect = options.get("vers", "")
    if dialect.startswith(("1", "2")):
        return [f"vers={dialect}: it can't encrypt"]
    if "seal" in options:
        return []
    signed = "sign" in options or "signing" in options or options.get("sec", "").endswith("i")
    state = "signed but not encrypted" if signed else "neither encrypted nor signed for sure"
    return [f"no seal: {state}, unless the server insists"]


def _same_by_smb(options: Mapping[str, str], config: ShareConfig) -> list[str]:
    """Say how to get by smb:// what the mount has."""
    wanted = options.get("max_channels", "2" if "multichannel" in options else "1")
    channels = int(wanted) if wanted.isdecimal() else 1
    if channels > 1 and config.channels != "auto" and config.channels < channels:
        return [
            f"multichannel: the mount has {channels} channels; write channels = {min(channels, 8)} "
            "into the section for as many"
        ]
    return []
