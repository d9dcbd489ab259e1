"""The round protocol: by hand for what is promised, in thousands of random schedules for what may happen."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest

from elastic_launch.core.agent.lifecycle import AgentPhase
from elastic_launch.core.agent.messages import Finish
from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.messages import Input, KeyAppeared, Settings
from elastic_launch.core.rendezvous.monitor import TAKE_OVER
from elastic_launch.core.rendezvous.records import encode
from elastic_launch.core.rendezvous.state import Phase, Timer
from elastic_launch.core.store_requests import Add, Set, Swap
from elastic_launch.job import Change, End, EndKind, Level, Policy
from tests.support.simulation import Agent, World
from tests.support.worlds import RESET, SETTINGS, all_end, come_right, form, running, seeds, world


def test_a_full_round_forms_at_once_and_ends_well() -> None:
    made = world(3)
    form(made, 3)
    assert made.now < 1001
    all_end(made)
    assert all(agent.finish is not None and not agent.finish.failures for agent in made.agents)
    assert all(agent.node.may_disconnect or agent.node.phase is Phase.LEAVING for agent in made.agents)


def test_enough_nodes_wait_for_the_last_call() -> None:
    made = world(2)
    form(made, 2)
    assert 1010 <= made.now < 1012


def test_too_few_nodes_give_up_with_the_names_of_those_that_came() -> None:
    made = world(1)
    made.run(2000)
    [agent] = made.agents
    assert agent.finish is not None
    assert agent.finish.status == 75
    assert "1 of 2 to 3 nodes has joined after 600 s: host-0; gave up (join_timeout=600 s)" in agent.finish.error


def test_waiting_nodes_say_who_is_there() -> None:
    made = world(2, Settings("job", 4, 4))
    made.run(1021)
    for agent in made.agents:
        assert "2 of 4 nodes have joined after 10 s: host-0, host-1; waiting up to 590 s more" in [
            line.replace("host-1, host-0", "host-0, host-1") for line in agent.shown()
        ]


@pytest.mark.parametrize("number", [0, 2])
def test_a_node_that_fails_before_it_has_joined_is_named_with_the_reason(number: int) -> None:
    made = world(3, SETTINGS._replace(min_nodes=4, max_nodes=4), token=b"t" * 32)
    made.run(made.now + 3)
    made.agents[number].fail("cannot import nope\nModuleNotFoundError: No module named 'nope'")
    made.run(made.now + 40)
    text = "cannot import nope ModuleNotFoundError: No module named 'nope'"
    others = [agent for agent in made.agents if agent.number != number]
    lines = [line for agent in others for line in agent.shown()]
    assert lines.count(f"host-{number} failed before it joined: {text}") == 1
    assert f"left: host-{number}" not in lines
    for agent in others:
        assert any(f"; missing: host-{number} (failed: {text})" in line for line in agent.shown()), agent.shown()
    made.add(name=f"host-{number}")
    made.run(made.now + 40)
    assert not any("failed: " in line for agent in others for line in agent.shown()[-1:])
    made.add()
    form(made, 4)


def test_waiting_nodes_say_which_rank_is_missing() -> None:
    made = World(1, Settings("job", 3, 3))
    made.trouble = False
    made.add(rank=0)
    made.add(rank=2)
    made.run(1010)
    assert "missing: node rank 1" in made.agents[0].shown()[-1]


def test_a_failure_is_a_restart_of_all_with_one_charge() -> None:
    made = world(3)
    form(made, 3)
    made.agents[1].fail_worker()
    form(made, 3)
    assert running(made) == [1, 1, 1]
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {1}
    assert made.now < 1010, "all who were there are there again: there is nobody to wait for"


def test_restarts_are_counted_once_for_the_job_and_the_end_is_the_same() -> None:
    made = world(2, Settings("job", 2, 2, policy=Policy(1)))
    form(made, 2)
    made.agents[0].fail_worker()
    form(made, 2)
    made.agents[1].fail_worker()
    made.run(2000)
    causes = {agent.finish.failures[0] for agent in made.agents if agent.finish}
    [cause] = causes
    assert cause.host == "host-1"


def test_node_that_is_killed_is_gone_within_the_deadline_and_two_seconds() -> None:
    for victim in range(3):
        made = world(3)
        form(made, 3)
        killed_at = made.now
        made.agents[victim].kill()
        others = [agent for agent in made.agents if not agent.dead]

        def again(others: list[Agent] = others) -> bool:
            return all(agent.running == 1 for agent in others)

        made.run(made.now + 100, stop=again)
        assert again()
        assert made.now - killed_at < SETTINGS.keep_alive_deadline + 2 + 2, "2 s for the workers to stop"


@pytest.mark.parametrize("seed", range(3))
def test_a_monitor_that_has_watched_before_goes_on_polling(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asked as a watcher may be unanswered when it becomes the monitor."""
    monkeypatch.setattr(World, "delay", lambda self: self.random.uniform(0.004, 0.006))
    made = world(3, SETTINGS._replace(min_nodes=1), seed=seed)
    form(made, 3)
    made.run(made.now + 20 + seed * 0.37)
    first, second, third = sorted(made.agents, key=lambda agent: agent.state.assignment.group_rank)  # type: ignore[union-attr]
    first.succeed()
    made.run(made.now + 2)
    first.kill()
    made.run(made.now + 60)
    third.kill()
    made.run(made.now + SETTINGS.keep_alive_deadline + 10)
    assert second.running != 0


