"""Layer 1: the agent's whole life, as one table of state and event. Pure.

    JOINING -> RUNNING -> (STOPPING -> AGREEING -> [PAUSING ->] JOINING)* -> DONE

``step`` takes the state, an event and the time; it returns the next state and the actions that the agent must carry
out. Every round ends through STOPPING, even a successful one, so that nothing a worker started outlives its round: the
workers are signalled and awaited, then their leftovers are reaped; at ``deadline`` the rest gets SIGKILL. After
``GroupReaped`` the nodes agree on what follows: the one that ended the round decides, and all do that. On a single node
the rendezvous answers at once. An event that ``TABLE`` does not list for the phase raises ``UnexpectedEventError`` with
the history.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from elastic_launch.core.agent import restart_policy as policy
from elastic_launch.core.agent import root_cause
from elastic_launch.core.agent.root_cause import NOTHING, Evidence, Exit
from elastic_launch.errors import ExitCode, LaunchError, ProcessFailure, signal_name
from elastic_launch.job import Assignment, Decision, End, EndKind, Level, Policy

ESCALATING = frozenset({signal.SIGTERM, signal.SIGINT})
"""A second one of these kills at once. A second SIGHUP does not: a closing terminal may well send two."""
DOUBLE = 0.2
"""Seconds within which a second signal is the first one, delivered twice: to the process and to its group, or by both a
batch system's daemon and its step."""
LEFTOVER_GRACE = 1.0
"""Seconds, at least, between SIGTERM and SIGKILL for what the workers left behind when they ended."""
DUMP_TIME = 0.5
"""Seconds, at most, that a hung worker has to write the stacks of its threads before SIGKILL."""
KILL_PATIENCE = 5.0
"""Seconds after SIGKILL until a process is given up as unkillable (state D, usually a hung file system)."""


class AgentPhase(Enum):
    """Where the agent stands."""

    JOINING = "joining"
    RUNNING = "running"
    STOPPING = "stopping"
    AGREEING = "settling"
    """The workers are gone; what follows is not agreed yet."""
    PAUSING = "pausing"
    """Another round of a single node follows, but not at once."""
    DONE = "done"


# Events: what happened. (Named tuples, not dataclasses: they cost the agent's start a tenth.)


class Assigned(NamedTuple):
    """The rendezvous gave the node its place in a round."""

    assignment: Assignment


class Started(NamedTuple):
    """The workers' processes exist. Those that could not be started are missing, and an ``Exited`` follows."""

    pids: Mapping[int, int]


class Exited(NamedTuple):
    """A worker's process ended."""

    exit: Exit
    evidence: Evidence = NOTHING
    """What is known at once of a bad end that was not asked for."""


class Signalled(NamedTuple):
    """A signal came that stops the job."""

    signum: int
    time: float
    """Seconds since 1970, when it came; the agent may deal with it later."""


class UserSignalled(NamedTuple):
    """A signal came that is the workers' own business."""

    signum: int


class TimerExpired(NamedTuple):
    """A worker has stayed in a scope of a timer for too long."""

    pid: int
    why: str
    """For people, in a few words."""


class LeaseExpired(NamedTuple):
    """The workers were killed, since this process has not renewed their lease: it was stopped, or starved."""


class DeadlineReached(NamedTuple):
    """``deadline`` has passed."""

    evidence: Mapping[int, Evidence] = MappingProxyType({})
    """As for ``GroupReaped``."""


class GroupReaped(NamedTuple):
    """The round's workers, and all that they left, are gone."""

    evidence: Mapping[int, Evidence]
    """What is known of the workers' ends, by local rank."""
    leftovers: tuple[str, ...] = ()
    """Names of the processes that had to be killed when the workers had ended."""


class Ended(NamedTuple):
    """The round is over, for all nodes."""

    end: End
    time: float
    """When this node learnt of it, in seconds since 1970."""


class Decided(NamedTuple):
    """What follows the round. While joining: the job has ended without this node."""

    decision: Decision


