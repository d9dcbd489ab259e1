"""``elastic-job restart``: another round now, which uses up no restart."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_launch.env import environment
from elastic_launch.operate.jobs import choose, order, parser, running_jobs


def main(argv: Sequence[str]) -> int:
    """Have all nodes end the round and begin another one. Return the exit status."""
    args = parser("restart", "begin another round of a job now, without using up a restart").parse_args(argv)
    job = choose(running_jobs(environment()), args.job)
    order(job.agents[0], {"request": "restart"})
    print(f"{job.id}: restarting")
    return 0
