"""Jobs whose store has a gate: real agents, a real store, real workers, and strangers who reach its port."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_launch.core.store_requests import Get
from elastic_launch.host import token
from elastic_launch.store.client import NotAStoreError, connect
from tests.support.jobs import Job
from tests.support.nodes import c10d
from tests.support.waiting import DEADLINE, wait_until

RUN = """
import torch, torch.distributed as dist
from torch.distributed import TCPStore
from datetime import timedelta
dist.init_process_group("gloo")
sums = torch.ones(1)
dist.all_reduce(sums)
where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
with open("/proc/net/tcp") as f:
    is_private = any(line.split()[1] == f"0100007F:{where[1]:04X}" and line.split()[3] == "0A" for line in f)
mark(f"sum={sums.item():g} {where[0]} private={is_private} shared={os.environ['TORCHELASTIC_USE_AGENT_STORE']}")
if restart == 0 and rank == 1:
    try: TCPStore(*ENDPOINT, is_master=False, timeout=timedelta(seconds=2))
    except Exception as error: mark(f"stranger {type(error).__name__}")
    wait_for("go")
    os._exit(9)
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


@pytest.fixture
def secret(tmp_path: Path) -> str:
    path = str(tmp_path / "job.token")
    token.write(path)
    return path


@pytest.mark.torch
def test_a_job_behind_a_gate_restarts_and_strangers_stay_outside(job: Job, secret: str, tmp_path: Path) -> None:
    nodes = c10d(job, "2", hosted=True)
    host, port = nodes.endpoint.rsplit(":", 1)
    script = job.script(f"ENDPOINT = {(host, int(port))!r}\n" + RUN)
    gated = "--store-gate", "--token-file", secret, "--max-restarts", "1"
    first = nodes(0, *gated, script=script)
    nodes.wait_for_first()
    second = nodes(1, *gated, script=script)
    with contextlib.ExitStack() as stack:
        for _ in range(50):  # they say nothing
            stack.enter_context(socket.create_connection((host, int(port)), DEADLINE))
        client = stack.enter_context(contextlib.closing(connect((host, int(port)), socket.AF_INET, "store")))
        with pytest.raises(NotAStoreError, match="store has a gate"):
            client.call(Get(("a",)), DEADLINE)
        wait_until(lambda: any("stranger" in mark for mark in job.marks()), "torch's client to be refused")
        where = "--rdzv-endpoint", nodes.endpoint, "--rdzv-id", nodes.run_id, "--token-file", secret, "--store-gate"
        for words in (where, (nodes.run_id,)):
            status = (sys.executable, "-m", "elastic_launch.operate", "status", "--json", *words)
            seen = subprocess.run(status, capture_output=True, text=True, timeout=DEADLINE, check=False)
            assert (seen.returncode, seen.stderr) == (0, "")
            assert json.loads(seen.stdout)["world_size"] == 2
        other = str(tmp_path / "other.token")
        token.write(other)
        without = (
            nodes(2, "--token-file", secret, script=script),
            "has a gate: give this node --store-gate and the job's",
        )
        wrong = (
            nodes(2, "--store-gate", "--token-file", other, script=script),
            "refuses this node's token: give all nodes",
        )
        for process, text in (without, wrong):
            result = job.finish(process)
            assert result.returncode == 69
            assert f"the store at {nodes.endpoint} {text}" in result.stderr
            assert "Traceback" not in result.stderr
        job.mark("go")
        for process in (first, second):
            result = job.finish(process)
            assert result.returncode == 0, result.stderr
    marks = [mark for mark in job.marks() if mark != "go"]
    stranger = [mark for mark in marks if "stranger" in mark]
    assert stranger
    assert sorted(mark for mark in marks if mark not in stranger) == [
        f"{rank}.{restart} sum=2 127.0.0.1 private=True shared=True" for rank in (0, 1) for restart in (0, 1)
    ]


def test_a_node_with_the_option_at_a_store_without_a_gate_ends_at_once(job: Job, secret: str) -> None:
    nodes = c10d(job, "2")
    result = job.finish(nodes(0, "--store-gate", "--token-file", secret, script=job.script("")))
    assert result.returncode == 69
    assert (
        f"the store at {nodes.endpoint} has no gate: start the node that serves it with --store-gate" in result.stderr
    )
