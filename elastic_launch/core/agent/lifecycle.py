"""Decide what the agent does next: one table of phase and event.

    JOINING -> RUNNING -> ([HOLDING -> [DRAINING ->]] STOPPING -> AGREEING -> [PAUSING ->] JOINING)* -> DONE

With a health check, CHECKING (-> UNFIT -> CHECKING)* comes before each JOINING.

``step`` takes the state, an event and the time. It returns the next state and the actions that the agent must carry
out. To change how the agent reacts to an event, find its row in ``TABLE`` at the end of this file.

Every round ends through STOPPING, even a successful one, so that no process outlives its round. The workers are stopped
and awaited, then their leftovers are reaped; at ``deadline`` whatever is left gets SIGKILL. After ``GroupReaped`` the
nodes agree on what follows: the node that ended the round decides, and all others do the same. On a single node the
rendezvous answers at once.

Workers that call ``should_stop()`` are stopped by SIGTERM at the same step on all nodes. The node that gets the signal
ends the round in that way. Each node then holds its workers, which wait in their next call, and reports the number of
calls that they have begun. No rank has passed the call after the greatest of these numbers, so all stop there. Until
the nodes agree, and if they do not, the workers can still be stopped in the ordinary way.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

from elastic_launch.core.agent import restart_policy, root_cause
from elastic_launch.core.agent.messages import (
    Action,
    AgentEvent,
    Assigned,
    CheckFailed,
    CheckLimits,
    CheckPassed,
    DeadlineReached,
    Decided,
    DumpStacks,
    Ended,
    Exited,
    Fence,
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
    RunCheck,
    SendSignal,
    SetStop,
    Signalled,
    Start,
    Started,
    StopAgreed,
    StopCheck,
    TimerExpired,
    UserSignalled,
    Withdraw,
)
from elastic_launch.core.agent.root_cause import NOTHING, Exit
from elastic_launch.core.progress import goodput
from elastic_launch.core.progress.goodput import RoundProgress
from elastic_launch.core.text import counted, headline
from elastic_launch.errors import ExitCode, LaunchError, ProcessFailure, signal_name
from elastic_launch.job import Assignment, Decision, End, EndKind, Goodput, Level, LineKind

ESCALATING = frozenset({signal.SIGTERM, signal.SIGINT})
"""The second of these signals kills at once. SIGHUP is not one of them: a closing terminal may send it twice."""
SAME_SIGNAL = 0.2
"""Signals this close together, in seconds, count as one: batch systems signal both a process and its group."""
LEFTOVER_GRACE = 1.0
"""Minimum seconds between SIGTERM and SIGKILL for processes that outlived their worker."""
DUMP_TIME = 0.5
"""Maximum seconds that a hung worker has to write its stacks before SIGKILL."""
HOLD_TIME = 0.05
"""Seconds after which no worker can pass a call of ``should_stop()`` that the agent does not see.

A worker counts a call before it looks whether to wait, on a processor that may show both to others a moment later.
"""
AGREEMENT_TIME = 10.0
"""Maximum seconds, from the signal on, until the nodes agree at which step to stop; at most half of the timeout."""
FINAL_GRACE = 5.0
"""Seconds before the end of the shutdown timeout when workers that have not stopped at that step get a stop signal.

At most a third of the timeout.
"""
KILL_PATIENCE = 5.0
"""Seconds after SIGKILL until a process counts as unkillable, usually one in state D on a hung file system."""
CHECK_PAUSE, MAX_CHECK_PAUSE = 5.0, 60.0
"""Seconds after a failed health check until the next one: after the first, doubled up to the second number."""


class AgentPhase(Enum):
    """What the agent is doing."""

    CHECKING = "checking"
    """The node's health check runs."""
    UNFIT = "unfit"
    """The health check has failed, and is tried again after a pause. The other nodes do not wait."""
    JOINING = "joining"
    RUNNING = "running"
    HOLDING = "holding"
    """The nodes agree at which step the workers stop. Workers that come to ``should_stop()`` wait there."""
    DRAINING = "draining"
    """The workers go on to that step, and end by themselves."""
    STOPPING = "stopping"
    AGREEING = "agreeing"
    """The workers are gone, and the nodes have not agreed yet on what follows."""
    PAUSING = "pausing"
    """Waiting before the next round of a single-node job."""
    DONE = "done"


