"""Decide what the agent does next: one table of phase and event.

    JOINING -> RUNNING -> (STOPPING -> AGREEING -> [PAUSING ->] JOINING)* -> DONE

``step`` takes the state, an event and the time. It returns the next state and the actions that the agent must carry
out. To change how the agent reacts to an event, find its row in ``TABLE`` at the end of this file.

Every round ends through STOPPING, even a successful one, so that no process outlives its round. The workers are stopped
and awaited, then their leftovers are reaped; at ``deadline`` whatever is left gets SIGKILL. After ``GroupReaped`` the
nodes agree on what follows: the node that ended the round decides, and all others do the same. On a single node the
rendezvous answers at once.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from elastic_launch.core.agent import restart_policy, root_cause
from elastic_launch.core.agent.messages import (
    Action,
    AgentEvent,
    Assigned,
    DeadlineReached,
    Decided,
    DumpStacks,
    Ended,
    Exited,
    Fence,
    Finish,
    GroupReaped,
    LeaseExpired,
    Leave,
    Limits,
    Log,
    ReapLeftovers,
    ReportFailure,
    ReportRound,
    ReportSuccess,
    RequestJoin,
    SendSignal,
    Signalled,
    Start,
    Started,
    TimerExpired,
    UserSignalled,
)
from elastic_launch.core.agent.root_cause import NOTHING, Evidence, Exit
from elastic_launch.core.text import counted, headline
from elastic_launch.errors import ExitCode, LaunchError, ProcessFailure, signal_name
from elastic_launch.job import Assignment, Decision, End, EndKind, Level

ESCALATING = frozenset({signal.SIGTERM, signal.SIGINT})
"""The second of these signals kills at once. SIGHUP is not one of them: a closing terminal may send it twice."""
SAME_SIGNAL = 0.2
"""Signals this close together, in seconds, count as one: batch systems signal both a process and its group."""
LEFTOVER_GRACE = 1.0
"""Minimum seconds between SIGTERM and SIGKILL for processes that outlived their worker."""
DUMP_TIME = 0.5
"""Maximum seconds that a hung worker has to write its stacks before SIGKILL."""
KILL_PATIENCE = 5.0
"""Seconds after SIGKILL until a process counts as unkillable, usually one in state D on a hung file system."""


class AgentPhase(Enum):
    """What the agent is doing."""

    JOINING = "joining"
    RUNNING = "running"
    STOPPING = "stopping"
    AGREEING = "agreeing"
    """The workers are gone, and the nodes have not agreed yet on what follows."""
    PAUSING = "pausing"
    """Waiting before the next round of a single-node job."""
    DONE = "done"


JOINING, RUNNING, STOPPING, AGREEING, PAUSING, DONE = AgentPhase


@dataclass(frozen=True)
class AgentState:
    """Everything that the agent's decisions depend on."""

    limits: Limits
    phase: AgentPhase = JOINING
    assignment: Assignment | None = None
    end: End | None = None
    """Why the round is over; None until that is known."""
    started_at: float = 0.0
    """When the round started on this node, on the agent's monotonic clock."""
    failure_reported: bool = False
    """Whether this node has reported a failure in this round."""
    lease_expired: bool = False
    """Whether the workers' lease has expired, so that other nodes may have gone on without this one."""
    failures: tuple[ProcessFailure, ...] = ()
    """This node's failed workers; empty until all its workers are gone."""
    may_restart: bool = True
    """False if a process could not be killed."""
    running: frozenset[int] = frozenset()
    """Local ranks of the workers that have not exited."""
    pids: Mapping[int, int] = field(default_factory=dict)
    """Process ids by local rank."""
    exits: tuple[Exit, ...] = ()
    stopped_at: float = float("inf")
    """When the agent began to stop the workers, in seconds since 1970."""
    signum: int | None = None
    """The signal that ends the job."""
    stopped_by_signal: bool = False
    """Whether the signal in ``signum`` ended the round."""
    stop_requested_at: float | None = None
    """When the first ``ESCALATING`` signal arrived, in seconds since 1970."""
    deadline: float | None = None
    """When ``DeadlineReached`` is due, on the agent's monotonic clock."""
    expired_timers: Mapping[int, str] = field(default_factory=dict)
    """Why workers are killed while the others run, by local rank."""
    hung: frozenset[int] = frozenset()
    """Local ranks of the workers that did not stop in time and were asked for their stacks."""
    killed: bool = False
    """Whether everything was sent SIGKILL."""
    history: tuple[str, ...] = ()
    """The latest events, each with the phase in which it arrived."""

    @property
    def has_failed(self) -> bool:
        """Whether a worker of this round failed by itself, not because the agent stopped it."""
        return any(exit_.exitcode != 0 and not exit_.stop_signals for exit_ in self.exits)


