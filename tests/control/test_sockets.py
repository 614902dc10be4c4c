"""Unix sockets: addresses, permissions, stale ones."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from mirrord.control.sockets import (
    SOCKET_PATH_BYTES_MAX,
    Access,
    Peer,
    check_socket_path,
    dial,
    is_answered,
    listen,
    peer,
    remove_socket,
)
from mirrord.errors import RefusedError


def test_the_limit_of_a_path_is_the_systems(tmp_path: Path) -> None:
    longest = "/" + "x" * (SOCKET_PATH_BYTES_MAX - 1)
    check_socket_path(longest)
    with pytest.raises(RefusedError, match="has 108 bytes"):
        check_socket_path(longest + "x")
    deep = tmp_path / ("d" * (SOCKET_PATH_BYTES_MAX - len(str(tmp_path)) - 3))
    deep.mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"{deep}/s")  # 107 bytes: the system agrees
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(OSError, match="too long"):
        one.bind(f"{deep}/st")


def test_listening_replaces_what_a_dead_process_left(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listen(path, Access()).close()
    assert path.exists()
    assert not is_answered(path)
    with listen(path, Access(0o660, os.getgid())) as listener:
        assert is_answered(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with dial(path) as connection:
            groups = frozenset({os.getgid(), *os.getgroups()})
            assert peer(connection) == Peer(os.getpid(), os.getuid(), groups)
        assert not listener.getblocking()
    remove_socket(path)
    remove_socket(path)
    assert not is_answered(path)


def test_nobody_gets_in_before_the_mode_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "s", []
    files = tmp_path / "others"

    def chown(name: Path, uid: int, gid: int) -> None:
        seen.append(stat.S_IMODE(name.stat().st_mode))
        files.mkdir()  # as another thread may at any moment
        seen.append(stat.S_IMODE(files.stat().st_mode))

    monkeypatch.setattr(os, "chown", chown)
    mask = os.umask(0o022)
    try:
        listen(path, Access(mode=0o660, group_id=0)).close()
    finally:
        os.umask(mask)
    assert seen == [0, 0o755]
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_a_full_queue_is_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        waiting = []
        while True:
            try:
                waiting.append(dial(path))
            except BlockingIOError:
                break
        assert is_answered(path)
        for one in waiting:
            one.close()


def test_a_failure_leaves_no_listener(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        listen(tmp_path / "none" / "s", Access())
    assert os.umask(0o022) == os.umask(0o022), "the umask is as before"
