"""Define the agent's messages: the events that it handles and the actions that it carries out.

They are named tuples, not dataclasses, because dataclasses would make the agent's start 10 % slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from elastic_launch.core.agent.root_cause import NOTHING, Evidence, Exit
from elastic_launch.core.progress.goodput import RoundProgress
from elastic_launch.core.progress.messages import ProgressEvent, ProgressRequest
from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Assignment, Decision, End, Goodput, Level, LineKind, Policy

# Events: what happened.


class Assigned(NamedTuple):
    """The rendezvous assigned the node its ranks in a round."""

    assignment: Assignment


class Started(NamedTuple):
    """The worker processes exist."""

    pids: Mapping[int, int]
    """Process ids by local rank. A worker that could not be started is missing; its ``Exited`` follows."""


class Exited(NamedTuple):
    """A worker process ended."""

    exit: Exit
    evidence: Evidence = NOTHING
    """What is already known about a failure."""


class Signalled(NamedTuple):
    """The agent received a signal that stops the job."""

    signum: int
    time: float
    """When the signal arrived, in seconds since 1970; the agent may handle it later."""
    calls: int = 0
    """Greatest number of calls of ``should_stop()`` that a worker of this node has begun; 0: none has asked."""
    reason: str = ""
    """Why the whole job is to stop, in one line; empty: this node leaves, and the others go on if they can."""


class CheckPassed(NamedTuple):
    """The node's health check has succeeded."""


class CheckFailed(NamedTuple):
    """The node's health check has failed, or could not be started."""

    how: str
    """How it ended, as in ``exit code 1``."""
    output: str = ""
    """The last lines of its output."""


class UserSignalled(NamedTuple):
    """The agent received a signal that it forwards to the workers."""

    signum: int


class RestartRequested(NamedTuple):
    """The user asks for another round."""

    reason: str
    """Why the round ends, in one line."""


class TimerExpired(NamedTuple):
    """A worker stayed in a timer's scope for too long."""

    pid: int
    reason: str
    """A few words on the timer, for the failure report."""


class Hung(NamedTuple):
    """The job makes no progress, this node's worker is the likeliest cause, and ``--hang-action`` is not ``report``."""

    local_rank: int
    error: str
    """What it does, in one line."""
    report: str
    """The stacks of all ranks, merged."""
    time: float
    """When that was found, in seconds since 1970."""


class LeaseExpired(NamedTuple):
    """The keeper killed the workers, because the agent, suspended or starved of CPU time, did not renew their lease."""


class DeadlineReached(NamedTuple):
    """The time in ``AgentState.deadline`` has come."""

    evidence: Mapping[int, Evidence] = MappingProxyType({})
    """What is known about workers that failed, by local rank; only after SIGKILL."""
    progress: RoundProgress | None = None
    """What the workers made; None: nobody counts. Only after SIGKILL."""
    calls: int = 0
    """As in ``Signalled``."""


class GroupReaped(NamedTuple):
    """The round's workers and all processes that they left behind are gone."""

    evidence: Mapping[int, Evidence]
    """What is known about workers that failed, by local rank."""
    leftovers: tuple[str, ...] = ()
    """Names of the processes that outlived their worker and had to be killed."""
    progress: RoundProgress | None = None
    """What the workers made; None: nobody counts."""


class Ended(NamedTuple):
    """The round is over on all nodes."""

    end: End
    time: float
    """When this node learned of it, in seconds since 1970."""
    calls: int = 0
    """As in ``Signalled``."""


class StopAgreed(NamedTuple):
    """The nodes agreed at which step the workers stop, after an ``Ended`` with ``same_step``."""

    stop_at: int
    """The call of ``should_stop()`` that returns true on every rank, counted from 1; 0: they could not agree."""


class Decided(NamedTuple):
    """The nodes agreed on what follows the round. While joining: the job ended without this node."""

    decision: Decision


RendezvousEvent = Assigned | Ended | StopAgreed | Decided | ProgressEvent
WorkerEvent = Started | Exited | LeaseExpired | GroupReaped
UserEvent = Signalled | UserSignalled | RestartRequested
CheckEvent = CheckPassed | CheckFailed
AgentEvent = RendezvousEvent | WorkerEvent | UserEvent | CheckEvent | TimerExpired | Hung | DeadlineReached

# Actions: what the agent must do.


class RequestJoin(NamedTuple):
    """Ask the rendezvous for an assignment in the next round; ``Assigned`` is the answer."""

    has_check: bool = False
    """Whether this node has a health check. Then a spare does not go on to another round by itself: the answer is
    ``Decided`` with ``restart``, and the agent asks again once the check has passed."""


class Withdraw(NamedTuple):
    """Tell the other nodes not to wait for this one, because its health check fails.

    There is no answer before the job ends (``Decided``). ``RequestJoin`` ends this.
    """

    reason: str
    """Why it fails, in one line."""


class RunCheck(NamedTuple):
    """Run the node's health check; ``CheckPassed`` or ``CheckFailed`` is the answer."""

    attempt: int
    """How often it has been run before this round, including this time."""
    restart_count: int
    """Number of the round to join, as far as the node knows."""


