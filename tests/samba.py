"""A real Samba for a test: an smbd of its own, whose files all lie in one folder.

It runs as root or as an ordinary user; the SMB user is the unix user that runs it, so no account
is made. It listens on loopback addresses only, on a port that stays its own while it is dead.

The processes of a server are those of the session that it was started in: only they are ever
signalled. The folder's name is short (a unix socket's path has at most 107 bytes).
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers import eventually, require_program

READY_S = 20  # a start takes 0.2 s alone
STOP_S = 15
TOOL_S = 30
FOLDERS = ("private", "state", "cache", "lock", "pid", "ncalrpc", "logs", "disks")
FORGOTTEN_BY_A_REBOOT = ("lock", "pid", "ncalrpc", "private/msg.sock")
LISTENING, ESTABLISHED = "0A", "01"  # states in /proc/net/tcp

GLOBAL = """\
[global]
    server role = standalone server
    security = user
    workgroup = MIRRORD
    netbios name = MIRRORDTEST
    passdb backend = tdbsam:{root}/private/passdb.tdb
    private dir = {root}/private
    state directory = {root}/state
    cache directory = {root}/cache
    lock directory = {root}/lock
    pid directory = {root}/pid
    ncalrpc dir = {root}/ncalrpc
    log file = {root}/logs/log.%m
    log level = {log_level}
    max log size = 0
    interfaces = {interfaces}
    bind interfaces only = yes
    smb ports = {ports}
    disable netbios = yes
    server min protocol = {min_protocol}
    server max protocol = {max_protocol}
    server multi channel support = {multichannel}
    server signing = {signing}
    smb encrypt = {encrypt}
    map to guest = never
    guest account = {guest}
    restrict anonymous = 2
    load printers = no
    printing = bsd
    printcap name = /dev/null
    disable spoolss = yes
    dns proxy = no
    usershare max shares = 0
    rpc start on demand helpers = no
"""

SHARE = """
[{name}]
    path = {path}
    read only = no
    guest ok = no
    strict sync = yes
    strict allocate = no
    store dos attributes = yes
    durable handles = yes
    kernel oplocks = no
    kernel share modes = no
    posix locking = no
