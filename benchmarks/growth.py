"""Restart a job's warm workers again and again, and see whether anything grows: ``python benchmarks/growth.py --help``.

Sampled are descriptors, memory, threads, children that nobody has waited for, and files of the agents and their
keepers, and the keys of the store. The last third of the samples is compared with the first third. Exit status 1: one
of them has grown.

Sampling begins after ``SETTLED`` restarts back to back, which takes some 15 minutes. What grows until then has a bound:
CPython keeps up to 2,000 free tuples of each length, and a round adds a few, because a named tuple's ``_replace`` takes
memory from the system and leaves it in such a list; the store keeps the outcomes of 64 rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

WORKER = """
import os, sys, time
time.sleep(float(os.environ["SOAK_SECONDS"]) if os.path.exists(os.environ["SOAK_SETTLED"]) else 0)
sys.exit(3 if os.environ["RANK"] == "0" and not os.path.exists(os.environ["SOAK_END"]) else 0)
"""
SETTLED = 2100
"""Restarts after which all that is bounded, and grows with nearly every restart, has come to its bound."""
MEMORY = ("agents (MiB)", "keepers (MiB)", "others (MiB)")
"""Memory that is a process's own. The others are the processes that serve the store."""
TOLERANCE = {**dict.fromkeys(MEMORY, 0.5), "descriptors": 6.0, "threads": 1.0, "files": 2.0, "store keys": 3.0}
"""By how much the last third may be above the first. Else: half of one.

A store of the workers may be there or not; lists of tuples to which few rounds add fill until 6,000 restarts.
"""


class Job:
    """A job of one node, or of three on this host with a c10d store."""

    def __init__(self, nodes: int, seconds: float, path: Path) -> None:
        self._path = path
        script = path / "train.py"
        script.write_text(WORKER)
        self.temp = path / "tmp"
        self.temp.mkdir()
        self._port = 29717
        words = ["--nproc-per-node", "2", "--max-restarts", "1000000", "--crash-loop", "0", "--preload", "json", "-q"]
        if nodes > 1:
            endpoint = ["--rdzv-endpoint", f"127.0.0.1:{self._port}", "--rdzv-id", f"soak-{os.getpid()}"]
            words += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", *endpoint]
        self._env = {
            **os.environ,
            "TMPDIR": str(self.temp),
            "SOAK_SECONDS": str(seconds),
            "SOAK_SETTLED": str(path / "settled"),
            "SOAK_END": str(path / "end"),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "elastic_launch", *words, str(script)]
        self.agents = [
            subprocess.Popen(command, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(nodes)
        ]
        self._store = self._connect() if nodes > 1 else None

    def _connect(self) -> object:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        return TCPStore("127.0.0.1", self._port, is_master=False)

    def restarts(self) -> int:
        """Return how often the job has restarted."""
        command = [sys.executable, "-m", "elastic_launch.operate", "status", "--json"]
        done = subprocess.run(command, env=self._env, stdout=subprocess.PIPE, check=True)
        seen: int = json.loads(done.stdout)["restarts"]
        return seen

    def settle(self) -> int:
        """Return how often the job has restarted when what is bounded has come to its bound."""
        restarts = 0
        while restarts < SETTLED:
            time.sleep(10)
            restarts = self.restarts()
        (self._path / "settled").touch()
        return restarts

    def sample(self) -> dict[str, float]:
        """Return what the agents and their keepers hold now."""
        found = dict.fromkeys(("descriptors", *MEMORY, "threads", "zombies"), 0.0)
        for agent in map(psutil.Process, (agent.pid for agent in self.agents)):
            for process in (agent, *agent.children()):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    is_keeper = any(word in " ".join(process.cmdline()) for word in ("keeper", "preload"))
                    whose = MEMORY[0] if process == agent else MEMORY[1] if is_keeper else MEMORY[2]
                    found[whose] += memory(process.pid) / 2**20
                    found["descriptors"] += process.num_fds()
                    found["threads"] += process.num_threads()
                    found["zombies"] += sum(c.status() == psutil.STATUS_ZOMBIE for c in process.children())
        found["files"] = sum(path.is_file() for path in self.temp.rglob("*"))
        if self._store is not None:
            found["store keys"] = self._store.num_keys()  # type: ignore[attr-defined]
        return found

    def end(self) -> list[int]:
        """Let the workers succeed. Return the agents' exit statuses."""
        (self._path / "end").touch()
        return [agent.wait(120) for agent in self.agents]


def memory(pid: int) -> int:
    """Return the bytes that a process has in memory and has written itself.

    Pages of files do not count: whether they are the process's own depends on who else runs. Of the process that serves
    the store that may be 60 MiB, if no other program uses torch.

    Raises:
        psutil.NoSuchProcess: It is gone.
    """
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(pid) from error
    return int(rollup.partition("Anonymous:")[2].split()[0]) * 1024


def soak(nodes: int, minutes: float, seconds: float) -> bool:
    """Run a job, and print how it went. Return whether nothing has grown."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        job = Job(nodes, seconds, Path(folder))
        try:
            samples: list[dict[str, float]] = []
            before = job.settle()
            end = time.monotonic() + 60 * minutes
            while time.monotonic() < end:
                time.sleep(1)
                samples.append(job.sample())
            restarts = job.restarts() - before
            statuses = job.end()
        finally:
            for agent in job.agents:
                agent.kill()
                agent.wait()
    pace = f"{restarts} restarts, {restarts * 60 / minutes:.0f} an hour"
    print(f"{nodes} node(s), {minutes:g} min, {pace}, after {before}: {statuses}")
    third = len(samples) // 3
    grown = []
    for name in samples[0]:
        # What a round needs comes and goes, so the least of the samples shows what stays; memory varies little.
        middle = statistics.mean if name in MEMORY else min
        first, last = (middle([s[name] for s in part]) for part in (samples[:third], samples[-third:]))
        is_flat = last - first <= TOLERANCE.get(name, 0.5)
        grown += [] if is_flat else [name]
        print(f"  {name:<14} {first:8.1f} -> {last:8.1f}{'' if is_flat else '   GROWS'}")
    return not grown and not any(statuses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120, help="of sampling, for each number of nodes")
    parser.add_argument("--nodes", type=int, action="append", choices=(1, 3), help="by default 1, then 3")
    parser.add_argument("--seconds", type=float, default=0.2, help="how long a worker lives meanwhile")
    options = parser.parse_args()
    passed = [soak(nodes, options.minutes, options.seconds) for nodes in options.nodes or (1, 3)]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
