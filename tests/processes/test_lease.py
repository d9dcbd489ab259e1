"""Leases: the keeper kills the workers if a stopped agent does not renew their lease."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from elastic_launch.core.agent.messages import AgentEvent, Exited, GroupReaped, LeaseExpired, Started
from elastic_launch.errors import UnavailableError
from elastic_launch.host.child import spawn
from elastic_launch.workers.keeper_client import Command, KeeperClient
from tests.support.waiting import DEADLINE

SLEEP = Command(0, ["sleep", "1000"], {})


@pytest.fixture
def workers() -> Iterator[KeeperClient]:
    processes = KeeperClient("test-lease", dict(os.environ))
    yield processes
    processes.close()


def events(workers: KeeperClient, enough: Callable[[list[AgentEvent]], bool]) -> list[AgentEvent]:
    """Collect events until there are enough of them."""
    found: list[AgentEvent] = []
    poller = select.poll()
    poller.register(workers.fileno(), select.POLLIN)
    end = time.monotonic() + DEADLINE
    while not enough(found):
        assert poller.poll((end - time.monotonic()) * 1000), found
        found += workers.take()
    return found


def is_reaped(found: list[AgentEvent]) -> bool:
    return any(isinstance(event, GroupReaped) for event in found)


@pytest.mark.quick
def test_workers_are_killed_when_the_lease_expires(workers: KeeperClient) -> None:
    until = time.monotonic() + 0.3
    workers.lease(until)
    workers.start([SLEEP])
    started, expired, exited, reaped = events(workers, is_reaped)
    assert time.monotonic() >= until
    assert isinstance(started, Started)
    assert expired == LeaseExpired()
    assert isinstance(exited, Exited)
    assert (exited.exit.exitcode, exited.exit.stop_signals) == (-signal.SIGKILL, (signal.SIGKILL,)), (
        "it is not a failure"
    )
    assert reaped == GroupReaped({})


def test_a_lease_that_is_renewed_holds(workers: KeeperClient) -> None:
    for seconds in (0.2, 1, 5, 25):  # on a busy machine the renewal itself may take longer
        workers.lease(time.monotonic() + seconds)
        workers.start([SLEEP])
        found = events(workers, bool)
        assert isinstance(found[0], Started)
        until = time.monotonic() + 2 * seconds
        workers.lease(until)
        if not is_reaped(found):
            events(workers, is_reaped)
        if time.monotonic() >= until:
            return
    raise AssertionError("the workers died at the end of the lease that had been renewed")


def test_workers_without_a_lease_keep_running(workers: KeeperClient) -> None:
    workers.start([Command(0, ["true"], {})])
    [_, exited] = events(workers, lambda found: len(found) == 2)
    assert isinstance(exited, Exited)
    assert exited.exit.exitcode == 0


def test_a_lease_may_last_for_years(workers: KeeperClient) -> None:
    """As it does if somebody turns the loss of nodes off by a long ``keep_alive_interval``."""
    workers.lease(time.monotonic() + 1e9)
    workers.start([SLEEP])
    events(workers, bool)
    workers.send_signal(signal.SIGTERM, frozenset({0}), stop=True)
    [exited] = events(workers, bool)
    assert isinstance(exited, Exited)
    assert exited.exit.exitcode == -signal.SIGTERM


def test_a_keeper_that_reads_nothing_does_not_hold_up_the_agent() -> None:
    """It imports modules, from a slow disk, while the agent renews the lease of its workers."""

    def start(environ: Mapping[str, str], inherited: tuple[int, ...]) -> int:
        return spawn(["/bin/sleep", "1000"], environ, {fd: fd for fd in inherited})

    workers = KeeperClient("test-lease", dict(os.environ), start)
    for _ in range(1000):
        workers.lease(time.monotonic() + 100)
    os.kill(workers._keeper.pid, signal.SIGKILL)
    workers.close()


def test_a_lease_may_be_renewed_when_the_last_keeper_is_lost(
    workers: KeeperClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent then tells the other nodes why it leaves, while the store may answer its last heartbeat."""

    def refuse(environ: Mapping[str, str]) -> None:
        raise UnavailableError("no more processes")

    monkeypatch.setattr("elastic_launch.workers.keeper_client.KeeperProcess", refuse)
    os.kill(workers._keeper.pid, signal.SIGKILL)
    with pytest.raises(UnavailableError, match="no more processes"):
        events(workers, bool)
    workers.lease(time.monotonic() + 100)


def test_workers_that_start_after_their_lease_has_expired_die_at_once(workers: KeeperClient) -> None:
    workers.lease(time.monotonic() - 1)
    workers.start([SLEEP])
    assert LeaseExpired() in events(workers, is_reaped)


def test_a_lease_that_expires_when_nothing_is_left_is_not_an_event(workers: KeeperClient) -> None:
    workers.start([Command(0, ["true"], {})])
    events(workers, lambda found: len(found) == 2)
    workers.reap_leftovers(kill=False)
    assert is_reaped(events(workers, is_reaped))
    workers.lease(time.monotonic() - 1)
    workers.start([Command(0, ["true"], {}), SLEEP._replace(local_rank=1)])
    found = events(workers, is_reaped)
    assert [type(event) for event in found].count(LeaseExpired) == 1


def test_a_new_keeper_gets_the_lease(workers: KeeperClient) -> None:
    workers.lease(time.monotonic() + 0.5)
    os.kill(workers._keeper.pid, signal.SIGKILL)
    assert events(workers, lambda _: True) == []
    poller = select.poll()
    poller.register(workers.fileno(), select.POLLIN)
    assert poller.poll(DEADLINE * 1000), "the loss of the keeper is noticed"
    workers.take()
    workers.start([SLEEP])
    assert LeaseExpired() in events(workers, is_reaped)


def test_a_keeper_that_is_lost_after_a_lease_has_expired_is_asked_what_is_left(workers: KeeperClient) -> None:
    """It had told that nothing was left before it was asked. ``make chaos`` found a second answer in the next round."""
    workers.lease(time.monotonic() - 1)
    workers.start([SLEEP])
    events(workers, is_reaped)
    workers.reap_leftovers(kill=False)  # as the agent does when it handles the workers' ends, in one turn with the rest
    workers.lease(float("inf"))
    workers.start([SLEEP])
    events(workers, bool)
    os.kill(workers._keeper.pid, signal.SIGKILL)
    assert [type(event) for event in events(workers, bool)] == [Exited]
    workers.reap_leftovers(kill=False)
    assert [type(event) for event in events(workers, bool)] == [GroupReaped]
