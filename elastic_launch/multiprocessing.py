"""Run one group of processes, without rendezvous and restarts, under torch's names.

>>> arguments, variables = {0: ("text",), 1: ("text",)}, {0: {"RANK": "0"}, 1: {"RANK": "1"}}
>>> context = start_processes("demo", "test", arguments, variables, DefaultLogsSpecs())
>>> context.wait().return_values
{0: None, 1: None}
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from elastic_launch.agent.loop import AgentLoop
from elastic_launch.agent.worker_group import LocalWorkers, WorkerOptions
from elastic_launch.config import (
    DEFAULT_SHUTDOWN_TIMEOUT,
    DEFAULT_SIGNALS,
    SIGNALS_VARIABLE,
    LogsDest,
    LogsSpecs,
    Std,
    to_map,
)
from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState
from elastic_launch.core.agent.messages import Finish, Limits, Signalled
from elastic_launch.core.agent.root_cause import failure_of
from elastic_launch.env import environment
from elastic_launch.errors import ExitCode, ProcessFailure, ProgramNotFoundError, SignalException, UsageError
from elastic_launch.host.console import log, log_through, standard_streams
from elastic_launch.host.signals import SignalTrap
from elastic_launch.job import Assignment, Policy
from elastic_launch.logs.job_files import DefaultLogsSpecs, JobFiles
from elastic_launch.parsing import parse_signals
from elastic_launch.rendezvous.single_node import answer_alone
from elastic_launch.workers.orphans import subreaper

__all__ = [
    "DefaultLogsSpecs",
    "LogsDest",
    "LogsSpecs",
    "PContext",
    "ProcessFailure",
    "RunProcsResult",
    "SignalException",
    "Std",
    "start_processes",
    "to_map",
]


@dataclass
class RunProcsResult:
    """How a group of processes ended. All maps are by local rank."""

    return_values: dict[int, Any] = field(default_factory=dict)
    """What the function returned; None for programs. Empty if a process failed."""
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    """The failures, with the cause first."""
    stdouts: dict[int, str] = field(default_factory=dict)
    """Path of each process's stdout; ``""`` for the launcher's own stdout."""
    stderrs: dict[int, str] = field(default_factory=dict)
    """Path of each process's stderr; ``""`` for the launcher's own stderr."""

    def is_failed(self) -> bool:
        """Return whether a process failed."""
        return bool(self.failures)


def start_processes(
    name: str,
    entrypoint: Callable[..., Any] | str,
    args: dict[int, tuple[Any, ...]],
    envs: dict[int, dict[str, str]],
    logs_specs: LogsSpecs,
    log_line_prefixes: dict[int, str] | None = None,
    start_method: str = "spawn",
    numa_options: Any = None,
    duplicate_stdout_filters: list[str] | None = None,
    duplicate_stderr_filters: list[str] | None = None,
) -> PContext:
    """Start one process for each local rank, and return when they have started.

    While they run, signals that stop a program raise ``SignalException`` in the main thread, if this was called there:
    SIGTERM, SIGINT, SIGHUP and SIGQUIT, or those in ``TORCHELASTIC_SIGNALS_TO_HANDLE``. The processes run on until
    ``close``, or until the program ends.

    Args:
        name: name of the group, for messages and for processes that run a function.
        entrypoint: the program or the function to run.
        args: its arguments by local rank, from 0 without gaps.
        envs: variables to set in the inherited environment, by local rank.
        logs_specs: where output goes.
        log_line_prefixes: prefixes of lines on the console, by local rank; None for name and rank, as in
            ``[trainer0]:``.
        start_method: how processes that run a function start: spawn, fork or forkserver.
        numa_options: how processes are bound to CPUs, as for ``--numa-binding``; None for no binding.
        duplicate_stdout_filters: stdout lines that contain one of these texts are copied to a file.
        duplicate_stderr_filters: stderr lines that contain one of these texts are copied to a file.

    Raises:
        UsageError: the ranks of ``args`` and ``envs`` differ or have gaps, or the function cannot be pickled.
        ProgramNotFoundError: there is no such program; also a FileNotFoundError.
        UnavailableError: the system cannot start such processes, or the log directory cannot be created.
        LaunchError: ``logs_specs`` does not work.
    """
    ranks = list(range(len(args)))
    if not ranks or sorted(args) != ranks or sorted(envs) != ranks:
        raise UsageError(
            f"args for local ranks {sorted(args)}, envs for {sorted(envs)}: must both be 0, 1, ... without gaps"
        )
    context = PContext(
        name,
        entrypoint,
        args,
        envs,
        logs_specs,
        log_line_prefixes,
        duplicate_stdout_filters,
        duplicate_stderr_filters,
        start_method=start_method,
        numa_options=numa_options,
    )
    context.start()
    return context


class PContext:
    """A group of processes. Only the thread that started it may use it.

    As in torch, ``name``, ``entrypoint``, ``args`` and ``envs`` are what was given, and ``nprocs`` is the number of
    processes. After the start, ``stdouts``, ``stderrs`` and ``error_files`` are the paths of their files by local rank
    (``""`` for the launcher's own streams), and ``filtered_stdout`` and ``filtered_stderr`` those of the copies of
    certain lines; None without filters.
    """

    def __init__(
        self,
        name: str,
        entrypoint: Callable[..., Any] | str,
        args: dict[int, tuple[Any, ...]],
        envs: dict[int, dict[str, str]],
        logs_specs: LogsSpecs,
        log_line_prefixes: dict[int, str] | None = None,
        duplicate_stdout_filters: list[str] | None = None,
        duplicate_stderr_filters: list[str] | None = None,
        *,
        start_method: str = "spawn",
        numa_options: Any = None,
    ) -> None:
        """Keep the arguments, which are those of ``start_processes``, without starting anything."""
        self.name, self.entrypoint, self.args, self.nprocs = name, entrypoint, args, len(args)
        self.envs = {rank: dict(environ) for rank, environ in envs.items()}
        self.stdouts: dict[int, str] = {}
        self.stderrs: dict[int, str] = {}
        self.error_files: dict[int, str] = {}
        self.filtered_stdout: str | None = None
        self.filtered_stderr: str | None = None
        self._logs_specs = logs_specs
        self._prefixes = log_line_prefixes or {rank: f"[{name}{rank}]:" for rank in envs}
        self._options = WorkerOptions(
            name,
            entrypoint,
            args,
            self.envs[0].get("TORCHELASTIC_RUN_ID", f"{name}-{time.time_ns()}"),
            environ={},  # read when the processes start
            start_method=start_method,
            filters={1: duplicate_stdout_filters or [], 2: duplicate_stderr_filters or []},
            numa_options=numa_options,
            joins_lines=False,  # nobody runs the loop between two calls of ``wait``
            is_watched=False,  # there is no job here that could stall, or stop at a step
        )
        workers = len(args)
        self._assignment = Assignment(0, 1, 0, workers, workers, 0, workers, "", 0, "localhost", False)
        self._stack = ExitStack()
        self._loop: AgentLoop | None = None
        self._signals = SignalTrap(())
        self._result: RunProcsResult | None = None

    def start(self) -> None:
        """Start the processes, and return when they have started.

        Raises:
            UsageError: they were started before, or the function cannot be pickled.
            ProgramNotFoundError: there is no such program.
            UnavailableError: the system cannot start such processes.
            LaunchError: ``logs_specs`` does not work.
        """
        if self._loop:
            raise UsageError(f"{self.name}: the processes were already started; create another PContext")
        environ = environment()
        # Without run ids, the name keeps the files of several groups apart.
        named = {rank: {"TORCHELASTIC_RUN_ID": self.name, **changes} for rank, changes in self.envs.items()}
        run_id, temp_dir = named[0]["TORCHELASTIC_RUN_ID"], environ.get("TMPDIR") or "/tmp"
        with ExitStack() as stack:
            stack.enter_context(standard_streams())
            signals = parse_signals(environ.get(SIGNALS_VARIABLE) or DEFAULT_SIGNALS)
            self._signals = stack.enter_context(SignalTrap(signals))
            stack.enter_context(subreaper())
            has_filters = any(self._options.filters.values())
            files = JobFiles(self._logs_specs, run_id, temp_dir, has_filters=has_filters, log=log)
            stack.callback(lambda: files.close(keep=self._result is not None and self._result.is_failed()))
            dest = files.prepare(named)
            self.stdouts, self.stderrs, self.error_files = dest.stdouts, dest.stderrs, dest.error_files
            self.filtered_stdout = dest.filtered_stdout if self._options.filters[1] else None
            self.filtered_stderr = dest.filtered_stderr if self._options.filters[2] else None
            self._workers = LocalWorkers(self._options._replace(environ=environ), log)
            stack.callback(self._workers.close)
            loop = AgentLoop(
                Limits(Policy(), DEFAULT_SHUTDOWN_TIMEOUT),
                self._workers,
                lambda assignment: self._workers.start(self.envs, dest, self._prefixes),
                lambda action: answer_alone(action, lambda: self._assignment),
                [self._signals],
            )
            with log_through(self._workers.log), self._signals.around_loop():
                # Processes that could not be started have no pid, but an exit.
                loop.run(enough=lambda state: bool(state.pids or state.exits))
            if any(exit_.exitcode == ExitCode.NOT_FOUND for exit_ in loop.state.exits) and not loop.state.pids:
                raise ProgramNotFoundError(f"entrypoint={self.entrypoint}: there is no such program")
            self._loop, self._stack = loop, stack.pop_all()

    def wait(self, timeout: float = -1, period: float = 1) -> RunProcsResult | None:
        """Wait until all processes have ended. When one fails, the others are stopped.

        Args:
            timeout: seconds to wait; 0 to return at once, negative to wait without limit.
            period: accepted for compatibility and unused: nothing is polled.

        Returns:
            None while processes run. As in torch, processes that ``close`` stopped are among the failures.

        Raises:
            SignalException: this process has received a signal that stops programs; see ``start_processes``. The
                group is as before: wait again, or close it.
            LaunchError: the return value of a process cannot be unpickled.
        """
        self._run(None if timeout < 0 else time.monotonic() + timeout)
        return self._result

    def pids(self) -> dict[int, int]:
        """Return the process ids by local rank; empty before the start."""
        return dict(self._loop.state.pids) if self._loop else {}

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """Stop the processes that still run, and release what the group holds. A SIGTERM or SIGINT hastens that.

        Args:
            death_sig: the signal that stops them; None for SIGTERM.
            timeout: seconds after which SIGKILL follows.
        """
        self._signals.passes_on = True
        with self._stack:
            if self._loop and self._loop.finish is None:
                state = replace(self._loop.state, limits=Limits(Policy(), timeout))
                if state.phase is AgentPhase.STOPPING:  # one has failed, and the others have received SIGTERM
                    now = time.monotonic()
                    state = replace(state, deadline=min(state.deadline or now, now + timeout))
                    if death_sig:
                        self._workers.send_signal(death_sig, state.running, stop=True)
                self._loop.state = state
                self._loop.add_event(Signalled(death_sig or signal.SIGTERM, time.time()))
                self._run()

    def _run(self, until: float | None = None) -> None:
        """Run the loop, if processes run, and set the result when all have ended."""
        loop = self._loop
        if loop is None or loop.finish:
            return
        with self._signals.around_loop():
            with log_through(self._workers.log):
                finish = loop.run(until, lambda state: self._signals.has_caught())
            if finish:
                self._end(finish)

    def _end(self, finish: Finish) -> None:
        with self._stack:
            assert self._loop
            failed = finish.failures if finish.signum is None else self._stopped(self._loop.state)
            failures = {failure.local_rank: failure for failure in failed}
            values = {} if failures else {rank: self._workers.value(rank) for rank in sorted(self.envs)}
            self._result = RunProcsResult(values, failures, dict(self.stdouts), dict(self.stderrs))

    def _stopped(self, state: AgentState) -> list[ProcessFailure]:
        """Return the failures of processes that ``close`` stopped, or that failed before it."""
        exits = [exit_ for exit_ in state.exits if exit_.exitcode != 0]
        return [failure_of(exit_, {}, state.pids, self._assignment) for exit_ in exits]
