"""Record the events and metrics of one node's part of a job. Without a configured handler, this costs nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
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
            spec: what the workers run; ``event_log_handler`` is the destination of events.
            run_id: the job's id.
            show: writes whole lines to standard error.
            log: writes a line for the user.

        Raises:
            UsageError: the event handler is unknown or does not work.
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
                    joining = self._joined_at - self._join_requested_at
                    self._recorder.round_started(state.assignment, state.pids, joining)
                self._put_round("healthy", state)
            case GroupReaped():
                self._join_requested_at = now
                at_same_step = state.end is not None and state.end.same_step
                stopped = at_same_step or any(exit_.stop_signals for exit_ in state.exits)
                self._put_round("failed" if state.has_failed else "unhealthy" if stopped else "succeeded", state)

    def end(self, state: AgentState, finish: Finish) -> None:
        """Record the end of the run."""
        error = finish.error or (f"stopped by {signal_name(finish.signum)}" if finish.signum else "")
        if self._recorder:
            final = WorkerState.FAILED if finish.failures else WorkerState.SUCCEEDED
            self._recorder.run_ended(final, state.assignment, state.pids, finish.failures, error)
        if state.assignment is None or error:
            return
        restarts, workers = state.assignment.restart_history.used, f"workers.{self._spec.role}"
        outcome = f"run_{'failed' if finish.failures else 'success'}_{'with' if restarts else 'no'}_retries"
        outcomes = [f"run_{end}_{retries}_retries" for end in ("success", "failed") for retries in ("with", "no")]
        self._put(
            {
                f"{workers}.flakiness": 100 if finish.failures else 100 * restarts // (self._spec.max_restarts + 1),
                f"{workers}.run_total": 1,
                **{f"{workers}.{name}": int(name == outcome) for name in outcomes},
                "SimpleElasticAgent.run.success": 1,
                "SimpleElasticAgent.run.duration.ms": int((time.monotonic() - self._run_started_at) * 1000),
            }
        )

    def fail(self, error: str) -> None:
        """Record that the launcher itself failed."""
        if self._recorder:
            self._recorder.run_ended(WorkerState.FAILED, None, {}, error=error)

    def _put_round(self, outcome: str, state: AgentState) -> None:
        """Put the metrics that torch's agent puts in each interval: here, when a round starts and when it ends."""
        if state.assignment:
            remaining = self._spec.max_restarts - state.assignment.restart_history.used
            workers = f"workers.{self._spec.role}"
            self._put({f"{workers}.remaining_restarts": remaining, f"{workers}.{outcome}": 1})

    def _put(self, values: Mapping[str, float]) -> None:
        """Put metrics if a handler is configured. A handler that raises does not end the job."""
        # A program that has configured one has imported the module.
        if metrics := sys.modules.get("elastic_launch.metrics"):
            try:
                for name, value in values.items():
                    metrics.put_metric(name, value)
            except Exception as error:
                self._log(f"metrics are lost: {type(error).__name__}: {error}")
