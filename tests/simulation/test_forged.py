"""Records that somebody else writes: they end the job with one clear line at worst, and never well."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from elastic_launch.core.agent.messages import Finish
from elastic_launch.core.progress.judgement import Judgement
from elastic_launch.core.progress.messages import Judged, RequestStacks, StacksArrived, StacksWanted
from elastic_launch.core.progress.stack_groups import NodeStacks
from elastic_launch.core.progress.verdict import Verdict
from elastic_launch.core.rendezvous import records
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.core.rendezvous.records import (
    MAX_TICKETS,
    MAX_UNFIT,
    Closed,
    Consequence,
    Members,
    Unfit,
    decode,
    encode,
)
from elastic_launch.core.rendezvous.state import Phase
from elastic_launch.job import Assignment, End, EndKind, Policy
from tests.support.forging import (
    DEADLINE,
    DONE,
    ERROR,
    FAILED,
    FAILURE,
    FINAL,
    NONSENSE,
    SICK,
    STOP,
    STRANGER,
    finishes,
    forge,
    formed,
    job,
    refused,
)
from tests.support.simulation import Agent, World
from tests.support.stalls import VERDICT, Watch
from tests.support.training import Training
from tests.support.worlds import RESET, all_end, form, running, world


def re_forms(made: World, agents: list[Agent], used: int = 0) -> None:
    """These run in another round soon, and that has used so many restarts."""
    made.run(made.now + 4 * DEADLINE, stop=lambda: all(agent.running == 1 for agent in agents))
    assert [agent.running for agent in agents] == [1] * len(agents), f"{made}: {running(made)}"
    assert {assignment.restart_history.used for assignment in made.assignments[1].values()} == {used}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the records that are read line by line, one for each line."""
    keys: list[str] = []

    def noted(kind: type, data: bytes, key: str) -> Any:
        keys.append(key)
        return decode(kind, data, key)

    monkeypatch.setattr(records, "decode", noted)
    return keys


# --- the end


def test_nobody_believes_that_all_have_succeeded_while_its_own_workers_run() -> None:
    made = formed(3, job(3, 3))
    made.agents[0].succeed()
    made.run(made.now + 1)
    forge(made, "0/end", DONE)
    ends = finishes(made)
    assert [end.status for end in ends[1:]] == [69, 69]
    assert all(
        "elastic/job/0/end says that all workers succeeded, but this node's have not" in e.error for e in ends[1:]
    )
    assert ends[0] == Finish(), "its own part is done"


def test_nobody_believes_it_before_its_workers_start() -> None:
    made = world(2, job(2, 2))
    made.run(stop=lambda: "elastic/job/0/closed" in made.store.values)
    forge(made, "0/end", DONE)
    refused(made, "0/end", "says that all workers succeeded")


@pytest.mark.parametrize(
    ("record", "changes", "rule"),
    [
        (STOP, {"signum": 0}, "must have the failure, the signal, or the reason"),
        (STOP, {"signum": 63}, "signum: must be a signal"),
        (ERROR, {"status": 0}, "must have the failure, the signal, or the reason"),
        (ERROR, {"reason": ""}, "must have the failure, the signal, or the reason"),
        (FAILED, {"failures": []}, "must have the failure, the signal, or the reason"),
        (NONSENSE, {}, "is no JSON"),
        (b"x" * (8 << 20), {}, "bytes; 4194304 are allowed"),
    ],
)
def test_an_end_that_breaks_a_rule_is_named(record: NamedTuple | bytes, changes: dict[str, Any], rule: str) -> None:
    made = formed(3, job(3, 3))
    forge(made, "0/end", record, **changes)
    refused(made, "0/end", rule)


def test_a_record_that_breaks_no_rule_is_believed() -> None:
    made = formed(2, job(2, 2))
    forge(made, "0/end", ERROR)
    assert finishes(made) == [Finish(error="broken", status=1)] * 2


