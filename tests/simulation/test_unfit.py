"""Nodes whose health check fails: the others do not wait, a spare takes over, and the node comes back when it can."""

from __future__ import annotations

from signal import SIGTERM

import pytest

from elastic_launch.core.agent.lifecycle import AgentPhase
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.core.rendezvous.state import Phase
from elastic_launch.job import Policy
from tests.support.simulation import Agent, World
from tests.support.worlds import all_end, form, running

REASON = "GPU 3: fell off the bus (exit code 1)"
SETTINGS = Settings("job", 2, 3, join_timeout=600, last_call_timeout=10, policy=Policy(3))


class Checked(World):
    """A job whose nodes are checked before each round; ``broken`` has the numbers of those that fail."""

    def __init__(self, count: int, settings: Settings = SETTINGS, broken: tuple[int, ...] = ()) -> None:
        super().__init__(1, settings)
        self.trouble = False
        self.broken = set(broken)
        self.tries: list[int] = []
        """The nodes, in the order in which their checks ended."""
        self.check = self._check
        for _ in range(count):
            self.add()

    def _check(self, agent: Agent) -> tuple[float, bool]:
        self.tries.append(agent.number)
        return 0.5, agent.number not in self.broken

    def add_host(self) -> Agent:
        """Add a node that hosts the job's store."""
        agent = Agent(self, len(self.agents))
        agent.backend.serves = True
        self.agents.append(agent)
        agent.begin()
        return agent

    def lines(self) -> list[str]:
        return [text for agent in self.agents for text in agent.shown()]


def fail_a_round(made: World, count: int) -> None:
    """A worker fails, and so many nodes form the next round."""
    next(agent for agent in made.agents if agent.running is not None).fail_worker()
    made.run(made.now + 5, stop=lambda: not any(agent.running is not None for agent in made.agents))
    form(made, count)


def test_a_member_whose_check_fails_does_not_hold_up_the_others() -> None:
    made = Checked(3)
    form(made, 3)
    began = made.now
    made.broken = {2}
    fail_a_round(made, 2)
    assert made.now - began < 10, "neither the last call nor the keep-alive deadline"
    assert running(made) == [1, 1, None]
    assert made.lines().count(f"host-2: health check failed: {REASON}; going on without it") == 1
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {1}


def test_a_spare_takes_its_place() -> None:
    made = Checked(4, SETTINGS._replace(min_nodes=3))
    form(made, 3)
    [spare] = [agent for agent in made.agents if agent.running is None]
    victim = next(agent for agent in made.agents if agent.running is not None)
    made.broken = {victim.number}
    fail_a_round(made, 3)
    assert spare.running == 1
    assert victim.node.phase is Phase.UNFIT
    assert victim.state.phase is AgentPhase.UNFIT


def test_a_spare_is_checked_before_it_takes_a_place() -> None:
    made = Checked(4)
    form(made, 3)
    [spare] = [agent for agent in made.agents if agent.running is None]
    victim = next(agent for agent in made.agents if agent.running is not None)
    made.broken = {spare.number}
    victim.kill()
    made.run(made.now + 60, stop=lambda: sum(r == 1 for r in running(made)) == 2)
    assert spare.running is None
    assert spare.state.phase is AgentPhase.UNFIT
    assert made.tries.count(spare.number) >= 2


def test_a_node_that_passes_later_joins_as_a_newcomer() -> None:
    made = Checked(3)
    form(made, 3)
    made.broken = {1}
    fail_a_round(made, 2)
    made.broken = set()
    passed_at = made.now
    form(made, 3)
    assert running(made) == [2, 2, 2]
    assert made.now - passed_at < 60 + SETTINGS.last_call_timeout + 5
    assert {assignment.restart_history.used for assignment in made.assignments[2].values()} == {1}
    all_end(made)


def test_a_node_that_is_unfit_from_the_beginning_is_named_and_comes_when_it_passes() -> None:
    made = Checked(3, broken=(0,))
    form(made, 2)
    assert f"host-0: health check failed: {REASON}" in "\n".join(made.agents[1].shown() + made.agents[2].shown())
    made.broken = set()
    form(made, 3)
    assert running(made) == [1, 1, 1]


def test_too_few_fit_nodes_wait_for_an_unfit_one() -> None:
    made = Checked(2, SETTINGS._replace(max_nodes=2))
    form(made, 2)
    made.broken = {1}
    made.agents[0].fail_worker()
    made.run(made.now + 100)
    assert running(made) == [None, None]
    assert f"host-1: health check failed: {REASON}; waiting for it, or for another node" in made.agents[0].shown()
    assert "missing: host-1 (health check failed)" in made.agents[0].shown()[-1]
    made.broken = set()
    form(made, 2)
    assert running(made) == [1, 1]
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {1}


