"""Locations on shares: what is one, what they are called, and names that no server takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrord.errors import RefusedError, UsageError
from mirrord.smb.location import (
    NAME_BYTES_MAX,
    PATH_MAX,
    ShareLocation,
    check_names,
    parse_location,
)

BASE = ShareLocation("nas1", 445, "vms", "web/disk.raw")


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("smb://nas1/vms/web/disk.raw", BASE),
        ("SMB://NAS1/vms/web/disk.raw", BASE),
        ("smb://nas1:445//vms//web///disk.raw", BASE),
        ("smb://@nas1/vms/web/disk.raw", BASE),
        ("smb://nas1/VMs/Web/Disk.raw", ShareLocation("nas1", 445, "VMs", "Web/Disk.raw")),
        ("smb://nas1:4450/vms/a", ShareLocation("nas1", 4450, "vms", "a")),
        ("smb://nas1:65535/vms/a", ShareLocation("nas1", 65535, "vms", "a")),
        ("smb://nas1:00445/vms/a", ShareLocation("nas1", 445, "vms", "a")),
        ("smb://10.0.0.1/vms/a", ShareLocation("10.0.0.1", 445, "vms", "a")),
        ("smb://[FE80::1]/vms/a", ShareLocation("fe80::1", 445, "vms", "a")),
        ("smb://[0:0:0:0:0:0:0:1]:4450/vms/a", ShareLocation("::1", 4450, "vms", "a")),
        ("smb://anna@nas1/vms/a", ShareLocation("nas1", 445, "vms", "a", "anna")),
        ("smb://LAB;anna@nas1/vms/a", ShareLocation("nas1", 445, "vms", "a", "LAB\\anna")),
        ("smb://LAB\\anna@nas1/vms/a", ShareLocation("nas1", 445, "vms", "a", "LAB\\anna")),
        ("smb://anna%40lab@nas1/vms/a", ShareLocation("nas1", 445, "vms", "a", "anna@lab")),
        ("smb://anna@[::1]:1/vms/a", ShareLocation("::1", 1, "vms", "a", "anna")),
        ("smb://nas1/vms/a@b", ShareLocation("nas1", 445, "vms", "a@b")),
        ("smb://nas1:1/vms/a@b", ShareLocation("nas1", 1, "vms", "a@b")),
        ("smb://nas1/vms/100%25", ShareLocation("nas1", 445, "vms", "100%25")),
        ("smb://nas1/vms/b c#d?".rstrip("?"), ShareLocation("nas1", 445, "vms", "b c#d")),
        ("smb://nas1/C$/a", ShareLocation("nas1", 445, "C$", "a")),
        ("smb://nas1/vms/web/", ShareLocation("nas1", 445, "vms", "web", is_folder=True)),
        ("smb://nas1/vms", ShareLocation("nas1", 445, "vms", "", is_folder=True)),
        ("smb://nas1/vms//", ShareLocation("nas1", 445, "vms", "", is_folder=True)),
    ],
)
def test_what_is_a_location(text: str, location: ShareLocation) -> None:
    found = parse_location(text)
    assert found == location
    assert parse_location(str(found)) == found


@pytest.mark.parametrize(
    ("location", "text"),
    [
        (BASE, "smb://nas1/vms/web/disk.raw"),
        (ShareLocation("::1", 4450, "vms", "a", "LAB\\anna"), "smb://LAB%5Canna@[::1]:4450/vms/a"),
        (ShareLocation("nas1", 445, "vms", "", is_folder=True), "smb://nas1/vms/"),
        (ShareLocation("nas1", 445, "vms", "a", is_folder=True), "smb://nas1/vms/a/"),
        (ShareLocation("nas1", 1, "vms", "a", "a@b/c"), "smb://a%40b%2Fc@nas1:1/vms/a"),
    ],
)
def test_how_a_location_is_written(location: ShareLocation, text: str) -> None:
    assert str(location) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "smb:", "smb://", "smb://nas1", "smb://nas1/", "smb://nas1//", "smb:/nas1/vms/a",
        "smb:///vms/a", "cifs://nas1/vms/a", " smb://nas1/vms/a", "smb://na s1/vms/a",
        "smb://nas1\n/vms/a", "smb://nas1:/vms/a", "smb://nas1:0/vms/a", "smb://nas1:65536/vms/a",
        "smb://nas1:x/vms/a", "smb://nas1:-1/vms/a", "smb://nas1:٤٤٥/vms/a", "smb://::1/vms/a",
        "smb://[::1/vms/a", "smb://[nas1]/vms/a", "smb://[::1]x/vms/a", "smb://[:::]/vms/a",
        "smb://[fe80::1%eth0]/vms/a", "smb://[]/vms/a", "smb://a@b@nas1/vms/a",
        "smb://nas1:" + "9" * 5000 + "/vms/a", "smb://\udcff/vms/a", "smb://\udcff@nas1/vms/a",
    ],
)  # fmt: skip
def test_what_is_no_location(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_location(text)
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "smb://anna:s3cret@nas1/vms/a",
        "SMB://anna:s3cret@nas1/vms/a",
        "smb://:s3cret@nas1/vms/a",
        "smb://LAB;anna:s3cret@nas1/vms/a",
        "smb://anna@lab.example:s3cret@nas1/vms/a",
        "smb://an[na:s3cret@nas1/vms/a",
        "smb://anna:445@s3cret@nas1/vms/a",
        "smb://anna:s3c/s3cret@nas1/vms/a",
        "smb://anna:s3c:s3cret@nas1/vms/a",
        "smb://anna%3As3cret@nas1/vms/a",
        "smb://anna%3as3cret@nas1/vms/a",
        "smb://anna:s3cret@nas1",
        "smb://anna:s3cret@nas 1/vms/a",
        "smb://anna:s3cret\n@nas1/vms/a",
        "smb:/anna:s3cret@nas1/vms/a",
    ],
)
def test_a_password_in_a_location_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError, match="password has no place") as caught:
        parse_location(text)
    assert "s3c" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_long_line_that_is_no_location_is_refused_at_once() -> None:
    for one in (":", "@", "/", ":/", "a@:", "[", "smb://", "%3a"):
        with pytest.raises(UsageError):
            parse_location("smb://" + one * 50_000)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a:b", "stream"), ("a\\b", "not allowed"), ("a<b", "not allowed"), ("a>b", "not allowed"),
        ('a"b', "not allowed"), ("a|b", "not allowed"), ("a?b", "not allowed"),
        ("a*b", "not allowed"), ("a\nb", "not allowed"), ("a\0", "not allowed"),
        ("a\x1f", "not allowed"), ("a\x7f", "not allowed"), (".", "without it"),
        ("..", "without it"), ("a.", "end"), ("a ", "end"), ("...", "end"), (" ", "end"),
        ("con", "device"), ("NUL", "device"), ("aux.raw", "device"), ("Com1", "device"),
        ("lpt9.tar.gz", "device"), ("com0", "device"), ("COM¹", "device"), ("prn", "device"),
        ("x" * 256, "longer"), ("ä" * 128, "longer"), (".mirrord", "own"),
        (".mirrord-part-7", "own"), (".MIRRORD-x", "own"), ("a\udcff", "UTF-8"),
    ],
)  # fmt: skip
def test_a_name_that_not_every_server_takes_is_refused(name: str, says: str) -> None:
    for text in (f"smb://nas1/vms/{name}", f"smb://nas1/vms/{name}/a", f"smb://nas1/vms/web/{name}",
                 f"smb://nas1/{name}/a"):  # fmt: skip
        with pytest.raises(RefusedError, match=says) as caught:
            parse_location(text)
        assert caught.value.code == "bad-name"
    with pytest.raises(RefusedError, match=says):
        BASE.inside(name)


@pytest.mark.parametrize(
    "name",
    ["x" * 255, "ä" * 127, "con1", "console", "a.con", "com", "com10", "nul2", ".a", "a b",
     "mirrord", "a.mirrord", "~", "a'b", "100%", "a;b", "disk[1].raw", "日本"],
)  # fmt: skip
def test_a_name_that_every_server_takes_is_taken(name: str) -> None:
    found = parse_location(f"smb://nas1/vms/{name}")
    assert found.name == found.path == name
    assert parse_location(str(found)) == found


def test_an_empty_name_is_refused() -> None:
    for path in ("a/", "/a", "a//b"):
        with pytest.raises(RefusedError):
            check_names(path)
    with pytest.raises(RefusedError):
        BASE.inside("")
    check_names("")


def test_a_path_is_not_too_long() -> None:
    name = "x" * (NAME_BYTES_MAX - 55)
    longest = "/".join([name] * 5)
    check_names(longest + "x" * (PATH_MAX - len(longest)))
    with pytest.raises(RefusedError, match="1025 characters"):
        check_names(longest + "x" * (PATH_MAX - len(longest) + 1))


def test_names_beside_and_inside() -> None:
    assert (BASE.folder, BASE.name) == ("web", "disk.raw")
    assert BASE.beside("other").path == "web/other"
    top = parse_location("smb://anna@nas1/vms/disk.raw")
    assert (top.folder, top.name) == ("", "disk.raw")
    assert top.beside("other") == ShareLocation("nas1", 445, "vms", "other", "anna")
    root = parse_location("smb://nas1/vms")
    assert root.inside("disk.raw") == ShareLocation("nas1", 445, "vms", "disk.raw")
    assert parse_location("smb://nas1/vms/web/").inside("disk.raw") == BASE


def test_a_server_is_called_as_people_write_it() -> None:
    assert BASE.server == "nas1"
    assert parse_location("smb://nas1:1/vms").server == "nas1:1"
    assert parse_location("smb://[::1]/vms").server == "[::1]"
    assert parse_location("smb://[::1]:1/vms").server == "[::1]:1"


def test_servers_ignore_case_and_users_are_no_part_of_a_place() -> None:
    for text in ("smb://nas1/vms/web/disk.raw", "smb://NAS1/VMS/Web/DISK.raw",
                 "smb://anna@nas1/vms/web/disk.raw", "smb://nas1/vms/web/disk.raw/"):  # fmt: skip
        assert BASE.same_place(parse_location(text))
    for text in ("smb://nas2/vms/web/disk.raw", "smb://nas1:1/vms/web/disk.raw",
                 "smb://nas1/vm/web/disk.raw", "smb://nas1/vms/web/disk2.raw"):  # fmt: skip
        assert not BASE.same_place(parse_location(text))


hosts = st.one_of(
    st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True),
    st.ip_addresses().map(str),
)
names = st.text(min_size=1, max_size=20)
users = st.text(st.characters(exclude_characters=":;", exclude_categories=("Cs",)), max_size=12)


@given(hosts, st.integers(1, 65535), names, st.lists(names, max_size=4), users, st.booleans())
def test_what_is_written_is_read_again(
    host: str, port: int, share: str, path: list[str], user: str, is_folder: bool
) -> None:
    location = ShareLocation(host, port, share, "/".join(path), user, is_folder or not path)
    try:
        for name in (share, *path):
            check_names(name)
            assert "/" not in name
    except (RefusedError, AssertionError):
        return
    assert parse_location(str(location)) == location


@given(st.text(alphabet="smb:/@%3A;[].a1 \\\n\udcffä\0", max_size=40), st.text(max_size=10))
def test_whatever_is_typed_is_a_location_or_refused(most: str, rest: str) -> None:
    for text in (most + rest, "smb://" + most + rest, "smb://a/" + most + rest):
        try:
            found = parse_location(text)
        except (UsageError, RefusedError):
            continue
        assert parse_location(str(found)) == found
        assert ":" not in found.user
