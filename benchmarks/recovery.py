"""From a failure on one node to all others knowing of it, and from the death of an agent to the job going on.

All nodes are on this machine, and their workers note by CLOCK_MONOTONIC, which is one for all of them: a worker that
fails, right before it ends; the others when SIGTERM comes; each new one in its first line. Only those of other nodes
than the failing one count. The worker fails, and the agent is killed, at a random moment. Of the agents over c10d the
first hosts the store, and is not the one that is killed.

Keep-alive: each node gives a sign of life once in a second, and is dead after three without one. That time is
subtracted; a node that is killed right before its sign is due may be missed up to a second sooner.

The agents that are simulated are those of rendezvous.py: what is measured is about the CPU time of all of them.

torchrun (two nodes, c10d) gets ``PATIENCE`` seconds; how often it did not get there is told. In its first run the node
that fails hosts the store, in the second it does not.
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
"""Of each node."""
DEADLINE = 3.0
KEEP_ALIVE = "keep_alive_interval=1,keep_alive_max_attempt=3"
"""``DEADLINE``, for the launchers."""
PEER_CONF = "last_call_timeout=1"
"""For torchrun, which else would wait 30 s for the node that is dead."""
PATIENCE = 20.0
PEER_RUNS = 2
"""At most: most of them last for all of ``PATIENCE``."""
AGENTS = 256
"""That are simulated."""
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
    """What a worker has noted."""

    what: str
    node: int
    pid: int
    time: float


class Goal(NamedTuple):
    """What is to stay under a limit in ms."""

    of: Literal["median", "maximum"]
    limit: float


@dataclass
class Job:
    """A job of several nodes at work."""

    agents: list[Running]
    notes: Path

    def noted(self, what: str, since: float = 0.0) -> list[Note]:
        lines = self.notes.read_text().splitlines(keepends=True)
        fields = [line.split() for line in lines if line.endswith("\n")]
        found = [Note(name, int(node), int(pid), float(at)) for name, node, pid, at in fields]
        return [note for note in found if note.what == what and note.time >= since]

    def last(self, what: str, count: int, since: float, but: int | None = None) -> float:
        """When the last of so many workers noted something; those of one node do not count. Infinite: not in time."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = [note for note in self.noted(what, since) if note.node != but]
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
        with serving(store) as (port, pid):
            jobs = [Simulation(store, port, AGENTS, f"recovery-{run}", True) for run in range(runs)]
            known = [1000 * simulate(job, [pid], 0).known for job in jobs]
        print(
            row(f"{store}, {AGENTS} simulated agents: failure to all know of it", known, Goal("maximum", 500)),
            flush=True,
        )
    print(f"\n{machine([sys.argv[0], *sys.argv[1:]])}; {KEEP_ALIVE}")


def fail_once(name: str, store: str, port: int | None, nodes: int, run: int, restarts: int) -> float:
    """Seconds from a worker's end to the last worker of another node that is told to stop."""
    with job_of(name, store, port, f"{nodes}", nodes, restarts) as job:
        time.sleep(random.uniform(0.2, 0.4))  # torchrun looks every 0.1 s: in any phase of that
        victim = next(note for note in job.noted("started") if note.node == run % nodes)
        os.kill(victim.pid, signal.SIGUSR1)
        failed = job.last("failed", 1, victim.time)
        return job.last("stopped", (nodes - 1) * WORKERS, failed, victim.node) - failed


def fail_with_a_restart(name: str, store: str, port: int | None, nodes: int, run: int) -> float:
    return fail_once(name, store, port, nodes, run, 1)


def fail_for_good(name: str, store: str, port: int | None, nodes: int, run: int) -> float:
    return fail_once(name, store, port, nodes, run, 0)


def lose_a_node(name: str, store: str, port: int | None, nodes: int, run: int) -> float:
    """Seconds from an agent's death to the last worker of the round that the others form, less the deadline."""
    with job_of(name, store, port, f"{nodes - 1}:{nodes}", nodes, 0) as job:
        time.sleep(random.uniform(1, 2))  # signs of life are due every second
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
    """A job whose workers have all started. ``port`` None: its first agent hosts the store."""
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
    """One line of the table."""
    reached = median(ours) if goal.of == "median" else max(ours)
    target = f"{goal.of} < {goal.limit:g}: {'met' if reached < goal.limit else 'MISSED'}"
    there = [value for value in peers if value < float("inf")]
    late = f"{len(peers) - len(there)} of {len(peers)} not within {PATIENCE:g} s" if len(there) < len(peers) else ""
    cells = ", ".join(cell for cell in (spread(there, 0) if there else "", late) if cell)
    ratio = f"{median(ours) / median(there):.3f}" if there and not late else ""
    return f"| {what} | {spread(ours, 0)} | {cells} | {ratio} | {target} |"


if __name__ == "__main__":
    main()
