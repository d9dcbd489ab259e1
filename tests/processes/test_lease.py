"""Workers live as long as their lease: the keeper kills them when an agent that is stopped does not renew it."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from elastic_launch.core.agent.lifecycle import AgentEvent, Exited, GroupReaped, LeaseExpired, Started
from elastic_launch.workers.group import Command, WorkerProcesses
from tests.support.waiting import DEADLINE

SLEEP = Command(0, ["sleep", "1000"], {})


@pytest.fixture
def workers() -> Iterator[WorkerProcesses]:
    processes = WorkerProcesses("test-lease", dict(os.environ))
    yield processes
    processes.close()


def events(workers: WorkerProcesses, enough: Callable[[list[AgentEvent]], bool]) -> list[AgentEvent]:
    """Take events until there are enough of them."""
    found: list[AgentEvent] = []
    poller = select.poll()
    poller.register(workers.fileno(), select.POLLIN)
    end = time.monotonic() + DEADLINE
    while not enough(found):
        assert poller.poll((end - time.monotonic()) * 1000), found
        found += workers.take()
    return found


def is_gone(found: list[AgentEvent]) -> bool:
    return any(isinstance(event, GroupReaped) for event in found)


@pytest.mark.quick
def test_workers_are_killed_when_the_lease_is_over(workers: WorkerProcesses) -> None:
    until = time.monotonic() + 0.3
    workers.lease(until)
    workers.start([SLEEP])
    started, lapsed, exited, gone = events(workers, is_gone)
    assert time.monotonic() >= until
    assert isinstance(started, Started)
    assert lapsed == LeaseExpired()
    assert isinstance(exited, Exited)
    assert (exited.exit.exitcode, exited.exit.stop_signals) == (-signal.SIGKILL, (signal.SIGKILL,)), "it is no failure"
    assert gone == GroupReaped({})


def test_a_lease_that_is_renewed_holds(workers: WorkerProcesses) -> None:
    workers.lease(time.monotonic() + 0.2)
    workers.start([SLEEP])
    [started] = events(workers, bool)
    assert isinstance(started, Started)
    until = time.monotonic() + 0.5
    workers.lease(until)
    events(workers, is_gone)
    assert time.monotonic() >= until


def test_without_a_lease_workers_live_on(workers: WorkerProcesses) -> None:
    workers.start([Command(0, ["true"], {})])
    [_, exited] = events(workers, lambda found: len(found) == 2)
    assert isinstance(exited, Exited)
    assert exited.exit.exitcode == 0


def test_workers_that_are_started_after_their_lease_die_at_once(workers: WorkerProcesses) -> None:
    workers.lease(time.monotonic() - 1)
    workers.start([SLEEP])
    assert LeaseExpired() in events(workers, is_gone)


def test_a_lease_that_is_over_when_all_have_gone_is_no_event(workers: WorkerProcesses) -> None:
    workers.start([Command(0, ["true"], {})])
    events(workers, lambda found: len(found) == 2)
    workers.sweep(kill=False)
    assert is_gone(events(workers, is_gone))
    workers.lease(time.monotonic() - 1)
    workers.start([Command(0, ["true"], {}), SLEEP._replace(local_rank=1)])
    found = events(workers, is_gone)
    assert [type(event) for event in found].count(LeaseExpired) == 1


def test_a_new_keeper_knows_the_lease(workers: WorkerProcesses) -> None:
    workers.lease(time.monotonic() + 0.5)
    os.kill(workers._keeper.pid, signal.SIGKILL)
    assert events(workers, lambda _: True) == []
    poller = select.poll()
    poller.register(workers.fileno(), select.POLLIN)
    assert poller.poll(DEADLINE * 1000), "the keeper's end shows"
    workers.take()
    workers.start([SLEEP])
    assert LeaseExpired() in events(workers, is_gone)
