"""The agent's decisions: promises checked one by one, and invariants checked in thousands of random event orders."""

from __future__ import annotations

import random
import signal
from dataclasses import replace
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1

import pytest

from elastic_launch.core.agent import lifecycle
from elastic_launch.core.agent.lifecycle import (
    AGREEMENT_TIME,
    DUMP_TIME,
    FINAL_GRACE,
    HOLD_TIME,
    KILL_PATIENCE,
    LEFTOVER_GRACE,
    SAME_SIGNAL,
    AgentPhase,
    AgentState,
)
from elastic_launch.core.agent.messages import (
    Action,
    AgentEvent,
    Assigned,
    DeadlineReached,
    Decided,
    DumpStacks,
    Ended,
    Exited,
    Finish,
    GiveUpStop,
    GroupReaped,
    Hung,
    LeaseExpired,
    Leave,
    Limits,
    Log,
    ReapLeftovers,
    ReportCalls,
    ReportFailure,
    ReportRound,
    ReportSuccess,
    RequestJoin,
    RequestRestart,
    RequestStop,
    RestartRequested,
    SendSignal,
    SetStop,
    Signalled,
    Start,
    Started,
    StopAgreed,
    TimerExpired,
    UserSignalled,
)
from elastic_launch.core.agent.restart_policy import UNCHARGED_RESTARTS
from elastic_launch.core.agent.root_cause import ErrorRecord, Evidence, Exit
from elastic_launch.errors import ExitCode
from elastic_launch.job import Assignment, Decision, End, EndKind, Level, Policy
from elastic_launch.rendezvous.single_node import SingleNodeRendezvous

PIDS = {0: 100, 1: 101}
ALL = frozenset(PIDS)


ASSIGNMENT = Assignment(0, 1, 0, 2, 2, 0, 2, "127.0.0.1", 29500, "host-a", port_picked=True)


class Agent:
    """An agent on a single node with a virtual clock; ``last`` has all actions that the last event led to."""

    def __init__(self, max_restarts: int = 0, shutdown_timeout: float = 30) -> None:
        self.state, self.last = lifecycle.begin(Limits(Policy(max_restarts), shutdown_timeout))
        self.now = 1000.0
        self.rendezvous = SingleNodeRendezvous("job", 2)
        self.rounds = 0
        self.decision = Decision(restart=True)

    def __call__(self, *events: AgentEvent) -> list[Action]:
        """Feed events; return the last one's actions, except log lines and what goes to the rendezvous."""
        for event in events:
            queue, self.last = [event], []
            while queue:
                event = queue.pop(0)
                if isinstance(event, Decided):
                    self.decision = event.decision
                if isinstance(event, Assigned):
                    self.rendezvous.ask(RequestJoin())  # it knows of the round
                    self.rendezvous.close()
                self.state, actions = lifecycle.step(self.state, event, self.now)
                self.last += actions
                queue += [e for a in actions if isinstance(a, TO_RENDEZVOUS) for e in self.rendezvous.ask(a)]
        return [action for action in self.last if not isinstance(action, LEFT_OUT)]

    def warnings(self) -> str:
        """The warnings that the last event led to."""
        return "\n".join(a.text for a in self.last if isinstance(a, Log) and a.level is Level.WARNING)

    def assignment(self, port: int = 29500, *, picked: bool = True) -> Assignment:
        """The assignment in the next round."""
        self.rounds += 1
        return ASSIGNMENT._replace(
            master_port=port,
            port_picked=picked,
            restart_count=self.rounds - 1,
            restart_history=self.decision.restart_history,
        )

    def running(self, port: int = 29500, *, picked: bool = True) -> Agent:
        self(Assigned(self.assignment(port, picked=picked)), Started(PIDS))
        assert self.state.phase is AgentPhase.RUNNING
        return self


TO_RENDEZVOUS = (
    *(RequestRestart, ReportFailure, ReportSuccess, ReportRound, Leave),
    *(RequestStop, ReportCalls, GiveUpStop),
)
LEFT_OUT = (Log, *TO_RENDEZVOUS)


def exited(rank: int, code: int = 0, stop_signals: tuple[int, ...] = (), time: float = 50.0) -> Exited:
    return Exited(Exit(rank, code, time, stop_signals))


def test_good_job() -> None:
    agent = Agent()
    assert agent.last == [RequestJoin()]
    assert agent(Assigned(ASSIGNMENT)) == [Start(ASSIGNMENT)]
    assert agent(Started(PIDS), exited(1)) == []
    assert agent(exited(0)) == [ReapLeftovers(kill=False)]
    assert agent(GroupReaped({})) == [Finish()]
    assert agent.state.phase is AgentPhase.DONE