CHECKING, UNFIT, JOINING, RUNNING, HOLDING, DRAINING, STOPPING, AGREEING, PAUSING, DONE = AgentPhase


@dataclass(frozen=True)
class AgentState:
    """Everything that the agent's decisions depend on."""

    limits: Limits
    phase: AgentPhase = JOINING
    restart_count: int = 0
    """Number of the round to join, as far as the node knows."""
    attempts: int = 0
    """How often the health check was run before this round."""
    checked_since: float = 0.0
    """When it was run first, on the agent's monotonic clock."""
    is_overdue: bool = False
    """Whether the check was stopped because it took too long."""
    check_failure: str = ""
    """Why it has failed before this round, in one line; empty: it has not."""
    assignment: Assignment | None = None
    end: End | None = None
    """Why the round is over; None until that is known."""
    started_at: float = 0.0
    """When the round started on this node, on the agent's monotonic clock."""
    failure_reported: bool = False
    """Whether this node has reported a failure in this round."""
    hang: ProcessFailure | None = None
    """The worker because of which this round is ended although it runs: it keeps the job from making progress."""
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
    over_at: float = 0.0
    """When it did, or the last worker ended, on the agent's monotonic clock."""
    gone_at: float = 0.0
    """When no process of the round was left, on that clock."""
    progress: RoundProgress | None = None
    """What the round's workers made; None: nobody counts, or they still run."""
    kill_at: float | None = None
    """When a shutdown timeout ends that began before the stop signal, on the agent's monotonic clock."""
    has_reported_calls: bool = False
    """Whether the other nodes know how far this node's workers have come."""
    signum: int | None = None
    """The signal that ends the job."""
    stopped_by_signal: bool = False
    """Whether the signal in ``signum`` ended the round."""
    stop_reason: str = ""
    """Why the whole job stops; empty: it does not, or this node is the only one that leaves."""
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


class Transition(NamedTuple):
    """What a step did, for those who record it."""

    before: AgentState | None
    """The state before; None for the first step."""
    event: AgentEvent | None
    """What happened; None for the first step."""
    after: AgentState
    actions: list[Action]
    now: float
    """When it happened, on the agent's monotonic clock."""
    time: float
    """When it happened, in seconds since 1970."""


Step = tuple[AgentState, list[Action]]
Handler = Callable[[AgentState, Any, float], Step]


class UnexpectedEventError(LaunchError):
    """``TABLE`` has no entry for an event in this phase: a defect of the launcher."""

    def __init__(self, state: AgentState, event: AgentEvent) -> None:
        super().__init__(
            f"internal error: {type(event).__name__} while {state.phase.value}; history: {', '.join(state.history)}"
        )


def begin(limits: Limits, now: float = 0.0) -> Step:
    """Return an agent's initial state and first action; ``now`` as for ``step``, only a health check needs it."""
    return _seek_round(AgentState(limits), now)


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


# --- the health check


def _seek_round(state: AgentState, now: float) -> Step:
    """Join the next round, once the health check has passed if there is one."""
    if state.limits.check is None:
        return _enter(state, JOINING), [RequestJoin()]
    return _run_check(replace(state, attempts=0, checked_since=now, check_failure=""), now)


def _run_check(state: AgentState, now: float) -> Step:
    attempts = state.attempts + 1
    state = _enter(state, CHECKING, now + _check_limits(state).timeout, attempts=attempts, is_overdue=False)
    return state, [RunCheck(attempts, state.restart_count)]


