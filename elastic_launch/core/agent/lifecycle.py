"""Layer 1: the agent's whole life, as one table of state and event. Pure.

    JOINING -> RUNNING -> (STOPPING -> SETTLING -> [PAUSING ->] JOINING)* -> DONE

``step`` takes the life so far, an event and the time; it gives the life after it, and the actions that the agent must
carry out. Every round ends through STOPPING, a good one too, so that nothing a worker started outlives its round:
first the workers are signalled and awaited, then whatever else they left is swept away; at ``deadline`` the rest gets
SIGKILL. When the agent reports ``Gone``, the node settles the round with the others: whoever ended it decides what
follows, and all do that. On a single node the rendezvous answers at once. What happens in an order that ``TABLE`` does
not know raises ``UnexpectedEventError`` with the history.
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
from elastic_launch.job import Assignment, End, EndKind, Level, Policy, Verdict

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


class State(Enum):
    """Where the agent stands."""

    JOINING = "joining"
    RUNNING = "running"
    STOPPING = "stopping"
    SETTLING = "settling"
    """The workers are gone; what follows is not agreed yet."""
    PAUSING = "pausing"
    """Another round of a single node follows, but not at once."""
    DONE = "done"


# Events: what happened. (Named tuples, not dataclasses: they cost the agent's start a tenth.)


class Assigned(NamedTuple):
    """The rendezvous gave the node its place in a round."""

    place: Assignment


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


class Passed(NamedTuple):
    """A signal came that is the workers' own business."""

    signum: int


class Expired(NamedTuple):
    """A worker has stayed in a scope of a timer for too long."""

    pid: int
    why: str
    """For people, in a few words."""


class Lapsed(NamedTuple):
    """The workers were killed, since this process has not renewed their lease: it was stopped, or starved."""


class TimedOut(NamedTuple):
    """``deadline`` has passed."""

    evidence: Mapping[int, Evidence] = MappingProxyType({})
    """As for ``Gone``."""


class Gone(NamedTuple):
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

    verdict: Verdict


Event = Assigned | Ended | Decided | Started | Exited | Signalled | Passed | Expired | Lapsed | TimedOut | Gone

# Actions: what the agent must do.


class Join(NamedTuple):
    """Ask the rendezvous for a place in the next round; answer with ``Assigned``."""


class Announce(NamedTuple):
    """End the round for all nodes, since a worker of this one failed; answer with the ``Ended`` that came first."""

    failure: ProcessFailure
    """What is known of it so far."""


class Succeed(NamedTuple):
    """This node's workers have all ended well; answer with ``Ended`` when the others' have, or something else came."""

    patience: float = float("inf")
    """Seconds after which this node's part ends well without that."""


class Fence(NamedTuple):
    """This node's workers are gone, since the others may have gone on without it; answer with ``Ended``."""


class Settle(NamedTuple):
    """This node is through with the round; answer with ``Decided``."""

    verdict: Verdict
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

    place: Assignment


class Tell(NamedTuple):
    """Send a signal to workers: to their whole process groups to stop them, else to the processes that lead them."""

    signum: int
    local_ranks: frozenset[int]
    stop: bool


class Dump(NamedTuple):
    """Have workers write the stacks of their threads, if they know how to."""

    local_ranks: frozenset[int]


class Sweep(NamedTuple):
    """End what the round left: SIGTERM, or SIGKILL to the workers too; answer with ``Gone`` when nothing is left."""

    kill: bool


class Say(NamedTuple):
    """Tell people, in one line."""

    text: str
    level: Level = Level.TROUBLE


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


Asking = Join | Announce | Succeed | Fence | Settle | Leave
"""What the agent hands to the rendezvous."""
Action = Asking | Start | Tell | Dump | Sweep | Say | Finish


class Limits(NamedTuple):
    """The settings that decisions depend on. Times in seconds."""

    policy: Policy
    shutdown_timeout: float
    exit_barrier_timeout: float = float("inf")


@dataclass(frozen=True)
class Life:
    """All that the agent's decisions depend on."""

    limits: Limits
    state: State = State.JOINING
    place: Assignment | None = None
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
    """When ``TimedOut`` is due, on the agent's monotonic clock."""
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
        return any(exit_.exitcode != 0 and not exit_.told for exit_ in self.exits)


Step = tuple[Life, list[Action]]


