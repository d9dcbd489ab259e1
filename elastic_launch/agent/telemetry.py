"""Record the events and metrics of one node's part of a job, at no cost unless a handler is configured."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from elastic_launch.core.agent.lifecycle import AgentState
from elastic_launch.core.agent.messages import AgentEvent, Assigned, Finish, GroupReaped, Started
from elastic_launch.errors import signal_name
from elastic_launch.worker_spec import WorkerSpec, WorkerState

if TYPE_CHECKING:
    from elastic_launch.events import Recorder


class Telemetry:
    """Passes what the agent's loop observes to the event recorder and to the handlers of metrics."""

    def __init__(self, spec: WorkerSpec, run_id: str, show: Callable[[str], None], log: Callable[[str], None]) -> None:
        """Start the clock of the run.

        Args:
            spec: what the workers run, and in ``event_log_handler`` where events go.
            run_id: the job's id.
            show: writes whole lines to standard error.
            log: writes a line for the user.

        Raises:
            UsageError: there is no such event handler.
        """
        self._spec = spec
        self._log = log
        self._run_started_at = self._join_requested_at = self._joined_at = time.monotonic()
        self._recorder: Recorder | None = None
        if spec.event_log_handler != "null":
            from elastic_launch.events import Recorder, check_destination  # late: few jobs record events

            check_destination(spec.event_log_handler)
            self._recorder = Recorder(spec, run_id, spec.rdzv_handler.get_backend(), show, log)

    def observe(self, event: AgentEvent, state: AgentState) -> None:
        """Record an event; ``state`` is the state after it."""
        now = time.monotonic()
        match event:
            case Assigned():
                self._joined_at = now
            case Started() if state.assignment:
                if self._recorder:
                    self._recorder.round_started(
                        state.assignment,
                        state.pids,
                        seconds=now - self._run_started_at,
                        joining=self._joined_at - self._join_requested_at,
                    )
                self._put_round("HEALTHY", state)
            case GroupReaped():
                self._join_requested_at = now
                stopped = state.stopped_at != float("inf") and any(exit_.stop_signals for exit_ in state.exits)
                self._put_round("FAILED" if state.has_failed else "UNHEALTHY" if stopped else "SUCCEEDED", state)

    def end(self, state: AgentState, finish: Finish) -> None:
        """Record the end of the run."""
        seconds = time.monotonic() - self._run_started_at
        error = finish.error or (f"stopped by {signal_name(finish.signum)}" if finish.signum else "")
        if self._recorder:
            outcome = WorkerState.FAILED if finish.failures else WorkerState.SUCCEEDED
            self._recorder.run_ended(
                outcome, state.assignment, state.pids, finish.failures, seconds=seconds, error=error
            )
        if (metrics := sys.modules.get("elastic_launch.metrics")) and state.assignment and not error:
            metrics.put_run_metrics(
                self._spec.role,
                not finish.failures,
                state.assignment.restart_history.used,
                self._spec.max_restarts,
                seconds,
                self._log,
            )

    def fail(self, error: str) -> None:
        """Record that the launcher itself failed."""
        if self._recorder:
            seconds = time.monotonic() - self._run_started_at
            self._recorder.run_ended(WorkerState.FAILED, None, {}, seconds=seconds, error=error)

    def _put_round(self, outcome: str, state: AgentState) -> None:
        # A program that has configured a metrics handler has imported the module.
        if (metrics := sys.modules.get("elastic_launch.metrics")) and state.assignment:
            used = state.assignment.restart_history.used
            metrics.put_round_metrics(self._spec.role, outcome, used, self._spec.max_restarts, self._log)