class StopCheck(NamedTuple):
    """Kill the health check and all that it has started; ``CheckFailed`` is the answer."""


class ReportFailure(NamedTuple):
    """End the round on all nodes because a worker failed; the answer is the ``Ended`` that came first."""

    failure: ProcessFailure
    """What is known so far about the failure."""


class RequestRestart(NamedTuple):
    """End the running round on all nodes because the user asks for another one; ``Ended`` is the answer.

    If no round runs, there is no answer: another one is on its way.
    """

    reason: str
    """One line for the user."""


class ReportSuccess(NamedTuple):
    """Report that this node's workers have all succeeded; ``Ended`` is the answer."""

    patience: float = float("inf")
    """Seconds to wait for the other nodes' workers; after that this node's part is done."""


class Fence(NamedTuple):
    """Report that this node's workers are gone, so that others may replace them; ``Ended`` is the answer."""


class ReportRound(NamedTuple):
    """Report that this node has finished with the round; ``Decided`` is the answer."""

    decision: Decision
    """What follows if this node's failure ended the round. Otherwise only its failures count, as consequences."""
    may_restart: bool = True
    """False if this node cannot take part in another round."""


class Leave(NamedTuple):
    """Leave the job because of a signal or an error of the launcher; there is no answer."""

    signum: int = 0
    error: str = ""
    status: int = 0
    """Exit status for ``error``."""
    reason: str = ""
    """Why the whole job stops, in one line; empty: the others go on if they can."""


class RequestStop(NamedTuple):
    """Leave the job because of a signal, once the workers of all nodes have stopped at the same step.

    ``Ended`` with ``same_step`` is the answer, or ``StopAgreed(0)`` if this rendezvous cannot do that.
    """

    signum: int
    reason: str = ""
    """Why the whole job stops, in one line; empty: the others go on if they can."""


class ReportCalls(NamedTuple):
    """Report how far this node's workers have come, which stay there; ``StopAgreed`` is the answer."""

    calls: int
    """As in ``Signalled``."""


class GiveUpStop(NamedTuple):
    """Report that this node cannot stop at the same step as the others; ``StopAgreed`` is the answer."""


class Start(NamedTuple):
    """Start the workers of a round; ``Started`` is the answer."""

    assignment: Assignment


class SendSignal(NamedTuple):
    """Send a signal to workers."""

    signum: int
    local_ranks: frozenset[int]
    stop: bool
    """True: stop the workers and their process groups. False: signal only the leader of each process group."""


class SetStop(NamedTuple):
    """Tell the workers through their memory when to stop."""

    hold: bool
    """Whether ``should_stop()`` waits until ``stop_at`` is set, or ``hold`` is false again."""
    stop_at: int
    """The call of ``should_stop()`` from which on it returns true; 0: none."""


class DumpStacks(NamedTuple):
    """Ask workers to write the stacks of their threads."""

    local_ranks: frozenset[int]


class ReapLeftovers(NamedTuple):
    """End all processes that the round left behind; ``GroupReaped`` is the answer."""

    kill: bool
    """False: send SIGTERM to what workers left behind. True: send SIGKILL to everything, including the workers."""


class Log(NamedTuple):
    """Write one line for the user."""

    text: str
    level: Level = Level.WARNING
    kind: LineKind = LineKind.NOTE


class Finish(NamedTuple):
    """End the run: success, unless ``failures``, ``signum`` or ``error`` says otherwise."""

    failures: tuple[ProcessFailure, ...] = ()
    """Failed workers, the cause first."""
    signum: int | None = None
    error: str = ""
    status: int = 0
    """Exit status for ``error``."""
    why: str = ""
    """Why the job did not restart although restarts were left."""
    restarts: int = 0
    """Restarts that failures used up."""
    goodput: Goodput = Goodput()
    """What the job got done, as far as this node knows."""


StopAction = RequestStop | ReportCalls | GiveUpStop
RoundAction = RequestJoin | Withdraw | RequestRestart | ReportFailure | ReportSuccess | Fence | ReportRound | Leave
RendezvousAction = RoundAction | StopAction | ProgressRequest
"""What the agent asks of the rendezvous."""
Action = (
    RendezvousAction | RunCheck | StopCheck | Start | SendSignal | SetStop | DumpStacks | ReapLeftovers | Log | Finish
)


class CheckLimits(NamedTuple):
    """How long a node's health check may take, and may fail."""

    timeout: float = 60.0
    """Seconds after which a check that still runs has failed."""
    patience: float = float("inf")
    """Seconds before a round, since the first check, after which the node gives up; infinite if the rendezvous decides
    that."""


class Limits(NamedTuple):
    """The settings that decisions depend on."""

    policy: Policy
    shutdown_timeout: float
    """Seconds between a worker's stop signal and SIGKILL."""
    exit_barrier_timeout: float = float("inf")
    """Seconds to wait, once this node's workers have succeeded, for those of other nodes."""
    check: CheckLimits | None = None
    """Those of the health check; None: the node has none."""