class UnexpectedEventError(LaunchError):
    """An event came that the table does not know in this state: a defect of the launcher."""

    def __init__(self, life: Life, event: Event) -> None:
        super().__init__(
            f"internal error: {type(event).__name__} while {life.state.value}; history: {', '.join(life.history)}"
        )


def begin(limits: Limits) -> Step:
    """The first step of a life."""
    return Life(limits), [Join()]


def step(life: Life, event: Event, now: float) -> Step:
    """What an event leads to.

    Args:
        life: the life so far.
        event: what happened.
        now: seconds, on any monotonic clock, the same at every step.

    Raises:
        UnexpectedEventError: ``TABLE`` has no entry for the state and the event.
    """
    handler = TABLE.get((life.state, type(event)))
    if handler is None:
        raise UnexpectedEventError(life, event)
    life = replace(life, history=(*life.history[-49:], f"{life.state.value}:{type(event).__name__}"))
    return handler(life, event, now)


def _enter(life: Life, state: State, **changes: Any) -> Life:
    """The one place where the state changes."""
    return replace(life, state=state, **changes)


def _start(life: Life, event: Assigned, now: float) -> Step:
    place = event.place
    ranks = frozenset(range(place.local_world_size))
    life = _enter(life, State.RUNNING, place=place, running=ranks, began_at=now)
    formed = "re-formed" if place.restart_count else "formed"
    text = f"{formed}: {counted(place.group_world_size, 'node')}, {counted(place.world_size, 'worker')}"
    return life, [Start(place), _for_all(life, text)]


def _give_up_joining(life: Life, event: Signalled, now: float) -> Step:
    return _enter(life, State.DONE), [Leave(event.signum), Finish(signum=event.signum)]


def _ended_without_us(life: Life, event: Decided, now: float) -> Step:
    if event.verdict.restart:
        raise UnexpectedEventError(life, event)
    return _finish(life, event.verdict)


def _note_pids(life: Life, event: Started, now: float) -> Step:
    return replace(life, pids=event.pids), []


def _worker_ended(life: Life, event: Exited, now: float) -> Step:
    life = _note_exit(life, event)
    if event.exit.exitcode != 0:
        pid = life.pids.get(event.exit.local_rank, -1)
        failure = root_cause.failure_of(event.exit, event.evidence, pid, _place(life))
        life, actions = _stop(replace(life, announced=True), signal.SIGTERM, event.exit.time, now)
        return life, [*actions, Announce(failure)]
    if life.running:
        return life, []
    return _sweep(_enter(life, State.STOPPING, stopped_at=event.exit.time, deadline=now), now)


def _stop_on_signal(life: Life, event: Signalled, now: float) -> Step:
    say = Say(
        f"{signal_name(event.signum)} received: stopping {counted(len(life.running), 'worker')}; SIGKILL in "
        f"{life.limits.shutdown_timeout:g} s, or on a second SIGTERM or SIGINT"
    )
    life = replace(life, signum=event.signum, interrupted=True, asked_at=_asked_at(life, event))
    life, actions = _stop(life, event.signum, event.time, now)
    return life, [*actions, Leave(event.signum), say]  # deeds before words, which may have to wait for their reader


def _stop_with_the_others(life: Life, event: Ended, now: float) -> Step:
    """Another node ended the round."""
    life, actions = _stop(replace(life, end=event.end), event.end.signum or signal.SIGTERM, event.time, now)
    text = f"{_headline(event.end)}: stopping {counted(len(life.running), 'worker')}"
    return life, [*actions, _of_the_end(life, text)]


def _stop_without_a_lease(life: Life, event: Lapsed, now: float) -> Step:
    """The workers are dead already; what is left of them is swept away as always."""
    return _enter(life, State.STOPPING, deadline=now + KILL_PATIENCE, lapsed=True), [Fence()]


def _stop(life: Life, signum: int, time: float, now: float) -> Step:
    """Begin the stop sequence: signal, wait until the deadline, SIGKILL, wait a little, give up."""
    life = _enter(life, State.STOPPING, stopped_at=time, deadline=now + life.limits.shutdown_timeout)
    if life.running:
        life = replace(life, deadline=now + life.limits.shutdown_timeout - _dump_time(life))
        return life, [Tell(signum, life.running, stop=True)]
    return _sweep(life, now)


