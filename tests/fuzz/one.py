"""One target under atheris, in its own process: python -m tests.fuzz.one TARGET CRASHES OPTION…

The options are libFuzzer's. Only mirrord's own modules are traced: they are what is fuzzed. What
raises is written into the folder CRASHES here, as libFuzzer doesn't always come to that.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mirrord"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    target, crashes = TARGETS[sys.argv.pop(1)], Path(sys.argv.pop(1))

    def run(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:
            (crashes / f"crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
            raise

    atheris.Setup([*sys.argv, f"-artifact_prefix={crashes}/"], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
