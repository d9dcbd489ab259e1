"""Layer 3: a node's workers: their processes together with their output, and what both tell of how they ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elastic_launch.config import INHERIT, LogsDest
from elastic_launch.core.agent.lifecycle import AgentEvent, DeadlineReached, Exited, GroupReaped
from elastic_launch.core.agent.root_cause import Evidence, Exit
from elastic_launch.errors import UsageError
from elastic_launch.host.cgroup import OomCounter
from elastic_launch.host.console import begin_with_new_line, unblocked
from elastic_launch.logs import Duplicates, LogPump, Route
from elastic_launch.logs.job_files import STACKS
from elastic_launch.worker_spec import callable_name
from elastic_launch.workers import BOOTSTRAP
from elastic_launch.workers.error_files import read_error_file
from elastic_launch.workers.keeper_client import Command, KeeperClient, StartKeeper, execute_keeper, preload_keeper

if TYPE_CHECKING:
    from elastic_launch.workers.functions import Functions

LOCAL_RANK = "${local_rank}"
"""Stands for the local rank in arguments that are texts, as torch's ``macros.local_rank`` does."""
STDOUT, STDERR = 1, 2
FAULTHANDLER = b"(most recent call first):"
"""What stands in the stacks that Python writes."""
CONSOLE_PATIENCE = 10.0