def _stopped_worker_ended(life: Life, event: Exited, now: float) -> Step:
    life = _note_exit(life, event)
    if life.running or life.killed:
        return life, []
    rest = 0.0 if life.dumped else _dump_time(life)
    return _sweep(replace(life, deadline=(life.deadline or now) + rest), now)


def _sweep(life: Life, now: float) -> Step:
    """End what the workers left. It has what remains of their grace, and a little at least."""
    return replace(life, deadline=max(life.deadline or now, now + LEFTOVER_GRACE)), [Sweep(kill=False)]


def _hurry(life: Life, event: Signalled, now: float) -> Step:
    """A signal while stopping: the job will not restart; a second SIGTERM or SIGINT means now."""
    name, asked_at = signal_name(event.signum), life.asked_at
    life = replace(life, asked_at=_asked_at(life, event))
    if life.signum is None:
        return replace(life, signum=event.signum), [Say(f"{name} received: the job ends with this round")]
    if asked_at is None or event.time - asked_at < DOUBLE or event.signum not in ESCALATING or life.killed:
        return life, []
    return _kill(life, f"{name} received again", now)


def _asked_at(life: Life, event: Signalled) -> float | None:
    return event.time if life.asked_at is None and event.signum in ESCALATING else life.asked_at


def _kill_when_dumped(life: Life, event: Expired, now: float) -> Step:
    """A worker hangs. Its end will be a failure like any other."""
    ranks = frozenset(rank for rank in life.running if life.pids.get(rank) == event.pid) - life.expired.keys()
    if not ranks:
        return life, []
    life = replace(life, expired={**life.expired, **dict.fromkeys(ranks, event.why)}, deadline=now + DUMP_TIME)
    return life, [Dump(ranks)]


def _kill_expired(life: Life, event: TimedOut, now: float) -> Step:
    return replace(life, deadline=None), [Tell(signal.SIGKILL, life.running & life.expired.keys(), stop=False)]


def _dump_time(life: Life) -> float:
    """It is part of the time to stop."""
    return min(DUMP_TIME, life.limits.shutdown_timeout / 4)


def _time_is_up(life: Life, event: TimedOut, now: float) -> Step:
    if life.running and not life.dumped and not life.killed:
        return replace(life, dumped=life.running, deadline=now + _dump_time(life)), [Dump(life.running)]
    if not life.killed:
        return _kill(life, "time to stop is up", now)
    # Not even SIGKILL helps. Another round beside such a process could train twice at once, so the job ends here.
    say = Say(
        f"{_survivors(life)} cannot be killed (in state D, for a hung device or file system, or another user's); "
        "it is not waited for"
    )
    return _settle(replace(life, may_restart=False), event.evidence, now, [say])


def _kill(life: Life, why: str, now: float) -> Step:
    says = [Say(f"{why}: sending SIGKILL to {_survivors(life)}")] if life.running else []
    return replace(life, killed=True, deadline=now + KILL_PATIENCE), [Sweep(kill=True), *says]


def _round_is_over(life: Life, event: Gone, now: float) -> Step:
    says = [Say(f"killed what the workers had left running: {', '.join(event.leftovers)}")] if event.leftovers else []
    return _settle(life, event.evidence, now, [*says])


def _settle(life: Life, evidence: Mapping[int, Evidence], now: float, actions: list[Action]) -> Step:
    """The node's part of the round is over: find what failed, and agree with the others on what follows."""
    known = {rank: evidence.get(rank, NOTHING) for rank in {*evidence, *life.expired}}
    evidence = {
        rank: it._replace(note="; ".join(filter(None, (life.expired.get(rank), it.note)))) for rank, it in known.items()
    }
    failures = root_cause.judge(life.exits, evidence, life.pids, _place(life), life.stopped_at)
    hung = _hung(life, evidence)
    actions += [
        Say(f"rank {failure.rank} (pid {failure.pid}) did not stop in time; {failure.note}")
        for failure in hung
        if failure.note
    ]
    if failures or (life.end is not None and life.end.kind is EndKind.FAILED):
        failures += hung
    if life.interrupted:
        return _enter(life, State.DONE, deadline=None), [*actions, Finish(signum=life.signum)]
    life = _enter(life, State.SETTLING, deadline=None, failures=failures)
    if life.end is not None:
        return life, [*actions, _settlement(life, now)]
    if life.announced or life.lapsed:
        return life, actions
    if life.signum is not None and _place(life).group_world_size > 1:
        return _enter(life, State.DONE), [*actions, Leave(life.signum), Finish(signum=life.signum)]
    return life, [*actions, Succeed(life.limits.exit_barrier_timeout)]


