"""The command line: one program, `mirrord`. Words in, requests to the daemon, words or JSON out.

Exit codes: 0 done, 1 the job failed, 2 wrong usage, 3 cancelled, 4 refused, 5 no daemon,
124 timed out, 130 interrupted. An error is one line on standard error (with `--json` an object
with `code` and `message`) and nothing on standard output. Heavy imports wait until a command
needs them: `mirrord ls` is typed often and has to be quick.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

import mirrord
from mirrord import display, streams
from mirrord.control.client import Client
from mirrord.control.messages import AttachRequest, Job, MoveRequest
from mirrord.core.units import check_name, parse_rate
from mirrord.errors import MirrordError, RefusedError, UsageError
from mirrord.libvirt_commands import commands as libvirt_commands
from mirrord.options import (
    COMPLETE_VARIABLE,
    Cache,
    Cutover,
    Json,
    Mode,
    Name,
    PhaseChoice,
    Socket,
    Verify,
    disk_names,
    open_client,
)
from mirrord.service.places import absolute
from mirrord.waiting import WaitTimeoutError, follow, has_reached

# The classes by which typer tells wrong usage; it doesn't export them by name.
_CLICK_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

EXIT_INTERRUPTED = 130  # as shells report SIGINT
EXIT_TIMED_OUT = 124  # as timeout(1)
EXIT_OF_PHASE = {"done": 0, "failed": 1, "cancelled": 3}

_at_end = contextlib.ExitStack()  # what `main` closes, however a command ends

app = typer.Typer(
    name="mirrord",
    help="Move a virtual machine's disk to another place while the machine keeps using it.",
    epilog="Exit codes: 0 done, 1 the job failed, 2 wrong usage, 3 cancelled, 4 refused, "
    "5 no daemon, 124 timed out.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

credential = typer.Typer(help="Try the credentials of shares.", no_args_is_help=True)
app.add_typer(credential, name="credential")
app.add_typer(libvirt_commands, name="libvirt")


@app.callback(invoke_without_command=True)
def mirrord_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Print the version, or the help when no command is given."""
    if version:
        print(f"mirrord {mirrord.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(UsageError.exit_code)


@app.command()
def daemon(
    config: Annotated[
        Path | None,
        typer.Option(metavar="F", help="The configuration file.", show_default=False),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="D", help="What survives a reboot.", show_default=False),
    ] = None,
    runtime_dir: Annotated[
        Path | None, typer.Option(metavar="D", help="The sockets.", show_default=False)
    ] = None,
    socket: Socket = None,
) -> None:
    """Run the daemon in the foreground. Its end leaves every disk served."""
    from mirrord.service import daemon as service
    from mirrord.service.config import read_config

    chosen = {"state_dir": state_dir, "runtime_dir": runtime_dir, "socket": socket}
    changes = {key: str(path) for key, path in chosen.items() if path is not None}
    raise typer.Exit(service.run(lambda: msgspec.structs.replace(read_config(config), **changes)))


@app.command()
def attach(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the disk will be called.")],
    location: Annotated[
        str, typer.Argument(metavar="LOCATION", help="A file, a block device, or smb://…")
    ],
    cache: Annotated[
        Cache, typer.Option(help="Go through the page cache or past it.")
    ] = Cache.writeback,
    read_only: Annotated[bool, typer.Option("--read-only", help="Guests may not write.")] = False,
    fuse: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Not yet: appear as a file at PATH.", show_default=False),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Not yet: appear at LOCATION itself.")
    ] = False,
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Serve LOCATION as disk NAME, and print how guests reach it."""
    check_name(name)
    if fuse is not None or in_place:
        option = "--in-place" if in_place else "--fuse"
        raise RefusedError(
            "not-supported-yet", f"{option} can't be used yet; guests reach a disk by NBD"
        )
    request = AttachRequest(name, absolute(location), cache.value, read_only)
    disk = _client(socket).attach(request)
    display.put(disk, json, display.attached)


@app.command()
def ls(json: Json = False, socket: Socket = None) -> None:
    """List the disks."""
    display.put(_client(socket).disks(), json, display.disks)


@app.command()
def show(name: Name, json: Json = False, socket: Socket = None) -> None:
    """Show one disk, with lines to paste.

    They are for QEMU, libvirt and nbd-client.
    """
    display.put(_client(socket).disk(check_name(name)), json, display.disk)


@app.command()
def move(
    name: Name,
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="A new file, a folder, a block device, or smb://…"),
    ],
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="Leave the source where it is.")
    ] = False,
    verify: Annotated[
        Verify | None,
        typer.Option(
            help="Compare the target with the source before the cutover.",
            show_default="the configuration's, full",
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="Bytes a second, as in 100M.", show_default="none"),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(help="Passes over what changed, or both sides at once; auto: as it pays."),
    ] = Mode.auto,
    cutover: Annotated[
        Cutover, typer.Option(help="Cut over when ready, or wait for 'mirrord cutover'.")
    ] = Cutover.auto,
    force: Annotated[
        bool, typer.Option("--force", help="Although there is too little room, or only in memory.")
    ] = False,
    wipe: Annotated[
        bool, typer.Option("--wipe", help="Overwrite a source block device with zeroes at the end.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job and return.")] = False,
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Move a disk while its guest goes on.

    Shows how it goes until it ends; --no-wait returns at once.
    """
    check_name(name)
    request = MoveRequest(
        absolute(target),
        keep_source=keep_source,
        verify=None if verify is None else verify.value,
        limit=None if limit is None else parse_rate(limit),
        mode=mode.value,
        cutover=cutover.value,
        force=force,
        wipe=wipe,
    )
    client = _client(socket)
    job = client.move(name, request)
    if no_wait:
        return display.put(job, json, display.job)
    with display.Progress(sys.stderr if json else sys.stdout, job) as progress:
        try:
            job = follow(client, job, progress.update)
        except KeyboardInterrupt:
            progress.close()
            print(
                f"mirrord: the move of {name} goes on (job {job.id}); "
                f"'mirrord wait {name}' follows it, 'mirrord cancel {name}' ends it",
                file=sys.stderr,
            )
            raise typer.Exit(EXIT_INTERRUPTED) from None
    raise typer.Exit(_conclude(job, json))


