"""Layer 3: the agent: one node's part of a job. Puts together what the driver's loop needs for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Protocol, cast

from elastic_launch.agent.loop import Driver, Source
from elastic_launch.agent.telemetry import Telemetry
from elastic_launch.agent.worker_group import Workers, name_of, prefix
from elastic_launch.config import DEFAULT_SHUTDOWN_TIMEOUT, DEFAULT_SIGNALS, LogsSpecs
from elastic_launch.core.agent.lifecycle import (
    AgentEvent,
    AgentPhase,
    AgentState,
    Exited,
    Finish,
    GroupReaped,
    Leave,
    Limits,
    RendezvousAction,
)
from elastic_launch.core.agent.report import format_report
from elastic_launch.core.agent.worker_env import worker_environment
from elastic_launch.core.placement import virtual_device
from elastic_launch.env import environment
from elastic_launch.errors import ExitCode, LaunchError, RendezvousError, SignalException, UsageError, signal_name
from elastic_launch.host.console import log as say_on_stderr
from elastic_launch.host.console import log_through, standard_streams
from elastic_launch.host.signals import SignalQueue
from elastic_launch.job import Assignment, EndKind, Level
from elastic_launch.logs.job_files import DefaultLogsSpecs, JobFiles
from elastic_launch.parsing import is_number, parse_signals, read_flag
from elastic_launch.worker_spec import RunResult, WorkerGroup, WorkerSpec, WorkerState
from elastic_launch.workers.orphans import subreaper

if TYPE_CHECKING:
    from elastic_launch.workers.watchdog import Watchdog


class AgentRendezvous(Source, Protocol):
    """What the agent asks of a rendezvous: an answer to its actions, at once or by events of its own."""

    def get_run_id(self) -> str:
        """The job's id."""

    def ask(self, action: RendezvousAction) -> list[AgentEvent]:
        """Take an action; the events that answer it come at once or from ``take``."""

    def close(self) -> None:
        """Say goodbye to the other nodes, in bounded time, and let go of everything."""