def test_failure_stops_the_others_and_fails_the_job() -> None:
    agent = Agent().running()
    assert agent(exited(1, 42)) == [SendSignal(SIGTERM, frozenset({0}), stop=True)]
    assert agent(exited(0, -SIGTERM, (SIGTERM,))) == [ReapLeftovers(kill=False)]
    [finish] = agent(GroupReaped({}))
    assert isinstance(finish, Finish)
    assert [(f.rank, f.exitcode, f.pid, f.host) for f in finish.failures] == [(1, 42, 101, "host-a")]


HUNG = Hung(1, "it loops, at train.py:41 in step", "the stacks of all ranks", 50.0)


def test_a_hang_is_a_failure_of_the_rank_that_stands_out() -> None:
    agent = Agent(max_restarts=1).running()
    assert agent(HUNG) == [SendSignal(SIGTERM, ALL, stop=True)]
    agent(exited(0, -SIGTERM, (SIGTERM,)), exited(1, -SIGKILL, (SIGTERM, SIGKILL)))
    assert agent(GroupReaped({})) == [RequestJoin()]
    assert "rank 1 failed (hang, it loops, at train.py:41 in step): restart 1 of 1" in agent.warnings()
    agent.running()
    agent(HUNG, exited(0, -SIGTERM, (SIGTERM,)), exited(1, -SIGTERM, (SIGTERM,)))
    [finish] = agent(GroupReaped({}))
    assert isinstance(finish, Finish)
    (failure,) = finish.failures
    assert (failure.rank, failure.status(), failure.traceback) == (1, ExitCode.HANG, "the stacks of all ranks")


def test_errors_that_follow_a_hang_are_consequences() -> None:
    agent = Agent().running()
    agent(HUNG, exited(0, 1, (SIGTERM,)), exited(1, -SIGTERM, (SIGTERM,)))
    error = ErrorRecord("RuntimeError: Connection closed by peer", "Traceback", 49.0, "error.json")
    [finish] = agent(GroupReaped({0: Evidence(error)}))
    assert isinstance(finish, Finish)
    assert [(failure.rank, failure.is_hang) for failure in finish.failures] == [(1, True), (0, False)]


def test_a_hang_of_a_worker_that_has_just_ended_is_none() -> None:
    agent = Agent().running()
    assert agent(exited(1), HUNG) == []
    assert agent.state.phase is AgentPhase.RUNNING


def test_a_restart_has_a_new_number_and_is_counted() -> None:
    agent = Agent(max_restarts=1).running()
    agent(exited(0, 1), exited(1, -SIGTERM, (SIGTERM,)))
    assert agent(GroupReaped({})) == [RequestJoin()]
    assert "rank 0 failed (exit code 1): restart 1 of 1" in agent.warnings()
    assignment = agent.assignment(29501)
    assert assignment.restart_history.used == 1
    assert agent(Assigned(assignment)) == [Start(assignment)]
    agent(Started(PIDS), exited(0, 1), exited(1, -SIGTERM, (SIGTERM,)))
    [finish] = agent(GroupReaped({}))
    assert isinstance(finish, Finish)
    assert finish.failures[0].exitcode == 1


def test_the_last_worker_to_fail_leaves_no_other_to_stop() -> None:
    agent = Agent().running()
    agent(exited(0))
    assert agent(exited(1, 3)) == [ReapLeftovers(kill=False)]


def test_a_restart_that_the_user_asks_for_uses_up_none() -> None:
    agent = Agent(max_restarts=0).running()
    assert agent(RestartRequested("restart requested on host-a")) == [SendSignal(SIGTERM, ALL, stop=True)]
    assert agent.warnings() == "restart requested on host-a: stopping 2 workers"
    assert agent(RestartRequested("restart requested on host-a")) == [], "it is on its way"
    agent(exited(0, 1, (SIGTERM,)), exited(1, -SIGTERM, (SIGTERM,)))
    assert agent(GroupReaped({})) == [RequestJoin()]
    assert agent.decision == Decision(True)
    assert agent(Assigned(agent.assignment())) == [Start(ASSIGNMENT._replace(restart_count=1))]


def test_a_worker_that_fails_while_the_user_restarts_uses_up_none() -> None:
    agent = Agent(max_restarts=0).running()
    agent(RestartRequested("restart requested on host-a"), exited(0, -signal.SIGSEGV, (SIGTERM,)))
    agent(exited(1, -SIGTERM, (SIGTERM,)))
    assert agent(GroupReaped({})) == [RequestJoin()]
    assert agent.decision.restart_history.used == 0


def test_a_restart_that_the_user_asks_for_ends_the_pause_before_the_next_round() -> None:
    agent = Agent(max_restarts=1).running()
    agent.state = replace(agent.state, limits=Limits(Policy(1, backoff=60, backoff_limit=60), 30))
    agent(exited(0, 1), exited(1, -SIGTERM, (SIGTERM,)), GroupReaped({}))
    assert agent.state.phase is AgentPhase.PAUSING
    assert agent(RestartRequested("restart requested on host-a")) == [RequestJoin()]


