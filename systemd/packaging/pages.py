"""Write the manual pages and the completions of shells: python pages.py FOLDER

Both come from what the program itself has, its commands with their words (`mirrord.cli.app`) and
the commented configuration (`systemd/mirrord.toml`), when a package is built; so they say what
the program does. The pages are in man(7). No library makes them: those at hand read argparse or
click, and typer brings a click of its own that they don't know.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.completion import get_completion_script

import mirrord
from mirrord.cli import app
from mirrord.options import COMPLETE_VARIABLE

CONFIGURATION = Path(__file__).parent.parent / "mirrord.toml"
# Where a zsh that loads a completion runs it at once, instead of telling zsh about it.
ZSH_DEFINES = "compdef _mirrord_completion mirrord"
ZSH_DEFINES_OR_RUNS = f"""if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _mirrord_completion "$@"
else
  {ZSH_DEFINES}
fi"""
# Where nothing is proposed, fish has to be left to propose paths: `is-args` is always true.
FISH_ASKS = "ACTION=is-args _TYPER_COMPLETE_ARGS=(commandline -cp) mirrord"
FISH_LOOKS = (
    "ACTION=get-args _TYPER_COMPLETE_ARGS=(commandline -cp) mirrord | string length --quiet"
)


def pages() -> Iterator[tuple[str, str]]:
    """Yield the name and the content of each manual page."""
    program: Any = typer.main.get_command(app)
    commands = list(_commands(program, ["mirrord"]))
    yield "mirrord.1", _overview(program, commands)
    for words, command in commands:
        yield "-".join(words) + ".1", _page(words, command, program.epilog)
    yield "mirrord.toml.5", _configuration(CONFIGURATION.read_text())


def _commands(group: Any, words: list[str]) -> Iterator[tuple[list[str], Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, [*words, name])
        else:
            yield [*words, name], command


def _title(name: str, section: int, purpose: str) -> str:
    moment = int(os.environ.get("SOURCE_DATE_EPOCH", 0))
    day = datetime.datetime.fromtimestamp(moment, datetime.UTC) if moment else _today()
    return (
        f".TH {name.upper()} {section} {day:%Y-%m-%d} "
        f'"mirrord {mirrord.__version__}" "mirrord"\n'
        f".SH NAME\n{_text(name)} \\- {_text(purpose)}\n"
    )


def _today() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _overview(program: Any, commands: list[tuple[list[str], Any]]) -> str:
    listed = "".join(
        f".TP\n.B {_text(' '.join(words))}\n{_text(_purpose(command))}\nSee\n"
        f".BR {_text('-'.join(words))} (1).\n"
        for words, command in commands
    )
    return (
        _title("mirrord", 1, _first_lower(program.help))
        + ".SH SYNOPSIS\n.B mirrord\n.I command\n.RI [ option ]...\n.br\n"
        + _bold("mirrord --version")
        + f".SH DESCRIPTION\n{_text(program.help)}\n"
        + f".SH COMMANDS\n{listed}"
        + _exit_status(program.epilog)
        + ".SH FILES\n"
        + ".TP\n.I /etc/mirrord/mirrord.toml\nThe configuration; see\n.BR mirrord.toml (5).\n"
        + ".TP\n.I /run/mirrord/control.sock\nThe control socket, over which HTTP is spoken.\n"
        + ".TP\n.I /run/mirrord/nbd/NAME.sock\nWhere guests reach the disk NAME.\n"
        + ".TP\n.I /var/lib/mirrord\nWhich disks and moves there are.\n"
        + _environment()
        + ".SH SEE ALSO\n.BR mirrord.toml (5),\n.BR systemctl (1),\n.BR qemu (1)\n"
    )


def _page(words: list[str], command: Any, epilog: str) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    synopsis = "".join(f".I {_text(each.make_metavar(None))}\n" for each in arguments)
    body = _title("-".join(words), 1, _first_lower(_purpose(command)))
    body += f".SH SYNOPSIS\n{_bold(' '.join(words))}.RI [ option ]...\n{synopsis}"
    paragraphs = "\n.PP\n".join(_text(part) for part in command.help.split("\n\n"))
    body += f".SH DESCRIPTION\n{paragraphs}\n"
    if arguments:
        body += ".SH ARGUMENTS\n"
        body += "".join(_entry(each.make_metavar(None), "", each) for each in arguments)
    body += ".SH OPTIONS\n"
    body += "".join(_entry(", ".join(each.opts), _value(each), each) for each in options)
    body += '.TP\n.BR \\-h ", " \\-\\-help\nShow the options.\n'
    if any("--socket" in each.opts for each in options):
        body += _environment()
    return body + _exit_status(epilog) + ".SH SEE ALSO\n.BR mirrord (1)\n"


def _entry(name: str, value: str, parameter: Any) -> str:
    default = parameter.show_default if isinstance(parameter.show_default, str) else None
    if default is None and value and parameter.default is not None:
        default = str(getattr(parameter.default, "value", parameter.default))
    known = f"\nDefault: {_text(default)}." if default else ""
    shown = f'.BI {_text(name)} " {_text(value)}"\n' if value else _bold(name)
    return f".TP\n{shown}{_text(parameter.help)}{known}\n"


def _value(option: Any) -> str:
    """Return what an option takes: a word for it, or its choices."""
    if option.is_flag:
        return ""
    if option.metavar is None and hasattr(option.type, "choices"):
        return "|".join(str(getattr(each, "value", each)) for each in option.type.choices)
    return str(option.make_metavar(None))


def _purpose(command: Any) -> str:
    return str(command.help).split("\n\n")[0].replace("\n", " ")


def _first_lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:].rstrip(".")


def _exit_status(epilog: str) -> str:
    """Return the section made from the help's last line, "Exit codes: 0 done, 1 …"."""
    codes = re.findall(r"(\d+) ([^,.]+)", epilog)
    listed = (f".TP\n.B {code}\n{_text(means)}\n" for code, means in codes)
    return ".SH EXIT STATUS\n" + "".join(listed)