def test_a_monitor_whose_wait_stands_still_learns_from_its_poll_that_the_round_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would reset the counters on, so that the leader of the next round could not see who lives."""
    made = world(3)
    form(made, 3)
    monitor = next(agent for agent in made.agents if agent.state.assignment and agent.state.assignment.group_rank == 0)
    deliver = monitor.rendezvous.deliver

    def without_end(what: Input) -> None:
        if not (isinstance(what, KeyAppeared) and what.key.endswith("/end")):
            deliver(what)

    monkeypatch.setattr(monitor.rendezvous, "deliver", without_end)
    next(agent for agent in made.agents if agent is not monitor).fail_worker()
    made.run(made.now + 10)
    assert running(made) == [1, 1, 1]


def test_a_node_that_learns_that_the_others_go_on_without_it_kills_its_workers() -> None:
    """It may have been heard just after they gave it up. A random schedule found that (seed 128885)."""
    made = world(3)
    form(made, 3)
    first, other, lost = made.agents
    lost.stop_time = 1e6
    end = End(EndKind.MEMBERSHIP_CHANGED, "", first.node.record.node, (lost.node.record.node,), change=Change.NODE_LOST)
    made.store.apply(Swap(first.node.key("end"), b"", encode(end)), lambda _: None)
    made.run(made.now + 1)
    assert (lost.finish, lost.alive) == (None, set())
    made.run(made.now + 5)
    assert (first.running, other.running) == (1, 1)


@pytest.mark.parametrize("ranks", [(0, 1), (0, 2), (1, 2), (0, 3, 4), (0, 1, 2), (2, 3, 4)])
@pytest.mark.parametrize("low", [2, 5])
def test_nodes_that_are_lost_at_once_are_gone_after_one_deadline(ranks: tuple[int, ...], low: int) -> None:
    """The job goes on without them, or ends. With the monitor, group rank 0, those are lost who would notice."""
    for seconds in (20.3, 22.1, 24.6):  # at different times of a heartbeat's interval
        made = world(5, SETTINGS._replace(min_nodes=low, max_nodes=5))
        form(made, 5)
        made.run(made.now + seconds)
        dead = [agent for agent in made.agents if agent.state.assignment and agent.state.assignment.group_rank in ranks]
        others = [agent for agent in made.agents if agent not in dead]
        killed_at = made.now
        for agent in dead:
            agent.kill()

        def is_over(others: list[Agent] = others) -> bool:
            return all(agent.running == 1 for agent in others) or all(agent.finish for agent in others)

        made.run(made.now + 100, stop=is_over)
        later = 2 * SETTINGS.keep_alive_interval if 0 in ranks else 2
        assert made.now - killed_at < SETTINGS.keep_alive_deadline + later + 2, "2 s for the workers to stop"
        errors = {agent.finish.error for agent in others if agent.finish}
        assert len(errors) == (low == 5)
        for error in errors:
            lost = error.removeprefix("lost ").partition("; still there: ")[0]
            assert sorted(lost.split(", ")) == sorted(agent.name for agent in dead), error


@pytest.mark.parametrize("members", [2, 3])
def test_spares_that_are_left_alone_go_on_after_one_deadline(members: int) -> None:
    made = world(5, SETTINGS._replace(min_nodes=2, max_nodes=members))
    form(made, members)
    made.run(made.now + 20)
    killed_at = made.now
    for agent in made.agents:
        if agent.running is not None:
            agent.kill()
    made.run(made.now + 100, stop=lambda: sum(run == 1 for run in running(made)) == 2)
    assert made.now - killed_at < SETTINGS.keep_alive_deadline + 2 * SETTINGS.keep_alive_interval + 2


def test_a_spare_that_takes_over_from_the_last_member_names_it() -> None:
    made = world(2, SETTINGS._replace(min_nodes=1, max_nodes=1))
    form(made, 1)
    [dead] = [agent for agent in made.agents if agent.running is not None]
    [spare] = [agent for agent in made.agents if agent is not dead]
    dead.kill()
    made.run(made.now + 60, stop=lambda: spare.running == 1)
    assert f"no heartbeat from {dead.name} for 15 s" in spare.shown(Level.WARNING)
    assert not [line for line in spare.shown() if "--node-rank" in line]


@pytest.mark.parametrize("has_failed", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_agent_that_is_started_again_need_not_wait_for_its_former_self(rank: int, has_failed: bool) -> None:
    """Neither while the round runs without it, nor while the others wait for it because their workers have failed."""
    made = world(3)
    form(made, 3)
    made.run(made.now + 20)
    [former] = [agent for agent in made.agents if agent.state.assignment and agent.state.assignment.group_rank == rank]
    former.kill()
    killed_at = made.now
    if has_failed:
        for agent in made.live():
            made.after(0.1, lambda agent=agent: agent.fail_worker(-9))  # type: ignore[misc]
        made.run(made.now + 4)
    made.run(made.now + 1)
    made.add(name=former.name)
    made.run(made.now + 100, stop=lambda: sum(run == 1 for run in running(made)) == 3)
    assert made.now - killed_at < 10 < SETTINGS.keep_alive_deadline
    shown = [line for agent in made.agents for line in agent.shown()]
    assert any(f"(pid {former.number + 1})" in line for line in shown), "it is named"
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {int(has_failed)}


def test_an_agent_beside_another_on_its_host_does_not_replace_it() -> None:
    made = world(3)
    form(made, 3)
    made.add(name="host-1")
    made.run(made.now + 40)
    assert running(made) == [0, 0, 0, None]


def test_the_workers_of_a_former_self_must_be_gone_too() -> None:
    """Its keeper may need a moment to kill them."""
    made = world(3)
    form(made, 3)
    made.run(made.now + 20)
    former, *others = made.agents
    former.kill()
    former.alive = {0}
    made.add(name=former.name)
    made.run(made.now + 5)
    assert [agent.running for agent in others[:2]] == [0, 0]
    former.alive = set()
    made.run(made.now + 5)
    assert [agent.running for agent in others] == [1, 1]


def test_a_former_self_that_is_gone_is_not_looked_for_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would read all of /proc each time, while the agents wait for another node."""
    made = world(3, SETTINGS._replace(min_nodes=3))
    form(made, 3)
    made.run(made.now + 20)
    for agent in made.agents[:2]:
        agent.kill()
    looked_for: list[int] = []
    is_gone = made.is_gone

    def look(pid: int, started: int) -> bool:
        looked_for.append(pid)
        return is_gone(pid, started)

    monkeypatch.setattr(made, "is_gone", look)
    made.add(name=made.agents[0].name)
    made.run(made.now + SETTINGS.keep_alive_deadline)
    assert looked_for.count(1) == 2, "once in the round that runs, and once while nodes join"