def test_a_stop_of_the_whole_job_has_its_reason_in_the_log_and_for_the_other_nodes() -> None:
    agent = Agent(max_restarts=3).running()
    agent(Signalled(SIGTERM, 50, reason="stop requested on host-a"))
    assert agent.warnings().startswith("stop requested on host-a: stopping 2 workers; SIGKILL in 30 s")
    assert Leave(SIGTERM, reason="stop requested on host-a") in agent.last


def test_a_stop_of_the_whole_job_after_a_failure_is_one_for_the_other_nodes_too() -> None:
    agent = Agent(max_restarts=3).running()
    agent(exited(0, 1), Signalled(SIGTERM, 51, reason="stop requested on host-a"), exited(1, -SIGTERM, (SIGTERM,)))
    agent(GroupReaped({}))
    assert Leave(SIGTERM, reason="stop requested on host-a") in agent.last


@pytest.mark.parametrize("signum", [SIGTERM, SIGINT, SIGHUP])
def test_a_signal_is_forwarded_to_the_workers_and_ends_the_job(signum: signal.Signals) -> None:
    agent = Agent(max_restarts=3).running()
    assert agent(Signalled(signum, 50)) == [SendSignal(signum, ALL, stop=True)]
    agent(exited(0, -signum, (signum,)))
    assert agent(exited(1, 7, (signum,))) == [ReapLeftovers(kill=False)]
    assert agent(GroupReaped({})) == [Finish(signum=signum)]


def test_a_worker_that_crashes_on_the_signal_does_not_hide_it() -> None:
    agent = Agent().running()
    agent(Signalled(SIGTERM, 50), exited(0, -signal.SIGSEGV, (SIGTERM,)), exited(1, 0, (SIGTERM,)))
    assert agent(GroupReaped({})) == [Finish(signum=SIGTERM)]


@pytest.mark.parametrize("second", [SIGTERM, SIGINT])
def test_a_second_signal_kills_at_once(second: signal.Signals) -> None:
    agent = Agent().running()
    agent(Signalled(SIGTERM, 50))
    agent.now += 2 * SAME_SIGNAL
    assert agent(Signalled(second, 51)) == [ReapLeftovers(kill=True)]
    assert agent(Signalled(second, 52)) == []
    assert agent(exited(0, -SIGKILL, (SIGTERM, SIGKILL)), exited(1, -SIGKILL, (SIGTERM, SIGKILL))) == []
    assert agent(GroupReaped({})) == [Finish(signum=SIGTERM)]


@pytest.mark.parametrize(("first", "second"), [(SIGHUP, SIGHUP), (SIGTERM, SIGHUP), (SIGHUP, SIGTERM)])
def test_a_hangup_does_not_kill(first: signal.Signals, second: signal.Signals) -> None:
    agent = Agent().running()
    agent(Signalled(first, 50))
    agent.now += 1
    assert agent(Signalled(second, 51)) == []
    agent.now += 1
    assert agent(Signalled(SIGINT, 52)) == ([ReapLeftovers(kill=True)] if SIGTERM in (first, second) else [])


def test_a_signal_delivered_twice_counts_once() -> None:
    agent = Agent().running()
    agent(Signalled(SIGTERM, 50))
    agent.now += 10  # the agent was busy: what counts is when the signals arrived
    assert agent(Signalled(SIGTERM, 50 + SAME_SIGNAL / 2)) == []


def test_a_second_signal_after_a_failure_kills_too() -> None:
    agent = Agent(max_restarts=3).running()
    agent(exited(0, 1), Signalled(SIGTERM, 51))
    agent.now += 1
    assert agent(Signalled(SIGTERM, 52)) == [ReapLeftovers(kill=True)]


def test_a_signal_after_all_workers_have_succeeded_changes_nothing() -> None:
    agent = Agent().running()
    agent(exited(0), exited(1), Signalled(SIGTERM, 51))
    assert agent(GroupReaped({})) == [Finish()]


def test_a_forwarded_signal_does_not_turn_a_failure_into_a_stop() -> None:
    agent = Agent().running()
    agent(UserSignalled(SIGUSR1), exited(0, -SIGUSR1), exited(1, -SIGTERM, (SIGTERM,)))
    [finish] = agent(GroupReaped({}))
    assert isinstance(finish, Finish)
    assert finish.failures[0].exitcode == -SIGUSR1


def test_a_signal_after_a_failure_prevents_the_restart() -> None:
    agent = Agent(max_restarts=3).running()
    agent(exited(0, 1))
    assert agent(Signalled(SIGTERM, 51)) == []
    agent(exited(1, -SIGTERM, (SIGTERM,)))
    assert agent(GroupReaped({})) == [Finish(signum=SIGTERM)]


def test_a_signal_does_not_hide_the_failure_that_ended_the_job_before() -> None:
    agent = Agent(max_restarts=0).running()
    agent(exited(0, 5), Signalled(SIGTERM, 51), exited(1, -SIGTERM, (SIGTERM,)))
    [finish] = agent(GroupReaped({}))
    assert isinstance(finish, Finish)
    assert finish.failures[0].exitcode == 5


