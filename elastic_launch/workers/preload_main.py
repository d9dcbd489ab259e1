"""The warm keeper: a keeper that has imported modules, and whose workers are forks of it.

    python -u preload_main.py MODULE,... script|module|function|main TARGET PADDING SOCKET AGENT

SOCKET and AGENT are as for ``keeper_main``. TARGET is the workers' script or module. For a function it is the
descriptor of multiprocessing's preparation data; with ``main``, the function's main module is imported as well.
PADDING is room for the command lines that the workers show.

A MODULE may be followed by names from it, which may be modules as well: ``torch.utils.data:DataLoader``. The word
``auto`` in front says that the modules were chosen by what the program imports (``core.preload``). Then none of them
ends the job: the workers are cold, and each meets the reason itself.

The process imports the modules as the program would, and does nothing else with them: any parallel operation of torch's
before a fork makes the forked processes hang. If a module has started threads or opened a device, forks are not safe.
Then the process says which module it was, and becomes an ordinary keeper by executing it. It sends messages of its own
to the agent:

    ("importing", what)  -- what this process imports from now on, as an option names it; empty: nothing any more
    ("warning", message)  -- workers will be cold; ("detail", message) after ``auto``
    ("failed", message)  -- a module cannot be imported

A worker is a fork that leaves all frames of the keeper (``standby.ForkedWorker``) and then runs, at the bottom of
its stack, what its command line says: ``bootstrap`` or ``function_main``. So the end of the interpreter, with its exit
status and its ``atexit`` handlers, is the interpreter's own.
"""

import ctypes
import fcntl
import gc
import os
import signal
import sys
import threading
import time

FOLDER = os.path.dirname(__file__)
IS_SAFE = sys.flags.safe_path
if IS_SAFE:
    sys.path.insert(0, FOLDER)
# By these names, because the path of elastic_launch is not known here.
import bootstrap  # type: ignore[import-not-found]  # noqa: E402
import forked  # type: ignore[import-not-found]  # noqa: E402
import keeper_main  # type: ignore[import-not-found]  # noqa: E402
import standby  # type: ignore[import-not-found]  # noqa: E402

if IS_SAFE:
    del sys.path[0]
for name in ("bootstrap", "forked", "keeper_main", "standby", "written_pages"):
    del sys.modules[name]  # the program may have modules with these names

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost milliseconds
if TYPE_CHECKING:
    from types import CodeType, TracebackType
    from typing import Any, NoReturn

    from elastic_launch.workers.standby import ForkedWorker

compiled_ahead: "dict[str, tuple[bytes, CodeType]]" = {}
"""The source and code of the program, by its path, once the keeper has compiled it."""
LOOKS = 1000
"""Looks, a millisecond apart, after which a thread that Python has joined is gone from the kernel's list.

They are counted, because this process may stand still for as long as the thread does.
"""
AUTO = "auto"
"""The word in front of modules that were chosen by what the program imports."""
TUNABLES, HUGE_PAGES = b"GLIBC_TUNABLES", b"glibc.malloc.hugetlb=1"
"""What the agent has added to the environment of this process; it stands before what the user has set."""
DEVICES = tuple(f"/dev/{name}" for name in ("nvidia", "kfd", "dri", "accel", "vfio", "neuron", "habanalabs", "davinci"))
"""Prefixes of device files, as in ``host.devices``. A process that has one open has begun to use the device."""


