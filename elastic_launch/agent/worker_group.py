"""Run a node's workers: start their processes, carry their output, and collect evidence of failures."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from elastic_launch.agent.progress_memory import VARIABLE, progress_memory
from elastic_launch.config import INHERIT, LogsDest
from elastic_launch.core.agent.messages import AgentEvent, DeadlineReached, Exited, GroupReaped
from elastic_launch.core.agent.root_cause import Evidence, Exit
from elastic_launch.core.progress.goodput import RoundProgress, round_progress
from elastic_launch.errors import UnavailableError, UsageError
from elastic_launch.host.cgroup import OomCounter
from elastic_launch.host.console import begin_with_new_line
from elastic_launch.host.debugger import followed, is_present
from elastic_launch.host.files import open_regular
from elastic_launch.job import Assignment
from elastic_launch.logs.job_files import STACKS
from elastic_launch.logs.pump import LogPump
from elastic_launch.logs.source import STDERR, STDOUT, Duplicates, Route
from elastic_launch.worker_spec import callable_name
from elastic_launch.workers import BOOTSTRAP
from elastic_launch.workers.error_files import read_error_file
from elastic_launch.workers.keeper_client import (
    Command,
    KeeperClient,
    StartKeeper,
    execute_keeper,
    is_auto,
    preload_keeper,
)

if TYPE_CHECKING:
    from elastic_launch.workers.functions import Functions

LOCAL_RANK = "${local_rank}"
"""Placeholder for the local rank in the workers' arguments; torch's ``macros.local_rank``."""
FAULTHANDLER = b"(most recent call first):"
"""Part of every stack that Python's faulthandler writes."""
CONSOLE_PATIENCE = 10.0
"""Seconds without progress after which a console that is not read is given up at the end."""


class WorkerOptions(NamedTuple):
    """What a node's workers run, and how; the same in every round."""

    name: str
    """Name of the processes that run a function."""
    entrypoint: Callable[..., Any] | str
    """The function or program that the workers run."""
    args: Mapping[int, tuple[Any, ...]]
    """Arguments of the function or program, by local rank."""
    run_id: str
    """The job's id, which marks the workers and all processes that they start."""
    environ: Mapping[str, str]
    """The environment that the workers inherit."""
    start_method: str = "spawn"
    """How processes that run a function start: spawn, fork or forkserver."""
    preload: Sequence[str] = ()
    """Modules that the keeper imports before it forks the workers; ``auto`` alone: by what the program imports."""
    standby: bool = True
    """Whether it then forks the workers of the next round ahead of time."""
    filters: Mapping[int, Sequence[str]] = {}
    """Texts by stream (1 or 2). Lines that contain one of them are copied to a file, one for all workers."""
    numa_options: Any = None
    """How workers are bound to CPUs, as for ``--numa-binding``; None for no binding."""
    joins_lines: bool = True
    """Whether the lines of workers that share the console come whole. Their output then passes through this process,
    so it has to run the loop all the time."""
    is_watched: bool = True
    """Whether the workers get memory in which they tell their progress."""
    per_rank: str = ""
    """The option that makes workers differ in something a module may read while it is imported; empty: none does."""


