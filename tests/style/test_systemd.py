"""The unit and the configuration that come with the package are ones that work."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import msgspec

from mirrord.service.config import Config, read_config
from tests.style.sources import ROOT

EXAMPLE = ROOT / "systemd" / "mirrord.toml"
UNIT = ROOT / "systemd" / "mirrord.service"
SOCKET = ROOT / "systemd" / "mirrord.socket"


def test_the_example_changes_nothing() -> None:
    assert read_config(EXAMPLE) == Config()


def test_each_key_of_the_example_is_known_and_valid(tmp_path: Path) -> None:
    shown = re.sub(r"^# (?=\w+ = |\[)", "", EXAMPLE.read_text(), flags=re.M)
    changed = tmp_path / "mirrord.toml"
    changed.write_text(shown)
    assert isinstance(read_config(changed), Config)
    keys = set(tomllib.loads(shown))
    assert keys >= set(Config.__struct_fields__), "a key is not shown"
    for key in ("verify", "log_level", "socket_mode"):
        assert tomllib.loads(shown)[key] == msgspec.structs.asdict(Config())[key]


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    text = UNIT.read_text()
    # what a restart of the daemon must not do: end disk processes, remove the guests' sockets
    assert "KillMode=process" in text
    assert "RuntimeDirectoryPreserve=yes" in text
    # what shares need, and what keeps their passwords
    assert re.search(r"^RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6$", text, re.M)
    assert re.search(r"^LimitCORE=0$", text, re.M)
    verify(tmp_path, UNIT, SOCKET)


def test_the_socket_unit_listens_where_clients_look(tmp_path: Path) -> None:
    text = SOCKET.read_text()
    assert re.search(r"^ListenStream=/run/mirrord/control.sock$", text, re.M)
    assert re.search(r"^SocketMode=0600$", text, re.M)
    assert Config().socket_mode == "0600"
    verify(tmp_path, UNIT, SOCKET)


def verify(folder: Path, *units: Path) -> None:
    """Have systemd look at units, without the program, where there is one."""
    if not shutil.which("systemd-analyze"):  # absent in containers; what a test says itself holds
        return
    installed = [folder / unit.name for unit in units]
    for unit, path in zip(units, installed, strict=True):
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.M)
        path.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *installed], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
