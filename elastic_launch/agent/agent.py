"""Run one node's part of a job: set up what a run needs, run the loop, and return the result."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

from elastic_launch.agent.loop import AgentLoop, LoopSource
from elastic_launch.agent.operator import Operator
from elastic_launch.agent.progress import ProgressWatch
from elastic_launch.agent.telemetry import Telemetry
from elastic_launch.agent.worker_group import LocalWorkers, WorkerOptions, line_prefixes, program_name
from elastic_launch.config import (
    DEFAULT_CHECK_TIMEOUT,
    DEFAULT_SHUTDOWN_TIMEOUT,
    DEFAULT_SIGNALS,
    SIGNALS_VARIABLE,
    LogsSpecs,
)
from elastic_launch.control.server import ControlServer
from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState, begin, formed, on_host, started
from elastic_launch.core.agent.messages import (
    AgentEvent,
    Assigned,
    CheckLimits,
    Exited,
    Finish,
    GroupReaped,
    Leave,
    Limits,
    Log,
    RendezvousAction,
    Started,
)
from elastic_launch.core.agent.report import format_report
from elastic_launch.core.agent.restart_policy import has_restarts
from elastic_launch.core.agent.worker_env import worker_environment
from elastic_launch.core.placement import virtual_device
from elastic_launch.env import environment, without_secrets
from elastic_launch.errors import (
    ExitCode,
    LaunchError,
    RendezvousError,
    SignalException,
    UnavailableError,
    UsageError,
    signal_name,
)
from elastic_launch.host.console import YELLOW, in_colour, log_line, log_through, standard_streams
from elastic_launch.host.console import log as log_to_stderr
from elastic_launch.host.files import usable_host
from elastic_launch.host.signals import SignalQueue
from elastic_launch.job import Assignment, EndKind, Level
from elastic_launch.logs.job_files import DefaultLogsSpecs, JobFiles
from elastic_launch.parsing import parse_modules, parse_port, parse_signals, read_flag
from elastic_launch.rendezvous.factory import adapt
from elastic_launch.rendezvous.single_node import SingleNodeRendezvous
from elastic_launch.worker_spec import Rendezvous, RunResult, WorkerGroup, WorkerSpec, WorkerState
from elastic_launch.workers.orphans import subreaper

if TYPE_CHECKING:
    from elastic_launch.agent.journal_writer import JournalWriter
    from elastic_launch.agent.live_line import LiveLine
    from elastic_launch.core.rendezvous.progress import Waiting
    from elastic_launch.core.status import Facts, Meeting
    from elastic_launch.workers.health_check import HealthCheck
    from elastic_launch.workers.watchdog import Watchdog

CONTROL = "ELASTIC_LAUNCH_CONTROL"
"""Variable that turns the control socket off, if it is 0."""


@runtime_checkable
class AgentRendezvous(Rendezvous, LoopSource, Protocol):
    """A rendezvous as the agent sees it: it carries out actions, and answers with events."""

    patience: float
    """Seconds that this node may be unfit before a round; infinite if the rendezvous decides that."""
    lease: Callable[[float], None]
    """Extends the workers' lease to a time on ``time.monotonic``. The agent sets it before its first action."""

    def meeting(self) -> Meeting:
        """Describe how the nodes meet, for those who look at the job."""

    def ask(self, action: RendezvousAction) -> list[AgentEvent]:
        """Carry out an action. Its answers are returned here, or later by ``take``."""

    def follow_joining(self) -> Callable[[], Waiting | None] | None:
        """Return what describes the nodes that have joined, for a line that is redrawn; None: there are none.

        From then on the rendezvous logs no lines about that.
        """

    def close(self) -> None:
        """Notify the other nodes that this one is done, and release everything, in bounded time."""


