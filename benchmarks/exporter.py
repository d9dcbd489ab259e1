"""Measure what ``elastic-job exporter`` costs: CPU time of exporter and agent for a scrape, and between scrapes.

A job of 8 workers counts its steps while the exporter is scraped many times, and then left alone for a while. From the
CPU time of both the share of one core follows that a scrape each 15 s takes.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median

import psutil
from common import COMMANDS, OURS, Running, machine, parse_runs, running, spread

SCRAPES = 500
INTERVAL = 15.0
"""Seconds between two scrapes, for the share of a core."""
IDLE_S = 30.0
WORKERS = 8
WORKER = """\
import sys, time
from elastic_launch.worker import progress
while True:
    time.sleep(0.1)
    progress()
"""
JOB = str(Path(sys.executable).with_name("elastic-job"))
OPTIONS = ["--nproc-per-node", str(WORKERS)]


def main() -> None:
    runs = parse_runs("CPU time of the exporter and of the agent for a scrape.", default=3)
    rows = [measure() for _ in range(runs)]
    print(f"{WORKERS} workers, {SCRAPES} scrapes, {runs} runs\n\n| | median (min–max) | target |\n|---|---|---|")
    for name in rows[0]:
        target = ""
        if name.startswith("share"):
            target = f"< 1: {'met' if median(row[name] for row in rows) < 1 else 'MISSED'}"
        print(f"| {name} | {spread([row[name] for row in rows], 3)} | {target} |")
    print(f"\n{machine([OURS, *OPTIONS, 'worker.py'])}")


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "worker.py")
        script.write_text(WORKER)
        with (
            running([*COMMANDS[OURS], *OPTIONS, str(script)], folder) as launcher,
            running([JOB, "exporter", "--port", "0"], folder) as exporter,
        ):
            url = url_of(exporter)
            exporter.wait_for(lambda: scrape(url).count("elastic_worker_steps_total{") == WORKERS)
            processes = [psutil.Process(one.process.pid) for one in (exporter, launcher)]
            before, began = times(processes), time.monotonic()
            durations = [timed(url) for _ in range(SCRAPES)]
            busy = time.monotonic() - began
            between = times(processes)
            time.sleep(IDLE_S)
            after = times(processes)
            # What the agent does for its workers goes on all the time.
            idle = [(late - early) / IDLE_S for early, late in zip(between, after, strict=True)]
            per_scrape = [
                (late - early - rest * busy) / SCRAPES for early, late, rest in zip(before, between, idle, strict=True)
            ]
            share = sum(per_scrape) / INTERVAL + idle[0]
            return {
                "duration of a scrape, ms": 1000 * median(durations),
                "exporter's CPU time for it, ms": 1000 * per_scrape[0],
                "agent's CPU time for it, ms": 1000 * per_scrape[1],
                "exporter's CPU time between scrapes, ms/s": 1000 * idle[0],
                f"share of a core with a scrape each {INTERVAL:g} s, %": 100 * share,
                "exporter's memory (RSS), MiB": processes[0].memory_info().rss / 2**20,
            }


def url_of(exporter: Running) -> str:
    found: list[str] = []

    def is_serving() -> bool:
        exporter.output.seek(0)
        found.extend(re.findall(r"http://\S+", exporter.output.read().decode()))
        return bool(found)

    exporter.wait_for(is_serving)
    return found[0]


def scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def timed(url: str) -> float:
    begin = time.monotonic()
    scrape(url)
    return time.monotonic() - begin


def times(processes: list[psutil.Process]) -> list[float]:
    """Return the CPU time of each in seconds, with that of threads that have ended; it grows in steps of 10 ms."""
    return [sum(process.cpu_times()[:2]) for process in processes]


if __name__ == "__main__":
    main()
