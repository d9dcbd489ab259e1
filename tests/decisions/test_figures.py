"""What the workers get done, in numbers for those who look at a running job."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from elastic_launch.core.agent.lifecycle import AgentState
from elastic_launch.core.agent.messages import Limits
from elastic_launch.core.progress.figures import figures
from elastic_launch.core.progress.memory import WorkerProgress
from elastic_launch.job import Assignment, Goodput, Policy, RestartHistory

PAST = Goodput(steps=100, in_steps=50.0, startup=5.0)
ASSIGNMENT = Assignment(
    0, 1, 0, 2, 2, 0, 2, "127.0.0.1", 29500, "host-a", True, restart_history=RestartHistory(goodput=PAST)
)
STATE = replace(AgentState(Limits(Policy(), 30.0)), assignment=ASSIGNMENT, started_at=1000.0)
WORKERS = {
    0: WorkerProgress(steps=11, first=1010.0, last=1020.0),
    1: WorkerProgress(
        steps=11, marks=6, first=1010.0, last=1015.0, number=105, first_number=100, phase="eval", phase_since=1016.0
    ),
}


def test_steps_of_earlier_rounds_and_of_this_one() -> None:
    found = figures(STATE, WORKERS, 0.0, False, 1024.0)
    assert found.workers[0] == {
        "steps": 11,
        "step": None,
        "seconds_since_step": 4.0,
        "steps_per_second": 1.0,
        "phase": None,
    }
    assert (found.workers[1]["steps"], found.workers[1]["step"], found.workers[1]["phase"]) == (6, 105, "eval")
    assert found.job["steps"] == 111
    assert (found.job["in_steps"], found.job["elapsed"], found.job["goodput"]) == (60.0, 79.0, 0.7595)
    assert found.job["lost_seconds"]["start"] == 10.0
    assert found.job["seconds_since_step"] == 4.0
    assert found.job["summary"].startswith("111 steps, ")


def test_without_a_step_there_is_nothing_to_tell() -> None:
    fresh = replace(STATE, assignment=ASSIGNMENT._replace(restart_history=RestartHistory()))
    found = figures(fresh, {0: WorkerProgress()}, 0.0, False, 1024.0)
    assert found.job == {}
    assert found.workers[0]["seconds_since_step"] is None
    assert figures(AgentState(Limits(Policy(), 30.0)), {}, 0.0, False, 1.0).job == {}


def test_all_figures_are_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    rows = "\n".join(re.findall(r"^\| `(?:progress|workers)`.*$", page, re.MULTILINE))
    found = figures(STATE, WORKERS, 0.0, False, 1024.0)
    for name in (*found.job, *found.job["lost_seconds"], *found.workers[0]):
        assert f"`{name}`" in rows, name