def test_a_signal_before_the_first_round_ends_the_job() -> None:
    assert Agent()(Signalled(SIGINT, 1)) == [Finish(signum=SIGINT)]


def test_the_stop_sequence_keeps_its_deadlines() -> None:
    agent = Agent(shutdown_timeout=7).running()
    assert agent.state.deadline is None
    agent(Signalled(SIGTERM, 50))
    assert agent.state.deadline == agent.now + 7 - DUMP_TIME
    agent(exited(0, 0, (SIGTERM,)))
    agent.now += 7 - DUMP_TIME
    assert agent(DeadlineReached()) == [DumpStacks(frozenset({1}))]
    agent.now += DUMP_TIME
    assert agent.state.deadline == agent.now
    assert agent(DeadlineReached()) == [ReapLeftovers(kill=True)]
    assert "worker rank 1 (pid 101)" in agent.warnings()
    assert agent.state.deadline == agent.now + KILL_PATIENCE
    agent(exited(1, -SIGKILL, (SIGTERM, SIGKILL)))
    assert agent(GroupReaped({})) == [Finish(signum=SIGTERM)]


def test_without_time_to_stop_there_is_no_time_for_stacks() -> None:
    agent = Agent(shutdown_timeout=0).running()
    agent(Signalled(SIGTERM, 50))
    assert agent(DeadlineReached()) == [DumpStacks(ALL)]
    assert agent.state.deadline == agent.now
    assert agent(DeadlineReached()) == [ReapLeftovers(kill=True)]


def test_a_hung_worker_is_reported_only_beside_a_failure() -> None:
    stacks = {1: Evidence(note="the stacks of its threads are in 1/stacks.log")}
    agent = Agent().running()
    agent(exited(0, 1), DeadlineReached(), DeadlineReached(), exited(1, -SIGKILL, (SIGTERM, SIGKILL)))
    [finish] = agent(GroupReaped(stacks))
    assert "rank 1 (pid 101) did not stop in time; the stacks of its threads are in 1/stacks.log" in agent.warnings()
    assert isinstance(finish, Finish)
    assert [(failure.rank, failure.note) for failure in finish.failures] == [(0, ""), (1, stacks[1].note)]
    agent = Agent().running()
    agent(Signalled(SIGTERM, 50), DeadlineReached(), DeadlineReached())
    agent(*(exited(rank, -SIGKILL, (SIGTERM, SIGKILL)) for rank in ALL))
    assert agent(GroupReaped(stacks)) == [Finish(signum=SIGTERM)], "a hung worker alone is not a failure"
    assert "stacks.log" in agent.warnings()


def test_a_worker_whose_timer_expired_writes_its_stacks_and_is_killed() -> None:
    agent = Agent().running()
    assert agent(TimerExpired(PIDS[1], "its timer 'step' expired")) == [DumpStacks(frozenset({1}))]
    assert agent.state.phase is AgentPhase.RUNNING
    assert agent(TimerExpired(PIDS[1], "again"), TimerExpired(999, "not a worker")) == []
    assert agent.state.deadline == agent.now + DUMP_TIME
    assert agent(DeadlineReached()) == [SendSignal(SIGKILL, frozenset({1}), stop=False)]
    assert agent.state.deadline is None
    agent(exited(1, -SIGKILL), exited(0, 0, (SIGTERM,)))
    [finish] = agent(GroupReaped({1: Evidence(note="stacks: here")}))
    assert isinstance(finish, Finish)
    assert [(failure.rank, failure.note) for failure in finish.failures] == [
        (1, "its timer 'step' expired; stacks: here")
    ]


# --- stopping at the same step


HOLD, RELEASE = SetStop(hold=True, stop_at=0), SetStop(hold=False, stop_at=0)
SAME_STEP = Ended(End(EndKind.MEMBERSHIP_CHANGED, "host-b is leaving (SIGTERM)", "node-b", same_step=True), 50)
"""Another node ends the round."""


def member() -> tuple[AgentState, list[Action]]:
    """Return a node that runs workers beside another node's."""
    state, actions = lifecycle.begin(Limits(Policy(3), 30))
    for event in (Assigned(ASSIGNMENT._replace(group_world_size=2, world_size=4)), Started(PIDS)):
        state, actions = lifecycle.step(state, event, 1000)
    return state, actions


def fed(*events: AgentEvent, seconds: float = 0.0) -> tuple[AgentState, list[Action]]:
    """Return the state of such a node after events, and what the last one led to, except log lines."""
    state, actions = member()
    for event in events:
        state, actions = lifecycle.step(state, event, 1000 + seconds)
    return state, [action for action in actions if not isinstance(action, Log)]