Step = tuple[AgentState, list[Action]]
Handler = Callable[[AgentState, Any, float], Step]


class UnexpectedEventError(LaunchError):
    """``TABLE`` has no entry for an event in this phase: a defect of the launcher."""

    def __init__(self, state: AgentState, event: AgentEvent) -> None:
        super().__init__(
            f"internal error: {type(event).__name__} while {state.phase.value}; history: {', '.join(state.history)}"
        )


def begin(limits: Limits) -> Step:
    """Return an agent's initial state and first action."""
    return AgentState(limits), [RequestJoin()]


def step(state: AgentState, event: AgentEvent, now: float) -> Step:
    """Handle an event.

    Args:
        state: the agent's state.
        event: what happened.
        now: seconds on a monotonic clock, the same one in every call.

    Returns:
        The next state, and the actions to carry out in this order.

    Raises:
        UnexpectedEventError: ``TABLE`` has no entry for the phase and the event.
    """
    handler = TABLE.get((state.phase, type(event)))
    if handler is None:
        raise UnexpectedEventError(state, event)
    state = replace(state, history=(*state.history[-49:], f"{state.phase.value}:{type(event).__name__}"))
    return handler(state, event, now)


def _enter(state: AgentState, phase: AgentPhase, deadline: float | None = None, **changes: Any) -> AgentState:
    """Set the phase. Nothing else sets it, and no deadline survives it."""
    return replace(state, phase=phase, deadline=deadline, **changes)


# --- joining and running


def _start(state: AgentState, event: Assigned, now: float) -> Step:
    assignment = event.assignment
    ranks = frozenset(range(assignment.local_world_size))
    state = _enter(state, RUNNING, assignment=assignment, running=ranks, started_at=now)
    formed = "re-formed" if assignment.restart_count else "formed"
    text = f"{formed}: {counted(assignment.group_world_size, 'node')}, {counted(assignment.world_size, 'worker')}"
    return state, [Start(assignment), _log_once(state, text)]


def _leave_on_signal(state: AgentState, event: Signalled, now: float) -> Step:
    return _leave(state, event.signum)


def _leave(state: AgentState, signum: int) -> Step:
    return _enter(state, DONE), [Leave(signum), Finish(signum=signum)]


def _end_without_a_round(state: AgentState, event: Decided, now: float) -> Step:
    if event.decision.restart:
        raise UnexpectedEventError(state, event)
    return _finish(state, event.decision)


def _record_pids(state: AgentState, event: Started, now: float) -> Step:
    return replace(state, pids=event.pids), []


def _worker_exited(state: AgentState, event: Exited, now: float) -> Step:
    state = _record_exit(state, event)
    exit_ = event.exit
    if exit_.exitcode != 0:
        failure = root_cause.failure_of(exit_, {exit_.local_rank: event.evidence}, state.pids, _assignment(state))
        state, actions = _stop(replace(state, failure_reported=True), signal.SIGTERM, exit_.time, now)
        return state, [*actions, ReportFailure(failure)]
    if state.running:
        return state, []
    return _reap_leftovers(_enter(state, STOPPING, deadline=now, stopped_at=exit_.time), now)


def _record_exit(state: AgentState, event: Exited) -> AgentState:
    return replace(state, running=state.running - {event.exit.local_rank}, exits=(*state.exits, event.exit))


def _dump_overdue(state: AgentState, event: TimerExpired, now: float) -> Step:
    """Have a worker whose timer expired write its stacks. It is killed afterwards, and then counts as failed."""
    ranks = frozenset(rank for rank in state.running if state.pids.get(rank) == event.pid) - state.expired_timers.keys()
    if not ranks:
        return state, []
    expired = {**state.expired_timers, **dict.fromkeys(ranks, event.reason)}
    return replace(state, expired_timers=expired, deadline=now + DUMP_TIME), [DumpStacks(ranks)]


def _kill_overdue(state: AgentState, event: DeadlineReached, now: float) -> Step:
    ranks = state.running & state.expired_timers.keys()
    return replace(state, deadline=None), [SendSignal(signal.SIGKILL, ranks, stop=False)]


def _forward_signal(state: AgentState, event: UserSignalled, now: float) -> Step:
    return state, [SendSignal(event.signum, state.running, stop=False)]


def _ignore(state: AgentState, event: AgentEvent, now: float) -> Step:
    return state, []


# --- stopping


