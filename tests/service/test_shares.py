"""The sections of SMB shares: what they default to, what is refused, which one holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mirrord.errors import RefusedError, UsageError
from mirrord.service.config import read_config
from mirrord.service.shares import (
    SectionError,
    ShareConfig,
    check_sections,
    decode_shares,
    encode_shares,
    find_share,
    parse_section,
    weaknesses,
)


def explain(tmp_path: Path, text: str) -> str:
    """Return how a wrong configuration is explained, less the file's name."""
    path = tmp_path / "mirrord.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_config(path)
    told = str(caught.value)
    assert "\n" not in told
    return told.removeprefix(str(path))


def section(values: str, name: str = '"vault.example.com/vms"') -> str:
    """Return a configuration with one section."""
    return f'log_level = "debug"\n\n[smb.{name}]\ncredential = "vault"\n{values}\n'


def test_everything_is_strict_by_default() -> None:
    config = ShareConfig(credential="vault")
    assert weaknesses(config) == []
    assert (config.encryption, config.signing, config.min_dialect) == (
        "required", "required", "3.1.1",
    )  # fmt: skip
    assert (config.channels, config.io_timeout, config.unflushed_bytes) == (1, 60, 64 << 20)
    assert (config.write_through, config.fast, config.kerberos) == (False, True, False)


def test_a_whole_section(tmp_path: Path) -> None:
    path = tmp_path / "mirrord.toml"
    path.write_text(
        '[smb."vault.example.com/vms"]\ncredential = "kerberos"\nuser = "DOMAIN\\\\backup"\n'
        'keytab = "/etc/mirrord/client.keytab"\nccache = "FILE:/run/mirrord/ccache"\n'
        'channels = "auto"\nencryption = "allow-plaintext"\nsigning = "allow-unsigned"\n'
        'min_dialect = "2.1"\nio_timeout = 5\nunflushed_max = 1048576\nwrite_through = true\n'
        "fast = false\n[smb.nas]\ncredential = '/etc/mirrord/nas'\nchannels = 8\n"
    )
    config = read_config(path)
    first = config.smb["vault.example.com/vms"]
    assert (first.user, first.kerberos, first.channels) == ("DOMAIN\\backup", True, "auto")
    assert (first.unflushed_bytes, first.io_timeout, first.fast) == (1 << 20, 5, False)
    assert weaknesses(first) == ["plaintext allowed", "unsigned allowed", "dialect 2.1 allowed"]
    assert config.smb["nas"].channels == 8


def test_a_disk_process_learns_the_sections_and_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "mirrord.toml"
    path.write_text(section('unflushed_max = "8M"'))
    config = read_config(path)
    options = config.disk_options()
    handed = options[options.index("--smb") + 1]
    assert json.loads(handed) == {
        "vault.example.com/vms": {"credential": "vault", "unflushed_max": "8M"}
    }
    assert decode_shares(handed) == config.smb
    assert decode_shares(encode_shares({})) == {}


@pytest.mark.parametrize("text", ["", "[]", '{"a b": {"credential": "x"}}', '{"a": {}}'])
def test_what_a_disk_process_is_not_given(text: str) -> None:
    with pytest.raises(UsageError):
        decode_shares(text)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ('min_dialect = "2.1"', 'min_dialect = "2.1" can\'t encrypt: it needs encryption = '),
        ('signing = "allow-unsigned"', 'means nothing without encryption = "allow-plaintext"'),
        ('keytab = "/k"', 'keytab and ccache are for credential = "kerberos"'),
        ('ccache = "FILE:/k"', 'keytab and ccache are for credential = "kerberos"'),
        ('user = ""', "user is empty"),
        ('user = "a\\nb"', "user is empty or has control characters"),
        ('unflushed_max = "much"', "unflushed_max: 'much' is not a size"),
        ('unflushed_max = "1K"', "unflushed_max has to be between 1M and 16G"),
        ("unflushed_max = 17179869185", "unflushed_max has to be between 1M and 16G"),
    ],
)
def test_values_that_contradict_each_other(tmp_path: Path, values: str, told: str) -> None:
    explained = explain(tmp_path, section(values))
    assert explained.startswith(', line 3: [smb."vault.example.com/vms"]: ')
    assert told in explained


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\\u0000b", "/etc/a\\u0000b"])
def test_a_credential_that_names_none(tmp_path: Path, name: str) -> None:
    told = explain(tmp_path, f'[smb.nas]\ncredential = "{name}"\n')
    assert told.startswith(', line 1: [smb."nas"]: credential ')
    assert "$CREDENTIALS_DIRECTORY" in told


def test_a_relative_keytab(tmp_path: Path) -> None:
    told = explain(tmp_path, '[smb.nas]\ncredential = "kerberos"\nkeytab = "client.keytab"\n')
    assert told.endswith("keytab has to be an absolute path")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ("channels = 0", "channels"),
        ("channels = 9", "channels"),
        ('channels = "many"', "channels"),
        ('encryption = "never"', "encryption"),
        ('min_dialect = "1.0"', "min_dialect"),
        ("io_timeout = 0", "io_timeout"),
        ("unflushed_max = 1.5", "unflushed_max"),
    ],
)
def test_a_wrong_value_is_told_with_its_line(tmp_path: Path, values: str, key: str) -> None:
    told = explain(tmp_path, section(f"fast = true\n{values}"))
    assert told.startswith(f', line 6: {key} in [smb."vault.example.com/vms"]: ')