AgentEvent = (
    Assigned
    | Ended
    | Decided
    | Started
    | Exited
    | Signalled
    | UserSignalled
    | TimerExpired
    | LeaseExpired
    | DeadlineReached
    | GroupReaped
)

# Actions: what the agent must do.


class RequestJoin(NamedTuple):
    """Ask the rendezvous for a place in the next round; answer with ``Assigned``."""


class ReportFailure(NamedTuple):
    """End the round for all nodes, since a worker of this one failed; answer with the ``Ended`` that came first."""

    failure: ProcessFailure
    """What is known of it so far."""


class ReportSuccess(NamedTuple):
    """This node's workers have all ended well; answer with ``Ended`` when the others' have, or something else came."""

    patience: float = float("inf")
    """Seconds after which this node's part ends well without that."""


class Fence(NamedTuple):
    """This node's workers are gone, since the others may have gone on without it; answer with ``Ended``."""


class ReportRound(NamedTuple):
    """This node is through with the round; answer with ``Decided``."""

    decision: Decision
    """What follows, if this node's failure ended the round; else only its failures matter, as consequences."""
    may_restart: bool = True
    """False: this node cannot take part in another round."""


class Leave(NamedTuple):
    """The job must go on without this node, or stop, since a signal came or the launcher failed; no answer."""

    signum: int = 0
    error: str = ""
    status: int = 0
    """The exit status that goes with ``error``."""


class Start(NamedTuple):
    """Start the workers of this round; answer with ``Started``."""

    assignment: Assignment


class SendSignal(NamedTuple):
    """Send a signal to workers: to their whole process groups to stop them, else to the processes that lead them."""

    signum: int
    local_ranks: frozenset[int]
    stop: bool


class DumpStacks(NamedTuple):
    """Have workers write the stacks of their threads, if they know how to."""

    local_ranks: frozenset[int]


class ReapLeftovers(NamedTuple):
    """End what the round left: SIGTERM, or SIGKILL to the workers too; answer with ``GroupReaped`` at the end."""

    kill: bool


class Log(NamedTuple):
    """Tell people, in one line."""

    text: str
    level: Level = Level.WARNING


class Finish(NamedTuple):
    """The agent's work is done: it succeeded, it failed, or a signal ended it."""

    failures: tuple[ProcessFailure, ...] = ()
    signum: int | None = None
    error: str = ""
    status: int = 0
    """The exit status that goes with ``error``."""
    why: str = ""
    """Why there was no restart though some were left."""
    restarts: int = 0
    """How many were used up when workers failed."""


RendezvousAction = RequestJoin | ReportFailure | ReportSuccess | Fence | ReportRound | Leave
"""What the agent hands to the rendezvous."""
Action = RendezvousAction | Start | SendSignal | DumpStacks | ReapLeftovers | Log | Finish


class Limits(NamedTuple):
    """The settings that decisions depend on. Times in seconds."""

    policy: Policy
    shutdown_timeout: float
    exit_barrier_timeout: float = float("inf")


@dataclass(frozen=True)
class AgentState:
    """All that the agent's decisions depend on."""

    limits: Limits
    phase: AgentPhase = AgentPhase.JOINING
    assignment: Assignment | None = None
    end: End | None = None
    """Why the round is over, once that is known."""
    began_at: float = 0.0
    """When the round began for this node, on the agent's monotonic clock."""
    announced: bool = False
    """This node said that it is."""
    lapsed: bool = False
    """The workers' lease has run out: the others may have gone on without this node."""
    failures: tuple[ProcessFailure, ...] = ()
    """Of this node's workers, once all are gone."""
    may_restart: bool = True
    """False: a process could not be killed."""
    running: frozenset[int] = frozenset()
    """Local ranks whose process has not ended."""
    pids: Mapping[int, int] = field(default_factory=dict)
    exits: tuple[Exit, ...] = ()
    stopped_at: float = float("inf")
    """When the agent began to stop the workers, in seconds since 1970."""
    signum: int | None = None
    """The signal that ends the job."""
    interrupted: bool = False
    """That signal, and no failure, ended the round."""
    asked_at: float | None = None
    """When the first of ``ESCALATING`` came, in seconds since 1970."""
    deadline: float | None = None
    """When ``DeadlineReached`` is due, on the agent's monotonic clock."""
    expired: Mapping[int, str] = field(default_factory=dict)
    """Why workers are killed while the others run, by local rank."""
    dumped: frozenset[int] = frozenset()
    """Those that did not stop in time, and were asked for their stacks."""
    killed: bool = False
    """SIGKILL was sent to everything."""
    history: tuple[str, ...] = ()

    @property
    def has_failed(self) -> bool:
        """Whether a worker of this round ended badly, and not since it was told to stop."""
        return any(exit_.exitcode != 0 and not exit_.stop_signals for exit_ in self.exits)