def test_workers_that_ask_are_held_and_counted_and_go_on_to_the_next_call() -> None:
    agent = Agent(shutdown_timeout=30).running()
    assert agent(Signalled(SIGTERM, 50, calls=7)) == [HOLD]
    assert agent.state.deadline == agent.now + HOLD_TIME
    agent.now += HOLD_TIME
    assert agent(DeadlineReached(calls=9)) == [SetStop(hold=False, stop_at=10)]
    assert agent.state.deadline == agent.now - HOLD_TIME + 30 - FINAL_GRACE
    assert agent(exited(0), exited(1)) == [ReapLeftovers(kill=False)]
    assert agent(GroupReaped({})) == [Finish(signum=SIGTERM)]


@pytest.mark.parametrize("event", [Signalled(SIGTERM, 50), Signalled(SIGINT, 50, calls=3), Signalled(SIGHUP, 50, 3)])
def test_without_a_worker_that_asks_or_with_another_signal_the_workers_are_signalled(event: Signalled) -> None:
    assert Agent().running()(event) == [SendSignal(event.signum, ALL, stop=True)]


def test_workers_that_do_not_stop_at_the_step_are_signalled_before_the_timeout() -> None:
    agent = Agent(shutdown_timeout=30).running()
    signalled_at = agent.now
    agent(Signalled(SIGTERM, 50, calls=7), DeadlineReached(calls=7), exited(1))
    agent.now += 30 - FINAL_GRACE
    assert agent(DeadlineReached()) == [SendSignal(SIGTERM, frozenset({0}), stop=True), RELEASE]
    assert "worker rank 0 (pid 100) did not stop at the agreed step: stopping 1 worker" in agent.warnings()
    assert agent.state.deadline == signalled_at + 30 - DUMP_TIME
    assert agent(DeadlineReached()) == [DumpStacks(frozenset({0}))]
    assert agent(DeadlineReached()) == [ReapLeftovers(kill=True)]


def test_without_time_to_stop_nobody_is_held_for_long() -> None:
    agent = Agent(shutdown_timeout=0).running()
    agent(Signalled(SIGTERM, 50, calls=7))
    agent.now += HOLD_TIME
    assert agent(DeadlineReached(calls=7)) == [SendSignal(SIGTERM, ALL, stop=True), RELEASE]
    assert agent(DeadlineReached()) == [DumpStacks(ALL)]


@pytest.mark.parametrize("counted", [False, True], ids=["held", "on their way"])
def test_a_second_signal_kills_workers_that_go_on_to_a_step(counted: bool) -> None:
    agent = Agent().running()
    agent(Signalled(SIGTERM, 50, calls=7), *[DeadlineReached(calls=7)] * counted)
    assert agent(Signalled(SIGTERM, 50 + SAME_SIGNAL / 2, calls=7)) == []
    agent.now += 1
    assert agent(Signalled(SIGINT, 51, calls=7)) == [ReapLeftovers(kill=True)]
    agent(*(exited(rank, -SIGKILL, (SIGKILL,)) for rank in ALL))
    assert agent(GroupReaped({})) == [Finish(signum=SIGTERM)]


@pytest.mark.parametrize("counted", [False, True], ids=["held", "on their way"])
def test_nobody_waits_for_a_worker_that_failed(counted: bool) -> None:
    agent = Agent().running()
    agent(Signalled(SIGTERM, 50, calls=7), *[DeadlineReached(calls=7)] * counted)
    assert agent(exited(1, 3)) == [SendSignal(SIGTERM, frozenset({0}), stop=True), RELEASE]
    assert "rank 1 failed (exit code 3): stopping 1 worker" in agent.warnings()
    agent(exited(0, -SIGTERM, (SIGTERM,)))
    assert agent(GroupReaped({})) == [Finish(signum=SIGTERM)]


def test_a_node_asks_the_others_first_and_stops_alone_if_none_answers() -> None:
    state, actions = fed(Signalled(SIGTERM, 50, calls=7))
    assert actions == [RequestStop(SIGTERM)]
    assert state.deadline == 1000 + AGREEMENT_TIME
    state, actions = fed(Signalled(SIGTERM, 50, calls=7), DeadlineReached(calls=7))
    assert actions == [SendSignal(SIGTERM, ALL, stop=True), RELEASE]
    state, actions = lifecycle.step(state, SAME_STEP._replace(calls=8), 1020)
    assert GiveUpStop() in actions, "its workers have been signalled"


def test_a_node_that_cannot_ask_the_others_leaves_in_the_ordinary_way() -> None:
    _, actions = fed(Signalled(SIGTERM, 50, calls=7), StopAgreed(0))
    assert actions == [SendSignal(SIGTERM, ALL, stop=True), RELEASE, Leave(SIGTERM)]


def test_another_end_of_the_round_frees_the_workers() -> None:
    joins = Ended(End(EndKind.MEMBERSHIP_CHANGED, "host-c joins"), 51)
    _, actions = fed(Signalled(SIGTERM, 50, calls=7), joins)
    assert actions == [SendSignal(SIGTERM, ALL, stop=True), RELEASE]