def _check_again(state: AgentState, event: DeadlineReached | RestartRequested, now: float) -> Step:
    return _run_check(state, now)


def _check_passed(state: AgentState, event: CheckPassed, now: float) -> Step:
    actions: list[Action] = [RequestJoin(has_check=True)]
    if state.check_failure:
        actions.append(Log("health check passed: joining", Level.INFO))
    return _enter(state, JOINING, check_failure=""), actions


def _check_failed(state: AgentState, event: CheckFailed, now: float) -> Step:
    """Try again after a pause, until there is no time left."""
    limits = _check_limits(state)
    how = f"no result within {limits.timeout:g} s" if state.is_overdue else event.how
    *_, last_line = event.output.splitlines() or [""]
    reason = f"{last_line.strip()} ({how})" if last_line.strip() else how
    left = state.checked_since + limits.patience - now
    if left <= 0:
        text = f"health check failed: {reason}; gave up after {limits.patience:g} s (join_timeout)"
        leave = Leave(error=text, status=ExitCode.UNAVAILABLE)
        finish = Finish(error=text, status=ExitCode.UNAVAILABLE)
        return _enter(state, DONE, check_failure=reason), [leave, finish]
    pause = min(CHECK_PAUSE * 2.0 ** min(state.attempts - 1, 16), MAX_CHECK_PAUSE, left)
    text = f"health check failed: {reason}; checking again in {pause:.3g} s"
    if reason != state.check_failure and "\n" in event.output:  # one line is in the reason
        text = "\n    ".join([text, *event.output.splitlines()])
    return _enter(state, UNFIT, now + pause, check_failure=reason), [Withdraw(reason), Log(text)]


def _check_overdue(state: AgentState, event: DeadlineReached, now: float) -> Step:
    """Kill the check. One that cannot be killed, because a device hangs, has failed, too."""
    if state.is_overdue:
        return _check_failed(state, CheckFailed(""), now)
    return replace(state, is_overdue=True, deadline=now + KILL_PATIENCE), [StopCheck()]


def _leave_while_checking(state: AgentState, event: Signalled, now: float) -> Step:
    state, actions = _leave_on_signal(state, event, now)
    return state, [StopCheck(), *actions]


def _end_while_checking(state: AgentState, event: Decided, now: float) -> Step:
    state, actions = _end_without_a_round(state, event, now)
    return state, [StopCheck(), *actions]


def _check_limits(state: AgentState) -> CheckLimits:
    assert state.limits.check is not None, f"no health check while {state.phase.value}"
    return state.limits.check


# --- joining and running


def _start(state: AgentState, event: Assigned, now: float) -> Step:
    assignment = event.assignment
    ranks = frozenset(range(assignment.local_world_size))
    state = _enter(state, RUNNING, assignment=assignment, running=ranks, started_at=now)
    return state, [Start(assignment), _log_once(state, formed(assignment))]


def formed(assignment: Assignment) -> str:
    """Return the log line of a round that begins."""
    what = "re-formed" if assignment.restart_count else "formed"
    return f"{what}: {counted(assignment.group_world_size, 'node')}, {counted(assignment.world_size, 'worker')}"


def started(assignment: Assignment, pids: Mapping[int, int], files: str) -> str:
    """Return the log line, for ``-v``, of workers that this node has started.

    Args:
        assignment: the node's ranks.
        pids: process ids by local rank.
        files: the directory of the job's files; empty if it has none.
    """
    workers = ", ".join(f"rank {assignment.rank(local)} (pid {pid})" for local, pid in sorted(pids.items()))
    return f"started{on_host(assignment)}: {workers or 'no worker'}" + (f"; files: {files}" if files else "")


def on_host(assignment: Assignment) -> str:
    """Return `` on HOST`` if the job has several nodes."""
    return f" on {assignment.host}" if assignment.group_world_size > 1 else ""


def _leave_on_signal(state: AgentState, event: Signalled, now: float) -> Step:
    return _leave(_record_stop_request(state, event), event.signum)


