"""Floor 3: the agent: carries out what ``core.lifecycle`` decides, and tells it what happened.

Its loop waits in one place: for the keeper of its workers, for a signal, for the deadline of the moment.
"""

from __future__ import annotations

import select
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Protocol, cast

from elastic_launch.config import DEFAULT_SHUTDOWN_TIMEOUT, DEFAULT_SIGNALS, DefaultLogsSpecs, parse_signals
from elastic_launch.console import say as say_on_stderr
from elastic_launch.console import standard_streams
from elastic_launch.core import lifecycle
from elastic_launch.core.lifecycle import (
    Action,
    Asking,
    Event,
    Finish,
    Gone,
    Life,
    Limits,
    Passed,
    Say,
    Signalled,
    Start,
    Sweep,
    Tell,
    TimedOut,
)
from elastic_launch.core.ranks import worker_environment
from elastic_launch.core.report import format_report
from elastic_launch.core.root_cause import ErrorRecord
from elastic_launch.env import environment
from elastic_launch.error_files import read_error_file
from elastic_launch.errors import RendezvousError, SignalException, UsageError, signal_name
from elastic_launch.job_files import JobFiles
from elastic_launch.model import RunResult, WorkerSpec, WorkerState
from elastic_launch.signals import SignalQueue
from elastic_launch.workers import BOOTSTRAP
from elastic_launch.workers.group import Command, WorkerProcesses
from elastic_launch.workers.keeper import subreaper

_LONGEST_POLL = 86400.0
"""Seconds; poll(2) takes no more than 24 days, and a deadline may be further away."""

PASSED_ON = frozenset({signal.SIGUSR1, signal.SIGUSR2})
"""Signals that are the workers' own business, unless the user has the agent stop at them."""


class AgentRendezvous(Protocol):
    """What the agent asks of a rendezvous: an answer to its actions, at once or by events of its own."""

    def get_run_id(self) -> str:
        """The job's id."""

    def ask(self, action: Asking) -> list[Event]:
        """Take an action; the events that answer it come at once or from ``take``."""

    def descriptors(self) -> list[tuple[int, int]]:
        """What to wait for: descriptors and poll masks."""

    def deadline(self) -> float | None:
        """When ``take`` is due, on ``time.monotonic``, if no descriptor is ready before."""

    def take(self) -> list[Event]:
        """What has happened; never blocks. Raises LaunchError where the node cannot go on."""

    def close(self) -> None:
        """Say goodbye to the other nodes, in bounded time, and let go of everything."""


