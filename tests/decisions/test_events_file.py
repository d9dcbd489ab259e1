"""What the events file says about each step of an agent's life, and the page that says what may be in it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from elastic_launch.agent.journal_writer import JournalWriter, as_json
from elastic_launch.core.agent import lifecycle
from elastic_launch.core.agent.journal import (
    MAX_CAUSE,
    MAX_CONSEQUENCE,
    MAX_FAILURES,
    Entry,
    Journal,
    failure_facts,
)
from elastic_launch.core.agent.lifecycle import AgentState, Transition
from elastic_launch.core.agent.messages import (
    Action,
    AgentEvent,
    Assigned,
    DeadlineReached,
    Decided,
    Ended,
    Exited,
    GroupReaped,
    Hung,
    LeaseExpired,
    Limits,
    Signalled,
    Started,
    StopAgreed,
)
from elastic_launch.core.agent.restart_policy import CAUSES, UNKNOWN_CHANGE
from elastic_launch.core.agent.root_cause import ErrorRecord, Evidence, Exit
from elastic_launch.core.progress.goodput import RoundProgress
from elastic_launch.errors import ProcessFailure
from elastic_launch.job import (
    Assignment,
    Change,
    Decision,
    End,
    EndKind,
    Goodput,
    Level,
    LostTime,
    Policy,
    RestartHistory,
)
from tests.support import event_lines

ASSIGNMENT = Assignment(1, 3, 2, 6, 2, 2, 6, "127.0.0.1", 29500, "host-b", port_picked=True)
ALONE = ASSIGNMENT._replace(group_rank=0, group_world_size=1, base_rank=0, world_size=2)
PIDS = {0: 100, 1: 101}
BOOM = Evidence(ErrorRecord("ValueError: boom", "Traceback", 1049.5, "error.json"))
FAILURE = ProcessFailure(0, 100, 1, error="ValueError: boom", traceback="Traceback", failed_at=1049.5, rank=2, host="b")
FAILED = End(EndKind.FAILED, "rank 2 failed", failures=(FAILURE,))
LOST = End(
    EndKind.MEMBERSHIP_CHANGED, "no heartbeat from host-c for 15 s", gone=("host-c-7-ab",), change=Change.NODE_LOST
)
AGAIN = Decision(True, RestartHistory(used=1), (FAILURE,))


class Agent:
    """An agent whose clock shows one second more at each event, and what it writes."""

    def __init__(self, assignment: Assignment = ASSIGNMENT) -> None:
        self.now = 50.0
        self.journal = Journal("train.py", 2, 3, self.now)
        self.state, actions = lifecycle.begin(Limits(Policy(3), 30))
        self.entries = self.journal.observe(Transition(None, None, self.state, actions, self.now, self.time))
        self.assignment = assignment

    @property
    def time(self) -> float:
        """The host's clock, in seconds since 1970."""
        return self.now + 1000

    def __call__(self, *events: AgentEvent) -> list[Entry]:
        """Handle events. Return what the last one leads to."""
        entries: list[Entry] = []
        for event in events:
            self.now += 1
            entries = self._step(event)
            self.entries += entries
        return entries

    def _step(self, event: AgentEvent) -> list[Entry]:
        before: AgentState = self.state
        actions: list[Action]
        self.state, actions = lifecycle.step(before, event, self.now)
        return self.journal.observe(Transition(before, event, self.state, actions, self.now, self.time))

    def running(self) -> Agent:
        self(Assigned(self.assignment), Started(PIDS))
        return self


def exited(rank: int, code: int = 0, stop: tuple[int, ...] = (), evidence: Evidence = BOOM) -> Exited:
    return Exited(Exit(rank, code, 1050.0, stop), evidence if code else Evidence())


def names(entries: list[Entry]) -> list[str]:
    return [entry.name for entry in entries]


