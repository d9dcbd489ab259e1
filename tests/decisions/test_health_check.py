"""The health check in the agent's life cycle: when it runs, what a failure leads to, and when the node gives up."""

from __future__ import annotations

from signal import SIGTERM

import pytest

from elastic_launch.core.agent import lifecycle
from elastic_launch.core.agent.journal import Journal
from elastic_launch.core.agent.lifecycle import CHECK_PAUSE, KILL_PATIENCE, MAX_CHECK_PAUSE, AgentPhase, Transition
from elastic_launch.core.agent.messages import (
    Action,
    AgentEvent,
    Assigned,
    CheckFailed,
    CheckLimits,
    CheckPassed,
    DeadlineReached,
    Decided,
    Ended,
    Exited,
    Finish,
    GroupReaped,
    Leave,
    Limits,
    Log,
    ReportFailure,
    ReportRound,
    RequestJoin,
    RestartRequested,
    RunCheck,
    Signalled,
    Started,
    StopCheck,
    UserSignalled,
    Withdraw,
)
from elastic_launch.core.agent.root_cause import Exit
from elastic_launch.core.status import Meeting, waits_for
from elastic_launch.errors import ExitCode, UsageError
from elastic_launch.job import Assignment, Decision, End, EndKind, Level, Policy
from elastic_launch.parsing import parse_command

ASSIGNMENT = Assignment(0, 2, 0, 2, 1, 0, 2, "127.0.0.1", 29500, "host-a", port_picked=True, restart_count=4)
FAILED = CheckFailed("exit code 1", "looking at 8 GPUs\nGPU 3: fell off the bus")
REASON = "GPU 3: fell off the bus (exit code 1)"
JOIN = RequestJoin(has_check=True)


class Agent:
    """An agent with a health check, on a clock that only moves where a test says so."""

    def __init__(self, patience: float = float("inf"), policy: Policy = Policy(3)) -> None:  # noqa: B008 - a value
        self.now = 1000.0
        self.state, self.first = lifecycle.begin(Limits(policy, 30, check=CheckLimits(60, patience)), self.now)
        self.journal = Journal("train.py", 1, 3, self.now)
        self.names: list[str] = []

    def __call__(self, *events: AgentEvent) -> list[Action]:
        """Feed events; return what the last one leads to."""
        actions: list[Action] = []
        for event in events:
            before = self.state
            self.state, actions = lifecycle.step(before, event, self.now)
            step = Transition(before, event, self.state, actions, self.now, self.now)
            self.names += [entry.name for entry in self.journal.observe(step)]
        return actions

    def fail(self, *events: AgentEvent) -> tuple[float, list[Action]]:
        """Feed events that end in a failed check; return the pause that follows, and the other actions."""
        actions = self(*events)
        assert self.state.phase is AgentPhase.UNFIT
        assert self.state.deadline is not None
        return self.state.deadline - self.now, actions


def line(actions: list[Action]) -> str:
    [log] = [action for action in actions if isinstance(action, Log)]
    return log.text


def test_a_node_joins_when_its_check_has_passed() -> None:
    agent = Agent()
    assert agent.first == [RunCheck(1, 0)]
    assert agent.state.deadline == agent.now + 60
    assert agent(CheckPassed()) == [JOIN]
    assert agent.state.phase is AgentPhase.JOINING
    assert agent.state.deadline is None


def test_a_node_whose_check_fails_says_why_and_tells_the_others() -> None:
    agent = Agent()
    pause, actions = agent.fail(FAILED)
    assert actions[0] == Withdraw(REASON)
    assert line(actions) == (
        f"health check failed: {REASON}; checking again in 5 s\n    looking at 8 GPUs\n    GPU 3: fell off the bus"
    )
    assert [action.level for action in actions if isinstance(action, Log)] == [Level.WARNING]
    assert pause == CHECK_PAUSE
    agent.now += pause
    assert agent(DeadlineReached()) == [RunCheck(2, 0)]
    actions = agent(CheckPassed())
    assert actions[0] == JOIN
    assert line(actions) == "health check passed: joining"


def test_the_same_output_is_shown_once() -> None:
    agent = Agent()
    agent(FAILED, DeadlineReached())
    assert line(agent(FAILED)) == f"health check failed: {REASON}; checking again in 10 s"
    agent(DeadlineReached())
    assert "looking at 7 GPUs" in line(agent(CheckFailed("exit code 1", "looking at 7 GPUs\nno")))


def test_the_pauses_grow_up_to_a_minute() -> None:
    agent = Agent()
    pauses = [agent.fail(FAILED)[0]]
    for _ in range(40):
        pauses.append(agent.fail(DeadlineReached(), FAILED)[0])
    assert pauses[:6] == [5, 10, 20, 40, 60, 60]
    assert max(pauses) == MAX_CHECK_PAUSE


def test_a_single_node_gives_up_when_the_time_is_over() -> None:
    agent = Agent(patience=12)
    pause, _ = agent.fail(FAILED)
    agent.now += pause
    pause, _ = agent.fail(DeadlineReached(), FAILED)
    assert pause == 7, "the last try is when the time is over"
    agent.now += pause
    text = f"health check failed: {REASON}; gave up after 12 s (join_timeout)"
    assert agent(DeadlineReached(), FAILED) == [
        Leave(error=text, status=ExitCode.UNAVAILABLE),
        Finish(error=text, status=ExitCode.UNAVAILABLE),
    ]
    assert agent.names.count("check_failed") == 3
    assert agent.names[-1] == "ended"


