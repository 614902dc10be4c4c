"""Run scenarios, compare results, write the README's section.

    python -m bench                        all scenarios
    python -m bench nbd --rounds 7         one of them
    python -m bench --quick                tiny sizes and one round: does everything work?
    python -m bench compare A.json B.json
    python -m bench compare --scenario nbd COMMIT COMMIT
    python -m bench readme                 write "Performance" from the kept results

Results are printed as a table and kept in `bench/results/`, as JSON and as PNG.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import (
    cache,
    compare,
    copying,
    live,
    places,
    plots,
    readme,
    runner,
    scenarios,
    small,
    smb,
)
from bench.model import QUICK, Scenario, pick
from bench.report import table

ALL: dict[str, Scenario] = {
    **scenarios.ALL,
    **copying.ALL,
    **live.ALL,
    **small.ALL,
    **cache.ALL,
    **smb.ALL,
}
RESULTS = Path(__file__).parent / "results"
COMMANDS = ("compare", "readme")
INTERRUPTED = 130


def main(words: Sequence[str] | None = None) -> int:
    """Do what was asked for; 2 is wrong usage or too little space, 130 an interruption."""
    words = sys.argv[1:] if words is None else words
    command = words[0] if words and words[0] in COMMANDS else "run"
    work = {"run": _run, "compare": _compare, "readme": _readme}[command]
    try:
        with places.signals_unwind():
            return work(words[1:] if command != "run" else words)
    except KeyboardInterrupt as error:
        print(f"interrupted ({error}); everything is cleaned up", file=sys.stderr)
        return INTERRUPTED
    except (places.TooLittleSpaceError, compare.NothingToCompareError) as error:
        print(error, file=sys.stderr)
        return 2


def _options(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument(
        "--folder", type=Path, help="where the disks lie (default: /tmp; of smb-*: memory)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    return parser


def _run(words: Sequence[str]) -> int:
    parser = _options("python -m bench")
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO")
    asked = parser.parse_args(words)
    unknown = [name for name in asked.scenario if name not in ALL]
    if unknown:
        parser.error(f"no scenario {unknown[0]!r}; there are {', '.join(ALL)}")
    names = asked.scenario or list(ALL)
    with _quick(asked.quick):
        _check_space(names, asked.folder)
        failed = [name for name in names if not _report(name, asked)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def _quick(wanted: bool) -> Iterator[None]:
    """Let every process know that tiny sizes are wanted."""
    before = os.environ.pop(QUICK, None)
    if wanted:
        os.environ[QUICK] = "1"
    try:
        yield
    finally:
        os.environ.pop(QUICK, None)
        if before is not None:
            os.environ[QUICK] = before


def _check_space(names: Sequence[str], folder: Path | None) -> None:
    """Refuse before anything begins, also when only the last scenario is too large."""
    where = folder or Path(tempfile.gettempdir())
    most_mib = max(ALL[name].space_mib for name in names)
    places.check_space(where, pick(most_mib, min(most_mib, runner.QUICK_MIB)))


def _report(name: str, asked: argparse.Namespace) -> bool:
    """Measure, print and keep; tell whether that worked, so that one can't spoil the others."""
    scenario = ALL[name]
    if why := scenario.refuse():
        print(f"\n{name} is left out: {why}", file=sys.stderr)
        return True
    try:
        with places.temporary(asked.folder, scenario) as folder:
            result = runner.measure(name, scenario, folder, pick(asked.rounds, 1))
    except Exception:
        traceback.print_exc()
        return False
    print(f"\n{table(result)}", flush=True)
    where: Path = asked.results
    if asked.results == RESULTS:  # a smoke test must not replace what was measured
        where = pick(RESULTS, RESULTS / "quick")
    where.mkdir(parents=True, exist_ok=True)
    (where / f"{name}.json").write_text(json.dumps(result, indent=1))
    if plots.can_draw() and not result["quick"]:
        plots.draw(result, where / f"{name}.png")
    return True


def _compare(words: Sequence[str]) -> int:
    parser = _options("python -m bench compare")
    parser.add_argument("--scenario", choices=sorted(ALL), help="measure two commits by this one")
    parser.add_argument("before", help="a result's JSON, or a commit")
    parser.add_argument("after")
    asked = parser.parse_args(words)
    if asked.scenario is None:
        print(compare.files(Path(asked.before), Path(asked.after)))
        return 0
    scenario = ALL[asked.scenario]
    with _quick(asked.quick):
        _check_space([asked.scenario], asked.folder)
        if why := scenario.refuse():
            raise compare.NothingToCompareError(f"{asked.scenario} can't run here: {why}")
        with (
            places.temporary(asked.folder, scenario) as folder,
            compare.worktrees(asked.before, asked.after) as trees,
        ):
            both = compare.of_trees(scenario, trees)
            result = runner.measure(asked.scenario, both, folder, pick(asked.rounds, 1))
    print(compare.peers(result))
    return 0


def _readme(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench readme")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(words)
    readme.write(asked.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