def test_life_of_a_job_with_a_failure() -> None:
    agent = Agent(ALONE).running()
    agent(exited(0, 1), Ended(FAILED._replace(mine=True), 0.0), exited(1, -15, (15,)), GroupReaped({}), Decided(AGAIN))
    agent(Assigned(ALONE._replace(restart_count=1, restart_history=AGAIN.restart_history)), Started(PIDS))
    agent(exited(0), exited(1), GroupReaped({}), Ended(End(EndKind.DONE, ""), 0.0), Decided(Decision(False)))
    assert names(agent.entries) == [
        "joined",
        "formed",
        "started",
        "failed",
        "stopping",
        "message",
        "stopped",
        "restarting",
        "joined",
        "re_formed",
        "started",
        "succeeded",
        "stopped",
        "ended",
    ]
    by_name = {entry.name: entry for entry in agent.entries}
    assert by_name["failed"].facts["error"] == "ValueError: boom"
    assert by_name["failed"].facts["seconds"] == by_name["stopping"].facts["seconds"] == 3.5  # 1053 - 1049.5
    assert by_name["restarting"].facts["cause"] == "failed"
    assert by_name["restarting"].facts["failures"][0]["traceback"] == "Traceback"
    assert by_name["re_formed"].facts["downtime"] == 5.0
    assert by_name["ended"].facts["outcome"] == "succeeded"
    assert by_name["ended"].facts["restarts"] == 1
    assert [(entry.round, entry.group_rank) for entry in agent.entries if entry.name in ("joined", "started")] == [
        (None, None),
        (0, 0),
        (None, None),
        (1, 0),
    ]
    assert names([entry for entry in agent.entries if entry.of_job]) == ["formed", "restarting", "re_formed", "ended"]


def test_every_log_line_is_the_text_of_one_event() -> None:
    agent = Agent(ALONE).running()
    agent(exited(0, 1), Ended(FAILED._replace(mine=True), 0.0), exited(1, -15, (15,)))
    agent(GroupReaped({}, ("sleep (pid 7)",)), Decided(AGAIN))
    lines = [(entry.name, entry.level, entry.text) for entry in agent.entries if entry.text]
    assert lines == [
        ("formed", Level.INFO, "formed: 1 node, 2 workers"),
        ("message", Level.WARNING, "rank 2 failed: stopping 1 worker"),
        ("stopped", Level.WARNING, "killed processes that the workers left behind: sleep (pid 7)"),
        ("restarting", Level.WARNING, "rank 2 failed (exit code 1, ValueError: boom): restart 1 of 3"),
    ]


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (LOST, "node_lost"),
        (End(EndKind.MEMBERSHIP_CHANGED, "host-c is leaving (SIGTERM)", rank=2, change=Change.NODE_LEFT), "node_left"),
        (End(EndKind.MEMBERSHIP_CHANGED, "1 more node can join", change=Change.NODE_JOINING), "node_joining"),
        (End(EndKind.MEMBERSHIP_CHANGED, "no answer for 9 s", change=Change.CUT_OFF, mine=True), "cut_off"),
        (End(EndKind.MEMBERSHIP_CHANGED, "the store was restarted", change=Change.STORE_RESTARTED), "store_restarted"),
        (End(EndKind.MEMBERSHIP_CHANGED, "something new"), "membership_changed"),
    ],
)
def test_each_change_of_membership_has_its_event_and_is_a_cause(end: End, cause: str) -> None:
    agent = Agent().running()
    first, stopping = agent(Ended(end, 0.0))
    assert first.name == cause
    assert first.facts == {"reason": end.reason, "lost": list(end.gone)}
    assert first.text.startswith(end.reason)
    assert (stopping.name, stopping.facts) == ("stopping", {"cause": cause, "workers": 2, "seconds": None})
    restarting = agent(
        exited(0, -15, (15,)), exited(1, -15, (15,)), GroupReaped({}), Decided(Decision(True, gone=end.gone))
    )[0]
    assert (restarting.name, restarting.facts["cause"]) == ("restarting", cause)


def test_a_node_that_was_lost_during_a_failure_is_the_cause() -> None:
    agent = Agent().running()
    agent(Ended(FAILED, 0.0), exited(0, -15, (15,)), exited(1, -15, (15,)), GroupReaped({}))
    assert agent(Decided(Decision(True, gone=("host-c-7-ab",))))[0].facts["cause"] == "node_lost"


def test_a_taken_port_is_a_cause_of_its_own() -> None:
    agent = Agent(ALONE).running()
    agent(exited(0, 1), Ended(FAILED, 0.0), exited(1, -15, (15,)), GroupReaped({}))
    entry = agent(Decided(Decision(True, RestartHistory(uncharged=1), (FAILURE,))))[0]
    assert entry.facts["cause"] == "port_taken"


def test_workers_that_the_agent_stopped_have_not_failed() -> None:
    agent = Agent().running()
    agent(Ended(LOST, 0.0))
    assert agent(exited(0, 1, (15,))) == []
    assert names(agent(exited(1, 1))) == ["failed"]