def test_a_slow_reply_to_the_first_heartbeat_says_nothing_of_the_monitor() -> None:
    """Two heartbeats that arrive together show no reset in between, whoever looks after them."""
    for seconds in (2.9, 3.0, 3.1, 3.2, 3.3, 3.4):
        made = world(3, SETTINGS._replace(max_nodes=2, min_nodes=2, keep_alive_interval=1))
        form(made, 2)
        next(agent for agent in made.agents if agent.running is None).stall(seconds)
        made.run(made.now + 20)
        assert sorted(run for run in running(made) if run is not None) == [0, 0]


@pytest.mark.parametrize("seconds", [0.2, 0.4])
def test_a_slow_store_is_not_asked_again_before_it_has_answered(seconds: float) -> None:
    """More polls than it can answer would hold up the monitor's heartbeats, until it stops its workers."""
    made = world(3, SETTINGS._replace(keep_alive_interval=1, keep_alive_max_attempt=6))
    form(made, 3)
    for agent in made.agents:
        agent.backend.service_time = seconds
    made.run(made.now + 60)
    assert running(made) == [0, 0, 0]


def test_a_node_that_leaves_costs_no_restart() -> None:
    made = world(3)
    form(made, 3)
    made.agents[2].signal()
    made.run(made.now + 100, stop=lambda: running(made)[:2] == [1, 1])
    assert running(made) == [1, 1, None]
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {0}


