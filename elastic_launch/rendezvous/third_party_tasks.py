"""The blocking calls to a third-party handler, as tasks for the thread of ``third_party.ThirdPartyRendezvous``.

A task may be a generator. It yields the seconds until it continues, and it does not continue if the agent asks for
another task before then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from elastic_launch import errors
from elastic_launch.core.agent.messages import AgentEvent, Assigned, Decided, Ended
from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.progress.goodput import furthest
from elastic_launch.core.rendezvous.ending import bounded
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.text import counted
from elastic_launch.host.ports import reserve_port
from elastic_launch.job import Change, Decision, End, EndKind
from elastic_launch.rendezvous.handler import RendezvousHandler
from elastic_launch.rendezvous.third_party_round import Outcome, ThirdPartyRound, form_round

_FIRST_POLL, _LAST_POLL = 0.05, 0.5
"""Seconds between two checks whether all nodes have succeeded: at first, and after a while."""
_INTENDED = (*errors.RendezvousError.__subclasses__(), errors.RendezvousError)
"""Errors that a handler raises on purpose."""

Task = Callable[[], Iterator[float] | None]
"""Runs in the thread. Yields the seconds until it continues, if it has to wait."""


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
    max_pause: float = 0.0
    """The longest pause before a restart that the job allows, in seconds."""
    report: Callable[[AgentEvent], None] = field(init=False)
    """Hands an event to the agent."""
    is_closing: bool = False
    """Whether the agent is gone; set by the agent's thread."""
    round: ThirdPartyRound | None = None
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
    reserved: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Holds the reserved port of the workers' store."""

    def join(self) -> Iterator[float]:
        """Wait for the next round, after the pause that was decided on. Then check whether it is over."""
        while (waited := time.monotonic() - self.decided_at) < self.decision.pause:
            yield self.decision.pause - waited
        self.round = None
        self.reserved.close()
        try:
            info = self.handler.next_rendezvous()
        except Exception as error:
            if decision := self._decision_without_round(error):
                self.report(Decided(decision))
                return
            raise
        if self.is_closing:
            return
        history = aged(self.decision.restart_history, time.monotonic() - self.decided_at)
        node = self.node._replace(restart_history=history, known_round=self.rounds - 1)
        # The handler comes from outside and need not be a subclass of ours, so it may lack the attribute.
        use_agent_store = bool(getattr(self.handler, "use_agent_store", False))
        self.round = current = form_round(info, node, use_agent_store, self.local_addr, self.max_pause)
        assignment = current.assignment
        self.rounds = assignment.restart_count + 1
        self.has_succeeded = False
        if assignment.group_rank == 0 and not assignment.agent_store:
            # If the port is in use, a store is served there already, or the worker will fail.
            with contextlib.suppress(errors.UnavailableError):
                self.reserved.enter_context(reserve_port(assignment.master_port))
        self.report(Assigned(assignment))
        outcome: Outcome | None = None
        while outcome is None:
            yield self.poll_interval
            outcome = current.read_outcome() or self._end_for_others(current)
        self.report(Ended(outcome.end, time.time()))

    def _decision_without_round(self, error: Exception) -> Decision | None:
        """Return what follows if the job has no further round for this node; None: the handler failed."""
        if _is_a(error, errors.RendezvousGracefulExitError):
            self.has_left = True
            self.log(f"{self._describe(error)}; the job goes on without this node")
            return Decision(False)
        if not _is_a(error, errors.RendezvousClosedError):
            return None
        if self.has_succeeded:
            self.log("the job has ended; this node's workers had succeeded before")
            return Decision(False)
        text = f"{self._describe(error)}; the job has already ended: use another --rdzv-id for a new one"
        # With the failures after which this node expected another round.
        return self.decision._replace(restart=False, error=text, status=errors.ExitCode.UNAVAILABLE)

    def _end_for_others(self, current: ThirdPartyRound) -> Outcome | None:
        """End the round if nodes wait for the next one."""
        waiting = self.handler.num_nodes_waiting()
        if waiting <= 0:
            return None
        end = End(
            EndKind.MEMBERSHIP_CHANGED,
            f"{counted(waiting, 'more node')} can join",
            self.node.node,
            change=Change.NODE_JOINING,
        )
        return current.write_outcome(Outcome(end, Decision(True, current.restart_history())))

    def report_round(self, end: End | None, decision: Decision) -> None:
        """Report how the round ended for this node, and learn what follows for all.

        Args:
            end: as the agent was told; None: it was not.
            decision: this node's, which holds if no other node was first.
        """
        if self.round and end is not None and end.kind is not EndKind.DONE:
            told = decision._replace(failures=bounded(decision.failures))
            own = Outcome(end._replace(mine=False), told)
            try:
                outcome = self.round.write_outcome(own)
            except errors.RendezvousStateError:
                raise
            except Exception:
                outcome = own  # the store is lost: the failure that is known explains more, and a new round will show
            if outcome is not own:
                consequences = () if outcome.decision.restart else decision.failures
                history = outcome.decision.restart_history
                made = furthest(history.goodput, decision.restart_history.goodput)
                decision = outcome.decision._replace(
                    failures=(*outcome.decision.failures, *consequences), restart_history=history._replace(goodput=made)
                )
        self.decision, self.decided_at = decision, time.monotonic()
        self.report(Decided(decision))

    def report_success(self) -> Iterator[float]:
        """Report that this node's workers have succeeded, and wait for the other nodes."""
        assert self.round is not None, "workers run in a round"
        current, pause = self.round, _FIRST_POLL
        end, deadline = End(EndKind.DONE, "all workers succeeded"), time.monotonic() + self.exit_barrier_timeout
        self.has_succeeded = True
        with contextlib.suppress(Exception):  # if the store is lost, the next request will find out
            current.report_success()
        try:
            while not current.have_all_succeeded():
                if outcome := current.read_outcome():
                    end = outcome.end
                    break
                if time.monotonic() >= deadline:
                    self.log(
                        f"this node's workers succeeded; others did not end within {self.exit_barrier_timeout:g} s"
                    )
                    break
                yield pause
                pause = min(pause * 1.5, _LAST_POLL)
            else:
                with contextlib.suppress(Exception):  # the node that hosts the store knew, and has gone
                    current.linger()
        except errors.RendezvousStateError:
            raise
        except Exception as error:
            self.log(f"{self._describe(error)}; this node's workers succeeded, those of other nodes may have failed")
        self.report(Ended(end, time.time()))

    def leave(self, reason: str, status: int, signum: int = 0) -> None:
        """Report that this node leaves, so that the others need not notice it.

        Args:
            reason: for the other nodes' console.
            status: exit status with which the job ends; 0: it does not end with an error.
            signum: the signal with which the whole job stops; 0: the job goes on without this node, unless ``status``.
        """
        self.has_left = not status and not signum
        if self.round and self.round.size > 1:
            kind = EndKind.ERROR if status else EndKind.STOP if signum else EndKind.MEMBERSHIP_CHANGED
            rank = self.round.assignment.group_rank if self.has_left else -1
            change = Change.NODE_LEFT if kind is EndKind.MEMBERSHIP_CHANGED else Change.NONE
            end = End(kind, reason, self.node.node, signum=signum, status=status, rank=rank, change=change)
            error = reason if status else ""
            decision = Decision(self.has_left, self.round.restart_history(), signum=signum, error=error, status=status)
            with contextlib.suppress(Exception):  # if the store is lost, the others will notice
                self.round.write_outcome(Outcome(end, decision))

    def shut_down(self) -> None:
        """End the job for all nodes, unless this node has left it or never was in it."""
        if self.rounds and not self.has_left:
            try:
                self.handler.shutdown()
            except Exception as error:
                self.log(f"{self._describe(error)} (in shutdown())")

    def explain(self, error: BaseException) -> errors.LaunchError:
        """Return an error that the handler raised as one of ours, with a traceback if it looks unintended."""
        if isinstance(error.__cause__, StopIteration):
            error = error.__cause__  # which a generator has turned into a RuntimeError
        explained: errors.LaunchError
        if kind := next((kind for kind in _INTENDED if _is_a(error, kind)), None):
            explained = kind(self._describe(error))
        elif isinstance(error, OSError) or type(error).__name__ in ("RuntimeError", "DistStoreError"):
            # torch's stores raise the latter two when a key does not come in time, or a connection is lost.
            explained = errors.RendezvousConnectionError(self._describe(error))
        else:
            import traceback  # late: only needed to explain a defect

            text = "".join(traceback.format_exception(error)).rstrip()
            explained = errors.LaunchError(f"{self._describe(error)}; this looks like a bug in the handler:\n{text}")
        explained.__cause__ = error
        return explained

    def _describe(self, error: BaseException) -> str:
        """Return one line that names the handler and the error."""
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return f"rendezvous handler {type(self.handler).__name__}: {what}"


def _is_a(error: BaseException, kind: type[BaseException]) -> bool:
    """Return whether an error is of a kind, by name: torch's handlers raise torch's classes, not ours."""
    return kind.__name__ in (base.__name__ for base in type(error).__mro__)
