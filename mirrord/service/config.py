"""The configuration file, mirrord.toml. Every key has a default; the file itself may be missing.

An unknown key or a wrong value is told with the file, the line and what is expected, and nothing
starts: a setting that was misspelt must not be ignored.
"""

from __future__ import annotations

import grp
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from mirrord.control.messages import VerifyMode
from mirrord.control.sockets import Access
from mirrord.errors import RefusedError, UsageError
from mirrord.service.grants import Grant, GrantError, Right, resolve
from mirrord.service.shares import SectionError, ShareConfig, check_sections, encode_shares

Positive = Annotated[int, msgspec.Meta(ge=1)]
Mode = Annotated[str, msgspec.Meta(pattern="^0?[0-7]{3}$")]
Command = list[str]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class NbdConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """[nbd]: what one disk grants its clients. The defaults are those of `nbd.limits`."""

    handshake_s: Seconds | None = None
    connections_max: Positive | None = None
    clients_max: Positive | None = None
    requests_max: Positive | None = None
    held_bytes_max: Positive | None = None
    held_total_bytes_max: Positive | None = None
    stall_s: Seconds | None = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    state_dir: str | None = None
    runtime_dir: str | None = None
    socket: str | None = None
    socket_mode: Mode = "0600"  # of the control socket
    socket_group: str | None = None
    nbd_socket_mode: Mode = "0600"  # of the guests' sockets: QEMU's user has to get in
    nbd_socket_group: str | None = None
    max_moves: Positive | None = None  # moves at once; None is unlimited
    verify: VerifyMode = "full"  # of a move that doesn't say
    on_done: Command = []  # run when a move is done, with its JSON on standard input
    on_failed: Command = []
    keep_jobs: Positive = 1000  # ended ones that are remembered: so many, and so long
    keep_jobs_days: Positive = 3650
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    nbd: NbdConfig = NbdConfig()
    smb: dict[str, ShareConfig] = {}  # by host/share; what isn't here is never connected to
    grant: list[Grant] = []  # beside root and the daemon's own user, who may do everything

    def rights(self) -> tuple[Right, ...]:
        """Return what the grants mean on this system now. Raises UsageError."""
        return resolve(self.grant, self.smb)

    def control_access(self) -> Access:
        """Return who may connect to the control socket. Raises UsageError for an unknown group."""
        return Access(int(self.socket_mode, 8), _group_id("socket_group", self.socket_group))

    def nbd_access(self) -> Access:
        """Return who may connect to disks. Raises UsageError for an unknown group."""
        return Access(
            int(self.nbd_socket_mode, 8), _group_id("nbd_socket_group", self.nbd_socket_group)
        )

    def disk_options(self) -> list[str]:
        """Return the options by which a disk process learns what concerns it."""
        limits = msgspec.json.encode(self.nbd).decode()
        shares = encode_shares(self.smb)
        return ["--log-level", self.log_level, "--smb", shares, "--nbd-limits", limits]


def _group_id(key: str, name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise UsageError(f"{key}: there is no group {name} on this system") from error


def default_state_dir() -> Path:
    """Return what systemd gives the service; /var/lib/mirrord for root, else one of the user's."""
    if given := os.environ.get("STATE_DIRECTORY"):  # systemd.exec(5)
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/mirrord")
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home) / "mirrord"


def default_runtime_dir() -> Path:
    """Return what systemd gives the service; /run/mirrord for root, else one of the user's.

    Raises RefusedError (`directory-not-ours`).
    """
    if given := os.environ.get("RUNTIME_DIRECTORY"):  # systemd.exec(5)
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/mirrord")
    base = os.environ.get("XDG_RUNTIME_DIR") or _runtime_below_tmp()
    return Path(base) / "mirrord"


def _runtime_below_tmp() -> str:
    """Return the user's folder in /tmp, where anybody may have made one of that name before."""
    path = f"/tmp/mirrord-{os.geteuid()}"
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return path
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
        raise RefusedError(
            "directory-not-ours",
            f"{path} was made by another user: have it removed, or set XDG_RUNTIME_DIR",
        )
    return path


def default_socket() -> Path:
    """Return where a client looks for the daemon."""
    return default_runtime_dir() / "control.sock"


def default_config_file() -> Path:
    """Return the file that is read when none is named and it exists."""
    if os.geteuid() == 0:
        return Path("/etc/mirrord/mirrord.toml")
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "mirrord" / "mirrord.toml"


