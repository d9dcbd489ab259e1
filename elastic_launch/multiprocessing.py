"""Layer 4: what ``torch.distributed.elastic.multiprocessing`` offers, by the same names: one group of processes.

No rendezvous and no restart: the processes start, and end together.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from elastic_launch.agent.loop import AgentLoop
from elastic_launch.agent.worker_group import LocalWorkers, WorkerOptions
from elastic_launch.config import DEFAULT_SHUTDOWN_TIMEOUT, LogsDest, LogsSpecs, Std, to_map
from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState
from elastic_launch.core.agent.messages import Finish, Limits, Signalled
from elastic_launch.core.agent.root_cause import failure_of
from elastic_launch.env import environment
from elastic_launch.errors import ProcessFailure, SignalException, UsageError
from elastic_launch.host.console import log, spoken_by, standard_streams
from elastic_launch.job import Assignment, Policy
from elastic_launch.logs.job_files import DefaultLogsSpecs, JobFiles
from elastic_launch.rendezvous.single_node import answer_alone
from elastic_launch.workers.keeper import subreaper

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
    """How a group of processes ended. Maps are by local rank."""

    return_values: dict[int, Any] = field(default_factory=dict)
    """What functions returned; None for commands."""
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    """The cause first."""
    stdouts: dict[int, str] = field(default_factory=dict)
    """Files; ``""`` for the launcher's own stream."""
    stderrs: dict[int, str] = field(default_factory=dict)

    def is_failed(self) -> bool:
        """Whether processes failed."""
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
    """Start a process for each local rank, from 0.

    Args:
        name: for people, and of processes that run a function.
        entrypoint: a program, or a function.
        args: its arguments, by local rank.
        envs: changes to the inherited environment, by local rank.
        logs_specs: where output goes.
        log_line_prefixes: what stands before lines on the console; by default name and local rank.
        start_method: for functions: spawn, fork or forkserver.
        numa_options: as for ``--numa-binding``.
        duplicate_stdout_filters: texts; lines with one of them go to a file of their own as well.
        duplicate_stderr_filters: the same for stderr.

    Raises:
        UsageError: args and envs do not have the same ranks, or the function cannot be sent.
        UnavailableError: the system cannot have such processes.
    """
    ranks = list(range(len(args)))
    if not ranks or sorted(args) != ranks or sorted(envs) != ranks:
        raise UsageError(
            f"args for local ranks {sorted(args)}, envs for {sorted(envs)}: must both be for 0, 1, ... without gaps"
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
    """A group of processes. To be used by the thread that started it."""

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
        """Take what ``start_processes`` takes; nothing is started yet."""
        self.name = name
        self._entrypoint = entrypoint
        self._args = args
        self._envs = {rank: dict(environ) for rank, environ in envs.items()}
        self._logs_specs = logs_specs
        self._prefixes = log_line_prefixes or {rank: f"[{name}{rank}]:" for rank in envs}
        self._filters: Mapping[int, list[str]] = {
            1: duplicate_stdout_filters or [],
            2: duplicate_stderr_filters or [],
        }
        self._start_method = start_method
        self._numa_options = numa_options
        workers = len(args)
        self._assignment = Assignment(0, 1, 0, workers, workers, 0, workers, "", 0, "localhost", False)
        self._stack = ExitStack()
        self._loop: AgentLoop | None = None
        self._dest = LogsDest()
        self._result: RunProcsResult | None = None

    def start(self) -> None:
        """Start the processes."""
        if self._loop:
            raise UsageError(f"{self.name}: the processes were started already")
        try:
            self._start_all(self._stack)
        except BaseException:
            self._loop = None
            self._stack.close()
            raise

    def _start_all(self, stack: ExitStack) -> None:
        stack.enter_context(standard_streams())
        stack.enter_context(subreaper())
        environ = environment()
        # Without a run id, the name keeps the files of several contexts apart.
        named = {rank: {"TORCHELASTIC_RUN_ID": self.name, **changes} for rank, changes in self._envs.items()}
        files = JobFiles(
            self._logs_specs,
            named[0]["TORCHELASTIC_RUN_ID"],
            environ.get("TMPDIR") or "/tmp",
            has_filters=any(self._filters.values()),
        )
        stack.callback(lambda: files.close(keep=self._result is not None and self._result.is_failed()))
        self._dest = files.prepare(named)
        for rank, path in self._dest.error_files.items():
            self._envs[rank]["TORCHELASTIC_ERROR_FILE"] = path
        cpus: dict[int, frozenset[int]] = {}
        if self._numa_options is not None:
            from elastic_launch.host.numa import bind  # late: few need it

            cpus = bind(self._numa_options, len(self._args), environ, log)
        run_id = self._envs[0].get("TORCHELASTIC_RUN_ID", f"{self.name}-{time.time_ns()}")
        options = WorkerOptions(self.name, self._entrypoint, self._args, run_id, environ, self._start_method)
        self._workers = LocalWorkers(options._replace(filters=self._filters, cpus=cpus), log)
        stack.callback(self._workers.close)
        limits = Limits(Policy(), shutdown_timeout=DEFAULT_SHUTDOWN_TIMEOUT)
        self._loop = AgentLoop(
            limits, self._workers, self._start, lambda action: answer_alone(action, lambda: self._assignment)
        )
        self._run(lambda loop: loop.run(enough=lambda state: "running:Started" in state.history))

    def wait(self, timeout: float = -1, period: float = 1) -> RunProcsResult | None:
        """Wait for the end of all processes; when one fails, the others are stopped.

        Args:
            timeout: seconds; 0 only looks, a negative one has no end.
            period: accepted for torch's sake: nothing here polls.

        Returns:
            None while they run. After ``close``, those that it stopped are among the failures, as in torch's.
        """
        if self._loop and self._loop.finish is None:
            self._run(lambda loop: loop.run(None if timeout < 0 else time.monotonic() + timeout))
        return self._result

    def pids(self) -> dict[int, int]:
        """The processes' ids, by local rank."""
        return dict(self._loop.state.pids) if self._loop else {}

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """Stop what runs, with a signal (SIGTERM) and after ``timeout`` seconds SIGKILL; let go of everything."""
        with self._stack:
            if self._loop and self._loop.finish is None:
                state = replace(self._loop.state, limits=Limits(Policy(), shutdown_timeout=timeout))
                if state.phase is AgentPhase.STOPPING:  # since one has failed; the others had SIGTERM then
                    now = time.monotonic()
                    state = replace(state, deadline=min(state.deadline or now, now + timeout))
                    if death_sig:
                        self._workers.send_signal(death_sig, state.running, stop=True)
                self._loop.state = state
                self._loop.add_event(Signalled(death_sig or signal.SIGTERM, time.time()))
                self._run(lambda loop: loop.run())

    def _run(self, what: Callable[[AgentLoop], Finish | None]) -> None:
        """Let the loop run; then the result, if this was its end."""
        loop = self._loop
        if loop is None:
            return
        with spoken_by(self._workers.log):
            finish = what(loop)
        if finish is None:
            return
        with self._stack:
            failed = finish.failures if finish.signum is None else self._stopped(loop.state)
            failures = {failure.local_rank: failure for failure in failed}
            values = {} if failures else {rank: self._workers.value(rank) for rank in sorted(self._args)}
            self._result = RunProcsResult(values, failures, dict(self._dest.stdouts), dict(self._dest.stderrs))

    def _stopped(self, state: AgentState) -> list[ProcessFailure]:
        """How those ended that ``close`` stopped, or that had failed when nobody waited."""
        exits = [exit_ for exit_ in state.exits if exit_.exitcode != 0]
        return [failure_of(exit_, {}, state.pids, self._assignment) for exit_ in exits]

    def _start(self, assignment: Assignment) -> None:
        self._workers.start(self._envs, self._dest, self._prefixes)
