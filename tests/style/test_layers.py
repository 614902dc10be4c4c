"""Layers point one way, and the pure modules are pure.

The import graph is read from the syntax trees: what is imported inside a function counts too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.style.sources import PACKAGE, imports, module_name, python_files

# Who may import whom: a layer, and the layers or single modules below it that it may see.
# `control` carries messages, so that the engine is no business of its.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "core": {"errors"},
    "nbd": {"errors", "core"},
    "smb": {"errors", "core"},
    "storage": {"errors", "core", "smb", "engine.store"},  # job_files: the engine's interface
    # never a concrete backend
    "engine": {"errors", "core", "storage.backend", "storage.completion"},
    "frontends": {"errors", "core", "nbd", "engine", "storage.backend", "storage.completion"},
    "control": {"errors", "core"},
    "service": {"errors", "core", "nbd", "smb", "storage", "engine", "frontends", "control"},
    "libvirt": {"errors", "core", "control", "service.places"},
    "cli": {"errors", "core", "control", "service", "libvirt"},
    "__main__": {"cli"},
    "": set(),  # mirrord/__init__.py
}

PURE = ("core", "nbd", "smb")
IMPURE = {
    "asyncio", "os", "socket", "time", "random", "logging", "threading", "pathlib", "io",
    "subprocess", "multiprocessing", "concurrent", "select", "selectors", "datetime", "uvloop",
    "aiofiles", "aiohttp",
}  # fmt: skip

MODULES = python_files("mirrord")


# Modules of one layer, without a folder.
COMMAND_LINE = {
    "cli", "demo", "display", "doctor", "libvirt_commands", "options", "streams", "waiting",
}  # fmt: skip


def layer(name: str) -> str:
    """Return the layer of a module: its first name below the package."""
    first = name.split(".")[1] if "." in name else ""
    return "cli" if first in COMMAND_LINE else first


def permitted(importer: str, imported: str) -> bool:
    """Tell whether a module of the package may import another name of it."""
    own = layer(importer)
    below = imported.removeprefix("mirrord").removeprefix(".")
    if not below:  # the package itself: its version
        return True
    return layer(imported) == own or any(
        below == allowed or below.startswith(f"{allowed}.") for allowed in MAY_IMPORT[own]
    )


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    name = module_name(path)
    own = {n for n in imports(path) if n == "mirrord" or n.startswith("mirrord.")}
    # `from mirrord.storage import backend` gives the folder's name too: that one is harmless
    wrong = {n for n in own if not permitted(name, n)}
    wrong = {n for n in wrong if not any(m.startswith(f"{n}.") for m in own - wrong)}
    assert not wrong, f"{name} ({layer(name)}) imports {sorted(wrong)}"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.relative_to(PACKAGE).parts[0] in PURE], ids=module_name
)
def test_a_pure_module_knows_no_clock_no_chance_and_no_system(path: Path) -> None:
    wrong = {n for n in imports(path) if n.split(".")[0] in IMPURE}
    assert not wrong, f"{module_name(path)} imports {sorted(wrong)}"


def test_every_layer_is_in_the_table() -> None:
    assert {layer(module_name(path)) for path in MODULES} <= set(MAY_IMPORT)


def test_a_module_that_breaks_the_layers_is_noticed() -> None:
    assert not permitted("mirrord.engine.job", "mirrord.storage.file")
    assert not permitted("mirrord.core.bitmap", "mirrord.storage.backend")
    assert not permitted("mirrord.smb.channel", "mirrord.storage.smb.line")
    assert not permitted("mirrord.engine.job", "mirrord.smb.location")
    assert permitted("mirrord.storage.smb.line", "mirrord.smb.channel")
    assert not permitted("mirrord.frontends.nbd_server", "mirrord.service.daemon")
    assert permitted("mirrord.engine.job", "mirrord.storage.backend.Backend")