Step = tuple[AgentState, list[Action]]


class UnexpectedEventError(LaunchError):
    """An event came that the table does not know in this state: a defect of the launcher."""

    def __init__(self, state: AgentState, event: AgentEvent) -> None:
        super().__init__(
            f"internal error: {type(event).__name__} while {state.phase.value}; history: {', '.join(state.history)}"
        )


def begin(limits: Limits) -> Step:
    """The first step of a life."""
    return AgentState(limits), [RequestJoin()]


def step(state: AgentState, event: AgentEvent, now: float) -> Step:
    """What an event leads to.

    Args:
        state: the agent's state so far.
        event: what happened.
        now: seconds, on any monotonic clock, the same at every step.

    Raises:
        UnexpectedEventError: ``TABLE`` has no entry for the state and the event.
    """
    handler = TABLE.get((state.phase, type(event)))
    if handler is None:
        raise UnexpectedEventError(state, event)
    state = replace(state, history=(*state.history[-49:], f"{state.phase.value}:{type(event).__name__}"))
    return handler(state, event, now)


def _enter(state: AgentState, phase: AgentPhase, **changes: Any) -> AgentState:
    """The one place that sets the phase."""
    return replace(state, phase=phase, **changes)


def _start(state: AgentState, event: Assigned, now: float) -> Step:
    assignment = event.assignment
    ranks = frozenset(range(assignment.local_world_size))
    state = _enter(state, AgentPhase.RUNNING, assignment=assignment, running=ranks, began_at=now)
    formed = "re-formed" if assignment.restart_count else "formed"
    text = f"{formed}: {counted(assignment.group_world_size, 'node')}, {counted(assignment.world_size, 'worker')}"
    return state, [Start(assignment), _for_all(state, text)]


def _give_up_joining(state: AgentState, event: Signalled, now: float) -> Step:
    return _enter(state, AgentPhase.DONE), [Leave(event.signum), Finish(signum=event.signum)]


def _ended_without_us(state: AgentState, event: Decided, now: float) -> Step:
    if event.decision.restart:
        raise UnexpectedEventError(state, event)
    return _finish(state, event.decision)


def _note_pids(state: AgentState, event: Started, now: float) -> Step:
    return replace(state, pids=event.pids), []


def _worker_ended(state: AgentState, event: Exited, now: float) -> Step:
    state = _note_exit(state, event)
    if event.exit.exitcode != 0:
        pid = state.pids.get(event.exit.local_rank, -1)
        failure = root_cause.failure_of(event.exit, event.evidence, pid, _assignment(state))
        state, actions = _stop(replace(state, announced=True), signal.SIGTERM, event.exit.time, now)
        return state, [*actions, ReportFailure(failure)]
    if state.running:
        return state, []
    return _sweep(_enter(state, AgentPhase.STOPPING, stopped_at=event.exit.time, deadline=now), now)


