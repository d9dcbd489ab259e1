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
from elastic_launch.config import DEFAULT_SHUTDOWN_TIMEOUT, LogsDest, LogsSpecs, Std, to_map
from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState
from elastic_launch.core.agent.messages import Limits, Signalled
from elastic_launch.core.agent.root_cause import failure_of
from elastic_launch.env import environment
from elastic_launch.errors import ProcessFailure, SignalException, UsageError
from elastic_launch.host.console import log, log_through, standard_streams
from elastic_launch.job import Assignment, Policy
from elastic_launch.logs.job_files import DefaultLogsSpecs, JobFiles
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
        UnavailableError: the system cannot start such processes.
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
    """A group of processes. Only the thread that started it may use it."""

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
        self.name = name
        self._envs = {rank: dict(environ) for rank, environ in envs.items()}
        self._logs_specs = logs_specs
        self._prefixes = log_line_prefixes or {rank: f"[{name}{rank}]:" for rank in envs}
        self._options = WorkerOptions(
            name,
            entrypoint,
            args,
            self._envs[0].get("TORCHELASTIC_RUN_ID", f"{name}-{time.time_ns()}"),
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
        self._dest = LogsDest()
        self._result: RunProcsResult | None = None

    def start(self) -> None:
        """Start the processes, and return when they have started.

        Raises:
            UsageError: they were started before, or the function cannot be pickled.
            UnavailableError: the system cannot start such processes.
            LaunchError: ``logs_specs`` does not work.
        """
        if self._loop:
            raise UsageError(f"{self.name}: the processes were already started; create another PContext")
        environ = environment()
        # Without run ids, the name keeps the files of several groups apart.
        named = {rank: {"TORCHELASTIC_RUN_ID": self.name, **changes} for rank, changes in self._envs.items()}
        run_id, temp_dir = named[0]["TORCHELASTIC_RUN_ID"], environ.get("TMPDIR") or "/tmp"
        with ExitStack() as stack:
            stack.enter_context(standard_streams())
            stack.enter_context(subreaper())
            has_filters = any(self._options.filters.values())
            files = JobFiles(self._logs_specs, run_id, temp_dir, has_filters=has_filters, log=log)
            stack.callback(lambda: files.close(keep=self._result is not None and self._result.is_failed()))
            self._dest = files.prepare(named)
            self._workers = LocalWorkers(self._options._replace(environ=environ), log)
            stack.callback(self._workers.close)
            loop = AgentLoop(
                Limits(Policy(), DEFAULT_SHUTDOWN_TIMEOUT),
                self._workers,
                lambda assignment: self._workers.start(self._envs, self._dest, self._prefixes),
                lambda action: answer_alone(action, lambda: self._assignment),
            )
            with log_through(self._workers.log):
                # Processes that could not be started have no pid, but an exit.
                loop.run(enough=lambda state: bool(state.pids or state.exits))
            self._loop, self._stack = loop, stack.pop_all()

    def wait(self, timeout: float = -1, period: float = 1) -> RunProcsResult | None:
        """Wait until all processes have ended. When one fails, the others are stopped.

        Args:
            timeout: seconds to wait; 0 to return at once, negative to wait without limit.
            period: accepted for compatibility and unused: nothing is polled.

        Returns:
            None while processes run. As in torch, processes that ``close`` stopped are among the failures.

        Raises:
            LaunchError: the return value of a process cannot be unpickled.
        """
        self._run(None if timeout < 0 else time.monotonic() + timeout)
        return self._result

    def pids(self) -> dict[int, int]:
        """Return the process ids by local rank; empty before the start."""
        return dict(self._loop.state.pids) if self._loop else {}

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """Stop the processes that still run, and release what the group holds.

        Args:
            death_sig: the signal that stops them; None for SIGTERM.
            timeout: seconds after which SIGKILL follows.
        """
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
        with log_through(self._workers.log):
            finish = loop.run(until)
        if finish is None:
            return
        with self._stack:
            failed = finish.failures if finish.signum is None else self._stopped(loop.state)
            failures = {failure.local_rank: failure for failure in failed}
            values = {} if failures else {rank: self._workers.value(rank) for rank in sorted(self._envs)}
            self._result = RunProcsResult(values, failures, dict(self._dest.stdouts), dict(self._dest.stderrs))

    def _stopped(self, state: AgentState) -> list[ProcessFailure]:
        """Return the failures of processes that ``close`` stopped, or that failed before it."""
        exits = [exit_ for exit_ in state.exits if exit_.exitcode != 0]
        return [failure_of(exit_, {}, state.pids, self._assignment) for exit_ in exits]