def test_a_spare_whose_own_connection_stood_still_does_not_take_the_monitor_for_dead() -> None:
    """Its first heartbeat in the round came late: until then there was nothing that the monitor could have reset."""
    made = world(3, Settings("job", 1, 1, keep_alive_interval=1))
    form(made, 1)
    made.run(made.now + 0.2)
    spare = next(agent for agent in made.agents if agent.node.round.ticket == 3)
    spare.stall(spare.node.timers[Timer.HEARTBEAT] + 2.95 - made.now)
    made.run(made.now + 20)
    assert running(made).count(0) == 1, "the first round goes on"


def test_a_newcomer_waits_for_the_last_call_while_the_others_run() -> None:
    made = world(2, SETTINGS._replace(max_nodes=4))
    form(made, 2)
    made.add()
    came_at = made.now
    made.run(made.now + 9)
    assert running(made) == [0, 0, None]
    form(made, 3)
    assert made.now - came_at < SETTINGS.last_call_timeout + 2 + 2
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {0}


def test_newcomers_that_fill_the_job_do_not_wait() -> None:
    made = world(2, Settings("job", 2, 4, last_call_timeout=30))
    form(made, 2)
    made.add()
    made.add()
    came_at = made.now
    form(made, 4)
    assert made.now - came_at < 5


def test_a_spare_takes_over_at_once() -> None:
    made = world(4)
    form(made, 3)
    spare = next(agent for agent in made.agents if agent.running is None)
    assert "the job already runs on 3 nodes; waiting as a spare" in spare.shown()
    member = next(agent for agent in made.agents if agent.running is not None)
    member.signal()
    made.run(made.now + 100, stop=lambda: sum(r == 1 for r in running(made)) == 3)
    assert spare.running == 1


def test_a_chief_that_dies_is_replaced() -> None:
    made = world(2, Settings("job", 3, 3))
    made.run(1003)
    leader = next(agent for agent in made.agents if agent.node.round.ticket == 1)
    leader.kill()
    made.add()
    made.add()
    made.run(1100, stop=lambda: len(made.assignments.get(0, {})) == 3)
    assert len(made.assignments[0]) == 3
    assert made.now < 1003 + 15 + 2 * 5 + 1


def test_a_chief_that_leaves_hands_over() -> None:
    made = world(2, Settings("job", 3, 3))
    made.run(1003)
    next(agent for agent in made.agents if agent.node.round.ticket == 1).signal()
    made.add()
    made.add()
    made.run(1100, stop=lambda: len(made.assignments.get(0, {})) == 3)
    assert len(made.assignments[0]) == 3
    assert made.now < 1003 + 5 + 2


def test_nodes_that_stay_keep_their_ranks() -> None:
    made = world(3)
    form(made, 3)
    before = {agent.name: agent.state.assignment.group_rank for agent in made.agents if agent.state.assignment}
    made.agents[0].fail_worker()
    form(made, 3)
    assert {agent.name: agent.state.assignment.group_rank for agent in made.agents if agent.state.assignment} == before


def test_two_nodes_with_one_rank_end_the_job_with_both_names() -> None:
    made = World(1, Settings("job", 3, 3))
    made.trouble = False
    for rank in (0, 1, 1):
        made.add(rank=rank)
    made.run(1030)
    for agent in made.agents:
        assert agent.finish is not None
        assert agent.finish.status == 2
        assert "two nodes ask for --node-rank=1: host-1 (pid 2) and host-2 (pid 3)" in agent.finish.error.replace(
            "host-2 (pid 3) and host-1 (pid 2)", "host-1 (pid 2) and host-2 (pid 3)"
        )