def _stop_on_signal(state: AgentState, event: Signalled, now: float) -> Step:
    log = Log(
        f"{signal_name(event.signum)} received: stopping {counted(len(state.running), 'worker')}; SIGKILL in "
        f"{state.limits.shutdown_timeout:g} s, or on a second SIGTERM or SIGINT"
    )
    state = replace(state, signum=event.signum, interrupted=True, asked_at=_asked_at(state, event))
    state, actions = _stop(state, event.signum, event.time, now)
    return state, [*actions, Leave(event.signum), log]  # deeds before words, which may have to wait for their reader


def _stop_with_the_others(state: AgentState, event: Ended, now: float) -> Step:
    """Another node ended the round."""
    state, actions = _stop(replace(state, end=event.end), event.end.signum or signal.SIGTERM, event.time, now)
    text = f"{_headline(event.end)}: stopping {counted(len(state.running), 'worker')}"
    return state, [*actions, _of_the_end(state, text)]


def _stop_without_a_lease(state: AgentState, event: LeaseExpired, now: float) -> Step:
    """The workers are dead already; what is left of them is swept away as always."""
    return _enter(state, AgentPhase.STOPPING, deadline=now + KILL_PATIENCE, lapsed=True), [Fence()]


def _stop(state: AgentState, signum: int, time: float, now: float) -> Step:
    """Begin the stop sequence: signal, wait until the deadline, SIGKILL, wait a little, give up."""
    state = _enter(state, AgentPhase.STOPPING, stopped_at=time, deadline=now + state.limits.shutdown_timeout)
    if state.running:
        state = replace(state, deadline=now + state.limits.shutdown_timeout - _dump_time(state))
        return state, [SendSignal(signum, state.running, stop=True)]
    return _sweep(state, now)


def _stopped_worker_ended(state: AgentState, event: Exited, now: float) -> Step:
    state = _note_exit(state, event)
    if state.running or state.killed:
        return state, []
    rest = 0.0 if state.dumped else _dump_time(state)
    return _sweep(replace(state, deadline=(state.deadline or now) + rest), now)


def _sweep(state: AgentState, now: float) -> Step:
    """End what the workers left. It has what remains of their grace, and a little at least."""
    return replace(state, deadline=max(state.deadline or now, now + LEFTOVER_GRACE)), [ReapLeftovers(kill=False)]


def _hurry(state: AgentState, event: Signalled, now: float) -> Step:
    """A signal while stopping: the job will not restart; a second SIGTERM or SIGINT means now."""
    name, asked_at = signal_name(event.signum), state.asked_at
    state = replace(state, asked_at=_asked_at(state, event))
    if state.signum is None:
        return replace(state, signum=event.signum), [Log(f"{name} received: the job ends with this round")]
    if asked_at is None or event.time - asked_at < DOUBLE or event.signum not in ESCALATING or state.killed:
        return state, []
    return _kill(state, f"{name} received again", now)


def _asked_at(state: AgentState, event: Signalled) -> float | None:
    return event.time if state.asked_at is None and event.signum in ESCALATING else state.asked_at


def _kill_when_dumped(state: AgentState, event: TimerExpired, now: float) -> Step:
    """A worker hangs. Its end will be a failure like any other."""
    ranks = frozenset(rank for rank in state.running if state.pids.get(rank) == event.pid) - state.expired.keys()
    if not ranks:
        return state, []
    state = replace(state, expired={**state.expired, **dict.fromkeys(ranks, event.why)}, deadline=now + DUMP_TIME)
    return state, [DumpStacks(ranks)]


def _kill_expired(state: AgentState, event: DeadlineReached, now: float) -> Step:
    return replace(state, deadline=None), [SendSignal(signal.SIGKILL, state.running & state.expired.keys(), stop=False)]


def _dump_time(state: AgentState) -> float:
    """It is part of the time to stop."""
    return min(DUMP_TIME, state.limits.shutdown_timeout / 4)


