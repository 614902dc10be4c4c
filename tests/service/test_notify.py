"""Programs that are told of a move that has ended."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mirrord.control.messages import Job, PhaseName
from mirrord.service import notify
from mirrord.service.config import Config
from mirrord.service.notify import Notifier
from tests.daemon import Daemon
from tests.helpers import eventually
from tests.service.test_restarts import SLOW

MIB = 1 << 20


def script(folder: Path, text: str, name: str = "tell") -> str:
    """Make an executable shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def job(phase: PhaseName, job_id: str = "1") -> Job:
    return Job(id=job_id, disk="vm", phase=phase, source="/a", target="/ü")


async def tell(config: Config, *jobs: Job) -> None:
    """Tell of jobs, and wait for the programs."""
    async with asyncio.TaskGroup() as group:
        notifier = Notifier(config, group)
        for each in jobs:
            notifier.ended(each, lambda: None)


async def test_each_outcome_has_its_program(tmp_path: Path) -> None:
    done = script(tmp_path, f'echo "$1" > {tmp_path}/word; cat > {tmp_path}/done', "on-done")
    failed = script(tmp_path, f"cat > {tmp_path}/failed", "on-failed")
    config = Config(on_done=[done, "two words"], on_failed=[failed])
    await tell(config, job("cancelled"))
    assert not (tmp_path / "done").exists()
    await tell(config, job("done"))
    assert (tmp_path / "word").read_text() == "two words\n"
    assert json.loads((tmp_path / "done").read_text()) == msgspec.to_builtins(job("done"))
    assert not (tmp_path / "failed").exists()
    await tell(config, job("failed"))
    assert json.loads((tmp_path / "failed").read_text())["phase"] == "failed"
    await tell(Config(), job("done"), job("failed"))


async def test_what_a_program_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the daemon's but its user: no environment, folder or open file."""
    monkeypatch.setenv("SECRET", "x")
    program = script(tmp_path, f"(env; pwd; ls /proc/$$/fd | wc -l) > {tmp_path}/given")
    await tell(Config(on_done=[program]), job("done"))
    given = (tmp_path / "given").read_text()
    assert "SECRET" not in given
    assert "PATH=/usr/local/sbin:" in given
    assert "\n/\n" in given
    assert int(given.split()[-1]) <= 5  # three, the script, and a pipe of its own


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo no mail server >&2; exit 3", "exit code 3: no mail server"),
        ("head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1", 'exit code 1: x{500}"?$'),
        ("exec < /dev/null; exit 1", "exit code 1"),  # it doesn't read
        ("kill -9 $$", "exit code -9"),
        ("sleep 1000 & wait", "ended after 0.2 s"),
        ("sleep 1000 & sleep 1000", "ended after 0.2 s"),
    ],
)
async def test_a_program_that_fails_is_logged(
    tmp_path: Path, monkeypatch, expect_log, caplog: pytest.LogCaptureFixture, text: str, why: str
) -> None:
    monkeypatch.setattr(notify, "DEADLINE_S", 0.2 if "sleep" in text else 30)
    expect_log("not notified")
    program = script(tmp_path, text)
    await tell(Config(on_failed=[program]), job("failed"))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.message.startswith(f"not notified job=1 disk=vm phase=failed program={program}")
    assert re.search(why, record.message), record.message


async def test_what_a_program_leaves_behind_holds_nobody_up(tmp_path: Path) -> None:
    end = tmp_path / "end"
    os.mkfifo(end)
    program = script(tmp_path, f"(read line < {end}) &")
    try:
        await asyncio.wait_for(tell(Config(on_done=[program]), job("done")), 20)
    finally:
        await asyncio.to_thread(end.write_bytes, b"now\n")


async def test_a_word_that_no_program_can_get_is_logged(tmp_path: Path, expect_log, caplog) -> None:
    expect_log("not notified")
    await tell(Config(on_done=["/bin/true", "a\0b"]), job("done"))
    assert "it can't be run: embedded null byte" in caplog.text


async def test_one_that_is_gone_is_logged(tmp_path: Path, expect_log, caplog) -> None:
    expect_log("not notified")
    await tell(Config(on_done=[str(tmp_path / "gone")]), job("done"))
    assert "No such file or directory" in caplog.text


async def test_few_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = most = 0

    async def outcome(command: list[str], text: bytes) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    monkeypatch.setattr(notify, "_outcome", outcome)
    await tell(Config(on_done=["/x"]), *(job("done", str(number)) for number in range(20)))
    assert most == notify.PROGRAMS_MAX


def test_who_waits_for_a_place_is_told_by_the_next_daemon(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """A stop comes while all places are taken by programs that take long."""
    count = notify.PROGRAMS_MAX + 2
    go_on = tmp_path / "go-on"
    program = script(
        tmp_path,
        f"cat >>{tmp_path}/told; for _ in $(seq 200); do [ -e {go_on} ] && exit; sleep 0.1; done",
    )
    daemon = make_daemon(f'on_done = ["{program}"]\n')
    daemon.start()
    for number in range(count):
        (tmp_path / f"{number}.raw").write_bytes(os.urandom(4096))
        daemon.attach(f"vm-{number}", tmp_path / f"{number}.raw")
        daemon.move(f"vm-{number}", tmp_path / f"moved-{number}.raw")
        daemon.wait(f"vm-{number}")

    def told() -> list[str]:
        text = (tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""
        return sorted(re.findall(r'"disk":"([^"]*)"', text))

    eventually(lambda: len(told()) == notify.PROGRAMS_MAX, what="so many are told of")
    assert daemon.stop() == 0
    go_on.touch()
    daemon.start()
    eventually(lambda: len(told()) == count, what="the rest is told of")
    assert daemon.stop() == 0
    daemon.start()
    assert told() == [f"vm-{number}" for number in range(count)], "each once"


def test_a_move_that_ends_is_told_of_once(make_daemon, tmp_path: Path) -> None:
    """Also one that ends while no daemon is there."""
    told = tmp_path / "told"
    program = script(tmp_path, f"cat >> {told}; echo >> {told}")
    daemon: Daemon = make_daemon(f'on_done = ["{program}"]\n')
    daemon.start()
    disk = tmp_path / "vm.raw"
    disk.write_bytes(os.urandom(16 * MIB))
    daemon.attach("vm", disk)
    first = daemon.move("vm", tmp_path / "one.raw")
    daemon.wait("vm")
    eventually(told.exists, what="the program runs")
    second = daemon.move("vm", tmp_path / "two.raw", "--limit", SLOW)
    daemon.kill()
    eventually(lambda: not (tmp_path / "one.raw").exists(), 30, "the move ends by itself")
    daemon.start()
    ids = lambda: [json.loads(line)["id"] for line in told.read_text().splitlines()]  # noqa: E731
    eventually(lambda: len(ids()) == 2, what="the next daemon tells of it")
    daemon.stop()
    daemon.start()
    daemon.json("detach", "vm")
    assert ids() == [first, second]