class LocalWorkers:
    """The workers of one node, round after round; an event source of the agent's loop."""

    def __init__(
        self,
        options: WorkerOptions,
        log: Callable[[str], None],
        interrupt: int | None = None,
        detail: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Start the keeper.

        Args:
            options: what the workers run, and how.
            log: writes a line for the user.
            interrupt: a descriptor that, once readable, keeps ``close`` from waiting for the console's reader.
            detail: writes a line for a user who wants to know everything.

        Raises:
            UsageError: the function cannot be sent to the workers, or ``numa_options`` is wrong.
            UnavailableError: the system cannot run such processes, or cannot bind them as asked.
        """
        self._interrupt = interrupt
        self._options = options = options._replace(
            args={rank: tuple(_with_local_rank(arg, rank) for arg in args) for rank, args in options.args.items()}
        )
        self.console_patience = CONSOLE_PATIENCE
        """Seconds without progress after which ``close`` gives up a console that is not read."""
        self._functions: Functions | None = None
        self._cpus: dict[int, frozenset[int]] = {}
        if options.numa_options is not None:
            from elastic_launch.host.numa import bind  # late: few jobs need it

            self._cpus = bind(options.numa_options, len(options.args), options.environ, log)
        if options.preload and is_present():
            (detail if is_auto(options.preload) else log)(
                "a debugger follows the workers, so they start without preloaded modules"
            )
            self._options = options = options._replace(preload=())
        elif is_auto(options.preload) and callable(options.entrypoint) and options.start_method == "fork":
            self._options = options = options._replace(preload=())  # workers have what this program has imported
        with contextlib.ExitStack() as stack:
            if callable(options.entrypoint):
                from elastic_launch.workers.functions import Functions  # late: multiprocessing takes 20 ms

                self._functions = Functions(
                    options.name, options.entrypoint, options.args, options.start_method, options.preload
                )
                stack.callback(self._functions.close)
            self._pump = LogPump(log)
            stack.callback(self._end_output)
            if self._functions:
                start_keeper = self._functions.keeper_starter(options.environ, options.per_rank, detail)
            else:
                start_keeper = _command_keeper(options, detail)
            is_warm = options.preload and start_keeper is not execute_keeper
            self._standbys = len(options.args) if is_warm and options.standby else 0
            """How many processes are to be ready for a round."""
            self._processes = KeeperClient(options.run_id, options.environ, start_keeper, log, detail, self._standbys)
            stack.callback(self._processes.close)
            self.memory = progress_memory(options.environ) if options.is_watched else None
            """Where the workers tell their progress; None if that is turned off, or from a round on for which the
            system granted no memory."""
            if self.memory:
                stack.callback(self.memory.close)
            self._stack = stack.pop_all()
        self.stalled: Callable[[], float] = lambda: 0.0
        """Returns for how many seconds the workers have been found stalled in this round."""
        self._oom = OomCounter()
        self._dest = LogsDest()
        self._dumped: set[int] = set()
        """Local ranks of the workers that were asked for their stacks."""
        self.send_signal = self._processes.send_signal
        self.reap_leftovers = self._processes.reap_leftovers
        self.sample_stacks = self._processes.sample_stacks
        self.log, self.show = self._pump.log, self._pump.show
        self.redraw, self.undraw = self._pump.redraw, self._pump.undraw
        self.is_on_terminal = self._pump.is_on_terminal
        """Whether ``redraw`` has a terminal to draw on."""

    def start(
        self,
        envs: Mapping[int, dict[str, str]],
        dest: LogsDest,
        prefixes: Mapping[int, str],
        may_restart: bool = False,
    ) -> None:
        """Start the workers of a round.

        Args:
            envs: changes to the inherited environment, by local rank.
            dest: where the workers' output goes, and their error files.
            prefixes: prefixes of the workers' lines on the console, by local rank.
            may_restart: whether another round is likely to follow if this one fails.
        """
        self._dest = dest
        self._dumped.clear()
        self._oom = OomCounter()
        filters = self._options.filters
        if self.memory:
            try:
                self.memory.prepare(envs)
            except UnavailableError as error:
                self.log(f"{error}; going on without")
                self.memory = None
        with contextlib.ExitStack() as stack:
            ends = self._pump.open(_routes(dest, envs, prefixes, self._options), _duplicates(dest, filters))
            stack.callback(self._pump.close_workers_ends)
            null = stack.enter_context(open(os.devnull, "wb"))
            commands = []
            for rank, environ in envs.items():
                argv, descriptors = self._command(rank)
                for stream, files in ((STDOUT, dest.stdouts), (STDERR, dest.stderrs)):
                    if (rank, stream) in ends:
                        descriptors.append((ends[rank, stream], stream))
                    elif files.get(rank) == os.devnull:
                        descriptors.append((null.fileno(), stream))
                environ = dict(environ)
                if VARIABLE in self._options.environ:
                    environ[VARIABLE] = ""  # it names the memory that a launcher above has made for this one
                if self.memory:
                    environ |= self.memory.environ(rank)
                    descriptors += self.memory.descriptors(rank)  # last, as the keeper expects them
                if path := dest.error_files.get(rank):
                    environ["TORCHELASTIC_ERROR_FILE"] = path
                commands.append(Command(rank, argv, environ, tuple(descriptors), self._cpus.get(rank, frozenset())))
            self._processes.start(commands, self._standbys if may_restart else 0)

    def dump_stacks(self, local_ranks: Collection[int]) -> None:
        """Ask workers to write the stacks of their threads, which are kept in ``stacks.log``."""
        for rank in local_ranks:
            if self.memory:
                self.memory.rewind(rank)
            self._pump.mark(rank)
        self._dumped |= set(local_ranks)
        self._processes.dump_stacks(local_ranks)

    def lease(self, until: float) -> None:
        """Let the workers live, and make steps, until a time on ``time.monotonic``, unless this is called again."""
        self._processes.lease(until)
        if self.memory:
            self.memory.set_lease(until)

    def calls(self) -> dict[int, int]:
        """Return the number of calls of ``should_stop()`` that each worker of the round has begun, by local rank.

        Workers that have exited still count, until the next round starts.
        """
        memory = self.memory
        return {rank: memory.read(rank).calls for rank in memory.ranks()} if memory else {}

    def set_stop(self, hold: bool, stop_at: int) -> None:
        """Tell all workers when to stop; see ``SetStop``. ``stop_at`` is set before ``hold`` ends."""
        if self.memory:
            self.memory.set_stop(int(hold), stop_at)

    def descriptors(self) -> list[tuple[int, int]]:
        """See ``LoopSource``."""
        return [(self._processes.fileno(), select.POLLIN), *self._pump.descriptors()]

    def deadline(self) -> float | None:
        """See ``LoopSource``."""
        return self._pump.deadline()

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """See ``LoopSource``. Also moves the workers' output."""
        self._pump.take(ready)
        return self._processes.take() if self._processes.fileno() in ready else []

    def with_evidence(
        self, event: GroupReaped | DeadlineReached, exits: Iterable[Exit], pids: Mapping[int, int]
    ) -> GroupReaped | DeadlineReached:
        """Return the event with the workers' progress, and what is known about those that did not exit with 0."""
        self._pump.drain()
        evidence = {exit_.local_rank: self._evidence(exit_, pids) for exit_ in exits if exit_.exitcode != 0}
        return event._replace(evidence={**evidence, **event.evidence}, progress=self.progress())

    def progress(self) -> RoundProgress | None:
        """Return what the workers have made in this round; None: nobody counts."""
        if self.memory is None:
            return None
        return round_progress(map(self.memory.read, self.memory.ranks()), self.stalled())

    def with_error(self, event: Exited, pids: Mapping[int, int]) -> Exited:
        """Return the event with the exception that the worker wrote, if it wrote one."""
        rank = event.exit.local_rank
        path = self._dest.error_files.get(rank)
        return event._replace(evidence=Evidence(read_error_file(path, pids.get(rank, -1)))) if path else event

    def output_files(self) -> dict[int, dict[str, str]]:
        """Return the paths of the workers' output files, by local rank and ``stdout`` or ``stderr``."""
        found: dict[int, dict[str, str]] = {}
        for name, files in (("stdout", self._dest.stdouts), ("stderr", self._dest.stderrs)):
            for rank, path in files.items():
                if path not in (INHERIT, os.devnull):
                    found.setdefault(rank, {})[name] = os.path.abspath(path)
        return found

    def value(self, local_rank: int) -> Any:
        """Return what a worker's function returned; None for a command."""
        return self._functions.value(local_rank) if self._functions else None

    def close(self) -> None:
        """Kill what is left of the workers, and wait for the console's reader as ``console_patience`` says."""
        self._stack.close()

    def _end_output(self) -> None:
        self._pump.drain()
        self._pump.flush(self.console_patience, self._interrupt)
        begin_with_new_line(not self._pump.is_at_line_start)
        self._pump.close()

    def _command(self, rank: int) -> tuple[list[str], list[tuple[int, int]]]:
        """Return a worker's argument vector, and the descriptors that it inherits with their numbers there."""
        argv, descriptors = self._functions.command(rank) if self._functions else (_argv(self._options, rank), [])
        is_fork = self._functions and self._options.start_method != "spawn"
        return argv if is_fork else followed(argv), descriptors

    def _evidence(self, exit_: Exit, pids: Mapping[int, int]) -> Evidence:
        rank = exit_.local_rank
        path = self._dest.error_files.get(rank)
        error = read_error_file(path, pids.get(rank, -1)) if path else None
        note = self._stacks(rank, path) if rank in self._dumped else ""
        if exit_.exitcode == -signal.SIGKILL and not exit_.stop_signals and not note:
            note = self._oom.describe()
        return Evidence(error, self._pump.tail(rank), note)

    def _stacks(self, rank: int, error_file: str | None) -> str:
        """Save the stacks that a worker wrote to its memory or to stderr. Returns a note that says where they are."""
        stacks = self.memory.stacks(rank) if self.memory else b""
        if is_on_stderr := FAULTHANDLER not in stacks:
            stacks = self._pump.since_mark(rank)
        if FAULTHANDLER not in stacks or not error_file:
            return ""  # the worker does not run Python, or wrote something else
        path = os.path.join(os.path.dirname(error_file), STACKS)
        try:
            with open(path, "wb", opener=open_regular) as file:
                file.write(stacks)
        except OSError:
            if is_on_stderr:
                return "the stacks of its threads are on its stderr"
            self.show(stacks.decode(errors="replace"))
            return "the stacks of its threads are shown above"
        return f"the stacks of its threads are in {path}"


def line_prefixes(template: str | None, role: str, assignment: Assignment) -> dict[int, str]:
    """Return the prefixes of the workers' lines on the console, by local rank.

    Args:
        template: text with ``${role_name}``, ``${local_rank}``, ``${rank}`` and ``${host}``; other names are left
            alone. None: role and local rank, as torchrun has it; if there are several nodes, host and rank before it.
        role: the workers' role.
        assignment: the node's ranks in the round.
    """
    from string import Template  # late: few jobs need it

    if template is None:
        is_alone = assignment.group_world_size == 1
        template = "[${role_name}${local_rank}]:" if is_alone else "${host} rank ${rank} [${role_name}${local_rank}]:"
    fill = partial(Template(template).safe_substitute, role_name=role, host=assignment.host)
    ranks = range(assignment.local_world_size)
    return {local_rank: fill(local_rank=local_rank, rank=assignment.rank(local_rank)) for local_rank in ranks}


def program_name(entrypoint: Callable[..., Any] | str, args: Sequence[Any] = ()) -> str:
    """Return the name of a function, of a command, or of the script or module that the bootstrap runs."""
    if callable(entrypoint):
        return callable_name(entrypoint)
    return str(args[args.index(BOOTSTRAP) + 2]) if BOOTSTRAP in args else entrypoint


def _argv(options: WorkerOptions, rank: int) -> list[str]:
    return [str(options.entrypoint), *map(str, options.args[rank])]


def _command_keeper(options: WorkerOptions, detail: Callable[[str], None]) -> StartKeeper:
    """Return what starts the keeper of workers that run a command."""
    if not options.preload:
        return execute_keeper
    words = _argv(options, 0)
    is_program = words[1:3] == ["-u", BOOTSTRAP]
    if is_auto(options.preload):
        if not is_program or words[0] != sys.executable:
            return execute_keeper  # a command, or another Python
        from elastic_launch.workers.preload_plan import choose  # late: few jobs need it

        modules = choose(words[3] == "module", words[4], options.environ, options.per_rank, detail)
        return preload_keeper(words[:2], modules, words[3], words[4]) if modules else execute_keeper
    if not is_program:
        raise UsageError("preload: only works for Python scripts, modules and functions; run other commands without it")
    return preload_keeper(words[:2], options.preload, words[3], words[4])


def _routes(dest: LogsDest, ranks: Collection[int], prefixes: Mapping[int, str], options: WorkerOptions) -> list[Route]:
    """Return the streams that pass through the pump.

    stderr always does: its last lines may explain a failure. stdout does if several workers share it.
    """
    routes = []
    for stream, files, shown in (
        (STDOUT, dest.stdouts, dest.tee_stdouts),
        (STDERR, dest.stderrs, dest.tee_stderrs),
    ):
        paths = {rank: files.get(rank, INHERIT) for rank in ranks}
        joins = options.joins_lines and list(paths.values()).count(INHERIT) > 1
        for rank, path in paths.items():
            prefix = prefixes.get(rank, "").encode(errors="surrogateescape")
            if path not in (INHERIT, os.devnull):
                routes.append(Route(rank, stream, path, rank in shown, prefix))
            elif stream == STDERR or options.filters.get(stream) or (joins and path == INHERIT):
                routes.append(Route(rank, stream, "", path == INHERIT, None, joins))
    return routes


def _duplicates(dest: LogsDest, filters: Mapping[int, Sequence[str]]) -> dict[int, Duplicates]:
    paths = {STDOUT: dest.filtered_stdout, STDERR: dest.filtered_stderr}
    return {
        stream: Duplicates(tuple(text.encode(errors="surrogateescape") for text in texts), paths[stream])
        for stream, texts in filters.items()
        if texts and paths[stream]
    }


def _with_local_rank(arg: Any, rank: int) -> Any:
    return arg.replace(LOCAL_RANK, str(rank)) if isinstance(arg, str) else arg
