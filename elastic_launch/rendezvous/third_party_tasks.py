"""The blocking calls to a third-party handler, as tasks for the thread of ``third_party.ThirdPartyRendezvous``.

A task returns events for the agent, and names the task that follows unless the agent asks for another one first.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from elastic_launch.core.agent.lifecycle import AgentEvent, Assigned, Decided, Ended
from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.errors import (
    ExitCode,
    LaunchError,
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousStateError,
    RendezvousTimeoutError,
    UnavailableError,
)
from elastic_launch.host.ports import reserve_port
from elastic_launch.job import Decision, End, EndKind
from elastic_launch.rendezvous.handler import RendezvousInfo
from elastic_launch.rendezvous.third_party_round import Outcome, Round, form_round

_FIRST_POLL, _LAST_POLL = 0.05, 0.5
"""Seconds between two checks whether all nodes have succeeded: at first, and after a while."""

_KINDS: tuple[type[RendezvousError], ...] = (
    RendezvousTimeoutError,
    RendezvousConnectionError,
    RendezvousStateError,
    RendezvousClosedError,
    RendezvousGracefulExitError,
    RendezvousError,
)
"""Errors that a handler may raise on purpose."""


class Handler(Protocol):
    """The methods of torch's ``RendezvousHandler`` that the launcher calls. Handlers need not have the others."""

    def get_run_id(self) -> str:
        """Return the job's id."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes, and return this node's part in the new round."""

    def num_nodes_waiting(self) -> int:
        """Return how many nodes wait for the next round."""

    def shutdown(self) -> bool:
        """End the job for all nodes."""


class Step(NamedTuple):
    """Result of a task."""

    events: Sequence[AgentEvent] = ()
    """What the agent is told."""
    then: Callable[[], Step] | None = None
    """The task that follows unless the agent asks for another one first; None: there is none."""
    pause: float = 0.0
    """Seconds until then."""


