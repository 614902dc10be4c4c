"""The configuration: defaults, what is refused and how it is explained, who may connect."""

from __future__ import annotations

import grp
import json
import os
from pathlib import Path

import pytest

from mirrord.errors import RefusedError, UsageError
from mirrord.service import config, systemd
from mirrord.service.config import Config, read_config


def read(tmp_path: Path, text: str | bytes) -> Config:
    """Read a configuration of that text."""
    path = tmp_path / "mirrord.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(path)


def explain(tmp_path: Path, text: str | bytes) -> str:
    """Return how a wrong configuration is explained, less the file's name."""
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    return str(caught.value).removeprefix(f"{tmp_path / 'mirrord.toml'}")


def test_the_default_file_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "default_config_file", lambda: tmp_path / "none.toml")
    assert read_config(None) == Config()


def test_a_named_file_may_not_be_missing(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"there is no file .*none\.toml"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(RefusedError, match="Is a directory"):
        read_config(tmp_path)


def test_values(tmp_path: Path) -> None:
    found = read(tmp_path, 'max_moves = 3\nsocket_mode = "0660"\n[nbd]\nclients_max = 2\n')
    assert found.max_moves == 3
    assert found.control_access().mode == 0o660
    assert found.nbd_access().mode == 0o600
    limits = json.loads(found.disk_options()[-1])
    assert limits == {"clients_max": 2}


def test_an_unknown_key_is_told_with_its_line(tmp_path: Path) -> None:
    told = explain(tmp_path, "# hello\n\nmax_move = 3\n")
    assert told.startswith(", line 3: unknown key max_move; known are: state_dir, ")
    told = explain(tmp_path, 'verify = "none"\n[nbd]\nclient_max = 3\n')
    assert told.startswith(", line 3: unknown key client_max in [nbd]; known are: handshake_s")


def test_a_wrong_value_is_told_with_its_line(tmp_path: Path) -> None:
    assert explain(tmp_path, "\nmax_moves = 0\n").startswith(", line 2: max_moves: Expected `int`")
    assert ", line 1: verify: " in explain(tmp_path, 'verify = "half"\n')
    assert ", line 2: nbd.stall_s: " in explain(tmp_path, "[nbd]\nstall_s = -1\n")
    assert ", line 1: socket_mode: " in explain(tmp_path, 'socket_mode = "rw"\n')


def test_what_is_no_toml(tmp_path: Path) -> None:
    assert "is not TOML" in explain(tmp_path, "max_moves 3\n")
    assert "is not TOML" in explain(tmp_path, b"\xff")


def test_groups(tmp_path: Path) -> None:
    own = grp.getgrgid(os.getgid())
    found = read(tmp_path, f'socket_group = "{own.gr_name}"\nnbd_socket_group = "no such"\n')
    assert found.control_access().group_id == own.gr_gid
    with pytest.raises(UsageError, match="there is no group no such"):
        found.nbd_access()


def test_the_places_of_root_and_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(config.default_socket()) == "/run/mirrord/control.sock"
    assert str(config.default_state_dir()) == "/var/lib/mirrord"
    assert str(config.default_config_file()) == "/etc/mirrord/mirrord.toml"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/c")
    assert str(config.default_socket()) == "/run/user/1000/mirrord/control.sock"
    assert str(config.default_state_dir()) == "/s/mirrord"
    assert str(config.default_config_file()) == "/c/mirrord/mirrord.toml"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(config.default_runtime_dir()) == "/tmp/mirrord-1000/mirrord"


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_folder_below_tmp_that_another_made_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    user = 54321 if kind == "folder" else os.geteuid() or 54321
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    made = Path(f"/tmp/mirrord-{user}")
    if kind == "folder":
        made.mkdir()
    else:
        made.symlink_to(tmp_path)
        os.lchown(made, user, -1)
    try:
        with pytest.raises(RefusedError, match="another user") as caught:
            config.default_socket()
        assert caught.value.code == "directory-not-ours"
    finally:
        made.rmdir() if kind == "folder" else made.unlink()


def test_places_of_a_service_are_those_that_systemd_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/other")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/other")
    assert str(config.default_state_dir()) == "/var/lib/other"
    assert str(config.default_socket()) == "/run/other/control.sock"


@pytest.mark.parametrize(("code", "advised"), [("location-missing", True), ("in-use", False)])
def test_a_refused_place_says_in_a_service_that_its_unit_may_be_why(
    monkeypatch: pytest.MonkeyPatch, code: str, advised: bool
) -> None:
    with pytest.raises(RefusedError, match=r"^no$"), systemd.granted():
        raise RefusedError(code, "no")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/mirrord")
    with pytest.raises(RefusedError) as refused, systemd.granted():
        raise RefusedError(code, "no")
    assert ("places.conf" in str(refused.value), refused.value.code) == (advised, code)


@pytest.mark.parametrize("program", ["tell", "/etc/passwd", "/nowhere/tell", "/tmp/\0"])
def test_a_program_that_can_not_be_run_is_refused(tmp_path: Path, program: str) -> None:
    file = tmp_path / "mirrord.toml"
    file.write_text(f"verify = 'none'\non_failed = [{json.dumps(program)}, 'x']\n")
    with pytest.raises(UsageError, match=r"mirrord.toml, line 2: .*on_failed"):
        read_config(file)
    file.write_text("on_done = ['/bin/true', '--quietly']\n")
    assert read_config(file).on_done == ["/bin/true", "--quietly"]


def test_a_word_of_a_program_has_no_nul(tmp_path: Path) -> None:
    assert explain(tmp_path, r'on_done = ["/bin/true", "a\u0000b"]').startswith(", line 1: on_done")