def _leave(state: AgentState, signum: int) -> Step:
    return _enter(state, DONE), [Leave(signum, reason=state.stop_reason), Finish(signum=signum)]


def _decided_while_joining(state: AgentState, event: Decided, now: float) -> Step:
    """End with the job. If another round follows, this spare is to be checked before it."""
    if event.decision.restart and state.limits.check:
        return _seek_round(state, now)
    return _end_without_a_round(state, event, now)


def _end_without_a_round(state: AgentState, event: Decided, now: float) -> Step:
    if event.decision.restart:
        raise UnexpectedEventError(state, event)
    return _finish(state, event.decision, event.decision.restart_history.goodput)


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
    return _reap_leftovers(_enter(state, STOPPING, deadline=now, stopped_at=exit_.time, over_at=now), now)


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


def _stop_hang(state: AgentState, event: Hung, now: float) -> Step:
    """End the round for all nodes: a worker that runs keeps the job from making progress."""
    if event.local_rank not in state.running:
        return state, []
    hang = ProcessFailure(
        local_rank=event.local_rank,
        pid=state.pids.get(event.local_rank, -1),
        exitcode=ExitCode.HANG,
        error=event.error,
        traceback=event.report,
        failed_at=event.time,
        rank=_assignment(state).rank(event.local_rank),
        host=_assignment(state).host,
        is_hang=True,
    )
    state, actions = _stop(replace(state, failure_reported=True, hang=hang), signal.SIGTERM, event.time, now)
    return state, [*actions, ReportFailure(hang)]


def _forward_signal(state: AgentState, event: UserSignalled, now: float) -> Step:
    return state, [SendSignal(event.signum, state.running, stop=False)]


def _request_restart(state: AgentState, event: RestartRequested, now: float) -> Step:
    """Have the round end on all nodes. While joining this matters to a spare only: the others run without it."""
    return state, [RequestRestart(event.reason)]


def _ignore(state: AgentState, event: AgentEvent, now: float) -> Step:
    return state, []


# --- stopping at the same step


def _signalled(state: AgentState, event: Signalled, now: float) -> Step:
    """Stop the workers: at the same step on all nodes, if the signal is SIGTERM and a worker asks for that."""
    if event.signum != signal.SIGTERM or not event.calls:
        return _stop_on_signal(state, event, now)
    state = _begin_to_stop(_record_stop_request(state, event), event.time, now)
    state = replace(state, signum=event.signum, stopped_by_signal=True, deadline=_agree_by(state))
    log = Log(
        f"{_stop_cause(event)}: stopping all workers at the same step (they use should_stop()); SIGTERM to workers in "
        f"{_stop_by(state) - now:g} s"
    )
    return state, [RequestStop(event.signum, event.reason), log]


def _ended(state: AgentState, event: Ended, now: float) -> Step:
    """Stop because a node ended the round."""
    if not event.end.same_step:
        return _stop_with_others(state, event, now)
    was_running = state.phase is RUNNING  # otherwise this node got the signal, and has logged it
    if was_running:
        state = _begin_to_stop(state, event.time, now)
    state = replace(state, end=event.end, deadline=now + HOLD_TIME)
    logs = _log_same_step(state) if was_running or event.end.kind is EndKind.STOP else []
    return state, [SetStop(hold=True, stop_at=0), *logs]


def _begin_to_stop(state: AgentState, time: float, now: float) -> AgentState:
    return _enter(state, HOLDING, stopped_at=time, kill_at=now + state.limits.shutdown_timeout)


def _agree_by(state: AgentState) -> float:
    timeout = state.limits.shutdown_timeout
    return _kill_at(state) - timeout + min(AGREEMENT_TIME, timeout / 2)


def _stop_by(state: AgentState) -> float:
    return _kill_at(state) - min(FINAL_GRACE, state.limits.shutdown_timeout / 3)


