"""Run one node's part of a job: set up what a run needs, run the loop, and return the result."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

from elastic_launch.agent.loop import AgentLoop, LoopSource
from elastic_launch.agent.telemetry import Telemetry
from elastic_launch.agent.worker_group import LocalWorkers, WorkerOptions, line_prefixes, program_name
from elastic_launch.config import DEFAULT_SHUTDOWN_TIMEOUT, DEFAULT_SIGNALS, LogsSpecs
from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState
from elastic_launch.core.agent.messages import AgentEvent, Exited, Finish, GroupReaped, Leave, Limits, RendezvousAction
from elastic_launch.core.agent.report import format_report
from elastic_launch.core.agent.worker_env import worker_environment
from elastic_launch.core.placement import virtual_device
from elastic_launch.env import environment
from elastic_launch.errors import ExitCode, LaunchError, RendezvousError, SignalException, UsageError, signal_name
from elastic_launch.host.console import log as log_to_stderr
from elastic_launch.host.console import log_through, standard_streams
from elastic_launch.host.signals import SignalQueue
from elastic_launch.job import Assignment, EndKind, Level
from elastic_launch.logs.job_files import DefaultLogsSpecs, JobFiles
from elastic_launch.parsing import parse_port, parse_signals, read_flag
from elastic_launch.rendezvous.factory import adapt
from elastic_launch.worker_spec import Rendezvous, RunResult, WorkerGroup, WorkerSpec, WorkerState
from elastic_launch.workers.orphans import subreaper

if TYPE_CHECKING:
    from elastic_launch.workers.watchdog import Watchdog


@runtime_checkable
class AgentRendezvous(Rendezvous, LoopSource, Protocol):
    """A rendezvous as the agent sees it: it carries out actions, and answers with events."""

    lease: Callable[[float], None]
    """Extends the workers' lease to a time on ``time.monotonic``. The agent sets it before its first action."""

    def ask(self, action: RendezvousAction) -> list[AgentEvent]:
        """Carry out an action. Its answers are returned here, or later by ``take``."""

    def close(self) -> None:
        """Notify the other nodes that this one is done, and release everything, in bounded time."""


class _Run(NamedTuple):
    """The resources of a run."""

    files: JobFiles
    workers: LocalWorkers
    watchdog: Watchdog | None
    telemetry: Telemetry
    sources: list[LoopSource]