def main(modules: str, kind: str, target: str, sock: int, agent: int) -> "tuple[ForkedWorker, dict[int, Any]]":
    """Be the keeper. Returns in a worker only: the worker, and the signal handlers that the modules have set."""
    is_function = kind in ("function", "main")
    keeper_main.close_others((sock, agent, *([int(target)] if is_function else [])))
    set_death_signal(signal.SIGKILL)  # nothing else notices the agent's death while modules are imported
    keeper_main.set_subreaper(True)  # so that a daemon of a module is below this process, and seen
    file, program_entry = None, ""
    preparation: dict[str, Any] = {}
    if is_function:
        preparation = prepare(int(target))
    else:
        file, program_entry = bootstrap.locate(target, kind == "module", IS_SAFE)
        if file is None:
            import runpy  # noqa: F401 - which the bootstrap imports before such a program
        sys.path[: not IS_SAFE] = [program_entry] if program_entry else []
    sys.argv[:] = [target if kind == "script" else ""]
    if (tunables := os.environb.pop(TUNABLES)) != HUGE_PAGES:
        os.environb[TUNABLES] = tunables.removeprefix(HUGE_PAGES + b":")
    inherited = keeper_main.inherited_environment()
    tame_arrow()
    variables = dict(os.environb)
    before = Surroundings(sock, agent)
    # A large import creates hundreds of thousands of objects, hardly any of them garbage. Collecting would take a tenth
    # of its time.
    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    words = [word for word in modules.split(",") if word]
    is_auto = words[:1] == [AUTO]
    option = f"--preload {AUTO}: " if is_auto else "--preload "
    output = HeldOutput(is_auto)
    for word in words[is_auto:]:
        module, *names = word.split(":")
        tell_import(sock, f"{option}{module}")
        before.is_importing = True
        try:
            # Like a statement of the program: the names make a lazy package import more, and a deprecated one warns.
            __import__(module, fromlist=names)
        except BaseException as error:
            before.check()
            if not is_auto:
                fail(sock, f"{option}{module}: cannot import the module", error)
            if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
                break  # nothing has been done yet, and what the program does about it may change what follows
            output.restore()
            before.restore()
            become_cold(
                sock, agent, inherited, f"{option}{module} cannot be imported ({type(error).__name__})", is_auto
            )
        before.check()
        if reason := output.what_was_done() or why_not_to_fork():
            output.restore()
            before.restore()
            become_cold(sock, agent, inherited, f"{option}{module}: the module {reason}", is_auto)
    output.restore()
    if kind == "main":
        tell_import(sock, "the main module")
        before.is_importing = True
        import_main(preparation)
        before.check()
    if kind == "script" and file is not None:
        compile_ahead(file)
    tell_import(sock, "")
    if not is_function:
        # bootstrap expects its own directory in front, and replaces it by the program's.
        if program_entry and program_entry in sys.path:  # a module may have put others before it
            sys.path.remove(program_entry)
        if not IS_SAFE:
            sys.path.insert(0, FOLDER)
    if bootstrap.has_optimizers():
        bootstrap.load_step_hook()
        import mmap  # noqa: F401 - what counts steps needs it
    before.restore()
    handlers: dict[int, Any] = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    set_death_signal(0)
    if gc.get_threshold()[0] == 0:  # otherwise a module has set its own
        gc.set_threshold(*thresholds)
    # A worker's collector then does not touch the pages that it shares. Nothing is collected before: that would leave
    # holes in pages, and a worker copies each page in which it fills one.
    gc.freeze()
    environment = changed_environment(inherited, variables)
    try:
        keeper_main.serve(sock, agent, environment, standby.StandbyPool(environment))
    except standby.ForkedWorker as forked_worker:
        worker = forked_worker.with_traceback(None)
    return worker, handlers


# ---- imports


class Surroundings:
    """The working directory and the signal mask. Modules may change them, but the program must be found as before."""

    def __init__(self, *descriptors: int) -> None:
        """Remember them; ``descriptors`` are others that modules must leave alone."""
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.directory = os.open(".", os.O_PATH | os.O_CLOEXEC)
        self.files = {fd: identity(fd) for fd in (self.directory, *descriptors)}
        self.is_importing = False
        """Whether a module is imported, until the next ``check``."""
        os.register_at_fork(after_in_child=self.unblock)

    def unblock(self) -> None:
        """Unblock all signals in a process that a module forks: it may end that by SIGTERM, as multiprocessing does."""
        if self.is_importing:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def check(self) -> None:
        """End this process if a module has closed what is not its own: then it has no way to the agent any more."""
        self.is_importing = False
        if any(identity(fd) != file for fd, file in self.files.items()):
            os._exit(keeper_main.DESCRIPTORS_CLOSED)

    def restore(self) -> None:
        """Restore them, once."""
        os.fchdir(self.directory)
        os.close(self.directory)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)