def test_workers_that_the_keeper_killed_have_not_failed() -> None:
    agent = Agent().running()
    assert names(agent(LeaseExpired())) == ["lease_expired", "stopping"]
    assert agent(exited(0, -9)) == []


def test_a_signal_that_ends_a_job_of_one_node_stops_it_and_on_several_this_node_leaves() -> None:
    for assignment, outcome in ((ALONE, "stopped"), (ASSIGNMENT, "left")):
        agent = Agent(assignment).running()
        assert names(agent(Signalled(15, 0.0))) == ["signalled", "stopping"]
        assert names(agent(Signalled(15, 1.0))) == ["signalled", "killed"]
        stopped, ended = agent(exited(0, -9, (15, 9)), exited(1, -9, (15, 9)), GroupReaped({}))
        assert (stopped.name, ended.name) == ("stopped", "ended")
        assert (ended.facts["outcome"], ended.facts["status"]) == (outcome, 143)
        assert ended.of_job == (outcome == "stopped")


def test_a_job_that_ends_before_the_node_has_a_place() -> None:
    agent = Agent()
    [entry] = agent(Decided(Decision(False, error="not enough nodes", status=75)))
    assert (entry.name, entry.facts["outcome"], entry.facts["status"]) == ("ended", "error", 75)
    assert entry.group_rank is entry.round is None


def test_seams_for_progress() -> None:
    agent = Agent().running()
    [first] = agent.journal.first_step(2, agent.now + 2)
    assert (first.name, first.facts, first.elapsed) == ("first_step", {"rank": 2, "seconds": 2.0}, 4.0)
    assert agent.journal.first_step(3, agent.now + 3) == []
    stall = agent.journal.stall("rank 3 is not in the all_reduce", 61.25, 3, "report", agent.now + 70)
    assert (stall.name, stall.of_job, stall.elapsed) == ("stalled", True, 72.0)
    for entry in (first, stall, agent.journal.error("store lost", 69, agent.now), agent.journal.message("x", None, 0)):
        event_lines.check(json.loads(json.dumps(as_json(entry, 1.0, {"job": "j", "attempt": 0}, AGENT))))


AGENT: dict[str, Any] = {"host": "host-b", "pid": 7}


def test_a_first_step_that_nobody_has_seen_is_written_when_the_round_is_over() -> None:
    agent = Agent().running()
    agent(Ended(LOST, 0.0), exited(0, -15, (15,)), exited(1, -15, (15,)))
    first, stopped = agent(GroupReaped({}, progress=RoundProgress(7, first=52.5, last=52.9)))
    assert (first.name, first.elapsed, first.facts) == ("first_step", 2.5, {"rank": None, "seconds": 0.5})
    assert (stopped.name, stopped.elapsed) == ("stopped", 6.0)


def test_a_hang_is_a_failure_of_the_rank_that_is_blamed_and_a_cause() -> None:
    agent = Agent(ALONE).running()
    failed, stopping = agent(Hung(1, "is stopped by a signal", "the stacks", 1053.0))
    assert (failed.name, failed.facts["rank"], failed.facts["how"]) == ("failed", 1, "hang")
    assert (stopping.name, stopping.facts["cause"]) == ("stopping", "hang")
    assert agent.state.hang
    end = FAILED._replace(mine=True, failures=(agent.state.hang,))
    agent(Ended(end, 0.0), exited(0, -15, (15,)), exited(1, -15, (15,)), GroupReaped({}))
    entry = agent(Decided(Decision(True, RestartHistory(used=1), (agent.state.hang,))))[0]
    assert (entry.facts["cause"], entry.facts["failures"][0]["traceback"]) == ("hang", "the stacks")


def test_workers_that_stop_at_the_same_step_are_stopped_once() -> None:
    agent = Agent(ALONE).running()
    signalled, stopping = agent(Signalled(15, 1053.0, calls=4))
    assert (signalled.name, stopping.name, stopping.facts["cause"]) == ("signalled", "stopping", "signalled")
    agent(Ended(End(EndKind.STOP, "stopping", signum=15, same_step=True, mine=True), 0.0), DeadlineReached(calls=4))
    [agreed] = agent(StopAgreed(5))
    assert (agreed.name, agreed.facts, agreed.level) == ("stop_agreed", {"stop_at": 5}, Level.INFO)
    assert agent(exited(0)) == agent(exited(1)) == []
    assert names(agent(GroupReaped({}))) == ["stopped", "ended"]


