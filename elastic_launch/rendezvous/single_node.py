"""The rendezvous of a job on one node: it needs no store and answers every action at once.

The worker of rank 0 hosts the process group's store: on a new free port in each round, unless the user chose the port.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from elastic_launch.config import DEFAULT_JOIN_TIMEOUT
from elastic_launch.core.agent.messages import (
    AgentEvent,
    Assigned,
    Decided,
    Ended,
    GiveUpStop,
    RendezvousAction,
    ReportCalls,
    ReportFailure,
    ReportRound,
    ReportSuccess,
    RequestJoin,
    RequestRestart,
    RequestStop,
    StopAgreed,
)
from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.progress.messages import (
    AllStalled,
    ClaimStall,
    Judged,
    ProgressRequest,
    ReportStacks,
    ReportVerdict,
    RequestStacks,
    StacksArrived,
    StacksComplete,
    StacksWanted,
)
from elastic_launch.core.text import visible
from elastic_launch.errors import signal_name
from elastic_launch.host.ports import reserve_ipv4_port, reserve_port
from elastic_launch.job import Assignment, Change, Decision, End, EndKind

if TYPE_CHECKING:
    from elastic_launch.core.status import Meeting


def answer_alone(action: RendezvousAction, next_round: Callable[[], Assignment]) -> list[AgentEvent]:
    """Answer an action of the agent for a job of one node: what the node reports is what holds.

    Args:
        action: the agent's.
        next_round: begins a round and returns the node's assignment in it.
    """
    match action:
        case RequestJoin():
            return [Assigned(next_round())]
        case RequestRestart(reason):
            end = End(EndKind.MEMBERSHIP_CHANGED, reason, change=Change.RESTART_REQUESTED, mine=True)
            return [Ended(end, time.time())]
        case ReportFailure(failure):
            end = End(EndKind.FAILED, failure.headline(with_host=False), failures=(failure,), mine=True)
            return [Ended(end, time.time())]
        case RequestStop(signum, _):
            end = End(EndKind.STOP, signal_name(signum), signum=signum, same_step=True, mine=True)
            return [Ended(end, time.time())]
        case ReportCalls(calls):
            return [StopAgreed(calls + 1)]
        case GiveUpStop():
            return [StopAgreed(0)]
        case ReportSuccess():
            return [Ended(End(EndKind.DONE, "all workers succeeded"), time.time())]
        case ReportRound(decision):
            return [Decided(decision)]
    return judge_alone(action) if isinstance(action, ProgressRequest) else []


def judge_alone(request: ProgressRequest) -> list[AgentEvent]:
    """Answer what a node reports of a stall if it is the only one, or cannot ask the others."""
    match request:
        case RequestStacks():
            return [StacksWanted(-1)]
        case ClaimStall():
            return [AllStalled(1)]
        case ReportStacks(number, stacks):
            return [StacksArrived(number, stacks), StacksComplete(number)]
        case ReportVerdict(number, verdict, blamed, text):
            return [Judged(number, verdict, blamed, text)]
    return []


class SingleNodeRendezvous:
    """Gives one node its assignment in each round.

    Args:
        run_id: the job's id.
        local_world_size: number of workers.
        master_addr: address of the workers' store.
        master_port: its port; 0: a free port, chosen for each round.
        backend: name of the backend that the user chose. A single node does not need it.
        patience: seconds that the node may be unfit before a round.
    """

    def __init__(
        self,
        run_id: str,
        local_world_size: int,
        master_addr: str = "127.0.0.1",
        master_port: int = 0,
        backend: str = "static",
        patience: float = DEFAULT_JOIN_TIMEOUT,
    ) -> None:
        self.patience = patience
        self.lease: Callable[[float], None] = lambda until: None  # unused: nobody takes the place of the only node
        self._run_id = run_id
        self._workers = local_world_size
        self._addr = master_addr
        self.port = master_port
        """The port that the user chose; 0: none."""
        self._backend = backend
        self._reserved = contextlib.ExitStack()
        """Holds the port that is reserved for the workers' store."""
        self._rounds = 0
        self._has_ended = True
        """Whether the current round is over, which the agent may not know yet. There is none at first."""
        self._last = Decision(restart=True)
        self._decided_at = time.monotonic()

    def get_backend(self) -> str:
        """Return the name of the backend that the user chose."""
        return self._backend

    def get_run_id(self) -> str:
        """Return the job's id."""
        return self._run_id

    def meeting(self) -> Meeting:
        """Describe how the nodes meet: there is only this one."""
        from elastic_launch.core.status import Meeting  # late: only needed when somebody asks

        return Meeting(self._backend)

    def ask(self, action: RendezvousAction) -> list[AgentEvent]:
        """Answer an action of the agent.

        Raises:
            UnavailableError: the port that the user chose is in use.
        """
        if isinstance(action, ReportRound):
            self._last, self._decided_at = action.decision, time.monotonic()
        ends = isinstance(action, RequestRestart | RequestStop | ReportFailure | ReportSuccess)
        if ends and self._has_ended:
            return []  # the first reason wins; the agent is about to learn it
        self._has_ended |= ends
        return answer_alone(action, self._next_round)

    def follow_joining(self) -> None:
        """Return None: no other node joins."""

    def descriptors(self) -> list[tuple[int, int]]:
        """Return no descriptors: no event comes unasked."""
        return []

    def deadline(self) -> float | None:
        """Return None: there is no timer."""
        return None

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Return no events: all are returned by ``ask``."""
        return []

    def close(self) -> None:
        """Release the reserved port."""
        self._reserved.close()

    def _next_round(self) -> Assignment:
        self.close()
        if self.port or self._addr != "127.0.0.1":
            port = self._reserved.enter_context(reserve_port(self.port)).getsockname()[1]
        else:
            port = self._reserved.enter_context(reserve_ipv4_port())
        self._rounds += 1
        self._has_ended = False
        return self.assignment(port)

    def assignment(self, port: int) -> Assignment:
        """Return the node's assignment in the current round; ``port``: of the workers' store."""
        return Assignment(
            group_rank=0,
            group_world_size=1,
            base_rank=0,
            world_size=self._workers,
            local_world_size=self._workers,
            base_role_rank=0,
            role_world_size=self._workers,
            master_addr=self._addr,
            master_port=port,
            host=visible(os.uname().nodename),
            port_picked=self.port == 0,
            restart_count=max(0, self._rounds - 1),
            restart_history=aged(self._last.restart_history, time.monotonic() - self._decided_at),
        )