def test_a_dead_node_leaves_its_rank_to_the_one_that_replaces_it() -> None:
    made = World(1, Settings("job", 2, 2))
    made.trouble = False
    dead = made.add(rank=1)
    made.run(1001)
    dead.kill()
    made.add(rank=1)
    made.add(rank=0)
    made.run(1100, stop=lambda: running(made)[1:] == [0, 0])
    assert running(made)[1:] == [0, 0]


def test_a_late_agent_finds_a_finished_job() -> None:
    made = world(3)
    form(made, 3)
    all_end(made)
    late = made.add()
    made.run(made.now + 5)
    assert late.finish is not None
    assert (late.finish.failures, late.finish.error, late.finish.signum) == ((), "", None)
    assert any("has already ended" in line for line in late.shown())


def test_requests_per_node_do_not_grow_with_their_number() -> None:
    """Without the leader's: it alone does work in proportion."""
    most: list[int] = []
    for count in (4, 64):
        made = world(count, Settings("job", count, count))
        form(made, count)
        most.append(max(agent.asked for agent in made.agents if agent.node.round.ticket != 1))
    assert most[0] == most[1] <= 5


def test_a_node_that_is_heard_again_while_it_is_being_lost_does_not_start() -> None:
    """It has its place from before, and its lease is new: only that it was silent shows that it may be too late."""
    made = world(3, SETTINGS._replace(keep_alive_interval=1))
    made.run(1010, stop=lambda: "elastic/job/0/node/3" in made.store.values)
    late = next(agent for agent in made.agents if agent.node.round.ticket == 3)
    late.stall(100)
    made.run(1010, stop=lambda: (questions.CheckFinished, Phase.MEMBER) in made.checks.asked)
    monitor = next(agent for agent in made.agents if agent.node.round.monitor)
    monitor.stall(2)
    late.backend.stalled_until = 0.0
    late.disconnect()
    made.run(made.now + 1.5, stop=lambda: late.running == 0)
    late.stall(100)
    made.run(made.now + 3)
    assert "elastic/job/0/end" in made.store.values
    assert late.running is None
    late.backend.stalled_until = 0.0
    late.disconnect()
    form(made, 3)


def test_a_node_that_came_late_for_its_place_does_not_wait_for_a_monitor_that_is_dead() -> None:
    made = world(3, SETTINGS._replace(min_nodes=1, keep_alive_interval=1))
    made.run(1010, stop=lambda: "elastic/job/0/node/3" in made.store.values)
    late = next(agent for agent in made.agents if agent.node.round.ticket == 3)
    late.stall(4)
    made.run(made.now + 1)
    for agent in made.agents:
        if agent is not late:
            agent.kill()
    made.run(made.now + 20, stop=lambda: late.running is not None)
    assert late.running == 1


def test_a_leader_that_leaves_when_it_has_closed_the_round_hands_nothing_over() -> None:
    made = world(3, SETTINGS._replace(max_nodes=2))
    form(made, 2)
    spare = next(agent for agent in made.agents if agent.running is None)
    key = f"elastic/job/0/heartbeat/{spare.node.round.ticket}"
    made.run(made.now + 10, stop=lambda: spare.node.round.heartbeat.in_flight)
    made.store.apply(Set(((key, b"%d" % TAKE_OVER),)), lambda reply: None)
    made.run(made.now + 10)
    assert running(made).count(0) == 2


def test_a_leader_that_leaves_while_it_has_not_heard_that_its_round_has_closed_hides_no_reset() -> None:
    """What it writes over a heartbeat would look as if the monitor had been silent before, which it does not know."""
    made = world(3)
    form(made, 3)
    for _ in range(40):
        made.run(made.now + 0.5)
        for ticket in (1, 2, 3):
            made.store.apply(Set(((f"elastic/job/0/heartbeat/{ticket}", b"%d" % TAKE_OVER),)), lambda reply: None)
    assert running(made) == [0, 0, 0]


def test_a_node_that_is_cut_off_before_it_hears_that_it_has_ended_the_round_loses_nobody() -> None:
    """It reports no failure then, and another node reports a consequence: as long as both live, none is to blame."""
    made = world(2)
    form(made, 2)
    failed, peer = made.agents
    failed.stop_time = 100  # its other worker lives until the end of the lease
    failed.fail_worker(-9)
    failed.stall(failed.lease - made.now + 0.1)  # the end of the round gets through, the answer does not
    made.run(made.now + 5, stop=lambda: "elastic/job/0/end" in made.store.values)
    peer.fail_worker(1, RESET)
    made.run(made.now + 30)
    assert running(made) == [1, 1]
    assert {place.restart_history.used for place in made.assignments[1].values()} == {0}