class HandlerTasks:
    """The tasks of one agent. All methods but ``__init__`` run in the thread that may block.

    Args:
        handler: the user's.
        node: this node.
        local_addr: address of this node; None: its name.
        poll_interval: seconds between two calls of ``num_nodes_waiting``.
        exit_barrier_timeout: seconds to wait for the other nodes' success.
        log: prints a line on the console.
    """

    def __init__(
        self,
        handler: Handler,
        node: NodeRecord,
        local_addr: str | None,
        poll_interval: float,
        exit_barrier_timeout: float,
        log: Callable[[str], None],
    ) -> None:
        self.is_closing = False
        """Whether the agent is gone; set by the agent's thread."""
        self._handler = handler
        self._node = node
        self._local_addr = local_addr
        self._poll_interval = poll_interval
        self._exit_barrier_timeout = exit_barrier_timeout
        self._log = log
        self._round: Round | None = None
        self._rounds = 0
        """Number of rounds so far, in all nodes' count."""
        self._has_left = False
        """Whether the job goes on, or may do so, without this node."""
        self._has_succeeded = False
        self._decision = Decision(True)
        """What followed the last round."""
        self._decided_at = time.monotonic()
        self._reserved: socket.socket | None = None

    def join(self) -> Step:
        """Wait for the next round, after the pause that was decided on."""
        waited = time.monotonic() - self._decided_at
        if waited < self._decision.pause:
            return Step(then=self.join, pause=self._decision.pause - waited)
        self._round = None
        self.release_port()
        try:
            info = self._handler.next_rendezvous()
        except Exception as error:
            if _is_a(error, RendezvousGracefulExitError):
                self._has_left = True
                self._log(f"{self._describe(error)}; the job goes on without this node")
                return Step([Decided(Decision(False))])
            if not _is_a(error, RendezvousClosedError):
                raise
            if self._has_succeeded:
                self._log("the job has ended; this node's workers had succeeded before")
                return Step([Decided(Decision(False))])
            text = f"{self._describe(error)}; the job has already ended: use another --rdzv-id for a new one"
            # With the failures after which this node expected another round.
            decision = self._decision._replace(restart=False, error=text, status=ExitCode.UNAVAILABLE)
            return Step([Decided(decision)])
        if self.is_closing:
            return Step()
        history = aged(self._decision.restart_history, time.monotonic() - self._decided_at)
        node = self._node._replace(restart_history=history, past=self._rounds - 1)
        # The handler comes from outside and need not be a subclass of ours, so it may lack the attribute.
        use_agent_store = bool(getattr(self._handler, "use_agent_store", False))
        self._round = form_round(info, node, use_agent_store, self._local_addr)
        assignment = self._round.assignment
        self._rounds = assignment.restart_count + 1
        self._has_succeeded = False
        if assignment.group_rank == 0 and not assignment.agent_store:
            with contextlib.suppress(UnavailableError):  # a store is served there already, or the worker will fail
                self._reserved = reserve_port(assignment.master_port)
        return Step([Assigned(assignment)], partial(self._poll, self._round), self._poll_interval)

    def _poll(self, current: Round) -> Step:
        """Check whether the round is over, and end it if nodes wait for the next one."""
        outcome = current.read_outcome()
        if outcome is None:
            waiting = self._handler.num_nodes_waiting()
            if waiting <= 0:
                return Step(then=partial(self._poll, current), pause=self._poll_interval)
            reason = f"{waiting} more node{'s' if waiting > 1 else ''} can join"
            end = End(EndKind.MEMBERSHIP_CHANGED, reason, self._node.node)
            outcome = current.write_outcome(Outcome(end, Decision(True, current.restart_history())))
        return _ended(outcome.end)

    def stop_polling(self) -> Step:
        """Do nothing until the agent asks for something."""
        return Step()

    def report_round(self, end: End | None, decision: Decision) -> Step:
        """Report how the round ended for this node, and learn what follows for all.

        Args:
            end: as the agent was told; None: it was not.
            decision: this node's, which holds if no other node was first.
        """
        if self._round and end is not None and end.kind is not EndKind.DONE:
            own = Outcome(end._replace(mine=False), decision)
            try:
                outcome = self._round.write_outcome(own)
            except Exception:
                outcome = own  # the store is lost: the failure that is known explains more, and a new round will show
            if outcome is not own:
                consequences = () if outcome.decision.restart else decision.failures
                decision = outcome.decision._replace(failures=(*outcome.decision.failures, *consequences))
        self._decision, self._decided_at = decision, time.monotonic()
        return Step([Decided(decision)])

    def report_success(self) -> Step:
        """Report that this node's workers have succeeded, and wait for the other nodes."""
        assert self._round is not None, "workers run in a round"
        self._has_succeeded = True
        with contextlib.suppress(Exception):  # if the store is lost, the next task will find out
            self._round.report_success()
        return self._await_success(self._round, time.monotonic() + self._exit_barrier_timeout, _FIRST_POLL)

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
            self._log(f"{self._describe(error)}; this node's workers succeeded, those of other nodes may have failed")
            return done
        if time.monotonic() >= deadline:
            self._log(
                "this node's workers succeeded; those of other nodes did not end within "
                f"{self._exit_barrier_timeout:g} s"
            )
            return done
        return Step(then=partial(self._await_success, current, deadline, min(pause * 1.5, _LAST_POLL)), pause=pause)

    def leave(self, reason: str, status: int) -> Step:
        """Report that this node leaves, so that the others need not notice it.

        Args:
            reason: for the other nodes' console.
            status: exit status with which the job ends; 0: the job goes on without this node.
        """
        self._has_left = not status
        if self._round and self._round.size > 1:
            rank = self._round.assignment.group_rank
            end = End(EndKind.MEMBERSHIP_CHANGED, reason, self._node.node, rank=rank)
            decision = Decision(True, self._round.restart_history())
            if status:
                end = End(EndKind.ERROR, reason, self._node.node, status=status)
                decision = decision._replace(restart=False, error=reason, status=status)
            with contextlib.suppress(Exception):  # if the store is lost, the others will notice
                self._round.write_outcome(Outcome(end, decision))
        return Step()

    def shut_down(self) -> Step:
        """End the job for all nodes, unless this node has left it or never was in it."""
        if self._rounds and not self._has_left:
            try:
                self._handler.shutdown()
            except Exception as error:
                self._log(f"{self._describe(error)} (in shutdown())")
        return Step()

    def release_port(self) -> None:
        """End the reservation of the port for the workers' store."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    def explain(self, error: BaseException) -> LaunchError:
        """Return an error that the handler raised as one of ours, with a traceback if it looks unintended."""
        explained: LaunchError
        if kind := next((kind for kind in _KINDS if _is_a(error, kind)), None):
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
        return f"rendezvous handler {type(self._handler).__name__}: {what}"


def _ended(end: End) -> Step:
    return Step([Ended(end, time.time())])


def _is_a(error: BaseException, kind: type[BaseException]) -> bool:
    """Return whether an error is of a kind, by name: torch's handlers raise torch's classes, not ours."""
    return kind.__name__ in (base.__name__ for base in type(error).__mro__)
