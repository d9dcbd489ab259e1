"""Nodes that wait for each other at a terminal: one live line instead of many, and colours for trouble."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.support.consoles import Terminal, screen
from tests.support.jobs import Job
from tests.support.nodes import Nodes, c10d

SCRIPT = "wait_for('go')\nos.write(1, b'out\\n')"


class Node(Terminal):
    """A terminal with a node's launcher in it."""

    def __init__(self, job: Job, *args: str, **env: str) -> None:
        def start(theirs: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-m", "elastic_launch", *args],
                cwd=job.path,
                env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
            )

        super().__init__(start)


def words(nodes: Nodes) -> list[str]:
    """The options of a job over the store that tests share, and its script, which waits for the mark ``go``."""
    options = ["--nnodes", nodes.nnodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", nodes.endpoint]
    return [*options, "--rdzv-id", nodes.run_id, "--rdzv-conf", nodes.conf, nodes.job.script(SCRIPT)]


def test_waiting_is_one_live_line_that_the_final_line_replaces(job: Job) -> None:
    args = words(c10d(job, "3"))
    first = Node(job, *args)
    one = re.compile(f"elastic-run: 1 of 3 nodes has joined … (\\d+) s: {os.uname().nodename}; ".encode())
    while len(set(one.findall(first.seen))) < 2:  # it counts the seconds
        assert first.read()
    [row] = screen(first.seen)
    assert one.match(row), row
    second = Node(job, *args)
    first.wait_for(b"2 of 3 nodes have joined")
    assert len(screen(first.seen)) == 1
    second.wait_for("waiting for 3 nodes … ".encode())
    third = job.start(*args)
    formed = b"elastic-run: formed: 3 nodes, 3 workers"
    for node in (first, second):
        node.wait_for(formed)  # which is printed once the workers have been started
    job.mark("go")
    ends = [formed, b"out"]
    assert first.finish() == [*ends, b"elastic-run: done: 3 workers succeeded", b""]
    assert second.finish() == [*ends, b""], "the user who watched its line learns what came of it"
    result = job.finish(third)
    assert result.stdout + result.stderr == "out\n", "in a pipe there are plain lines, each of one node"


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {}], ids=["dumb", "quiet"])
def test_no_live_line_where_it_is_not_wanted(env: dict[str, str], job: Job) -> None:
    nodes = c10d(job, "2")
    args = words(nodes)
    first = Node(job, *([] if env else ["-q"]), *args, **env)
    nodes.wait_for_first()
    second = job.start(*args)
    if env:
        first.wait_for(b"formed: 2 nodes")
    job.mark("go")
    rows = [row for row in first.finish() if b" has joined after " not in row]  # the second may take some seconds
    host = os.uname().nodename.encode()
    joined = [b"elastic-run: " + host + b" has joined: 2 of 2 nodes", b"elastic-run: formed: 2 nodes, 2 workers"]
    assert rows == ([*joined, b"out", b"elastic-run: done: 2 workers succeeded", b""] if env else [b"out", b""])
    assert b"\x1b" not in first.seen
    assert job.finish(second).returncode == 0


def test_live_line_is_gone_when_a_signal_ends_the_wait(job: Job) -> None:
    node = Node(job, *words(c10d(job, "2")))
    node.wait_for("1 of 2 nodes has joined … ".encode())
    node.process.send_signal(signal.SIGINT)
    assert node.finish(130) == [b"elastic-run: stopped by SIGINT", b""]
    assert b"\x1b[33mstopped by SIGINT\x1b[0m" in node.seen


def test_error_that_ends_the_wait_is_red_and_below_nothing(job: Job) -> None:
    node = Node(job, *words(c10d(job, "2", "join_timeout=6")))
    [row, _] = node.finish(75)
    assert row.startswith(b"elastic-run: 1 of 2 nodes has joined after ")
    assert b"elastic-run: \x1b[31m1 of 2 nodes has joined after " in node.seen


def test_failures_and_the_headline_of_the_report_are_red(job: Job) -> None:
    script = job.script("os._exit(3)")
    args = ["--nproc-per-node", "2", "--max-restarts", "1", script]
    shown = Node(job, *args)
    shown.finish(3)
    assert b"elastic-run: \x1b[31mrank " in shown.seen
    assert b"(exit code 3): restart 1 of 1\x1b[0m\n" in shown.seen
    assert f"\n\x1b[31m{script} FAILED\x1b[0m\n".encode() in shown.seen
    assert b"elastic-run: formed: 1 node, 2 workers\n" in shown.seen
    plain = Node(job, *args, NO_COLOR="1")
    plain.finish(3)
    assert b"\x1b" not in plain.seen
    forced = job.run(*args, FORCE_COLOR="1")
    assert f"\x1b[31m{script} FAILED\x1b[0m" in forced.stderr
    assert "\x1b" not in job.run(*args).stderr


def test_usage_error_is_red(job: Job) -> None:
    node = Node(job, "--nnodes", "many", "train.py")
    node.finish(2)
    assert b"elastic-run: \x1b[31m--nnodes='many': must be" in node.seen