def _time_is_up(state: AgentState, event: DeadlineReached, now: float) -> Step:
    if state.running and not state.dumped and not state.killed:
        return replace(state, dumped=state.running, deadline=now + _dump_time(state)), [DumpStacks(state.running)]
    if not state.killed:
        return _kill(state, "time to stop is up", now)
    # Not even SIGKILL helps. Another round beside such a process could train twice at once, so the job ends here.
    log = Log(
        f"{_survivors(state)} cannot be killed (in state D, for a hung device or file system, or another user's); "
        "it is not waited for"
    )
    return _settle(replace(state, may_restart=False), event.evidence, now, [log])


def _kill(state: AgentState, why: str, now: float) -> Step:
    says = [Log(f"{why}: sending SIGKILL to {_survivors(state)}")] if state.running else []
    return replace(state, killed=True, deadline=now + KILL_PATIENCE), [ReapLeftovers(kill=True), *says]


def _round_is_over(state: AgentState, event: GroupReaped, now: float) -> Step:
    says = [Log(f"killed what the workers had left running: {', '.join(event.leftovers)}")] if event.leftovers else []
    return _settle(state, event.evidence, now, [*says])


def _settle(state: AgentState, evidence: Mapping[int, Evidence], now: float, actions: list[Action]) -> Step:
    """The node's part of the round is over: find what failed, and agree with the others on what follows."""
    known = {rank: evidence.get(rank, NOTHING) for rank in {*evidence, *state.expired}}
    evidence = {
        rank: it._replace(note="; ".join(filter(None, (state.expired.get(rank), it.note))))
        for rank, it in known.items()
    }
    failures = root_cause.judge(state.exits, evidence, state.pids, _assignment(state), state.stopped_at)
    hung = _hung(state, evidence)
    actions += [
        Log(f"rank {failure.rank} (pid {failure.pid}) did not stop in time; {failure.note}")
        for failure in hung
        if failure.note
    ]
    if failures or (state.end is not None and state.end.kind is EndKind.FAILED):
        failures += hung
    if state.interrupted:
        return _enter(state, AgentPhase.DONE, deadline=None), [*actions, Finish(signum=state.signum)]
    state = _enter(state, AgentPhase.AGREEING, deadline=None, failures=failures)
    if state.end is not None:
        return state, [*actions, _settlement(state, now)]
    if state.announced or state.lapsed:
        return state, actions
    if state.signum is not None and _assignment(state).group_world_size > 1:
        return _enter(state, AgentPhase.DONE), [*actions, Leave(state.signum), Finish(signum=state.signum)]
    return state, [*actions, ReportSuccess(state.limits.exit_barrier_timeout)]


def _hung(state: AgentState, evidence: Mapping[int, Evidence]) -> tuple[ProcessFailure, ...]:
    """The workers that would not stop. They are no cause of anything, but worth a line where something failed."""
    return tuple(
        root_cause.failure_of(
            exit_, evidence.get(exit_.local_rank, NOTHING), state.pids.get(exit_.local_rank, -1), _assignment(state)
        )
        for exit_ in state.exits
        if exit_.local_rank in state.dumped and exit_.stop_signals and exit_.exitcode == -signal.SIGKILL
    )


def _settle_now(state: AgentState, event: Ended, now: float) -> Step:
    state = replace(state, end=event.end)
    return state, [*_why_again(state), _settlement(state, now)]


def _why_again(state: AgentState) -> list[Action]:
    """Why there is another round, where this node's workers have ended already."""
    if state.end is None or state.end.kind is not EndKind.MEMBERSHIP_CHANGED or state.lapsed or state.interrupted:
        return []  # of the last two it has told already
    return [_of_the_end(state, _headline(state.end))]


def _headline(end: End) -> str:
    """The reason in one line: an error of the launcher's may come with a traceback."""
    first, *more = end.reason.splitlines() or [""]
    return " ".join([first, *more[-1:]])


def _settlement(state: AgentState, now: float) -> ReportRound:
    """What follows, if it is for this node to decide."""
    assignment = _assignment(state)
    restart_history = policy.aged(assignment.restart_history, now - state.began_at)
    decision = policy.follow(
        state.limits.policy, restart_history, state.failures, "", assignment.picked_port, state.may_restart
    )
    return ReportRound(decision, state.may_restart)