def _kill_at(state: AgentState) -> float:
    assert state.kill_at is not None, f"no end of the timeout while {state.phase.value}"
    return state.kill_at


def _holding_deadline_reached(state: AgentState, event: DeadlineReached, now: float) -> Step:
    """Report how far the held workers have come; later give up, for all nodes if the store answers."""
    if state.end is None or now >= _stop_by(state):
        return _stop_anyway(state, now, "the store does not answer")
    if state.has_reported_calls:
        return replace(state, deadline=_stop_by(state)), [GiveUpStop()]
    return replace(state, has_reported_calls=True, deadline=_agree_by(state)), [ReportCalls(event.calls)]


def _stop_agreed(state: AgentState, event: StopAgreed, now: float) -> Step:
    if not event.stop_at:
        state, actions = _stop_anyway(state, now, "the nodes could not agree on a step")
        leaves = [Leave(state.signum, reason=state.stop_reason)] if state.stopped_by_signal and state.signum else []
        return state, [*actions, *leaves]
    log = _log_once(state, f"all ranks stop at their call {event.stop_at} of should_stop()")
    actions = [SetStop(hold=False, stop_at=event.stop_at), log]
    if state.running:
        return _enter(state, DRAINING, deadline=_stop_by(state)), actions
    state, more = _stop(state, signal.SIGTERM, state.stopped_at, now)
    return state, [*actions, *more]


def _draining_deadline_reached(state: AgentState, event: DeadlineReached, now: float) -> Step:
    return _stop_anyway(state, now, f"{_remaining(state)} did not stop at the agreed step")


def _stop_anyway(state: AgentState, now: float, why: str) -> Step:
    """Stop the workers in the ordinary way, in what is left of the shutdown timeout. They need not wait any more."""
    logs = [Log(f"{why}: stopping {counted(len(state.running), 'worker')}")] if state.running else []
    state, actions = _stop(state, signal.SIGTERM, state.stopped_at, now)
    return state, [*actions, SetStop(hold=False, stop_at=0), *logs]


def _worker_exited_early(state: AgentState, event: Exited, now: float) -> Step:
    """Wait for the other workers, and until the nodes have agreed; but do not let them wait for one that failed."""
    exit_, is_holding = event.exit, state.phase is HOLDING
    state = _record_exit(state, event)
    if exit_.exitcode == 0:
        return (state, []) if state.running or is_holding else _stop(state, signal.SIGTERM, state.stopped_at, now)
    failure = root_cause.failure_of(exit_, {exit_.local_rank: event.evidence}, state.pids, _assignment(state))
    state, actions = _stop_anyway(state, now, failure.headline(with_host=_assignment(state).group_world_size > 1))
    return state, [*actions, *_give_up(state, is_holding)]


def _give_up(state: AgentState, is_holding: bool) -> list[Action]:
    """Tell the other nodes that this one takes no part in the agreement, if they are to agree."""
    return [GiveUpStop()] if is_holding and state.end is not None else []


def _late_calls(state: AgentState, event: Ended) -> list[Action]:
    """Say how far this node's workers had come when they ended; if they were stopped elsewhere, give up."""
    if not event.end.same_step:
        return []
    have_ended = not state.running and all(exit_.exitcode == 0 and not exit_.stop_signals for exit_ in state.exits)
    return [ReportCalls(event.calls) if have_ended else GiveUpStop()]


# --- stopping


def _stop_on_signal(state: AgentState, event: Signalled, now: float) -> Step:
    log = Log(
        f"{_stop_cause(event)}: stopping {counted(len(state.running), 'worker')}; SIGKILL in "
        f"{state.limits.shutdown_timeout:g} s, or on a second SIGTERM or SIGINT"
    )
    state = replace(state, signum=event.signum, stopped_by_signal=True)
    state, actions = _stop(_record_stop_request(state, event), event.signum, event.time, now)
    # The log last: it may have to wait for its reader.
    return state, [*actions, Leave(event.signum, reason=event.reason), log]


