"""Measure the time from the death of a worker until all workers of the node run again, without torch in the workers.

A restart ends when the last new worker runs its first line, by that worker's own clock. All processes of a machine
share CLOCK_MONOTONIC, so this time can be compared with the time of the kill.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

from common import COMMANDS, OPTIONS, OURS, PEER, Samples, machine, parse_runs, row, running, table

KILLS = 5  # in each launch
RESTARTS = ["--max-restarts", "20"]
WORKER = """\
import time
start = time.monotonic()
import os, sys
line = f"{os.environ['RANK']} {os.environ['TORCHELASTIC_RESTART_COUNT']} {os.getpid()} {start}\\n"
with open(sys.argv[1], "a") as starts:
    starts.write(line)
time.sleep(300)
"""


def main() -> None:
    runs = parse_runs("Time of a restart, ours and torchrun's.", default=6)
    samples: Samples = {OURS: [], PEER: []}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            samples[name] += measure(command)

    milliseconds = {name: [1000 * seconds for seconds in values] for name, values in samples.items()}
    print(f"Worker killed to all running again, ms, {runs} launches × {KILLS} kills each\n")
    print(table([row("restart of 2 workers", milliseconds, 0, ratio_limit=2 / 5)]))
    print(f"\n{machine([OURS, *OPTIONS, *RESTARTS, 'worker.py'])}")


def measure(command: list[str]) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        script, starts = Path(folder, "worker.py"), Path(folder, "starts")
        script.write_text(WORKER)
        starts.touch()
        found = []
        with running([*command, *OPTIONS, *RESTARTS, str(script), str(starts)], folder) as launcher:
            launcher.wait_for(partial(complete, starts, 0))
            for count in range(KILLS):
                # At a random moment, because a fixed one would hit a launcher that polls in the same phase each time.
                time.sleep(random.uniform(0.2, 0.4))
                pid, _ = attempt(starts, count)[count % 2]
                killed = time.monotonic()
                os.kill(pid, signal.SIGKILL)
                launcher.wait_for(partial(complete, starts, count + 1))
                found.append(max(start for _, start in attempt(starts, count + 1).values()) - killed)
        return found


def complete(starts: Path, count: int) -> bool:
    return len(attempt(starts, count)) == 2


def attempt(starts: Path, count: int) -> dict[int, tuple[int, float]]:
    """Return the workers of one attempt that have started: pid and start time by rank."""
    fields = [line.split() for line in starts.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {int(rank): (int(pid), float(start)) for rank, of, pid, start in fields if int(of) == count}


if __name__ == "__main__":
    main()