class LocalElasticAgent:
    """Runs the workers of one node through all their rounds. An agent runs once."""

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
        log: Callable[[str], None] = say_on_stderr,
    ) -> None:
        """Prepare a run; nothing is started yet. The positional arguments are those of torch's agent.

        Args:
            spec: what to run; its ``entrypoint`` is a command or a function.
            logs_specs: where the workers' files lie, and what becomes of their output.
            start_method: how the processes of a function start: spawn, fork or forkserver.
            exit_barrier_timeout: seconds that this node waits, when its workers have ended well, for the others'. The
                node that hosts the job's store waits as long as they live.
            log_line_prefix_template: what stands before lines on the console, with ``${role_name}``,
                ``${local_rank}``, ``${rank}`` and ``${host}``; None: role and local rank, or host and rank where the
                job has several nodes.
            shutdown_timeout: seconds between a worker's stop signal and SIGKILL.
            health_check_server: something with ``start()`` and ``stop()``, called around the run.
            uninterruptible_state_timeout: accepted for torch's sake: a process that SIGKILL does not end is given up
                after ``lifecycle.KILL_PATIENCE``.
            signals_to_handle: the signals that stop the job.
            environ: what the workers inherit; None: this process's environment.
            preload: modules that are imported once, in a process from which workers are forked.
            verbosity: a ``Level``; what people are told at most.
            say: takes each line for them.

        Raises:
            UsageError: the spec says nothing to run, or a signal's name is none.
        """
        self._spec = spec
        self._entrypoint = spec.entrypoint or spec.fn
        self._logs_specs = logs_specs or DefaultLogsSpecs()
        self._filters = {1: spec.duplicate_stdout_filters or [], 2: spec.duplicate_stderr_filters or []}
        self._start_method = start_method
        self._preload = preload
        self._prefix_template = log_line_prefix_template
        self._shutdown_timeout = shutdown_timeout
        self._health_check_server = health_check_server
        self._stop_signals = parse_signals(signals_to_handle)
        self._environ = environment() if environ is None else environ
        self._temp_dir = self._environ.get("TMPDIR") or "/tmp"
        self._verbosity = verbosity
        self._log = log
        self._exit_barrier_timeout = exit_barrier_timeout
        self.name = name_of(self._entrypoint, spec.args)
        self._rendezvous = _adapted(spec, self._environ, log)
        self._run_id = str(self._rendezvous.get_run_id())
        self._has_run = self._has_failed = False
        self._group = WorkerGroup(spec)

    def get_worker_group(self, role: str = "default") -> WorkerGroup:
        """The workers as they are now, or as they were at the end; ``role`` is for torch's sake: there is one group."""
        return self._group

    def run(self, role: str = "default") -> RunResult:
        """Run the job to its end on this node. Signals are handled where this is the program's main thread.

        Raises:
            SignalException: a signal ended the job; the workers are stopped.
            UsageError: the function cannot be sent to the workers; or the agent has run before.
            LaunchError: the launcher could not do its work; no worker is left.
        """
        if self._has_run:
            raise UsageError("this agent has run already: make another one")
        self._has_run = True
        with ExitStack() as stack:
            stack.enter_context(standard_streams())
            self._files = JobFiles(
                self._logs_specs, self._run_id, self._temp_dir, has_filters=any(self._filters.values())
            )
            stack.callback(lambda: self._files.close(keep=self._has_failed))
            signals = stack.enter_context(SignalQueue(self._stop_signals))
            if not stack.enter_context(subreaper()):
                self._log("this system has no subreapers: daemons that workers start may outlive a killed launcher")
            self._cpus = self._bindings()
            if self._health_check_server:
                stack.callback(self._health_check_server.stop)
                self._health_check_server.start()
            stack.callback(self._rendezvous.close)
            self._workers = Workers(
                self.name,
                cast("Callable[..., Any] | str", self._entrypoint),
                dict.fromkeys(range(self._spec.local_world_size), self._spec.args),
                run_id=self._run_id,
                environ=self._environ,
                start_method=self._start_method,
                log=self._log,
                interrupt=signals.fileno(),
                preload=self._preload,
            )
            stack.callback(self._workers.close)
            stack.enter_context(log_through(self._workers.log))
            # After the keeper: it then knows that this process has no other children.
            self._watchdog, watches = self._watches(stack)
            self._telemetry = Telemetry(self._spec, self._run_id, self._workers.show, self._log)
            if hasattr(self._rendezvous, "lease"):
                self._rendezvous.lease = self._workers.lease
            limits = Limits(self._spec.get_policy(), self._shutdown_timeout, self._exit_barrier_timeout)
            sources = [signals, self._rendezvous, *watches]
            ask = self._rendezvous.ask
            driver = Driver(limits, self._workers, self._start, ask, sources, self._log, self._verbosity, self._observe)
            try:
                finish, state = cast(Finish, driver.run()), driver.state
            except Exception as error:
                self._telemetry.fail(str(error))
                with suppress(LaunchError):  # it may be the rendezvous' own
                    status = error.exit_code if isinstance(error, LaunchError) else ExitCode.SOFTWARE
                    ask(Leave(error=str(error) or type(error).__name__, status=status))
                raise
            if state.asked_at is not None and state.killed:
                self._workers.console_patience = 0.0  # told twice to end: now
            self._telemetry.end(state, finish)
            self._has_failed = bool(finish.failures)
            if not finish.failures and not finish.error and finish.signum is None:
                return RunResult(WorkerState.SUCCEEDED, return_values=self._return_values(state))
        if finish.failures:
            return self._failed(finish)
        if finish.error:
            raise RendezvousError(finish.error, finish.status)
        signum = signal.Signals(cast(int, finish.signum))
        why = f": {state.end.reason}" if state.end and state.end.kind is EndKind.STOP and not state.end.mine else ""
        raise SignalException(f"stopped by {signal_name(signum)}{why}", signum)

    def _observe(self, event: AgentEvent, state: AgentState) -> None:
        """Tell the parts that only look on."""
        self._telemetry.note(event, state)
        _update(self._group, state)
        match event:
            case Exited(exit_) if self._watchdog:
                self._watchdog.forget(state.pids.get(exit_.local_rank, -1))
            case GroupReaped() if self._watchdog:
                self._watchdog.clear()

    def _start(self, assignment: Assignment) -> None:
        """Start the workers of a round."""
        envs = {
            local_rank: worker_environment(
                self._spec, assignment, local_rank, run_id=self._run_id, inherited=self._environ
            )
            | (virtual_device(local_rank, self._environ) if self._spec.virtual_local_rank else {})
            | ({"TORCHELASTIC_TIMER_FILE": self._watchdog.path} if self._watchdog else {})
            for local_rank in range(assignment.local_world_size)
        }
        dest = self._files.prepare(envs)
        for local_rank, environ in envs.items():
            if path := dest.error_files.get(local_rank):
                environ["TORCHELASTIC_ERROR_FILE"] = path
        has_prefixes = dest.tee_stdouts or dest.tee_stderrs or any(self._filters.values())
        self._workers.start(envs, dest, self._prefixes(assignment) if has_prefixes else {}, self._filters, self._cpus)

    def _prefixes(self, assignment: Assignment) -> dict[int, str]:
        """What stands before each worker's lines on the console."""
        default = (
            "[${role_name}${local_rank}]:" if assignment.group_world_size == 1 else "[${host} ${role_name}${rank}]:"
        )
        template = default if self._prefix_template is None else self._prefix_template
        return {
            local_rank: prefix(
                template,
                role_name=self._spec.role,
                local_rank=local_rank,
                rank=assignment.rank(local_rank),
                host=assignment.host,
            )
            for local_rank in range(assignment.local_world_size)
        }

    def _watches(self, stack: ExitStack) -> tuple[Watchdog | None, list[Source]]:
        """What looks after the workers, and after this process, where the environment asks for it."""
        watchdog, sources = None, list[Source]()
        # A worker that launches a job has these variables from the agent above it, whose they are.
        is_worker = "TORCHELASTIC_RUN_ID" in self._environ
        if read_flag(self._environ.get("TORCHELASTIC_ENABLE_FILE_TIMER", "0")):
            from elastic_launch.workers.watchdog import Watchdog  # late, as the others here: few jobs need it

            default = os.path.join(self._temp_dir, f"watchdog_timer_{os.urandom(8).hex()}")
            given = "" if is_worker else self._environ.get("TORCHELASTIC_TIMER_FILE")
            watchdog = Watchdog(given or default)
            stack.callback(watchdog.close)
            sources.append(watchdog)
        if (port := self._environ.get("TORCHELASTIC_HEALTH_CHECK_PORT")) and not is_worker:
            from elastic_launch.health.server import HealthServer

            if not is_number(port) or int(port) > 65535:
                raise UsageError(f"TORCHELASTIC_HEALTH_CHECK_PORT={port!r}: must be a port, a number from 0 to 65535")
            health = HealthServer(int(port), self._environ)
            stack.callback(health.close)
            sources.append(health)
        return watchdog, sources

    def _bindings(self) -> dict[int, frozenset[int]]:
        """Where each worker is bound to, where the user wants that."""
        if self._spec.numa_options is None:
            return {}
        from elastic_launch.host.numa import bind  # late: few need it

        return bind(self._spec.numa_options, self._spec.local_world_size, self._environ, self._log)

    def _return_values(self, state: AgentState) -> dict[int, Any]:
        """What the functions returned, by global rank."""
        ranks = sorted(exit_.local_rank for exit_ in state.exits)
        return (
            {state.assignment.rank(local_rank): self._workers.value(local_rank) for local_rank in ranks}
            if state.assignment
            else {}
        )

    def _failed(self, finish: Finish) -> RunResult:
        report = format_report(
            self.name,
            finish.failures,
            restarts=finish.restarts,
            max_restarts=self._spec.get_policy().max_restarts,
            why=finish.why,
            log_dir=self._files.root if self._files.kept else None,
        )
        return RunResult(WorkerState.FAILED, failures={f.rank: f for f in finish.failures}, report=report)


