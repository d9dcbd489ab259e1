"""What a node does with every input in every phase: what can happen, and what can only be a defect of the launcher."""

from __future__ import annotations

import pytest

from elastic_launch.core.agent.messages import AgentEvent, Finish, RendezvousAction, ReportRound
from elastic_launch.core.rendezvous.messages import HostFacts, Settings
from elastic_launch.core.rendezvous.state import Phase
from tests.simulation.test_rendezvous import form, running
from tests.support.simulation import Agent, World


def job(low: int, high: int, **settings: float) -> Settings:
    return Settings("job", low, high, last_call_timeout=10, **settings)  # type: ignore[arg-type]


def calm_world(settings: Settings) -> World:
    made = World(1, settings)
    made.trouble = False
    return made


def add(made: World, *, serves: bool = False) -> Agent:
    """Start a node, which may host the job's store."""
    agent = Agent(made, len(made.agents))
    agent.backend.serves = serves
    made.agents.append(agent)
    agent.begin()
    return agent


def members(made: World) -> list[Agent]:
    """Return the agents whose workers run, by group rank."""
    placed = [(agent.state.assignment.group_rank, agent) for agent in made.agents if agent.state.assignment]
    return [agent for _, agent in sorted(placed, key=lambda pair: pair[0])]


# --- inputs that meet in one turn


def test_a_node_that_slept_through_its_exit_barrier_and_its_lease_has_succeeded() -> None:
    made = calm_world(job(3, 3))
    made.exit_barrier_timeout = 20
    for _ in range(3):
        add(made)
    form(made, 3)
    agent = members(made)[2]
    agent.succeed()
    made.run(made.now + 5)
    agent.freeze(60)
    made.run(made.now + 100)
    assert agent.finish == Finish()


def test_the_store_is_given_up_in_the_turn_that_brings_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calm_world(job(1, 2))
    agent, other = add(made), add(made)
    form(made, 2)
    ask = agent.rendezvous.ask

    def lose_the_store(action: RendezvousAction) -> list[AgentEvent]:
        if isinstance(action, ReportRound):
            agent.backend.fail("the process that hosts the store has ended")
        return ask(action)

    monkeypatch.setattr(agent.rendezvous, "ask", lose_the_store)
    other.signal()
    made.run(made.now + 10)
    assert agent.finish == Finish(error="the process that hosts the store has ended", status=69)


def test_the_host_of_a_store_that_starts_too_slowly_gives_up_for_all() -> None:
    made = calm_world(job(2, 2, join_timeout=5))
    host = add(made, serves=True)
    host.stall(6)
    made.run(made.now + 20)
    assert host.finish is not None
    assert host.finish.status == 75
    assert "gave up (join_timeout=5 s)" in host.finish.error


def test_a_node_that_waits_for_nobody_still_tells_that_it_was_the_last_to_succeed() -> None:
    made = calm_world(job(2, 2))
    made.exit_barrier_timeout = 0
    agents = [add(made, serves=True), add(made)]
    form(made, 2)
    for agent in agents:
        agent.succeed()
        made.run(made.now + 5)
    assert [agent.finish for agent in agents] == [Finish(), Finish()]


def test_a_host_that_has_not_begun_to_join_ends_no_round() -> None:
    made = calm_world(job(2, 2))
    host = Agent(made, 0)
    host.rendezvous.deliver(HostFacts(serves=True))
    host.rendezvous.begin_close()
    made.run(made.now + 5)
    assert host.node.may_disconnect
    assert not host.asked


def test_the_record_of_another_node_in_a_restarted_store_is_not_taken_for_the_own_one() -> None:
    made = calm_world(job(2, 2))
    first = add(made)
    made.run(made.now + 3)
    made.stop_store(forget=True)
    first.stall(5)
    made.start_store()
    second = add(made)
    made.run(made.now + 20)
    assert first.running == second.running == 1


def test_a_spare_watches_over_the_members_if_no_other_can() -> None:
    made = calm_world(job(1, 2))
    for _ in range(3):
        add(made)
    form(made, 2)
    monitor, other = members(made)
    [spare] = [agent for agent in made.agents if agent.node.phase is Phase.BESIDE]
    monitor.succeed()
    made.run(made.now + 5)
    monitor.kill()
    other.kill()
    made.run(made.now + 60)
    assert spare.running == 1, running(made)