class LocalElasticAgent:
    """Runs the workers of one node through all rounds of a job. An agent runs once."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs | None = None,
        start_method: str = "spawn",
        exit_barrier_timeout: float = 300,
        log_line_prefix_template: str | None = None,
        shutdown_timeout: float = DEFAULT_SHUTDOWN_TIMEOUT,
        health_check_server: Any = None,
        uninterruptible_state_timeout: float | None = None,
        *,
        signals_to_handle: str = DEFAULT_SIGNALS,
        environ: Mapping[str, str] | None = None,
        preload: Sequence[str] = (),
        verbosity: int = Level.INFO,
        log: Callable[[str], None] = log_to_stderr,
    ) -> None:
        """Prepare a run without starting anything. The positional arguments are those of torch's agent.

        Args:
            spec: what to run; its ``entrypoint`` is a command or a function.
            logs_specs: where the workers' files go; None: to a temporary directory, with all output on the console.
            start_method: how the processes of a function start: spawn, fork or forkserver.
            exit_barrier_timeout: seconds to wait, once this node's workers have succeeded, for those of other nodes.
                The node that hosts the job's store waits as long as they run.
            log_line_prefix_template: what lines on the console begin with, with ``${role_name}``, ``${local_rank}``,
                ``${rank}`` and ``${host}``; None: role and local rank, or host and global rank if there are several
                nodes.
            shutdown_timeout: seconds between a worker's stop signal and SIGKILL.
            health_check_server: an object with ``start()`` and ``stop()``, which are called around the run.
            uninterruptible_state_timeout: ignored; a process that survives SIGKILL is given up after
                ``lifecycle.KILL_PATIENCE``. Accepted for compatibility with torch.
            signals_to_handle: names of the signals that stop the job, separated by commas.
            environ: the environment that the workers inherit; None: this process's.
            preload: modules to import once, in a process from which the workers are forked.
            verbosity: a ``Level``; lines up to this level are logged.
            log: writes a line for the user.

        Raises:
            UsageError: the spec has nothing to run, or a signal's name is unknown.
        """
        entrypoint = spec.entrypoint or spec.fn
        if not entrypoint:
            raise UsageError("entrypoint=None: there is nothing to run; pass a command or a function")
        self.name = program_name(entrypoint, spec.args)
        self._spec = spec
        self._logs_specs = logs_specs or DefaultLogsSpecs()
        self._prefix_template = log_line_prefix_template
        self._health_check_server = health_check_server
        self._stop_signals = parse_signals(signals_to_handle)
        self._limits = Limits(spec.get_policy(), shutdown_timeout, exit_barrier_timeout)
        self._environ = environment() if environ is None else environ
        self._temp_dir = self._environ.get("TMPDIR") or "/tmp"
        self._verbosity = verbosity
        self._log = log
        handler = spec.rdzv_handler
        if not isinstance(handler, AgentRendezvous):  # it has torch's interface
            handler = cast(AgentRendezvous, adapt(handler, spec, self._environ, log))
        self._rendezvous = handler
        self._options = WorkerOptions(
            self.name,
            entrypoint,
            dict.fromkeys(range(spec.local_world_size), spec.args),
            str(self._rendezvous.get_run_id()),
            self._environ,
            start_method,
            preload,
            {1: spec.duplicate_stdout_filters or [], 2: spec.duplicate_stderr_filters or []},
            spec.numa_options,
        )
        self._has_run = self._has_failed = False
        self._group = WorkerGroup(spec)

    def get_worker_group(self, role: str = "default") -> WorkerGroup:
        """Return the workers' current or final state; ``role`` is unused, because there is one group."""
        return self._group

    def run(self, role: str = "default") -> RunResult:
        """Run this node's part of the job. Only the main thread of a program handles signals.

        Raises:
            SignalException: a signal ended the job, and the workers are stopped.
            UsageError: the function cannot be sent to the workers, or this agent has run before.
            LaunchError: the launcher could not do its work, and no worker is left.
        """
        if self._has_run:
            raise UsageError("this agent has already run: create another one")
        self._has_run = True
        values: dict[int, Any] = {}
        with ExitStack() as stack:
            run = self._set_up(stack)
            finish, state = self._run_loop(run)
            if state.stop_requested_at is not None and state.killed:
                run.workers.console_patience = 0.0  # the user asked twice: do not wait
            run.telemetry.end(state, finish)
            self._has_failed = bool(finish.failures)
            has_succeeded = not finish.failures and not finish.error and finish.signum is None
            if has_succeeded and state.assignment:
                local_ranks = sorted(exit_.local_rank for exit_ in state.exits)
                values = {state.assignment.rank(local): run.workers.value(local) for local in local_ranks}
        if has_succeeded:
            return RunResult(WorkerState.SUCCEEDED, return_values=values)
        if finish.failures:
            return self._failure_result(finish, run.files)
        if finish.error:
            raise RendezvousError(finish.error, finish.status)
        signum = signal.Signals(cast(int, finish.signum))
        why = f": {state.end.reason}" if state.end and state.end.kind is EndKind.STOP and not state.end.mine else ""
        raise SignalException(f"stopped by {signal_name(signum)}{why}", signum)

    def _set_up(self, stack: ExitStack) -> _Run:
        """Acquire everything that the run needs, to be released by ``stack``."""
        stack.enter_context(standard_streams())
        has_filters = any(self._options.filters.values())
        files = JobFiles(self._logs_specs, self._options.run_id, self._temp_dir, has_filters=has_filters, log=self._log)
        stack.callback(lambda: files.close(keep=self._has_failed))
        signals = stack.enter_context(SignalQueue(self._stop_signals))
        if not stack.enter_context(subreaper()):
            self._log("this system has no subreapers: daemons of workers may survive if the launcher is killed")
        if self._health_check_server:
            stack.callback(self._health_check_server.stop)
            self._health_check_server.start()
        stack.callback(self._rendezvous.close)
        workers = stack.enter_context(closing(LocalWorkers(self._options, self._log, signals.fileno())))
        stack.enter_context(log_through(workers.log))
        # Only now: when the keeper starts, it finds out whether this process has other children.
        watchdog, watches = self._watches(stack)
        telemetry = Telemetry(self._spec, self._options.run_id, workers.show, self._log)
        self._rendezvous.lease = workers.lease
        return _Run(files, workers, watchdog, telemetry, [signals, self._rendezvous, *watches])

    def _run_loop(self, run: _Run) -> tuple[Finish, AgentState]:
        loop = AgentLoop(
            self._limits,
            run.workers,
            partial(self._start, run),
            self._rendezvous.ask,
            run.sources,
            lambda text, level: self._log(text) if level <= self._verbosity else None,
            partial(self._observe, run),
        )
        try:
            return cast(Finish, loop.run()), loop.state
        except Exception as error:
            run.telemetry.fail(str(error))
            with suppress(LaunchError):  # the rendezvous may be what failed
                status = error.exit_code if isinstance(error, LaunchError) else ExitCode.SOFTWARE
                self._rendezvous.ask(Leave(error=str(error) or type(error).__name__, status=status))
            raise

    def _observe(self, run: _Run, event: AgentEvent, state: AgentState) -> None:
        run.telemetry.observe(event, state)
        _update_group(self._group, state)
        match event:
            case Exited(exit_) if run.watchdog:
                run.watchdog.forget(state.pids.get(exit_.local_rank, -1))
            case GroupReaped() if run.watchdog:
                run.watchdog.clear()

    def _start(self, run: _Run, assignment: Assignment) -> None:
        """Start the workers of a round."""
        envs = {
            local_rank: worker_environment(
                self._spec, assignment, local_rank, run_id=self._options.run_id, inherited=self._environ
            )
            | (virtual_device(local_rank, self._environ) if self._spec.virtual_local_rank else {})
            | ({"TORCHELASTIC_TIMER_FILE": run.watchdog.path} if run.watchdog else {})
            for local_rank in range(assignment.local_world_size)
        }
        dest = run.files.prepare(envs)
        has_prefixes = dest.tee_stdouts or dest.tee_stderrs or any(self._options.filters.values())
        prefixes = line_prefixes(self._prefix_template, self._spec.role, assignment) if has_prefixes else {}
        run.workers.start(envs, dest, prefixes)

    def _watches(self, stack: ExitStack) -> tuple[Watchdog | None, list[LoopSource]]:
        """Start the watchdog of the workers and the health server, if the environment asks for them."""
        watchdog, sources = None, list[LoopSource]()
        # A worker that launches a job has these variables from its own agent, to which they belong.
        is_worker = "TORCHELASTIC_RUN_ID" in self._environ
        if read_flag(self._environ.get("TORCHELASTIC_ENABLE_FILE_TIMER", "0")):
            from elastic_launch.workers.watchdog import Watchdog  # late, like the other imports here: few jobs need it

            default = os.path.join(self._temp_dir, f"watchdog_timer_{os.urandom(8).hex()}")
            given = "" if is_worker else self._environ.get("TORCHELASTIC_TIMER_FILE")
            watchdog = stack.enter_context(closing(Watchdog(given or default)))
            sources.append(watchdog)
        if (port := self._environ.get("TORCHELASTIC_HEALTH_CHECK_PORT")) and not is_worker:
            from elastic_launch.health.server import HealthServer

            number = parse_port(port, "TORCHELASTIC_HEALTH_CHECK_PORT=")
            sources.append(stack.enter_context(closing(HealthServer(number, self._environ))))
        return watchdog, sources

    def _failure_result(self, finish: Finish, files: JobFiles) -> RunResult:
        report = format_report(self.name, finish, self._limits.policy.max_restarts, files.root if files.kept else None)
        return RunResult(WorkerState.FAILED, failures={f.rank: f for f in finish.failures}, report=report)


def _update_group(group: WorkerGroup, state: AgentState) -> None:
    """Make torch's view of the workers match the agent's state."""
    if (assignment := state.assignment) is None:
        return
    group.group_rank, group.group_world_size = assignment.group_rank, assignment.group_world_size
    group.master_addr = group.spec.master_addr or assignment.master_addr
    group.master_port = group.spec.master_port or assignment.master_port
    group.state = {
        AgentPhase.JOINING: WorkerState.INIT,
        AgentPhase.RUNNING: WorkerState.HEALTHY,
        AgentPhase.STOPPING: WorkerState.UNHEALTHY if state.has_failed else WorkerState.HEALTHY,
    }.get(state.phase, WorkerState.FAILED if state.has_failed else WorkerState.SUCCEEDED)
    for worker in group.workers:
        worker.id = state.pids.get(worker.local_rank)
        worker.global_rank, worker.world_size = assignment.rank(worker.local_rank), assignment.world_size
        worker.role_rank = assignment.base_role_rank + worker.local_rank
        worker.role_world_size = assignment.role_world_size