class HeldOutput:
    """The standard output and error of this process, held while modules are imported.

    A module that prints something would print it once instead of once in each worker. Users who name a module accept
    that. After ``auto``, the workers had better import such a module themselves.
    """

    def __init__(self, holds: bool) -> None:
        """Hold the output, or do nothing."""
        self.file = -1
        self.streams: dict[int, int] = {}
        """Copies of the descriptors that are held, by number."""
        if not holds:
            return
        self.file = os.memfd_create("output")
        for fd in (1, 2):
            if identity(fd) is not None:
                self.streams[fd] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
                os.dup2(self.file, fd)

    def what_was_done(self) -> str:
        """Return what is wrong: that something was written. Empty if nothing was."""
        if self.file < 0:
            return ""
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except Exception:
                return "closes or replaces the standard output when it is imported"
        return "prints when it is imported" if os.fstat(self.file).st_size else ""

    def restore(self) -> None:
        """Let the output go where it belongs. What was held is lost."""
        for fd, copy in self.streams.items():
            os.dup2(copy, fd)
            os.close(copy)
        if self.file >= 0:
            os.close(self.file)
        self.file, self.streams = -1, {}


def identity(fd: int) -> "tuple[int, int] | None":
    """Return what tells an open file from all others; None if the descriptor is closed."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def tame_arrow() -> None:
    """Have pyarrow start no thread when it is imported. The workers' environment stays as it is."""
    name = "JE_ARROW_MALLOC_CONF"
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "background_thread:false")))


def tell_import(sock: int, what: str) -> None:
    """Tell the agent what is imported from now on. If this process ends meanwhile, that is why."""
    os.write(sock, keeper_main.pack(("importing", what)))


def prepare(descriptor: int) -> "dict[str, Any]":
    """Set the launching program's module search path and working directory. Returns all of the preparation data."""
    import pickle

    with open(f"/proc/self/fd/{descriptor}", "rb") as file:
        data: dict[str, Any] = pickle.load(file)
    sys.path[:] = data.get("sys_path", sys.path)
    if directory := data.get("dir"):
        os.chdir(directory)
    return data


def import_main(data: "dict[str, Any]") -> None:
    """Import the main module, as multiprocessing's fork server does.

    Errors are ignored: they occur again in each worker, which reports them.
    """
    from multiprocessing import process, spawn

    process.current_process()._inheriting = True  # type: ignore[attr-defined]
    try:
        spawn.prepare({key: data[key] for key in data if key.startswith("init_main") or key == "sys_argv"})
    except BaseException:
        return
    finally:
        del process.current_process()._inheriting  # type: ignore[attr-defined]


def changed_environment(inherited: "dict[bytes, bytes]", before: "dict[bytes, bytes]") -> "dict[bytes, bytes]":
    """Return the inherited environment, with what modules have changed in it since ``os.environb`` was ``before``."""
    environment = {**inherited}
    for name in before.keys() | os.environb.keys():
        if (value := os.environb.get(name)) is None:
            environment.pop(name, None)
        elif value != before.get(name):
            environment[name] = value
    return environment


def set_death_signal(signum: int) -> None:
    """Have the kernel send this process a signal when its parent dies; 0 means none."""
    keeper_main.libc.prctl(keeper_main.PR_SET_PDEATHSIG, signum, 0, 0, 0)


