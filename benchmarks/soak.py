"""Kill ranks of a job with warm workers again and again, and see that nothing grows: memory, descriptors, processes.

The kills come at random moments, so that standbys are complete, partly there or not made yet. Every tenth time a
standby is killed or stopped as well. Modules that are fast to import show the same as torch does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
from common import COMMANDS, OURS, Running, machine, running
from restart import WORKER, attempt

MAX_DELAY = 1.5
"""Seconds from the start of a round to the kill at most. The first standby is forked after one second."""
GROWTH = 1.5
"""MiB by which the memory of a process may differ between two samples of the second half."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, metavar="N", help="default: 500")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--preload", default="decimal,json", metavar="MODULES", help="default: decimal,json")
    args = parser.parse_args()
    options = ["--standalone", "--nproc-per-node", str(args.ranks), "--preload", args.preload]
    options += ["--max-restarts", str(args.kills), "--crash-loop", "0"]
    print("| kills | processes | descriptors: agent | keeper | unshared memory, MiB: agent | keeper |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        script, starts = Path(folder, "worker.py"), Path(folder, "starts")
        script.write_text(WORKER)
        starts.touch()
        command = [*COMMANDS[OURS], *options, str(script), str(starts)]
        rows = []
        with running(command, folder) as launcher:
            for count in range(args.kills + 1):
                launcher.wait_for(partial(is_complete, starts, count, args.ranks))
                if count % max(1, args.kills // 10) == 0:
                    if count < args.kills:  # there are none for the last round
                        launcher.wait_for(partial(has_standbys, launcher, args.ranks))
                    rows.append(sample(launcher))
                    print(f"| {count} | {' | '.join(f'{value:g}' for value in rows[-1])} |", flush=True)
                if count < args.kills:
                    time.sleep(random.uniform(0, MAX_DELAY))
                    if count % 10 == 9:
                        harm_a_standby(launcher)
                    os.kill(attempt(starts, count)[count % args.ranks][0], signal.SIGKILL)
    later = rows[len(rows) // 2 : -1]
    is_flat = all(len({row[column] for row in later}) == 1 for column in range(3)) and all(
        max(row[column] for row in later) - min(row[column] for row in later) < GROWTH for column in (3, 4)
    )
    print(f"\nflat in the second half: {'yes' if is_flat else 'NO'}\n\n{machine([OURS, *options, 'worker.py'])}")
    if not is_flat:
        raise SystemExit(1)


def is_complete(starts: Path, count: int, ranks: int) -> bool:
    return len(attempt(starts, count)) == ranks


def standbys(launcher: Running) -> list[psutil.Process]:
    found = []
    for process in launcher.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "elastic-standby":
                found.append(process)
    return found


def has_standbys(launcher: Running, count: int) -> bool:
    return len(standbys(launcher)) == count


def harm_a_standby(launcher: Running) -> None:
    for standby in standbys(launcher)[:1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            standby.send_signal(random.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGUSR1]))


def sample(launcher: Running) -> tuple[float, ...]:
    """Return the number of processes, and descriptors and unshared memory of agent and keeper."""
    agent = psutil.Process(launcher.process.pid)
    (keeper,) = (child for child in agent.children() if child.name() == "elastic-keeper")
    memory = [round(process.memory_full_info().uss / 2**20, 1) for process in (agent, keeper)]
    return len(launcher.family()), agent.num_fds(), keeper.num_fds(), *memory


if __name__ == "__main__":
    main()