@app.command()
def jobs(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Only this disk's.",
            show_default=False,
            autocompletion=disk_names,
        ),
    ] = None,
    json: Json = False,
    socket: Socket = None,
) -> None:
    """List the moves, newest first."""
    found = _client(socket).jobs(None if name is None else check_name(name))
    display.put(found, json, display.jobs)


@app.command()
def job(
    job_id: Annotated[
        str, typer.Argument(metavar="ID", help="The job, or the beginning of its id.")
    ],
    story: Annotated[
        bool,
        typer.Option("--story", help="When each phase began, how long it took, and why."),
    ] = False,
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Show one move: its phase and its numbers, or its story. --json has both."""
    if not job_id:
        raise UsageError("the job's id is empty; see 'mirrord jobs'")

    def told(shown: Job) -> str:
        return display.story(shown, display.terminal_columns()) if story else display.job(shown)

    display.put(_client(socket).job(job_id), json, told)


def _steer(name: str, verb: str, json: bool, socket: Path | None) -> None:
    client = _client(socket)
    found = _running_job(client, name, verb)
    display.put(client.steer(found, verb), json, display.job_line)


@app.command()
def pause(name: Name, json: Json = False, socket: Socket = None) -> None:
    """Hold a move; the guest goes on."""
    _steer(name, "pause", json, socket)


@app.command()
def resume(name: Name, json: Json = False, socket: Socket = None) -> None:
    """Go on with a paused move, or try a degraded target again at once."""
    _steer(name, "resume", json, socket)


@app.command()
def cancel(name: Name, json: Json = False, socket: Socket = None) -> None:
    """End the disk's move; the disk stays where it is."""
    _steer(name, "cancel", json, socket)


@app.command()
def cutover(name: Name, json: Json = False, socket: Socket = None) -> None:
    """Cut over as soon as both sides are equal."""
    _steer(name, "cutover", json, socket)


@app.command()
def limit(
    name: Name,
    rate: Annotated[str, typer.Argument(metavar="RATE", help="As in 100M; 0 is no limit.")],
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Change the bandwidth limit of the disk's move."""
    wanted = parse_rate(rate)
    client = _client(socket)
    found = _running_job(client, name, "limit")
    display.put(client.limit(found, wanted), json, display.job_line)


@app.command()
def wait(
    name: Name,
    phase: Annotated[
        PhaseChoice | None,
        typer.Option(help="Return already when the job is in this phase.", show_default=False),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S", min=0, help="Give up after so many seconds.", show_default="none"
        ),
    ] = None,
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Wait until the disk's move ends or reaches a phase."""
    client = _client(socket)
    found = client.jobs(check_name(name))
    if not found:
        raise RefusedError("no-job", f"disk {name} has never been moved; see 'mirrord jobs'")
    wanted = None if phase is None else phase.value
    try:
        job = next((each for each in found if not each.ended_already), found[0])
        ended = follow(client, job, lambda _: None, phase=wanted, timeout_s=timeout)
    except WaitTimeoutError as error:
        _complain("timeout", str(error), json)
        raise typer.Exit(EXIT_TIMED_OUT) from None
    if (wanted is not None and not ended.ended_already) or has_reached(ended, wanted):
        display.put(ended, json, display.job_line)
        return
    raise typer.Exit(_conclude(ended, json))


@app.command()
def detach(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Although clients are connected.")] = False,
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Stop serving a disk. Its bytes stay where they are."""
    gone = _client(socket).detach(check_name(name), force=force)
    display.put(gone, json, display.detached)


@app.command()
def upgrade(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Only these disks.", autocompletion=disk_names),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Although they are of its version.")
    ] = False,
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Replace the disks' processes, one after another, by ones of the daemon's version.

    Moves go on. Guests with reconnect-delay wait for a moment; others lose their connection.
    """
    client = _client(socket)
    wanted = [check_name(name) for name in names or ()] or [disk.name for disk in client.disks()]
    renewed = [client.upgrade(name, force=force) for name in wanted]
    display.put(renewed, json, display.upgraded)


@credential.command("test")
def try_credential(
    location: Annotated[
        str, typer.Argument(metavar="LOCATION", help="smb://[user@]server[:port]/share/folder/")
    ],
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Log on to a share with its credential, and print what the server gives.

    The daemon does it, as a disk's process would. A small file is made and removed again.
    """
    display.put(_client(socket).test_credential(absolute(location)), json, display.credential)


@app.command()
def demo(
    size: Annotated[str, typer.Option(metavar="SIZE", help="How large a disk to move.")] = "256M",
) -> None:
    """Move a live disk in a temporary folder and verify every byte. Needs nothing else."""
    from mirrord import demo as demonstration
    from mirrord.core.units import parse_size

    raise typer.Exit(demonstration.run(parse_size(size)))


@app.command()
def doctor(
    places: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PLACE]...", help="Folders to look at, beside those of disks."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="F", help="The configuration file.", show_default=False),
    ] = None,
    json: Json = False,
    socket: Socket = None,
) -> None:
    """Look whether this host, the configuration, disks' storage and shares are in order.

    Changes nothing. Exit code 1 for a problem.
    """
    from mirrord import doctor as consultation

    raise typer.Exit(consultation.run(config, socket, places or (), json))


def _client(socket: Path | None) -> Client:
    client = open_client(socket)
    _at_end.callback(client.close)
    return client


def _running_job(client: Client, name: str, verb: str) -> str:
    found = client.disk(check_name(name)).job
    if found is None:
        what = verb.replace("cutover", "cut over")
        raise RefusedError("no-job", f"disk {name} is not being moved: there is nothing to {what}")
    return found


def _conclude(ended: Job, json: bool) -> int:
    """Print how a job ended and return the exit code that says so."""
    code = EXIT_OF_PHASE[ended.phase]
    if json or code == 0:
        display.put(ended, json, display.job_line)
    else:
        _complain(ended.phase, display.outcome(ended), json=False)
    return code


def _complain(code: str, message: str, json: bool) -> None:
    """Say on standard error, in one line, what is wrong."""
    if json:
        print(msgspec.json.encode({"code": code, "message": message}).decode(), file=sys.stderr)
    else:
        print(f"mirrord: {' '.join(message.split())}", file=sys.stderr)


def main() -> int:
    """Run the command line and return its exit code."""
    streams.open_missing()
    if COMPLETE_VARIABLE in os.environ:
        from typer.completion import get_completion_inspect_parameters

        get_completion_inspect_parameters()  # makes the shells known to typer
    with _at_end:
        return _run("--json" in sys.argv[1:])


def _run(json: bool) -> int:
    try:
        result = app(standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except MirrordError as error:
        _complain(error.code, str(error), json)
        return error.exit_code
    except _CLICK_USAGE_ERROR as error:
        _complain(UsageError.code, _usage(error), json)
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("mirrord: interrupted; what was asked for may go on: mirrord jobs", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit) as ended:
        # Whoever read our output has seen enough. Typer ends with 1 when it meets that first.
        if isinstance(ended, SystemExit) and ended.code != 1:
            raise
        streams.discard_output()
        return 0
    except OSError:
        if (failure := streams.output_failure()) is None:
            raise
        streams.discard_output()
        _complain("no-output", f"standard output: {failure.strerror}", json)
        return RefusedError.exit_code


def _usage(error: Exception) -> str:
    """Return click's explanation in one line, and where to read on."""
    command = context.command_path if (context := getattr(error, "ctx", None)) else "mirrord"
    explain = getattr(error, "format_message", lambda: str(error))
    return f"{explain().rstrip('.')}; see '{command} --help'"
