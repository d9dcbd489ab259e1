"""Workers that stop at the same step, with real gloo, on one node and on several."""

from __future__ import annotations

import signal

import pytest

from tests.support.control import elastic_job
from tests.support.jobs import TWO, Job
from tests.support.nodes import WARM, Nodes, c10d
from tests.support.servers import shared_etcd
from tests.support.waiting import wait_until

pytestmark = pytest.mark.torch

TRAINING = """
import torch, torch.distributed as dist
from elastic_launch import worker
dist.init_process_group("gloo")
number = torch.zeros(1)
for step in range(100_000 if restart == 0 else 20):
    number += 1
    if step % 7 == rank:
        time.sleep(0.002)
    dist.all_reduce(number)
    if step == 20:
        mark("trains")
    if worker.should_stop():
        mark(f"stops {step}")
        os._exit(0)
dist.barrier()
mark(f"done of {dist.get_world_size()}")
os._exit(0)
"""


def stops(job: Job, restart: int = 0) -> dict[int, int]:
    """The step at which each rank stopped."""
    marks = [mark.split() for mark in job.marks() if " stops " in mark]
    return {int(who.split(".")[0]): int(step) for who, _, step in marks if who.endswith(f".{restart}")}


def test_all_ranks_of_a_node_stop_at_the_same_step(job: Job) -> None:
    process = job.start(*TWO, job.script(TRAINING))
    job.wait_for("0.0 trains", "1.0 trains")
    process.send_signal(signal.SIGTERM)
    done = job.finish(process)
    print(done.stderr)
    assert done.returncode == 128 + signal.SIGTERM
    assert len(stops(job)) == 2
    assert len(set(stops(job).values())) == 1
    assert "all ranks stop at their call" in done.stderr


def test_all_ranks_of_three_nodes_stop_at_the_same_step_and_two_nodes_go_on(job: Job) -> None:
    script = job.script(TRAINING)
    nodes = c10d(job, "2:3", hosted=True)
    first = nodes(0, *WARM, script=script)
    nodes.wait_for_first()
    others = [nodes(number, *WARM, script=script) for number in (1, 2)]
    job.wait_for("0.0 trains", "1.0 trains", "2.0 trains")
    others[0].send_signal(signal.SIGTERM)
    results = [job.finish(process) for process in (first, *others)]
    for done in results:
        print(done.stderr)
    assert [done.returncode for done in results] == [0, 128 + signal.SIGTERM, 0]
    assert sorted(stops(job)) == [0, 1, 2]
    assert len(set(stops(job).values())) == 1
    assert {mark for mark in job.marks() if "done" in mark} == {"0.1 done of 2", "1.1 done of 2"}


def test_a_script_that_never_asks_gets_the_signal(job: Job) -> None:
    process = job.start(*TWO, job.script("mark()\nwait()\n"))
    wait_until(lambda: len(job.marks()) == 2)
    process.send_signal(signal.SIGTERM)
    done = job.finish(process)
    assert done.returncode == 128 + signal.SIGTERM
    assert "SIGTERM received: stopping 2 workers" in done.stderr


def test_the_whole_job_is_stopped_at_a_checkpoint_from_outside(job: Job) -> None:
    """Although two of three nodes would be enough to go on."""
    nodes = Nodes(job, "etcd", shared_etcd(), "2:3")
    processes = [nodes(number, script=job.script(TRAINING)) for number in range(3)]
    job.wait_for("0.0 trains", "1.0 trains", "2.0 trains")
    assert elastic_job("stop", "--checkpoint").stdout == f"{nodes.run_id}: stopping\n"
    assert [job.finish(process).returncode for process in processes] == [128 + signal.SIGTERM] * 3
    assert sorted(stops(job)) == [0, 1, 2]
    assert len(set(stops(job).values())) == 1


def test_a_checkpoint_of_a_script_that_never_asks_is_refused(job: Job) -> None:
    process = job.start(*TWO, job.script("mark()\nwait()\n"))
    wait_until(lambda: len(job.marks()) == 2)
    done = elastic_job("stop", "--checkpoint")
    assert (done.returncode, done.stderr.count("\n")) == (69, 1)
    assert "no worker of this node has called should_stop()" in done.stderr
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    job.finish(process)
