"""Layer 3: the events and metrics of one job on this node, as they come about. It costs nothing where nobody asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from elastic_launch.core.agent.lifecycle import AgentEvent, AgentState, Assigned, Finish, GroupReaped, Started
from elastic_launch.errors import signal_name
from elastic_launch.worker_spec import WorkerSpec, WorkerState

if TYPE_CHECKING:
    from elastic_launch.events import Recorder


class Telemetry:
    """Sees what the driver sees, and hands it to the recorder of events and to the metrics' handlers."""

    def __init__(self, spec: WorkerSpec, run_id: str, show: Callable[[str], None], log: Callable[[str], None]) -> None:
        """Take what events tell of.

        Args:
            spec: what is run, and in ``event_log_handler`` where events go.
            run_id: the job's id.
            show: takes whole lines for standard error.
            say: takes a line for people.

        Raises:
            UsageError: there is no such event handler.
        """
        self._spec = spec
        self._log = log
        self._began = self._asked = self._met = time.monotonic()
        self._recorder: Recorder | None = None
        if spec.event_log_handler != "null":
            from elastic_launch.events import Recorder, check_destination  # late: few jobs want it

            check_destination(spec.event_log_handler)
            get_backend = getattr(spec.rdzv_handler, "get_backend", lambda: "static")
            self._recorder = Recorder(spec, run_id, get_backend(), show, log)

    def note(self, event: AgentEvent, state: AgentState) -> None:
        """An event has happened; ``state`` is the one after it."""
        now = time.monotonic()
        match event:
            case Assigned():
                self._met = now
            case Started() if state.assignment:
                if self._recorder:
                    joining = self._met - self._asked
                    self._recorder.round_started(
                        state.assignment, state.pids, seconds=now - self._began, joining=joining
                    )
                self._put_round("HEALTHY", state)
            case GroupReaped():
                self._asked = now
                stopped = state.stopped_at != float("inf") and any(exit_.stop_signals for exit_ in state.exits)
                self._put_round("FAILED" if state.has_failed else "UNHEALTHY" if stopped else "SUCCEEDED", state)

    def end(self, state: AgentState, finish: Finish) -> None:
        """The run is over."""
        seconds = time.monotonic() - self._began
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
        """The launcher could not do its work."""
        if self._recorder:
            seconds = time.monotonic() - self._began
            self._recorder.run_ended(WorkerState.FAILED, None, {}, seconds=seconds, error=error)

    def _put_round(self, outcome: str, state: AgentState) -> None:
        # Who configures a handler has imported the module.
        if (metrics := sys.modules.get("elastic_launch.metrics")) and state.assignment:
            used = state.assignment.restart_history.used
            metrics.put_round_metrics(self._spec.role, outcome, used, self._spec.max_restarts, self._log)
