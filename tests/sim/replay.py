"""Run one seed again and tell its story: `python -m tests.sim.replay SEED [--grep REGEX]`."""

from __future__ import annotations

import argparse
import re
import sys

from tests.sim.run import simulate
from tests.sim.scenario import draw


def main() -> int:
    """Print the scenario, the story and the verdict; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--grep", default="", help="only lines of the story that match")
    arguments = parser.parse_args()
    for name, value in vars(draw(arguments.seed)).items():
        print(f"{name}: {value}")
    report = simulate(arguments.seed, keep_story=True)
    print(*(line for line in report.story.split("\n") if re.search(arguments.grep, line)), sep="\n")
    print(f"ended: {report.phase} in {report.lives} lives; violation: {report.violation}")
    return report.violation is not None


if __name__ == "__main__":
    sys.exit(main())