def fail(sock: int, message: str, error: BaseException) -> "NoReturn":
    """Tell the agent why no worker can be started, with the traceback from the imported module on."""
    import traceback

    tb = error.__traceback__
    while tb is not None and (tb.tb_frame.f_globals is globals() or "importlib" in tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    lines = "".join(traceback.format_exception(type(error), error, tb)).rstrip()
    os.write(sock, keeper_main.pack(("failed", f"{message}:\n{lines}")))
    os._exit(1)


# ---- whether to fork


def why_not_to_fork() -> str:
    """Return what makes a fork of this process unsafe; empty if nothing does."""
    if tracker := sys.modules.get("multiprocessing.resource_tracker"):
        tracker._resource_tracker._stop()  # multiprocessing starts it with the first lock; each worker gets its own
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        return f"has started threads ({names})"
    if len(os.listdir("/proc/self/task")) > 1:
        fork_once()
        for _ in range(LOOKS):
            if not (count := len(os.listdir("/proc/self/task")) - 1):
                break
            time.sleep(0.001)
        else:
            return f"has started {count} thread{'s' * (count > 1)} outside Python"
    if keeper_main.has_children():
        return "has started a process"
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the descriptor of the listing itself
        if name.startswith(DEVICES):
            return f"has opened {name}"
        if name == "anon_inode:[eventpoll]":  # workers would take each other's events
            return "has created an event loop"
    return ""


def fork_once() -> None:
    """Fork a process that exits. Libraries such as OpenBLAS end their threads before a fork, until they need them."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def become_cold(sock: int, agent: int, environment: "dict[bytes, bytes]", reason: str, is_auto: bool) -> "NoReturn":
    """Become an ordinary keeper, and say why: with a warning, or after ``auto`` only where details are shown."""
    text = f"{reason}, so workers cannot be forked; starting them without --preload"
    os.write(sock, keeper_main.pack(("detail" if is_auto else "warning", text)))
    for fd in (sock, agent):
        os.set_inheritable(fd, True)
    set_death_signal(0)
    os.execve(sys.executable, [*keeper_main.COMMAND, str(sock), str(agent)], environment)


# ---- a worker


def become_worker(worker: "ForkedWorker", handlers: "dict[int, Any]") -> str:
    """Become what the worker's command would be before its first line. Returns the path of the program to run."""
    forked.reset_handlers(handlers)
    forked.reseed_random_generators()
    worker.take_order()
    forked.become_program(worker.environment)
    argv = [os.fsdecode(word) for word in worker.order[1]]
    sys.orig_argv[:] = argv
    sys.argv[:] = argv[argv.index("-u") + 1 :]
    rank = worker.environment.get(b"RANK", b"").decode()
    what = os.path.basename(sys.argv[2]) if sys.argv[1] in ("script", "module") else "function"
    set_title(f"{what[: 14 - len(rank)]}:{rank}", worker.order[1])
    worker.wait()
    return sys.argv[0]


def set_title(name: str, argv: list[bytes]) -> None:
    """Have ``ps`` show a name and a command line. The latter is cut to the space that this process's own had."""
    keeper_main.libc.prctl(keeper_main.PR_SET_NAME, os.fsencode(name)[:15], 0, 0, 0)
    start, end = map(int, keeper_main.read_stat("self")[45:47])  # arg_start and arg_end, proc(5)
    if 0 < start < end:
        text = b"\0".join(argv)[: end - start - 1]
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def strip(tb: "TracebackType | None", code: "CodeType") -> "TracebackType | None":
    """Return a traceback without the frames of this file and of the program ``code`` at its head."""
    while tb is not None and (tb.tb_frame.f_globals is globals() or tb.tb_frame.f_code is code):
        tb = tb.tb_next
    return tb


def compile_ahead(file: str) -> None:
    """Compile the program for all workers, unless Python warns of something: then each compiles it itself."""
    warnings: Any = sys.modules.get("warnings")
    if warnings is None or not os.path.isfile(file):  # what is no file may be read once only
        return
    shown: list[object] = []
    show, once = warnings.showwarning, dict(warnings.onceregistry)
    warnings.showwarning = lambda *warning, **_: shown.append(warning)
    try:
        with open(file, "rb") as stream:
            source = stream.read()
        code = compile(source, file, "exec", dont_inherit=True)
        if not shown:
            compiled_ahead[file] = source, code
    except Exception:
        return  # the workers fail in the same way, and tell it
    finally:
        warnings.showwarning = show
        warnings.onceregistry.clear()
        warnings.onceregistry.update(once)


def compile_file(file: str) -> "CodeType":
    """Compile a program."""
    with open(file, "rb") as stream:
        return compile(stream.read(), file, "exec", dont_inherit=True)


if __name__ == "__main__":
    sock, agent = map(int, sys.argv[5:])
    programs = {file: compile_file(file) for file in (f"{FOLDER}/bootstrap.py", f"{FOLDER}/function_main.py")}
    program = become_worker(*main(sys.argv[1], sys.argv[2], sys.argv[3], sock, agent))
    try:
        names = {"__name__": "__main__", "__file__": program, "__builtins__": __builtins__}
        exec(programs[program], {**names, "compiled_ahead": compiled_ahead})
    except BaseException as error:
        error.with_traceback(strip(error.__traceback__, programs[program]))
        raise  # to the interpreter, which knows what to do with each exception