@pytest.mark.parametrize("node", ["nobody", ""])
def test_a_failure_of_no_member_costs_a_round_but_no_restart(node: str) -> None:
    made = formed(3, job(3, 3))
    forge(made, "0/end", FAILED._replace(node=node))
    re_forms(made, made.agents)
    lines = [line for agent in made.agents for line in agent.shown()]
    assert len([line for line in lines if "is no member; restarting without using up a restart" in line]) == 1
    all_end(made)


def test_it_costs_no_more_if_the_first_in_rank_dies() -> None:
    made = formed(3, job(2, 3))
    first = next(agent for agent in made.agents if agent.state.assignment and agent.state.assignment.group_rank == 0)
    first.kill()
    forge(made, "0/end", FAILED._replace(node="nobody"))
    re_forms(made, [agent for agent in made.agents if agent is not first])


@pytest.mark.parametrize("number", range(3))
def test_a_failure_in_a_members_name_costs_a_round_but_no_restart(number: int) -> None:
    made = formed(3, job(3, 3))
    forge(made, "0/end", FAILED._replace(node=f"node-{number}"))
    re_forms(made, made.agents)
    text = f"in the name of host-{number}, where nothing has failed; restarting without using up a restart"
    assert any(text in line for line in made.agents[number].shown())


@pytest.mark.parametrize("number", range(3))
def test_a_failure_in_the_name_of_a_member_that_is_done_and_gone_is_not_waited_for(number: int) -> None:
    made = formed(3, job(2, 3))
    made.agents[number].succeed()
    made.run(made.now + 2)
    made.agents[number].kill()
    made.run(made.now + 2 * DEADLINE)
    others = [agent for agent in made.agents if agent.number != number]
    assert [agent.running for agent in others] == [0, 0]
    forge(made, "0/end", FAILED._replace(node=f"node-{number}"))
    re_forms(made, others, used=1)


# --- what follows


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"failures": []}, "must have a failure, a signal, or an error with a status"),
        ({"failures": [{**vars(FAILURE), "exitcode": 256}]}, "failures: exitcode: must be"),
        ({"failures": [{**vars(FAILURE), "failed_at": 1e308}]}, "failures: failed_at: must be"),
        ({"failures": [], "signum": 63, "restart": True}, "signum: must be a signal"),
        ({"restart": True, "pause": 1e308}, "pause: must be a number of seconds from 0 to 1e+09"),
        ({"restart": True, "pause": 61.0}, "pause: must be at most 60 s (--restart-backoff), not 61"),
        ({"restart": True, "restart_history": {"ages": [float("nan")]}}, "restart_history: ages: must be"),
    ],
)
def test_a_decision_that_breaks_a_rule_is_named(changes: dict[str, Any], rule: str) -> None:
    made = formed(3, job(3, 3, Policy(3, backoff=1, backoff_limit=60)))
    forge(made, "0/decision", FINAL, **changes)
    made.agents[1].fail_worker(1)
    refused(made, "0/decision", rule)


def test_reports_of_no_members_are_ignored_and_told_of_once() -> None:
    made = formed(3, job(3, 3, Policy(0)))
    strange = encode(Consequence(replace(FAILURE, exitcode=99), "nobody"))
    forge(made, "0/consequences", b"\n".join([NONSENSE] * 5 + [strange, b""]))
    made.agents[1].fail_worker(1, RESET)
    made.run(made.now + 0.5)
    made.agents[2].fail_worker(7)
    ends = finishes(made)
    assert {end.failures[0].exitcode for end in ends} == {1}
    assert {failure.host for end in ends for failure in end.failures} <= {"host-0", "host-1", "host-2"}
    lines = [line for line in made.agents[1].shown() if "elastic/job/0/consequences is no JSON" in line]
    assert 1 <= len(lines) < 10


def test_a_report_that_follows_an_incomplete_line_counts() -> None:
    made = formed(3, job(3, 3, Policy(0)))
    forge(made, "0/consequences", NONSENSE.strip())
    made.agents[1].fail_worker(1, RESET)
    made.run(made.now + 0.01)  # it has ended the round, which nobody else knows yet
    made.agents[2].fail_worker(7)
    assert {end.failures[0].exitcode for end in finishes(made)} == {7}
    assert b"host-1" in made.store.values["elastic/job/0/end"]