class Workers:
    """The workers of one node, round after round. Events come from ``take`` when ``descriptors`` are ready."""

    def __init__(
        self,
        name: str,
        entrypoint: Callable[..., Any] | str,
        args: Mapping[int, tuple[Any, ...]],
        *,
        run_id: str,
        environ: Mapping[str, str],
        start_method: str,
        log: Callable[[str], None],
        interrupt: int | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        """Prepare; the keeper is started.

        Args:
            name: of processes that run a function.
            entrypoint: what each worker runs: a program, or a function.
            args: its arguments, by local rank.
            run_id: marks the workers and all that they start.
            environ: what they inherit.
            start_method: how those are started that run a function.
            say: takes a line for people.
            preload: modules that the keeper imports, for workers to be forked from it.
            interrupt: a descriptor; once it is readable, ``close`` does not wait for the console's readers.

        Raises:
            UsageError: the function cannot be sent to the workers.
            UnavailableError: the system cannot have such processes.
        """
        self._interrupt = interrupt
        self._args = {rank: tuple(_with_local_rank(each, rank) for each in args[rank]) for rank in args}
        self._program = entrypoint if isinstance(entrypoint, str) else ""
        self.console_patience = CONSOLE_PATIENCE
        """Seconds without progress after which ``close`` gives up a console's reader."""
        self._functions: Functions | None = None
        with contextlib.ExitStack() as stack:
            if callable(entrypoint):
                from elastic_launch.workers.functions import Functions  # late: multiprocessing takes 20 ms

                self._functions = Functions(name, entrypoint, self._args, start_method, preload)
                stack.callback(self._functions.close)
            self._pump = LogPump(log, unblocked)
            stack.callback(self._end_output)
            start_keeper = self._functions.keeper_starter() if self._functions else self._keeper_starter(preload)
            self._processes = KeeperClient(run_id, environ, start_keeper, log)
            stack.callback(self._processes.close)
            self._stack = stack.pop_all()
        self._oom = OomCounter()
        self._dest = LogsDest()
        self._dumped: set[int] = set()
        """The workers that were asked for their stacks."""
        self.tell = self._processes.send_signal
        self.sweep = self._processes.reap_leftovers
        self.lease = self._processes.lease
        self.log, self.show = self._pump.log, self._pump.show

    def start(
        self,
        envs: Mapping[int, dict[str, str]],
        dest: LogsDest,
        prefixes: Mapping[int, str],
        filters: Mapping[int, Sequence[str]],
        cpus: Mapping[int, frozenset[int]],
    ) -> None:
        """Start a round.

        Args:
            envs: changes to the inherited environment, by local rank.
            dest: where output goes.
            prefixes: what stands before lines on the console, by local rank.
            filters: texts of the lines that go to a file of their own as well, by stream (1, 2).
            cpus: where workers are bound to, by local rank.
        """
        self._dest = dest
        self._dumped.clear()
        self._oom = OomCounter()
        ends = self._pump.open(_routes(dest, envs, prefixes, filters), _duplicates(dest, filters))
        nowhere = -1
        try:
            commands = []
            for rank, environ in envs.items():
                argv, descriptors = self._command(rank)
                for stream, files in ((STDOUT, dest.stdouts), (STDERR, dest.stderrs)):
                    if (rank, stream) in ends:
                        descriptors.append((ends[rank, stream], stream))
                    elif files.get(rank) == os.devnull:
                        nowhere = os.open(os.devnull, os.O_WRONLY) if nowhere < 0 else nowhere
                        descriptors.append((nowhere, stream))
                commands.append(Command(rank, argv, environ, tuple(descriptors), cpus.get(rank, frozenset())))
            self._processes.start(commands)
        finally:
            self._pump.close_workers_ends()
            if nowhere >= 0:
                os.close(nowhere)

    def dump(self, local_ranks: Collection[int]) -> None:
        """Have workers write the stacks of their threads, to be found in ``stacks.log``."""
        for rank in local_ranks:
            self._pump.mark(rank)
        self._dumped |= set(local_ranks)
        self._processes.dump_stacks(local_ranks)

    def descriptors(self) -> list[tuple[int, int]]:
        """What to wait for: descriptors and poll masks."""
        return [(self._processes.fileno(), select.POLLIN), *self._pump.descriptors()]

    def deadline(self) -> float | None:
        """When ``take`` is due at the latest, on ``time.monotonic``."""
        return self._pump.deadline()

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Move output, and read what has happened."""
        self._pump.take(ready)
        return self._processes.take() if self._processes.fileno() in ready else []

    def with_evidence(
        self, event: GroupReaped | DeadlineReached, exits: Iterable[Exit], pids: Mapping[int, int]
    ) -> GroupReaped | DeadlineReached:
        """Add to an event what is known of workers that ended, and not with 0."""
        self._pump.drain()
        evidence = {exit_.local_rank: self._evidence(exit_, pids) for exit_ in exits if exit_.exitcode != 0}
        return event._replace(evidence={**evidence, **event.evidence})

    def with_error(self, event: Exited, pids: Mapping[int, int]) -> Exited:
        """Add to the end of a worker the exception that it has written, if it has."""
        rank = event.exit.local_rank
        path = self._dest.error_files.get(rank)
        return event._replace(evidence=Evidence(read_error_file(path, pids.get(rank, -1)))) if path else event

    def value(self, local_rank: int) -> Any:
        """What the function returned; None for a command."""
        return self._functions.value(local_rank) if self._functions else None

    def close(self) -> None:
        """End whatever is left, and give the console's readers some time for what is still to be shown."""
        self._stack.close()

    def _end_output(self) -> None:
        self._pump.drain()
        self._pump.flush(self.console_patience, self._interrupt)
        begin_with_new_line(not self._pump.is_at_line_start)
        self._pump.close()

    def _keeper_starter(self, preload: Sequence[str]) -> StartKeeper:
        """What starts the keeper of commands."""
        if not preload:
            return execute_keeper
        words = [self._program, *map(str, self._args[0])]
        if words[1:3] != ["-u", BOOTSTRAP]:
            raise UsageError("preload: is for Python scripts, modules and functions; a command imports for itself")
        return preload_keeper(words[:2], preload, words[3], words[4])

    def _command(self, rank: int) -> tuple[list[str], list[tuple[int, int]]]:
        if self._functions:
            return self._functions.command(rank)
        return [self._program, *map(str, self._args[rank])], []

    def _evidence(self, exit_: Exit, pids: Mapping[int, int]) -> Evidence:
        rank = exit_.local_rank
        path = self._dest.error_files.get(rank)
        error = read_error_file(path, pids.get(rank, -1)) if path else None
        note = self._stacks(rank, path) if rank in self._dumped else ""
        if exit_.exitcode == -signal.SIGKILL and not exit_.stop_signals and not note:
            note = self._oom.describe()
        return Evidence(error, self._pump.tail(rank), note)

    def _stacks(self, rank: int, error_file: str | None) -> str:
        """Keep the stacks that a worker wrote to its stderr before it was killed; say where they are."""
        stacks = self._pump.since_mark(rank)
        if FAULTHANDLER not in stacks or not error_file:
            return ""  # it is not Python's, or it wrote something else
        path = os.path.join(os.path.dirname(error_file), STACKS)
        try:
            with open(path, "wb") as file:
                file.write(stacks)
        except OSError:
            return "the stacks of its threads are on its stderr"
        return f"the stacks of its threads are in {path}"


def prefix(template: str, **names: object) -> str:
    """What stands before a worker's lines on the console: ``${role_name}``, ``${rank}`` and so on filled in.

    What is no known name stays as it is.
    """
    from string import Template  # late: only some jobs need it

    return Template(template).safe_substitute({name: str(value) for name, value in names.items()})


def _routes(
    dest: LogsDest, ranks: Iterable[int], prefixes: Mapping[int, str], filters: Mapping[int, Sequence[str]]
) -> list[Route]:
    """What becomes of which stream. stderr always comes by: its last lines may be all that tells of a failure."""
    routes = []
    for rank in ranks:
        before = prefixes.get(rank, "").encode(errors="surrogateescape")
        for stream, files, shown in (
            (STDOUT, dest.stdouts, dest.tee_stdouts),
            (STDERR, dest.stderrs, dest.tee_stderrs),
        ):
            path = files.get(rank, INHERIT)
            if path not in (INHERIT, os.devnull):
                routes.append(Route(rank, stream, path, rank in shown, before))
            elif stream == STDERR or filters.get(stream):
                routes.append(Route(rank, stream, "", path == INHERIT, None))
    return routes


def _duplicates(dest: LogsDest, filters: Mapping[int, Sequence[str]]) -> dict[int, Duplicates]:
    paths = {STDOUT: dest.filtered_stdout, STDERR: dest.filtered_stderr}
    return {
        stream: Duplicates(tuple(text.encode(errors="surrogateescape") for text in texts), paths[stream])
        for stream, texts in filters.items()
        if texts and paths[stream]
    }


def _with_local_rank(value: Any, rank: int) -> Any:
    return value.replace(LOCAL_RANK, str(rank)) if isinstance(value, str) else value


def name_of(entrypoint: Callable[..., Any] | str | None, args: Sequence[Any] = ()) -> str:
    """The name of what workers run, for people: the script or module under the bootstrap, else command or function.

    Raises:
        UsageError: there is nothing.
    """
    if not entrypoint:
        raise UsageError("entrypoint=None: there is nothing to run; pass a command or a function")
    if callable(entrypoint):
        return callable_name(entrypoint)
    return str(args[args.index(BOOTSTRAP) + 2]) if BOOTSTRAP in args else entrypoint
