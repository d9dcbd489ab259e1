"""Compare warm workers (``--preload torch``, with standbys and without) with cold ones and with torchrun's.

Measured are the first collective, the recovery, and the memory.

The workers import torch, join a gloo group and sum a number. Each notes when that was done, by CLOCK_MONOTONIC, which
all processes of a machine share. A start lasts from the launcher's command to the last rank's note, a recovery from
the SIGKILL of one rank to the last note of the next attempt. Memory is the sum of the proportional set sizes of the
launcher and its descendants. With standbys, memory is measured and a rank is killed once those are ready. Run nothing
else that uses torch meanwhile: pages that it shares would count less.

torchrun recovers with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 here. Without it, the next attempt finds the keys of the
previous one in the store, and often hangs. The line below the table says how often it recovered.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import psutil
from common import COMMANDS, OURS, PEER, Running, Samples, machine, running, spread

KILLS = 2  # in each launch that measures recovery
PATIENCE = 45  # seconds that torchrun has to recover without the variable
OPTIONS = ["--standalone", "--max-restarts", "20"]
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
WARM, WITHOUT = f"{OURS} --preload torch", f"{OURS} --preload torch --no-standby"
COLD = f"{OURS} --preload none"  # auto would preload torch on a machine without an accelerator
LAUNCHERS = {
    WARM: [*COMMANDS[OURS], "--preload", "torch"],
    WITHOUT: [*COMMANDS[OURS], "--preload", "torch", "--no-standby"],
    COLD: [*COMMANDS[OURS], "--preload", "none"],
    PEER: COMMANDS[PEER],
}
WORKER = """\
import os, sys, time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
done = time.monotonic()
assert total.item() == dist.get_world_size()
with open(sys.argv[1], "a") as notes:
    notes.write(f"{os.environ['RANK']} {os.environ['TORCHELASTIC_RESTART_COUNT']} {os.getpid()} {done}\\n")
time.sleep(300)
"""

Notes = dict[int, tuple[int, float]]
"""What the ranks of one attempt have noted: pid and time, by rank."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Warm workers, cold ones and torchrun's.")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="launches of each (default: 3)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], metavar="N", help="default: 2 4 8")
    parser.add_argument("--warm-only", action="store_true", help="compare only with standbys and without")
    args = parser.parse_args()
    os.environ.pop(OWN_STORE, None)
    if args.warm_only:
        for name in (COLD, PEER):
            del LAUNCHERS[name]
    other = WITHOUT if args.warm_only else PEER

    print(f"{args.runs} launches of each, {KILLS} kills in each launch that measures recovery\n")
    print(f"| median (min–max) | {' | '.join(LAUNCHERS)} | {other} / warm | target |\n|{'---|' * (len(LAUNCHERS) + 3)}")
    recovered = []
    for ranks in args.ranks:
        starts, recoveries, sizes, came_back = measure_all(ranks, args.runs)
        against_peer = not args.warm_only
        faster = {4: 2.5, 8: 4.0}.get(ranks) if against_peer else None
        print(row(f"{ranks} ranks: start to first all_reduce, s", starts, 2, other, faster))
        limit = {8: 0.06, 32: 0.2}.get(ranks)
        print(row("SIGKILL of a rank to all_reduce, s", recoveries, 3, other, 10 if against_peer else None, limit))
        smaller = 3 if ranks == 8 and against_peer else None
        print(row("PSS of all processes, MiB", sizes, 0, other, smaller, 320 if ranks == 8 else None), flush=True)
        recovered.append(f"{came_back} of {args.runs} times at {ranks} ranks")
    if not args.warm_only:
        print(f"\n{PEER} without {OWN_STORE}=1 recovered within {PATIENCE} s {', '.join(recovered)}.")
    print(f"\n{machine([WARM, *OPTIONS, '--nproc-per-node', 'N', 'worker.py'])}")


