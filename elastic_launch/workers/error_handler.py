"""torch's ``record`` and its error file, without torch: what a worker reports of the exception that ends it.

This code runs in workers. It reads TORCHELASTIC_ERROR_FILE and writes the file of that name, which agents read,
torchrun's included. It must not get between a worker and its own failure: errors in here are ignored, and the
exception, its traceback on stderr and the exit status stay as they are. Before a worker fails, it imports next to
nothing. ``bootstrap`` does the same for programs that do not use ``record``, and has the parts that both share.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import sys

from elastic_launch.workers.bootstrap import describe, read_record, root_cause, write_record

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost every worker milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

_VARIABLE = "TORCHELASTIC_ERROR_FILE"
_MARK = "_elastic_launch_error_file"
"""Attribute of a recorded exception: the path of its error file. ``bootstrap`` knows it, too."""


def record(fn: Callable[P, R], error_handler: ErrorHandler | None = None) -> Callable[P, R | None]:
    """Decorate a worker's main function: write an exception that leaves it to the worker's error file.

    The exception passes through unchanged. ``sys.exit(0)`` returns None. Any other exit status is not recorded, nor is
    KeyboardInterrupt. For a ``ChildFailedError``, of this launcher or of torch's, the record of its root cause is
    written, if it has left one.

    Args:
        fn: the function.
        error_handler: writes the file; ``get_error_handler()`` by default.

    Example:
        >>> @record
        ... def main() -> None: ...
    """
    handler = error_handler or get_error_handler()

    @functools.wraps(fn)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        handler.initialize()
        pid = os.getpid()
        try:
            return fn(*args, **kwargs)
        except SystemExit as exit_:
            if exit_.code == 0:
                return None
            raise
        except Exception as error:
            if os.getpid() == pid:  # not in a child that fn has forked: its end is not the worker's
                _handle(handler, error)
            raise

    return recorded


class ErrorHandler:
    """What ``record`` calls. The method names are torch's, for the sake of subclasses."""

    def initialize(self) -> None:
        """Have Python show all stacks if a signal such as SIGSEGV kills the worker. Called before the function."""
        if not faulthandler.is_enabled():
            with contextlib.suppress(Exception):  # stderr may be closed, or not a file
                faulthandler.enable(all_threads=True)

    def record_exception(self, e: BaseException) -> None:
        """Write an exception to the worker's error file, if it has one. Ignores errors."""
        if path := os.environ.get(_VARIABLE):
            write_error(e, path)

    def override_error_code_in_rootcause_data(
        self, rootcause_error_file: str, rootcause_error: dict[str, Any], error_code: int = 0
    ) -> None:
        """Set a worker's exit code in its record, ``rootcause_error``, unless the record is a plain message."""
        if isinstance(message := rootcause_error.get("message"), dict):
            message["errorCode"] = error_code

    def dump_error_file(self, rootcause_error_file: str, error_code: int = 0) -> None:
        """Copy a worker's error file to the error file of this process, which is itself a worker of another launcher.

        Args:
            rootcause_error_file: the path of the worker's file.
            error_code: the worker's exit code, or the negative number of the signal that killed it; 0 if unknown.

        Raises:
            OSError: one of the files cannot be read or written.
            ValueError: the worker's file is not an error file.
        """
        content = read_record(rootcause_error_file)
        if error_code:
            self.override_error_code_in_rootcause_data(rootcause_error_file, content, error_code)
        if path := os.environ.get(_VARIABLE):
            write_record(content, path)


def get_error_handler() -> ErrorHandler:
    """Return the handler that ``record`` uses by default."""
    return ErrorHandler()


def write_error(error: BaseException, path: str) -> None:
    """Write the exception that ends this worker to an error file, completely or not at all. Never raises.

    An exception that was written already, by the innermost ``record`` of several, is not written again. Another one is
    replaced, because the worker has survived it. For a ``ChildFailedError`` the record of its root cause is written.

    Args:
        error: the exception. Frames of this package at the head of its traceback are left out.
        path: the path of the file.
    """
    with contextlib.suppress(BaseException):  # a full disk, for example: the worker's own failure is the one to show
        if vars(error).get(_MARK) != path:
            import time

            tb = _without_launcher(error.__traceback__) or error.__traceback__
            write_record(root_cause(error) or describe(error, tb, time.time()), path)
            vars(error)[_MARK] = path


def _handle(handler: ErrorHandler, error: Exception) -> None:
    """Pass an exception to a handler, which may be the user's and may fail."""
    try:
        if (first_failure := getattr(error, "get_first_failure", None)) is not None:
            _, failure = first_failure()
            try:
                handler.dump_error_file(failure.error_file, failure.exitcode)
            except (OSError, ValueError):  # the cause has no error file, or is on another host
                if root_cause(error):
                    handler.record_exception(error)
        else:
            handler.record_exception(error)
    except Exception as problem:
        with contextlib.suppress(Exception):
            sys.stderr.write(f"elastic_launch: {handler!r} could not record the exception: {problem!r}\n")


def _without_launcher(tb: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of this package at its head."""
    while tb is not None and str(tb.tb_frame.f_globals.get("__name__")).partition(".")[0] == "elastic_launch":
        tb = tb.tb_next
    return tb
