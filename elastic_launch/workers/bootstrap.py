"""The file a Python worker starts under: it runs the user's program and keeps what the program dies of.

    python -u .../bootstrap.py script SCRIPT ARGS...
    python -u .../bootstrap.py module MODULE ARGS...

The program sees what `python -u SCRIPT ARGS...` or `python -u -m MODULE ARGS...` would show it: arguments, `__main__`,
`sys.path`, modules, tracebacks, exit status. An exception that nobody catches is also written to the file named by
TORCHELASTIC_ERROR_FILE, in the format of torch's `record`, and only by the process that started here.

It may touch the interpreter it runs in and that one file. It must not import from this package nor, before the program
runs, anything that Python has not loaded by itself; and it must run on every Python that a user may choose (3.8 on).
One frame of it stays below the program's. Tracebacks do not show it; `traceback.print_stack()` in the program does.
"""

import os
import sys

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost every worker milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, TracebackType
    from typing import Any, TextIO

importlib = sys.modules["_frozen_importlib_external"]  # what importlib.machinery is made of, without importing it


def set_main() -> None:
    """Put a `__main__` in place that nothing has run in yet, as Python does before it looks at the program."""
    main = type(sys)("__main__")
    main.__loader__ = sys.__loader__
    # Which of these a `__main__` starts with depends on Python's version.
    vars(main).update({name: globals()[name] for name in ("__annotations__", "__builtins__") if name in globals()})
    sys.modules["__main__"] = main


def set_path(program: str, is_module: bool, is_safe: bool) -> "str | None":
    """Set `sys.path[0]`; return the script to run, None where runpy is to find the program on that path."""
    try:
        here = os.getcwd()
    except OSError:
        here = ""  # somebody has removed it: Python does without
    if is_module:
        if here and not is_safe:
            sys.path.insert(0, here)
        return None
    file = program
    if here and sys.version_info >= (3, 9) and not os.path.isabs(program):
        file = f"{here}/{program}"
    if importlib.PathFinder.find_spec("__main__", [file]) is not None:  # a folder or a zip file
        sys.path.insert(0, file)
        return None
    if not is_safe:
        sys.path.insert(0, os.path.dirname(os.path.realpath(file)))
    return file


def load(file: str) -> "CodeType":
    """Read a script, source or compiled, and set in `__main__` where it comes from."""
    main = sys.modules["__main__"]
    vars(main).update(__file__=file, __cached__=None)
    code: CodeType
    try:
        with open(file, "rb") as stream:
            content = stream.read()
        if file.endswith(".pyc") or content[:2] == importlib.MAGIC_NUMBER[:2]:
            main.__loader__ = loader = importlib.SourcelessFileLoader("__main__", file)
            code = loader.get_code("__main__")
        else:
            main.__loader__ = importlib.SourceFileLoader("__main__", file)
            code = compile(content, file, "exec", dont_inherit=True)
    except Exception as error:
        keep(error)
        # Only Python, reading the file by itself, has the words and the exit status for all that can be wrong with it.
        os.execv(sys.executable, command)
    return code


def strip(tb: "TracebackType | None") -> "TracebackType | None":
    """Return the part of a traceback that plain Python would have."""
    while tb is not None and tb.tb_frame.f_globals is globals():
        tb = tb.tb_next
    return tb