def test_of_a_flood_of_reports_few_are_read(read: list[str]) -> None:
    made = formed(2, job(2, 2, Policy(0)))
    forge(made, "0/consequences", b"{}\n" * (2 << 20))
    made.agents[1].fail_worker(1)
    assert {end.failures[0].host for end in finishes(made)} == {"host-1"}
    assert 0 < read.count("elastic/job/0/consequences") < 100


@pytest.mark.parametrize("lost", [NONSENSE, encode(END_OF_NOBODY := End(EndKind.MEMBERSHIP_CHANGED, "x", gone=("y",)))])
def test_a_loss_of_no_members_is_ignored(lost: bytes) -> None:
    made = formed(3, job(3, 3, Policy(0)))
    forge(made, "0/lost", lost)
    made.agents[1].fail_worker(1, RESET)
    assert {end.failures[0].host for end in finishes(made)} == {"host-1"}


# --- who is there


@pytest.mark.parametrize("count", [MAX_TICKETS + 1, 200_000, 10**9])
@pytest.mark.parametrize("is_early", [True, False])
def test_tickets_have_a_bound(count: int, is_early: bool) -> None:
    made = world(0 if is_early else 1, job(2, 2, join_timeout=30))
    made.run(made.now + 2)
    forge(made, "0/ticket", b"%d" % count)
    for _ in range(2):
        made.add()
    refused(made, "0/ticket", "must be a number from 0 to 65536")


@pytest.mark.parametrize("is_early", [True, False])
def test_tickets_count_from_1(is_early: bool) -> None:
    made = world(0 if is_early else 1, job(2, 2, join_timeout=30))
    made.run(made.now + 2)
    forge(made, "0/ticket", b"-1")
    made.add()
    ends = finishes(made)
    assert any("elastic/job/0/ticket must " in end.error for end in ends)
    assert {end.status for end in ends} <= {69, 75}


@pytest.mark.timeout(60)  # if each record that is missing cost work for each other one, it would take minutes
@pytest.mark.parametrize("count", [20_000, MAX_TICKETS - 5])
def test_tickets_of_nobody_cost_little(count: int) -> None:
    made = world(1, job(2, 2))
    made.run(made.now + 2)
    forge(made, "0/ticket", b"%d" % count)
    made.add()
    form(made, 2)
    all_end(made)


@pytest.mark.parametrize(
    "changes", [{"workers": 0}, {"host": 5}, {"rank": 10**9}, {"known_round": 7}, {"node": "\ud800"}]
)
def test_a_node_that_breaks_a_rule_is_ignored(changes: dict[str, Any]) -> None:
    made = World(1, job(2, 2))
    made.trouble = False
    made.add()
    made.run(made.now + 2)
    forge(made, "0/ticket", b"2")
    forge(made, "0/node/2", STRANGER, options=made.settings.options, **changes)
    made.run(made.now + 2)
    made.add()
    form(made, 2)
    lines = [line for line in made.agents[0].shown() if "ignored a node" in line]
    assert len(lines) == 1
    assert "elastic/job/0/node/2 " in lines[0]
    all_end(made)


def test_a_stranger_that_breaks_no_rule_joins() -> None:
    made = world(1, job(2, 2))
    made.run(made.now + 2)
    forge(made, "0/ticket", b"2")
    forge(made, "0/node/2", STRANGER, options=made.settings.options)
    made.run(made.now + 2)
    assert [agent.running for agent in made.agents] == [0]
    [end] = finishes(made)
    assert end.error.startswith("lost elsewhere; still there: host-0")