def test_the_section_that_is_wrong_is_named(tmp_path: Path) -> None:
    right = section("channels = 2")
    told = explain(tmp_path, f'{right}[smb."b:4450/vms"]\ncredential = "b"\nchanels = 2\n')
    assert told.startswith(
        ', line 8: unknown key chanels in [smb."b:4450/vms"]; known are: credential, user, keytab, '
    )
    told = explain(tmp_path, f"{right}[smb.'c']\nchannels = 0\ncredential = 'c'\n")
    assert told.startswith(', line 7: channels in [smb."c"]: ')


def test_a_section_needs_a_credential(tmp_path: Path) -> None:
    told = explain(tmp_path, "[nbd]\n[smb.nas]\nfast = true\n")
    assert told == ', line 2: [smb."nas"] has no credential, which it needs'


def test_what_is_no_section(tmp_path: Path) -> None:
    assert ", line 1: smb: Expected `object`" in explain(tmp_path, "smb = 3\n")
    assert '[smb."nas"]: Expected `object`' in explain(tmp_path, "[smb]\nnas = 3\n")
    told = explain(tmp_path, '[smb]\n"a b" = {credential = "x"}\n')
    assert told.startswith(", line 2: [smb.\"a b\"]: 'a b' is neither a host's name")


def test_a_name_without_quotes_is_explained(tmp_path: Path) -> None:
    told = explain(tmp_path, '[smb.vault.example.com]\ncredential = "vault"\n')
    assert told.startswith(", line 1: ")
    assert "write the name in quotes" in told


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Vault.Example.COM/VMs", "vault.example.com/vms"),
        ("nas", "nas"),
        ("nas:445/a", "nas/a"),
        ("nas:4450/a$", "nas:4450/a$"),
        ("192.0.2.1:4450", "192.0.2.1:4450"),
        ("[2001:DB8:0::1]/vms", "[2001:db8::1]/vms"),
        ("[2001:db8::1]:4450/vms", "[2001:db8::1]:4450/vms"),
        ("under_score/Größe und mehr", "under_score/größe und mehr"),
    ],
)
def test_names_of_sections(text: str, shown: str) -> None:
    assert str(parse_section(text)) == shown


@pytest.mark.parametrize(
    "text",
    ["", "/vms", "a b", "-a", "a-", "a/b/c", "a/", "a:0", "a:65536", "a:x", "a:", "smb://a/b",
     "//a/b", "a\\b", "a/b*", "a/b\n", "user@a/b", "2001:db8::1/vms", "[a]", "[::1", "[::1%eth0]",
     "a" * 254, "a/" + "b" * 81, "[\0]", "ä/b"],
)  # fmt: skip
def test_names_that_no_section_can_have(text: str) -> None:
    with pytest.raises(SectionError, match=r"^\[smb\."):
        parse_section(text)


def test_a_wrong_name_is_told_with_its_line(tmp_path: Path) -> None:
    told = explain(tmp_path, section("", '"smb://vault/vms"'))
    assert told.startswith(', line 3: [smb."smb://vault/vms"]: write the section as host/share')


def test_two_sections_for_the_same(tmp_path: Path) -> None:
    check_sections(["nas", "nas/a", "nas:4450/a", "nas/b"])
    told = explain(tmp_path, section("") + '[smb."VAULT.example.com:445/Vms"]\ncredential = "b"\n')
    assert told.startswith(', line 6: [smb."VAULT.example.com:445/Vms"]: it is the same as [smb.')


def test_the_section_that_holds() -> None:
    server, share, port, six = (ShareConfig(credential=name) for name in "abcd")
    shares = {"NAS": server, "nas/VMs": share, "nas:4450/vms": port, "[2001:db8::1]": six}
    assert find_share(shares, "nas", 445, "vms") is share
    assert find_share(shares, "Nas", 445, "VMS") is share
    assert find_share(shares, "nas", 445, "other") is server
    assert find_share(shares, "nas", 4450, "vms") is port
    assert find_share(shares, "2001:DB8::1", 445, "x") is six
    assert find_share(shares, "[2001:db8:0::1]", 445, "x") is six


@pytest.mark.parametrize(
    ("host", "port", "share", "named"),
    [
        ("other.example.com", 445, "VMs", "other.example.com/VMs"),
        ("nas", 4450, "vms", "nas:4450/vms"),
        ("nas.evil", 445, "vms", "nas.evil/vms"),
        ("na", 445, "s", "na/s"),
        ("2001:db8::2", 445, "x", "[2001:db8::2]/x"),
    ],
)
def test_a_share_that_is_not_configured(host: str, port: int, share: str, named: str) -> None:
    shares = {"nas/vms": ShareConfig(credential="a"), "nas": ShareConfig(credential="b")}
    with pytest.raises(RefusedError) as caught:
        find_share(shares, host, port, share)
    assert caught.value.code == "share-not-configured"
    told = str(caught.value)
    assert f'[smb."{named}"]' in told
    assert "\n" not in told
    # what it says to add does help
    assert find_share({named: shares["nas"]}, host, port, share) is shares["nas"]
