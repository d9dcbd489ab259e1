"""Measure what a launcher costs while its workers run: memory, threads and wake-ups.

The launcher counts with all its descendants except the workers and what they start. For ours, these are the agent and
its keeper.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import psutil
from common import COMMANDS, OPTIONS, OURS, PEER, Running, Samples, machine, parse_runs, row, running, table

WINDOW_S = 10.0
SETTLE_S = 2.0  # after the start of the last worker: what a launcher does at the start is not idling
WORKER = """\
import os, sys, time
open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
time.sleep(300)
"""


def main() -> None:
    runs = parse_runs("Memory and wake-ups of an idle launcher, ours and torchrun's.", default=3)
    found: dict[str, Samples] = {}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            for what, value in measure(command).items():
                found.setdefault(what, {OURS: [], PEER: []})[name].append(value)

    limits = {"agent, RSS MiB": 32.0, "wake-ups per second": 2.0}
    print(
        f"2 sleeping workers, {WINDOW_S:.0f} s, {runs} runs each. The sum of RSS counts shared pages in each process.\n"
    )
    print(table([row(what, samples, 1, limit=limits.get(what)) for what, samples in found.items()]))
    print(f"\n{machine([OURS, *OPTIONS, 'worker.py'])}")


def measure(command: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        script, pids = Path(folder, "worker.py"), Path(folder, "pids")
        script.write_text(WORKER)
        pids.mkdir()
        with running([*command, *OPTIONS, str(script), str(pids)], folder) as launcher:
            launcher.wait_for(lambda: len(list(pids.iterdir())) == 2)
            time.sleep(SETTLE_S)
            processes = own_processes(launcher, {int(path.name) for path in pids.iterdir()})
            before = sum(switches(one.pid) for one in processes)
            begin = time.monotonic()
            time.sleep(WINDOW_S)
            rate = (sum(switches(one.pid) for one in processes) - before) / (time.monotonic() - begin)
            resident = [one.memory_info().rss / 2**20 for one in processes]
            return {
                "agent, RSS MiB": resident[0],
                "agent, PSS MiB": pss_mib(processes[0].pid),
                "all own processes, RSS MiB": sum(resident),
                "all own processes, PSS MiB": sum(pss_mib(one.pid) for one in processes),
                "own processes": len(processes),
                "threads": sum(one.num_threads() for one in processes),
                "wake-ups per second": rate,
            }


def own_processes(launcher: Running, workers: set[int]) -> list[psutil.Process]:
    """Return the launcher's own processes, the agent first."""
    agent = psutil.Process(launcher.process.pid)
    theirs = set(workers)
    for worker in workers:
        theirs |= {child.pid for child in psutil.Process(worker).children(recursive=True)}
    return [agent, *(child for child in agent.children(recursive=True) if child.pid not in theirs)]


def switches(pid: int) -> int:
    """Return the context switches of all threads so far, voluntary or not: each wake-up ends in one."""
    statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(count) for text in statuses for count in re.findall(r"voluntary_ctxt_switches:\s+(\d+)", text))


def pss_mib(pid: int) -> float:
    """Return the proportional set size in MiB: a shared page is divided among all that share it, workers included."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert match, text
    return int(match[1]) / 1024


if __name__ == "__main__":
    main()
