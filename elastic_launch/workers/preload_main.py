"""Layer 2: the warm keeper: a keeper that has imported modules, and forks workers that have them.

    python -u preload_main.py MODULE,... script|module|function|main TARGET PADDING SOCKET AGENT

SOCKET and AGENT are as for ``keeper_main``. The process imports the modules as the program TARGET would, and does
nothing else with them: any parallel operation of torch's before a fork makes the children hang. (For a function TARGET
is the descriptor of its preparation; ``main``: its main module is imported, too.) It refuses to be forked once a module
has started threads or opened a device, says which, and becomes an ordinary keeper. To the agent, besides what a keeper
says:

    ("warned", text)  -- workers will be cold
    ("broken", text)  -- a module cannot be imported

A worker is a fork that leaves all frames of the keeper (``keeper_main.Forked``) and then runs what its command would
run, ``bootstrap`` or ``function_main``. So the interpreter's end, with its exit status and ``atexit`` handlers, is its
own, too.
"""

import gc
import importlib.machinery
import os
import signal
import sys
import threading

FOLDER = os.path.dirname(__file__)
IS_SAFE = sys.flags.safe_path
if IS_SAFE:
    sys.path.insert(0, FOLDER)
import forked  # type: ignore[import-not-found]  # noqa: E402 - by that name: nobody knows where elastic_launch is
import keeper_main  # type: ignore[import-not-found]  # noqa: E402

if IS_SAFE:
    del sys.path[0]

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost milliseconds
if TYPE_CHECKING:
    from types import CodeType, TracebackType
    from typing import Any, NoReturn

    from elastic_launch.workers.keeper_main import Forked

DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/accel", "/dev/neuron", "/dev/habanalabs", "/dev/davinci")
"""Whoever has one of these open has started to use it."""


