"""Measure the time from a failure on one node until all others know of it, and from an agent's death to the next round.

All nodes are on this machine. Their workers note times by CLOCK_MONOTONIC, which all of them share: a failing worker
right before it ends, the others when they get SIGTERM, each new one in its first line. Workers of the failing node do
not count. The worker fails, and the agent is killed, at a random moment. Over c10d the first agent hosts the store; it
is not the one that is killed.

Keep-alive: each node sends a heartbeat every second, and is lost after three intervals without one. The figures exclude
that time. A node that is killed right before its heartbeat is due may be found lost up to a second sooner.

The simulated agents are those of rendezvous.py, so the figures are close to the CPU time of all of them together.

torchrun (two nodes, c10d) has ``PATIENCE`` seconds for each step; the table says how often these did not suffice. In
its first run the failing node hosts the store, in the second it does not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from common import COMMANDS, OURS, PEER, Running, machine, running, spread
from rendezvous import Job as Simulation
from rendezvous import measure as simulate
from rendezvous import serving

from elastic_launch.host.ports import reserve_port

STORES = ("c10d", "etcd")
NODES = (2, 3)
WORKERS = 2
"""Workers of each node."""
DEADLINE = 3.0
"""Keep-alive deadline: seconds without a heartbeat after which a node is lost."""
KEEP_ALIVE = "keep_alive_interval=1,keep_alive_max_attempt=3"
"""``DEADLINE`` as settings of the launchers."""
PEER_CONF = "last_call_timeout=1"
"""Settings of torchrun, which would otherwise wait 30 s for the dead node."""
PATIENCE = 20.0
"""Seconds to wait for a step before it counts as never done."""
PEER_RUNS = 2
"""Maximum number of torchrun's runs: most of them last as long as ``PATIENCE``."""
AGENTS = 256
"""Number of simulated agents."""
WORKER = f"""\
#!{sys.executable} -SI
import time
start = time.monotonic()
import os, signal, sys
notes = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
def note(what, at):
    os.write(notes, f"{{what}} {{sys.argv[2]}} {{os.getpid()}} {{at}}\\n".encode())
def end(what, status):
    note(what, time.monotonic())
    os._exit(status)
signal.signal(signal.SIGUSR1, lambda *_: end("failed", 1))
signal.signal(signal.SIGTERM, lambda *_: end("stopped", 0))
note("started", start)
time.sleep(300)
"""


class Note(NamedTuple):
    """A worker's note."""

    what: str
    node: int
    pid: int
    time: float


class Goal(NamedTuple):
    """A statistic of the figures, and its upper limit in ms."""

    of: Literal["median", "maximum"]
    limit: float


@dataclass
class Job:
    """A running job of several nodes."""

    agents: list[Running]
    notes: Path

    def noted(self, what: str, since: float = 0.0) -> list[Note]:
        lines = self.notes.read_text().splitlines(keepends=True)
        fields = [line.split() for line in lines if line.endswith("\n")]
        found = [Note(name, int(node), int(pid), float(at)) for name, node, pid, at in fields]
        return [note for note in found if note.what == what and note.time >= since]

    def last(self, what: str, count: int, since: float, excluded: int | None = None) -> float:
        """Wait until ``count`` workers have noted something, and return when the last did.

        Workers of the node ``excluded`` do not count. The result is infinite if it takes longer than ``PATIENCE``.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = [note for note in self.noted(what, since) if note.node != excluded]
            if len(found) >= count:
                return max(note.time for note in found)
            time.sleep(0.01)
        return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a recovery, ours and torchrun's.")
    parser.add_argument("--runs", type=int, default=6, metavar="N", help="failures of each kind (default: 6)")
    runs: int = parser.parse_args().runs
    print(f"{runs} runs each, {min(runs, PEER_RUNS)} of {PEER}; ms\n")
    print(f"| median (min–max) | {OURS} | {PEER} | ratio | target |\n|---|---|---|---|---|", flush=True)
    for store in STORES:
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(serving(store))[0] if store == "etcd" else None
            for nodes in NODES:
                for what, measure, goal in MEASURES:
                    ours, peers = [], []
                    for run in range(runs):
                        ours.append(1000 * measure(OURS, store, port, nodes, run))
                        if (store, nodes) == ("c10d", 2) and run < PEER_RUNS:
                            peers.append(1000 * measure(PEER, store, port, nodes, run))
                    print(row(f"{store}, {nodes} nodes: {what}", ours, goal, peers), flush=True)
    for store in STORES:
        with serving(store) as (port, pids):
            jobs = [Simulation(store, port, AGENTS, f"recovery-{run}", True) for run in range(runs)]
            known = [1000 * simulate(job, pids, 0).known for job in jobs]
        print(
            row(f"{store}, {AGENTS} simulated agents: failure to all know of it", known, Goal("maximum", 500)),
            flush=True,
        )
    print(f"\n{machine([sys.argv[0], *sys.argv[1:]])}; {KEEP_ALIVE}")


def fail_once(name: str, store: str, port: int | None, nodes: int, run: int, restarts: int) -> float:
    """Return the seconds from a worker's failure until the last worker of the other nodes gets SIGTERM."""
    with job_of(name, store, port, f"{nodes}", nodes, restarts) as job:
        time.sleep(random.uniform(0.2, 0.4))  # torchrun polls every 0.1 s: hit any phase of that
        victim = next(note for note in job.noted("started") if note.node == run % nodes)
        os.kill(victim.pid, signal.SIGUSR1)
        failed = job.last("failed", 1, victim.time)
        return job.last("stopped", (nodes - 1) * WORKERS, failed, victim.node) - failed


