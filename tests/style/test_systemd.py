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
    if shutil.which("systemd-analyze"):  # absent in containers; the lines above hold there too
        installed = tmp_path / UNIT.name
        installed.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.M))
        done = subprocess.run(
            ["systemd-analyze", "verify", str(installed)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
