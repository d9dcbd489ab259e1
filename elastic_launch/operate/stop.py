"""``elastic-job stop``: stop a whole job, or one node of it, in good order."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from elastic_launch.env import environment
from elastic_launch.errors import UsageError
from elastic_launch.operate.jobs import NoJobError, choose, order, parser, running_jobs


def main(argv: Sequence[str]) -> int:
    """Have the workers stopped as by SIGTERM. Return the exit status; the job may take a while to end."""
    options = parser("stop", "stop a job: its workers get SIGTERM, and SIGKILL when the shutdown timeout is over")
    options.add_argument("--node", metavar="HOST", help="stop only the node on this host; the others go on if they can")
    options.add_argument("--checkpoint", action="store_true", help="only if all ranks can stop at the same step")
    options.add_argument("--signal", default="SIGTERM", metavar="NAME", help="the signal (default: SIGTERM)")
    args = options.parse_args(argv)
    name = args.signal.upper().removeprefix("SIG")
    if f"SIG{name}" not in signal.Signals.__members__:
        raise UsageError(f"--signal={args.signal}: must be the name of a signal, such as SIGTERM")
    request = {"request": "stop", "signum": int(signal.Signals[f"SIG{name}"]), "checkpoint": args.checkpoint}
    job = choose(running_jobs(environment()), args.job)
    if args.node is None:
        order(job.agents[0], {**request, "scope": "job"})
        print(f"{job.id}: stopping")
        return 0
    nodes = [agent for agent in job.agents if args.node == agent["host"]]
    if not nodes:
        hosts = ", ".join(sorted({agent["host"] for agent in job.agents}))
        raise NoJobError(
            f"--node={args.node}: {job.id} has no such node on this host (there is {hosts}); run this command there"
        )
    for agent in nodes:
        order(agent, {**request, "scope": "node"})
        print(f"{job.id}: the node on {agent['host']} (pid {agent['pid']}) is stopping")
    return 0