def _hung(life: Life, evidence: Mapping[int, Evidence]) -> tuple[ProcessFailure, ...]:
    """The workers that would not stop. They are no cause of anything, but worth a line where something failed."""
    return tuple(
        root_cause.failure_of(
            exit_, evidence.get(exit_.local_rank, NOTHING), life.pids.get(exit_.local_rank, -1), _place(life)
        )
        for exit_ in life.exits
        if exit_.local_rank in life.dumped and exit_.told and exit_.exitcode == -signal.SIGKILL
    )


def _settle_now(life: Life, event: Ended, now: float) -> Step:
    life = replace(life, end=event.end)
    return life, [*_why_again(life), _settlement(life, now)]


def _why_again(life: Life) -> list[Action]:
    """Why there is another round, where this node's workers have ended already."""
    if life.end is None or life.end.kind is not EndKind.REFORM or life.lapsed or life.interrupted:
        return []  # of the last two it has told already
    return [_of_the_end(life, _headline(life.end))]


def _headline(end: End) -> str:
    """The reason in one line: an error of the launcher's may come with a traceback."""
    first, *more = end.reason.splitlines() or [""]
    return " ".join([first, *more[-1:]])


def _settlement(life: Life, now: float) -> Settle:
    """What follows, if it is for this node to decide."""
    place = _place(life)
    ledger = policy.aged(place.ledger, now - life.began_at)
    verdict = policy.follow(life.limits.policy, ledger, life.failures, "", place.picked_port, life.may_restart)
    return Settle(verdict, life.may_restart)


def _decided(life: Life, event: Decided, now: float) -> Step:
    """Do what follows. A signal that came meanwhile ends a job that would go on; it does not hide that one failed."""
    if not event.verdict.restart:
        done = life.end is not None and life.end.kind is EndKind.DONE and life.signum is None
        text = f"done: {counted(_place(life).world_size, 'worker')} ended well"
        life, actions = _finish(life, event.verdict)
        return life, [*([_for_all(life, text)] if done else []), *actions]
    if life.signum is not None:
        return _enter(life, State.DONE), [Leave(life.signum), Finish(signum=life.signum)]
    if not life.may_restart:
        error = f"{_survivors(life)} cannot be killed, so this node does not take part in another round"
        return _enter(life, State.DONE), [Leave(signal.SIGKILL), Finish(error=error, status=ExitCode.UNAVAILABLE)]
    says: list[Action] = []
    if line := _restart_line(life, event.verdict):
        says = [_of_the_end(life, line)]
    is_alone = not _is_one_of_many(life)  # else nodes meet at once, and the round closes when the pause is over
    life = Life(life.limits, history=life.history)
    if event.verdict.pause and is_alone:
        return _enter(life, State.PAUSING, deadline=now + event.verdict.pause), says
    return life, [*says, Join()]


def _join(life: Life, event: TimedOut, now: float) -> Step:
    return _enter(life, State.JOINING, deadline=None), [Join()]


def _finish(life: Life, verdict: Verdict) -> Step:
    signum = verdict.signum or None
    life = _enter(life, State.DONE)
    restarts = verdict.ledger.charged if verdict.failures else 0  # of the job: a spare had no place in its rounds
    return life, [Finish(verdict.failures, signum, verdict.error, verdict.status, verdict.why, restarts)]


def _leave_unsettled(life: Life, event: Signalled, now: float) -> Step:
    """A signal while the others decide: it ends this node's part, but if they wait for this one's word."""
    if life.announced and (life.end is None or life.end.mine):
        return replace(life, signum=event.signum), []
    return _enter(life, State.DONE), [Leave(event.signum), Finish(signum=event.signum)]


def _restart_line(life: Life, verdict: Verdict) -> str:
    """What people are told of a restart."""
    if not verdict.failures:
        return ""
    if verdict.ledger.free > _place(life).ledger.free:
        return "MASTER_PORT was taken by another process: starting again with another port, without charge"
    when = f" in {verdict.pause:g} s" if verdict.pause else ""
    count = f"restart {verdict.ledger.charged} of {life.limits.policy.max_restarts}"
    return f"{verdict.failures[0].headline(_is_one_of_many(life))}: {count}{when}"


