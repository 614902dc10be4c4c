"""Copies inside a server: the bytes never cross the network."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mirrord.core.geometry import KIB, MIB
from mirrord.storage.backend import Cache
from tests.helpers import require_loop_devices, require_program
from tests.samba import Samba
from tests.storage.conformance import pattern
from tests.storage.places import mounted
from tests.storage.shares import JOB, Client, MakeClient
from tests.storage.shares import make_client as make_client
from tests.tcp_proxy import Proxy

SIZE = 8 * MIB + 777
TALK_BYTES_MAX = 256 * KIB  # logging on, opening, asking to copy


@pytest.fixture
def proxy(samba: Samba) -> Iterator[Proxy]:
    """Count what crosses the network."""
    with Proxy(samba.port) as one:
        yield one


def crossed(proxy: Proxy) -> int:
    """Return how many bytes did."""
    return proxy.forwarded("to_server") + proxy.forwarded("to_client")


async def copy(client: Client, name: str) -> bool:
    """Copy disk NAME to NAME-copy as the copier does, in chunks; return whether that worked."""
    source = await client.open(f"{name}.raw", authoritative=True)
    place = client.place(f"{name}-copy.raw")
    target = client.mine(await place.create(JOB, source, cache=Cache.WRITEBACK))
    if not target.copies_from(source):
        return False
    for offset in range(0, SIZE, MIB):
        if not await target.copy_from(source, offset, min(MIB, SIZE - offset)):
            return False
    await target.flush()
    await place.publish(JOB)
    return True


async def test_the_bytes_of_a_copy_stay_inside_the_server(
    samba: Samba, proxy: Proxy, make_client: MakeClient
) -> None:
    samba.put("inside.raw", pattern(SIZE))
    before = crossed(proxy)
    assert await copy(make_client(samba, port=proxy.port), "inside")
    assert samba.file("inside-copy.raw").read_bytes() == pattern(SIZE)
    assert crossed(proxy) - before < TALK_BYTES_MAX


async def test_two_servers_copy_nothing_for_each_other(
    samba: Samba, make_client: MakeClient
) -> None:
    samba.put("apart.raw", pattern(SIZE))
    source = await make_client(samba).open("apart.raw", authoritative=True)
    target = await make_client(samba).create("elsewhere.raw", SIZE)
    assert not target.copies_from(source)
    assert not await target.copy_from(source, 0, MIB)


async def test_the_plain_path_copies_nothing_inside(samba: Samba, make_client: MakeClient) -> None:
    samba.put("plain.raw", pattern(SIZE))
    assert not await copy(make_client(samba, fast=False), "plain")


async def test_a_source_that_is_gone_is_no_copy(samba: Samba, make_client: MakeClient) -> None:
    client = make_client(samba)
    samba.put("going.raw", pattern(SIZE))
    source = await client.open("going.raw", authoritative=True)
    target = await client.create("gone.raw", SIZE)
    await source.close()
    assert not await target.copy_from(source, 0, MIB)


def shared_bytes(path: Path) -> int:
    """Return how much of a file has its blocks in common with another."""
    told = subprocess.run(
        [require_program("filefrag"), "-v", "-b1", str(path)],
        capture_output=True, text=True, check=True, timeout=30,
    ).stdout  # fmt: skip
    rows = [line.replace(":", " ").split() for line in told.splitlines() if "shared" in line]
    return sum(int(row[5]) for row in rows)


async def test_files_are_cloned_where_the_file_system_can(
    make_samba: Callable[..., Samba], make_client: MakeClient, tmp_path: Path
) -> None:
    require_loop_devices()
    with mounted("btrfs", tmp_path) as btrfs:
        samba = make_samba(shares={"disks": btrfs}, share_lines=["vfs objects = btrfs"])
        samba.put("clone.raw", pattern(SIZE))
        client = make_client(samba)
        assert await copy(client, "clone")
        made = samba.file("clone-copy.raw")
        assert made.read_bytes() == pattern(SIZE)
        assert shared_bytes(made) >= SIZE // MIB * MIB
        await client.close()
        samba.stop()
