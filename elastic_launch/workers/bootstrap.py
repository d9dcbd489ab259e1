"""Run a Python worker's program, and write the exception that ends it to the worker's error file.

    python -u .../bootstrap.py script SCRIPT ARGS...
    python -u .../bootstrap.py module MODULE ARGS...

The program sees what `python -u SCRIPT ARGS...` or `python -u -m MODULE ARGS...` would show it: arguments, `__main__`,
`sys.path`, modules, tracebacks, exit status. An uncaught exception is also written to the file that
TORCHELASTIC_ERROR_FILE names, in the format of torch's `record`, but only by the process that started here.

This file may run under another Python than the agent (PYTHON_EXEC), from 3.8 on. So it imports nothing of this package,
and, before the program runs, no module that Python has not loaded anyway. One of its frames stays below the program's.
Tracebacks do not show it; `traceback.print_stack()` in the program does.

`error_handler` imports this file for the parts that both need to write an error file.
"""

import os
import sys

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost every worker milliseconds
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import CodeType, TracebackType
    from typing import Any

    Record = dict[str, Any]
    """The content of an error file."""

importlib = sys.modules["_frozen_importlib_external"]  # what importlib.machinery is made of, without importing it

PROGRESS = "ELASTIC_LAUNCH_PROGRESS_FD"
MAGIC = b"ELPROG1\0"
STACKS = 3
"""The variable that names the memory for progress, its first bytes, and the word that says whether stacks go there."""
STEP_HOOK = "_elastic_launch_step_hook"
"""The name of the module that counts steps."""
MAX_TEXT = 1000000
"""Characters of a text that an error file holds at most."""


# ---- the program


def create_main_module() -> None:
    """Replace `__main__` by an empty module, as Python has it before it looks at the program."""
    main = type(sys)("__main__")
    main.__loader__ = sys.__loader__
    # Which of these a `__main__` starts with depends on Python's version.
    vars(main).update({name: globals()[name] for name in ("__annotations__", "__builtins__") if name in globals()})
    sys.modules["__main__"] = main


def locate(program: str, is_module: bool, is_safe: bool) -> "tuple[str | None, str]":
    """Find the program as Python does.

    Returns:
        The script to run, or None if runpy finds the program on the module search path; and what Python puts in front
        of that path, or "" for nothing.
    """
    try:
        here = os.getcwd()
    except OSError:
        here = ""  # the directory has been removed; Python goes on without it
    if is_module:
        return None, "" if is_safe else here
    file = program
    if here and sys.version_info >= (3, 9) and not os.path.isabs(program):
        file = f"{here}/{program}"
    if importlib.PathFinder.find_spec("__main__", [file]) is not None:  # a directory or a zip file
        return None, file
    return file, "" if is_safe else os.path.dirname(os.path.realpath(file))


def load_script(file: str) -> "CodeType":
    """Read a script, source or compiled, and set the attributes of `__main__` that say where it comes from."""
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
            # A warm keeper may have compiled it for all workers.
            source, compiled = globals().get("compiled_ahead", {}).get(file, (None, None))
            code = compiled if source == content else compile(content, file, "exec", dont_inherit=True)
    except Exception as error:
        record_failure(error)
        # Start over with plain Python: only that has the message and the exit status for all that can be wrong here.
        os.execv(sys.executable, command)
    return code


# ---- its progress


def open_memory() -> "tuple[int, int]":
    """Find the memory that the agent made for this worker.

    Returns:
        Its descriptor, or -1; and the descriptor to write stacks to, which is stderr unless the agent reads the memory.
    """
    if os.environ.get("ELASTIC_LAUNCH_PROGRESS") == "0":
        return -1, 2
    try:
        memory = int(os.environ.get(PROGRESS, "").partition(",")[0])
        head = os.pread(memory, 8 * (STACKS + 1), 0)
    except (OSError, ValueError):
        return -1, 2
    if not head.startswith(MAGIC):  # the number belongs to another file now
        return -1, 2
    return memory, memory if any(head[8 * STACKS :]) else 2


def register_stack_dump(file: int) -> None:
    """Have Python write the stacks of all threads to a descriptor on the keeper's DUMP_SIGNAL."""
    is_loaded = "faulthandler" in sys.modules  # by what was preloaded
    import faulthandler

    faulthandler.register(63, file=file)
    if not is_loaded:
        del sys.modules["faulthandler"]  # the program finds loaded what plain Python has loaded