def _stop_cause(event: Signalled) -> str:
    return event.reason or f"{signal_name(event.signum)} received"


def _stop_with_others(state: AgentState, event: Ended, now: float) -> Step:
    """Stop because another node ended the round."""
    is_holding = state.phase is HOLDING
    state, actions = _stop(replace(state, end=event.end), event.end.signum or signal.SIGTERM, event.time, now)
    text = f"{headline(event.end.reason)}: stopping {counted(len(state.running), 'worker')}"
    return state, [*actions, *([SetStop(hold=False, stop_at=0)] if is_holding else []), _log_end(state, text)]


def _stop_without_a_lease(state: AgentState, event: LeaseExpired, now: float) -> Step:
    """Wait for the exits of the workers, which the keeper has already killed."""
    return _enter(state, STOPPING, deadline=now + KILL_PATIENCE, lease_expired=True, over_at=now), [Fence()]


def _stop(state: AgentState, signum: int, time: float, now: float) -> Step:
    """Begin to stop the workers: first a signal, then the stacks of those that hang, then SIGKILL."""
    deadline = now + state.limits.shutdown_timeout if state.kill_at is None else state.kill_at
    state = _enter(state, STOPPING, deadline=deadline, stopped_at=time, over_at=now)
    if not state.running:
        return _reap_leftovers(state, now)
    state = replace(state, deadline=deadline - _dump_time(state))
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
    cause, requested_at, is_holding = _stop_cause(event), state.stop_requested_at, state.phase is HOLDING
    state = _record_stop_request(state, event)
    if state.signum is None:
        return replace(state, signum=event.signum), [Log(f"{cause}: the job will not restart after this round")]
    is_second = requested_at is not None and event.time - requested_at >= SAME_SIGNAL and event.signum in ESCALATING
    if not is_second or state.killed:
        return state, []
    state, actions = _kill(state, f"{cause} again", now)
    return state, [*actions, *_give_up(state, is_holding)]


def _record_stop_request(state: AgentState, event: Signalled) -> AgentState:
    state = replace(state, stop_reason=event.reason or state.stop_reason)
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
    return _finish_round(replace(state, may_restart=False), event, now, [log])


def _kill(state: AgentState, reason: str, now: float) -> Step:
    logs = [Log(f"{reason}: sending SIGKILL to {_remaining(state)}")] if state.running else []
    return _enter(state, STOPPING, deadline=now + KILL_PATIENCE, killed=True), [ReapLeftovers(kill=True), *logs]


def _ended_while_stopping(state: AgentState, event: Ended, now: float) -> Step:
    state = replace(state, end=event.end)
    return state, [*_late_calls(state, event), *_log_end_while_stopping(state, event.end)]


# --- agreeing on what follows


def _group_reaped(state: AgentState, event: GroupReaped, now: float) -> Step:
    names = ", ".join(event.leftovers)
    logs: list[Action] = [Log(f"killed processes that the workers left behind: {names}")] if names else []
    return _finish_round(state, event, now, logs)


def _finish_round(state: AgentState, event: GroupReaped | DeadlineReached, now: float, actions: list[Action]) -> Step:
    """Find out what failed on this node, and have the nodes agree on what follows."""
    state = replace(state, progress=event.progress, gone_at=now)
    evidence = dict(event.evidence)
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
    if hang := state.hang:
        failures = (hang, *(failure for failure in failures if failure.local_rank != hang.local_rank))
        hung = tuple(it for it in hung if it.local_rank != hang.local_rank)
    actions += [Log(f"rank {it.rank} (pid {it.pid}) did not stop in time; {it.note}") for it in hung if it.note]
    if failures or (state.end is not None and state.end.kind is EndKind.FAILED):
        failures += hung
    if state.stopped_by_signal:
        return _enter(state, DONE), [*actions, Finish(signum=state.signum, goodput=_goodput(state, now))]
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
    return state, [*_late_calls(state, event), *_log_membership_change(state), _round_report(state, now)]