def test_the_account_of_the_time_goes_with_the_end() -> None:
    agent = Agent(ALONE).running()
    made = Goodput(120, 60.0, 2.0, 1, LostTime(1, 2, 3, 4), 5.0, 7, since=LostTime(0.5))
    agent(exited(0), exited(1), GroupReaped({}), Ended(End(EndKind.DONE, ""), 0.0))
    entry = agent(Decided(Decision(False, RestartHistory(goodput=made))))[0]
    account = {
        "steps": 120,
        "repeated": 7,
        "in_steps": 60.0,
        "startup": 2.0,
        "stalled": 5.0,
        "lost": 10.0,
        "elapsed": 77.5,
    }
    assert entry.facts["goodput"] == account
    event_lines.check(json.loads(json.dumps(as_json(entry, 1.0, {"job": "j", "attempt": 0}, AGENT))))


def test_everything_that_is_written_is_on_the_page() -> None:
    agent = Agent().running()
    agent(exited(0, 1), Ended(FAILED._replace(mine=True), 0.0), exited(1, -15, (15,)), GroupReaped({}), Decided(AGAIN))
    agent(Assigned(ASSIGNMENT._replace(restart_count=1)), Started({0: 100}), Signalled(15, 0.0), Signalled(15, 1.0))
    agent(exited(0, -9, (15, 9)), exited(1, -9, (15, 9)), GroupReaped({}))
    for entry in agent.entries:
        event_lines.check(json.loads(json.dumps(as_json(entry, 1.0, {"job": "j", "attempt": 0}, AGENT))))


def test_the_check_against_the_page_finds_what_is_wrong() -> None:
    good = json.loads(json.dumps(as_json(Agent().entries[0], 1.0, {"job": "j", "attempt": 0}, AGENT)))
    event_lines.check(good)
    wrong: list[dict[str, Any]] = [
        {"name": "jonied"},
        {"extra": 1},
        {"workers": True},
        {"workers": "2"},
        {"time": None},
    ]
    for change in [*wrong, {"text": None}, {"scope": "agent"}]:
        with pytest.raises(AssertionError):
            event_lines.check({**good, **change})
    with pytest.raises(AssertionError):
        event_lines.check({name: value for name, value in good.items() if name != "workers"})


def test_the_page_names_the_causes_that_there_are() -> None:
    """Those of restarts: failures, and the changes of membership."""
    [row] = [line for line in event_lines.PAGE.read_text().splitlines() if line.startswith("| `cause`")]
    _, restarts = row.split("for `restarting`")
    changes = {change.value for change in Change if change}
    assert set(re.findall(r"`(\w+)`", restarts)) == set(CAUSES)
    assert changes < set(CAUSES)
    assert {UNKNOWN_CHANGE, *changes} <= event_lines.EVENTS.keys()


def test_the_size_of_an_event_is_bounded() -> None:
    long = ProcessFailure(0, 1, 1, error="E" * 10_000, traceback="x" * 1_000_000, rank=0)
    facts = failure_facts(long, MAX_CONSEQUENCE)
    assert len(facts["error"]) < 600
    assert len(facts["traceback"]) < MAX_CONSEQUENCE + 100
    agent = Agent(ALONE).running()
    agent(exited(0, 1), Ended(FAILED, 0.0), exited(1, -15, (15,)), GroupReaped({}))
    entry = agent(Decided(Decision(False, failures=(long,) * 1000)))[0]
    assert len(entry.facts["failures"]) == MAX_FAILURES
    assert len(json.dumps(entry.facts)) < MAX_CAUSE + MAX_FAILURES * (MAX_CONSEQUENCE + 1500)


class Lines:
    """A file in memory."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.append = self.lines.append

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def close(self) -> None: ...


@pytest.mark.parametrize(("text", "attempt"), [("", 0), ("2", 2), ("-1", 0), ("many", 0)])
def test_an_attempt_is_what_the_scheduler_counts(text: str, attempt: int) -> None:
    file: Any = Lines()
    writer = JournalWriter([file], "job", "train.py", 2, 3, text)
    writer.record_line("store lost: \udcff")
    writer.record_error("no store", 69)
    writer.record_stall("nobody advances", 60.0, None, "report")
    writer.record_first_step(0, 1.0)  # the node has no place in a round
    for event in file.events():
        event_lines.check(event)
        assert (event["job"], event["attempt"]) == ("job", attempt)
    assert file.events()[0]["text"] == "store lost: \udcff"
    assert abs(file.events()[0]["time"] - file.events()[1]["time"]) < 60