def test_a_stranger_in_place_of_the_leader_is_named() -> None:
    made = world(0, job(2, 2, join_timeout=30))
    forge(made, "0/node/1", STRANGER, workers=0)
    made.add()
    made.run(made.now + 1)
    [end] = finishes(made)
    assert end.status == 69
    assert "elastic/job/0/node/1 workers: must be" in end.error


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"local_world_size": 1}, "local_world_size: must be 2, not 1"),
        ({"local_world_size": 10**6}, "local_world_size: must be a whole number"),
        ({"group_world_size": 1, "group_rank": 0}, "group_world_size: must be 2, not 1"),
        ({"restart_count": 7}, "restart_count: must be 0, not 7"),
        ({"base_rank": 3}, "must have ranks below the number of nodes or workers"),
        ({"master_port": 10**6}, "master_port: must be"),
    ],
)
def test_a_place_that_is_not_the_nodes_own_is_named(changes: dict[str, Any], rule: str) -> None:
    made = world(2, job(2, 2))
    key = "0/assignment/0/2"
    made.run(stop=lambda: f"elastic/job/{key}" in made.store.values)
    forge(made, key, made.store.values[f"elastic/job/{key}"], **changes)
    made.run(made.now + 4 * DEADLINE, stop=lambda: any(agent.finish for agent in made.agents))
    [end] = [agent.finish for agent in made.agents if agent.finish]
    assert (end.status, end.failures) == (69, ())
    assert f"elastic/job/{key} {rule}" in end.error


@pytest.mark.parametrize("closed", [Closed(0, 2, 2), Closed(3, 1, 2), Closed(-1, 0, 2)])
@pytest.mark.parametrize("is_same", [True, False])
def test_a_round_that_no_leader_has_closed_ends(closed: Closed, is_same: bool) -> None:
    made = world(2, job(3, 3, join_timeout=60))
    made.run(made.now + 3)
    forge(made, "0/closed", closed._replace(options=made.settings.options if is_same else "--nnodes=1:1"))
    ends = finishes(made)
    assert {end.status for end in ends} <= {2, 69, 75}, ends
    assert all(end.error for end in ends)


@pytest.mark.parametrize(
    ("members", "rule"),
    [
        (Members((1,), ("node-0",), ("host-0",)), "must name 2 nodes, not 1"),
        (Members((1, 2), ("x", "y"), ("host-0", "host-1")), "must name node-"),
        (b'{"tickets":[1,2],"nodes":["x"],"hosts":[]}', "must have lists of one length"),
    ],
)
def test_members_that_the_leader_has_not_named_are_refused(members: NamedTuple | bytes, rule: str) -> None:
    made = world(2, job(2, 2))
    made.run(stop=lambda: "elastic/job/0/closed" in made.store.values)
    forge(made, "0/members/0", members)
    made.run(made.now + 4 * DEADLINE, stop=lambda: any(agent.finish for agent in made.agents))
    [end, *_] = [agent.finish for agent in made.agents if agent.finish]
    assert end.status == 69
    assert f"elastic/job/0/members/0 {rule}" in end.error


def test_a_round_number_of_nobody_is_named() -> None:
    made = world(0, job(2, 2, join_timeout=30))
    forge(made, "round", b"9" * 18)
    made.add()
    made.add()
    refused(made, "round", "must be a number from 0 to 2147483648")


# --- stalls


def watched() -> tuple[World, list[Watch]]:
    """A job of three nodes, with what watches their progress."""
    made = World(1, job(3, 3))
    made.trouble = False
    watches = [Watch(made.add(rank=number)) for number in range(3)]
    form(made, 3)
    made.run(made.now + 2)
    return made, watches


def goes_on(made: World) -> None:
    """The job still runs in its first round."""
    made.run(made.now + 2 * DEADLINE)
    assert running(made) == [0, 0, 0], [line for agent in made.agents for line in agent.shown()]


def lines_of(made: World, text: str) -> list[str]:
    return [line for agent in made.agents for line in agent.shown() if text in line]


BLAME = Judgement(Verdict((0,), "it loops", "train.py:4 in step", True, "lock"), 0, "forged")
HUGE = b"x" * (8 << 20)


@pytest.mark.parametrize("verdict", [BLAME, NONSENSE, HUGE], ids=["good", "nonsense", "huge"])
def test_a_verdict_on_workers_that_make_progress_is_not_even_read(verdict: NamedTuple | bytes) -> None:
    made, watches = watched()
    for number in (1, 2, -1):
        forge(made, f"0/verdict/{number}", verdict)
        forge(made, f"0/stacks/{number}/1", NONSENSE)
    goes_on(made)
    assert not any(watch.events for watch in watches)
    assert not lines_of(made, "ignored")