def _round_report(state: AgentState, now: float) -> ReportRound:
    """Return this node's report, with its own decision in case that one counts."""
    assignment = _assignment(state)
    history = restart_policy.aged(assignment.restart_history, now - state.started_at)
    history = history._replace(goodput=_goodput(state, now))
    if state.end is not None and state.end.kind is EndKind.MEMBERSHIP_CHANGED:
        return ReportRound(Decision(True, history), state.may_restart)  # whatever failed meanwhile
    decision = restart_policy.follow(
        state.limits.policy, history, state.failures, "", assignment.picked_port, state.may_restart
    )
    return ReportRound(decision, state.may_restart)


def _follow_decision(state: AgentState, event: Decided, now: float) -> Step:
    """Restart or finish. A signal that arrived meanwhile prevents a restart, but does not hide a failure."""
    decision = event.decision
    if not decision.restart:
        done = state.end is not None and state.end.kind is EndKind.DONE and state.signum is None
        made = goodput.furthest(decision.restart_history.goodput, _goodput(state, now))
        workers = f"done: {counted(_assignment(state).world_size, 'worker')} succeeded"
        log = _log_once(state, "; ".join(filter(None, (workers, goodput.summary(made)))))
        state, actions = _finish(state, decision, made)
        return state, [log, *actions] if done else actions
    if state.signum is not None:
        return _leave(state, state.signum)
    if not state.may_restart:
        error = f"{_remaining(state)} cannot be killed, so this node does not take part in another round"
        return _enter(state, DONE), [Leave(signal.SIGKILL), Finish(error=error, status=ExitCode.UNAVAILABLE)]
    logs: list[Action] = []
    if decision.failures:
        logs = [_log_end(state, _restart_line(state, decision))._replace(kind=LineKind.FAILURE)]
    is_alone, restart_count = _assignment(state).group_world_size == 1, _assignment(state).restart_count + 1
    state = AgentState(state.limits, restart_count=restart_count, history=state.history)
    if decision.pause and is_alone:  # several nodes join at once, and the round closes after the pause
        return _enter(state, PAUSING, deadline=now + decision.pause), logs
    state, actions = _seek_round(state, now)
    return state, [*logs, *actions]


def _goodput(state: AgentState, now: float) -> Goodput:
    """Return what the job has got done, with this node's part of the round once its workers are gone."""
    if state.assignment is None:
        return Goodput()
    past = state.assignment.restart_history.goodput
    if state.progress is None:
        return goodput.aged(past, now - state.started_at)
    return goodput.with_round(past, state.progress, state.started_at, state.over_at, state.gone_at, now)


def _finish(state: AgentState, decision: Decision, made: Goodput) -> Step:
    restarts = decision.restart_history.used if decision.failures else 0  # a spare knows it from the decision only
    failures, signum, error = decision.failures, decision.signum or None, decision.error
    return _enter(state, DONE), [Finish(failures, signum, error, decision.status, decision.why, restarts, made)]


def _join(state: AgentState, event: DeadlineReached | RestartRequested, now: float) -> Step:
    return _seek_round(state, now)


def _leave_while_agreeing(state: AgentState, event: Signalled, now: float) -> Step:
    """Leave, unless the other nodes wait for this node's decision."""
    state = _record_stop_request(state, event)
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


def _log_end_while_stopping(state: AgentState, end: End) -> list[Action]:
    if state.lease_expired:
        return [
            Log(f"{end.reason}: killed this node's workers, because others may already be taking their place"),
        ]
    if end.mine and end.kind in (EndKind.STOP, EndKind.ERROR):
        return [] if state.stop_reason else [Log(headline(end.reason))]  # with a reason, the line has been logged
    if not (end.mine and state.failure_reported and state.running):
        return _log_membership_change(state)  # another line or another node tells the rest
    return [Log(f"{end.reason}: stopping {counted(len(state.running), 'worker')}", kind=LineKind.FAILURE)]


