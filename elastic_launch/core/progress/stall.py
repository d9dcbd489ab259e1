"""Decide whether the workers of a node still make progress: one table of phase and event.

    IDLE -> WATCHING -> SUSPECTING -> CLAIMED -> SAMPLING -> REPORTED -> TOLD -> WATCHING

A rank is *due* when it has made no step for its limit. Shortly before all ranks of the node are due, their stacks are
taken for the first time. Once they are due, the node claims that it stalls. If all nodes of the round do, the job
stalls: the stacks are taken again, and travel to the node that judges them. Its verdict reaches all nodes, and what
follows is up to ``--hang-action``. A step of any rank leads back to WATCHING.

A rank that is due while others of its node go on has fallen behind: there is no collective that would hold the others.
It is named, and nothing else follows, because the job as a whole still makes progress.

``step`` takes the state, an event and the time, and returns the next state, with ``wake_at``, and the actions to carry
out. The clock is CLOCK_MONOTONIC, by which the workers also record the times of their steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from elastic_launch.core.progress.memory import WorkerProgress
from elastic_launch.core.progress.messages import (
    AllStalled,
    ClaimStall,
    Judged,
    ReportHang,
    ReportStacks,
    TakeStacks,
    WithdrawClaim,
)
from elastic_launch.core.text import counted
from elastic_launch.errors import LaunchError
from elastic_launch.job import HangAction, Level, Policy

if TYPE_CHECKING:
    from elastic_launch.core.progress.stack_groups import NodeStacks

MIN_STEPS = 5
"""Steps that each rank must have made in the round before a stall is looked for: the first ones compile and warm up."""
AUTO_LEAST = 60.0
"""Shortest limit, in seconds, that ``--hang-timeout auto`` chooses."""
AUTO_FACTOR = 10.0
"""How many times the longest gap between two steps that limit is."""
INTERRUPTION = 10.0
"""A gap that is so many times as long as the average one is an interruption: a checkpoint or an evaluation."""
UNLEARNED_LEAST = 600.0
"""Shortest limit, in seconds, of a job that has shown fewer than two interruptions, if one of its workers is busy.

Its first evaluation may be far longer than anything that it has shown so far.
"""
PHASE_FACTOR = 10.0
"""How many times longer than between two steps a rank may be in a phase (``elastic_launch.worker.phase``)."""
SAMPLE_GAP = 2.0
"""Longest time, in seconds, between the two samples of a worker's stacks that tell "stuck" from "moving"."""
BUSY = "busy"
"""``kind`` of the verdict that a worker is busy with something that the job may not have shown before."""
NO_STALL = ("debugger", "advancing")
"""``kind`` of verdicts that there is no stall."""
LOOKS = 10
"""How often, within the limit, a stalled job is looked at for a sign of life."""
VERDICT_PATIENCE = 20.0
"""Seconds after which a node that has reported its stacks no longer waits for the verdict."""


class StallPhase(Enum):
    """What a node knows of its workers' progress."""

    IDLE = "idle"
    """No worker counts steps, no round runs, or nothing is to be watched."""
    WATCHING = "watching"
    SUSPECTING = "suspecting"
    """All ranks are nearly due; the first stacks have been asked for."""
    CLAIMED = "claimed"
    """All ranks of this node are due; those of other nodes may not be."""
    SAMPLING = "sampling"
    """The job stalls; the second stacks have been asked for."""
    REPORTED = "reported"
    """The stacks are on their way to the node that judges them."""
    TOLD = "told"
    """The verdict is known."""


IDLE, WATCHING, SUSPECTING, CLAIMED, SAMPLING, REPORTED, TOLD = StallPhase

# Events, beside those of the rendezvous.


class Begun(NamedTuple):
    """The workers of a round have been started."""

    ranks: tuple[int, ...]
    """Their local ranks."""
    base_rank: int
    """Global rank of the worker with local rank 0."""


class Over(NamedTuple):
    """The round is over, or is being ended."""


class Counting(NamedTuple):
    """A worker has begun to count its steps."""


class Looked(NamedTuple):
    """The workers' progress was read."""

    progress: Mapping[int, WorkerProgress]
    """By local rank; of the workers that have not exited."""


class StacksTaken(NamedTuple):
    """The stacks that ``TakeStacks(final=True)`` asked for are there."""

    stacks: NodeStacks


class Tell(NamedTuple):
    """Action: log a line."""

    text: str
    level: Level = Level.WARNING


StallEvent = Begun | Over | Counting | Looked | StacksTaken | AllStalled | Judged
StallAction = TakeStacks | ClaimStall | WithdrawClaim | ReportStacks | ReportHang | Tell


