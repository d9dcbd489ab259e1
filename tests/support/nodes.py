"""Jobs of several nodes on this host: real agents, and real stores between them."""

from __future__ import annotations

import socket
import subprocess

from tests.support.jobs import Job
from tests.support.waiting import wait_until

QUICK = "last_call_timeout=1,keep_alive_interval=0.5,keep_alive_max_attempt=3"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Nodes:
    """The nodes of one job: ``nodes(0, ...)`` starts node 0."""

    def __init__(self, job: Job, backend: str, endpoint: str, nnodes: str, conf: str = QUICK) -> None:
        self.job, self.backend, self.endpoint, self.nnodes, self.conf = job, backend, endpoint, nnodes, conf

    def __call__(self, number: int, *args: str, script: str, **env: str) -> subprocess.Popen[str]:
        words = ["--nnodes", self.nnodes, "--rdzv-conf", self.conf]
        if self.backend == "static":
            host, port = self.endpoint.rsplit(":", 1)
            words += ["--master-addr", host, "--master-port", port, "--node-rank", str(number)]
        else:
            words += ["--rdzv-backend", self.backend, "--rdzv-endpoint", self.endpoint, "--rdzv-id", "job-1"]
        return self.job.start(*words, *args[: self._options(args)], script, *args[self._options(args) :], **env)

    @staticmethod
    def _options(args: tuple[str, ...]) -> int:
        return args.index("--") if "--" in args else len(args)


def c10d(job: Job, nnodes: str, conf: str = QUICK) -> Nodes:
    return Nodes(job, "c10d", f"127.0.0.1:{free_port()}", nnodes, conf)


ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
sums = torch.ones(1)
dist.all_reduce(sums)
mark(f"sum={sums.item():g}")
if restart == 0 and rank == 1: os._exit(9)
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


def start_three(
    job: Job, script: str, nnodes: str = "2:3", *args: str, conf: str = QUICK
) -> list[subprocess.Popen[str]]:
    """Three nodes that run; the first hosts the store."""
    nodes = c10d(job, nnodes, conf)
    first = nodes(0, "--max-restarts", "3", *args, script=script)
    wait_until(lambda: listens(nodes.endpoint))
    others = [nodes(n, "--max-restarts", "3", *args, script=script) for n in (1, 2)]
    return [first, *others]


def listens(endpoint: str) -> bool:
    host, port = endpoint.rsplit(":", 1)
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def up(job: Job, restart: int, count: int) -> bool:
    return sum(1 for mark in job.marks() if mark.split()[0].endswith(f".{restart}")) >= count
