"""The units and the configuration that come with the package are ones that systemd takes.

That they work is tried by `tests/packaging`.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest

from mirrord.service.config import Config, read_config
from tests.helpers import require_program, require_root
from tests.style.sources import ROOT

EXAMPLE = ROOT / "systemd" / "mirrord.toml"
UNIT = ROOT / "systemd" / "mirrord.service"
DISKS = ROOT / "systemd" / "mirrord-disks.service"
SOCKET = ROOT / "systemd" / "mirrord.socket"
PLACES = ROOT / "systemd" / "places.conf"


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


def test_what_a_restart_of_the_daemon_must_not_do() -> None:
    """End disk processes, or remove the guests' sockets."""
    text = UNIT.read_text()
    assert "KillMode=process" in text
    assert "RuntimeDirectoryPreserve=yes" in text
    assert re.search(r"^Requires=mirrord-disks.service mirrord.socket$", text, re.M)


def test_what_keeps_passwords() -> None:
    assert re.search(r"^LimitCORE=0$", UNIT.read_text(), re.M)


def test_the_socket_unit_listens_where_clients_look() -> None:
    text = SOCKET.read_text()
    assert re.search(r"^ListenStream=/run/mirrord/control.sock$", text, re.M)
    assert re.search(r"^SocketMode=0600$", text, re.M)
    assert Config().socket_mode == "0600"


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    done = analyze(tmp_path, "verify", UNIT, DISKS, SOCKET)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", [UNIT, DISKS], ids=lambda unit: unit.name)
def test_the_units_are_confined(tmp_path: Path, unit: Path) -> None:
    """1.1 of 10 that a service could do to the system, at most."""
    done = analyze(tmp_path, "security", "--offline=true", "--threshold=11", unit)
    assert done.returncode == 0, done.stdout


def test_the_drop_in_is_one_that_systemd_takes(tmp_path: Path) -> None:
    """With every line of it, though nobody needs them all."""
    shown = re.sub(r"^#(?=\w+=)", "", PLACES.read_text(), flags=re.M)
    assert set(re.findall(r"^(\w+)=", shown, re.M)) == set(
        re.findall(r"^#(\w+)=", PLACES.read_text(), re.M)
    )
    (tmp_path / "mirrord.service.d").mkdir()
    (tmp_path / "mirrord.service.d" / "places.conf").write_text(shown)
    done = analyze(tmp_path, "verify", UNIT, DISKS, SOCKET)
    assert (done.returncode, done.stderr) == (0, "")


def test_sysusers_and_tmpfiles(tmp_path: Path) -> None:
    """Make the user and the sockets' folder, in another root."""
    require_root()
    systemd = ROOT / "systemd"
    (tmp_path / "etc").mkdir()
    for program, words in (
        ("systemd-sysusers", [systemd / "sysusers.conf"]),
        ("systemd-tmpfiles", ["--create", systemd / "tmpfiles.conf"]),
    ):
        done = subprocess.run(
            [require_program(program), f"--root={tmp_path}", *words],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    user = (tmp_path / "etc" / "passwd").read_text().split(":")
    assert user[0] == "mirrord"
    made = (tmp_path / "run" / "mirrord").stat()
    assert (made.st_uid, made.st_mode & 0o777) == (int(user[2]), 0o755)


def analyze(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Have systemd look at units, without the program and its pages."""
    placed: list[str | Path] = []
    for word in words:
        if isinstance(word, Path):
            text = re.sub(r"^(Exec\w+)=\S+", r"\1=/bin/true", word.read_text(), flags=re.M)
            text = re.sub(r"^Documentation=.*\n", "", text, flags=re.M)
            (folder / word.name).write_text(text)
            word = folder / word.name
        placed.append(word)
    return subprocess.run(
        [require_program("systemd-analyze"), *placed, "--no-pager"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
