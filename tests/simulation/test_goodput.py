"""A job's goodput among several nodes: whatever is lost, one account goes on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from elastic_launch.core.agent.messages import ReportRound
from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.progress.goodput import RoundProgress, with_round
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.rendezvous.state import NodeState
from elastic_launch.job import Assignment, Decision, End, EndKind, Goodput, Level, LostTime, Policy, RestartHistory
from elastic_launch.rendezvous.handler import RendezvousInfo, RendezvousStoreInfo
from elastic_launch.rendezvous.third_party_round import Outcome, ThirdPartyRound, form_round
from elastic_launch.rendezvous.third_party_tasks import HandlerTasks
from tests.support.simulation import CHECKPOINT, World
from tests.support.third_party import MemoryStore, OneNode
from tests.support.worlds import all_end, form, world

TRAVEL = 0.5
"""More seconds than messages take in a calm network, during which nobody counts."""


def stepping(count: int, settings: Settings) -> World:
    """A job whose workers make two steps a second."""
    made = world(count, settings)
    made.step_time = 0.5
    return made


def runs_for(made: World, seconds: float) -> None:
    made.run(made.now + seconds)


def account(made: World, number: int) -> Goodput:
    """The job's goodput as a round begins."""
    [history] = {assignment.restart_history for assignment in made.assignments[number].values()}
    return history.goodput


def test_a_failed_round_is_accounted_for_once() -> None:
    made = stepping(3, Settings("job", 3, 3, policy=Policy(3)))
    form(made, 3)
    began = made.now
    runs_for(made, 100)
    made.agents[1].fail_worker(1)
    form(made, 3)
    first = account(made, 1)
    assert 200 <= first.steps <= 204, "the others made some before they stopped"
    assert first.elapsed == pytest.approx(made.now - began, abs=TRAVEL)
    assert (first.restarts, first.number) == (0, first.steps - 1)
    runs_for(made, 50)
    made.agents[0].fail_worker(1)
    form(made, 3)
    second = account(made, 2)
    assert 300 <= second.steps <= 308
    assert second.restarts == 1
    assert second.lost.total == pytest.approx(first.since.total + 0.5, abs=TRAVEL)
    assert second.repeated == first.steps % CHECKPOINT
    assert second.elapsed == pytest.approx(made.now - began, abs=2 * TRAVEL)


def test_a_change_of_membership_keeps_the_account() -> None:
    made = stepping(2, Settings("job", 2, 4, last_call_timeout=10, policy=Policy(0)))
    form(made, 2)
    runs_for(made, 100)
    fast, slow = made.agents
    fast.stop_time, slow.stop_time = 0.001, 20
    made.add()
    form(made, 3)
    assert account(made, 1).steps > 220 + 2, "those of the node whose workers ran longest; they met after 110 s"
    runs_for(made, 50)
    made.agents[0].signal()
    made.run(made.now + 60, stop=lambda: 2 in made.assignments)
    assert account(made, 2).steps >= 300
    assert account(made, 2).restarts == 1


def test_the_account_of_a_node_outlives_the_one_that_was_to_decide() -> None:
    made = stepping(3, Settings("job", 2, 3, policy=Policy(3)))
    form(made, 3)
    runs_for(made, 100)
    made.agents[1].fail_worker(1)
    runs_for(made, 0.2)
    made.agents[1].kill()
    made.run(made.now + 60, stop=lambda: sum(agent.running == 1 for agent in made.agents) == 2)
    assert account(made, 1).steps >= 200


def test_a_store_that_forgets_everything_does_not_forget_the_account() -> None:
    made = stepping(3, Settings("job", 3, 3, policy=Policy(1)))
    form(made, 3)
    runs_for(made, 100)
    made.stop_store(forget=True)
    made.after(5, made.start_store)
    made.run(made.now + 60, stop=lambda: all(agent.running == 1 for agent in made.agents))
    assert account(made, 1).steps >= 200