def test_a_node_reports_once_and_then_gives_up_and_then_stops() -> None:
    held: list[AgentEvent] = [SAME_STEP, DeadlineReached(calls=9)]
    state, actions = fed(*held)
    assert (actions, state.deadline) == ([ReportCalls(9)], 1000 + AGREEMENT_TIME)
    state, actions = fed(*held, DeadlineReached(calls=9))
    assert (actions, state.deadline) == ([GiveUpStop()], 1000 + 30 - FINAL_GRACE)
    _, actions = fed(*held, DeadlineReached(calls=9), StopAgreed(0))
    assert actions == [SendSignal(SIGTERM, ALL, stop=True), RELEASE]
    state, _ = fed(*held, DeadlineReached(calls=9))
    _, actions = lifecycle.step(state, DeadlineReached(calls=9), 1000 + 30 - FINAL_GRACE)
    assert actions[:2] == [SendSignal(SIGTERM, ALL, stop=True), RELEASE], "the store does not answer"


def test_a_node_whose_workers_have_ended_reports_before_it_goes_on() -> None:
    ended = [exited(0), exited(1)]
    state, actions = fed(SAME_STEP, *ended)
    assert (state.phase, actions) == (AgentPhase.HOLDING, [])
    _, actions = fed(SAME_STEP, *ended, DeadlineReached(calls=9), StopAgreed(12))
    assert actions == [SetStop(hold=False, stop_at=12), ReapLeftovers(kill=False)]
    _, actions = fed(*ended, SAME_STEP._replace(calls=9))
    assert actions == [ReportCalls(9)]
    _, actions = fed(*ended, GroupReaped({}), SAME_STEP._replace(calls=9))
    assert [type(action) for action in actions] == [ReportCalls, ReportRound]


@pytest.mark.parametrize(
    "before",
    [
        [exited(0, 1)],
        [exited(0, 1), exited(1, 0, (SIGTERM,))],
        [LeaseExpired()],
        [exited(0, 1), exited(1, 0, (SIGTERM,)), GroupReaped({})],
    ],
    ids=["failed", "signalled", "cut off", "gone"],
)
def test_a_node_whose_workers_were_stopped_before_gives_up_for_all(before: list[AgentEvent]) -> None:
    _, actions = fed(*before, SAME_STEP._replace(calls=9))
    assert GiveUpStop() in actions
    assert not any(isinstance(action, ReportCalls) for action in actions)


def test_a_node_that_fails_while_it_is_to_report_gives_up_for_all() -> None:
    _, actions = fed(SAME_STEP, exited(1, 3))
    assert actions == [SendSignal(SIGTERM, frozenset({0}), stop=True), RELEASE, GiveUpStop()]


def test_what_a_successful_job_leaves_behind_is_killed_soon() -> None:
    agent = Agent(shutdown_timeout=30).running()
    agent(exited(0), exited(1))
    assert agent.state.deadline == agent.now + LEFTOVER_GRACE
    assert agent(DeadlineReached()) == [ReapLeftovers(kill=True)]
    assert agent.warnings() == "", "there may be nothing left until GroupReaped names it"
    assert agent(GroupReaped({}, ("sleep (pid 7)",))) == [Finish()]
    assert agent.warnings() == "killed processes that the workers left behind: sleep (pid 7)"


def test_what_a_stopped_worker_leaves_behind_gets_its_grace_too() -> None:
    agent = Agent(shutdown_timeout=30).running()
    agent(Signalled(SIGTERM, 50))
    agent.now += 10
    agent(exited(0, 0, (SIGTERM,)), exited(1, 0, (SIGTERM,)))
    assert agent.state.deadline == agent.now + 20
    agent = Agent(shutdown_timeout=30).running()
    agent(exited(0, 1))
    agent.now += 29.25
    agent(exited(1, 0, (SIGTERM,)))
    assert agent.state.deadline == agent.now + LEFTOVER_GRACE


def test_an_unkillable_worker_is_named_and_no_round_starts_beside_it() -> None:
    agent = Agent(max_restarts=3).running()
    agent(exited(0, 1), DeadlineReached(), DeadlineReached())
    [finish] = agent(DeadlineReached(clash(1)))
    assert "worker rank 1 (pid 101) cannot be killed" in agent.warnings()
    assert isinstance(finish, Finish)
    assert [f.rank for f in finish.failures] == [0]
    assert finish.failures[0].error.startswith("DistNetworkError"), "the report still has what is known about the cause"


def test_a_forwarded_signal_reaches_the_workers_that_still_run() -> None:
    agent = Agent()
    assert agent(UserSignalled(SIGUSR1)) == []
    agent.running()
    assert agent(UserSignalled(SIGUSR1)) == [SendSignal(SIGUSR1, ALL, stop=False)]
    agent(exited(0))
    assert agent(UserSignalled(SIGUSR1)) == [SendSignal(SIGUSR1, frozenset({1}), stop=False)]
    assert agent.state.phase is AgentPhase.RUNNING


