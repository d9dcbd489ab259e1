"""Jobs of several nodes on this host: real agents, and real stores between them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import uuid

from elastic_launch.core.store_requests import Wait
from elastic_launch.store.client import connect
from tests.support.jobs import Job
from tests.support.ports import free_port
from tests.support.servers import shared_store
from tests.support.waiting import DEADLINE, wait_until

STEADY = "last_call_timeout=60,keep_alive_interval=1,keep_alive_max_attempt=15"
"""A round waits for a node that starts late, and nobody is lost because a busy machine stood still for some seconds."""
LOST_AFTER = 5
"""Keep-alive deadline in seconds of tests in which nodes are lost."""
QUICK = f"last_call_timeout=60,keep_alive_interval={LOST_AFTER / 10},keep_alive_max_attempt=10"
"""For those tests."""
WARM = ("--preload", "torch")
"""Torch is imported once on each node, not by the workers of each round."""


class Nodes:
    """The nodes of one job: ``nodes(0, ...)`` starts node 0."""

    def __init__(
        self, job: Job, backend: str, endpoint: str, nnodes: str, conf: str = STEADY, run_id: str | None = None
    ) -> None:
        self.job, self.backend, self.endpoint, self.nnodes, self.conf = job, backend, endpoint, nnodes, conf
        self.run_id = run_id or f"job-{uuid.uuid4().hex[:8]}"
        """The store may serve other tests, too."""
        self.hosted = True
        """Whether the first node hosts the store."""

    def __call__(self, number: int, *args: str, script: str, **env: str) -> subprocess.Popen[str]:
        words = ["--nnodes", self.nnodes, "--rdzv-conf", self.conf]
        if self.backend == "static":
            host, port = self.endpoint.rsplit(":", 1)
            words += ["--master-addr", host, "--master-port", port, "--node-rank", str(number)]
        else:
            words += ["--rdzv-backend", self.backend, "--rdzv-endpoint", self.endpoint, "--rdzv-id", self.run_id]
        return self.job.start(*words, *args[: self._options(args)], script, *args[self._options(args) :], **env)

    def key(self, name: str) -> str:
        """What the job calls something in its store."""
        return f"elastic/{self.run_id}/{name}"

    def wait_for_key(self, name: str) -> None:
        """Wait until the nodes have written something to their c10d store."""
        host, port = self.endpoint.rsplit(":", 1)
        with contextlib.closing(connect((host, int(port)), socket.AF_INET, "store")) as client:
            client.call(Wait((self.key(name),)), DEADLINE)

    def wait_for_first(self) -> None:
        """Wait until the node that was started first is ahead of others: it hosts the store, or has registered."""
        wait_until(lambda: listens(self.endpoint))
        if not self.hosted:
            self.wait_for_key("0/node/1")

    @staticmethod
    def _options(args: tuple[str, ...]) -> int:
        return args.index("--") if "--" in args else len(args)


def c10d(job: Job, nnodes: str, conf: str = STEADY, *, hosted: bool = False) -> Nodes:
    """Nodes on a c10d store: the one that tests share, or one that the first node hosts."""
    port = free_port() if hosted else shared_store().port
    nodes = Nodes(job, "c10d", f"127.0.0.1:{port}", nnodes, conf)
    nodes.hosted = hosted
    return nodes


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
    job: Job, script: str, nnodes: str = "2:3", *args: str, conf: str = STEADY, hosted: bool = False
) -> list[subprocess.Popen[str]]:
    """Three nodes that run, on a store as for ``c10d``."""
    nodes = c10d(job, nnodes, conf, hosted=hosted)
    first = nodes(0, "--max-restarts", "3", *args, script=script)
    nodes.wait_for_first()
    others = [nodes(n, "--max-restarts", "3", *args, script=script) for n in (1, 2)]
    return [first, *others]


def listens(endpoint: str) -> bool:
    host, port = endpoint.rsplit(":", 1)
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def up(job: Job, restart: int, count: int) -> bool:
    return sum(1 for mark in job.marks() if mark.split()[0].endswith(f".{restart}")) >= count