def _stop_on_signal(state: AgentState, event: Signalled, now: float) -> Step:
    log = Log(
        f"{signal_name(event.signum)} received: stopping {counted(len(state.running), 'worker')}; SIGKILL in "
        f"{state.limits.shutdown_timeout:g} s, or on a second SIGTERM or SIGINT"
    )
    state = replace(state, signum=event.signum, stopped_by_signal=True)
    state, actions = _stop(_record_stop_request(state, event), event.signum, event.time, now)
    return state, [*actions, Leave(event.signum), log]  # the log last: it may have to wait for its reader


def _stop_with_others(state: AgentState, event: Ended, now: float) -> Step:
    """Stop because another node ended the round."""
    state, actions = _stop(replace(state, end=event.end), event.end.signum or signal.SIGTERM, event.time, now)
    text = f"{headline(event.end.reason)}: stopping {counted(len(state.running), 'worker')}"
    return state, [*actions, _log_end(state, text)]


def _stop_without_a_lease(state: AgentState, event: LeaseExpired, now: float) -> Step:
    """Wait for the exits of the workers, which the keeper has already killed."""
    return _enter(state, STOPPING, deadline=now + KILL_PATIENCE, lease_expired=True), [Fence()]


def _stop(state: AgentState, signum: int, time: float, now: float) -> Step:
    """Begin to stop the workers: first a signal, then the stacks of those that hang, then SIGKILL."""
    deadline = now + state.limits.shutdown_timeout
    if not state.running:
        return _reap_leftovers(_enter(state, STOPPING, deadline=deadline, stopped_at=time), now)
    state = _enter(state, STOPPING, deadline=deadline - _dump_time(state), stopped_at=time)
    return state, [SendSignal(signum, state.running, stop=True)]


def _dump_time(state: AgentState) -> float:
    """Return the part of the shutdown timeout, in seconds, that is kept for writing stacks."""
    return min(DUMP_TIME, state.limits.shutdown_timeout / 4)


def _stopped_worker_exited(state: AgentState, event: Exited, now: float) -> Step:
    state = _record_exit(state, event)
    if state.running or state.killed:
        return state, []
    unused = 0.0 if state.hung else _dump_time(state)
    return _reap_leftovers(replace(state, deadline=(state.deadline or now) + unused), now)


def _reap_leftovers(state: AgentState, now: float) -> Step:
    """End what the workers left behind. It has the rest of the shutdown timeout, but at least ``LEFTOVER_GRACE``."""
    return replace(state, deadline=max(state.deadline or now, now + LEFTOVER_GRACE)), [ReapLeftovers(kill=False)]


def _escalate(state: AgentState, event: Signalled, now: float) -> Step:
    """Handle a signal while stopping: the job will not restart, and a second SIGTERM or SIGINT kills at once."""
    name, requested_at = signal_name(event.signum), state.stop_requested_at
    state = _record_stop_request(state, event)
    if state.signum is None:
        return replace(state, signum=event.signum), [Log(f"{name} received: the job will not restart after this round")]
    is_second = requested_at is not None and event.time - requested_at >= SAME_SIGNAL and event.signum in ESCALATING
    if not is_second or state.killed:
        return state, []
    return _kill(state, f"{name} received again", now)


def _record_stop_request(state: AgentState, event: Signalled) -> AgentState:
    is_first = state.stop_requested_at is None and event.signum in ESCALATING
    return replace(state, stop_requested_at=event.time) if is_first else state


def _stop_deadline_reached(state: AgentState, event: DeadlineReached, now: float) -> Step:
    if state.running and not state.hung and not state.killed:
        return replace(state, hung=state.running, deadline=now + _dump_time(state)), [DumpStacks(state.running)]
    if not state.killed:
        return _kill(state, "shutdown timeout reached", now)
    # Even SIGKILL does not help. The job ends on this node: a new round beside the old worker would train twice.
    log = Log(
        f"{_remaining(state)} cannot be killed (stuck in state D on a hung device or file system, or owned by another "
        "user); giving up"
    )
    return _finish_round(replace(state, may_restart=False), event.evidence, now, [log])


def _kill(state: AgentState, reason: str, now: float) -> Step:
    logs = [Log(f"{reason}: sending SIGKILL to {_remaining(state)}")] if state.running else []
    return replace(state, killed=True, deadline=now + KILL_PATIENCE), [ReapLeftovers(kill=True), *logs]


