"""Run a function as a worker's process.

As a program, with the numbers of inherited descriptors:

    python function_main.py PREPARATION FUNCTION RESULT [TRACKER]

``multiprocessing`` sets the process up as it does its own children (``BaseProcess._bootstrap``), so the function finds
its process name, its parent and its queues. The program imports nothing of elastic_launch until it has the launching
program's module search path.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from importlib import util
from multiprocessing import process, spawn
from typing import Any, NoReturn

DUMP_SIGNAL = 63
"""The same as in ``keeper_main``."""


class FunctionProcess(process.BaseProcess):
    """A worker as multiprocessing sees it."""

    def __init__(self, name: str, start_method: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(name=name, target=fn, args=args)
        self._start_method = start_method
        self.result = -1
        """The descriptor of the memory file for the return value."""

    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> NoReturn:  # noqa: N802 - multiprocessing's name
        raise NotImplementedError("the keeper starts this process")

    def run(self) -> None:
        """Call the function. Write its return value for the agent, or its exception to the error file."""
        # Taken now: the function may change the environment, and a child that it forks is not a worker.
        pid, rank, error_file = os.getpid(), os.environ.get("RANK", "?"), os.environ.get("TORCHELASTIC_ERROR_FILE")
        self._file = os.fstat(self.result)
        try:
            value = self._target(*self._args)  # type: ignore[attr-defined]
            if value is not None and os.getpid() == pid:
                self._write_result(value, rank)
        except BaseException as error:
            if os.getpid() == pid and not (isinstance(error, SystemExit) and isinstance(error.code, int | None)):
                record_failure(error, error_file)
            raise

    def _write_result(self, value: Any, rank: str) -> None:
        """Write the value's type, for the message if the agent cannot read the value, and then the value."""
        kind = type(value).__qualname__
        try:
            with open(self._checked_result(), "wb", closefd=False) as file:
                pickle.dump(kind, file)
                pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise TypeError(
                f"rank {rank} returned a value of type {kind}, which cannot be sent to the launcher: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _checked_result(self) -> int:
        """Return the descriptor.

        Raises:
            OSError: the function has closed it; its number may belong to another file now.
        """
        try:
            now = os.fstat(self.result)
        except OSError:
            now = None
        if now is None or not os.path.samestat(now, self._file):
            raise OSError("the function has closed the descriptor for its return value")
        return self.result


def record_failure(error: BaseException, path: str | None) -> None:
    """Write the exception that ends the worker to its error file, if it has one. Ignores errors."""
    try:
        from elastic_launch.workers.error_handler import write_error

        if path:
            write_error(error, path)
    except Exception:  # a full disk, for example: the function's own failure is the one to show
        return


def run(load: Callable[[], FunctionProcess], result: int) -> int:
    """Run the worker that ``load`` returns, and return its exit status.

    Args:
        load: gets the worker.
        result: the descriptor of the memory file for the return value.
    """
    bootstrap = import_bootstrap()
    memory, stack_file = bootstrap.open_memory()
    faulthandler.register(DUMP_SIGNAL, file=stack_file, all_threads=True)
    if memory >= 0:
        bootstrap.watch_for_torch()
    try:
        worker = load()
    except BaseException as error:  # most likely a module that cannot be imported here
        record_failure(error, os.environ.get("TORCHELASTIC_ERROR_FILE"))
        import traceback

        traceback.print_exc()
        return 1
    worker.result = result
    parent = os.pidfd_open(os.getppid())
    try:
        return worker._bootstrap(parent_sentinel=parent)  # type: ignore[attr-defined, no-any-return]
    except Exception:  # multiprocessing could not print the function's exception: sys.stderr is None, closed or full
        return 1


def import_bootstrap() -> Any:
    """Import what is shared with workers that run a script. The package need not be on the search path yet."""
    spec = util.spec_from_file_location("bootstrap", os.path.join(os.path.dirname(__file__), "bootstrap.py"))
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_worker(preparation: int, payload: int) -> FunctionProcess:
    """Prepare a new process as multiprocessing does, and unpickle the worker."""
    process.current_process()._inheriting = True  # type: ignore[attr-defined]
    try:
        spawn.prepare(unpickle(preparation))
        worker = unpickle(payload)
    finally:
        del process.current_process()._inheriting  # type: ignore[attr-defined]
    return worker  # type: ignore[no-any-return]


def unpickle(memory_file: int) -> Any:
    """Read a pickle. The descriptor's position does not move: other workers share it."""
    with open(f"/proc/self/fd/{memory_file}", "rb") as file:
        return pickle.load(file)


def serve_functions(
    sock: int, agent: int, environ: Mapping[str, str], workers: Mapping[int, FunctionProcess]
) -> NoReturn:
    """Be a keeper that forks its workers from this process.

    Args:
        sock: as for ``keeper_main.main``.
        agent: as for ``keeper_main.main``.
        environ: the environment that the workers inherit.
        workers: the workers, by local rank.
    """
    from elastic_launch.workers import forked, keeper_main, standby

    environment = {os.fsencode(name): os.fsencode(value) for name, value in environ.items()}
    try:
        keeper_main.serve(sock, agent, environment, standby.StandbyPool(environment))
    except standby.ForkedWorker as forked_worker:
        worker = forked_worker.with_traceback(None)
    forked.reset_handlers({})
    worker.take_order()
    forked.become_program(worker.environment)
    result, *others = worker.descriptors
    local_rank = worker.order[0]
    if {1, 2} & {*others}:
        forked.use_line_buffering()
    worker.wait()
    os._exit(run(lambda: workers[local_rank], result))


def main(arguments: list[str]) -> NoReturn:
    """Be the worker."""
    descriptors = list(map(int, arguments))
    for fd in descriptors:
        os.set_inheritable(fd, False)
    preparation, payload, result, *tracker = descriptors
    if tracker:  # that of the launching program, if it has one
        from multiprocessing import resource_tracker

        (resource_tracker._resource_tracker._fd,) = tracker  # type: ignore[attr-defined]
    sys.exit(run(lambda: load_worker(preparation, payload), result))


if __name__ == "__main__":
    main(sys.argv[1:])
