"""Manual pages and completions are of the program, and their readers take them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mirrord.core.geometry import MIB
from mirrord.service.config import Config, NbdConfig
from mirrord.service.grants import Grant
from mirrord.service.shares import ShareConfig
from tests.daemon import Daemon
from tests.helpers import require_program
from tests.style.sources import ROOT
from tests.style.test_readme import command_rows

BIN = Path(sys.executable).parent
PACKAGING = ROOT / "systemd" / "packaging"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make them as a build does."""
    folder = tmp_path_factory.mktemp("pages")
    subprocess.run([sys.executable, PACKAGING / "pages.py", folder], check=True)
    return folder


def shown(page: Path) -> str:
    """Return a page as `man` shows it; that nothing is wrong with it."""
    done = subprocess.run(
        [require_program("man"), "--warnings", "--local-file", page], capture_output=True,
        text=True, env={"LC_ALL": "C.UTF-8", "MANWIDTH": "200", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), page
    return re.sub(".\b", "", done.stdout)


def test_every_command_has_a_page_with_its_options(pages: Path) -> None:
    overview = shown(pages / "man" / "mirrord.1")
    rows = [row for row in command_rows() if "…" not in row.split()[1]]
    assert rows
    for row in rows:
        words = [word for word in row.split()[1:] if word.isalpha() and word.islower()]
        name = "-".join(["mirrord", *words])
        page = shown(pages / "man" / f"{name}.1")
        assert f"{name}(1)" in overview
        for option in re.findall(r"--[a-z-]+", row):
            assert option in page, f"{name}: {option}"
        assert re.search(r"^\s+4\s+refused$", page, re.M)
    assert len(list((pages / "man").glob("*.1"))) == len(rows) + 1


def test_the_page_of_the_configuration_has_every_key(pages: Path) -> None:
    page = shown(pages / "man" / "mirrord.toml.5")
    shown_keys = set(re.findall(r"^\s+(\w+) = ", page, re.M))
    keys = {*Config.__struct_fields__} - {"nbd", "smb", "grant"}
    example = (ROOT / "systemd" / "mirrord.toml").read_text()
    for struct in (NbdConfig, ShareConfig, Grant):
        keys |= {each for each in struct.__struct_fields__ if f"# {each} = " in example}
    assert {"group", "verbs", "roots"} <= keys
    assert keys <= shown_keys
    assert msgspec.structs.asdict(Config())["keep_jobs"] == 1000
    assert "keep_jobs = 1000" in page


def test_the_pages_are_well_formed(pages: Path) -> None:
    made = sorted((pages / "man").iterdir())
    done = subprocess.run(
        [require_program("mandoc"), "-T", "lint", "-W", "warning", *made],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def bash(pages: Path, words: list[str]) -> list[str]:
    """Press the tabulator in bash, at the end of the words."""
    script = (
        f"source {pages}/bash/mirrord\n"
        f"COMP_WORDS=({' '.join(word or repr('') for word in words)})\n"
        f"COMP_CWORD={len(words) - 1}\n"
        "$(complete -p mirrord | sed 's/.* -F \\([^ ]*\\) .*/\\1/') mirrord\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return output("bash", "--norc", "-c", script)


def fish(pages: Path, words: list[str]) -> list[str]:
    """Press it in fish, which says what each word means."""
    script = f"source {pages}/fish/mirrord.fish; complete --do-complete '{' '.join(words)}'"
    return [line.split("\t")[0] for line in output("fish", "--no-config", "--command", script)]


def zsh(pages: Path, words: list[str]) -> list[str]:
    """Press it in zsh, in a terminal of its own: only there its completion runs."""
    script = (
        "zmodload zsh/zpty\n"
        "zpty shell zsh -f\n"
        'put() { zpty -w shell "$1"; }\n'
        f"put 'PS1=; fpath=({pages}/zsh $fpath); autoload -U compinit; compinit -u -D'\n"
        'put \'bindkey "^I" complete-word; zstyle ":completion:*" list-grouped false\'\n'
        'put \'zstyle ":completion:*" format ""; setopt list_rows_first; LISTMAX=9999\'\n'
        "put 'PS1=REA\"\"DY'\n"  # its editor shows it once it reads keys
        "zpty -r shell seen '*READY*'\n"
        f"zpty -n -w shell '{' '.join(words)}'$'\\t'\n"
        f"zpty -n -w shell $'\\x01print \"<\\x05>\" | cat -v; print EN''D\\n'\n"
        "zpty -r shell seen '*END*'\n"
        'print -r -- "$seen"'
    )
    text = "\n".join(output("zsh", "-f", "-c", script))
    return re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", " ", text).split()


def output(*command: str) -> list[str]:
    """Run a shell that finds this mirrord; its words, and silence on standard error."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "TERM": "dumb"}
    done = subprocess.run(
        [require_program(command[0]), *command[1:]],
        capture_output=True, text=True, timeout=60, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split("\n")


@pytest.mark.parametrize("press", [bash, fish, zsh])
def test_completion(
    press: Callable[[Path, list[str]], list[str]],
    pages: Path,
    daemon: Daemon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "--keep-source" in press(pages, ["mirrord", "move", "--ke"])
    assert {"full", "none"} <= set(press(pages, ["mirrord", "move", "vm", "--verify", ""]))
    (tmp_path / "d.raw").write_bytes(bytes(MIB))
    daemon.attach("alpha", tmp_path / "d.raw")
    assert "alpha" not in press(pages, ["mirrord", "show", "al"]), "of no daemon"
    monkeypatch.setenv("MIRRORD_SOCKET", str(daemon.socket))
    assert "alpha" in press(pages, ["mirrord", "show", "al"])


@pytest.mark.parametrize("press", [fish, zsh])
def test_completion_of_paths(
    press: Callable[[Path, list[str]], list[str]],
    pages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bash completes them by itself where we propose nothing."""
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").touch()
    assert "disk.raw" in press(pages, ["mirrord", "attach", "vm", "di"])
    assert "-o default" in (pages / "bash" / "mirrord").read_text()


def test_what_is_installed_around_the_program(pages: Path, tmp_path: Path) -> None:
    """With PREFIX, where each thing is looked for; the configuration is never overwritten."""
    root = tmp_path / "root"
    prefix = root / "usr" / "local"
    environment = {
        "PATH": os.environ["PATH"], "DESTDIR": str(root), "PREFIX": "/usr/local",
        "SYSCONFDIR": "/etc", "PAGES": str(pages),
    }  # fmt: skip

    def run(what: str) -> None:
        subprocess.run([PACKAGING / "install", what], check=True, env=environment)

    run("surroundings")
    units = prefix / "lib" / "systemd" / "system"
    for unit, line in (
        ("mirrord.service", "ExecStart=/usr/local/bin/mirrord daemon"),
        ("mirrord-disks.service", "ExecStop=/usr/local/lib/mirrord/bin/python -P -m"),
    ):
        assert f"\n{line}" in (units / unit).read_text()
    for path in (
        "lib/sysusers.d/mirrord.conf", "lib/tmpfiles.d/mirrord.conf",
        "lib/systemd/system/mirrord.socket", "share/man/man1/mirrord-move.1",
        "share/man/man5/mirrord.toml.5", "share/bash-completion/completions/mirrord",
        "share/zsh/site-functions/_mirrord", "share/fish/vendor_completions.d/mirrord.fish",
        "share/doc/mirrord/README.md", "share/doc/mirrord/places.conf",
    ):  # fmt: skip
        assert (prefix / path).is_file(), path
    config = root / "etc" / "mirrord" / "mirrord.toml"
    config.write_text("# mine")
    run("surroundings")
    assert config.read_text() == "# mine"
    run("uninstall")
    assert [path for path in root.rglob("*") if not path.is_dir()] == [config]