def _decided(state: AgentState, event: Decided, now: float) -> Step:
    """Do what follows. A signal that came meanwhile ends a job that would go on; it does not hide that one failed."""
    if not event.decision.restart:
        done = state.end is not None and state.end.kind is EndKind.DONE and state.signum is None
        text = f"done: {counted(_assignment(state).world_size, 'worker')} ended well"
        state, actions = _finish(state, event.decision)
        return state, [*([_for_all(state, text)] if done else []), *actions]
    if state.signum is not None:
        return _enter(state, AgentPhase.DONE), [Leave(state.signum), Finish(signum=state.signum)]
    if not state.may_restart:
        error = f"{_survivors(state)} cannot be killed, so this node does not take part in another round"
        return _enter(state, AgentPhase.DONE), [Leave(signal.SIGKILL), Finish(error=error, status=ExitCode.UNAVAILABLE)]
    says: list[Action] = []
    if line := _restart_line(state, event.decision):
        says = [_of_the_end(state, line)]
    is_alone = not _is_one_of_many(state)  # else nodes meet at once, and the round closes when the pause is over
    state = AgentState(state.limits, history=state.history)
    if event.decision.pause and is_alone:
        return _enter(state, AgentPhase.PAUSING, deadline=now + event.decision.pause), says
    return state, [*says, RequestJoin()]


def _join(state: AgentState, event: DeadlineReached, now: float) -> Step:
    return _enter(state, AgentPhase.JOINING, deadline=None), [RequestJoin()]


def _finish(state: AgentState, decision: Decision) -> Step:
    signum = decision.signum or None
    state = _enter(state, AgentPhase.DONE)
    restarts = (
        decision.restart_history.used if decision.failures else 0
    )  # of the job: a spare had no place in its rounds
    return state, [Finish(decision.failures, signum, decision.error, decision.status, decision.why, restarts)]


def _leave_unsettled(state: AgentState, event: Signalled, now: float) -> Step:
    """A signal while the others decide: it ends this node's part, but if they wait for this one's word."""
    if state.announced and (state.end is None or state.end.mine):
        return replace(state, signum=event.signum), []
    return _enter(state, AgentPhase.DONE), [Leave(event.signum), Finish(signum=event.signum)]


def _restart_line(state: AgentState, decision: Decision) -> str:
    """What people are told of a restart."""
    if not decision.failures:
        return ""
    if decision.restart_history.uncharged > _assignment(state).restart_history.uncharged:
        return "MASTER_PORT was taken by another process: starting again with another port, without charge"
    when = f" in {decision.pause:g} s" if decision.pause else ""
    count = f"restart {decision.restart_history.used} of {state.limits.policy.max_restarts}"
    return f"{decision.failures[0].headline(_is_one_of_many(state))}: {count}{when}"


def _for_all(state: AgentState, text: str, gone: int = -1) -> Log:
    """What is to be said once for the job: the node with group rank 0 says it, or the next if that is gone."""
    return Log(text, Level.INFO if _assignment(state).group_rank == (0 if gone else 1) else Level.DEBUG)


def _of_the_end(state: AgentState, text: str) -> Log:
    """What is to be said of the round's end: by the node that ended it, and once for all others."""
    if state.end is not None and state.end.mine:
        return Log(text)
    return _for_all(state, text, gone=state.end.rank if state.end is not None else -1)


def _is_one_of_many(state: AgentState) -> bool:
    return _assignment(state).group_world_size > 1


def _pass_on(state: AgentState, event: UserSignalled, now: float) -> Step:
    return state, [SendSignal(event.signum, state.running, stop=False)]


def _ignore(state: AgentState, event: AgentEvent, now: float) -> Step:
    return state, []


