"""Workers that call ``should_stop()`` stop at the same step on all nodes: by hand, and in thousands of schedules."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from signal import SIGINT, SIGTERM

import pytest

from elastic_launch.core.agent.lifecycle import AGREEMENT_TIME, FINAL_GRACE, AgentPhase
from elastic_launch.core.agent.messages import Finish
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.job import Level, Policy
from tests.support.simulation import Agent, World
from tests.support.training import VISIBLE_AFTER, Training
from tests.support.worlds import form, running, seeds

TIMEOUT = 30.0
"""The shutdown timeout of simulated agents, in seconds."""
DEADLINE = 15.0


def job(low: int, high: int, **settings: float) -> Settings:
    return Settings("job", low, high, last_call_timeout=10, policy=Policy(3), **settings)  # type: ignore[arg-type]


def trained(
    count: int,
    settings: Settings,
    asks: Callable[[int], bool] = lambda rank: True,
    *,
    together: bool = True,
    breaks: bool = False,
) -> World:
    """Return a job of so many nodes that has done some steps."""
    made = World(1, settings)
    made.trouble = False
    made.training = Training(made, asks, together=together, breaks=breaks)
    for _ in range(count):
        made.add()
    form(made, count)
    until(made, 5)
    return made


def until(made: World, seconds: float) -> None:
    made.run(made.now + seconds)


def members(made: World) -> list[Agent]:
    """Return the agents by group rank: the monitor first, then its standby."""
    placed = [(agent.state.assignment.group_rank, agent) for agent in made.agents if agent.state.assignment]
    return [agent for _, agent in sorted(placed, key=lambda pair: pair[0])]


def stopped(made: World, number: int = 0) -> dict[int, int]:
    """Return at which call each rank of a round stopped."""
    assert made.training is not None
    return made.training.stopped.get(number, {})


def assert_stopped_together(made: World, ranks: int) -> None:
    assert len(stopped(made)) == ranks, stopped(made)
    assert len({*stopped(made).values()}) == 1


def all_shown(made: World, level: Level = Level.DEBUG) -> str:
    return "\n".join(line for agent in made.agents for line in agent.shown(level))


# --- what is promised


@pytest.mark.parametrize("group_rank", range(3), ids=["monitor", "standby", "another"])
@pytest.mark.parametrize("together", [True, False], ids=["in step", "apart"])
def test_all_stop_at_the_same_step_and_the_others_go_on(group_rank: int, together: bool) -> None:
    made = trained(3, job(2, 3), together=together)
    leaving, signalled_at = members(made)[group_rank], made.now
    others = [agent for agent in made.agents if agent is not leaving]
    leaving.signal()
    made.run(made.now + 60, stop=lambda: all(agent.running == 1 for agent in others))
    assert_stopped_together(made, 6)
    assert leaving.finish == Finish(signum=SIGTERM)
    assert [agent.running for agent in others] == [1, 1]
    assert made.now - signalled_at < 10, "no longer than the steps that the slowest rank is behind, and a checkpoint"
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {0}
    assert "stopping 2 workers;" not in all_shown(made), "no worker is signalled"


def test_the_nodes_agree_in_an_instant() -> None:
    made = trained(3, job(2, 3))
    signalled_at = made.now
    made.agents[0].signal()
    made.run(made.now + 60, stop=lambda: all(agent.state.phase is AgentPhase.DRAINING for agent in made.agents))
    assert made.now - signalled_at < 0.5


def test_each_line_is_logged_once() -> None:
    made = trained(3, job(2, 3))
    leaving = members(made)[2]
    leaving.signal()
    until(made, 30)
    [stop_at] = {*stopped(made).values()}
    lines = all_shown(made, Level.INFO).splitlines()
    received = "SIGTERM received: stopping all workers at the same step (they use should_stop()); SIGTERM to workers in"
    assert lines.count(f"{received} {TIMEOUT - FINAL_GRACE:g} s") == 1
    assert lines.count(f"{leaving.name} is leaving (SIGTERM): stopping 2 workers at the same step") == 1
    assert lines.count(f"all ranks stop at their call {stop_at} of should_stop()") == 1


def test_too_few_nodes_for_another_round_end_the_job_by_the_signal() -> None:
    made = trained(2, job(2, 2))
    made.agents[1].signal()
    until(made, 60)
    assert_stopped_together(made, 4)
    assert [agent.finish for agent in made.agents] == [Finish(signum=SIGTERM)] * 2
    assert "and the job cannot go on without it" in all_shown(made, Level.INFO)


def test_nodes_that_get_the_signal_at_once_stop_at_one_step() -> None:
    made = trained(3, job(1, 3))
    first, second, other = made.agents
    first.signal()
    second.signal()
    until(made, 60)
    assert_stopped_together(made, 6)
    assert first.finish == second.finish == Finish(signum=SIGTERM)
    assert other.running == 1


def test_a_node_that_gets_the_signal_while_the_others_stop_leaves_too() -> None:
    made = trained(3, job(1, 3))
    first, second, other = made.agents
    first.signal()
    made.run(made.now + 9, stop=lambda: second.state.phase is AgentPhase.DRAINING)
    second.signal()
    until(made, 60)
    assert_stopped_together(made, 6)
    assert second.finish == Finish(signum=SIGTERM)
    assert other.running == 1


def test_ranks_that_never_ask_end_with_those_that_do() -> None:
    made = trained(3, job(2, 3), asks=lambda rank: rank == 0)
    asking = members(made)[0]
    asking.signal()
    until(made, 30)
    assert_stopped_together(made, 1)
    assert sorted(map(str, running(made))) == ["1", "1", "None"]
    assert "SIGKILL in" not in all_shown(made)


@pytest.mark.parametrize("asks", [lambda rank: False, lambda rank: rank == 0], ids=["no rank", "rank 0"])
def test_a_node_whose_ranks_never_ask_stops_all_as_ever(asks: Callable[[int], bool]) -> None:
    made = trained(3, job(2, 3), asks=asks)
    leaving = members(made)[2]
    leaving.signal()
    until(made, 30)
    assert stopped(made) == {}
    assert "SIGTERM received: stopping 2 workers; SIGKILL in 30 s" in all_shown(made)
    assert sorted(map(str, running(made))) == ["1", "1", "None"]


def test_other_signals_stop_all_as_ever() -> None:
    made = trained(3, job(2, 3))
    made.agents[0].interrupt()
    until(made, 30)
    assert stopped(made) == {}
    assert made.agents[0].finish == Finish(signum=SIGINT)


def test_a_second_signal_kills_at_once() -> None:
    made = trained(3, job(2, 3))
    leaving, other, _ = made.agents
    leaving.signal()
    until(made, 0.3)
    assert leaving.state.phase is AgentPhase.DRAINING
    leaving.signal()
    assert not leaving.alive
    until(made, 1)
    assert leaving.finish == Finish(signum=SIGTERM)
    until(made, 60)
    assert other.running == 1


def test_a_second_signal_while_the_nodes_agree_frees_the_others() -> None:
    made = trained(3, job(2, 3))
    leaving, other, another = made.agents
    another.stall(5)
    leaving.signal()
    until(made, 0.3)
    assert leaving.state.phase is AgentPhase.HOLDING
    leaving.signal()
    made.run(made.now + 3, stop=lambda: other.state.phase is AgentPhase.STOPPING)
    assert other.state.phase is AgentPhase.STOPPING
    until(made, 2 * VISIBLE_AFTER)
    assert not other.hold


def test_workers_that_do_not_come_to_the_step_get_the_signal_before_the_timeout() -> None:
    made = trained(2, job(1, 2))
    leaving, other = made.agents
    made.training.pace = lambda: 1e9  # type: ignore[union-attr]
    leaving.interrupt()  # the next round is one of endless steps
    made.run(made.now + 30, stop=lambda: other.running == 1)
    until(made, 5)
    signalled_at = made.now
    other.signal()
    made.run(made.now + 60, stop=lambda: other.state.phase is AgentPhase.STOPPING)
    assert made.now - signalled_at == pytest.approx(TIMEOUT - FINAL_GRACE)
    assert other.state.deadline == pytest.approx(signalled_at + TIMEOUT - 0.5), "then they write their stacks"
    assert "(pid 100), 1 (pid 101) did not stop at the agreed step: stopping 2 workers" in all_shown(made)


# --- what can go wrong meanwhile


@pytest.mark.parametrize("group_rank", range(3), ids=["monitor", "standby", "another"])
def test_a_node_that_dies_before_it_reports_costs_the_agreement(group_rank: int) -> None:
    made = trained(3, job(1, 3))
    dies = members(made)[group_rank]
    leaving, other = [agent for agent in made.agents if agent is not dies]
    signalled_at = made.now
    dies.kill()
    leaving.signal()
    made.run(made.now + 60, stop=lambda: other.state.phase is AgentPhase.STOPPING)
    assert made.now - signalled_at == pytest.approx(AGREEMENT_TIME, abs=1)
    until(made, 2 * VISIBLE_AFTER)
    assert not other.hold
    assert "the nodes could not agree on a step: stopping 2 workers" in all_shown(made)
    until(made, 60)
    assert stopped(made) == {}
    assert leaving.finish == Finish(signum=SIGTERM)
    assert other.running == 1


def test_the_others_are_free_again_when_the_node_that_leaves_dies() -> None:
    made = trained(3, job(1, 3))
    leaving, *others = made.agents
    leaving.signal()
    made.run(made.now + 9, stop=lambda: all(agent.state.phase is AgentPhase.HOLDING for agent in made.agents))
    leaving.kill()
    until(made, 60)
    assert [agent.running for agent in others] == [1, 1]


def test_a_worker_that_fails_before_the_nodes_agree_stops_all_at_once() -> None:
    made = trained(3, job(2, 3))
    leaving, failing, other = made.agents
    leaving.signal()
    made.run(made.now + 9, stop=lambda: failing.state.phase is AgentPhase.HOLDING)
    failed_at = made.now
    failing.fail_worker(3)
    assert failing.state.phase is AgentPhase.STOPPING
    made.run(made.now + 9, stop=lambda: other.state.phase is AgentPhase.STOPPING)
    assert made.now - failed_at < 0.5
    until(made, 60)
    assert stopped(made) == {}
    assert sorted(map(str, running(made))) == ["1", "1", "None"]
    assert "failed (exit code 3): stopping 1 worker" in all_shown(made)


def test_a_worker_that_fails_on_its_way_to_the_step_stops_those_beside_it() -> None:
    made = trained(3, job(2, 3), breaks=True)
    leaving, failing, other = made.agents
    leaving.signal()
    made.run(made.now + 9, stop=lambda: all(agent.state.phase is AgentPhase.DRAINING for agent in made.agents))
    failing.fail_worker(3)
    assert failing.state.phase is AgentPhase.STOPPING
    until(made, 60)
    assert leaving.finish == Finish(signum=SIGTERM)
    assert [failing.running, other.running] == [1, 1]
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {0}


def test_a_failure_that_comes_first_ends_the_round() -> None:
    made = trained(3, job(2, 3))
    leaving, failing, _ = made.agents
    leaving.stall(1)
    leaving.signal()
    failing.fail_worker(3)
    until(made, 60)
    assert stopped(made) == {}
    assert leaving.finish == Finish(signum=SIGTERM)
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {1}


def test_a_newcomer_waits_until_all_have_stopped() -> None:
    made = trained(2, job(1, 4))
    leaving, other = made.agents
    leaving.signal()
    newcomer = made.add()
    until(made, 60)
    assert_stopped_together(made, 4)
    assert other.running == newcomer.running == 1


def test_a_newcomer_that_comes_first_ends_the_round() -> None:
    made = trained(2, job(1, 3))
    leaving, other = made.agents
    leaving.stall(1)
    leaving.signal()
    newcomer = made.add()
    until(made, 60)
    assert stopped(made) == {}
    assert leaving.finish == Finish(signum=SIGTERM)
    assert other.running == newcomer.running == 1


def test_a_node_that_is_cut_off_stops_its_workers_in_time() -> None:
    made = trained(3, job(1, 3))
    leaving = members(made)[1]
    leaving.stall(100)
    signalled_at = made.now
    leaving.signal()
    made.run(made.now + 60, stop=lambda: not leaving.alive)
    assert made.now - signalled_at < DEADLINE
    assert stopped(made) == {}


def test_a_node_that_is_cut_off_after_its_report_does_not_hold_up_the_others() -> None:
    made = trained(3, job(1, 3))
    leaving, slow, other = made.agents
    leaving.signal()
    made.run(made.now + 9, stop=lambda: slow.state.has_reported_calls)
    until(made, 0.03)
    slow.stall(6)
    made.run(made.now + 5, stop=lambda: other.state.phase is AgentPhase.DRAINING)
    assert (slow.state.phase, other.state.phase) == (AgentPhase.HOLDING, AgentPhase.DRAINING)
    until(made, 60)
    assert_stopped_together(made, 6)
    assert slow.running == other.running == 1


def test_a_node_whose_workers_have_succeeded_counts_with_its_calls() -> None:
    made = trained(3, job(2, 3), together=False)
    leaving, done, other = made.agents
    done.succeed()
    until(made, 3)
    assert done.state.phase is AgentPhase.AGREEING
    leaving.signal()
    until(made, 30)
    assert_stopped_together(made, 4)
    assert done.running == other.running == 1


def test_workers_that_end_by_themselves_meanwhile_are_waited_for_by_none() -> None:
    made = trained(3, job(2, 3), together=False)
    leaving, done, other = made.agents
    signalled_at = made.now
    leaving.signal()
    made.run(made.now + 9, stop=lambda: leaving.state.phase is done.state.phase is AgentPhase.HOLDING)
    for agent in (leaving, done):
        for rank in range(2):
            agent.end_worker(rank)
    made.run(made.now + 9, stop=lambda: other.state.phase is AgentPhase.DRAINING)
    assert made.now - signalled_at < 0.5
    until(made, 30)
    assert_stopped_together(made, 2)
    assert leaving.finish == Finish(signum=SIGTERM)
    assert done.running == other.running == 1


def test_the_others_have_time_for_their_checkpoints_when_the_host_of_the_store_has_left() -> None:
    made = World(1, job(2, 2))
    made.trouble = False
    made.training = Training(made, checkpoint=lambda rank: 20.0 if rank.agent is other else 0.1)
    host, other = Agent(made, 0), Agent(made, 1)
    host.backend.serves = True
    made.agents += [host, other]
    for agent in made.agents:
        agent.begin()
    form(made, 2)
    until(made, 5)
    host.signal()
    made.run(made.now + 60, stop=lambda: host.gone)
    made.stop_store()
    assert other.state.phase is AgentPhase.DRAINING
    until(made, 60)
    assert_stopped_together(made, 4)
    assert [exit_.exitcode for exit_ in other.state.exits] == [0, 0]
    assert host.finish == other.finish == Finish(signum=SIGTERM)


def test_a_store_that_is_lost_meanwhile_holds_nobody() -> None:
    made = trained(3, job(1, 3))
    made.agents[0].signal()
    made.run(made.now + 9, stop=lambda: all(agent.state.phase is AgentPhase.HOLDING for agent in made.agents))
    made.stop_store()
    made.run(made.now + DEADLINE, stop=lambda: not any(agent.alive for agent in made.agents))
    assert not any(agent.alive for agent in made.agents)


def test_the_whole_job_stops_at_the_same_step_when_the_user_asks_for_it() -> None:
    """Although two nodes would be enough to go on."""
    made = trained(3, job(1, 3))
    made.agents[1].signal("stop requested on host-1")
    until(made, 60)
    assert_stopped_together(made, 6)
    assert [agent.finish for agent in made.agents] == [Finish(signum=SIGTERM)] * 3
    assert list(made.assignments) == [0]
    assert any("stop requested on host-1" in line for line in made.agents[0].shown())


# --- thousands of schedules


def are_settled(live: list[Agent]) -> bool:
    """Whether all run in one round, or none is left."""
    rounds = {agent.running for agent in live}
    return not rounds or (len(rounds) == 1 and None not in rounds)


def play(seed: int) -> str:
    """One random schedule: a training job, signals, and bad luck. ``Training`` checks that all stop at the same step.

    In the end, in calm, the job must have ended, or go on in one round.
    """
    chance = random.Random(seed)
    low = chance.randint(1, 3)
    high = chance.randint(max(low, 2), 4)
    settings = job(low, high, join_timeout=10_000, keep_alive_interval=chance.choice([1, 5]))
    made = World(seed, settings)
    made.trouble = chance.random() < 0.5
    some = chance.getrandbits(16) | 1
    asks: list[Callable[[int], bool]] = [lambda rank: True, lambda rank: rank == 0, lambda rank: bool(some >> rank & 1)]
    slowest = chance.choice([0.1, 0.5, 3])
    made.training = Training(
        made,
        chance.choice([asks[0], *asks]),
        together=chance.random() < 0.6,
        steps=chance.choice([1_000_000, 1_000_000, 100]),
        pace=lambda: chance.uniform(0.05, slowest),
        breaks=chance.random() < 0.5,
    )
    for _ in range(chance.randint(low, high)):
        made.add()
    made.run(1040, stop=lambda: sum(agent.running is not None for agent in made.agents) >= low)
    until(made, chance.uniform(0.5, 8))

    def strike(what: Callable[[Agent], object]) -> None:
        if live := made.live():
            what(chance.choice(live))

    strikes: list[Callable[[Agent], object]] = [
        Agent.kill,
        lambda agent: agent.freeze(chance.uniform(0.1, 20)),
        lambda agent: agent.disconnect(chance.choice([0, chance.uniform(0.1, 20)])),
        lambda agent: agent.stall(chance.uniform(0.1, 20)),
        Agent.fail_worker,
        Agent.signal,
        Agent.interrupt,
        Agent.request_restart,
        lambda agent: agent.signal("the user stops the job"),
        lambda agent: made.add(),
        lambda agent: agent.end_worker(0),
    ]
    for _ in range(chance.choice([1, 1, 2, high])):
        stop = chance.choice([Agent.signal, Agent.signal, lambda agent: agent.signal("the user stops the job")])
        made.fault(chance.choice([0, chance.uniform(0, 0.5)]), partial(strike, stop))
    last = 0.0
    for _ in range(chance.choice([0, 0, 1, 2, 4])):
        seconds = chance.choice([chance.uniform(0, 0.3), chance.uniform(0, 3), chance.uniform(0, 30)])
        last = max(last, seconds)
        made.fault(seconds, partial(strike, chance.choice(strikes)))
    until(made, last + 12)
    made.trouble = False
    made.run(made.now + 100, stop=lambda: are_settled(made.live()))
    live = made.live()
    stuck = [agent.name for agent in live if agent.state.phase in (AgentPhase.HOLDING, AgentPhase.DRAINING)]
    assert not stuck, f"{made}: {stuck} still wait"
    if len(live) >= low and not any(
        agent.finish and not agent.finish.signum for agent in made.agents if not agent.dead
    ):
        rounds = {agent.part for agent in live if agent.part is not None}
        assert len(rounds) == 1, f"{made}: in different rounds, or in none: {running(made)}"
    agreed = [calls for calls in made.training.stopped.values() if calls]
    return "agreed" if agreed else "given up" if made.training.held else "stopped as ever"


@pytest.mark.parametrize("block", range(4))
def test_in_any_schedule_all_ranks_stop_at_the_same_step_or_none_does(block: int) -> None:
    outcomes: Counter[str] = Counter()
    for seed in seeds(block, 150):
        try:
            outcomes[play(seed)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: play({seed}) shows it again") from error
    assert outcomes["agreed"] > 60
    assert min(outcomes["given up"], outcomes["stopped as ever"]) > 6
