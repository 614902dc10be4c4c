"""Fuzz the targets, each for a while: python -m tests.fuzz [TARGET…] [--seconds N]

What was found on the way is kept below `.cache/fuzz`, so that the next run goes on from there.
A crash is an exception, an assertion, an input that takes longer than a second, or more memory than
MEMORY_MIB; it is printed with the command that repeats it, and the exit code is 1.

    python -m tests.fuzz TARGET --repeat FILE   runs the target on that input, without a fuzzer
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target

CACHE = Path(".cache") / "fuzz"
# A parser needs milliseconds. A busy machine and the fuzzer's tracing take their share.
INPUT_S = 5
INPUT_BYTES_MAX = 64 << 10
MEMORY_MIB = 1024  # the interpreter with everything loaded takes 150
END_S = 120  # beside the time that was asked for


def prepare(target: Target) -> tuple[Path, Path, Path]:
    """Return the folders of corpus, seeds and crashes; the seeds are written anew."""
    folders = tuple(CACHE / target.name / name for name in ("corpus", "seeds", "crashes"))
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (folders[1] / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    return folders[0], folders[1], folders[2]


def fuzz(target: Target, seconds: int) -> list[Path]:
    """Fuzz one target in a process of its own; return the inputs that crashed it."""
    corpus, seeds, crashes = prepare(target)
    known = set(crashes.iterdir())
    command = [
        sys.executable, "-m", "tests.fuzz.one", target.name, str(crashes), str(corpus),
        str(seeds), f"-max_total_time={seconds}", f"-timeout={INPUT_S}",
        f"-rss_limit_mb={MEMORY_MIB}", f"-max_len={INPUT_BYTES_MAX}", "-print_final_stats=1",
        "-verbosity=0",
    ]  # fmt: skip
    log = crashes.parent / "log"
    # libFuzzer ends a process at once: what it leaves goes with this folder.
    with tempfile.TemporaryDirectory(prefix="mirrord-fuzz-") as scratch, log.open("wb") as file:
        environment = {**os.environ, "TMPDIR": scratch}
        limit_s = seconds + END_S
        done = subprocess.run(command, stdout=file, stderr=file, timeout=limit_s, env=environment)
    lines = log.read_text(errors="replace").splitlines()
    runs = next((line.split()[-1] for line in lines if "number_of_executed_units" in line), "?")
    found = sorted(set(crashes.iterdir()) - known)
    print(f"{target.name}: {runs} inputs, {len(list(corpus.iterdir()))} kept", flush=True)
    if done.returncode and not found:
        raise SystemExit("\n".join([*lines[-20:], f"{target.name}: it could not be fuzzed: {log}"]))
    return found


def tell(target: Target, crash: Path) -> None:
    """Print what happens on an input that crashed, and how to see it again."""
    repeat = ["-m", "tests.fuzz", target.name, "--repeat", str(crash)]
    try:
        done = subprocess.run(
            [sys.executable, *repeat], capture_output=True, text=True, timeout=2 * INPUT_S
        )
        print("".join(done.stderr.splitlines(keepends=True)[-12:]))
        if not done.returncode:
            print(
                "not repeated by this input alone: too slow, too much memory, or what went before"
            )
    except subprocess.TimeoutExpired:
        print(f"no end within {2 * INPUT_S} s")
    print("crash:", target.name, "- again:", os.path.relpath(sys.executable), *repeat, flush=True)


def main() -> int:
    """Fuzz, or repeat one input. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", allow_abbrev=False)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--repeat", type=Path, metavar="FILE")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"no target {unknown[0]}; there are: {' '.join(TARGETS)}")
    if options.repeat:
        (name,) = names
        TARGETS[name].run(options.repeat.read_bytes())
        return 0
    crashed = 0
    for name in names:
        for crash in fuzz(TARGETS[name], options.seconds):
            crashed += 1
            tell(TARGETS[name], crash)
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main())
