"""Measure what watching a job's progress costs, and how fast a hang is noticed and explained.

1. The cost of a step: one worker steps an optimizer with one parameter, in blocks that alternately count and do not.
2. The hang of a real gloo job: rank 1 skips an all_reduce. Measured is the time from the last step of all ranks until
   the report is on the launcher's stderr, less the limit. For several nodes, all agents are on this machine.
3. The same script under torchrun: what it prints in ten times that limit, and how long gloo's own time-out would take.
4. Simulated agents (those of rendezvous.py) with 8 ranks each, on a real TCPStore: from the moment when all of them
   claim that they stall until the merged report is made, and until all have heard of the verdict.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import IO

import psutil
from common import COMMANDS, OURS, PEER, environment, machine, running, spread
from rendezvous import PROCESSES, Agent, Fleet, Job, fleets, gather, serving

from elastic_launch.core.agent.messages import AgentEvent, RequestJoin
from elastic_launch.core.progress.messages import (
    AllStalled,
    ClaimStall,
    Judged,
    ProgressEvent,
    ReportStacks,
    ReportVerdict,
    StacksArrived,
    StacksComplete,
)
from elastic_launch.core.progress.stack_groups import Group, Merger, NodeStacks, RankView
from elastic_launch.core.progress.stack_report import render
from elastic_launch.core.progress.stacks import Frame
from elastic_launch.core.progress.verdict import judge
from elastic_launch.host.ports import reserve_port

LIMIT = 5.0
"""Seconds without a step after which the real jobs count as hung."""
BLOCKS, BLOCK = 60, 1000
"""Blocks of steps, and steps in each."""
AGENTS = (64, 1024)
RANKS = 8
"""Workers of each simulated node."""
COST = """
import sys, time, torch
from statistics import median
parameter = torch.nn.Parameter(torch.ones(1))
parameter.grad = torch.ones(1)
optimizer = torch.optim.SGD([parameter], lr=0.1)
module = sys.modules["torch.optim.optimizer"]
hooks = module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks
ours = list(map(dict, hooks))
times = {True: [], False: []}
for block in range(BLOCKS):
    counts = block % 2 == 0
    for each, own in zip(hooks, ours):
        each.clear()
        each.update(own if counts else {})
    begin = time.perf_counter_ns()
    for _ in range(BLOCK):
        optimizer.step()
    times[counts].append((time.perf_counter_ns() - begin) / BLOCK)
