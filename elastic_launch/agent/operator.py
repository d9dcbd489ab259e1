"""Answer for the agent those who ask through its control socket: how the job is, and stop or restart it."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState
from elastic_launch.core.agent.messages import AgentEvent, Assigned, Decided, Ended, RestartRequested, Signalled
from elastic_launch.core.agent.restart_policy import restart_cause
from elastic_launch.errors import UsageError, signal_name
from elastic_launch.job import Decision, End, EndKind

if TYPE_CHECKING:
    from elastic_launch.agent.progress import Look
    from elastic_launch.core.status import Facts, Meeting, Progress, RoundRecord

MAX_ROUNDS = 64
"""Latest rounds that the status lists."""

Reply = tuple["dict[str, Any] | Look", list[AgentEvent]]
"""A reply, or what will have one, and events for the agent."""


class Operator:
    """Notes what becomes of the job's rounds, and turns requests into events of the agent's loop."""

    def __init__(
        self,
        state: AgentState,
        facts: Callable[[], Facts],
        meeting: Callable[[], Meeting],
        files: Callable[[], Mapping[int, Mapping[str, str]]],
        calls: Callable[[], Mapping[int, int]],
        progress: Callable[[], Progress | None] = lambda: None,
        look: Callable[[], tuple[Look, list[AgentEvent]]] | None = None,
    ) -> None:
        """Begin. Nothing is called before somebody asks.

        Args:
            state: the agent's first state.
            facts: returns what does not change.
            meeting: returns how the nodes meet.
            files: returns the paths of the workers' output files, by local rank and name of the stream.
            calls: returns how often each worker has called ``should_stop()``, by local rank.
            progress: returns what the workers get done; None: that is not known.
            look: asks for the stacks of all nodes; None: that is turned off.
        """
        self._state = state
        self._facts, self._meeting, self._files, self._calls, self._progress = facts, meeting, files, calls, progress
        self._look = look
        self._rounds: deque[RoundRecord] = deque(maxlen=MAX_ROUNDS)
        self._joined_at = time.monotonic()
        self._round_count, self._rendezvous_seconds = 0, 0.0
        self._restarts: dict[str, int] = {}
        """Rounds that followed another one, by cause."""

    def observe(self, event: AgentEvent, state: AgentState) -> None:
        """Note an event; ``state`` is the state after it."""
        before, self._state = self._state, state
        if isinstance(event, Assigned):
            self._rounds.append((event.assignment, time.time(), None, None))
            self._round_count += 1
            self._rendezvous_seconds += time.monotonic() - self._joined_at
        elif isinstance(event, Decided) and state.phase is not AgentPhase.DONE:
            self._count_restart(before, event.decision)
        elif isinstance(event, Ended):
            self._end_round(event.end._replace(failures=()), event.time)  # their tracebacks may be long
        elif state.phase is AgentPhase.DONE and state.signum is not None:
            reason = state.stop_reason or f"stopped by {signal_name(state.signum)}"
            self._end_round(End(EndKind.STOP, reason, signum=state.signum), time.time())

        if state.phase is AgentPhase.JOINING is not before.phase:
            self._joined_at = time.monotonic()

    def _count_restart(self, before: AgentState, decision: Decision) -> None:
        history = before.assignment.restart_history if before.assignment else decision.restart_history
        cause = restart_cause(history, decision, before.end.change if before.end else "")
        self._restarts[cause] = self._restarts.get(cause, 0) + 1

    def _end_round(self, end: End, now: float) -> None:
        if self._rounds and self._rounds[-1][2] is None:
            self._rounds[-1] = (*self._rounds[-1][:2], end, now)

    def status(self) -> dict[str, Any]:
        """Return the agent's status, as described in ``docs/operating.md``."""
        from elastic_launch.core.status import Totals, agent_status  # late: nobody asks most agents

        facts, meeting, files, progress = self._facts(), self._meeting(), self._files(), self._progress()
        totals = Totals(self._round_count, round(self._rendezvous_seconds, 3), self._restarts)
        return agent_status(facts, self._state, meeting, list(self._rounds), files, time.monotonic(), progress, totals)

    def carry_out(self, request: Mapping[str, Any]) -> Reply:
        """Return the reply to a request, and the events for the agent that it leads to.

        Raises:
            UsageError: there is no such request, or a value is wrong.
        """
        handler = _REQUESTS.get(request["request"])
        if handler is None:
            names = ", ".join(["status", "subscribe", *_REQUESTS])
            raise UsageError(f"request={request['request']!r}: must be one of {names}")
        return handler(self, request)

    def _hello(self, request: Mapping[str, Any]) -> Reply:
        facts = self._facts()
        return {"ok": True, **{name: getattr(facts, name) for name in ("job", "host", "pid", "launcher")}}, []

    def _stop(self, request: Mapping[str, Any]) -> Reply:
        scope, signum = request.get("scope", "job"), request.get("signum", int(signal.SIGTERM))
        if scope not in ("job", "node"):
            raise UsageError(f"scope={scope!r}: must be job or node")
        if type(signum) is not int or signum not in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            raise UsageError(f"signum={signum!r}: must be the number of a signal that a program can handle")
        if self._state.phase is AgentPhase.DONE:
            return refusal("too_late", "the job is ending"), []
        if request.get("checkpoint") and (signum != signal.SIGTERM or not any(self._calls().values())):
            # Otherwise SIGTERM stops all workers at the same step; see ``Signalled.calls``.
            return refusal("not_available", "no worker of this node has called should_stop(), or it is not SIGTERM"), []
        reason = f"stop requested on {os.uname().nodename}" if scope == "job" else ""
        return {"ok": True, "scope": scope, "signum": signum}, [Signalled(signum, time.time(), reason=reason)]

    def _stacks(self, request: Mapping[str, Any]) -> Reply:
        if self._look is None:
            return refusal("not_available", "the job's progress is not watched (ELASTIC_LAUNCH_PROGRESS=0)"), []
        return self._look()

    def _restart(self, request: Mapping[str, Any]) -> Reply:
        if self._state.phase in _ENDING:
            return refusal("too_late", "the round is ending already"), []
        return {"ok": True}, [RestartRequested(f"restart requested on {os.uname().nodename}")]


_ENDING = (AgentPhase.HOLDING, AgentPhase.DRAINING, AgentPhase.STOPPING, AgentPhase.DONE)
"""Phases in which a round or the job is ending."""


def refusal(code: str, error: str) -> dict[str, Any]:
    """Return the reply to a request that is not carried out; the codes are listed in ``docs/operating.md``."""
    return {"ok": False, "code": code, "error": error}


_REQUESTS: dict[str, Callable[[Operator, Mapping[str, Any]], Reply]] = {
    "hello": Operator._hello,
    "stop": Operator._stop,
    "restart": Operator._restart,
    "stacks": Operator._stacks,
}
"""What carries out each request; ``status`` and ``subscribe`` only read."""