def fail_with_a_restart(name: str, store: str, port: int | None, nodes: int, run: int) -> float:
    return fail_once(name, store, port, nodes, run, 1)


def fail_for_good(name: str, store: str, port: int | None, nodes: int, run: int) -> float:
    return fail_once(name, store, port, nodes, run, 0)


def lose_a_node(name: str, store: str, port: int | None, nodes: int, run: int) -> float:
    """Return the seconds from an agent's death until the last worker of the next round runs, less the deadline."""
    with job_of(name, store, port, f"{nodes - 1}:{nodes}", nodes, 0) as job:
        time.sleep(random.uniform(1, 2))  # heartbeats are due every second
        victim = run % nodes if store == "etcd" else 1 + run % (nodes - 1)
        killed = time.monotonic()
        job.agents[victim].kill()
        return job.last("started", (nodes - 1) * WORKERS, killed) - killed - DEADLINE


Measure = Callable[[str, str, int | None, int, int], float]
MEASURES: tuple[tuple[str, Measure, Goal], ...] = (
    ("failure to stop on all, with a restart", fail_with_a_restart, Goal("median", 100)),
    ("failure to stop on all, for good", fail_for_good, Goal("median", 100)),
    ("SIGKILL of an agent to re-formed, less the keep-alive deadline", lose_a_node, Goal("maximum", 1000)),
)

numbers = itertools.count()


@contextlib.contextmanager
def job_of(name: str, store: str, port: int | None, span: str, nodes: int, restarts: int) -> Iterator[Job]:
    """Run a job whose workers have all started. If ``port`` is None, its first agent hosts the store."""
    if port is None:
        with reserve_port() as reserved:
            at = int(reserved.getsockname()[1])
    else:
        at = port
    number = next(numbers)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        worker, notes = Path(folder, "worker"), Path(folder, "notes")
        worker.write_text(WORKER)
        worker.chmod(0o700)
        notes.touch()
        agents = []
        for node in range(nodes):
            conf = [KEEP_ALIVE]
            conf += [f"is_host={node == 0}"] if port is None else []
            conf += [PEER_CONF] if name == PEER else []
            options = {
                "--nnodes": span,
                "--nproc-per-node": WORKERS,
                "--max-restarts": restarts,
                "--rdzv-backend": store,
                "--rdzv-endpoint": f"127.0.0.1:{at}",
                "--rdzv-id": f"recovery-{number}",
                "--rdzv-conf": ",".join(conf),
            }
            words = [str(word) for option in options.items() for word in option]
            command = [*COMMANDS[name], *words, "--no-python", str(worker), str(notes), str(node)]
            agents.append(stack.enter_context(running(command, folder)))
        job = Job(agents, notes)
        for agent in agents:
            agent.wait_for(lambda: len(job.noted("started")) == nodes * WORKERS)
        yield job


def row(what: str, ours: Sequence[float], goal: Goal, peers: Sequence[float] = ()) -> str:
    """Return a row of the table."""
    reached = median(ours) if goal.of == "median" else max(ours)
    target = f"{goal.of} < {goal.limit:g}: {'met' if reached < goal.limit else 'MISSED'}"
    there = [value for value in peers if value < float("inf")]
    late = f"{len(peers) - len(there)} of {len(peers)} not within {PATIENCE:g} s" if len(there) < len(peers) else ""
    cells = ", ".join(cell for cell in (spread(there, 0) if there else "", late) if cell)
    ratio = f"{median(ours) / median(there):.3f}" if there and not late else ""
    return f"| {what} | {spread(ours, 0)} | {cells} | {ratio} | {target} |"


if __name__ == "__main__":
    main()