class _Run(NamedTuple):
    """The resources of a run."""

    files: JobFiles
    workers: LocalWorkers
    watchdog: Watchdog | None
    telemetry: Telemetry
    progress: ProgressWatch | None
    live_line: LiveLine | None
    journal: JournalWriter | None
    log: Callable[[str], None]
    """Writes a line of the life cycle, which the journal has already."""
    operator: Operator
    control: ControlServer | None
    """Asks the operator for those who look at the job; None: nobody can."""
    sources: list[LoopSource]
    check: HealthCheck | None


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
        signals_to_handle: str | None = None,
        environ: Mapping[str, str] | None = None,
        preload: str | Sequence[str] = (),
        standby: bool = True,
        verbosity: int = Level.INFO,
        events: str | None = None,
        hang_native: bool = False,
        health_check: Sequence[str] = (),
        health_check_timeout: float = DEFAULT_CHECK_TIMEOUT,
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
            signals_to_handle: names of the signals that stop the job, separated by commas; None for those in
                ``TORCHELASTIC_SIGNALS_TO_HANDLE``, else SIGTERM, SIGINT, SIGHUP and SIGQUIT.
            environ: the environment that the workers inherit; None: this process's.
            preload: modules to import once, in a process from which the workers are forked; or the option's text.
            standby: whether that process forks the workers of the next round ahead of time.
            verbosity: a ``Level``; lines up to this level are logged.
            events: the file to which events are appended, or a directory; None for the job's directory, if
                ``logs_specs`` has one.
            hang_native: whether the report of a hang shows native frames as well, with py-spy.
            health_check: the command that checks the node before each round; empty for none.
            health_check_timeout: seconds that it may take.
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
        environ = environment() if environ is None else environ
        self._environ = without_secrets(environ)
        self._stop_signals = parse_signals(signals_to_handle or environ.get(SIGNALS_VARIABLE) or DEFAULT_SIGNALS)
        self._temp_dir = self._environ.get("TMPDIR") or "/tmp"
        self._verbosity = verbosity
        self._events = events
        self._hang_native = hang_native
        self._health_check = health_check
        self._log = log
        self._warn = in_colour(log, YELLOW)
        handler = spec.rdzv_handler
        if not isinstance(handler, AgentRendezvous):  # it has torch's interface
            handler = cast(AgentRendezvous, adapt(handler, spec, environ, log))
        self._rendezvous = handler
        check = CheckLimits(health_check_timeout, handler.patience) if health_check else None
        self._limits = Limits(spec.get_policy(), shutdown_timeout, exit_barrier_timeout, check)
        self._options = WorkerOptions(
            self.name,
            entrypoint,
            dict.fromkeys(range(spec.local_world_size), spec.args),
            str(self._rendezvous.get_run_id()),
            self._environ,
            start_method,
            parse_modules(preload) if isinstance(preload, str) else preload,
            standby,
            {1: spec.duplicate_stdout_filters or [], 2: spec.duplicate_stderr_filters or []},
            spec.numa_options,
            per_rank="--virtual-local-rank"
            if spec.virtual_local_rank
            else "--numa-binding"
            if spec.numa_options
            else "",
        )
        self._has_run = self._has_failed = False
        self._group = WorkerGroup(spec)

    def get_worker_group(self, role: str = "default") -> WorkerGroup:
        """Return the workers' current or final state; ``role`` is unused, because there is one group."""
        return self._group

    @usable_host()
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
            if not finish.failures and state.assignment:  # otherwise the report says it
                self._name_files(run, state.assignment)
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
            self._warn("this system has no subreapers: daemons of workers may survive if the launcher is killed")
        if self._health_check_server:
            stack.callback(self._health_check_server.stop)
            self._health_check_server.start()
        stack.callback(self._rendezvous.close)
        workers = stack.enter_context(closing(LocalWorkers(self._options, self._warn, signals.fileno(), self._detail)))
        journal = self._journal(files, stack)
        stack.enter_context(log_through(journal.writing_lines(workers.log) if journal else workers.log))
        # Only now: when the keeper starts, it finds out whether this process has other children.
        watchdog, watches = self._watches(stack)
        telemetry = Telemetry(self._spec, self._options.run_id, workers.show, self._warn)
        self._rendezvous.lease = workers.lease
        progress = None
        if workers.memory:
            progress = ProgressWatch(
                self._limits.policy,
                workers.memory,
                workers.sample_stacks,
                self._py_spy(),
                self._rendezvous.ask,
                lambda text, level: self._show(Log(text, level)),
                *((journal.record_first_step, journal.record_stall) if journal else ()),
            )
            workers.stalled = progress.stalled
            watches.append(progress)
        live_line = self._live_line(workers, stack)
        log = workers.log if self._log is log_to_stderr else self._log
        facts = partial(self._facts, time.time(), files)
        asks = self._rendezvous.meeting, workers.output_files, workers.calls
        watched = (progress.figures, progress.look) if progress else ()
        operator = Operator(begin(self._limits, time.monotonic())[0], facts, *asks, *watched)
        control = self._serve_control(stack, operator)
        if control and progress:
            progress.on_answer = control.answered
        check = self._check(stack)
        more = [source for source in (live_line, control, check) if source]
        sources = [signals, self._rendezvous, *watches, *more]
        return _Run(
            files, workers, watchdog, telemetry, progress, live_line, journal, log, operator, control, sources, check
        )

    def _run_loop(self, run: _Run) -> tuple[Finish, AgentState]:
        loop = AgentLoop(
            self._limits,
            run.workers,
            partial(self._start, run),
            self._rendezvous.ask,
            run.sources,
            lambda line: self._show(line, run.log),
            partial(self._observe, run),
            run.progress.handle if run.progress else lambda event: [],
            run.journal.record if run.journal else None,
            run.check,
        )
        try:
            return cast(Finish, loop.run()), loop.state
        except Exception as error:
            status = error.exit_code if isinstance(error, LaunchError) else ExitCode.SOFTWARE
            run.telemetry.fail(str(error))
            if run.journal:
                run.journal.record_error(str(error) or type(error).__name__, status)
            with suppress(LaunchError):  # the rendezvous may be what failed
                self._rendezvous.ask(Leave(error=str(error) or type(error).__name__, status=status))
            raise

    def _observe(self, run: _Run, event: AgentEvent, state: AgentState) -> list[AgentEvent]:
        run.telemetry.observe(event, state)
        run.operator.observe(event, state)
        if run.control:
            run.control.changed()
        _update_group(self._group, state)
        follows = run.progress.observe(state) if run.progress else []
        match event:
            case Assigned(assignment) if run.live_line and run.live_line.is_shown:
                if assignment.group_rank > 0 and self._verbosity == Level.INFO:
                    self._log(formed(assignment))  # another node logs it for all, but here a user watches
            case Started(pids) if self._verbosity >= Level.DEBUG and state.assignment:
                self._log(started(state.assignment, pids, run.files.root))
            case Exited(exit_) if run.watchdog:
                run.watchdog.forget(state.pids.get(exit_.local_rank, -1))
            case GroupReaped() if run.watchdog:
                run.watchdog.clear()
        return follows

    def _py_spy(self) -> str:
        """Return the path of py-spy if native frames are asked for; empty: none are, or it is not installed."""
        if not self._hang_native:
            return ""
        from elastic_launch.agent.stack_sampler import find_py_spy  # late: few jobs ask for it

        if not (path := find_py_spy(self._environ.get("PATH", ""))):
            self._log(
                "--hang-native: py-spy is not installed (pip install py-spy), so only Python frames will be shown"
            )
        return path

    def _show(self, line: Log, to: Callable[[str], None] | None = None) -> None:
        """Write a line for the user unless its level is above the chosen one; ``to`` as for ``log_line``."""
        if line.level <= self._verbosity:
            log_line(line, self._log, to)

    def _detail(self, text: str) -> None:
        """Write a line for a user who wants to know everything."""
        self._show(Log(text, Level.DEBUG))

    def _name_files(self, run: _Run, assignment: Assignment) -> None:
        """Say where the workers' output is, once for all nodes if the user has chosen the directory."""
        if root := run.files.output:
            is_told = assignment.group_rank == 0 or not run.files.chosen
            text = f"output of the workers{on_host(assignment)}: {root}"
            self._show(Log(text, Level.INFO if is_told else Level.DEBUG), run.log)

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
        history, is_alone = assignment.restart_history, isinstance(self._rendezvous, SingleNodeRendezvous)
        may_restart = not is_alone or has_restarts(self._limits.policy, history)
        run.workers.start(envs, dest, prefixes, may_restart)

    def _live_line(self, workers: LocalWorkers, stack: ExitStack) -> LiveLine | None:
        """Show who has joined in one line, if the user is at a terminal."""
        if self._verbosity < Level.INFO or not workers.is_on_terminal or self._environ.get("TERM") == "dumb":
            return None
        if (waiting := self._rendezvous.follow_joining()) is None:
            return None
        from elastic_launch.agent.live_line import LiveLine  # late: few jobs need it

        return stack.enter_context(closing(LiveLine(waiting, workers.redraw, workers.undraw)))

    def _journal(self, files: JobFiles, stack: ExitStack) -> JournalWriter | None:
        """Prepare the events files, if the user has chosen a place for events or for logs."""
        paths = {"--events": self._events, "--log-dir": files.chosen}
        if not any(paths.values()):
            return None
        from elastic_launch.agent.journal_writer import ATTEMPT, JournalWriter  # late: 3 ms
        from elastic_launch.logs.event_log import EventLog, path_in

        host = "" if isinstance(self._rendezvous, SingleNodeRendezvous) else os.uname().nodename
        logs = [
            EventLog(path_in(path, host) if os.path.isdir(path) else path, f"{option}={path}", self._log)
            for option, path in paths.items()
            if path
        ]
        spec, run_id = self._spec, self._options.run_id
        attempt = self._environ.get(ATTEMPT, "")
        max_restarts = self._limits.policy.max_restarts
        writer = JournalWriter(logs, run_id, self.name, spec.local_world_size, max_restarts, attempt)
        return stack.enter_context(closing(writer))

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
            try:
                sources.append(stack.enter_context(closing(HealthServer(number, self._environ))))
            except UnavailableError as error:
                self._warn(f"{error}; going on without a health server")
        return watchdog, sources

    def _check(self, stack: ExitStack) -> HealthCheck | None:
        if not self._health_check:
            return None
        from elastic_launch.workers.health_check import HealthCheck  # late: few jobs have one

        about = self._options.run_id, self._spec.local_world_size
        return stack.enter_context(closing(HealthCheck(self._health_check, self._environ, *about)))

    def _serve_control(self, stack: ExitStack, operator: Operator) -> ControlServer | None:
        """Open the control socket. A job that cannot have one runs without."""
        if read_flag(self._environ.get(CONTROL, "1")) is False:
            return None
        try:
            return stack.enter_context(closing(ControlServer(self._options.run_id, self._environ, operator)))
        except UnavailableError as error:
            if self._verbosity >= Level.DEBUG:
                self._log(f"no control socket, so elastic-job does not find this node: {error}")
            return None

    def _facts(self, started_at: float, files: JobFiles) -> Facts:
        from elastic_launch.core.status import Facts  # late: only needed when somebody asks

        limits, host, pid = self._limits, os.uname().nodename, os.getpid()
        fixed = limits.policy.max_restarts, limits.shutdown_timeout, files.root
        version = sys.modules["elastic_launch"].__version__  # not imported: the package names the layers above
        return Facts(self._options.run_id, host, pid, version, self.name, started_at, *fixed)

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
        AgentPhase.CHECKING: WorkerState.INIT,
        AgentPhase.UNFIT: WorkerState.INIT,
        AgentPhase.JOINING: WorkerState.INIT,
        AgentPhase.RUNNING: WorkerState.HEALTHY,
        AgentPhase.HOLDING: WorkerState.HEALTHY,
        AgentPhase.DRAINING: WorkerState.HEALTHY,
        AgentPhase.STOPPING: WorkerState.UNHEALTHY if state.has_failed else WorkerState.HEALTHY,
    }.get(state.phase, WorkerState.FAILED if state.has_failed else WorkerState.SUCCEEDED)
    for worker in group.workers:
        worker.id = state.pids.get(worker.local_rank)
        worker.global_rank, worker.world_size = assignment.rank(worker.local_rank), assignment.world_size
        worker.role_rank = assignment.base_role_rank + worker.local_rank
        worker.role_world_size = assignment.role_world_size