def test_a_check_that_takes_too_long_is_killed_and_has_failed() -> None:
    agent = Agent()
    agent.now += 60
    assert agent(DeadlineReached()) == [StopCheck()]
    _, actions = agent.fail(CheckFailed("killed by SIGKILL", "asking GPU 3"))
    assert actions[0] == Withdraw("asking GPU 3 (no result within 60 s)")
    agent(DeadlineReached())
    assert not agent.state.is_overdue


def test_a_check_that_cannot_be_killed_has_failed_and_its_late_result_is_ignored() -> None:
    agent = Agent()
    agent(DeadlineReached())
    assert agent.state.deadline == agent.now + KILL_PATIENCE
    _, actions = agent.fail(DeadlineReached())
    assert actions[0] == Withdraw("no result within 60 s")
    assert agent(CheckFailed("killed by SIGKILL")) == agent(CheckPassed()) == []
    assert agent.state.phase is AgentPhase.UNFIT


def test_a_signal_ends_the_node_and_its_check() -> None:
    for events, stops in (((), True), ((FAILED,), False)):
        agent = Agent()
        agent(*events)
        ends = [StopCheck()] if stops else []
        assert agent(Signalled(SIGTERM, 50)) == [*ends, Leave(SIGTERM), Finish(signum=SIGTERM)]


def test_the_end_of_the_job_ends_the_node_and_its_check() -> None:
    for events, stops in (((), True), ((FAILED,), False)):
        agent = Agent()
        agent(*events)
        actions = agent(Decided(Decision(False)))
        assert (StopCheck() in actions) == stops
        assert actions[-1] == Finish()


def test_the_user_can_have_an_unfit_node_checked_at_once() -> None:
    agent = Agent()
    assert agent(RestartRequested("now")) == [], "the check runs already"
    agent(FAILED, UserSignalled(10))
    assert agent(RestartRequested("now")) == [RunCheck(2, 0)]


def test_the_check_runs_before_each_round() -> None:
    agent = Agent()
    agent(CheckPassed(), Assigned(ASSIGNMENT), Started({0: 100}))
    actions = agent(Exited(Exit(0, 1, 50, ())))
    assert any(isinstance(action, ReportFailure) for action in actions)
    failed = End(EndKind.FAILED, "rank 0 failed", mine=True)
    assert isinstance(agent(Ended(failed, 50), GroupReaped({}))[-1], ReportRound)
    actions = agent(Decided(Decision(True)))
    assert actions[-1] == RunCheck(1, 5), "the number of the round, and a new count"
    assert agent.state.assignment is None
    assert agent(CheckPassed()) == [JOIN]


def test_a_single_node_is_checked_after_the_pause_before_a_restart() -> None:
    agent = Agent()
    alone = ASSIGNMENT._replace(group_world_size=1, world_size=1)
    agent(CheckPassed(), Assigned(alone), Started({0: 100}), Exited(Exit(0, 1, 50, ())))
    agent(Ended(End(EndKind.FAILED, "rank 0 failed", mine=True), 50), GroupReaped({}))
    agent(Decided(Decision(True, pause=7)))
    assert agent.state.phase is AgentPhase.PAUSING
    assert agent(DeadlineReached()) == [RunCheck(1, 5)]


def test_a_spare_is_checked_before_each_further_round() -> None:
    agent = Agent()
    agent(CheckPassed())
    assert agent(Decided(Decision(True))) == [RunCheck(1, 0)]


def test_the_status_says_what_an_unfit_node_waits_for() -> None:
    agent = Agent()
    found = waits_for(agent.state, Meeting("c10d"), agent.now + 20)
    assert found == "the health check of this node; it is killed in 40 s"
    agent(FAILED)
    found = waits_for(agent.state, Meeting("c10d"), agent.now + 2)
    assert found == f"the health check of this node, which failed: {REASON}; it runs again in 3 s"


def test_a_failed_check_is_an_event() -> None:
    agent = Agent()
    before = agent.state
    agent.state, actions = lifecycle.step(before, FAILED, agent.now)
    [entry] = agent.journal.observe(Transition(before, FAILED, agent.state, actions, agent.now, agent.now))
    assert (entry.name, entry.of_job, entry.group_rank, entry.round) == ("check_failed", False, None, None)
    assert entry.facts == {"reason": REASON, "output": FAILED.output, "tries": 1, "pause": 5.0}
    assert entry.text.startswith("health check failed")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("check --all", ["check", "--all"]),
        ("sh -c 'a && b; echo \"$X\"'", ["sh", "-c", 'a && b; echo "$X"']),
        ("a|b", ["a|b"]),
    ],
)
def test_a_command_is_split_without_a_shell(text: str, words: list[str]) -> None:
    assert parse_command(text) == words


@pytest.mark.parametrize("text", ["  ", "'open", "''"])
def test_what_is_no_command_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_command(text)
