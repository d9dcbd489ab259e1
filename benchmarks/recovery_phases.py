"""Show where the time of a recovery goes: from the SIGKILL of one of many warm workers until all have met again.

The agent's times are those of its events (``--events``), the workers' are their own notes; all are by the clock of this
machine. The workers import torch, join a gloo group and sum a number, as in ``warm.py``. A rank is killed once there is
a standby for each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

from common import COMMANDS, OURS, Running, machine, running, spread

OPTIONS = ["--preload", "torch", "--standalone", "--max-restarts", "100"]
PHASES = {
    "killed": "",
    "failed": "the kernel takes apart the killed process; the keeper reaps it and tells the agent",
    "stopped": "SIGTERM to the others; the kernel takes them apart; the keeper reaps them",
    "first_line": "decision, new round, orders to the standbys, until rank 0 runs its first line",
    "last_line": "rank 0 serves torch's store; the others run their first lines",
    "group": "torch: all connect to the store and to each other",
    "all_reduce": "torch: all_reduce",
}
"""What happens before each moment. The last two phases are torch's, after ``import torch``, which is a look-up."""
WORKER = """\
import time
times = [time.time()]
import os, sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
times.append(time.time())
total = torch.ones(1)
dist.all_reduce(total)
times.append(time.time())
with open(sys.argv[1], "a") as notes:
    print(os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], os.getpid(), *times, file=notes)
time.sleep(300)
"""

Notes = dict[int, tuple[int, list[float]]]
"""What the ranks of one attempt have noted: pid and times, by rank."""


def main() -> None:
    parser = argparse.ArgumentParser(description="The phases of a recovery with standbys.")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="launches (default: 3)")
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="kills in each launch (default: 5)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], metavar="N", help="default: 8")
    args = parser.parse_args()
    for ranks in args.ranks:
        found = [phases for _ in range(args.runs) for phases in measure(ranks, args.kills)]
        print(f"| {ranks} ranks: until | | ms, median (min–max) |\n|---|---|---|")
        for name in [*PHASES][1:]:
            print(f"| {name} | {PHASES[name]} | {spread([phases[name] for phases in found], 1)} |")
        print(f"| together | | {spread([sum(phases.values()) for phases in found], 1)} |\n", flush=True)
    print(machine([OURS, *OPTIONS, "--nproc-per-node", "N", "worker.py"]))


def measure(ranks: int, kills: int) -> list[dict[str, float]]:
    """Launch once, and kill some ranks in turn. Return the milliseconds of each phase, for each kill."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        script, notes, events = (Path(folder, name) for name in ("worker.py", "notes", "events"))
        script.write_text(WORKER)
        notes.touch()
        options = [*OPTIONS, "--events", str(events), "--nproc-per-node", str(ranks)]
        with running([*COMMANDS[OURS], *options, str(script), str(notes)], folder) as launcher:
            launcher.wait_for(partial(is_complete, notes, 0, ranks), 120)
            for count in range(kills):
                launcher.wait_for(partial(has_standbys, launcher, ranks))
                time.sleep(random.uniform(0.2, 0.4))
                killed = time.time()
                os.kill(attempt(notes, count)[count % ranks][0], signal.SIGKILL)
                launcher.wait_for(partial(is_complete, notes, count + 1, ranks))
                found.append(phases(killed, events, attempt(notes, count + 1)))
    return found


def phases(killed: float, events: Path, notes: Notes) -> dict[str, float]:
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    moments = {"killed": killed}
    moments |= {line["name"]: line["time"] for line in lines if line["name"] in PHASES}  # the latest of each name
    first, group, done = zip(*(times for _, times in notes.values()), strict=True)
    moments |= {"first_line": notes[0][1][0], "last_line": max(first), "group": max(group), "all_reduce": max(done)}
    ordered = [moments[name] for name in PHASES]
    return {name: 1000 * (end - start) for name, start, end in zip([*PHASES][1:], ordered, ordered[1:], strict=False)}


def has_standbys(launcher: Running, count: int) -> bool:
    return sum(process.name() == "elastic-standby" for process in launcher.family()) == count


def is_complete(notes: Path, count: int, ranks: int) -> bool:
    return len(attempt(notes, count)) == ranks


def attempt(notes: Path, count: int) -> Notes:
    fields = [line.split() for line in notes.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {int(rank): (int(pid), [*map(float, rest)]) for rank, of, pid, *rest in fields if int(of) == count}


if __name__ == "__main__":
    main()