def test_a_restart_is_logged_in_one_line() -> None:
    agent = Agent(max_restarts=1).running()
    agent(exited(0, 1), exited(1, -SIGTERM, (SIGTERM,)))
    agent(GroupReaped({0: Evidence(ErrorRecord("RuntimeError: first\nsecond\nthird", "", 49.0, "error.json"))}))
    assert agent.warnings() == "rank 0 failed (exit code 1, RuntimeError: first): restart 1 of 1"


def clash(port: int) -> dict[int, Evidence]:
    text = f"DistNetworkError: The server socket has failed to listen. port: {port}, EADDRINUSE"
    return {0: Evidence(ErrorRecord(text, text, 49.0, "error.json"))}


def test_a_taken_port_uses_up_no_restart_a_few_times() -> None:
    agent = Agent(max_restarts=0)
    for attempt in range(UNCHARGED_RESTARTS):
        agent.running(port=29500 + attempt)
        agent(exited(0, 1), exited(1, -SIGTERM, (SIGTERM,)))
        assert agent(GroupReaped(clash(29500 + attempt))) == [RequestJoin()]
        assert "without using up a restart" in agent.warnings()
        assert agent.decision.restart
        assert (agent.decision.restart_history.used, agent.decision.restart_history.uncharged) == (0, attempt + 1)
    agent.running(port=29509)
    agent(exited(0, 1), exited(1, -SIGTERM, (SIGTERM,)))
    [finish] = agent(GroupReaped(clash(29509)))
    assert isinstance(finish, Finish)
    assert finish.failures


@pytest.mark.parametrize(("clashes_with", "picked"), [(29501, True), (2950, True), (29500, False)])
def test_other_port_clashes_are_failures(clashes_with: int, picked: bool) -> None:
    agent = Agent(max_restarts=0).running(port=29500, picked=picked)
    agent(exited(0, 1), exited(1, -SIGTERM, (SIGTERM,)))
    [finish] = agent(GroupReaped(clash(clashes_with)))
    assert isinstance(finish, Finish)
    assert finish.failures


def test_an_event_missing_in_the_table_raises_with_the_history() -> None:
    agent = Agent().running()
    with pytest.raises(lifecycle.UnexpectedEventError, match=r"GroupReaped while running; history: joining:Assigned"):
        agent(GroupReaped({}))


def test_every_phase_handles_every_signal() -> None:
    for phase in set(AgentPhase) - {AgentPhase.DONE}:
        for event in (Signalled, UserSignalled, TimerExpired):
            assert (phase, event) in lifecycle.TABLE


TO_STOP = (AgentPhase.HOLDING, AgentPhase.DRAINING, AgentPhase.STOPPING)