print(sum(map(len, ours)), *(median(times[counts]) for counts in (True, False)))
"""
HANG = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(10**6):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    if step == 20 and rank == 1:
        open(sys.argv[1], "w").write(str(time.monotonic()))
        while True:
            time.sleep(0.1)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of watching progress, and the time until a hang is explained.")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="hangs of each kind (default: 3)")
    parser.add_argument(
        "--agents", type=int, nargs="*", default=AGENTS, metavar="N", help="simulated (default: 64 1024)"
    )
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        counting, plain = cost_of_a_step(folder)
        print("| | counting | not counting | difference | target |\n|---|---|---|---|---|")
        met = "met" if counting - plain < 1 else "MISSED"
        print(f"| a step, µs | {counting:.2f} | {plain:.2f} | {counting - plain:.2f} | < 1: {met} |\n", flush=True)
        print(f"| a hang, limit {LIMIT:g} s | limit over to report, s, median (min–max) | target |\n|---|---|---|")
        for nodes, workers in ((1, 2), (1, 4), (3, 4)):
            times = [explained_after(folder, nodes, workers) - LIMIT for _ in range(options.runs)]
            met = "met" if median(times) <= 2 else "MISSED"
            print(f"| {nodes} × {workers} ranks | {spread(times, 2)} | ≤ 2: {met} |", flush=True)
        print(f"\n{PEER}, the same script, {10 * LIMIT:g} s after the hang: {peer(folder)}")
    print("\n| agents × 8 ranks | claims to report, s | to all know the verdict, s | a process's memory | target |")
    print("|---|---|---|---|---|")
    with serving("c10d") as (port, _):
        for agents in options.agents:
            runs = [simulated(Job("c10d", port, agents, f"stall-{agents}-{run}", True)) for run in range(options.runs)]
            report, known, grown = zip(*runs, strict=True)
            met = "met" if median(report) <= 5 else "MISSED"
            print(
                f"| {agents:,} | {spread(report, 2)} | {spread(known, 2)} | +{max(grown):.0f} MiB | ≤ 5: {met} |",
                flush=True,
            )
    print(f"\n{machine([sys.argv[0], *sys.argv[1:]])}; {PROCESSES} processes of agents")


def cost_of_a_step(folder: str) -> tuple[float, float]:
    """Return the µs of a step that is counted, and of one that is not."""
    script = Path(folder) / "cost.py"
    script.write_text(
        COST.replace("BLOCKS", str(BLOCKS)).replace("BLOCK)", f"{BLOCK})").replace("/ BLOCK", f"/ {BLOCK}")
    )
    out = subprocess.run(
        [*COMMANDS[OURS], str(script)], env=environment(folder), capture_output=True, text=True, check=True
    )
    hooks, counting, plain = out.stdout.split()
    if hooks != "2":
        raise SystemExit(f"{hooks} hooks instead of 2")
    return float(counting) / 1000, float(plain) / 1000


def hang_command(launcher: str, folder: str, nodes: int, workers: int, port: int, *options: str) -> list[str]:
    script = Path(folder) / "hang.py"
    script.write_text(HANG)
    where = ["--nnodes", str(nodes), "--nproc-per-node", str(workers)]
    where += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", f"job-{port}"]
    return [
        *COMMANDS[launcher],
        *(where if nodes > 1 else ["--standalone", *where[2:4]]),
        *options,
        str(script),
        f"{folder}/hung",
    ]


def explained_after(folder: str, nodes: int, workers: int) -> float:
    """Return the seconds from the last step until the report is printed."""
    mark = Path(folder) / "hung"
    mark.unlink(missing_ok=True)
    with reserve_port() as free:
        port = free.getsockname()[1]
    command = hang_command(OURS, folder, nodes, workers, port, "--hang-timeout", f"{LIMIT:g}")
    agents = [
        subprocess.Popen(command, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(nodes)
    ]
    try:
        streams = {agent.stderr.fileno(): b"" for agent in agents if agent.stderr}
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for fd in select.select(list(streams), [], [], 1)[0]:
                streams[fd] += os.read(fd, 65536)
                if re.search(rb"makes no progress.*\n.*rank 1 ", streams[fd]):
                    return time.monotonic() - float(mark.read_text())
        raise SystemExit(f"no report: {streams}")
    finally:
        for agent in agents:
            family = psutil.Process(agent.pid).children(recursive=True)
            agent.kill()
            agent.wait()
            psutil.wait_procs(family, 30)


def peer(folder: str) -> str:
    """Say what torchrun prints about the hang."""
    mark = Path(folder) / "hung"
    mark.unlink(missing_ok=True)
    with running(hang_command(PEER, folder, 1, 2, 0), folder) as job:
        job.wait_for(mark.exists)
        size = length(job.output)
        time.sleep(10 * LIMIT)
        more = length(job.output) - size
        job.process.kill()
    program = "import torch.distributed as d; print(d.constants.default_pg_timeout.total_seconds())"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return f"{more} bytes of output; gloo's own time-out is {timedelta(seconds=float(out))}"


def length(output: IO[bytes]) -> int:
    return os.fstat(output.fileno()).st_size


# --- simulated agents


class StallFleet(Fleet):
    """Agents whose workers stall."""

    merger = Merger()
    judged = 0
    reported_at = 0.0
    memory = 0
    """Bytes that the process had in memory when it began to carry out the order."""

    def obey(self) -> bool:
        try:
            order = self.control.recv()
        except EOFError:
            return False
        self.memory = psutil.Process().memory_info().rss
        for agent in self.agents:
            self.ask(agent, order)
        return True

    def on_stall(self, agent: Agent, event: ProgressEvent) -> list[AgentEvent]:
        match event:
            case AllStalled(number):
                return agent.rendezvous.ask(ReportStacks(number, stacks_of(agent.rank)))
            case StacksArrived(_, stacks):
                self.merger.add(stacks)
            case StacksComplete(number):
                merged = self.merger.result()
                if len(merged.workers) != RANKS * self.job.agents:
                    raise SystemExit(f"stacks of {len(merged.workers)} ranks")
                verdict = judge(merged)
                text = render(merged, verdict, 120)
                self.reported_at = time.monotonic()
                return agent.rendezvous.ask(ReportVerdict(number, verdict, 5, text))
            case Judged():
                self.judged += 1
                if self.judged == len(self.agents):
                    grown = (psutil.Process().memory_info().rss - self.memory) / (1 << 20)
                    self.control.send((time.monotonic(), self.reported_at, grown))
        return []


def stacks_of(node: int) -> NodeStacks:
    """Return what a node reports: its ranks wait in one place, but for rank 5."""
    ranks = tuple(range(RANKS * node, RANKS * node + RANKS))
    frames = tuple(Frame(f"site-packages/torch/distributed/layer_{i}.py", 100 + i, f"call_{i}") for i in range(20))
    frames = (Frame("site-packages/torch/distributed/distributed_c10d.py", 3252, "all_reduce"), *frames)
    frames += (Frame("/home/user/train.py", 41, "step"), Frame("/home/user/train.py", 88, "load"))
    waiting = tuple(rank for rank in ranks if rank != 5)
    groups = [Group(waiting, state="S", is_stuck=True)]
    stacks: list[tuple[int, ...]] = [tuple(range(22))]
    if 5 in ranks:
        groups.insert(0, Group((5,), state="S", is_stuck=True))
        stacks.insert(0, (22,))
    views = tuple(RankView(rank, 4711 + rank, 1200, 60.0, 0.1) for rank in ranks)
    return NodeStacks(f"host-{node:04}", 2.0, views, frames, tuple(groups), tuple(stacks))


def simulated(job: Job) -> tuple[float, float, float]:
    """Return the seconds from the claims to the report and until all know the verdict, and the growth in MiB."""
    shares: Sequence[int] = [job.agents * (i + 1) // PROCESSES - job.agents * i // PROCESSES for i in range(PROCESSES)]
    with fleets(job, shares, StallFleet) as controls:
        gather(controls)
        for control in controls:
            control.send(RequestJoin())
        gather(controls)
        begin = time.monotonic()
        for control in controls:
            control.send(ClaimStall())
        ends, reports, grown = zip(*gather(controls), strict=True)
        return max(reports) - begin, max(ends) - begin, max(grown)


if __name__ == "__main__":
    main()
