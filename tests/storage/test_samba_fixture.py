"""The Samba and the proxy that the SMB tests stand on do what those tests believe."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from smbprotocol.connection import Capabilities, Connection
from smbprotocol.exceptions import SMBException
from smbprotocol.open import (
    CreateDisposition,
    CreateOptions,
    FileAttributes,
    FilePipePrinterAccessMask,
    ImpersonationLevel,
    Open,
    ShareAccess,
)
from smbprotocol.session import Session
from smbprotocol.tree import TreeConnect

from tests.helpers import eventually, require_program, require_root
from tests.samba import Samba
from tests.tcp_proxy import Direction, Proxy

NOBODY = 65534
LOST = (SMBException, OSError, InvalidTag)


def connect(server: Samba, port: int | None = None, share: str = "disks") -> TreeConnect:
    """Log in with smbprotocol, as it is, and connect to a share."""
    connection = Connection(uuid.uuid4(), "127.0.0.1", port or server.port)
    connection.connect(timeout=10)
    session = Session(connection, server.user, server.password, auth_protocol="ntlm")
    session.connect()
    tree = TreeConnect(session, rf"\\127.0.0.1\{share}")
    tree.connect()
    return tree


def opened(tree: TreeConnect, name: str) -> Open:
    """Open or make a file, for reading and writing, shared with all."""
    one = Open(tree, name)
    one.create(
        ImpersonationLevel.Impersonation,
        FilePipePrinterAccessMask.GENERIC_READ | FilePipePrinterAccessMask.GENERIC_WRITE,
        FileAttributes.FILE_ATTRIBUTE_NORMAL,
        ShareAccess.FILE_SHARE_READ | ShareAccess.FILE_SHARE_WRITE,
        CreateDisposition.FILE_OPEN_IF,
        CreateOptions.FILE_NON_DIRECTORY_FILE,
    )
    return one


def disconnect(tree: TreeConnect) -> None:
    """Close the connection, whatever became of it."""
    connection = tree.session.connection
    try:
        connection.disconnect(close=False)
    except LOST:
        pass


def smbclient(server: Samba, *commands: str, password: str | None = None) -> str:
    """Run Samba's own client; return all that it printed."""
    done = subprocess.run(
        [require_program("smbclient"), "//127.0.0.1/disks", "-p", str(server.port), "-s",
         str(server.config), "-U", f"{server.user}%{password or server.password}",
         "-c", ";".join(commands)],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.fixture(params=["oneself", "nobody"])
def anyone(request: pytest.FixtureRequest, make_samba: Callable[..., Samba]) -> Samba:
    """A server that runs as whoever runs the tests, and one that root runs as nobody."""
    if request.param == "oneself":
        return make_samba()
    require_root()
    return make_samba(uid=NOBODY)


def test_a_file_is_written_and_lies_behind_the_share(anyone: Samba) -> None:
    tree = connect(anyone)
    file = opened(tree, "disk.raw")
    assert file.write(b"x" * 4096, 8192) == 4096
    file.flush()
    file.close()
    disconnect(tree)
    assert anyone.file("disk.raw").read_bytes() == bytes(8192) + b"x" * 4096
    assert anyone.file("disk.raw").stat().st_uid == anyone.uid


def test_what_is_put_is_served(samba: Samba, tmp_path: Path) -> None:
    samba.put("deep/down/put.raw", b"content", 4096)
    smbclient(samba, f"lcd {tmp_path}", "get deep/down/put.raw got.raw")
    assert (tmp_path / "got.raw").read_bytes() == b"content".ljust(4096, b"\0")
    assert samba.url("a b.raw") == f"smb://{samba.user}@127.0.0.1:{samba.port}/disks/a b.raw"
    assert samba.url("folder/", port=5).endswith(":5/disks/folder/")


def test_it_comes_back_after_a_stop_a_kill_and_a_reboot(anyone: Samba) -> None:
    before = anyone.processes()
    assert before[0] == anyone.leader
    anyone.restart()
    assert not set(before) & set(anyone.processes())
    tree = connect(anyone)
    opened(tree, "disk.raw")
    anyone.kill_all()
    assert not anyone.processes()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", anyone.port), 5)
    disconnect(tree)
    anyone.start()
    anyone.kill_all()
    anyone.start(rebooted=True)
    assert "disk.raw" in smbclient(anyone, "ls")


def test_ends_of_a_serving_process_leave_the_others(make_samba: Callable[..., Samba]) -> None:
    server = make_samba()
    assert server.children() == []
    for end in (server.kill_child, server.terminate_child):
        tree, other = connect(server), connect(server)
        children = server.children()
        assert len(children) == 2
        end(children[0])
        assert server.children() == [children[1]]
        end()
        assert server.children() == []
        assert server.running()
        disconnect(tree)
        disconnect(other)


def test_a_paused_server_does_not_answer_until_it_goes_on(
    make_samba: Callable[..., Samba],
) -> None:
    server = make_samba()
    tree = connect(server)
    file = opened(tree, "disk.raw")
    server.pause()
    request, unpack = file.write(b"late", 0, send=False)
    sent = tree.session.connection.send(request, tree.session.session_id, tree.tree_connect_id)
    assert not sent.response_event.wait(0.2)
    server.go_on()
    assert unpack(sent) == 4
    server.pause(everything=True)
    server.stop()  # also of what is paused
    disconnect(tree)


def test_the_password_and_the_account_can_be_changed(anyone: Samba) -> None:
    server = anyone
    old = server.password
    server.set_password("another one")
    assert "blocks available" in smbclient(server, "ls")
    assert "LOGON_FAILURE" in smbclient(server, "ls", password=old)
    server.want_new_password()
    assert "PASSWORD_MUST_CHANGE" in smbclient(server, "ls")
    server.want_new_password(False)
    assert "blocks available" in smbclient(server, "ls")
    server.edit_account("-c", "[D]")
    assert "ACCOUNT_DISABLED" in smbclient(server, "ls")


def test_settings_can_be_changed_while_it_runs(
    make_samba: Callable[..., Samba], tmp_path: Path
) -> None:
    server = make_samba()
    server.reconfigure(share_lines=["read only = yes"])
    assert "ACCESS_DENIED" in smbclient(server, "mkdir one")
    server.reconfigure(share_lines={"other": ["read only = yes"]}, encrypt="required")
    assert "ACCESS_DENIED" not in smbclient(server, "mkdir two")
    assert server.file("two").is_dir()
    with pytest.raises(SMBException):
        connect(server, share="other")
    server.reconfigure(shares={**server.shares, "other": tmp_path})
    disconnect(connect(server, share="other"))


def test_several_addresses_and_ports_serve_one_client_for_multichannel(
    make_samba: Callable[..., Samba],
) -> None:
    server = make_samba(addresses=["127.0.0.1", "127.0.0.2"], ports=2)
    client, connections = uuid.uuid4(), []
    for address in server.addresses:
        for port in server.ports:
            one = Connection(client, address, port)
            one.client_capabilities |= Capabilities.SMB2_GLOBAL_CAP_MULTI_CHANNEL
            one.connect(timeout=10)
            assert one.supports_multi_channel
            connections.append(one)
    # Samba gives all of one client's to one process; the others end a moment later
    eventually(lambda: len(server.children()) == 1, what="one process is left")
    for one in connections:
        one.disconnect()


# -- the proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back what it gets; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve_echo, args=(listener,))
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def _serve_echo(listener: socket.socket) -> None:
    threads = []
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            break
        threads.append(threading.Thread(target=_echo, args=(connection,)))
        threads[-1].start()
    for thread in threads:
        thread.join(10)


def _echo(connection: socket.socket) -> None:
    with connection:
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
        except OSError:
            pass


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    """A proxy before the echo server."""
    with Proxy(echo) as one:
        yield one


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    """A connection through the proxy."""
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as one:
        yield one


def close_gently_unread(echo: int) -> None:
    """Close connections whose peers read nothing of what is still to be sent."""
    with Proxy(echo) as proxy, socket.create_connection(("127.0.0.1", proxy.port), 10) as one:
        one.sendall(b"once")
        assert one.recv(4, socket.MSG_WAITALL) == b"once"

        def close_gently() -> None:
            for writer in proxy.writers:
                writer.write(bytes(16 << 20))
            proxy.end_all(gently=True)

        proxy._now(close_gently)


def test_a_proxy_leaves_no_connection_behind(echo: int) -> None:
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always", ResourceWarning)
        close_gently_unread(echo)
        gc.collect()
    assert not [str(one.message) for one in leaked if one.category is ResourceWarning]


def exchanged(client: socket.socket, data: bytes) -> bytes:
    """Send, and return as much as comes back; what came before a reset counts."""
    client.sendall(data)
    got = b""
    while len(got) < len(data):
        try:
            more = client.recv(len(data))
        except ConnectionResetError:
            return got + b"RESET"
        if not more:
            return got + b"END"
        got += more
    return got


def test_the_proxy_forwards_and_counts(proxy: Proxy, client: socket.socket) -> None:
    data = os.urandom(100_000)
    assert exchanged(client, data) == data
    assert proxy.forwarded("to_server") == proxy.forwarded("to_client") == len(data)
    assert (proxy.accepted, proxy.connections) == (1, 1)
    client.close()
    eventually(lambda: proxy.connections == 0)


def test_the_proxy_cuts_now_and_at_an_exact_byte(proxy: Proxy, client: socket.socket) -> None:
    assert exchanged(client, b"abc") == b"abc"
    proxy.cut()
    assert proxy.connections == 0
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as second:
        proxy.cut_after(5, "to_client")
        assert exchanged(second, b"0123456789") == b"01234RESET"
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as third:
        proxy.truncate("to_client", keep=3)
        assert exchanged(third, b"0123456789") == b"012END"
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as fourth:
        assert exchanged(fourth, b"0123456789") == b"0123456789"


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_the_proxy_flips_the_bits_it_is_told_to(
    proxy: Proxy, client: socket.socket, direction: Direction
) -> None:
    assert exchanged(client, b"before") == b"before"
    proxy.corrupt(direction, skip=2, count=3)
    assert exchanged(client, bytes(8)) == b"\0\0\1\1\1\0\0\0"
    assert exchanged(client, bytes(8)) == bytes(8)


@pytest.mark.parametrize("direction", [None, "to_server", "to_client"])
def test_the_proxy_holds_and_releases(
    proxy: Proxy, client: socket.socket, direction: Direction | None
) -> None:
    assert exchanged(client, b"abc") == b"abc"
    proxy.hold(direction)
    client.sendall(b"held")
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.recv(4)
    assert proxy.forwarded("to_client") == 3
    if direction == "to_client":
        assert proxy.forwarded("to_server") == 7
    with socket.create_connection(("127.0.0.1", proxy.port), 10):
        eventually(lambda: proxy.accepted == 2)
    proxy.release()
    client.settimeout(10)
    assert client.recv(4) == b"held"


def test_the_proxy_refuses_and_accepts_on_the_same_port(
    proxy: Proxy, client: socket.socket
) -> None:
    assert exchanged(client, b"abc") == b"abc"
    proxy.refuse(cut=False)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), 10)
    assert exchanged(client, b"abc") == b"abc"
    proxy.refuse()
    assert proxy.connections == 0
    proxy.accept()
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as second:
        assert exchanged(second, b"abc") == b"abc"


def test_the_proxy_delays_without_reordering(proxy: Proxy, client: socket.socket) -> None:
    proxy.delay(0.05)
    data = os.urandom(300_000)
    assert exchanged(client, data) == data
    proxy.delay(0)
    assert exchanged(client, data) == data


def test_an_smb_client_notices_a_flipped_bit_and_a_cut(samba: Samba) -> None:
    with Proxy(samba.port) as proxy:
        tree = connect(samba, proxy.port)
        file = opened(tree, "through.raw")
        file.write(b"x" * 4096, 0)
        proxy.corrupt("to_client", skip=200, count=1)  # within what is read
        with pytest.raises(LOST):
            file.read(0, 4096)
        proxy.cut()
        with pytest.raises(LOST):
            file.read(0, 4096)
        disconnect(tree)
