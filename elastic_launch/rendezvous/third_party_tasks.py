"""The blocking calls to a third-party handler, as tasks for the thread of ``third_party.ThirdPartyRendezvous``.

A task returns events for the agent, and names the task that follows unless the agent asks for another one first.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from elastic_launch.core.agent.messages import AgentEvent, Assigned, Decided, Ended
from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.errors import (
    ExitCode,
    LaunchError,
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    UnavailableError,
)
from elastic_launch.host.ports import reserve_port
from elastic_launch.job import Decision, End, EndKind
from elastic_launch.rendezvous.handler import RendezvousHandler
from elastic_launch.rendezvous.third_party_round import Outcome, Round, form_round

_FIRST_POLL, _LAST_POLL = 0.05, 0.5
"""Seconds between two checks whether all nodes have succeeded: at first, and after a while."""
_INTENDED = (*RendezvousError.__subclasses__(), RendezvousError)
"""Errors that a handler raises on purpose."""


class Step(NamedTuple):
    """Result of a task."""

    events: Sequence[AgentEvent] = ()
    """What the agent is told."""
    then: Callable[[], Step] | None = None
    """The task that follows unless the agent asks for another one first; None: there is none."""
    pause: float = 0.0
    """Seconds until then."""


@dataclass(eq=False)
class HandlerTasks:
    """The tasks of one agent. Their methods run in the thread that may block."""

    handler: RendezvousHandler
    """The user's; any object with the methods that are called here."""
    node: NodeRecord
    """This node."""
    local_addr: str | None
    """Address of this node, in case the handler does not say where the workers' store is; None: its name."""
    log: Callable[[str], None]
    """Prints a line on the console."""
    poll_interval: float = 5.0
    """Seconds between two checks for nodes that wait and for the end of the round: the interface cannot notify."""
    exit_barrier_timeout: float = 300.0
    """Seconds that a node whose workers have succeeded waits for the other nodes to succeed; torch's default."""
    is_closing: bool = False
    """Whether the agent is gone; set by the agent's thread."""
    round: Round | None = None
    """The current round, or the last one; None: this node waits for a round."""
    rounds: int = 0
    """Number of rounds of the job so far, this node's or not."""
    has_left: bool = False
    """Whether the job goes on, or may do so, without this node."""
    has_succeeded: bool = False
    """Whether this node's workers have succeeded in the current round."""
    decision: Decision = Decision(True)  # noqa: RUF009 - a value
    """What followed the last round."""
    decided_at: float = field(default_factory=time.monotonic)
    """When that was decided, on ``time.monotonic``."""
    reserved: socket.socket | None = None
    """Reserves the port of the workers' store."""

    def join(self) -> Step:
        """Wait for the next round, after the pause that was decided on."""
        waited = time.monotonic() - self.decided_at
        if waited < self.decision.pause:
            return Step(then=self.join, pause=self.decision.pause - waited)
        self.round = None
        self.release_port()
        try:
            info = self.handler.next_rendezvous()
        except Exception as error:
            if decision := self._decision_without_round(error):
                return Step([Decided(decision)])
            raise
        if self.is_closing:
            return Step()
        history = aged(self.decision.restart_history, time.monotonic() - self.decided_at)
        node = self.node._replace(restart_history=history, known_round=self.rounds - 1)
        # The handler comes from outside and need not be a subclass of ours, so it may lack the attribute.
        use_agent_store = bool(getattr(self.handler, "use_agent_store", False))
        self.round = form_round(info, node, use_agent_store, self.local_addr)
        assignment = self.round.assignment
        self.rounds = assignment.restart_count + 1
        self.has_succeeded = False
        if assignment.group_rank == 0 and not assignment.agent_store:
            with contextlib.suppress(UnavailableError):  # a store is served there already, or the worker will fail
                self.reserved = reserve_port(assignment.master_port)
        return Step([Assigned(assignment)], partial(self._poll, self.round), self.poll_interval)

    def _decision_without_round(self, error: Exception) -> Decision | None:
        """Return what follows if the job has no further round for this node; None: the handler failed."""
        if _is_a(error, RendezvousGracefulExitError):
            self.has_left = True
            self.log(f"{self._describe(error)}; the job goes on without this node")
            return Decision(False)
        if not _is_a(error, RendezvousClosedError):
            return None
        if self.has_succeeded:
            self.log("the job has ended; this node's workers had succeeded before")
            return Decision(False)
        text = f"{self._describe(error)}; the job has already ended: use another --rdzv-id for a new one"
        # With the failures after which this node expected another round.
        return self.decision._replace(restart=False, error=text, status=ExitCode.UNAVAILABLE)

    def _poll(self, current: Round) -> Step:
        """Check whether the round is over, and end it if nodes wait for the next one."""
        outcome = current.read_outcome()
        if outcome is None:
            waiting = self.handler.num_nodes_waiting()
            if waiting <= 0:
                return Step(then=partial(self._poll, current), pause=self.poll_interval)
            reason = f"{waiting} more node{'s' if waiting > 1 else ''} can join"
            end = End(EndKind.MEMBERSHIP_CHANGED, reason, self.node.node)
            outcome = current.write_outcome(Outcome(end, Decision(True, current.restart_history())))
        return _ended(outcome.end)

    def report_round(self, end: End | None, decision: Decision) -> Step:
        """Report how the round ended for this node, and learn what follows for all.

        Args:
            end: as the agent was told; None: it was not.
            decision: this node's, which holds if no other node was first.
        """
        if self.round and end is not None and end.kind is not EndKind.DONE:
            own = Outcome(end._replace(mine=False), decision)
            try:
                outcome = self.round.write_outcome(own)
            except Exception:
                outcome = own  # the store is lost: the failure that is known explains more, and a new round will show
            if outcome is not own:
                consequences = () if outcome.decision.restart else decision.failures
                decision = outcome.decision._replace(failures=(*outcome.decision.failures, *consequences))
        self.decision, self.decided_at = decision, time.monotonic()
        return Step([Decided(decision)])

    def report_success(self) -> Step:
        """Report that this node's workers have succeeded, and wait for the other nodes."""
        assert self.round is not None, "workers run in a round"
        self.has_succeeded = True
        with contextlib.suppress(Exception):  # if the store is lost, the next task will find out
            self.round.report_success()
        return self._await_success(self.round, time.monotonic() + self.exit_barrier_timeout, _FIRST_POLL)

    def _await_success(self, current: Round, deadline: float, pause: float) -> Step:
        done = _ended(End(EndKind.DONE, "all workers succeeded"))
        try:
            if current.have_all_succeeded():
                with contextlib.suppress(Exception):  # the node that hosts the store knew, and has gone
                    current.linger()
                return done
            if outcome := current.read_outcome():
                return _ended(outcome.end)
        except Exception as error:
            self.log(f"{self._describe(error)}; this node's workers succeeded, those of other nodes may have failed")
            return done
        if time.monotonic() >= deadline:
            self.log(f"this node's workers succeeded; others did not end within {self.exit_barrier_timeout:g} s")
            return done
        return Step(then=partial(self._await_success, current, deadline, min(pause * 1.5, _LAST_POLL)), pause=pause)

    def leave(self, reason: str, status: int) -> Step:
        """Report that this node leaves, so that the others need not notice it.

        Args:
            reason: for the other nodes' console.
            status: exit status with which the job ends; 0: the job goes on without this node.
        """
        self.has_left = not status
        if self.round and self.round.size > 1:
            kind = EndKind.ERROR if status else EndKind.MEMBERSHIP_CHANGED
            rank = -1 if status else self.round.assignment.group_rank
            end = End(kind, reason, self.node.node, status=status, rank=rank)
            error = reason if status else ""
            decision = Decision(not status, self.round.restart_history(), error=error, status=status)
            with contextlib.suppress(Exception):  # if the store is lost, the others will notice
                self.round.write_outcome(Outcome(end, decision))
        return Step()

    def shut_down(self) -> Step:
        """End the job for all nodes, unless this node has left it or never was in it."""
        if self.rounds and not self.has_left:
            try:
                self.handler.shutdown()
            except Exception as error:
                self.log(f"{self._describe(error)} (in shutdown())")
        return Step()

    def release_port(self) -> None:
        """End the reservation of the port for the workers' store."""
        if self.reserved is not None:
            self.reserved.close()
            self.reserved = None

    def explain(self, error: BaseException) -> LaunchError:
        """Return an error that the handler raised as one of ours, with a traceback if it looks unintended."""
        explained: LaunchError
        if kind := next((kind for kind in _INTENDED if _is_a(error, kind)), None):
            explained = kind(self._describe(error))
        elif isinstance(error, OSError) or type(error).__name__ in ("RuntimeError", "DistStoreError"):
            # torch's stores raise the latter two when a key does not come in time, or a connection is lost.
            explained = RendezvousConnectionError(self._describe(error))
        else:
            import traceback  # late: only needed to explain a defect

            text = "".join(traceback.format_exception(error)).rstrip()
            explained = LaunchError(f"{self._describe(error)}; this looks like a bug in the handler:\n{text}")
        explained.__cause__ = error
        return explained

    def _describe(self, error: BaseException) -> str:
        """Return one line that names the handler and the error."""
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return f"rendezvous handler {type(self.handler).__name__}: {what}"


def _ended(end: End) -> Step:
    return Step([Ended(end, time.time())])


def _is_a(error: BaseException, kind: type[BaseException]) -> bool:
    """Return whether an error is of a kind, by name: torch's handlers raise torch's classes, not ours."""
    return kind.__name__ in (base.__name__ for base in type(error).__mro__)
