"""``elastic-job stacks``: where all ranks of a job stand in their code, on one screen. It stops nothing."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_launch.env import environment
from elastic_launch.operate.jobs import choose, order, parser, running_jobs

PATIENCE = 35.0
"""Seconds to wait for the reply; a node learns of the request with its next heartbeat."""


def main(argv: Sequence[str]) -> int:
    """Print the merged stacks. Return the exit status."""
    args = parser("stacks", "show where all ranks of a job stand in their code; it stops nothing").parse_args(argv)
    job = choose(running_jobs(environment()), args.job)
    print(order(job.agents[0], {"request": "stacks"}, PATIENCE)["text"])
    return 0