@pytest.mark.parametrize(
    "verdict", [NONSENSE, HUGE, b'{"verdict":{},"blamed":0,"text":""}'], ids=["nonsense", "huge", "empty"]
)
def test_a_verdict_that_breaks_a_rule_is_ignored_with_a_line(verdict: bytes) -> None:
    made, watches = watched()
    forge(made, "0/verdict/1", verdict)
    for watch in watches[1:]:
        watch.claim()
    watches[0].is_mute = True  # the judge waits for its stacks, so nobody replaces the verdict
    watches[0].claim()
    goes_on(made)
    lines = lines_of(made, "ignored a verdict: ")
    assert len(lines) == 2, "each node that awaits it says so once"
    assert all("elastic/job/0/verdict/1 " in line for line in lines)
    assert not any(watch.of(Judged) for watch in watches)


def test_a_verdict_that_nobody_asked_for_reaches_no_more_than_who_waits_for_one() -> None:
    made, watches = watched()
    forge(made, "0/stall", b"1")
    forge(made, "0/verdict/2", BLAME)
    watches[1].claim()
    goes_on(made)
    assert not any(watch.events for watch in watches)


def test_stacks_that_break_a_rule_are_ignored_with_a_line_and_their_node_is_judged_without_them() -> None:
    made, watches = watched()
    watches[2].is_mute = True
    ticket = watches[2].agent.node.round.ticket
    forge(made, f"0/stacks/1/{ticket}", NodeStacks("elsewhere", 1.0, (), (), (), ()), stacks=[[0]])
    for watch in watches:
        watch.claim()
    goes_on(made)
    assert all(watch.of(Judged) == [Judged(1, VERDICT, 3, "the stacks")] for watch in watches[:2])
    hosts = [event.stacks.host for watch in watches for event in watch.of(StacksArrived)]  # type: ignore[union-attr]
    assert sorted(hosts) == ["host-0", "host-1"]
    [line] = lines_of(made, "ignored stacks: ")
    assert f"elastic/job/0/stacks/1/{ticket} must have a stack for each group" in line


@pytest.mark.parametrize("name", ["stalled", "stall", "look", "stalled/1"])
@pytest.mark.parametrize("value", [b"x", b"-1", b"9" * 18, b"2147483649"])
def test_the_number_of_a_stall_has_a_bound(name: str, value: bytes) -> None:
    made, watches = watched()
    forge(made, f"0/{name}", value)
    if "/" in name:
        watches[1].claim()
    ends = finishes(made)
    assert any(f"elastic/job/0/{name} must be a number from 0 to 2147483648" in end.error for end in ends), ends
    assert {end.status for end in ends} == {69}


@pytest.mark.parametrize("number", [1, 7, 2**31])
def test_a_stall_that_no_member_has_claimed_costs_nothing(number: int) -> None:
    made, watches = watched()
    for name in ("stalled", "stalled/1", "stall"):
        forge(made, f"0/{name}", b"%d" % number)
    goes_on(made)
    assert not any(watch.events for watch in watches)


def test_a_stall_of_the_greatest_number_is_not_counted_further() -> None:
    made, watches = watched()
    forge(made, "0/stall", b"%d" % 2**31)
    for watch in watches:
        watch.claim()
    goes_on(made)
    assert not any(watch.of(Judged) for watch in watches)


@pytest.mark.parametrize("number", [1, 7, 2**31])
def test_a_forged_wish_for_stacks_costs_one_look_and_ends_no_job(number: int) -> None:
    made, watches = watched()
    forge(made, "0/look", b"%d" % number)
    goes_on(made)
    assert all(watch.of(StacksWanted) == [StacksWanted(-number)] for watch in watches)
    watches[1].ask(RequestStacks())
    goes_on(made)
    assert len(watches[1].of(Judged)) == 1


# --- health checks