def _update(group: WorkerGroup, state: AgentState) -> None:
    """Have torch's view of the workers follow the agent's life."""
    if (assignment := state.assignment) is None:
        return
    group.group_rank, group.group_world_size = assignment.group_rank, assignment.group_world_size
    group.master_addr, group.master_port = assignment.master_addr, assignment.master_port
    group.state = {
        AgentPhase.JOINING: WorkerState.INIT,
        AgentPhase.RUNNING: WorkerState.HEALTHY,
        AgentPhase.STOPPING: WorkerState.UNHEALTHY if state.has_failed else WorkerState.HEALTHY,
    }.get(state.phase, WorkerState.FAILED if state.has_failed else WorkerState.SUCCEEDED)
    for worker in group.workers:
        worker.global_rank, worker.world_size = assignment.rank(worker.local_rank), assignment.world_size
        worker.role_rank, worker.role_world_size = (
            assignment.base_role_rank + worker.local_rank,
            assignment.role_world_size,
        )
        worker.id = state.pids.get(worker.local_rank)


def _adapted(spec: WorkerSpec, environ: Mapping[str, str], log: Callable[[str], None]) -> AgentRendezvous:
    """The spec's rendezvous; a handler of torch's interface gets a wrapping."""
    if hasattr(spec.rdzv_handler, "ask"):
        return cast(AgentRendezvous, spec.rdzv_handler)
    from elastic_launch.rendezvous.factory import adapt  # late: most jobs do not need it

    return cast(AgentRendezvous, adapt(spec.rdzv_handler, spec, environ, log))