class StallState(NamedTuple):
    """Everything that the decisions depend on. Times are in seconds on CLOCK_MONOTONIC."""

    policy: Policy
    phase: StallPhase = IDLE
    ranks: tuple[int, ...] = ()
    """Local ranks of the round's workers."""
    base_rank: int = 0
    """Global rank of the worker with local rank 0."""
    counts: bool = False
    """Whether a worker of the round has begun to count its steps."""
    started_at: float = 0.0
    """When the round's workers were started."""
    wake_at: float | None = None
    """When the workers' progress is to be read next; None: never."""
    last_at: float = 0.0
    """When the latest step was made or the latest phase began, as of the time when the stall was suspected."""
    due_at: float = 0.0
    """When the last rank became due."""
    patience: float = 0.0
    """Shortest limit of the present stall, because a worker turned out to be busy."""
    longest: float = 0.0
    """The longest gap between two steps that the job has shown on this node, in seconds."""
    has_learned: bool = False
    """Whether the job has shown two interruptions, so that a third will not be much longer."""
    behind: frozenset[int] = frozenset()
    """Local ranks that were named because they fell behind."""
    is_node_behind: bool = False
    """Whether it was told that the whole node has fallen behind."""
    number: int = 0
    """Number of the stall in the round, from 1."""
    stalled_seconds: float = 0.0
    """How long the round has stalled, beyond what led to the resumption."""


Step = tuple[StallState, list[StallAction]]
Handler = Callable[[StallState, Any, float], Step]


class UnexpectedStallEventError(LaunchError):
    """``TABLE`` has no entry for an event in this phase: a defect of the launcher."""

    def __init__(self, state: StallState, event: StallEvent) -> None:
        super().__init__(f"internal error: {type(event).__name__} while {state.phase.value} (progress)")


def step(state: StallState, event: StallEvent, now: float) -> Step:
    """Handle an event.

    Args:
        state: what is known.
        event: what happened.
        now: seconds on CLOCK_MONOTONIC.

    Returns:
        The next state, and the actions to carry out in this order.

    Raises:
        UnexpectedStallEventError: ``TABLE`` has no entry for the phase and the event.
    """
    handler = TABLE.get((state.phase, type(event)))
    if handler is None:
        raise UnexpectedStallEventError(state, event)
    return handler(state, event, now)


def _enter(state: StallState, phase: StallPhase, wake_at: float | None, **changes: Any) -> StallState:
    """Set the phase. Nothing else sets it, and no wake-up survives it."""
    return state._replace(phase=phase, wake_at=wake_at, **changes)


# --- limits


def limit_of(policy: Policy, longest: float) -> float:
    """Return how long, in seconds, a rank may go without a step outside a phase.

    That is ``--hang-timeout``. ``auto`` is ten times ``longest``, the longest gap between two steps so far, checkpoints
    and evaluations included, and at least a minute.
    """
    if policy.hang_timeout is not None:
        return policy.hang_timeout or float("inf")
    return max(AUTO_LEAST, AUTO_FACTOR * longest)


def has_learned(progress: Mapping[int, WorkerProgress]) -> bool:
    """Return whether a rank has been interrupted twice, by a checkpoint, say, as its steps show."""

    def is_interrupted(each: WorkerProgress) -> bool:
        average = (each.last - each.first) / max(1, each.iterations - 1)
        return each.second >= INTERRUPTION * average > 0

    return any(map(is_interrupted, progress.values()))


def may_be_unlearned(state: StallState) -> bool:
    """Return whether a stall may be an interruption of a kind that the job has not shown before.

    If a worker is busy, the job then gets more time. With an explicit ``--hang-timeout`` the user has said how much.
    """
    return state.policy.hang_timeout is None and not state.has_learned and not state.patience


def _active_at(each: WorkerProgress) -> float:
    """Return when a rank last showed a sign of progress: a step, or the beginning of a phase."""
    return max(each.last, each.phase_since)


def _due(state: StallState, each: WorkerProgress, limit: float) -> float:
    """Return when a rank is due."""
    if each.iterations < MIN_STEPS:
        timeout = state.policy.start_timeout or float("inf")
        return max(state.started_at, _active_at(each)) + timeout * (PHASE_FACTOR if each.phase else 1)
    return _active_at(each) + max(limit, state.patience) * (PHASE_FACTOR if each.phase else 1)


# --- the round


