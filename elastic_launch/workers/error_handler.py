"""Layer 2: what a worker tells of the exception that ends it: torch's ``record`` and its error file, without torch.

This runs in workers. It may read TORCHELASTIC_ERROR_FILE and write the file of that name, which agents read, torchrun's
too. It must not come between a worker and its own failure: what goes wrong here is passed over, and the exception, its
traceback on stderr and the exit status stay as they are. It must import next to nothing before a worker fails.
``workers/bootstrap.py`` writes the same for scripts that know nothing of it; it must stand alone, so it repeats some.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import sys

from elastic_launch.core.text import shortened

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost every worker milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

_VARIABLE = "TORCHELASTIC_ERROR_FILE"
_MARK = "_elastic_launch_error_file"
"""Attribute of an exception that is written already: where."""

_MAX = 1_000_000
"""Characters of a text that are written: its ends tell more than its middle."""


def record(fn: Callable[P, R], error_handler: ErrorHandler | None = None) -> Callable[P, R | None]:
    """Decorate a worker's main function: an exception that leaves it is written to the worker's error file.

    The exception goes on as it is. ``sys.exit(0)`` returns None; another exit status is no exception to be told, nor
    is KeyboardInterrupt. A ``ChildFailedError``, of this launcher or of torch's, passes on what its root cause wrote.

    Args:
        fn: the function.
        error_handler: what writes; ``get_error_handler()`` by default.
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
                _tell(handler, error)
            raise

    return recorded


class ErrorHandler:
    """What ``record`` calls; the names are torch's, for classes derived from it."""

    def initialize(self) -> None:
        """Before the function runs: have Python show all stacks when a signal such as SIGSEGV kills the worker."""
        if not faulthandler.is_enabled():
            with contextlib.suppress(Exception):  # stderr may be closed, or no file
                faulthandler.enable(all_threads=True)

    def record_exception(self, e: BaseException) -> None:
        """Write an exception to the worker's error file; nothing where there is none, or it cannot be written."""
        if path := os.environ.get(_VARIABLE):
            write_error(e, path)

    def override_error_code_in_rootcause_data(
        self, rootcause_error_file: str, rootcause_error: dict[str, Any], error_code: int = 0
    ) -> None:
        """Put the exit code of a worker into what it wrote, ``rootcause_error``; a message without fields stays."""
        if isinstance(message := rootcause_error.get("message"), dict):
            message["errorCode"] = error_code

    def dump_error_file(self, rootcause_error_file: str, error_code: int = 0) -> None:
        """Copy a worker's error file to this process's own, which is a worker of another launcher.

        Args:
            rootcause_error_file: the worker's.
            error_code: its exit code, or minus the signal's number; 0 leaves out what is unknown.

        Raises:
            OSError: one of the files cannot be read or written.
            ValueError: the worker's is no error file.
        """
        content = _read(rootcause_error_file)
        if error_code:
            self.override_error_code_in_rootcause_data(rootcause_error_file, content, error_code)
        if path := os.environ.get(_VARIABLE):
            _write(content, path)


def get_error_handler() -> ErrorHandler:
    """The handler that ``record`` uses by default."""
    return ErrorHandler()


def write_error(error: BaseException, path: str) -> None:
    """Write what ends this worker to an error file: as a whole or not at all, once, and without raising anything.

    An exception that is written there already, by the innermost ``record`` of several, is not written again; another
    one takes its place: the worker has survived the first. For a ``ChildFailedError`` its root cause is written.

    Args:
        error: the exception, as caught; frames of this package at the head of its traceback are left out.
        path: the file.
    """
    with contextlib.suppress(BaseException):  # a full disk, say: the worker's own failure is the one to tell
        if vars(error).get(_MARK) != path:
            _write(_root_cause(error) or _described(error), path)
            vars(error)[_MARK] = path


def _tell(handler: ErrorHandler, error: Exception) -> None:
    """Hand an exception to a handler that may be a user's, and fail."""
    try:
        if (first_failure := getattr(error, "get_first_failure", None)) is not None:
            _, failure = first_failure()
            with contextlib.suppress(OSError, ValueError):  # it has no file, or that of another host
                handler.dump_error_file(failure.error_file, failure.exitcode)
                return
        handler.record_exception(error)
    except Exception as problem:
        with contextlib.suppress(Exception):
            sys.stderr.write(f"elastic_launch: {handler!r} could not record the exception: {problem!r}\n")


def _root_cause(error: BaseException) -> dict[str, Any] | None:
    """What the worker wrote that made a launcher fail; None for any other error, and where nothing is known."""
    if (first_failure := getattr(error, "get_first_failure", None)) is None:
        return None
    _, failure = first_failure()
    try:
        content = _read(failure.error_file)
    except (OSError, ValueError):
        if not getattr(failure, "error", ""):
            return None
        content = failure.error_file_data
    get_error_handler().override_error_code_in_rootcause_data(failure.error_file, content, failure.exitcode)
    return content


def _described(error: BaseException) -> dict[str, Any]:
    import time
    import traceback

    now = time.time()
    try:
        text = str(error)
    except Exception:
        text = "<exception str() failed>"
    line = f"{type(error).__name__}: {text}"
    tb = _users_part(error.__traceback__) or error.__traceback__
    stack = "".join(traceback.format_exception(type(error), error, tb))
    if isinstance(error, SystemExit):
        stack = line  # all that Python shows of it
    extra = {"py_callstack": shortened(stack, _MAX), "timestamp": str(int(now)), "time": now, "session": os.getsid(0)}
    return {"message": {"message": shortened(line, _MAX), "extraInfo": extra}}


def _users_part(tb: TracebackType | None) -> TracebackType | None:
    """What is left of a traceback without the frames of this package at its head."""
    while tb is not None and str(tb.tb_frame.f_globals.get("__name__")).partition(".")[0] == "elastic_launch":
        tb = tb.tb_next
    return tb


def _read(path: str) -> dict[str, Any]:
    """Read the error file of another worker so that it can be written as this one's."""
    import json

    with open(path, encoding="utf-8", errors="replace") as file:
        content = json.load(file)
    if not isinstance(content, dict) or "message" not in content:
        raise ValueError(f"{path}: not an error file: it has no message")
    message = content["message"]
    if isinstance(message, dict) and isinstance(extra := message.get("extraInfo"), dict):
        extra["py_callstack"] = shortened(str(extra.get("py_callstack", "")), _MAX)
        extra["session"] = os.getsid(0)
    return content


def _write(content: dict[str, Any], path: str) -> None:
    import json

    text = json.dumps(content)
    beside = f"{path}.{os.getpid()}"
    try:
        with open(beside, "w", encoding="ascii") as file:
            file.write(text)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