def _ended_while_stopping(state: AgentState, event: Ended, now: float) -> Step:
    state = replace(state, end=event.end)
    if state.lease_expired:
        text = f"{event.end.reason}: killed this node's workers, because others may already be taking their place"
        return state, [Log(text)]
    if event.end.mine and event.end.kind in (EndKind.STOP, EndKind.ERROR):
        return state, [Log(headline(event.end.reason))]
    if not (event.end.mine and state.failure_reported and state.running):
        return state, _log_membership_change(state)  # another line or another node tells the rest
    return state, [Log(f"{event.end.reason}: stopping {counted(len(state.running), 'worker')}")]


# --- agreeing on what follows


def _group_reaped(state: AgentState, event: GroupReaped, now: float) -> Step:
    names = ", ".join(event.leftovers)
    logs: list[Action] = [Log(f"killed processes that the workers left behind: {names}")] if names else []
    return _finish_round(state, event.evidence, now, logs)


def _finish_round(state: AgentState, evidence: Mapping[int, Evidence], now: float, actions: list[Action]) -> Step:
    """Find out what failed on this node, and have the nodes agree on what follows."""
    evidence = dict(evidence)
    for rank, reason in state.expired_timers.items():
        known = evidence.get(rank, NOTHING)
        evidence[rank] = known._replace(note="; ".join(filter(None, (reason, known.note))))
    assignment = _assignment(state)
    failures = root_cause.judge(state.exits, evidence, state.pids, assignment, state.stopped_at)
    # A worker that did not stop in time is not a cause, but the report lists it if something else failed.
    hung = tuple(
        root_cause.failure_of(exit_, evidence, state.pids, assignment)
        for exit_ in state.exits
        if exit_.local_rank in state.hung and exit_.stop_signals and exit_.exitcode == -signal.SIGKILL
    )
    actions += [Log(f"rank {it.rank} (pid {it.pid}) did not stop in time; {it.note}") for it in hung if it.note]
    if failures or (state.end is not None and state.end.kind is EndKind.FAILED):
        failures += hung
    if state.stopped_by_signal:
        return _enter(state, DONE), [*actions, Finish(signum=state.signum)]
    state = _enter(state, AGREEING, failures=failures)
    if state.end is not None:
        return state, [*actions, _round_report(state, now)]
    if state.failure_reported or state.lease_expired:
        return state, actions
    if state.signum is not None and assignment.group_world_size > 1:
        state, leave = _leave(state, state.signum)
        return state, [*actions, *leave]
    return state, [*actions, ReportSuccess(state.limits.exit_barrier_timeout)]


def _report_round(state: AgentState, event: Ended, now: float) -> Step:
    state = replace(state, end=event.end)
    return state, [*_log_membership_change(state), _round_report(state, now)]


def _round_report(state: AgentState, now: float) -> ReportRound:
    """Return this node's report, with its own decision in case that one counts."""
    assignment = _assignment(state)
    history = restart_policy.aged(assignment.restart_history, now - state.started_at)
    decision = restart_policy.follow(
        state.limits.policy, history, state.failures, "", assignment.picked_port, state.may_restart
    )
    return ReportRound(decision, state.may_restart)


def _follow_decision(state: AgentState, event: Decided, now: float) -> Step:
    """Restart or finish. A signal that arrived meanwhile prevents a restart, but does not hide a failure."""
    decision = event.decision
    if not decision.restart:
        done = state.end is not None and state.end.kind is EndKind.DONE and state.signum is None
        log = _log_once(state, f"done: {counted(_assignment(state).world_size, 'worker')} succeeded")
        state, actions = _finish(state, decision)
        return state, [log, *actions] if done else actions
    if state.signum is not None:
        return _leave(state, state.signum)
    if not state.may_restart:
        error = f"{_remaining(state)} cannot be killed, so this node does not take part in another round"
        return _enter(state, DONE), [Leave(signal.SIGKILL), Finish(error=error, status=ExitCode.UNAVAILABLE)]
    logs: list[Action] = [_log_end(state, _restart_line(state, decision))] if decision.failures else []
    is_alone = _assignment(state).group_world_size == 1
    state = AgentState(state.limits, history=state.history)
    if decision.pause and is_alone:  # several nodes join at once, and the round closes after the pause
        return _enter(state, PAUSING, deadline=now + decision.pause), logs
    return state, [*logs, RequestJoin()]


def _finish(state: AgentState, decision: Decision) -> Step:
    restarts = decision.restart_history.used if decision.failures else 0  # a spare knows it from the decision only
    finish = Finish(decision.failures, decision.signum or None, decision.error, decision.status, decision.why, restarts)
    return _enter(state, DONE), [finish]


