"""Check the model of a round's end: ``python -m tests.models [MINUTES]``. Needs ``spin`` and ``cc``.

A model with a mistake must not pass. The search for errors ends after some minutes, and says whether it was complete.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = Path(__file__).with_name("round.pml")
CASES = (
    ("two nodes", ("-DNODES=2",), True),
    ("two nodes, a lease that counts from the reply", ("-DNODES=2", "-DBROKEN_LEASE"), False),
    ("two nodes, an end that the last one writes", ("-DNODES=2", "-DBROKEN_CREATE"), False),
)
"""What is checked, the options for spin, and whether it must pass."""
CHECKER = ("-w", "-O2", "-DSAFETY", "-DNOFAIR", "-DCOLLAPSE", "-DMEMLIM=6000")


def check(options: tuple[str, ...], minutes: int) -> tuple[bool, str]:
    """Return whether the model passes, and what the checker has printed."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["spin", "-a", *options, str(MODEL)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cc", *CHECKER, "-o", "pan", "pan.c"], cwd=folder, check=True)
        done = subprocess.run(["./pan", "-E", "-m3000000", f"-Q{minutes}"], cwd=folder, capture_output=True, text=True)
        said = done.stdout + done.stderr
        if "errors:" not in said:
            raise RuntimeError(f"the search has failed:\n{said}")
        return "errors: 0" in said, said


def main(minutes: int) -> int:
    """Return the exit status: 1 if a case is not as it must be."""
    for program in ("spin", "cc"):
        if not shutil.which(program):
            print(f"{program} is missing: apt-get install spin gcc libc6-dev", file=sys.stderr)
            return 1
    for name, options, must_pass in CASES:
        begin = time.monotonic()
        passes, said = check(options, minutes)
        [states] = [line.split()[0] for line in said.splitlines() if line.endswith("states, stored")]
        print(
            f"{name}: {'passes' if passes else 'fails'}, {states} states, {time.monotonic() - begin:.0f} s", flush=True
        )
        if passes != must_pass:
            print(said)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 10))