def read_config(path: Path | None) -> Config:
    """Read the file, or the default one where that exists.

    Raises UsageError (wrong content), RefusedError (`config-unreadable`).
    """
    named = path is not None
    file = path or default_config_file()
    try:
        text = file.read_bytes()
    except FileNotFoundError as error:
        if not named:
            return Config()
        raise RefusedError("config-unreadable", f"there is no file {file}") from error
    except OSError as error:
        raise RefusedError("config-unreadable", f"can't read {file}: {error.strerror}") from error
    try:
        config = msgspec.toml.decode(text, type=Config)
        check_sections(config.smb)
        _check_programs(file, text.decode(), config)
        if config.rights():
            _refuse_writable(file)
        return config
    except GrantError as error:
        line = _line_of_grant(text.decode(), error.number, error.key)
        raise UsageError(f"{file}{line}: {error}") from error
    except SectionError as error:
        line = _line_of_section(text.decode(), error.section)
        raise UsageError(f"{file}{line}: {error}") from error
    except msgspec.ValidationError as error:
        raise UsageError(_explain(file, text.decode(), str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not TOML: {error}") from error


def _check_programs(file: Path, text: str, config: Config) -> None:
    """Refuse what could never be run: it would be noticed when it is needed."""
    for key in ("on_done", "on_failed"):
        command: list[str] = getattr(config, key)
        if any("\0" in word for word in command):
            raise UsageError(f"{file}{_line_of(text, key)}: {key}: a word has a NUL character")
        if command and not _can_run(command[0]):
            raise UsageError(
                f"{file}{_line_of(text, key)}: {key}: {command[0]} is no program: give the "
                "absolute path of one that may be executed"
            )


def _refuse_writable(file: Path) -> None:
    """Refuse grants in a file that somebody else could give himself more in."""
    status = file.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise RefusedError(
            "config-writable",
            f"{file} has a [[grant]] and can be written by others than root and this user: "
            f"chown it, and chmod go-w {file}",
        )


def _can_run(program: str) -> bool:
    return program.startswith("/") and os.access(program, os.X_OK)


def _explain(file: Path, text: str, error: str) -> str:
    """Say where and what: msgspec names the key or the path to it."""
    if "`$.smb[...]" in error:
        return _explain_share(file, text, error)
    if "`$.grant" in error:
        return _explain_grant(file, text)
    key = re.search(r"unknown field `([^`]+)`", error)
    place = re.search(r"`\$\.?([\w.]*)`", error)
    path = place[1] if place else ""
    section = Config if not path or key is None else NbdConfig
    if key is None:
        name = path.rpartition(".")[2]
        return f"{file}{_line_of(text, name)}: {path}: {error.split(' - at ')[0]}"
    known = ", ".join(section.__struct_fields__)
    where = f" in [{path}]" if path else ""
    return f"{file}{_line_of(text, key[1])}: unknown key {key[1]}{where}; known are: {known}"


def _explain_share(file: Path, text: str, error: str) -> str:
    """Say where and what is wrong in a section [smb."…"]: msgspec doesn't name the section."""
    section, values, error = _wrong_share(text, error)
    place, header = f'[smb."{section}"]', _line_of_section(text, section)
    problem, _, path = error.partition(" - at `$.")
    missing = re.search(r"required field `([^`]+)`", error)
    unknown = re.search(r"unknown field `([^`]+)`", error)
    if missing is not None:
        return f"{file}{header}: {place} has no {missing[1]}, which it needs"
    key = unknown[1] if unknown is not None else path.rstrip("`")
    line = (key and _line_of(text, key, int(header.rpartition(" ")[2] or 0))) or header
    if unknown is None:
        return f"{file}{line}: {f'{key} in ' if key else ''}{place}: {problem}"
    advice = "known are: " + ", ".join(ShareConfig.__struct_fields__)
    if isinstance(values, dict) and isinstance(values.get(key), dict):
        advice = 'write the name in quotes, as in [smb."vault.example.com/vms"]'
    return f"{file}{line}: unknown key {key} in {place}; {advice}"


def _explain_grant(file: Path, text: str) -> str:
    """Say where and what is wrong in a section [[grant]]: msgspec doesn't say in which."""
    import tomllib  # only what failed needs it

    sections = tomllib.loads(text)["grant"]
    if not isinstance(sections, list):
        return f"{file}{_line_of(text, 'grant')}: write [[grant]] with two brackets on each side"
    for number, values in enumerate(sections):
        try:
            msgspec.convert(values, Grant)
        except msgspec.ValidationError as found:
            problem, _, path = str(found).partition(" - at `$.")
            key = re.match(r"\w*", path)
            missing = re.search(r"required field `([^`]+)`", problem)
            unknown = re.search(r"unknown field `([^`]+)`", problem)
            if missing is not None:
                problem = f"it has no {missing[1]}, which it needs"
            if unknown is not None:
                known = ", ".join(Grant.__struct_fields__)
                problem = f"unknown key {unknown[1]}; known are: {known}"
            name = unknown[1] if unknown is not None else key[0] if key is not None else ""
            told = f"{name}: " if name and unknown is None else ""
            return f"{file}{_line_of_grant(text, number, name)}: [[grant]]: {told}{problem}"
    raise AssertionError("unreachable")


def _wrong_share(text: str, error: str) -> tuple[str, Any, str]:
    """Return the first section that is wrong, what it has, and the error less the section."""
    import tomllib  # only what failed needs it

    for section, values in tomllib.loads(text)["smb"].items():
        try:
            msgspec.convert(values, ShareConfig)
        except msgspec.ValidationError as found:
            return section, values, str(found)
    return "", None, error


def _line_of(text: str, key: str, after: int = 0) -> str:
    """Return ", line N" of the key's first mention there; the parser keeps no positions."""
    pattern = re.compile(rf"^\s*(?:\[\s*)?[\"']?{re.escape(key)}[\"']?\s*[=\].]")
    for number, line in enumerate(text.splitlines(), 1):
        if number > after and pattern.match(line):
            return f", line {number}"
    return ""


def _line_of_section(text: str, section: str) -> str:
    """Return ", line N" of the header [smb."section"], or of where it is written otherwise."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(rf"^\s*\[\s*smb\s*\.\s*[\"']?{re.escape(section)}[\"'\].]", line):
            return f", line {number}"
    return _line_of(text, section) or _line_of(text, "smb")


def _line_of_grant(text: str, number: int, key: str) -> str:
    """Return ", line N" of a key in a section [[grant]], else of the section."""
    headers = [
        at for at, line in enumerate(text.splitlines(), 1) if re.match(r"\s*\[\[\s*grant\b", line)
    ]
    if number >= len(headers):
        return _line_of(text, "grant")
    after = headers[number]
    before = headers[number + 1] if number + 1 < len(headers) else len(text)
    found = _line_of(text, key, after) if key else ""
    if not found or int(found.rpartition(" ")[2]) >= before:
        return f", line {after}"
    return found
