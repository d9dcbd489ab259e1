"""The job fails, recovers and ends as one: several nodes on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from signal import SIGINT, SIGTERM

import pytest

from elastic_launch.core.agent.messages import Action, Finish, Leave, SendSignal
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.core.rendezvous.state import Phase
from elastic_launch.job import Level, Policy
from elastic_launch.rendezvous.store_link import CONNECT_TIMEOUT, LAST_RETRY
from tests.support.simulation import Agent, World
from tests.support.worlds import RESET, all_end, form, running, world

DEADLINE = 15.0


def job(low: int, high: int, policy: Policy = Policy(3), **settings: float) -> Settings:  # noqa: B008 - a value
    return Settings("job", low, high, last_call_timeout=10, policy=policy, **settings)  # type: ignore[arg-type]


def finishes(made: World, *agents: Agent) -> list[Finish]:
    """How agents ended; all of them, if none is named."""
    ends = [agent.finish for agent in agents or made.agents]
    assert None not in ends, f"{made}: {ends}"
    return [end for end in ends if end is not None]


def one(made: World, *agents: Agent) -> Finish:
    """How all of them ended: in the same way."""
    [end] = set(finishes(made, *agents))
    return end


def until(made: World, seconds: float) -> None:
    made.run(made.now + seconds)


# --- one cause


@pytest.mark.parametrize("delay", [-0.02, 0.05, 0.5])
def test_the_original_cause_wins_also_when_it_is_known_later(delay: float) -> None:
    made = world(3, job(3, 3, Policy(0)))
    for agent in made.agents:
        agent.stop_time = 10
    form(made, 3)
    made.after(0.2, lambda: made.agents[0].fail_worker(1, RESET))
    made.after(0.2 + delay, lambda: made.agents[1].fail_worker(-9))
    until(made, 30)
    end = one(made)
    assert [(failure.host, failure.exitcode) for failure in end.failures] == [("host-1", -9), ("host-0", 1)]


def test_of_two_original_causes_the_one_that_ended_the_round_wins() -> None:
    made = world(3, job(3, 3, Policy(0)))
    form(made, 3)
    made.agents[2].fail_worker(7)
    made.agents[0].fail_worker(8)
    until(made, 30)
    end = one(made)
    assert sorted(failure.exitcode for failure in end.failures) == [7, 8]
    assert all(
        agent.node.round.end and agent.node.round.end.failures[0].rank == end.failures[0].rank for agent in made.agents
    )


def test_without_another_cause_a_consequence_is_the_cause_soon() -> None:
    made = world(3, job(3, 3, Policy(0)))
    form(made, 3)
    failed_at = made.now
    made.agents[1].fail_worker(1, RESET)
    made.run(made.now + 100, stop=lambda: all(agent.finish for agent in made.agents))
    assert one(made).failures[0].host == "host-1"
    assert made.now - failed_at < 3 + 1, "2 s for the workers to stop; nothing is waited for when all have"


@pytest.mark.parametrize("victim", range(3))
def test_the_death_of_a_node_is_a_cause_that_costs_no_restart(victim: int) -> None:
    made = world(3, job(2, 3, Policy(0)))
    form(made, 3)
    died_at = made.now
    made.agents[victim].kill()
    others = [agent for agent in made.agents if not agent.dead]
    for agent in others:
        agent.fail_worker(1, RESET)
    made.run(made.now + 100, stop=lambda: all(agent.running == 1 for agent in others))
    assert [agent.running for agent in others] == [1, 1]
    assert made.now - died_at < DEADLINE + 2 + 2
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {0}
    all_end(made)


def test_a_failure_is_known_when_its_node_dies_before_it_can_tell_more() -> None:
    made = world(3, job(3, 3, Policy(0)))
    form(made, 3)
    made.agents[1].fail_worker(1, "ValueError: boom")
    until(made, 0.2)
    made.agents[1].kill()
    until(made, 40)
    end = one(made, made.agents[0], made.agents[2])
    assert (end.failures[0].host, end.failures[0].error) == ("host-1", "ValueError: boom")


def test_what_the_launcher_fails_at_on_one_node_is_told_on_all() -> None:
    made = world(2, job(2, 2))
    form(made, 2)
    made.agents[1].ask(Leave(error="cannot start the workers", status=69))
    until(made, 30)
    end = one(made, made.agents[0])
    assert (end.error, end.status) == ("host-1: cannot start the workers", 69)


def test_an_error_on_the_node_that_logs_for_all_is_logged_by_another() -> None:
    made = world(2, job(2, 2))
    form(made, 2)
    first, other = sorted(
        made.agents, key=lambda agent: agent.state.assignment.group_rank if agent.state.assignment else 9
    )
    first.ask(Leave(error="cannot start the workers", status=69))
    until(made, 30)
    assert any("cannot start the workers: stopping" in line for line in other.shown(Level.INFO))


# --- the user asks


@pytest.mark.parametrize("number", range(4))
def test_a_restart_that_is_asked_for_anywhere_is_one_of_all_that_costs_nothing(number: int) -> None:
    """Also on a spare: the fourth node of a job of three."""
    made = world(4, job(3, 3, Policy(0)))
    form(made, 3)
    until(made, 5)
    made.agents[number].request_restart()
    made.run(made.now + 100, stop=lambda: running(made).count(1) == 3)
    assert sorted(made.assignments[1]) == [0, 1, 2]
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {0}
    reasons = {agent.node.round.end.reason for agent in made.agents if agent.node.round.end}
    assert reasons <= {f"restart requested on host-{number}"}
    all_end(made)


def test_two_restarts_at_once_are_one() -> None:
    made = world(3, job(3, 3))
    form(made, 3)
    for agent in made.agents:
        agent.request_restart()
    until(made, 60)
    assert running(made) == [1, 1, 1]


def test_a_worker_that_fails_after_a_restart_was_asked_for_uses_up_none() -> None:
    made = world(3, job(3, 3, Policy(0)))
    form(made, 3)
    made.agents[1].request_restart()
    made.run(made.now + 10, stop=lambda: made.agents[1].node.round.end is not None)
    made.agents[2].fail_worker(7)
    until(made, 60)
    assert running(made) == [1, 1, 1]


@pytest.mark.parametrize("number", range(4))
def test_a_stop_of_the_job_that_is_asked_for_anywhere_ends_all_nodes_with_the_signal(number: int) -> None:
    """Although two nodes would be enough to go on, and the fourth is a spare."""
    made = world(4, job(2, 3))
    form(made, 3)
    until(made, 5)
    made.agents[number].signal("stop requested on host-x")
    until(made, 60)
    assert one(made) == Finish(signum=15)
    assert list(made.assignments) == [0]
    assert sum("stop requested on host-x: stopping 2 workers" in line for a in made.agents for line in a.shown()) <= 3


def test_a_stop_of_the_job_ends_also_those_that_wait_for_the_first_round() -> None:
    made = world(2, job(3, 3))
    until(made, 5)
    made.agents[1].signal("stop requested on host-1")
    until(made, 60)
    assert one(made) == Finish(signum=15)


def test_a_stop_of_the_job_between_two_rounds_ends_all_nodes() -> None:
    made = world(3, job(1, 3))
    form(made, 3)
    made.agents[0].fail_worker()
    made.run(made.now + 10, stop=lambda: not any(agent.running == 0 for agent in made.agents))
    made.agents[1].signal("stop requested on host-1")
    until(made, 60)
    assert {end.signum for end in finishes(made)} == {15}


# --- one count


def test_fatal_statuses_end_the_job_everywhere() -> None:
    made = world(2, job(2, 2, Policy(3, fatal_exit_codes=frozenset({2}))))
    form(made, 2)
    made.agents[1].fail_worker(2)
    until(made, 30)
    assert one(made).why == "exit status 2 is fatal (--fatal-exit-codes)"


def test_a_crash_loop_is_ended_wherever_it_is_seen() -> None:
    made = world(2, job(2, 2, Policy(99)))
    for _ in range(3):
        form(made, 2)
        made.agents[1].fail_worker(1, "KeyError: 'lr'", rank=0)
    until(made, 30)
    assert one(made).why.startswith("crash loop: rank ")


def test_the_count_is_kept_when_all_who_knew_it_are_gone() -> None:
    made = world(2, job(2, 4, Policy(1), keep_alive_interval=1))
    form(made, 2)
    made.agents[0].fail_worker(1)
    form(made, 2)
    made.add()
    made.add()
    form(made, 4)
    old = made.agents[:2]
    until(made, 1)
    for agent in old:
        agent.kill()
    made.run(made.now + 60, stop=lambda: made.agents[3].running == 3)
    assert {assignment.restart_history.used for assignment in made.assignments[3].values()} == {1}


def test_a_restart_may_have_to_wait() -> None:
    made = world(2, job(2, 2, Policy(3, backoff=8, backoff_limit=60)))
    form(made, 2)
    failed_at = made.now
    made.agents[0].fail_worker(1)
    form(made, 2)
    assert running(made) == [1, 1]
    assert 8 < made.now - failed_at < 8 + 3


def test_a_node_that_fails_again_and_again_leaves_its_place_to_a_spare() -> None:
    made = world(3, job(2, 2, Policy(9, node_failure_limit=2)))
    form(made, 2)
    spare = next(agent for agent in made.agents if agent.running is None)
    bad = next(agent for agent in made.agents if agent.running is not None and agent.state.assignment)
    for number in (1, 2):
        until(made, 20)
        bad.fail_worker(1)
        made.run(made.now + 60, stop=lambda number=number: sum(r == number for r in running(made)) == 2)  # type: ignore[misc]
    until(made, 1)
    assert (bad.running, spare.running) == (None, 2)
    assert any("2 failures in a row (--node-failure-limit=2)" in line for line in bad.shown())
    spare.kill()
    made.run(made.now + 60, stop=lambda: bad.running == 3)
    assert bad.running == 3, "better than nothing"


# --- one end


def test_too_few_nodes_are_an_end_within_the_deadline() -> None:
    made = world(3, job(3, 3))
    form(made, 3)
    died_at = made.now
    made.agents[1].kill()
    others = [agent for agent in made.agents if not agent.dead]
    made.run(made.now + 100, stop=lambda: all(agent.finish for agent in others))
    end = one(made, *others)
    assert end.status == 69
    assert end.error.startswith("lost host-1; still there: ")
    assert made.now - died_at < DEADLINE + 2 + 2, "2 s for the workers to stop"
    late = made.add()
    until(made, 5)
    assert one(made, late).error == end.error, "also for who comes later"


def test_a_replacement_that_is_there_in_time_takes_over() -> None:
    made = world(3, job(3, 3))
    form(made, 3)
    made.agents[1].kill()
    until(made, 5)
    made.add()
    made.run(made.now + 60, stop=lambda: running(made)[2:] == [1, 1])
    assert running(made)[2:] == [1, 1]
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {0}


def test_the_others_wait_until_the_workers_of_a_leaving_node_have_stopped() -> None:
    made = world(3, job(2, 3))
    form(made, 3)
    leaving = made.agents[2]
    leaving.stop_time = 24.0
    left_at = made.now
    leaving.signal()
    made.run(made.now + 60, stop=lambda: running(made)[:2] == [1, 1])
    assert running(made)[:2] == [1, 1]
    assert leaving.finish is not None
    assert 2 < made.now - left_at < 24 + 2
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {0}


@pytest.mark.parametrize("slow", range(3))
def test_a_node_that_is_slow_to_stop_is_waited_for(slow: int) -> None:
    made = world(3, job(2, 3, keep_alive_interval=1))
    form(made, 3)
    made.agents[slow].stop_time = 60  # far above the keep-alive deadline
    made.agents[(slow + 1) % 3].fail_worker(1)
    made.run(made.now + 100, stop=lambda: all(r == 1 for r in running(made)))
    assert running(made) == [1, 1, 1]
    assert {assignment.group_world_size for assignment in made.assignments[1].values()} == {3}


@pytest.mark.parametrize("go", [Agent.kill, Agent.signal], ids=["dies", "leaves"])
@pytest.mark.parametrize("number", range(3))
def test_a_node_that_is_done_need_not_stay(number: int, go: Callable[[Agent], None]) -> None:
    made = world(3, job(3, 3))
    form(made, 3)
    done = made.agents[number]
    done.succeed()
    until(made, 2)
    go(done)
    others = [agent for agent in made.agents if agent is not done]
    until(made, 60)
    assert [agent.running for agent in others] == [0, 0], "they run on"
    all_end(made)
    assert one(made, *others) == Finish()


def test_nodes_that_are_done_wait_for_the_others_but_not_for_ever() -> None:
    made = World(1, job(3, 3))
    made.exit_barrier_timeout = 300
    made.trouble = False
    for _ in range(3):
        made.add()
    form(made, 3)
    monitor = next(agent for agent in made.agents if agent.state.assignment and agent.state.assignment.group_rank == 0)
    rest = [agent for agent in made.agents if agent is not monitor]
    monitor.succeed()
    until(made, 299)
    assert monitor.finish is None
    until(made, 3)
    assert monitor.finish == Finish()
    until(made, 100)
    assert [agent.running for agent in rest] == [0, 0], "they run on, watched over by another"
    rest[0].kill()
    until(made, 40)
    assert "needs 3 nodes" in one(made, rest[1]).error


def test_a_frozen_node_is_replaced_and_joins_again_when_it_thaws() -> None:
    made = world(3, job(2, 3))
    form(made, 3)
    until(made, 20)
    made.agents[1].freeze(60)
    made.run(made.now + 40, stop=lambda: sum(r == 1 for r in running(made)) == 2)
    assert sum(r == 1 for r in running(made)) == 2, "no worker of the old generation lives (the simulation checks)"
    until(made, 60)
    form(made, 3)
    assert running(made) == [2, 2, 2]
    assert any("this process was stopped" in line for line in made.agents[1].shown())


# --- readable


def test_one_node_speaks_for_a_thousand() -> None:
    made = world(40, job(40, 40))
    form(made, 40)
    until(made, 5)
    made.agents[7].fail_worker(3)
    form(made, 40)
    all_end(made)
    lines = [line for agent in made.agents for line in agent.shown(Level.INFO)]
    assert len(lines) < 12, lines
    assert len([line for line in lines if line.startswith("formed: 40 nodes")]) == 1
    assert len([line for line in lines if "restart 1 of 3" in line]) in (1, 2), "the node that failed, and the first"
    assert len([line for line in lines if line.startswith("done: 80 workers")]) == 1
    assert sum(len(agent.shown(Level.DEBUG)) for agent in made.agents) > 100


# --- the store comes and goes


def lost(made: World, seconds: float, *, forget: bool = False) -> None:
    """The store is away for some seconds."""
    made.stop_store(forget=forget)
    made.after(seconds, made.start_store)
    until(made, seconds)


def test_a_store_that_is_back_soon_costs_nothing() -> None:
    made = world(3, job(3, 3))
    form(made, 3)
    lost(made, 5)
    until(made, 60)
    assert running(made) == [0, 0, 0]
    all_end(made)
    assert one(made) == Finish()


@pytest.mark.parametrize("first", [0, 1], ids=["host", "other"])
def test_the_host_of_the_store_and_another_node_leave_at_once_and_the_job_ends_by_the_signal(first: int) -> None:
    made = world(0, job(1, 3))
    for number in range(3):
        agent = Agent(made, number)
        agent.backend.serves = number == 0
        made.agents.append(agent)
        agent.begin()
    form(made, 3)
    host, other, _ = made.agents
    [host, other][1 - first].stall(0.1)
    host.signal()
    other.signal()
    made.run(made.now + 100, stop=lambda: host.gone)
    made.stop_store()
    until(made, 30)
    assert [end.signum for end in finishes(made)] == [SIGTERM] * 3


def test_a_store_that_forgets_everything_costs_a_round_but_no_restart() -> None:
    made = world(3, job(3, 3, Policy(1)))
    form(made, 3)
    made.agents[1].fail_worker(1)
    form(made, 3)
    lost(made, 5, forget=True)
    made.run(made.now + 60, stop=lambda: all(r == 2 for r in running(made)))
    assert running(made) == [2, 2, 2]
    assert {assignment.restart_history.used for assignment in made.assignments[2].values()} == {1}
    all_end(made)


def test_workers_do_not_outlive_the_loss_of_the_store_by_more_than_the_deadline() -> None:
    made = world(3, job(3, 3))
    form(made, 3)
    made.stop_store()
    made.run(made.now + DEADLINE, stop=lambda: not any(agent.alive for agent in made.agents))
    assert not any(agent.alive for agent in made.agents)
    made.run(made.now + 100, stop=lambda: not made.live())
    end = one(made)
    assert end.status == 69
    assert "the store is lost: connection lost (tried for 60 s)" in end.error


def test_spares_learn_that_all_have_succeeded_also_if_nobody_is_left_to_say_so() -> None:
    """The last member is killed between its success and the end of the round."""
    made = world(3, job(1, 2))
    form(made, 2)
    members = [agent for agent in made.agents if agent.running is not None]
    [spare] = [agent for agent in made.agents if agent not in members]
    members[0].succeed()
    made.run(made.now + 1)
    members[1].succeed()
    made.run(made.now + 30, stop=lambda: made.store.values.get("elastic/job/0/succeeded") == b"2")
    for agent in members:
        agent.kill()
    made.run(made.now + 60)
    assert spare.finish is not None
    assert (spare.finish.error, spare.finish.failures) == ("", ())


@pytest.mark.parametrize("phase", [Phase.JOINING, Phase.WAITING])
@pytest.mark.parametrize("low", [3, 2])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_signal_in_a_pause_ends_the_job_as_it_would_while_workers_run(number: int, low: int, phase: Phase) -> None:
    """If too few nodes remain. Otherwise the job goes on without that node."""
    made = world(3, job(low, 3, Policy(3, backoff=20, backoff_limit=60)))
    form(made, 3)
    made.agents[0].fail_worker()
    leaving = made.agents[number]
    made.run(made.now + 8, stop=lambda: (leaving.node.round.number, leaving.node.phase) == (1, phase))
    assert (leaving.node.phase, leaving.running) == (phase, None)
    leaving.signal()
    made.run(made.now + 60)
    others = [agent for agent in made.agents if agent is not leaving]
    assert leaving.finish is not None
    assert leaving.finish.signum == SIGTERM
    assert [agent.finish and agent.finish.signum for agent in others] == ([SIGTERM] * 2 if low == 3 else [None] * 2)
    assert [agent.running for agent in others] == ([None] * 2 if low == 3 else [1, 1])


def test_a_host_that_comes_back_is_found_soon() -> None:
    """Although its packets are lost meanwhile, and the kernel tries more and more rarely."""
    made = world(3, job(3, 3))
    form(made, 3)
    back_at = made.now + 8
    for agent in made.agents:
        agent.backend.store_away_until = back_at
        agent.backend.break_connections()
    made.run(back_at)
    made.run(back_at + 20, stop=lambda: all(agent.backend.is_reached for agent in made.agents))
    assert made.now - back_at < CONNECT_TIMEOUT + LAST_RETRY


def test_a_store_that_never_answers_is_given_up_after_the_join_timeout() -> None:
    made = world(0, job(2, 2, join_timeout=120))
    made.stop_store()
    made.add()
    until(made, 119)
    assert made.live(), "it may still come"
    until(made, 2)
    assert "the store: connection lost (tried for 120 s)" in one(made).error
    tried = [line for line in made.agents[0].shown(Level.WARNING) if line.endswith("s more")]
    assert 10 <= len(tried) <= 12, "a line every 10 s"


def test_a_connection_that_stands_still_for_long_is_replaced() -> None:
    made = world(3, job(2, 3))
    form(made, 3)
    made.agents[1].stall(4)
    until(made, 60)
    assert running(made) == [0, 0, 0], "that is no reason to stop workers"
    made.agents[1].stall(25)
    made.run(made.now + 60, stop=lambda: running(made) == [2, 2, 2])
    assert running(made) == [2, 2, 2], "the others have gone on without it, until it was there again"


@pytest.mark.parametrize("low", [2, 3], ids=["the others go on", "the job ends"])
def test_the_workers_of_all_nodes_get_the_signal_that_came(low: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world(3, job(low, 3))
    form(made, 3)
    sent: list[int] = []
    carry_out = Agent._carry_out

    def note(agent: Agent, actions: list[Action]) -> None:
        sent.extend(action.signum for action in actions if isinstance(action, SendSignal))
        carry_out(agent, actions)

    monkeypatch.setattr(Agent, "_carry_out", note)
    made.agents[1].interrupt()
    until(made, 20)
    assert sent == [SIGINT] * 3