class World:
    """A node on which workers, their leftovers, the keeper, the clock and users do anything possible, in any order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.max_restarts = self.random.randrange(3)
        self.agent = Agent(self.max_restarts, self.random.choice([0, 5]))
        self.alive: set[int] = set()
        self.codes: list[int] = []
        self.leftovers = self.started = self.reaping = self.killed = self.unkillable = False
        self.stop_signals: dict[int, tuple[int, ...]] = {}
        self.timed_out: set[int] = set()
        """Workers that the agent killed because their timer expired."""
        self.rounds: list[int] = []
        self.signals_left = self.random.randrange(5)
        self.restarts = self.restarts_left = self.random.randrange(3)
        self.calls = self.random.choice([0, 7])
        """Number of calls of ``should_stop()``."""
        self.hold = False
        self.signalled = False
        self.finish: Finish | None = None

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            assert self.finish is None, "an action after the end"
            match action:
                case RequestJoin():
                    assert not self.signalled, "another round after a signal to stop"
                case Start(assignment):
                    assert not self.alive, "a round beside another's workers"
                    assert not self.leftovers, "a round beside the leftovers of another"
                    self.rounds.append(assignment.restart_count)
                    self.alive, self.codes, self.stop_signals, self.timed_out = {0, 1}, [], {}, set()
                    self.hold = False
                    self.leftovers = self.random.random() < 0.3
                    self.unkillable = self.random.random() < 0.1
                    self.started = self.reaping = self.killed = False
                case SendSignal(signum, ranks, stop):
                    assert ranks <= self.alive, "a signal to a worker that has ended"
                    self.timed_out |= ranks if signum == SIGKILL else set()
                    if stop:
                        self.stop_signals |= {rank: (*self.stop_signals.get(rank, ()), signum) for rank in ranks}
                case SetStop(hold, stop_at):
                    assert hold != self.hold or not stop_at, "stopped without being held"
                    assert stop_at in (0, self.calls + 1)
                    self.hold = hold
                case DumpStacks(ranks):
                    assert ranks <= self.alive, "stacks of a worker that has ended"
                case ReapLeftovers(kill):
                    assert kill or not self.alive, "leftovers reaped while workers have their grace"
                    self.reaping, self.killed = True, self.killed or kill
                    if kill:
                        self.stop_signals |= {rank: (*self.stop_signals.get(rank, ()), SIGKILL) for rank in self.alive}
                case Finish():
                    self.finish = action

    def next_events(self) -> list[AgentEvent]:
        """Choose what happens next; a lost keeper leads to several events at once."""
        state, can = self.agent.state, list[list[AgentEvent]]()
        if self.signals_left:
            can += [
                [Signalled(self.random.choice([SIGTERM, SIGINT, SIGHUP]), self.agent.now, self.calls)],
                [UserSignalled(SIGUSR1)],
            ]
        if self.restarts_left and self.random.random() < 0.2:
            can.append([RestartRequested("restart requested on host-a")])
        if state.phase is AgentPhase.JOINING:
            self.agent.rounds = len(self.rounds)
            return self.random.choice([*can, [Assigned(self.agent.assignment(29500 + len(self.rounds)))]])
        lost: list[AgentEvent] = [exited(rank, -SIGKILL, (), 50 + len(self.rounds)) for rank in sorted(self.alive)]
        if self.random.random() < 0.02 and (lost or self.reaping):
            return [*lost, GroupReaped({})] if self.reaping else lost
        if not self.started:
            return self.random.choice([*can, [Started(PIDS)]])
        stuck = self.unkillable and self.killed
        if not stuck:
            can += [[exited(rank, self.exit_code(rank), self.stop_signals.get(rank, ()), 50.0)] for rank in self.alive]
        if self.reaping and not self.alive and not stuck:
            can.append([GroupReaped(clash(29499 + len(self.rounds)) if self.random.random() < 0.2 else {})])
        if self.random.random() < 0.1:
            can.append([TimerExpired(self.random.choice([*PIDS.values()]), "its timer expired")])
        if state.deadline is not None and (stuck or not self.killed):
            can.append([DeadlineReached(calls=self.calls)])
        return self.random.choice(can)

    def exit_code(self, rank: int) -> int:
        return self.random.choice(
            [-SIGKILL]
            if rank in self.timed_out
            else [0, 0, 1, 42, -signal.SIGSEGV, -SIGUSR1, *(-signum for signum in self.stop_signals.get(rank, ()))]
        )

    def run(self) -> None:
        self.carry_out(self.agent.last)
        for _ in range(300):
            for event in self.next_events():
                match event:
                    case Started():
                        self.started = True
                    case Exited(exit_):
                        self.alive.discard(exit_.local_rank)
                        self.codes.append(exit_.exitcode)
                    case Signalled():
                        self.signals_left, self.signalled = self.signals_left - 1, True
                    case UserSignalled():
                        self.signals_left -= 1
                    case RestartRequested():
                        self.restarts_left -= 1
                    case GroupReaped():
                        self.leftovers = False
                self.agent.now += self.random.choice([0.0, SAME_SIGNAL, 3.0])
                self.agent(event)
                self.carry_out(self.agent.last)
                state = self.agent.state
                if state.phase is not AgentPhase.RUNNING or not state.expired_timers:
                    assert (state.deadline is not None) == (state.phase in TO_STOP), "a deadline is for stopping"
                assert not self.hold or state.phase is AgentPhase.HOLDING or self.killed, "held for nothing"
            if self.finish is not None:
                return
        raise AssertionError("the run does not end")


def play(seed: int) -> str:
    """One random order of events. Return how it ends."""
    world = World(seed)
    world.run()
    state, finish = world.agent.state, world.finish
    assert finish is not None
    assert state.phase is AgentPhase.DONE
    assert not world.alive or (world.unkillable and world.killed), "workers survive"
    assert world.rounds == list(range(len(world.rounds))), "a round's number is used twice"
    history = world.agent.decision.restart_history
    assert history.used <= world.max_restarts
    assert history.uncharged <= UNCHARGED_RESTARTS
    restarts_by_user = world.restarts - world.restarts_left
    assert len(world.rounds) <= 1 + history.used + history.uncharged + restarts_by_user
    if finish.failures:
        assert finish.signum is None
        assert finish.failures[0].exitcode != 0
    elif finish.error:
        assert world.unkillable, finish.error
    elif finish.signum is None:
        assert world.codes == [0, 0], "a failure counts as success"
    return "failed" if finish.failures else "signalled" if finish.signum else "succeeded"


@pytest.mark.parametrize("block", range(10))
def test_any_order_of_events_ends_properly(block: int) -> None:
    outcomes: set[str] = set()
    for seed in range(block * 1000, (block + 1) * 1000):
        try:
            outcomes.add(play(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: play({seed}) shows it again") from error
    assert outcomes == {"failed", "signalled", "succeeded"}, "the random orders do not reach every outcome"


def test_the_state_is_a_value() -> None:
    agent = Agent().running()
    before = agent.state
    agent(exited(0, 1))
    assert before.phase is AgentPhase.RUNNING
    assert isinstance(agent.state, AgentState)
