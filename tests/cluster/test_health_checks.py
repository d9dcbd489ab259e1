"""Health checks of real nodes: a spare takes the place of a node whose check fails, and the others are told."""

from __future__ import annotations

import sys

import pytest

from tests.support.jobs import Job
from tests.support.nodes import Nodes, c10d, up
from tests.support.waiting import wait_until

CONF = "last_call_timeout=1,keep_alive_interval=0.5,keep_alive_max_attempt=20,join_timeout=60"
"""Whoever waits for the unfit node's heartbeats to end, waits 10 s."""
CHECK = "import os, sys\nif os.path.exists('broken-' + sys.argv[1]): sys.exit('GPU 3: fell off the bus')\n"
REASON = "health check failed: GPU 3: fell off the bus (exit code 1)"
BEGIN = "mark(os.environ['GROUP_WORLD_SIZE'] + ' ' + os.environ['NODE'])\n"


class Checked:
    """Nodes with a check that fails while there is a file ``broken-NUMBER``."""

    def __init__(self, job: Job, nodes: Nodes, script: str) -> None:
        self.job, self.nodes, self.script = job, nodes, job.script(BEGIN + script)
        (job.path / "check.py").write_text(CHECK)
        self.check = f"{sys.executable} -S {job.path}/check.py"

    def start(self, number: int) -> object:
        args = ("--max-restarts", "3", "--health-check", f"{self.check} {number}")
        return self.nodes(number, *args, script=self.script, NODE=str(number))

    def break_node(self, number: int, *, broken: bool = True) -> None:
        file = self.job.path / f"broken-{number}"
        file.touch() if broken else file.unlink()

    def members(self, round_: int) -> set[str]:
        """The nodes whose workers have begun in a round."""
        return {mark.split()[2] for mark in self.job.marks() if mark.split()[0].endswith(f".{round_}")}


SCRIPT = "if restart == 0:\n    wait_for('go')\n    sys.exit(rank == 0)\nwait_for('end')\n"


@pytest.mark.parametrize("hosted", [False, True], ids=["", "of the node that hosts the store"])
def test_a_spare_takes_the_place_of_a_node_whose_check_fails(job: Job, hosted: bool) -> None:
    made = Checked(job, c10d(job, "2:2", CONF, hosted=hosted), SCRIPT)
    first = made.start(0)
    made.nodes.wait_for_first()
    others = [made.start(1)]
    wait_until(lambda: up(job, 0, 2))
    others.append(made.start(2))
    made.nodes.wait_for_key("0/node/3")
    made.break_node(0)
    job.mark("go")
    wait_until(lambda: up(job, 1, 2))
    assert made.members(1) == {"1", "2"}
    job.mark("end")
    done = [job.finish(process) for process in (first, *others)]  # type: ignore[arg-type]
    assert [each.returncode for each in done] == [0, 0, 0]
    assert REASON in done[0].stderr
    assert sum(f"{REASON}; going on without it" in each.stderr for each in done[1:]) == 1
    assert "the job has succeeded without this node, whose health check fails" in done[0].stderr


def test_a_node_comes_back_when_its_check_passes(job: Job) -> None:
    made = Checked(job, c10d(job, "1:2", CONF), SCRIPT)
    nodes = [made.start(0)]
    made.nodes.wait_for_first()
    nodes.append(made.start(1))
    wait_until(lambda: up(job, 0, 2))
    made.break_node(1)
    job.mark("go")
    wait_until(lambda: up(job, 1, 1))
    assert made.members(1) == {"0"}
    made.break_node(1, broken=False)
    wait_until(lambda: up(job, 2, 2))
    job.mark("end")
    done = [job.finish(process) for process in nodes]  # type: ignore[arg-type]
    assert [each.returncode for each in done] == [0, 0]
    assert "health check passed: joining" in done[1].stderr
    assert "restarts" not in done[0].stderr


def test_nodes_that_are_unfit_from_the_beginning_give_up_together(job: Job) -> None:
    made = Checked(job, c10d(job, "2:2", CONF.replace("join_timeout=60", "join_timeout=2"), hosted=True), "")
    made.break_node(0)
    made.break_node(1)
    nodes = [made.start(0), made.start(1)]
    done = [job.finish(process) for process in nodes]  # type: ignore[arg-type]
    assert [each.returncode for each in done] == [69, 69]
    assert f"{REASON}; gave up, because no round has formed within 2 s (join_timeout)" in done[0].stderr
    assert job.marks() == []
