"""The client: what the daemon refuses is raised again; a daemon that isn't there is told."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mirrord.control import client as client_module
from mirrord.control.client import Client
from mirrord.errors import MirrordError, NoDaemonError, RefusedError, UsageError


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[[bytes], Client]]:
    """Make a client of a server that gives one answer to whatever comes first."""

    made: list[Client] = []

    def make(answer: bytes) -> Client:
        path = tmp_path / "c.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with listener, connection:
                connection.recv(65536)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        made.append(Client(path))
        return made[-1]

    yield make
    for client in made:
        client.close()


def reply(status: int, body: bytes) -> bytes:
    """Return an HTTP answer."""
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (400, b'{"code":"usage","message":"m"}', UsageError, "usage"),
        (404, b'{"code":"unknown-disk","message":"m"}', RefusedError, "unknown-disk"),
        (409, b'{"code":"in-use","message":"m"}', RefusedError, "in-use"),
        (500, b'{"code":"internal","message":"m"}', MirrordError, "internal"),
        (502, b"<html>", MirrordError, "failed"),
    ],
)
def test_an_error_is_raised_again(
    answering: Callable[[bytes], Client],
    status: int,
    body: bytes,
    kind: type[MirrordError],
    code: str,
) -> None:
    with pytest.raises(MirrordError) as caught:
        answering(reply(status, body)).disks()
    assert type(caught.value) is kind
    assert caught.value.code == code


# the standard library leaves the answer that never came to the garbage collection
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_daemon_that_hangs_up(answering: Callable[[bytes], Client]) -> None:
    with pytest.raises(NoDaemonError):
        answering(b"").disks()
    gc.collect()


def test_a_daemon_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "ANSWER_DEADLINE_S", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c.sock"))
        listener.listen()
        with pytest.raises(MirrordError, match="has not answered for") as caught:
            Client(tmp_path / "c.sock").disks()
    assert caught.value.exit_code == 1


def test_a_daemon_with_many_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there: a client waits for its turn as well, and not for ever."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c.sock"))
        listener.listen(0)
        ahead = socket.socket(socket.AF_UNIX)
        ahead.connect(str(tmp_path / "c.sock"))
        monkeypatch.setattr(client_module, "ANSWER_DEADLINE_S", 0.05)
        with pytest.raises(MirrordError, match="has not answered for"):
            Client(tmp_path / "c.sock").disks()
        monkeypatch.setattr(client_module, "ANSWER_DEADLINE_S", 10)
        client = Client(tmp_path / "c.sock")

        def serve() -> None:
            listener.accept()[0].close()
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply(200, b"[]"))

        threading.Timer(0.05, serve).start()
        assert client.disks() == []
        client.close()
        ahead.close()


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(NoDaemonError, match="start one with 'mirrord daemon'"):
        Client(tmp_path / "c.sock").disks()


def test_a_socket_of_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(client_module._Connection, "connect", forbidden)
    with pytest.raises(RefusedError, match="may not use the daemon") as caught:
        Client(tmp_path / "c.sock").disks()
    assert caught.value.code == "forbidden"


def test_names_are_quoted(answering: Callable[[bytes], Client], tmp_path: Path) -> None:
    client = answering(reply(200, b"null"))
    with pytest.raises(Exception, match="Expected"):
        client.disk("a/b?c")
    client.close()
    assert os.path.exists(tmp_path / "c.sock")