def _begin(state: StallState, event: Begun, now: float) -> Step:
    """Wait until a worker counts steps, unless one was so quick. Without ``--start-timeout`` nobody is woken before."""
    start = state.policy.start_timeout
    fresh = StallState(
        state.policy,
        ranks=event.ranks,
        base_rank=event.base_rank,
        started_at=now,
        longest=state.longest,
        has_learned=state.has_learned,
    )
    if start and event.ranks:
        return _enter(fresh, WATCHING, now + start - _sample_gap(start)), []
    return _start_watching(fresh, Counting(), now) if state.counts else (fresh, [])


def _end(state: StallState, event: Over, now: float) -> Step:
    return _enter(state, IDLE, None, ranks=(), counts=False), []


def _start_watching(state: StallState, event: Counting, now: float) -> Step:
    """Look for the first time when a stall would be noticed at the earliest.

    A forked worker may count before the agent knows that it exists.
    """
    state = state._replace(counts=True)
    if not state.ranks or state.policy.hang_timeout == 0:
        return state, []
    least = AUTO_LEAST if state.policy.hang_timeout is None else state.policy.hang_timeout
    return _enter(state, WATCHING, now + least - _sample_gap(least)), []


def _ignore(state: StallState, event: StallEvent, now: float) -> Step:
    return state, []


# --- from watching to the claim


def _watch(state: StallState, event: Looked, now: float) -> Step:
    if not event.progress:
        return _enter(state, IDLE, None), []
    active_at = max(map(_active_at, event.progress.values()))
    state = state._replace(
        longest=max(state.longest, *(each.longest for each in event.progress.values())),
        has_learned=state.has_learned or has_learned(event.progress),
        patience=state.patience if active_at <= state.last_at else 0.0,
    )
    limit = limit_of(state.policy, state.longest)
    dues = {rank: _due(state, each, limit) for rank, each in event.progress.items()}
    all_due = max(dues.values())
    gap = _sample_gap(all_due - active_at)
    if _has_slept(state, now):
        return state._replace(wake_at=now + gap), []
    if now >= all_due - gap:
        return _enter(state, SUSPECTING, all_due, last_at=active_at, due_at=all_due), [TakeStacks(final=False)]
    state, actions = _name_behind(state, event.progress, dues, limit, now)
    next_due = min((due for rank, due in dues.items() if rank not in state.behind), default=all_due)
    wake_at = min(all_due - gap, max(next_due, now + limit / LOOKS))
    return state._replace(wake_at=wake_at if wake_at < float("inf") else now + min(limit, 60.0)), actions


def _name_behind(
    state: StallState, progress: Mapping[int, WorkerProgress], dues: Mapping[int, float], limit: float, now: float
) -> Step:
    """Name ranks that are due while others have long gone on."""
    fastest = max(progress, key=lambda rank: progress[rank].iterations)
    front = max(each.last for each in progress.values())
    still_behind = {rank for rank in state.behind if dues.get(rank, now + 1) <= now}
    actions: list[StallAction] = []
    for rank in sorted(dues.keys() - still_behind):
        each = progress[rank]
        if dues[rank] <= now and front - each.last > limit / 2:
            still_behind.add(rank)
            text = (
                f"rank {state.base_rank + rank} has made no step for {now - _active_at(each):.0f} s, "
                f"after {counted(each.iterations, 'step')}, while others go on "
                f"(rank {state.base_rank + fastest}: {progress[fastest].iterations})"
            )
            actions.append(Tell(text))
    return state._replace(behind=frozenset(still_behind)), actions


def _suspect(state: StallState, event: Looked, now: float) -> Step:
    if _has_resumed(state, event) or _has_slept(state, now):
        return _watch(_enter(state, WATCHING, state.wake_at), event, now)
    if now < state.due_at:
        return state._replace(wake_at=state.due_at), []
    return _enter(state, CLAIMED, now + _look_interval(state), is_node_behind=False), [ClaimStall()]


def _hold_claim(state: StallState, event: Looked, now: float) -> Step:
    """Withdraw the claim if a rank has made a step. Tell once if other nodes go on without this one."""
    if _has_resumed(state, event):
        return _resume(state, event, now)
    state = state._replace(wake_at=now + _look_interval(state))
    if state.is_node_behind or now < state.due_at + (state.due_at - state.last_at) / 2:
        return state, []
    seconds = now - state.last_at
    text = (
        f"no worker of this node has made a step for {seconds:.0f} s; workers of other nodes go on, or their node does "
        "not answer"
    )
    return state._replace(is_node_behind=True), [Tell(text)]


