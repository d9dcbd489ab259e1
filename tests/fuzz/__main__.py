"""Run the fuzz tests for MINUTES on all cores: ``python -m tests.fuzz [MINUTES [SEED]]``.

Each core runs all of them again and again, each time with another seed. The first failure stops all.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from tempfile import TemporaryFile
from typing import IO

COMMAND = ("-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "--timeout=0", "--hypothesis-profile=long")


def main(minutes: float, seed: int) -> int:
    """Return the exit status: 1 after a failure."""
    seeds = itertools.count(seed)
    end = time.monotonic() + 60 * minutes
    running: dict[int, tuple[subprocess.Popen[bytes], int, IO[bytes]]] = {}
    print(f"seed {seed}, {os.cpu_count()} processes, {minutes:g} min", flush=True)

    def start() -> None:
        number, output = next(seeds), TemporaryFile()  # noqa: SIM115 - closed with its process
        words = [sys.executable, *COMMAND, f"--hypothesis-seed={number}", "tests/fuzz"]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        running[process.pid] = process, number, output

    try:
        for _ in range(os.cpu_count() or 1):
            start()
        while running:
            pid, status = os.wait()
            process, number, output = running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            with output:
                output.seek(0)
                if process.returncode:
                    sys.stdout.buffer.write(output.read())
                    again = " ".join(["python", *COMMAND, f"--hypothesis-seed={number}", "tests/fuzz"])
                    print(f"\nto see it again: {again}", flush=True)
                    return 1
            print(f"seed {number}: passed, {max(0, end - time.monotonic()):.0f} s left", flush=True)
            if time.monotonic() < end:
                start()
    finally:
        for process, _, output in running.values():
            process.kill()
            process.wait()
            output.close()
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(
        main(float(given[0]) if given else 60, int(given[1]) if given[1:] else random.SystemRandom().randrange(10**9))
    )
