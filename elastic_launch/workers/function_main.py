"""Layer 2: what runs in the process of a worker that is a function.

As a program, with the numbers of inherited descriptors:

    python function_main.py PREPARATION FUNCTION RESULT [TRACKER]

``multiprocessing`` makes the process what its own children are (``BaseProcess._bootstrap``): a function that asks it
for its name, its parent or its queues finds what it knows. The program imports nothing of elastic_launch before the
module search path is that of the program that launches.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from multiprocessing import process, spawn
from typing import Any, NoReturn

DUMP_SIGNAL = 63
"""As in ``keeper_main``."""


class FunctionProcess(process.BaseProcess):
    """A worker, as multiprocessing sees it."""

    def __init__(self, name: str, start_method: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(name=name, target=fn, args=args)
        self._start_method = start_method
        self.result = -1
        """The descriptor of the memory file for what the function returns."""

    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> NoReturn:  # noqa: N802 - multiprocessing's name
        raise NotImplementedError("its keeper starts it")

    def run(self) -> None:
        """Call the function, and hand over what it returns, or keep what it raises for the report."""
        # What the function changes in the environment changes none of this; and a child that it forks is no worker.
        pid, rank, error_file = os.getpid(), os.environ.get("RANK", "?"), os.environ.get("TORCHELASTIC_ERROR_FILE")
        self._file = os.fstat(self.result)
        try:
            value = self._target(*self._args)  # type: ignore[attr-defined]
            if value is not None and os.getpid() == pid:
                self._hand_over(value, rank)
        except BaseException as error:
            if os.getpid() == pid and not (isinstance(error, SystemExit) and isinstance(error.code, int | None)):
                keep(error, error_file)
            raise

    def _hand_over(self, value: Any, rank: str) -> None:
        """Write the value's type, for the case that it cannot be read, and the value."""
        kind = type(value).__qualname__
        try:
            with open(self._checked_result(), "wb", closefd=False) as file:
                pickle.dump(kind, file)
                pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise TypeError(
                f"rank {rank} returned a value of type {kind}, which cannot be handed over: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _checked_result(self) -> int:
        """The descriptor, if it still is what it was: the function may have closed it and opened another."""
        try:
            now = os.fstat(self.result)
        except OSError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != (self._file.st_dev, self._file.st_ino):
            raise OSError("the function has closed the descriptor that was to take it")
        return self.result


def keep(error: BaseException, path: str | None) -> None:
    """Write what the worker died of to its error file, if it has one and that can be done."""
    try:
        from elastic_launch.workers.error_handler import write_error

        if path:
            write_error(error, path)
    except Exception:  # a full disk, say: the function's own failure is the one to tell
        return


def run(load: Callable[[], FunctionProcess], result: int) -> int:
    """Be the worker, and return its exit status."""
    faulthandler.register(DUMP_SIGNAL, file=2, all_threads=True)
    try:
        worker = load()
    except BaseException as error:  # a module that cannot be imported here, most likely
        keep(error, os.environ.get("TORCHELASTIC_ERROR_FILE"))
        import traceback

        traceback.print_exc()
        return 1
    worker.result = result
    parent = os.pidfd_open(os.getppid())
    try:
        return worker._bootstrap(parent_sentinel=parent)  # type: ignore[attr-defined, no-any-return]
    except Exception:  # multiprocessing could not show the function's exception: sys.stderr is None, closed or full
        return 1


def load_pickled(preparation: int, payload: int) -> FunctionProcess:
    """Prepare a fresh process, as multiprocessing does, and read what it is to run."""
    process.current_process()._inheriting = True  # type: ignore[attr-defined]
    try:
        spawn.prepare(read(preparation))
        worker = read(payload)
    finally:
        del process.current_process()._inheriting  # type: ignore[attr-defined]
    return worker  # type: ignore[no-any-return]


def read(memory_file: int) -> Any:
    """Read a pickle; the file's position is not touched, since other workers share it."""
    with open(f"/proc/self/fd/{memory_file}", "rb") as file:
        return pickle.load(file)


def use_tracker(numbers: list[int]) -> None:
    """Share the resource tracker of the program that launches, if it has one."""
    if numbers:
        from multiprocessing import resource_tracker

        (resource_tracker._resource_tracker._fd,) = numbers  # type: ignore[attr-defined]


def serve_functions(
    sock: int, agent: int, environ: Mapping[str, str], workers: Mapping[int, FunctionProcess]
) -> NoReturn:
    """Be a keeper that forks its workers from this process.

    Args:
        sock: as for ``keeper_main.main``.
        agent: as for ``keeper_main.main``.
        environ: what workers inherit.
        workers: by local rank.
    """
    from elastic_launch.workers import forked, keeper_main

    environment = {os.fsencode(name): os.fsencode(value) for name, value in environ.items()}
    try:
        keeper_main.serve(sock, agent, environment, forks=True)
    except keeper_main.Forked as order:
        local_rank, environment, descriptors = order.order[0], order.environment, order.descriptors
    (result,) = (fd for fd in descriptors if fd > 2)  # the others are standard streams
    forked.like_executed(environment)
    if len(descriptors) > 1:
        forked.buffer_lines()
    os._exit(run(lambda: workers[local_rank], result))


def main(arguments: list[str]) -> NoReturn:
    """Be the worker."""
    numbers = list(map(int, arguments))
    for fd in numbers:
        os.set_inheritable(fd, False)
    preparation, payload, result, *tracker = numbers
    use_tracker(tracker)
    sys.exit(run(lambda: load_pickled(preparation, payload), result))


if __name__ == "__main__":
    main(sys.argv[1:])