def _join(state: AgentState, event: DeadlineReached, now: float) -> Step:
    return _enter(state, JOINING), [RequestJoin()]


def _leave_while_agreeing(state: AgentState, event: Signalled, now: float) -> Step:
    """Leave, unless the other nodes wait for this node's decision."""
    if state.failure_reported and (state.end is None or state.end.mine):
        return replace(state, signum=event.signum), []
    return _leave(state, event.signum)


# --- log lines


def _restart_line(state: AgentState, decision: Decision) -> str:
    assignment = _assignment(state)
    if decision.restart_history.uncharged > assignment.restart_history.uncharged:
        return "MASTER_PORT was taken by another process: restarting on another port, without using up a restart"
    pause = f" in {decision.pause:g} s" if decision.pause else ""
    count = f"restart {decision.restart_history.used} of {state.limits.policy.max_restarts}"
    return f"{decision.failures[0].headline(with_host=assignment.group_world_size > 1)}: {count}{pause}"


def _log_membership_change(state: AgentState) -> list[Action]:
    """Log why another round follows, unless this node has logged it already."""
    end = state.end
    if end is None or end.kind is not EndKind.MEMBERSHIP_CHANGED or state.lease_expired or state.stopped_by_signal:
        return []
    return [_log_end(state, headline(end.reason))]


def _log_end(state: AgentState, text: str) -> Log:
    """Log how the round ended: on the node that ended it, and on one of the others."""
    if state.end is not None and state.end.mine:
        return Log(text)
    return _log_once(state, text, leaving=state.end.rank if state.end is not None else -1)


def _log_once(state: AgentState, text: str, leaving: int = -1) -> Log:
    """Log once per job: on the node with group rank 0, or with group rank 1 if the former is ``leaving``."""
    logging_rank = 1 if leaving == 0 else 0
    return Log(text, Level.INFO if _assignment(state).group_rank == logging_rank else Level.DEBUG)


def _remaining(state: AgentState) -> str:
    """Name the processes that have not exited."""
    if not state.running:
        return "a process that a worker left behind"
    names = ", ".join(
        f"{_assignment(state).rank(local)} (pid {state.pids.get(local, -1)})" for local in sorted(state.running)
    )
    return f"worker rank {names}" if len(state.running) == 1 else f"workers {names}"


def _assignment(state: AgentState) -> Assignment:
    if state.assignment is None:
        raise LaunchError(f"internal error: no assignment while {state.phase.value}")
    return state.assignment


def _row(
    kind: type[AgentEvent], handler: Handler, *phases: AgentPhase, ignored: tuple[AgentPhase, ...] = ()
) -> dict[tuple[AgentPhase, type[AgentEvent]], Handler]:
    return {(phase, kind): handler for phase in phases} | {(phase, kind): _ignore for phase in ignored}


TABLE: dict[tuple[AgentPhase, type[AgentEvent]], Handler] = {
    # The rendezvous.
    **_row(Assigned, _start, JOINING),
    **_row(Ended, _stop_with_others, RUNNING),
    **_row(Ended, _ended_while_stopping, STOPPING),
    **_row(Ended, _report_round, AGREEING),
    **_row(Decided, _follow_decision, AGREEING),
    **_row(Decided, _end_without_a_round, JOINING, PAUSING),
    # The workers. AGREEING ignores what comes from a round that was given up because a process could not be killed.
    **_row(Started, _record_pids, RUNNING, STOPPING, ignored=(AGREEING,)),
    **_row(Exited, _worker_exited, RUNNING),
    **_row(Exited, _stopped_worker_exited, STOPPING, ignored=(AGREEING,)),
    **_row(GroupReaped, _group_reaped, STOPPING, ignored=(AGREEING,)),
    **_row(LeaseExpired, _stop_without_a_lease, RUNNING, ignored=(STOPPING, AGREEING)),
    **_row(TimerExpired, _dump_overdue, RUNNING, ignored=(JOINING, STOPPING, AGREEING, PAUSING)),
    # Signals.
    **_row(Signalled, _leave_on_signal, JOINING, PAUSING),
    **_row(Signalled, _stop_on_signal, RUNNING),
    **_row(Signalled, _escalate, STOPPING),
    **_row(Signalled, _leave_while_agreeing, AGREEING),
    **_row(UserSignalled, _forward_signal, RUNNING, STOPPING, ignored=(JOINING, AGREEING, PAUSING)),
    # Time.
    **_row(DeadlineReached, _kill_overdue, RUNNING),
    **_row(DeadlineReached, _stop_deadline_reached, STOPPING),
    **_row(DeadlineReached, _join, PAUSING),
}
