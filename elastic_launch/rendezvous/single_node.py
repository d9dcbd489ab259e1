"""The rendezvous of a job on one node: it needs no store and answers every action at once.

The worker of rank 0 hosts the process group's store: on a new free port in each round, unless the user chose the port.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection

from elastic_launch.core.agent.messages import (
    AgentEvent,
    Assigned,
    Decided,
    Ended,
    RendezvousAction,
    ReportFailure,
    ReportRound,
    ReportSuccess,
    RequestJoin,
)
from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.text import visible
from elastic_launch.host.ports import reserve_port
from elastic_launch.job import Assignment, Decision, End, EndKind


def answer_alone(action: RendezvousAction, next_round: Callable[[], Assignment]) -> list[AgentEvent]:
    """Answer an action of the agent for a job of one node: what the node reports is what holds.

    Args:
        action: the agent's.
        next_round: begins a round and returns the node's assignment in it.
    """
    match action:
        case RequestJoin():
            return [Assigned(next_round())]
        case ReportFailure(failure):
            end = End(EndKind.FAILED, failure.headline(with_host=False), failures=(failure,), mine=True)
            return [Ended(end, time.time())]
        case ReportSuccess():
            return [Ended(End(EndKind.DONE, "all workers succeeded"), time.time())]
        case ReportRound(decision):
            return [Decided(decision)]
    return []


class SingleNodeRendezvous:
    """Gives one node its assignment in each round.

    Args:
        run_id: the job's id.
        local_world_size: number of workers.
        master_addr: address of the workers' store.
        master_port: its port; 0: a free port, chosen for each round.
        backend: name of the backend that the user chose. A single node does not need it.
    """

    def __init__(
        self,
        run_id: str,
        local_world_size: int,
        master_addr: str = "127.0.0.1",
        master_port: int = 0,
        backend: str = "static",
    ) -> None:
        self.lease: Callable[[float], None] = lambda until: None  # unused: nobody takes the place of the only node
        self._run_id = run_id
        self._workers = local_world_size
        self._addr = master_addr
        self._port = master_port
        self._backend = backend
        self._reserved = contextlib.ExitStack()
        """Holds the port that is reserved for the workers' store."""
        self._rounds = 0
        self._last = Decision(restart=True)
        self._decided_at = time.monotonic()

    def get_backend(self) -> str:
        """Return the name of the backend that the user chose."""
        return self._backend

    def get_run_id(self) -> str:
        """Return the job's id."""
        return self._run_id

    def ask(self, action: RendezvousAction) -> list[AgentEvent]:
        """Answer an action of the agent.

        Raises:
            UnavailableError: the port that the user chose is in use.
        """
        if isinstance(action, ReportRound):
            self._last, self._decided_at = action.decision, time.monotonic()
        return answer_alone(action, self._next_round)

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
        sock = self._reserved.enter_context(reserve_port(self._port))
        self._rounds += 1
        return Assignment(
            group_rank=0,
            group_world_size=1,
            base_rank=0,
            world_size=self._workers,
            local_world_size=self._workers,
            base_role_rank=0,
            role_world_size=self._workers,
            master_addr=self._addr,
            master_port=sock.getsockname()[1],
            host=visible(os.uname().nodename),
            port_picked=self._port == 0,
            restart_count=self._rounds - 1,
            restart_history=aged(self._last.restart_history, time.monotonic() - self._decided_at),
        )