"""


class Samba:
    """One smbd with its state. Made here, started by `start`, removed by `close`."""

    def __init__(
        self,
        *,
        signing: str = "mandatory",
        encrypt: str = "if_required",
        min_protocol: str = "SMB3_00",
        max_protocol: str = "SMB3_11",
        multichannel: bool = True,
        global_lines: Sequence[str] = (),
        share_lines: Sequence[str] | Mapping[str, Sequence[str]] = (),
        shares: Mapping[str, Path] | None = None,
        addresses: Sequence[str] = ("127.0.0.1",),
        ports: int = 1,
        uid: int | None = None,
        environment: Mapping[str, str] | None = None,
        log_level: int = 1,
    ) -> None:
        """Prepare a server.

        `global_lines` and `share_lines` are appended, so that they win; the latter go to every
        share, or to those that a mapping names. `uid` is whom root lets it run as. It listens on
        each of `addresses` with each of as many `ports`.
        """
        self._smbd = require_program("smbd")
        self._pdbedit = require_program("pdbedit")
        self.root = Path(tempfile.mkdtemp(prefix="mirrord-smb-"))
        self.uid = os.geteuid() if uid is None else uid
        account = pwd.getpwuid(self.uid)
        self.user, self._gid = account.pw_name, account.pw_gid
        self.password = f"pw-{secrets.token_hex(6)}"
        self.addresses = list(addresses)
        self._reserved = [reserve_port(self.addresses) for _ in range(ports)]
        self.ports = [int(held[0].getsockname()[1]) for held in self._reserved]
        self.config = self.root / "smb.conf"
        self.leader: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._settings = {
            "signing": signing, "encrypt": encrypt, "log_level": str(log_level),
            "min_protocol": min_protocol, "max_protocol": max_protocol,
            "multichannel": "yes" if multichannel else "no",
        }  # fmt: skip
        self._environment = {
            "TMPDIR": str(self.root),
            "HOME": str(self.root),
            **(environment or {}),
        }
        self._global_lines, self._share_lines = global_lines, share_lines
        self._make_folders()
        self.shares = {"disks": self.root / "disks"} if shares is None else dict(shares)
        self._write_config()
        self.set_password(self.password)

    @property
    def port(self) -> int:
        """Return the first port."""
        return self.ports[0]

    # -- its life

    def start(self, *, rebooted: bool = False) -> Samba:
        """Start it and wait until it listens; `rebooted` forgets what a reboot forgets."""
        assert self._process is None
        if rebooted:
            self._forget()
        environment = {**os.environ, **self._environment}
        with (self.root / "logs" / "stdout").open("ab") as log:
            process = subprocess.Popen(
                [self._smbd, "-F", "--no-process-group", "--debug-stdout",
                 "-s", str(self.config), "-l", str(self.root / "logs")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True, cwd=self.root, **self._identity(),
            )  # fmt: skip
        self._process, self.leader = process, process.pid
        try:
            eventually(lambda: not self.running() or self._listens(), READY_S, "smbd listens")
        except BaseException:
            self.kill_all()
            raise
        if process.poll() is not None:
            self._process = None
            raise AssertionError(f"smbd ended with {process.returncode}:\n{self.log()}")
        return self

    def stop(self) -> None:
        """End it and its children as a service manager would, and wait for their end."""
        self._signal_session(signal.SIGTERM)
        self._signal_session(signal.SIGCONT)  # who is paused can't end
        self._wait_for_the_end()

    def kill_all(self) -> None:
        """Kill smbd and all its children at once, as a crash of the server would."""
        self._signal_session(signal.SIGKILL)
        self._wait_for_the_end()

    def restart(self) -> None:
        """Stop and start it."""
        self.stop()
        self.start()

    def close(self) -> None:
        """End it and remove its folder. Idempotent."""
        if self._process is not None:
            self.kill_all()
        for held in self._reserved:
            for one in held:
                one.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def running(self) -> bool:
        """Tell whether smbd itself runs."""
        return self._process is not None and self._process.poll() is None

    # -- its processes

    def processes(self) -> list[int]:
        """Return all its processes, smbd itself first; none that has ended."""
        assert self.leader is not None
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
        mine = [p for p in pids if _session_of(p) == self.leader and _state_of(p) != "Z"]
        return sorted(mine, key=lambda pid: (pid != self.leader, pid))

    def page_faults(self, pid: int) -> int:
        """Return how many pages a process of it was given (proc_pid_stat(5), minflt)."""
        assert pid in self.processes(), "not ours"
        return int(_stat_of(pid)[7])

    def children(self) -> list[int]:
        """Return the processes that serve connections now, by what they have open."""
        connections = self._sockets(ESTABLISHED)
        return [
            pid
            for pid in self.processes()
            if pid != self.leader and not connections.isdisjoint(_open_sockets(pid))
        ]

    def kill_child(self, pid: int | None = None) -> None:
        """Kill the processes that serve connections, or one of them, as a crash would."""
        self._end_children(signal.SIGKILL, pid)

    def terminate_child(self, pid: int | None = None) -> None:
        """Ask the processes that serve connections to end, or one of them."""
        self._end_children(signal.SIGTERM, pid)

    def pause(self, *, everything: bool = False) -> None:
        """Stop the processes that serve connections, or all: connected, but no answer."""
        pids = self.processes() if everything else self.children()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        eventually(lambda: all(_state_of(pid) in "TZ" for pid in pids), what="smbd is paused")

    def go_on(self) -> None:
        """Let everything that was paused go on."""
        self._signal_session(signal.SIGCONT)

    # -- its settings

    def set_password(self, new: str) -> None:
        """Give the user another password; sessions that there are stay."""
        self._tool(self._pdbedit, "-a", "-t", "-u", self.user, text=f"{new}\n{new}\n")
        self.password = new

    def edit_account(self, *options: str) -> None:
        """Change the account by options of pdbedit: `-c [D]` disables it, `-c []` enables it."""
        self._tool(self._pdbedit, "-r", "-u", self.user, *options)

    def want_new_password(self, wanted: bool = True) -> None:
        """Let nobody in until the password was changed, or no longer want that."""
        word = "yes" if wanted else "no"
        self._tool(require_program("net"), "sam", "set", "pwdmustchangenow", self.user, word)

    def reconfigure(
        self,
        *,
        global_lines: Sequence[str] | None = None,
        share_lines: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        shares: Mapping[str, Path] | None = None,
        **settings: str,
    ) -> None:
        """Change what is given. A server that runs has read it when this returns."""
        assert settings.keys() <= self._settings.keys(), settings
        self._settings.update(settings)
        self._global_lines = self._global_lines if global_lines is None else global_lines
        self._share_lines = self._share_lines if share_lines is None else share_lines
        self.shares = self.shares if shares is None else dict(shares)
        self._write_config()
        if self.running():
            smbcontrol = require_program("smbcontrol")
            self._tool(smbcontrol, "smbd", "reload-config")
            for pid in [self.leader, *self.children()]:  # messages are handled in their order
                self._tool(smbcontrol, str(pid), "ping")

    # -- its content

    def url(self, path: str = "", share: str = "disks", *, port: int | None = None) -> str:
        """Return the address of a file or folder; `port` is that of a proxy in front of it."""
        where = f"{self.user}@{self.addresses[0]}:{port or self.port}"
        return f"smb://{where}/{share}/{path}".rstrip("/") + ("/" if path.endswith("/") else "")

    def folder(self, share: str = "disks") -> Path:
        """Return the folder behind a share."""
        return self.shares[share]

    def file(self, path: str, share: str = "disks") -> Path:
        """Return the file behind a share's path."""
        return self.shares[share] / path

    def put(self, path: str, content: bytes, size: int | None = None, share: str = "disks") -> Path:
        """Make a file behind the server's back, with a hole behind `content` up to `size`."""
        file = self.file(path, share)
        self.give(*(folder for folder in _make_parents(file)))
        with file.open("wb") as opened:
            opened.write(content)
            opened.truncate(len(content) if size is None else size)
        self.give(file)
        return file

    def give(self, *paths: Path) -> None:
        """Make files or folders the property of the user that it runs as."""
        for path in paths:
            if os.geteuid() == 0:
                os.chown(path, self.uid, self._gid)

    def log(self) -> str:
        """Return all that it logged so far."""
        logs = [path for path in sorted((self.root / "logs").rglob("*")) if path.is_file()]
        return "\n".join(f"-- {one.name}\n{one.read_text(errors='replace')}" for one in logs)

    # -- within

    def _make_folders(self) -> None:
        self.root.chmod(0o755)
        self.give(self.root)
        for name in FOLDERS:
            (self.root / name).mkdir()
            self.give(self.root / name)

    def _write_config(self) -> None:
        multi = "speed=10000000000,capability=RSS"
        interfaces = [
            # with a mask it need not be an address that an interface is known to have
            f'"{address}/8;if_index={number},{multi}"'
            for number, address in enumerate(self.addresses, 1)
        ]
        text = GLOBAL.format(
            root=self.root, interfaces=" ".join(interfaces),
            ports=" ".join(map(str, self.ports)), **self._settings,
            guest="daemon" if self.user == "nobody" else "nobody",  # whose account is special
        )  # fmt: skip
        text += "".join(f"    {line}\n" for line in self._global_lines)
        for name, path in self.shares.items():
            text += SHARE.format(name=name, path=path)
            text += "".join(f"    {line}\n" for line in self._lines_of(name))
        self.config.write_text(text)

    def _lines_of(self, share: str) -> Sequence[str]:
        if isinstance(self._share_lines, Mapping):
            return self._share_lines.get(share, ())
        return self._share_lines

    def _identity(self) -> dict[str, Any]:
        if self.uid == os.geteuid():
            return {}
        return {"user": self.uid, "group": self._gid, "extra_groups": []}

    def _tool(self, program: str, *words: str, text: str = "") -> str:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [program, "-s", str(self.config), *words], input=text, capture_output=True,
            text=True, timeout=TOOL_S, cwd=self.root, **self._identity(),
        )  # fmt: skip
        assert done.returncode == 0, f"{program} {words}: {done.stdout}{done.stderr}"
        return done.stdout

    def _forget(self) -> None:
        for name in FORGOTTEN_BY_A_REBOOT:
            shutil.rmtree(self.root / name, ignore_errors=True)
            (self.root / name).mkdir()
            self.give(self.root / name)

    def _listens(self) -> bool:
        return len(self._sockets(LISTENING)) >= len(self.ports) * len(self.addresses)

    def _sockets(self, state: str) -> set[str]:
        """Return the inodes of sockets on the server's side that are in a state."""
        try:
            table = Path(f"/proc/{self.leader}/net/tcp").read_text().splitlines()[1:]
        except OSError:
            return set()
        rows = [line.split() for line in table]
        ports = {f"{port:04X}" for port in self.ports}
        return {row[9] for row in rows if row[3] == state and row[1].split(":")[1] in ports}

    def _signal_session(self, number: int) -> None:
        if self.leader is not None and self._process is not None:
            # not yet waited for, so that the number is not another's
            os.killpg(self.leader, number)

    def _wait_for_the_end(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        process.wait(timeout=STOP_S)
        eventually(lambda: not self.processes(), STOP_S, "all of smbd has ended")

    def _end_children(self, number: int, pid: int | None) -> None:
        pids = self.children() if pid is None else [pid]
        assert pids, "nobody is connected"
        assert set(pids) <= set(self.processes()), "not ours"
        for one in pids:
            os.kill(one, number)
        eventually(lambda: all(_state_of(one) == "Z" for one in pids), STOP_S, "they end")


def reserve_port(addresses: Sequence[str]) -> list[socket.socket]:
    """Bind a free port on every address, not listening: nobody else is given it meanwhile."""
    held: list[socket.socket] = []
    for address in addresses:
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that smbd may bind it, too
        one.bind((address, held[0].getsockname()[1] if held else 0))
        held.append(one)
    return held


def _make_parents(file: Path) -> list[Path]:
    """Make the folders above a file; return those that were missing."""
    missing = [folder for folder in file.parents if not folder.exists()][::-1]
    for folder in missing:
        folder.mkdir()
    return missing


def _stat_of(pid: int) -> list[str]:
    """Return a process's fields from its state on; a zombie's when it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z", "0", "0", "0"]


def _state_of(pid: int) -> str:
    return _stat_of(pid)[0]


def _session_of(pid: int) -> int:
    return int(_stat_of(pid)[3])


def _open_sockets(pid: int) -> set[str]:
    """Return the inodes of the sockets that a process has open."""
    found = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            name = os.readlink(entry.path)
            if name.startswith("socket:["):
                found.add(name[8:-1])
    except OSError:  # it has gone meanwhile
        pass
    return found