def _for_all(life: Life, text: str, gone: int = -1) -> Say:
    """What is to be said once for the job: the node with group rank 0 says it, or the next if that is gone."""
    return Say(text, Level.EVENT if _place(life).group_rank == (0 if gone else 1) else Level.DETAIL)


def _of_the_end(life: Life, text: str) -> Say:
    """What is to be said of the round's end: by the node that ended it, and once for all others."""
    if life.end is not None and life.end.mine:
        return Say(text)
    return _for_all(life, text, gone=life.end.rank if life.end is not None else -1)


def _is_one_of_many(life: Life) -> bool:
    return _place(life).group_world_size > 1


def _pass_on(life: Life, event: Passed, now: float) -> Step:
    return life, [Tell(event.signum, life.running, stop=False)]


def _ignore(life: Life, event: Event, now: float) -> Step:
    return life, []


def _note_end(life: Life, event: Ended, now: float) -> Step:
    life = replace(life, end=event.end)
    if life.lapsed:
        return life, [Say(f"{event.end.reason}: the workers have been killed, for others may take their place")]
    if event.end.mine and event.end.kind in (EndKind.STOP, EndKind.ERROR):
        return life, [Say(_headline(event.end))]
    if not (event.end.mine and life.announced and life.running):
        return life, _why_again(life)  # another tells it, or the next line does, or the report
    return life, [Say(f"{event.end.reason}: stopping {counted(len(life.running), 'worker')}")]


def _note_exit(life: Life, event: Exited) -> Life:
    return replace(life, running=life.running - {event.exit.local_rank}, exits=(*life.exits, event.exit))


def _place(life: Life) -> Assignment:
    if life.place is None:
        raise LaunchError(f"internal error: no place in a round while {life.state.value}")
    return life.place


def counted(number: int, what: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _survivors(life: Life) -> str:
    """The processes that have not ended, for people."""
    if not life.running:
        return "a process that a worker left behind"
    names = ", ".join(f"{_place(life).rank(local)} (pid {life.pids.get(local, -1)})" for local in sorted(life.running))
    return f"worker rank {names}" if len(life.running) == 1 else f"workers {names}"


TABLE: dict[tuple[State, type[Event]], Callable[[Life, Any, float], Step]] = {
    (State.JOINING, Assigned): _start,
    (State.JOINING, Signalled): _give_up_joining,
    (State.JOINING, Passed): _ignore,
    (State.JOINING, Decided): _ended_without_us,
    (State.JOINING, Expired): _ignore,
    (State.RUNNING, Started): _note_pids,
    (State.RUNNING, Exited): _worker_ended,
    (State.RUNNING, Signalled): _stop_on_signal,
    (State.RUNNING, Passed): _pass_on,
    (State.RUNNING, Ended): _stop_with_the_others,
    (State.RUNNING, Expired): _kill_when_dumped,
    (State.RUNNING, TimedOut): _kill_expired,
    (State.RUNNING, Lapsed): _stop_without_a_lease,
    (State.STOPPING, Started): _note_pids,
    (State.STOPPING, Exited): _stopped_worker_ended,
    (State.STOPPING, Signalled): _hurry,
    (State.STOPPING, Passed): _pass_on,
    (State.STOPPING, Expired): _ignore,
    (State.STOPPING, Lapsed): _ignore,
    (State.STOPPING, TimedOut): _time_is_up,
    (State.STOPPING, Ended): _note_end,
    (State.STOPPING, Gone): _round_is_over,
    (State.SETTLING, Ended): _settle_now,
    (State.SETTLING, Decided): _decided,
    (State.SETTLING, Signalled): _leave_unsettled,
    (State.SETTLING, Passed): _ignore,
    (State.SETTLING, Expired): _ignore,
    (
        State.SETTLING,
        Started,
    ): _ignore,  # these three: of a round that was given up with a process that cannot be killed
    (State.SETTLING, Exited): _ignore,
    (State.SETTLING, Gone): _ignore,
    (State.SETTLING, Lapsed): _ignore,
    (State.PAUSING, TimedOut): _join,
    (State.PAUSING, Signalled): _give_up_joining,
    (State.PAUSING, Passed): _ignore,
    (State.PAUSING, Decided): _ended_without_us,
    (State.PAUSING, Expired): _ignore,
}