def test_a_frozen_node_comes_back_to_the_account_of_the_others() -> None:
    made = stepping(3, Settings("job", 2, 3, policy=Policy(1)))
    form(made, 3)
    runs_for(made, 100)
    made.agents[1].freeze(60)
    made.run(made.now + 40, stop=lambda: sum(agent.running == 1 for agent in made.agents) == 2)
    runs_for(made, 60)
    form(made, 3)
    assert account(made, 1).steps >= 200
    assert account(made, 2).steps > account(made, 1).steps


def test_one_node_tells_what_the_job_got_done() -> None:
    made = stepping(3, Settings("job", 3, 3))
    form(made, 3)
    runs_for(made, 100)
    all_end(made)
    lines = [line for agent in made.agents for line in agent.shown(Level.INFO) if line.startswith("done: ")]
    assert len(lines) == 1
    assert lines[0].startswith("done: 6 workers succeeded; 200 steps, 99.")
    assert lines[0].endswith(" % of 1 min 40 s in steps")


def test_all_nodes_report_the_same_account_of_a_failed_job_and_spares_too() -> None:
    made = stepping(4, Settings("job", 3, 3, policy=Policy(0)))
    for agent in made.agents:
        agent.stop_time = 0.001
    form(made, 3)
    runs_for(made, 100)
    next(agent for agent in made.agents if agent.running == 0).fail_worker(1)
    made.run(made.now + 60, stop=lambda: all(agent.finish for agent in made.agents))
    assert {agent.finish.goodput.steps for agent in made.agents if agent.finish} == {200}


@pytest.mark.parametrize("steps", [0, 90, 200])
def test_nodes_of_a_third_party_handler_go_on_with_the_account_of_the_furthest(steps: int) -> None:
    past = with_round(Goodput(), RoundProgress(100, 10, 60), 0, 61, 61, 61)
    theirs = aged(RestartHistory(1, goodput=past), 30)
    mine = with_round(past, RoundProgress(steps, 1, 29), 0, 30, 30, 30)
    store, assignment = MemoryStore(), Assignment(1, 2, 1, 2, 1, 1, 2, "", 1, "host", port_picked=False)
    end = End(EndKind.MEMBERSHIP_CHANGED, "1 more node can join", "other")
    ThirdPartyRound(store, assignment, "token").write_outcome(Outcome(end, Decision(True, theirs)))
    reported: list[object] = []
    tasks = HandlerTasks(OneNode(), NodeRecord("me", "host", 1, 1, "default"), None, lambda text: None)
    tasks.report, tasks.round = reported.append, ThirdPartyRound(store, assignment, "token")
    tasks.report_round(end, Decision(False, RestartHistory(goodput=mine)))
    assert tasks.decision == Decision(True, theirs._replace(goodput=mine))
    assert len(reported) == 1


def test_a_round_of_a_third_party_handler_begins_with_the_account_of_the_furthest() -> None:
    infos = [RendezvousInfo(MemoryStore(), 0, 2, RendezvousStoreInfo("127.0.0.1", 29999))]
    infos.append(RendezvousInfo(infos[0].store, 1, 2, infos[0].bootstrap_store_info))
    nodes = [
        NodeRecord(
            f"n{steps}", "host", 1, 1, "a", restart_history=RestartHistory(goodput=Goodput(steps)), known_round=3
        )
        for steps in (100, 200)
    ]
    with ThreadPoolExecutor() as pool:
        formed = pool.map(form_round, infos, nodes, [False] * 2, [None] * 2)
        assert [round_.assignment.restart_history.goodput.steps for round_ in formed] == [200, 200]


def test_what_a_node_reported_gets_older() -> None:
    node = NodeState(NodeRecord("n", "host", 1, 1, "a"), Settings("job", 1, 1))
    report = ReportRound(Decision(True, RestartHistory(goodput=Goodput(5, since=LostTime(1, 2, 3)))))
    node.round.report.round, node.round.report.reported_at = report, 1000.0
    assert node.with_own_goodput(RestartHistory(1), 1010.0) == RestartHistory(
        1, goodput=Goodput(5, since=LostTime(1, 2, 13))
    )


def test_workers_that_count_nothing_leave_no_account() -> None:
    made = world(2, Settings("job", 2, 2, policy=Policy(1)))
    form(made, 2)
    made.agents[0].fail_worker(1)
    form(made, 2)
    assert account(made, 1) == Goodput()