def shortened(text: str) -> str:
    """Return at most a million characters of a text: its two ends."""
    half = 500000
    if len(text) <= 2 * half:
        return text
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def write(error: BaseException, path: str) -> None:
    """Write the error file, as a whole or not at all."""
    import time

    now = time.time()
    search, sys.path = sys.path, library  # the script's folder may hold a json.py or a tokenize.py of its own
    try:
        import json
        import traceback
    finally:
        sys.path = search
    record = passed_on(error, json.load)
    if record is None:
        try:
            text = str(error)
        except Exception:
            text = "<exception str() failed>"
        line = f"{type(error).__name__}: {text}"
        stack = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        if isinstance(error, SystemExit):
            stack = line  # all that Python shows of it
        extra = {"py_callstack": shortened(stack), "timestamp": str(int(now)), "time": now, "session": os.getsid(0)}
        record = {"message": {"message": shortened(line), "extraInfo": extra}}
    content = json.dumps(record)
    beside = f"{path}.{pid}"
    try:
        with open(beside, "w", encoding="ascii") as stream:
            stream.write(content)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def passed_on(error: BaseException, load: "Callable[[TextIO], Any]") -> "dict[str, Any] | None":
    """Return what the worker wrote that made a launcher fail, this one or torch's; None for any other error."""
    try:
        _, failure = getattr(error, "get_first_failure")()  # noqa: B009 - no usual exception has it
        with open(failure.error_file, encoding="utf-8") as stream:
            record: dict[str, Any] = load(stream)
        message = record["message"]
        message["errorCode"] = failure.exitcode
        extra = message["extraInfo"]
        extra.update(py_callstack=shortened(extra["py_callstack"]), session=os.getsid(0))
    except Exception:
        return None
    return record


def is_told(error: BaseException, path: str) -> bool:
    """Return whether this exception, and not an earlier one that the program survived, is in the error file."""
    if getattr(error, "_elastic_launch_error_file", None) == path:
        return True
    if not os.path.exists(path):
        return False
    search, sys.path = sys.path, library
    try:
        import json

        with open(path, encoding="utf-8") as stream:
            message = json.load(stream)["message"]
        # An error code stands in what a launcher below has passed on, which is likely to be why this one fails.
        return isinstance(message, str) or "errorCode" in message or message["message"].startswith(type(error).__name__)
    finally:
        sys.path = search


def keep(error: BaseException) -> None:
    """Write what the program died of, unless it is no failure, not this process's, or written already by `record`."""
    error.with_traceback(strip(error.__traceback__))
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return
    if error_file and os.getpid() == pid:
        try:
            if not is_told(error, error_file):
                write(error, error_file)
        except BaseException:  # a full disk, say: the program's own failure is the one to tell
            return


def answer_for_stacks() -> None:
    """Have Python write the stacks of all threads to stderr on the keeper's DUMP_SIGNAL."""
    import faulthandler

    faulthandler.register(63, file=2)
    del sys.modules["faulthandler"]  # the program finds what plain Python has loaded


def hide_bootstrap() -> None:
    """Let the excepthook that the program leaves behind see the traceback that plain Python would have."""
    hook = getattr(sys, "excepthook", sys.__excepthook__)

    def excepthook(kind: "type[BaseException]", value: BaseException, tb: "TracebackType | None") -> None:
        sys.excepthook = hook
        sys.last_traceback = tb = strip(tb)
        hook(kind, value.with_traceback(tb), tb)

    sys.excepthook = excepthook


if __name__ == "__main__":
    pid = os.getpid()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    is_module, program = sys.argv[1] == "module", sys.argv[2]
    command = getattr(sys, "orig_argv", [sys.executable, "-u", *sys.argv])  # how Python was started; 3.10 on
    command[-len(sys.argv) :] = ["-m", *sys.argv[2:]] if is_module else sys.argv[2:]
    sys.argv[:3] = ["-m" if is_module else program]
    is_safe = bool(getattr(sys.flags, "safe_path", sys.flags.isolated))  # 3.11 on, where isolated implies it
    if not is_safe:
        del sys.path[0]  # this file's folder
    sys.path_importer_cache.pop(__file__, None)
    answer_for_stacks()
    library = sys.path[:]
    set_main()
    try:
        if (file := set_path(program, is_module, is_safe)) is not None:
            exec(load(file), vars(sys.modules["__main__"]))
        else:
            import runpy

            # What `python -m`, `python FOLDER` and `python ZIP` call; runpy's public functions leave `__main__` alone.
            getattr(runpy, "_run_module_as_main")(program if is_module else "__main__", is_module)  # noqa: B009
    except BaseException as error:
        keep(error)
        if sys.version_info < (3, 11) and not isinstance(error, SystemExit):
            hide_bootstrap()  # later versions raise it with the traceback that keep() has left it
        # From here on Python does as ever: it knows the exit status, the signal and the words for each exception.
        raise
