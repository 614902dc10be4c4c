"""Daemons that know shares, for the tests of whole moves: configuration, content, leftovers."""

from __future__ import annotations

from pathlib import Path

from tests.samba import Samba


def section(samba: Samba, share: str = "disks", *, port: int | None = None, **keys: object) -> str:
    """Return a share's section of mirrord.toml, and write its credential's file.

    `port` is that of a proxy in front of the server; keys are added as they are.
    """
    secret = samba.root / "secret"
    if not secret.exists():
        keep_password(samba)
    lines = {"credential": str(secret), **keys}
    body = "\n".join(f"{key} = {_toml(value)}" for key, value in lines.items())
    return f'[smb."{samba.addresses[0]}:{port or samba.port}/{share}"]\n{body}\n'


def keep_password(samba: Samba, password: str | None = None) -> None:
    """Write the credential's file: the server's password, or another one."""
    secret = samba.root / "secret"
    secret.touch(mode=0o600)
    secret.write_text(samba.password if password is None else password)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def leftovers(folder: Path) -> list[str]:
    """Return what mirrord left behind in a folder: nothing, when all is well."""
    return sorted(path.name for path in folder.rglob("*") if ".mirrord" in path.name)