@pytest.mark.parametrize("rounds", [4, 70])
def test_a_node_that_sleeps_before_it_draws_its_ticket_leads_no_round_that_is_over(rounds: int) -> None:
    """It may find that round closed in its own name, or, if that was deleted, form another beside the current one."""
    made = world(1, SETTINGS._replace(min_nodes=1, max_nodes=1))
    made.step_time = 0.3  # the nodes that were there know of steps
    [first] = made.agents
    form(made, 1)

    def restart(number: int) -> None:
        made.run(made.now + 1)
        first.request_restart()
        made.run(made.now + 10, stop=lambda: first.running == number)

    restart(1)
    late = made.add()
    made.run(made.now + 5, stop=lambda: late.asked > 0)
    for number in range(2, rounds + 1):
        late.freeze(20)
        restart(number)
    made.run(made.now + 60)
    assert late.finish is None
    assert running(made) == [rounds, None]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_node_that_dies_before_it_has_counted_itself_among_the_finished_is_not_waited_for(rank: int) -> None:
    made = world(3, SETTINGS._replace(min_nodes=3))
    form(made, 3)
    dead = next(a for a in made.agents if a.state.assignment and a.state.assignment.group_rank == rank)
    dead.succeed()
    made.run(made.now + 1)
    dead.kill()
    made.store.apply(Add("elastic/job/0/succeeded", -1), lambda reply: None)
    made.run(made.now + 60)
    assert running(made).count(0) == 2
    all_end(made)


# --- thousands of schedules


class Scene(NamedTuple):
    """What is known of a schedule's end."""

    ends: str
    rounds: int


def play(seed: int) -> Scene:
    """One random schedule: nodes of a random job, and random bad luck; then calm, in which all must come right."""
    chance = random.Random(seed)
    low = chance.randint(1, 3)
    high = chance.randint(low, 4)
    settings = Settings(
        "job",
        low,
        high,
        join_timeout=10_000,
        last_call_timeout=chance.choice([2, 10]),
        keep_alive_interval=chance.choice([1, 5]),
        policy=Policy(
            chance.randint(0, 3),
            window=chance.choice([0, 0, 20]),
            backoff=chance.choice([0, 0, 0.5]),
            backoff_limit=5,
            node_failure_limit=chance.choice([0, 0, 1]),
        ),
        store_port=chance.choice([0, 29400]),
    )
    made = World(seed, settings)
    made.stop_time = chance.choice([2, 2, 25])
    made.step_time = 0.3
    for _ in range(chance.randint(low, high + 1)):
        made.at(made.now + chance.choice([0, chance.uniform(0, 5), chance.uniform(0, 20)]), made.start)

    def strike(what: str, chance: random.Random) -> None:
        live = made.live()
        dead = [agent for agent in made.agents if agent.dead]
        if what == "again" and dead:
            made.add(name=chance.choice(dead).name)
            return
        if what in ("add", "again") or not live:
            made.add()
            return
        agent = chance.choice(live)
        {
            "kill": agent.kill,
            "freeze": lambda: agent.freeze(chance.uniform(0.5, 30)),
            "disconnect": agent.disconnect,
            "cut": lambda: agent.disconnect(chance.uniform(0.5, 30)),
            "stall": lambda: agent.stall(chance.uniform(0.5, 30)),
            "succeed": agent.succeed,
            "fail": agent.fail_worker,
            "break": lambda: break_down(agent, chance),
            "signal": agent.signal,
            "restart": agent.request_restart,
        }[what]()

    def break_down(agent: Agent, chance: random.Random) -> None:
        """A worker, or a whole node, is killed, and workers of others break because of it: a moment later, or before
        anybody knows of it."""
        peers = [peer for peer in made.live() if peer is not agent and peer.running == agent.running]
        for peer in chance.sample(peers, chance.randint(0, len(peers))):
            made.after(chance.uniform(0, 0.2), lambda peer=peer: peer.fail_worker(1, RESET))  # type: ignore[misc]
        made.after(chance.uniform(0, 0.2), chance.choice([agent.kill, lambda: agent.fail_worker(-9)]))

    strikes = ["kill", "freeze", "disconnect", "cut", "stall", "fail", "fail", "break", "succeed", "signal", "add"]
    strikes += ["restart", "restart", "again"]
    span = chance.choice([5, 20, 60])
    for _ in range(chance.randint(0, 8)):
        # Each fault has its own chance: without it, all others stay as they are.
        own = random.Random(chance.random())
        made.fault(chance.uniform(0, span), partial(strike, chance.choice(strikes), own))
    made.run(made.now + span + 35)

    def ended() -> list[Finish]:
        """How the job has ended. A node that was killed, signalled, or cut off for too long has an end of its own."""
        finished = [agent.finish for agent in made.agents if agent.finish and not agent.dead]
        return [it for it in finished if not it.signum and not it.error.startswith("the store is lost: ")]

    def is_right() -> bool:
        live, parts = made.live(), [agent.part for agent in made.live() if agent.part is not None]
        if len(live) < low or ended():
            return not (live and ended())
        return len({*parts}) == 1 and len(parts) >= min(high, len(live))

    come_right(made, is_right, settings.keep_alive_deadline + 5)
    live, finished = made.live(), ended()
    assert not (live and finished), f"{made}: the job has ended for some and not for others"
    if len(live) >= low:
        rounds = {agent.part for agent in live if agent.part is not None}
        assert len(rounds) == 1, f"{made}: in different rounds, or in none: {running(made)}"
        assignments = [agent.state.assignment for agent in live if agent.part is not None and agent.state.assignment]
        ranks = [assignment.group_rank for assignment in assignments]
        # Members that are gone, but whose workers had all ended well before: the round goes on without them.
        ranks += [
            rank
            for rank in made.assignments[max(rounds)]
            if made.checks.has_finished(max(rounds), rank) and rank not in ranks
        ]
        assert sorted(ranks) == list(range(assignments[0].group_world_size)), f"{made}: ranks have gaps"
        assert len(ranks) >= min(high, len(live)), f"{made}: {len(assignments)} of {len(live)} nodes take part"
        all_end(made)
        return Scene("succeeded", len(made.assignments))
    causes = {(str(finish.failures), finish.error, finish.status, finish.why) for finish in finished}
    assert len(causes) <= 1, f"{made}: several causes: {causes}"
    return Scene("failed" if finished else "gone", len(made.assignments))


