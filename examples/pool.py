"""A pool of workers that is not about training, nor about torch: each rank does its share of many independent tasks.

    elastic-run --standalone --nproc-per-node 4 --max-restarts 3 examples/pool.py --tasks 200 --results results

A result appears as a whole, or not at all. So after a failure, or when nodes come and go, the ranks share the tasks
out again, and only those without a result are done. On several nodes, the results belong on a shared file system.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

from elastic_launch import worker


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the primes of many ranges.")
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--results", type=Path, required=True, help="a directory")
    parser.add_argument("--kill-task", type=int, help="for the demonstration: its rank kills itself, once")
    args = parser.parse_args()

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    args.results.mkdir(parents=True, exist_ok=True)
    for task in range(rank, args.tasks, world_size):
        result = args.results / f"{task}.json"
        if result.exists():
            continue
        if task == args.kill_task and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        beside = result.with_suffix(f".{rank}")
        beside.write_text(json.dumps({"primes": count_primes(1000 * task, 1000 * (task + 1)), "rank": rank}))
        os.replace(beside, result)
        worker.progress()  # elastic-job shows the tasks done; if no rank does any more, the job hangs
        if worker.should_stop():  # SIGTERM: the other tasks are for the next run
            return


def count_primes(begin: int, end: int) -> int:
    numbers = range(max(2, begin), end)
    return sum(all(number % factor for factor in range(2, int(number**0.5) + 1)) for number in numbers)


if __name__ == "__main__":
    main()
