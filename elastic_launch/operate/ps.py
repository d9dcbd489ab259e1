"""``elastic-job ps``: the jobs of this user on this host, one line each."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from elastic_launch.core.text import duration
from elastic_launch.env import environment
from elastic_launch.operate.jobs import Job, running_jobs
from elastic_launch.operate.text import cut, table

HEADER = ("JOB", "STATE", "ROUND", "NODES", "WORKERS", "SINCE", "RESTARTS", "STEPS/S", "LAST TROUBLE")


def main(argv: Sequence[str]) -> int:
    """Print the table. Return the exit status, which is 0 also if no job runs."""
    parser = argparse.ArgumentParser(prog="elastic-job ps", description="List your jobs on this host.")
    parser.add_argument("--json", action="store_true", help="print a list of the agents' statuses by job")
    args = parser.parse_args(argv)
    jobs = running_jobs(environment())
    if args.json:
        print(json.dumps([{"job": job.id, "agents": job.agents} for job in jobs]))
        return 0
    if not jobs:
        print("no job of yours runs on this host", file=sys.stderr)
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in table([HEADER, *(row(job, time.time()) for job in jobs)]):
        print(cut(line, width))
    return 0


def row(job: Job, now: float) -> tuple[Any, ...]:
    """Return the cells of a job's line; ``now`` is in seconds since 1970."""
    it = job.agents[0]
    since = duration(max(0.0, now - it["started_at"]))
    if "workers" not in it:  # it does not answer
        return (job.id, it["state"], None, None, None, since, None, None, None)
    speed = (it["progress"] or {}).get("steps_per_second")
    return (
        job.id,
        it["state"],
        it["round"],
        it["nodes"],
        it["world_size"],
        since,
        f"{it['restarts']} of {it['max_restarts']}",
        None if speed is None else f"{speed:.3g}",
        it["last_trouble"],
    )
