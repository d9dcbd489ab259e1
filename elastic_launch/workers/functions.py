"""Functions as workers, on the agent's side: how their keeper and their processes are started.

The start methods are those of ``multiprocessing``. Its machinery pickles and runs the function, so queues, locks,
connections and tensors can be arguments. But the keeper starts the processes:

    spawn       the ordinary keeper executes a new Python for each worker
    fork        the keeper is a fork of this process, and forks the workers
    forkserver  the keeper is a new Python that has imported the main module, and forks the workers (``preload_main``)

A function arrives in a memory file, and its return value comes back in one, so no reader has to wait for a writer.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic_launch.errors import LaunchError, UsageError
from elastic_launch.host.memory_files import memory_file
from elastic_launch.worker_spec import callable_name
from elastic_launch.workers import function_main
from elastic_launch.workers.keeper_client import StartKeeper, execute_keeper, is_auto, preload_keeper

START_METHODS = ("spawn", "fork", "forkserver")


class Functions:
    """What the workers of one node run: a function, its arguments and its return values, by local rank."""

    def __init__(
        self,
        name: str,
        fn: Callable[..., Any],
        args: Mapping[int, tuple[Any, ...]],
        start_method: str,
        preload: Sequence[str] = (),
    ) -> None:
        """Pickle what the start method needs pickled.

        Args:
            name: the processes' name, to which their local rank is added.
            fn: the function that each worker calls.
            args: its arguments, by local rank.
            start_method: one of ``START_METHODS``.
            preload: modules that the keeper imports before it forks the workers; ``auto`` alone: by what the main
                module imports.

        Raises:
            UsageError: the start method is unknown, or cannot send the function or its arguments to the workers.
        """
        if start_method not in START_METHODS:
            raise UsageError(f"start_method={start_method!r}: must be one of {', '.join(START_METHODS)}")
        if preload and start_method == "fork":
            raise UsageError("preload with start_method='fork': workers already have what this program has imported")
        self._method = start_method
        self._preload = preload
        self._results: dict[int, int] = {}
        """Memory files for the return values, by local rank."""
        self._preparation = -1
        """Memory file with multiprocessing's preparation data."""
        self._main = "", ""
        """The main module's file or name, whichever a new process needs."""
        self._payloads: dict[int, tuple[int, list[int]]] = {}
        """By local rank: a memory file with the worker, and the descriptors that its pickle refers to."""
        self._processes = {
            rank: function_main.FunctionProcess(f"{name}-{rank}", start_method, fn, arguments)
            for rank, arguments in args.items()
        }
        if start_method != "fork":
            try:
                self._pickle(name, fn)
            except Exception as error:
                raise UsageError(_explain(fn, start_method, error)) from error
            finally:
                if len(self._payloads) < len(self._processes):
                    self.close()

    def _pickle(self, name: str, fn: Callable[..., Any]) -> None:
        from multiprocessing import spawn

        # What a new Python needs to become like this one: module search path, main module, working directory.
        data = spawn.get_preparation_data(name)
        if not os.path.exists(data.get("init_main_from_path", "/")):
            del data["init_main_from_path"]  # the program came through a pipe; other modules can be imported
        if getattr(fn, "__module__", "") == "__main__" and not any(key.startswith("init_main") for key in data):
            raise ImportError("this program has no file (a notebook?) that a new process could import it from")
        self._main = data.get("init_main_from_path", ""), data.get("init_main_from_name", "")
        self._preparation, _ = _pickled(data)
        for rank, process in self._processes.items():
            self._payloads[rank] = _pickled(process)

    def keeper_starter(self, environ: Mapping[str, str], per_rank: str, detail: Callable[[str], None]) -> StartKeeper:
        """Return what starts the keeper; the arguments are those of ``preload_plan.choose``."""
        if self._method == "fork":
            return self._fork_keeper
        if is_auto(self._preload):
            self._preload = [] if self._method == "forkserver" else self._choose(environ, per_rank, detail)
        if self._method == "spawn" and not self._preload:
            return execute_keeper
        kind = "main" if self._method == "forkserver" else "function"
        return preload_keeper(_python(), self._preload, kind, str(self._preparation), [self._preparation])

    def _choose(self, environ: Mapping[str, str], per_rank: str, detail: Callable[[str], None]) -> list[str]:
        path, name = self._main
        if not path and not name:
            return []
        from elastic_launch.workers.preload_plan import choose  # late: few jobs need it

        return choose(bool(name), name or path, environ, per_rank, detail, is_main=False)

    def command(self, local_rank: int) -> tuple[list[str], list[tuple[int, int]]]:
        """Return how to start a worker in a new round: its argv, and its descriptors with their numbers there."""
        if local_rank in self._results:
            os.close(self._results.pop(local_rank))
        self._results[local_rank] = result = memory_file("result")
        if self._method == "fork":
            return [], [(result, -1)]
        payload, referred = self._payloads[local_rank]
        descriptors = [self._preparation, payload, result, *_tracker()]
        argv = [*_python(), function_main.__file__, *map(str, descriptors)]
        return argv, [(fd, fd) for fd in (*descriptors, *referred)]

    def value(self, local_rank: int) -> Any:
        """Return what the function of a worker returned that ended with status 0; None if it exited instead.

        Raises:
            LaunchError: the value cannot be unpickled in this process.
        """
        result = self._results[local_rank]
        if os.fstat(result).st_size == 0:
            return None
        kind = "unknown"
        try:
            with open(f"/proc/self/fd/{result}", "rb") as file:
                kind = pickle.load(file)
                return pickle.load(file)
        except Exception as error:
            raise LaunchError(
                f"local rank {local_rank} returned a value of type {kind}, which cannot be read in this process: "
                f"{type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """Close the memory files."""
        for fd in [*self._results.values(), *(payload for payload, _ in self._payloads.values())]:
            os.close(fd)
        if self._preparation >= 0:
            os.close(self._preparation)
        self._results, self._payloads, self._preparation = {}, {}, -1

    def _fork_keeper(self, environ: Mapping[str, str], inherited: tuple[int, ...]) -> int:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError, OSError):  # it does not exist, or is closed or full
                stream.flush()  # otherwise each worker would write what is in the buffer
        pid = os.fork()
        if pid == 0:  # become what ``execute_keeper`` would have started, but with this program's memory
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - {signal.SIGCHLD})
                signal.set_wakeup_fd(-1)
                os.setsid()
                sock, agent = inherited
                function_main.serve_functions(sock, agent, environ, self._processes)
            finally:
                os._exit(70)
        return pid


def _python() -> list[str]:
    from multiprocessing import spawn, util

    return [os.fsdecode(spawn.get_executable()), *util._args_from_interpreter_flags(), "-u"]  # type: ignore[attr-defined]


def _tracker() -> list[int]:
    """Return the descriptor of this program's resource tracker, if it has one. If not, each worker starts its own."""
    if "multiprocessing.resource_tracker" not in sys.modules:
        return []
    from multiprocessing import resource_tracker

    number = resource_tracker._resource_tracker._fd  # type: ignore[attr-defined]
    return [] if number is None else [int(number)]


def _pickled(value: object) -> tuple[int, list[int]]:
    """Pickle a value for a worker. Returns a memory file, and the descriptors that the pickle refers to."""
    from multiprocessing import context, popen_spawn_posix, reduction

    referred: list[int] = []

    class Popen:
        """What multiprocessing's objects use, while they are pickled, to send their descriptors."""

        DupFd = popen_spawn_posix._DupFd

        @staticmethod
        def duplicate_for_child(fd: int) -> int:
            referred.append(fd)
            return fd

    buffer = io.BytesIO()
    context.set_spawning_popen(Popen())  # type: ignore[arg-type]
    try:
        reduction.dump(value, buffer)
    finally:
        context.set_spawning_popen(None)
    fd = memory_file("pickle")
    with open(fd, "wb", closefd=False) as file:
        file.write(buffer.getbuffer())
    return fd, referred


def _explain(fn: Callable[..., Any], start_method: str, error: Exception) -> str:
    """Say why a function cannot be sent to the workers, and what to do."""
    name = callable_name(fn)
    if isinstance(error, RuntimeError) and "bootstrapping phase" in str(error):
        return (
            f"entrypoint {name}: a worker that imports this module would launch workers itself; "
            "put the launch under if __name__ == '__main__':"
        )
    return (
        f"entrypoint {name}: cannot be sent to workers with start_method={start_method!r}: "
        f"{type(error).__name__}: {error}; define it at the top level of a module, or use start_method='fork'"
    )