def checked(count: int, settings: Settings, *unfit: int) -> World:
    """A job whose nodes are checked before each round; those with these numbers fail always."""
    made = World(1, settings)
    made.trouble = False
    made.check = lambda agent: (0.5, agent.number not in unfit)
    for _ in range(count):
        made.add()
    return made


def test_a_note_that_breaks_a_rule_is_ignored_with_one_line() -> None:
    made = world(1, job(2, 2))
    forge(made, "0/unfit", b"\n".join([NONSENSE] * 3 + [encode(SICK), b""]))
    made.run(made.now + 8)
    assert len(lines_of(made, "elastic/job/0/unfit is no JSON")) == 1, "however often it is read"
    assert len(lines_of(made, "elsewhere: health check failed: the fan is loud; waiting for it")) == 1
    made.add()
    form(made, 2)
    all_end(made)


@pytest.mark.parametrize("count", [1, 500])
def test_of_a_flood_of_notes_few_are_read_and_fewer_are_shown(count: int, read: list[str]) -> None:
    made = world(1, job(2, 2))
    notes = [encode(Unfit(STRANGER._replace(node=f"node-{n}-of-nobody"), "x")) for n in range(count)]
    forge(made, "0/unfit", b"\n".join([*notes, *[b"{}"] * (2 << 20)]))
    made.run(made.now + 10)
    assert count < read.count("elastic/job/0/unfit") < count + 20, "and each only once"
    assert 1 <= len(lines_of(made, "health check failed")) < 12
    made.add()
    form(made, 2)


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_note_in_a_members_name_costs_a_round_at_most(is_gone: bool) -> None:
    made = formed(3, job(2, 3))
    victim = made.agents[1]
    victim.stop_time = 0.0  # nobody waits for it, so the next round could begin before its workers have stopped
    forge(made, "1/unfit", encode(Unfit(victim.node.record, "forged", is_gone)) + b"\n")
    made.agents[0].fail_worker(1)
    made.run(made.now + 60, stop=lambda: all((agent.running or 0) >= 1 for agent in made.agents))
    form(made, 3)
    last = max(made.assignments)
    assert last <= 2
    assert {assignment.restart_history.used for assignment in made.assignments[last].values()} == {1}


def test_a_store_whose_host_is_said_to_be_unfit_is_waited_for_until_join_timeout() -> None:
    made = formed(2, job(2, 2, join_timeout=30))
    forge(made, "0/unfit", encode(SICK._replace(record=STRANGER._replace(serves=True))) + b"\n")
    made.agents[0].fail_worker(1)
    ends = finishes(made)
    assert {end.status for end in ends} == {75}
    assert all("gave up (join_timeout=30 s)" in end.error for end in ends)


def test_an_unfit_node_believes_no_round_that_is_over_before_it_began() -> None:
    made = checked(1, job(2, 2, join_timeout=300), 0)
    made.run(made.now + 2)
    forge(made, "0/closed", Closed(-1, 0, 2))
    refused(made, "0/closed", "says that there is no round, but nobody has ended it")


def test_an_unfit_node_makes_no_longer_a_pause_than_its_job() -> None:
    made = checked(3, job(2, 3, Policy(3, backoff=1, backoff_limit=60)), 2)
    form(made, 2)
    forge(made, "0/decision", FINAL, restart=True, pause=1e8)
    made.agents[0].fail_worker(1)
    refused(made, "0/decision", "pause: must be at most 60 s (--restart-backoff), not 1e+08")


@pytest.mark.parametrize("value", [b"x", b"9" * 18])
def test_an_unfit_node_is_led_to_no_round_of_nobody(value: bytes) -> None:
    made = checked(1, job(2, 2, join_timeout=300), 0)
    forge(made, "round", value)
    refused(made, "round", "must be a number from 0 to 2147483648")