class LocalElasticAgent:
    """Runs the workers of one node through all their rounds. An agent runs once."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: DefaultLogsSpecs | None = None,
        *,
        shutdown_timeout: float = DEFAULT_SHUTDOWN_TIMEOUT,
        signals_to_handle: str = DEFAULT_SIGNALS,
        environ: Mapping[str, str] | None = None,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        """Prepare a run; nothing is started yet.

        Args:
            spec: what to run; its ``entrypoint`` is a command.
            logs_specs: where the workers' files lie.
            shutdown_timeout: seconds between a worker's stop signal and SIGKILL.
            signals_to_handle: the signals that stop the job.
            environ: what the workers inherit; None: this process's environment.
            say: takes each line for people.

        Raises:
            UsageError: the entry point is not a command.
        """
        if not isinstance(spec.entrypoint, str):
            raise UsageError(f"entrypoint={spec.entrypoint!r}: must be a command; functions are not available yet")
        self._spec = spec
        self._command = [spec.entrypoint, *map(str, spec.args)]
        self._logs_specs = logs_specs or DefaultLogsSpecs()
        self._shutdown_timeout = shutdown_timeout
        self._stop_signals = parse_signals(signals_to_handle)
        self._environ = environment() if environ is None else environ
        self._say = say
        self._rendezvous = _adapted(spec, self._environ, say)
        self._run_id = str(self._rendezvous.get_run_id())
        self._has_failed = False

    @property
    def name(self) -> str:
        """What is run, for people: the script or module under the bootstrap, else the command."""
        command = self._command
        return command[command.index(BOOTSTRAP) + 2] if BOOTSTRAP in command else command[0]

    def run(self, role: str = "default") -> RunResult:
        """Run the job to its end on this node. Signals are handled where this is the program's main thread.

        Raises:
            SignalException: a signal ended the job; the workers are stopped.
            LaunchError: the launcher could not do its work; no worker is left.
        """
        with ExitStack() as stack:
            stack.enter_context(standard_streams())
            self._files = JobFiles(self._logs_specs.log_dir, self._run_id, self._environ.get("TMPDIR") or "/tmp")
            stack.callback(lambda: self._files.close(keep=self._has_failed))
            self._signals = stack.enter_context(SignalQueue(self._stop_signals | PASSED_ON))
            if not stack.enter_context(subreaper()):
                self._say("this system has no subreapers: daemons that workers start may outlive a killed launcher")
            stack.callback(self._rendezvous.close)
            self._workers = WorkerProcesses(self._run_id, self._environ)
            stack.callback(self._workers.close)
            life, finish = self._live()
            self._has_failed = bool(finish.failures)
        if finish.failures:
            return self._failed(life, finish)
        if finish.error:
            raise RendezvousError(finish.error, finish.status)
        if finish.signum is not None:
            raise SignalException(f"stopped by {signal_name(finish.signum)}", signal.Signals(finish.signum))
        ranks = sorted(life.place.rank(exit_.local_rank) for exit_ in life.exits) if life.place else []
        return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))

    def _live(self) -> tuple[Life, Finish]:
        """Events in, actions out, until the end."""
        life, actions = lifecycle.begin(Limits(self._spec.max_restarts, self._shutdown_timeout))
        events: deque[Event] = deque()
        while True:
            for action in actions:
                if isinstance(action, Finish):
                    return life, action
                events.extend(self._do(action))
            while not events:
                events.extend(self._wait(life.deadline))
            event = events.popleft()
            if isinstance(event, Gone | TimedOut):
                event = event._replace(errors={**event.errors, **self._error_files(life)})
            life, actions = lifecycle.step(life, event, time.monotonic())

    def _do(self, action: Action) -> list[Event]:
        """Carry out one action."""
        match action:
            case Start():
                self._workers.start(self._commands(action))
            case Tell(signum, local_ranks, stop):
                self._workers.tell(signum, local_ranks, stop)
            case Sweep(kill):
                self._workers.sweep(kill)
            case Say(text):
                self._say(text)
            case Finish():
                pass
            case asking:
                return self._rendezvous.ask(asking)
        return []

    def _wait(self, deadline: float | None) -> list[Event]:
        """Sleep until something happens: the one place where the agent waits."""
        poller = select.poll()
        for source in (self._workers, self._signals):
            poller.register(source, select.POLLIN)
        waits_on = self._rendezvous.descriptors()
        for fd, mask in waits_on:
            poller.register(fd, mask)
        rendezvous_deadline = self._rendezvous.deadline()
        first = min((at for at in (deadline, rendezvous_deadline) if at is not None), default=None)
        left = None if first is None else min(max(0.0, first - time.monotonic()), _LONGEST_POLL)
        ready = {fd for fd, _ in poller.poll(None if left is None else left * 1000)}
        events: list[Event] = []
        if self._signals.fileno() in ready:
            events += [self._signal_event(signum, at) for signum, at in self._signals.take()]
        if self._workers.fileno() in ready:
            events += self._workers.take()
        if not ready.isdisjoint(fd for fd, _ in waits_on) or _is_over(rendezvous_deadline):
            events += self._rendezvous.take()
        return events or ([TimedOut()] if _is_over(deadline) else [])

    def _signal_event(self, signum: int, at: float) -> Event:
        return Signalled(signum, at) if signum in self._stop_signals else Passed(signum)

    def _commands(self, start: Start) -> list[Command]:
        """What each worker of a round executes, and with which variables."""
        return [
            (
                local_rank,
                self._command,
                worker_environment(
                    self._spec,
                    start.place,
                    local_rank,
                    run_id=self._run_id,
                    error_file=self._files.prepare(start.place.restart_count, start.place.rank(local_rank)),
                    inherited=self._environ,
                ),
            )
            for local_rank in range(start.place.local_world_size)
        ]

    def _error_files(self, life: Life) -> dict[int, ErrorRecord]:
        """What the workers that failed wrote of their exceptions, by local rank."""
        records: dict[int, ErrorRecord] = {}
        for exit_ in life.exits:
            if exit_.exitcode != 0 and life.place:
                path = self._files.error_file(life.place.restart_count, life.place.rank(exit_.local_rank))
                if record := read_error_file(path, life.pids.get(exit_.local_rank, -1)):
                    records[exit_.local_rank] = record
        return records

    def _failed(self, life: Life, finish: Finish) -> RunResult:
        report = format_report(
            self.name,
            finish.failures,
            restarts=life.place.charged if life.place else 0,
            max_restarts=self._spec.max_restarts,
            log_dir=self._files.root if self._files.kept else None,
        )
        return RunResult(WorkerState.FAILED, failures={f.rank: f for f in finish.failures}, report=report)


def _adapted(spec: WorkerSpec, environ: Mapping[str, str], say: Callable[[str], None]) -> AgentRendezvous:
    """The spec's rendezvous; a handler of torch's interface gets a wrapping."""
    if hasattr(spec.rdzv_handler, "ask"):
        return cast(AgentRendezvous, spec.rdzv_handler)
    from elastic_launch.rendezvous.foreign import adapt  # late: most jobs do not need it

    return cast(AgentRendezvous, adapt(spec.rdzv_handler, spec, environ, say))


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