class TorchFinder:
    """Looks on while modules are imported. Once torch's optimizers are there, it has their steps counted, and leaves.

    Importing torch imports further modules after those, so there is always a next time to look.
    """

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        """Find nothing. After the last look, ask the other finders, because the import skips one when this leaves."""
        if not has_optimizers() or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        count_steps()
        spec: ModuleSpec | None = sys.modules["_frozen_importlib"]._find_spec(name, path, target)
        return spec


def watch_for_torch() -> None:
    """Have the steps of torch's optimizers counted, now or when the program imports them."""
    if has_optimizers():
        count_steps()
    else:
        sys.meta_path.insert(0, TorchFinder())


def has_optimizers() -> bool:
    """Return whether the base class of torch's optimizers has been imported."""
    return hasattr(sys.modules.get("torch.optim.optimizer"), "Optimizer")


def count_steps() -> None:
    """Count the steps of torch's optimizers. If that fails, the program runs as it would without."""
    try:
        load_step_hook()
        sys.modules[STEP_HOOK].count_steps(sys.modules["torch.optim.optimizer"])
    except Exception:
        return


def load_step_hook() -> None:
    """Import what counts steps, unless the warm keeper that this process was forked from has done so."""
    if STEP_HOOK not in sys.modules:
        spec = importlib.spec_from_file_location(STEP_HOOK, os.path.join(os.path.dirname(__file__), "step_hook.py"))
        # torch.compile looks a function's module up by its name.
        sys.modules[STEP_HOOK] = hook = sys.modules["_frozen_importlib"].module_from_spec(spec)
        spec.loader.exec_module(hook)


# ---- its failure


def strip(tb: "TracebackType | None") -> "TracebackType | None":
    """Return a traceback without the frames of this file at its head."""
    while tb is not None and tb.tb_frame.f_globals is globals():
        tb = tb.tb_next
    return tb


def hide_bootstrap() -> None:
    """Have the program's excepthook see the traceback that plain Python would show it."""
    hook = getattr(sys, "excepthook", sys.__excepthook__)

    def excepthook(kind: "type[BaseException]", value: BaseException, tb: "TracebackType | None") -> None:
        sys.excepthook = hook
        sys.last_traceback = tb = strip(tb)
        hook(kind, value.with_traceback(tb), tb)

    sys.excepthook = excepthook


def record_failure(error: BaseException) -> None:
    """Write the exception that ends the program to its error file.

    An exit status is not written, nor the exception of a forked child, nor one that was written before.
    """
    tb = strip(sys.exc_info()[2])  # a class may hide its __traceback__, and have a with_traceback of its own
    BaseException.with_traceback(error, tb)
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return
    if not error_file or os.getpid() != pid:
        return
    try:
        import time

        now = time.time()
        search, sys.path = sys.path, library  # the script's directory may hold a json.py or a tokenize.py of its own
        try:
            import json  # noqa: F401 - for what is called below, as the next one
            import traceback  # noqa: F401
        finally:
            sys.path = search
        if not is_recorded(error, error_file):
            write_record(root_cause(error) or describe(error, tb, now), error_file)
    except BaseException:  # a full disk, for example: the program's own failure is the one to show
        return


def is_recorded(error: BaseException, path: str) -> bool:
    """Return whether the error file is about this exception, and not about an earlier one that was caught."""
    if getattr(error, "_elastic_launch_error_file", None) == path:
        return True
    if not os.path.exists(path):
        return False
    message = read_record(path)["message"]
    # A launcher below this worker leaves an error code there. It is likely to be why this worker fails.
    return isinstance(message, str) or "errorCode" in message or message["message"].startswith(type(error).__name__)


# ---- shared with error_handler


def shortened(text: str) -> str:
    """Return at most MAX_TEXT characters of a text. Its two ends are worth more than its middle."""
    half = MAX_TEXT // 2
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:half]}\n... {len(text) - MAX_TEXT} characters left out ...\n{text[-half:]}"