@pytest.mark.parametrize("block", range(4))
def test_any_schedule_comes_to_a_proper_end(block: int) -> None:
    scenes = []
    for seed in seeds(block, 40):
        try:
            scenes.append(play(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: play({seed}) shows it again") from error
    assert {scene.ends for scene in scenes} == {"succeeded", "failed", "gone"}
    assert max(scene.rounds for scene in scenes) >= 4


def test_no_schedule_charges_a_restart_that_the_user_asks_for() -> None:
    """Nor does it start a round beside another: the simulation checks that at all times."""
    assert max(map(restart_often, seeds(0, 40))) >= 5


def restart_often(seed: int) -> int:
    """Return the number of rounds of a job whose user restarts it now and then, while the network has its troubles."""
    chance = random.Random(seed)
    made = World(seed, Settings("job", 2, 3, join_timeout=10_000, last_call_timeout=2, policy=Policy(0)))
    for _ in range(chance.randint(2, 4)):
        made.add()
    form(made, min(3, len(made.agents)))
    strikes: list[Callable[[Agent], object]] = [
        Agent.request_restart,
        Agent.request_restart,
        lambda agent: list(map(Agent.request_restart, made.live())),
        Agent.disconnect,
        lambda agent: agent.stall(5),
        lambda agent: agent.freeze(5),
    ]
    for _ in range(8):
        strike, agent = chance.choice(strikes), chance.choice(made.agents)
        made.fault(chance.uniform(0, 30), partial(strike, agent))
    made.run(made.now + 60)
    # Some faults together keep a node away for the deadline.
    has_lost = any(text.startswith("no heartbeat from") for agent in made.agents for text in agent.shown())
    assert has_lost or len(made.live()) == len(made.agents), f"{made}: a restart has ended the job"
    histories = {a.restart_history for given in made.assignments.values() for a in given.values()}
    assert {(history.used, history.node) for history in histories} == {(0, "")}, f"{made}"
    return len(made.assignments)


def test_states_of_the_simulation_are_those_of_the_agent() -> None:
    made = world(3)
    form(made, 3)
    assert {agent.state.phase for agent in made.agents} == {AgentPhase.RUNNING}