def _note_end(state: AgentState, event: Ended, now: float) -> Step:
    state = replace(state, end=event.end)
    if state.lapsed:
        return state, [Log(f"{event.end.reason}: the workers have been killed, for others may take their place")]
    if event.end.mine and event.end.kind in (EndKind.STOP, EndKind.ERROR):
        return state, [Log(_headline(event.end))]
    if not (event.end.mine and state.announced and state.running):
        return state, _why_again(state)  # another tells it, or the next line does, or the report
    return state, [Log(f"{event.end.reason}: stopping {counted(len(state.running), 'worker')}")]


def _note_exit(state: AgentState, event: Exited) -> AgentState:
    return replace(state, running=state.running - {event.exit.local_rank}, exits=(*state.exits, event.exit))


def _assignment(state: AgentState) -> Assignment:
    if state.assignment is None:
        raise LaunchError(f"internal error: no place in a round while {state.phase.value}")
    return state.assignment


def counted(number: int, what: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _survivors(state: AgentState) -> str:
    """The processes that have not ended, for people."""
    if not state.running:
        return "a process that a worker left behind"
    names = ", ".join(
        f"{_assignment(state).rank(local)} (pid {state.pids.get(local, -1)})" for local in sorted(state.running)
    )
    return f"worker rank {names}" if len(state.running) == 1 else f"workers {names}"


TABLE: dict[tuple[AgentPhase, type[AgentEvent]], Callable[[AgentState, Any, float], Step]] = {
    (AgentPhase.JOINING, Assigned): _start,
    (AgentPhase.JOINING, Signalled): _give_up_joining,
    (AgentPhase.JOINING, UserSignalled): _ignore,
    (AgentPhase.JOINING, Decided): _ended_without_us,
    (AgentPhase.JOINING, TimerExpired): _ignore,
    (AgentPhase.RUNNING, Started): _note_pids,
    (AgentPhase.RUNNING, Exited): _worker_ended,
    (AgentPhase.RUNNING, Signalled): _stop_on_signal,
    (AgentPhase.RUNNING, UserSignalled): _pass_on,
    (AgentPhase.RUNNING, Ended): _stop_with_the_others,
    (AgentPhase.RUNNING, TimerExpired): _kill_when_dumped,
    (AgentPhase.RUNNING, DeadlineReached): _kill_expired,
    (AgentPhase.RUNNING, LeaseExpired): _stop_without_a_lease,
    (AgentPhase.STOPPING, Started): _note_pids,
    (AgentPhase.STOPPING, Exited): _stopped_worker_ended,
    (AgentPhase.STOPPING, Signalled): _hurry,
    (AgentPhase.STOPPING, UserSignalled): _pass_on,
    (AgentPhase.STOPPING, TimerExpired): _ignore,
    (AgentPhase.STOPPING, LeaseExpired): _ignore,
    (AgentPhase.STOPPING, DeadlineReached): _time_is_up,
    (AgentPhase.STOPPING, Ended): _note_end,
    (AgentPhase.STOPPING, GroupReaped): _round_is_over,
    (AgentPhase.AGREEING, Ended): _settle_now,
    (AgentPhase.AGREEING, Decided): _decided,
    (AgentPhase.AGREEING, Signalled): _leave_unsettled,
    (AgentPhase.AGREEING, UserSignalled): _ignore,
    (AgentPhase.AGREEING, TimerExpired): _ignore,
    (
        AgentPhase.AGREEING,
        Started,
    ): _ignore,  # these three: of a round that was given up with a process that cannot be killed
    (AgentPhase.AGREEING, Exited): _ignore,
    (AgentPhase.AGREEING, GroupReaped): _ignore,
    (AgentPhase.AGREEING, LeaseExpired): _ignore,
    (AgentPhase.PAUSING, DeadlineReached): _join,
    (AgentPhase.PAUSING, Signalled): _give_up_joining,
    (AgentPhase.PAUSING, UserSignalled): _ignore,
    (AgentPhase.PAUSING, Decided): _ended_without_us,
    (AgentPhase.PAUSING, TimerExpired): _ignore,
}