def describe(error: BaseException, tb: "TracebackType | None", now: float) -> "Record":
    """Return the record of an exception with a traceback, raised at a time in seconds since 1970."""

    try:
        text = str(error)
    except Exception:
        text = "<exception str() failed>"
    line = f"{type(error).__name__}: {text}"
    # Python shows no more of a SystemExit either.
    stack = line if isinstance(error, SystemExit) else format_exception(error, tb, line)
    extra = {"py_callstack": shortened(stack), "timestamp": str(int(now)), "time": now, "session": os.getsid(0)}
    return {"message": {"message": shortened(line), "extraInfo": extra}}


def format_exception(error: BaseException, tb: "TracebackType | None", line: str) -> str:
    """Return the traceback of an exception that ends with ``line``, as Python shows it; or what of it can be had."""
    import traceback

    for chain in (True, False):
        try:
            return "".join(traceback.format_exception(type(error), error, tb, chain=chain))
        except Exception:
            continue
    return "".join(["Traceback (most recent call last):\n", *traceback.format_tb(tb), line, "\n"])


def root_cause(error: BaseException) -> "Record | None":
    """Return the record of the worker that made a launcher fail, ours or torch's.

    Returns:
        None for any other exception, or if nothing is known about that worker.
    """
    try:
        _, failure = getattr(error, "get_first_failure")()  # noqa: B009 - ordinary exceptions do not have it
        try:
            record = read_record(failure.error_file)
        except (OSError, ValueError):
            if not failure.error:  # only our launcher's failures may have it without a file, from another host
                return None
            record = dict(failure.error_file_data)
        if isinstance(record["message"], dict):
            record["message"] = {**record["message"], "errorCode": failure.exitcode}
    except Exception:
        return None
    return record


def read_record(path: str) -> "Record":
    """Read a worker's error file, so that it can be written as this worker's.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not an error file.
    """
    import json

    with open(path, encoding="utf-8", errors="replace", opener=_open_regular) as stream:
        record = json.load(stream)
    if not isinstance(record, dict) or "message" not in record:
        raise ValueError(f"{path}: not an error file: it has no message")
    message = record["message"]
    if isinstance(message, dict) and isinstance(extra := message.get("extraInfo"), dict):
        extra.update(py_callstack=shortened(str(extra.get("py_callstack", ""))), session=os.getsid(0))
    return record


def _open_regular(path: str, flags: int) -> int:
    """Open a file. A pipe could make this process wait, and a link could lead it elsewhere."""
    import stat

    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path}: not a regular file")
    return fd


def write_record(record: "Record", path: str) -> None:
    """Write an error file, completely or not at all.

    Raises:
        OSError: it cannot be written.
    """
    import json

    content = json.dumps(record)
    temporary = f"{path}.{os.getpid()}"
    try:
        if os.path.lexists(temporary):  # left by a process with the same pid, or planted
            os.unlink(temporary)
        with open(temporary, "x", encoding="ascii") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


if __name__ == "__main__":
    pid = os.getpid()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    is_module, program = sys.argv[1] == "module", sys.argv[2]
    command = getattr(sys, "orig_argv", [sys.executable, "-u", *sys.argv])  # how Python was started; since 3.10
    command[-len(sys.argv) :] = ["-m", *sys.argv[2:]] if is_module else sys.argv[2:]
    sys.argv[:3] = ["-m" if is_module else program]
    is_safe = bool(getattr(sys.flags, "safe_path", sys.flags.isolated))  # since 3.11, where isolated implies it
    if not is_safe:
        del sys.path[0]  # this file's directory
    sys.path_importer_cache.pop(__file__, None)
    memory, stack_file = open_memory()
    register_stack_dump(stack_file)
    if memory >= 0:
        watch_for_torch()
    library = sys.path[:]
    create_main_module()
    try:
        file, path_entry = locate(program, is_module, is_safe)
        if path_entry:
            sys.path.insert(0, path_entry)
        if file is not None:
            exec(load_script(file), vars(sys.modules["__main__"]))
        else:
            import runpy

            # What `python -m`, `python DIRECTORY` and `python ZIP` call; the public functions do not set `__main__`.
            getattr(runpy, "_run_module_as_main")(program if is_module else "__main__", is_module)  # noqa: B009
    except BaseException as error:
        record_failure(error)
        if sys.version_info < (3, 11) and not isinstance(error, SystemExit):
            hide_bootstrap()  # later versions raise it with the traceback that record_failure() gave it
        raise  # to Python, which knows the exit status, the signal and the message for each exception