def test_what_a_check_writes_keeps_to_the_rules() -> None:
    made = checked(0, job(1, 2), 1)
    made.check_output = "GPU 3: \x9b2J" + "x" * 8000
    made.add()
    made.add()
    form(made, 1)
    made.run(made.now + 5)
    note, *_ = made.store.values["elastic/job/0/unfit"].strip().split(b"\n")
    read = decode(Unfit, note, "key")
    assert len(json.loads(note)["reason"]) <= MAX_UNFIT
    assert read.reason.startswith("GPU 3: \\x9b2Jxx")
    assert read.reason.endswith("xx (exit code 1)")
    assert made.agents[1].node.phase is Phase.UNFIT


# --- stopping at the same step


def stepping(count: int, settings: Settings) -> World:
    """A job whose workers call ``should_stop()``."""
    made = World(1, settings)
    made.trouble = False
    made.training = Training(made)
    for _ in range(count):
        made.add()
    form(made, count)
    made.run(made.now + 5)
    return made


def keep_forging(made: World, name: str, value: bytes) -> None:
    """Write a key again and again, for a while in which its owner writes it, too."""

    def forge_again() -> bool:
        forge(made, name, value)
        return not made.live()

    made.run(made.now + 3, stop=forge_again)


@pytest.mark.parametrize("value", [b"x", b"-1", b"9" * 18, b"9" * 40])
@pytest.mark.parametrize(("name", "high"), [("calls/2", 10**15), ("stop_at", 10**15 + 1)])
def test_the_call_at_which_workers_stop_has_a_bound(name: str, high: int, value: bytes) -> None:
    made = stepping(2, job(2, 2))
    made.agents[0].signal()
    keep_forging(made, f"0/{name}", value)
    ends = finishes(made)
    assert any(f"elastic/job/0/{name} must be a number from 0 to {high}" in end.error for end in ends), ends


@pytest.mark.parametrize("name", ["calls/2", "stop_at"])
@pytest.mark.parametrize("value", [1, 10**15])
def test_a_forged_call_keeps_no_worker_from_stopping(name: str, value: int) -> None:
    made = stepping(2, job(2, 2))
    made.agents[0].signal()
    keep_forging(made, f"0/{name}", b"%d" % value)
    assert [(end.signum, end.error) for end in finishes(made)] == [(15, ""), (15, "")]


def test_an_end_at_the_same_step_that_nobody_decides_on_keeps_no_worker_from_stopping() -> None:
    made = stepping(2, job(2, 2))
    forge(made, "0/end", STOP._replace(same_step=True))
    assert [(end.signum, end.error) for end in finishes(made)] == [(15, ""), (15, "")]


# --- any of it


def test_no_forged_record_makes_an_unfinished_job_end_well() -> None:
    """Each record of a round, of any kind, under each key of a round, before it and in it."""
    keys = ["end", "decision", "closed", "members/0", "assignment/0/1", "assignment/0/2", "node/1", "node/2", "lost"]
    keys += ["consequences", "reported", "all_reported", "left", "all_left", "succeeded", "succeeded/1", "status"]
    keys += ["leader/1", "monitor/1", "ticket", "stall", "stalled", "look", "stop_at", "calls/1", "verdict/1", "unfit"]
    place = Assignment(0, 2, 0, 4, 2, 0, 4, "10.0.0.1", 29500, "elsewhere", False)
    values: list[NamedTuple | bytes] = [DONE, STOP, ERROR, FAILED, FINAL, Closed(0, 2, 2), STRANGER, place, SICK]
    values += [Members((1, 2), ("node-0", "node-1"), ("a", "b")), b"1", b"7", b"99999999999999999999", b"\xff{"]
    for key in keys:
        for value in values:
            for is_early in (True, False):
                made = world(2, job(2, 2, join_timeout=20))
                if is_early:
                    forge(made, f"0/{key}", value) if key != "ticket" or value in (b"1", b"7") else None
                made.run(made.now + 5)
                if not is_early:
                    forge(made, f"0/{key}", value)
                    made.agents[1].fail_worker(3) if key in ("decision", "consequences", "lost") else None
                made.run(made.now + 3 * DEADLINE, stop=lambda made=made: not made.live())  # type: ignore[misc]
                well = [agent for agent in made.agents if agent.finish == Finish()]
                assert not well, (key, value, is_early)