def test_an_unfit_node_that_the_others_wait_for_leaves_and_they_end() -> None:
    made = Checked(2, SETTINGS._replace(max_nodes=2))
    form(made, 2)
    made.broken = {1}
    made.agents[0].fail_worker()
    made.run(made.now + 100)
    made.agents[1].signal()
    left_at = made.now
    made.run(made.now + 100, stop=lambda: not made.live())
    assert made.now - left_at < 5, "they need not wait until join_timeout"
    first, second = (agent.finish for agent in made.agents)
    assert first is not None
    assert second is not None
    assert first.status == 69
    assert "lost host-1" in first.error
    assert second.signum == SIGTERM


def test_unfit_nodes_give_up_when_no_round_forms() -> None:
    made = Checked(2, broken=(0, 1))
    made.run(made.now + 700)
    for agent in made.agents:
        assert agent.finish is not None
        assert agent.finish.status == 69
        assert agent.finish.error == (
            f"health check failed: {REASON}; gave up, because no round has formed within 600 s (join_timeout)"
        )
    pauses = made.tries.count(0)
    assert 600 / 61 < pauses < 20


def test_an_unfit_node_waits_as_long_as_the_job_runs_and_ends_with_it() -> None:
    made = Checked(3, broken=(2,))
    form(made, 2)
    made.run(made.now + 5000)
    fail_a_round(made, 2)
    made.run(made.now + 5000)
    assert len(made.live()) == 3
    all_end(made)
    end = made.agents[2].finish
    assert end is not None
    assert (end.failures, end.error, end.signum) == ((), "", None)
    assert "the job has succeeded without this node, whose health check fails" in made.agents[2].shown()


def test_an_unfit_node_ends_with_a_job_that_fails() -> None:
    made = Checked(3, SETTINGS._replace(policy=Policy(0)), broken=(2,))
    form(made, 2)
    made.agents[0].fail_worker(7)
    made.run(made.now + 30, stop=lambda: not made.live())
    assert {agent.finish.failures[0].exitcode for agent in made.agents if agent.finish} == {7}
    assert not made.live()


@pytest.mark.parametrize("reason", ["", "the user stops the job"])
def test_the_user_can_stop_the_whole_job_at_an_unfit_node(reason: str) -> None:
    made = Checked(3, broken=(2,))
    form(made, 2)
    made.agents[2].signal(reason)
    made.run(made.now + 30)
    assert len(made.live()) == (0 if reason else 2)


def test_the_host_of_the_store_serves_it_while_it_is_unfit() -> None:
    made = Checked(0, SETTINGS._replace(store_port=29400))
    host = made.add_host()
    made.add()
    made.add()
    form(made, 3)
    made.broken = {0}
    for _ in range(3):
        fail_a_round(made, 2)
    ports = [made.assignments[number][0].master_port for number in range(4)]
    assert ports == [29400, 29999, 29999, 29999], "workers of different rounds must not share a store"
    made.broken = set()
    form(made, 3)
    assert host.running == 4
    all_end(made)


def test_an_unfit_host_that_leaves_ends_the_job_for_all() -> None:
    made = Checked(0)
    host = made.add_host()
    made.add()
    made.add()
    form(made, 3)
    made.broken = {0}
    fail_a_round(made, 2)
    fail_a_round(made, 2)
    host.signal()
    made.run(made.now + 60, stop=lambda: not made.live())
    ends = [agent.finish for agent in made.agents]
    assert [end.signum for end in ends if end] == [SIGTERM] * 3


def test_an_unfit_node_finds_the_others_in_a_store_that_was_restarted_empty() -> None:
    made = Checked(3, broken=(2,))
    form(made, 2)
    made.stop_store(forget=True)
    made.after(5, made.start_store)
    made.run(made.now + 60, stop=lambda: running(made)[:2] == [1, 1])
    made.run(made.now + 90)
    assert made.agents[2].node.round.number == 1
    made.broken = set()
    form(made, 3)
    all_end(made)


def test_a_check_that_hangs_holds_up_the_others_no_longer_than_its_timeout() -> None:
    made = Checked(3)
    form(made, 3)
    made.check = lambda agent: (1000 if agent.number == 1 else 0.5, True)
    began = made.now
    fail_a_round(made, 2)
    assert 60 < made.now - began < 70
    assert "host-1: health check failed: GPU 3: fell off the bus (no result within 60 s)" in "\n".join(made.lines())