def _resume(state: StallState, event: Looked, now: float) -> Step:
    """Go back to watching."""
    was_told = state.phase is TOLD
    seconds = max(map(_active_at, event.progress.values()), default=now) - state.last_at
    lost = state.stalled_seconds + (max(0.0, seconds) if was_told else 0.0)
    told: list[StallAction] = [Tell(f"the job makes progress again, after {seconds:.0f} s")] if was_told else []
    state = _enter(state, WATCHING, None, patience=0.0, stalled_seconds=lost, is_node_behind=False)
    state, actions = _watch(state, event, now)
    return state, [WithdrawClaim(), *told, *actions]


# --- the stall of all nodes


def _sample(state: StallState, event: AllStalled, now: float) -> Step:
    """Take the stacks again. A node that has resumed meanwhile does so, too: the judge waits for it."""
    state = _enter(state, SAMPLING, now + VERDICT_PATIENCE, number=event.number)
    return state, [TakeStacks(final=True)]


def _report(state: StallState, event: StacksTaken, now: float) -> Step:
    return _enter(state, REPORTED, now + VERDICT_PATIENCE), [ReportStacks(state.number, event.stacks)]


def _give_up_verdict(state: StallState, event: Looked, now: float) -> Step:
    return _enter(state, TOLD, now + _look_interval(state)), []


def _hear_verdict(state: StallState, event: Judged, now: float) -> Step:
    """Do what the verdict and ``--hang-action`` ask for."""
    if event.verdict.kind == BUSY and not state.patience:
        due_at = state.last_at + UNLEARNED_LEAST
        return _enter(state, WATCHING, due_at - SAMPLE_GAP, patience=UNLEARNED_LEAST), [WithdrawClaim()]
    state = _enter(state, TOLD, now + _look_interval(state))
    local_rank = event.blamed - state.base_rank
    if event.verdict.kind in NO_STALL or state.policy.hang_action is HangAction.REPORT or local_rank not in state.ranks:
        return state, []
    return state, [ReportHang(local_rank, event.verdict, event.text)]


def _wait_for_progress(state: StallState, event: Looked, now: float) -> Step:
    if _has_resumed(state, event):
        return _resume(state, event, now)
    return state._replace(wake_at=now + _look_interval(state)), []


def _has_resumed(state: StallState, event: Looked) -> bool:
    """Return whether a rank has made a step, has entered a phase, or is gone, since the stall was suspected."""
    return not event.progress or max(map(_active_at, event.progress.values())) > state.last_at


def _has_slept(state: StallState, now: float) -> bool:
    """Return whether this process looks so late that it must have been stopped, and the workers with it, perhaps."""
    return state.wake_at is not None and now > state.wake_at + SAMPLE_GAP


def _look_interval(state: StallState) -> float:
    """Return the seconds between two looks at a stalled job."""
    return max(0.5, (state.due_at - state.last_at) / LOOKS)


def _sample_gap(limit: float) -> float:
    """Return the seconds between the two samples of the stacks."""
    return min(SAMPLE_GAP, limit / 4)


def _rows(handlers: Mapping[type[StallEvent], Mapping[Handler, tuple[StallPhase, ...]]]) -> dict[Any, Handler]:
    return {
        (phase, kind): handler
        for kind, by_handler in handlers.items()
        for handler, phases in by_handler.items()
        for phase in phases
    }


TABLE: dict[tuple[StallPhase, type[StallEvent]], Handler] = _rows(
    {
        Begun: {_begin: tuple(StallPhase)},
        Over: {_end: tuple(StallPhase)},
        Counting: {_start_watching: (IDLE,), _ignore: (WATCHING, SUSPECTING, CLAIMED, SAMPLING, REPORTED, TOLD)},
        Looked: {
            _watch: (WATCHING,),
            _suspect: (SUSPECTING,),
            _hold_claim: (CLAIMED,),
            _give_up_verdict: (SAMPLING, REPORTED),
            _wait_for_progress: (TOLD,),
            _ignore: (IDLE,),
        },
        # A node whose claim and whose withdrawal of it have crossed with that of the last other node resumes later.
        AllStalled: {_sample: (WATCHING, SUSPECTING, CLAIMED, TOLD), _ignore: (IDLE, SAMPLING, REPORTED)},
        StacksTaken: {_report: (SAMPLING,), _ignore: (IDLE, WATCHING, SUSPECTING, CLAIMED, REPORTED, TOLD)},
        Judged: {_hear_verdict: (SAMPLING, REPORTED, TOLD), _ignore: (IDLE, WATCHING, SUSPECTING, CLAIMED)},
    }
)