def measure_all(ranks: int, runs: int) -> tuple[Samples, Samples, Samples, int]:
    """Return seconds to start, seconds to recover and MiB, and how often torchrun recovered without the variable."""
    starts, recoveries, sizes = ({name: list[float]() for name in LAUNCHERS} for _ in range(3))
    came_back = 0
    for run in range(runs):
        for name, command in LAUNCHERS.items():
            with tempfile.TemporaryDirectory() as folder:
                job = Job(command, ranks, folder)
                with running(job.command, folder) as launcher:
                    job.wait(launcher, 0)
                    starts[name].append(job.last(0) - job.begin)
                    time.sleep(0.5)  # until the launcher and the workers are idle
                    if name == WARM:
                        launcher.wait_for(partial(has_standbys, launcher, ranks))
                    sizes[name].append(memory(launcher.process.pid))
                    if name == PEER:
                        came_back += recovers(launcher, job, run % ranks)
                    else:
                        recoveries[name] += recover(launcher, job, run, name == WARM)
        if PEER not in LAUNCHERS:
            continue
        with tempfile.TemporaryDirectory() as folder:
            job = Job(["/usr/bin/env", f"{OWN_STORE}=1", *COMMANDS[PEER]], ranks, folder)
            with running(job.command, folder) as launcher:
                job.wait(launcher, 0)
                recoveries[PEER] += recover(launcher, job, run)
    return starts, recoveries, sizes, came_back


class Job:
    """A launch: its command, and what its workers have noted."""

    def __init__(self, launcher: Sequence[str], ranks: int, folder: str) -> None:
        script, self.notes = Path(folder, "worker.py"), Path(folder, "notes")
        script.write_text(WORKER)
        self.notes.touch()
        self.ranks = ranks
        self.command = [*launcher, *OPTIONS, "--nproc-per-node", str(ranks), str(script), str(self.notes)]
        self.begin = time.monotonic()

    def attempt(self, count: int) -> Notes:
        lines = self.notes.read_text().splitlines(keepends=True)
        fields = [line.split() for line in lines if line.endswith("\n")]
        return {int(rank): (int(pid), float(done)) for rank, of, pid, done in fields if int(of) == count}

    def complete(self, count: int) -> bool:
        return len(self.attempt(count)) == self.ranks

    def last(self, count: int) -> float:
        return max(done for _, done in self.attempt(count).values())

    def wait(self, launcher: Running, count: int) -> None:
        launcher.wait_for(partial(self.complete, count), 120)

    def kill(self, count: int, rank: int) -> float:
        """Kill a rank of an attempt. Return the time."""
        pid, _ = self.attempt(count)[rank]
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        return killed


def recover(launcher: Running, job: Job, run: int, waits: bool = False) -> list[float]:
    """Kill some ranks in turn, if ``waits`` with standbys. Return how long each recovery took, in seconds."""
    found = []
    for count in range(KILLS):
        # At a random moment, because a fixed one would hit a launcher that polls in the same phase each time.
        time.sleep(random.uniform(0.2, 0.4))
        if waits:
            launcher.wait_for(partial(has_standbys, launcher, job.ranks))
        killed = job.kill(count, (run * KILLS + count) % job.ranks)
        job.wait(launcher, count + 1)
        found.append(job.last(count + 1) - killed)
    return found


def has_standbys(launcher: Running, count: int) -> bool:
    """Return whether the launcher has all of its standbys."""
    return sum(process.name() == "elastic-standby" for process in launcher.family()) == count


def recovers(launcher: Running, job: Job, rank: int) -> bool:
    """Return whether the job recovers in time from the loss of a rank."""
    deadline = job.kill(0, rank) + PATIENCE

    def is_over() -> bool:
        return job.complete(1) or launcher.process.poll() is not None or time.monotonic() > deadline

    launcher.wait_for(is_over, PATIENCE + 1)
    return job.complete(1)


def memory(launcher: int) -> float:
    """Return the memory of the launcher and its descendants in MiB."""
    top = psutil.Process(launcher)
    return float(sum(process.memory_full_info().pss for process in [top, *top.children(recursive=True)])) / 2**20


def row(what: str, samples: Samples, digits: int, other: str, times: float | None, limit: float | None = None) -> str:
    """Return a row of the table. Targets: how many times better than ``other`` warm workers are, and their median."""
    warm, peer = median(samples[WARM]), median(samples[other])
    targets = []
    if times is not None:
        targets.append(f"≥ {times:g} times: {met_or_missed(peer / warm >= times)}")
    if limit is not None:
        targets.append(f"≤ {limit:g}: {met_or_missed(warm <= limit)}")
    cells = [spread(samples[name], digits) for name in LAUNCHERS]
    return f"| {what} | {' | '.join(cells)} | {peer / warm:.1f} | {', '.join(targets)} |"


def met_or_missed(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


if __name__ == "__main__":
    main()
