"""A real daemon for a test: started, killed and started again; commands run against it.

Everything lies in one folder with a short name (a unix socket's path has at most 107 bytes).
At the end only processes whose command line names that folder are ended: the daemon, and the
disk processes, which outlive it by design.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from tests.cli.running import run as run_here
from tests.helpers import eventually

READY_S = 15  # a start takes 0.5 s alone; two workers share two cores with QEMU
COMMAND_S = 60
LEVEL = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|Traceback \(most recent")


class Daemon:
    """One daemon with its state, and the command line that talks to it."""

    def __init__(self, config: str = "") -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mirrord-test-"))
        self.state = self.root / "state"
        self.runtime = self.root / "run"
        self.socket = self.runtime / "control.sock"
        self.log_path = self.root / "daemon.log"
        self.expected: list[str] = []
        self.in_process = True  # commands run in this process: a start costs 0.1 to 0.3 s
        self._config = self.root / "mirrord.toml"
        self._config.write_text(config)
        self._config.chmod(0o600)
        self._process: subprocess.Popen[bytes] | None = None
        self.state.mkdir()
        self.runtime.mkdir()

    # -- the daemon itself

    def start(self) -> None:
        """Start the daemon and wait until it is ready."""
        assert self._process is None
        ready_before = self.log().count("ready socket=")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.program, "daemon", "--config", str(self._config),
                 "--state-dir", str(self.state), "--runtime-dir", str(self.runtime),
                 "--socket", str(self.socket)],
                stderr=log, stdout=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        process = self._process
        eventually(
            lambda: self.log().count("ready socket=") > ready_before
            or process.poll() is not None,
            READY_S, "the daemon says that it is ready",
        )  # fmt: skip
        assert process.poll() is None, self.log()

    def kill(self) -> None:
        """Kill the daemon as a crash would. Disk processes go on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=10)
        self._process = None

    def stop(self) -> int:
        """Ask the daemon to end, and return its exit status."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(timeout=READY_S)
        self._process = None
        return status

    @property
    def pid(self) -> int:
        """Return the daemon's process id."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """Return all that the daemon and its disk processes logged so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def expect_log(self, *patterns: str) -> None:
        """Announce warnings or errors: any other one fails the test at its end."""
        self.expected.extend(patterns)

    def unannounced(self) -> list[str]:
        """Return the warnings and errors that the test did not announce."""
        lines = [line for line in self.log().splitlines() if LEVEL.search(line)]
        return [line for line in lines if not any(re.search(p, line) for p in self.expected)]

    def close(self) -> None:
        """End the daemon and its disk processes, and remove the folder. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None
        for pid in processes_naming(str(self.root)):
            kill_and_wait(pid)
        shutil.rmtree(self.root, ignore_errors=True)

    # -- disk processes

    def disk_pid(self, name: str) -> int:
        """Return the process that serves disk `name`, waiting for it to be there."""
        return eventually(lambda: self.find_disk_pid(name), what=f"a process serves {name}")

    def find_disk_pid(self, name: str) -> int | None:
        """Return the process that serves disk `name`, or None."""
        for pid in processes_naming(str(self.state)):
            words = command_line(pid)
            if "mirrord.service.disk_process" in words and name in words:
                return pid
        return None

    def kill_disk(self, name: str) -> None:
        """Kill the process that serves `name` as a crash would, and wait for its end."""
        kill_and_wait(self.disk_pid(name))

    # -- the command line

    @property
    def program(self) -> list[str]:
        """Return the command that a user types, as installed beside this interpreter."""
        return [str(Path(sys.executable).parent / "mirrord")]

    def run(
        self, *words: str | Path, timeout_s: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against the daemon, whatever its outcome."""
        if self.in_process:
            with mock.patch.dict(os.environ, MIRRORD_SOCKET=str(self.socket)):
                return subprocess.CompletedProcess(words, *run_here(*words))
        environment = {**os.environ, "MIRRORD_SOCKET": str(self.socket)}
        return subprocess.run(
            [*self.program, *map(str, words)],
            capture_output=True, text=True, timeout=timeout_s, env=environment,
        )  # fmt: skip

    def json(self, *words: str | Path, timeout_s: float = COMMAND_S) -> Any:
        """Run a command that has to succeed, with `--json`; return its document."""
        done = self.run(*words, "--json", timeout_s=timeout_s)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stderr}\n{self.log()}"
        return json.loads(done.stdout)

    def attach(self, name: str, location: Path | str, *options: str) -> str:
        """Attach a disk; return the path of its NBD socket."""
        self.json("attach", name, location, *options)
        return self.nbd_socket(name)

    def nbd_socket(self, name: str) -> str:
        """Return the path of a disk's NBD socket."""
        return str(self.runtime / "nbd" / f"{name}.sock")

    def move(self, name: str, target: Path | str, *options: str) -> str:
        """Start a move; return the job's id."""
        return str(self.json("move", name, target, "--no-wait", *options)["id"])

    def wait(self, name: str, phase: str | None = None, timeout_s: float = COMMAND_S) -> None:
        """Wait until the disk's job is done, or has reached `phase`."""
        words = ["wait", name, "--timeout", str(timeout_s)]
        words += ["--phase", phase] if phase else []
        done = self.run(*words, timeout_s=timeout_s + 10)
        assert done.returncode == 0, f"{done.returncode} {done.stdout}{done.stderr}\n{self.log()}"

    def job(self, job_id: str) -> Any:
        """Return a job's document."""
        return self.json("job", job_id)


def command_line(pid: int) -> list[str]:
    """Return a process's words; none when it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def processes_naming(path: str) -> list[int]:
    """Return the processes whose command line holds `path`, this one excepted."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [
        pid
        for pid in pids
        if pid != os.getpid() and any(path in word for word in command_line(pid))
    ]


def kill_and_wait(pid: int) -> None:
    """Kill a process and wait until it is gone or a zombie: it holds nothing any more."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    eventually(lambda: command_line(pid) in ([], [""]), what=f"process {pid} ends")