def main(modules: str, kind: str, target: str, sock: int, agent: int) -> "tuple[Forked, dict[int, Any]]":
    """Be the keeper; return in a worker only, with the signals' handlers that the modules have left."""
    is_function = kind in ("function", "main")
    keeper_main.close_others((sock, agent, *([int(target)] if is_function else [])))
    # An agent that is killed while modules are imported is not noticed otherwise.
    keeper_main.libc.prctl(keeper_main.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    own = first = "" if IS_SAFE else sys.path[0]
    data: dict[str, Any] = {}
    if is_function:
        data = prepare(int(target))
    else:
        first = first_on_path(kind, target)
        sys.path[: not IS_SAFE] = [first] if first else []
    sys.argv[:] = [target if kind == "script" else ""]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    variables = dict(os.environb)
    # What is to be collected among the hundred thousands of objects of a large import is not worth a tenth of its time.
    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    for module in filter(None, modules.split(",")):
        try:
            importlib.import_module(module)
        except BaseException as error:
            refuse(sock, f"--preload {module}: it cannot be imported", error)
        if why := why_not_to_fork():
            os.fchdir(here)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            refuse_to_fork(sock, agent, f"--preload {module}: it {why}")
    if kind == "main":
        import_main(data)
    if not is_function:
        if first and first in sys.path:  # a module may have put others before it
            sys.path.remove(first)
        if not IS_SAFE:
            sys.path.insert(0, own)
    # The program is found where it would be; what else the modules have set, the workers have, too.
    os.fchdir(here)
    os.close(here)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    handlers: dict[int, Any] = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    keeper_main.libc.prctl(keeper_main.PR_SET_PDEATHSIG, 0, 0, 0, 0)
    if gc.get_threshold()[0] == 0:  # else a module has set its own
        gc.set_threshold(*thresholds)
    # Not collected: what is freed here leaves holes in pages, and each worker copies the page that it fills one in.
    gc.freeze()  # the collector of a worker then leaves the pages alone that it shares
    worker: Forked
    try:
        keeper_main.serve(sock, agent, with_changes(variables), forks=True)
    except keeper_main.Forked as forked_off:
        worker = forked_off.with_traceback(None)
    return worker, handlers


def first_on_path(kind: str, target: str) -> str:
    """What ``bootstrap`` is going to put in front of the module search path; empty: nothing."""
    try:
        here = os.getcwd()
    except OSError:
        here = ""  # somebody has removed it
    if kind == "module":
        return "" if IS_SAFE else here
    file = os.path.join(here, target)
    if importlib.machinery.PathFinder.find_spec("__main__", [file]) is not None:  # a folder or a zip file
        return file
    return "" if IS_SAFE else os.path.dirname(os.path.realpath(file))


def prepare(preparation: int) -> "dict[str, Any]":
    """Set the module search path and the directory of the program that launches. Returns all that is known of it."""
    import pickle

    with open(f"/proc/self/fd/{preparation}", "rb") as file:
        data: dict[str, Any] = pickle.load(file)
    sys.path[:] = data.get("sys_path", sys.path)
    if directory := data.get("dir"):
        os.chdir(directory)
    return data


def import_main(data: "dict[str, Any]") -> None:
    """Import the main module, as a fork server does. What goes wrong does so again in each worker, which tells it."""
    from multiprocessing import process, spawn

    process.current_process()._inheriting = True  # type: ignore[attr-defined]
    try:
        spawn.prepare({key: data[key] for key in data if key.startswith("init_main") or key == "sys_argv"})
    except BaseException:
        return
    finally:
        del process.current_process()._inheriting  # type: ignore[attr-defined]


def with_changes(before: "dict[bytes, bytes]") -> "dict[bytes, bytes]":
    """The inherited environment, with what modules have changed in it since ``os.environb`` was ``before``."""
    environment: dict[bytes, bytes] = keeper_main.inherited_environment()
    for name in before.keys() | os.environb.keys():
        if (value := os.environb.get(name)) is None:
            environment.pop(name, None)
        elif value != before.get(name):
            environment[name] = value
    return environment


def why_not_to_fork() -> str:
    """What makes a fork of this process unsafe; empty if nothing does."""
    if tracker := sys.modules.get("multiprocessing.resource_tracker"):
        tracker._resource_tracker._stop()  # multiprocessing starts it with the first lock; workers have one each
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        return f"has started threads ({names})"
    if len(os.listdir("/proc/self/task")) > 1:
        probe()
        if (count := len(os.listdir("/proc/self/task")) - 1) > 0:
            return f"has started {count} thread{'s' * (count > 1)} outside Python"
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        pass
    else:
        return "has started a process"
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # that of the listing
        if name.startswith(DEVICES):
            return f"has opened {name}"
        if name == "anon_inode:[eventpoll]":  # one worker would take what wakes another
            return "has made an event loop"
    return ""


def probe() -> None:
    """Fork once: libraries that know of forks, such as OpenBLAS, end their threads before, until they need them."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def refuse_to_fork(sock: int, agent: int, why: str) -> "NoReturn":
    """Become an ordinary keeper."""
    text = f"{why}, so that no worker can be forked from it; they start without --preload"
    os.write(sock, keeper_main.pack(("warned", text)))
    for fd in (sock, agent):
        os.set_inheritable(fd, True)
    keeper_main.libc.prctl(keeper_main.PR_SET_PDEATHSIG, 0, 0, 0, 0)
    os.execve(sys.executable, [*keeper_main.COMMAND, str(sock), str(agent)], keeper_main.inherited_environment())


def refuse(sock: int, why: str, error: BaseException) -> "NoReturn":
    """Tell the agent that this cannot be, with the traceback from the module on."""
    import traceback

    tb = error.__traceback__
    while tb is not None and (tb.tb_frame.f_globals is globals() or "importlib" in tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    lines = "".join(traceback.format_exception(type(error), error, tb)).rstrip()
    os.write(sock, keeper_main.pack(("broken", f"{why}:\n{lines}")))
    os._exit(1)


def be_worker(worker: "Forked", handlers: "dict[int, Any]") -> str:
    """Become what the worker's command would be before its first line. Returns the file that it runs."""
    forked.like_executed(worker.environment, handlers)
    forked.new_random_states()
    argv = [os.fsdecode(word) for word in worker.order[1]]
    sys.orig_argv[:] = argv
    sys.argv[:] = argv[argv.index("-u") + 1 :]
    rank = worker.environment.get(b"RANK", b"").decode()
    what = os.path.basename(sys.argv[2]) if sys.argv[1] in ("script", "module") else "function"
    forked.show_name(f"{what[: 14 - len(rank)]}:{rank}", worker.order[1])
    for module in ("forked", "keeper_main"):
        del sys.modules[module]
    return sys.argv[0]


def strip(tb: "TracebackType | None", code: "CodeType") -> "TracebackType | None":
    """The part of a traceback that plain Python would have."""
    while tb is not None and (tb.tb_frame.f_globals is globals() or tb.tb_frame.f_code is code):
        tb = tb.tb_next
    return tb


def compiled(file: str) -> "CodeType":
    """A program of this folder."""
    with open(file, "rb") as stream:
        return compile(stream.read(), file, "exec", dont_inherit=True)


if __name__ == "__main__":
    numbers = list(map(int, sys.argv[5:]))
    programs = {file: compiled(file) for file in (f"{FOLDER}/bootstrap.py", f"{FOLDER}/function_main.py")}
    program = be_worker(*main(sys.argv[1], sys.argv[2], sys.argv[3], *numbers))
    try:
        exec(programs[program], {"__name__": "__main__", "__file__": program, "__builtins__": __builtins__})
    except BaseException as error:
        error.with_traceback(strip(error.__traceback__, programs[program]))
        raise  # to the interpreter, which knows what to do with each exception
