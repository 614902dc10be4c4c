"""What sysfs says about which device it is, on a made-up tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mirrord.storage import block


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tree's root."""
    (tmp_path / "dev/block").mkdir(parents=True)
    monkeypatch.setattr(block, "_SYS", str(tmp_path))
    return tmp_path


def add(sysfs: Path, number: str, device: str, **attributes: str) -> int:
    """Add a device and its attributes (`__` for a slash); return its number."""
    folder = sysfs / "devices" / device
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in attributes.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(exist_ok=True)
        file.write_text(content + "\n")
    (sysfs / "dev/block" / number).symlink_to(folder)
    major, _, minor = number.partition(":")
    return os.makedev(int(major), int(minor))


@pytest.mark.parametrize(
    ("attributes", "serial"),
    [
        ({}, ""),
        ({"serial": ""}, ""),
        ({"serial": "disk-7"}, "serial disk-7"),
        ({"device__wwid": "naa.5000c500"}, "device/wwid naa.5000c500"),
        ({"wwid": "eui.0025", "device__serial": "the controller's"}, "wwid eui.0025"),
        ({"dm__uuid": "LVM-abc", "dm__name": "vg-lv"}, "dm/uuid LVM-abc"),
        ({"loop__backing_file": "/disks/a", "loop__offset": "0"}, "loop/backing_file /disks/a"),
        (
            {"loop__backing_file": "/disks/a", "loop__offset": "512"},
            "loop/backing_file /disks/a at 512",
        ),
    ],
)
def test_what_lasts_is_found(sysfs, attributes, serial) -> None:
    assert block._serial(add(sysfs, "8:16", "sdb", **attributes)) == serial


def test_a_partition_is_a_part_of_its_disk(sysfs) -> None:
    add(sysfs, "8:16", "sdb", wwid="naa.1", queue__discard_max_bytes="4096")
    first = add(sysfs, "8:17", "sdb/sdb1", partition="1")
    second = add(sysfs, "8:18", "sdb/sdb2", partition="2")
    assert block._serial(first) == "wwid naa.1 partition 1"
    assert block._serial(second) == "wwid naa.1 partition 2"
    assert block._queue_limit(first, "discard_max_bytes") == 4096
    assert block._queue_limit(first, "write_zeroes_max_bytes") == 0


def test_long_ones_keep_their_end(sysfs) -> None:
    names = [f"/{'d' * 300}/{disk}" for disk in "ab"]
    serials = [
        block._serial(add(sysfs, f"7:{minor}", f"loop{minor}", loop__backing_file=name))
        for minor, name in enumerate(names)
    ]
    assert serials[0] != serials[1]
    assert max(map(len, serials)) == 200


def test_a_device_that_went_away_has_none(sysfs) -> None:
    assert block._serial(os.makedev(8, 32)) == ""
