"""The events that several nodes of a job write."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from elastic_launch.logs.event_log import path_in
from tests.support.event_lines import events_in
from tests.support.jobs import Job
from tests.support.nodes import c10d, start_three, up
from tests.support.waiting import wait_until


def events_of(job: Job) -> list[dict[str, Any]]:
    """All nodes are on this host, so they write to one file."""
    [file] = job.path.rglob("events_*.jsonl")
    return events_in(file)


def text_of(job: Job) -> str:
    """What has been written so far."""
    return "".join(file.read_text() for file in job.path.rglob("events_*.jsonl"))


def of_job(events: list[dict[str, Any]]) -> list[str]:
    return [event["name"] for event in sorted(events, key=lambda event: event["time"]) if event["scope"] == "job"]


@pytest.mark.quick
def test_a_lost_node_and_what_is_written_once_per_job(job: Job) -> None:
    script = job.script("mark('up')\nif restart == 0: wait()\nwait_for('end')")
    processes = start_three(job, script, "2:3", "--log-dir", "logs")
    # The workers may be up before their agents have written that they have started them.
    wait_until(lambda: up(job, 0, 3) and text_of(job).count('"name": "started"') == 3)
    processes[2].send_signal(signal.SIGKILL)
    wait_until(lambda: up(job, 1, 2))
    job.mark("end")
    assert [job.finish(process).returncode for process in processes] == [0, 0, -9]
    events = events_of(job)
    assert of_job(events) == ["formed", "node_lost", "restarting", "re_formed", "ended"]
    pid = processes[2].pid
    assert [event["name"] for event in events if event["pid"] == pid] == ["joined", "formed", "started"]
    lost = next(event for event in events if event["name"] == "node_lost")
    assert [name.split("-")[-2] for name in lost["lost"]] == [str(pid)]
    counts = Counter(event["name"] for event in events)
    assert (counts["joined"], counts["formed"], counts["re_formed"], counts["ended"]) == (5, 3, 2, 2)


def test_a_failure_on_one_of_two_nodes(job: Job) -> None:
    nodes = c10d(job, "2", hosted=True)
    script = job.script(
        "mark('up')\nif restart == 0 and rank == 1: wait_for('0.0 up'); sys.exit(3)\nif restart == 0: wait()"
    )
    first = nodes(0, "--max-restarts", "1", "--events", str(job.path), script=script)
    nodes.wait_for_first()
    second = nodes(1, "--max-restarts", "1", "--events", str(job.path), script=script)
    results = [job.finish(process) for process in (first, second)]
    assert [result.returncode for result in results] == [0, 0]
    events = events_of(job)
    assert of_job(events) == ["formed", "restarting", "re_formed", "ended"]
    assert [event["rank"] for event in events if event["name"] == "failed"] == [1]
    assert {event["cause"] for event in events if event["name"] in ("stopping", "restarting")} == {"failed"}
    for result in results:
        shown = [line.removeprefix("elastic-run: ") for line in result.stderr.splitlines() if "elastic-run: " in line]
        assert set(shown) <= {event["text"] for event in events}


def test_each_host_has_a_file_of_its_own_in_a_shared_directory() -> None:
    assert {path_in("logs", host) for host in ("a", "b/c", "")} == {
        str(Path("logs", name)) for name in ("events_a.jsonl", "events_b%2Fc.jsonl", "events.jsonl")
    }