def _environment() -> str:
    return ".SH ENVIRONMENT\n.TP\n.B MIRRORD_SOCKET\nThe control socket, without \\-\\-socket.\n"


def _configuration(text: str) -> str:
    """Return the page of the commented example: its paragraphs, each with the keys below it."""
    first, *paragraphs = text.strip().split("\n\n")
    body = _title("mirrord.toml", 5, "configuration of mirrord")
    body += f".SH DESCRIPTION\n{_text(_uncommented(first))}\n.SH KEYS\n"
    for paragraph in paragraphs:
        words: list[str] = []
        keys: list[tuple[str, str]] = []
        for line in paragraph.splitlines():
            line = line.removeprefix("#")
            key, _, remark = line.removeprefix(" ").partition("  # ")
            if re.match(r" \w+ = | \[", line):
                keys.append((key.split(" # ")[0].rstrip(), remark.strip()))
            elif keys and line.lstrip().startswith("# "):  # goes on with the key above
                key, said = keys.pop()
                keys.append((key, f"{said} {line.split('# ', 1)[1].strip()}"))
            else:
                words.append(line.strip())
        if keys and keys[0][0].startswith("["):
            body += f".SS {_text(keys.pop(0)[0])}\n"
        elif not body.endswith(".SH KEYS\n"):
            body += ".PP\n"
        body += _text(" ".join(words)) + "\n" if words else ""
        body += "".join(f".TP\n{_bold(key)}{_text(said) or '.br'}\n" for key, said in keys)
    return body + ".SH SEE ALSO\n.BR mirrord (1)\n"


def _uncommented(text: str) -> str:
    return " ".join(line.removeprefix("#").strip() for line in text.splitlines())


def _bold(text: str) -> str:
    return f".B {_text(text)}\n"


def _text(text: str) -> str:
    """Return text as roff reads it: nothing in it is a command, a dash is a dash to copy."""
    text = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    text = text.replace("…", "...")
    return f"\\&{text}" if text[:1] in (".", "'") else text


def completions() -> Iterator[tuple[str, str]]:
    """Yield the file of each shell's completion: where the shell looks for it, and its content."""
    for shell, file in (("bash", "mirrord"), ("zsh", "_mirrord"), ("fish", "mirrord.fish")):
        script = get_completion_script(
            prog_name="mirrord", complete_var=COMPLETE_VARIABLE, shell=shell
        )
        script = script.replace(ZSH_DEFINES, ZSH_DEFINES_OR_RUNS).replace(FISH_ASKS, FISH_LOOKS)
        yield f"{shell}/{file}", script + "\n"


def main() -> None:
    folder = Path(sys.argv[1])
    for name, content in (*((f"man/{n}", c) for n, c in pages()), *completions()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


if __name__ == "__main__":
    main()