def _log_same_step(state: AgentState) -> list[Action]:
    end, assignment = state.end, _assignment(state)
    if end is None or assignment.group_world_size == 1:
        return []
    return [
        _log_end(state, f"{headline(end.reason)}: stopping {counted(len(state.running), 'worker')} at the same step")
    ]


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


WITHOUT_WORKERS = (CHECKING, UNFIT, JOINING, PAUSING)
"""The phases between two rounds."""

TABLE: dict[tuple[AgentPhase, type[AgentEvent]], Handler] = {
    # The rendezvous.
    **_row(Assigned, _start, JOINING),
    **_row(Ended, _ended, RUNNING, HOLDING),
    **_row(Ended, _ended_while_stopping, STOPPING),
    **_row(Ended, _report_round, AGREEING),
    **_row(StopAgreed, _stop_agreed, HOLDING, ignored=(STOPPING, AGREEING)),
    **_row(Decided, _follow_decision, AGREEING),
    **_row(Decided, _decided_while_joining, JOINING),
    **_row(Decided, _end_without_a_round, UNFIT, PAUSING),
    **_row(Decided, _end_while_checking, CHECKING),
    # The health check. UNFIT ignores one that was given up because it could not be killed.
    **_row(CheckPassed, _check_passed, CHECKING, ignored=(UNFIT,)),
    **_row(CheckFailed, _check_failed, CHECKING, ignored=(UNFIT,)),
    # The workers. AGREEING ignores what comes from a round that was given up because a process could not be killed.
    **_row(Started, _record_pids, RUNNING, HOLDING, DRAINING, STOPPING, ignored=(AGREEING,)),
    **_row(Exited, _worker_exited, RUNNING),
    **_row(Exited, _worker_exited_early, HOLDING, DRAINING),
    **_row(Exited, _stopped_worker_exited, STOPPING, ignored=(AGREEING,)),
    **_row(GroupReaped, _group_reaped, STOPPING, ignored=(AGREEING,)),
    **_row(Hung, _stop_hang, RUNNING, ignored=(*WITHOUT_WORKERS, HOLDING, DRAINING, STOPPING, AGREEING)),
    **_row(LeaseExpired, _stop_without_a_lease, RUNNING, ignored=(HOLDING, DRAINING, STOPPING, AGREEING)),
    **_row(TimerExpired, _dump_overdue, RUNNING, ignored=(*WITHOUT_WORKERS, HOLDING, DRAINING, STOPPING, AGREEING)),
    # The user.
    **_row(Signalled, _leave_on_signal, UNFIT, JOINING, PAUSING),
    **_row(Signalled, _leave_while_checking, CHECKING),
    **_row(Signalled, _signalled, RUNNING),
    **_row(Signalled, _escalate, HOLDING, DRAINING, STOPPING),
    **_row(Signalled, _leave_while_agreeing, AGREEING),
    **_row(
        RestartRequested, _request_restart, JOINING, RUNNING, AGREEING, ignored=(CHECKING, HOLDING, DRAINING, STOPPING)
    ),
    **_row(RestartRequested, _check_again, UNFIT),
    **_row(RestartRequested, _join, PAUSING),
    **_row(UserSignalled, _forward_signal, RUNNING, HOLDING, DRAINING, STOPPING, ignored=(*WITHOUT_WORKERS, AGREEING)),
    # Time.
    **_row(DeadlineReached, _check_overdue, CHECKING),
    **_row(DeadlineReached, _check_again, UNFIT),
    **_row(DeadlineReached, _kill_overdue, RUNNING),
    **_row(DeadlineReached, _holding_deadline_reached, HOLDING),
    **_row(DeadlineReached, _draining_deadline_reached, DRAINING),
    **_row(DeadlineReached, _stop_deadline_reached, STOPPING),
    **_row(DeadlineReached, _join, PAUSING),
}
