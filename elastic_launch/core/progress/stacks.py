"""The stacks of one process, as ``faulthandler`` or py-spy writes them, and the kernel's view of it.

``faulthandler`` lists the threads newest first, so the main thread is the last one. "Current thread" is the thread that
took the signal: the main thread as a rule, another one if the main thread blocks the signal. After 100 threads it
writes "..." and stops, so then the main thread is missing.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_HEADER = re.compile(r"(?:(?:Current thread|Thread) (0x[0-9a-f]+)|Stack)(?: \[(.*)\])? \(most recent call first\):$")
_FRAME = re.compile(r'  File "(.*)", line (\d{1,9}|\?\?\?) in (.*)$')
_PY_SPY_HEADER = re.compile(r'Thread \w+ \([\w+]*\)(?:: "(.*)")?$')
_PY_SPY_FRAME = re.compile(r" {4}(\S.*) \((.*?)(?::(\d{1,9}))?\)$")
_LIBRARY = re.compile(
    r"(?:^|/)(?:site|dist)-packages/"
    r"|(?:^|/)lib(?:64)?/python3(?:\.\d+)?t?/"
    r"|(?:^|/)python3\.?\d+t?(?:\.zip)?/"
    r"|^<frozen "
    r"|(?:^|/)torch/(?:_\w+|nn|optim|autograd|distributed|distributions|utils|multiprocessing|cuda|amp|fx|jit|func)[/.]"
    r"|(?:^|/)elastic_launch/workers/"
)
_NATIVE = re.compile(r"\.so(?:[.\d]*)$|\.(?:c|cc|cpp|cxx|cu|cuh|h|hpp|rs)$")
_SHORT = re.compile(r"^.*/(?=(?:site|dist)-packages/)|^.*/lib(?:64)?/(?=python3(?:\.\d+)?t?/)")


class Frame(NamedTuple):
    """A call on a stack."""

    file: str
    """The file's path as Python knows it, or a library's name; ``<string>`` and the like for code without a file."""
    line: int
    """The line; 0: unknown."""
    function: str


GARBAGE_COLLECTION = Frame("<gc>", 0, "garbage collection")
"""The innermost frame of a thread that collects garbage."""


class Thread(NamedTuple):
    """The stack of one thread."""

    is_main: bool
    name: str
    """The thread's name; empty if the dump does not tell (before Python 3.14)."""
    frames: tuple[Frame, ...]
    """Innermost first; empty if the thread runs no Python."""


class KernelView(NamedTuple):
    """What the kernel tells of a process. State, ``wchan`` and system call are those of its main thread."""

    state: str = ""
    """One letter: R (running), S (sleeping), D (waits for a device or file system), T (stopped), t (held by a tracer),
    Z (has ended; the agent says so of workers that it has seen exit)."""
    wchan: str = ""
    """The kernel's function in which it sleeps; empty: in none, or this user may not know."""
    syscall: str = ""
    """Name of the system call that it is in, or its number; empty: in none, or this user may not know."""
    cpu_seconds: float = 0.0
    """CPU time used so far by all its threads."""
    io_bytes: int = 0
    """Bytes read and written so far, those from and to caches and pipes included."""
    tracer_pid: int = 0
    """Pid of the debugger that is attached to it; 0: none."""
    reads_stdin: bool = False
    """Whether it waits for input on its descriptor 0."""
    command: str = ""
    """Its command line, shortened."""
    name: str = ""
    """Its name, as ``ps`` shows it."""


class Observation(NamedTuple):
    """One process at one time."""

    rank: int
    """The rank of the worker that it is, or belongs to."""
    pid: int
    child: str
    """Empty for the worker itself; for a process below it, that one's name, such as ``pt_data_worker``."""
    threads: tuple[Thread, ...]
    """Its Python threads; empty if it wrote none."""
    kernel: KernelView
    time: float = 0.0
    """When it was seen, in seconds of a monotonic clock."""

    def main_frames(self) -> tuple[Frame, ...]:
        """Return the main thread's stack, innermost first; empty if it is not known."""
        return next((thread.frames for thread in self.threads if thread.is_main), ())


def parse(text: str) -> tuple[Thread, ...]:
    """Return the threads in a text that ``faulthandler`` wrote, under Python 3.8 to 3.14.

    Lines of another form are skipped, as is a last line without its end. Of several dumps in a text, the last counts.
    """
    threads: list[tuple[str, list[Frame]]] = []
    seen: set[str] = set()
    has_all = True
    for line in text.split("\n")[:-1]:
        if header := _HEADER.match(line):
            ident = header[1] or ""
            if ident in seen:
                threads, seen, has_all = [], set(), True
            seen.add(ident)
            threads.append((header[2] or "", []))
        elif line == "...":
            has_all = False
        elif threads and (frame := _FRAME.match(line)):
            threads[-1][1].append(Frame(frame[1], int(frame[2]) if frame[2].isdecimal() else 0, frame[3]))
        elif threads and line == "  Garbage-collecting":
            threads[-1][1].append(GARBAGE_COLLECTION)
    last = len(threads) - 1
    return tuple(
        Thread(has_all and number == last, name, tuple(frames)) for number, (name, frames) in enumerate(threads)
    )


def parse_py_spy(text: str) -> tuple[Thread, ...]:
    """Return the threads in the output of ``py-spy dump --full-filenames``, with or without ``--native``."""
    threads: list[tuple[str, list[Frame]]] = []
    for line in text.split("\n"):
        if header := _PY_SPY_HEADER.match(line):
            threads.append((header[1] or "", []))
        elif threads and (match := _PY_SPY_FRAME.match(line)):
            frame = Frame(match[2], int(match[3] or 0), match[1])
            # Equal stacks must be equal: addresses are not, and faulthandler's functions have no "Class." before them.
            if is_native(frame):
                frame = frame._replace(function=frame.function.partition("<")[0])
            else:
                frame = frame._replace(function=frame.function.rpartition(".")[2])
            if not frame.function.startswith("0x"):
                threads[-1][1].append(frame)
    # The only thread may have no name.
    return tuple(Thread(name == "MainThread" or len(threads) == 1, name, tuple(frames)) for name, frames in threads)


def is_native(frame: Frame) -> bool:
    """Return whether a frame is native code."""
    return _NATIVE.search(frame.file) is not None


def is_users(frame: Frame) -> bool:
    """Return whether a frame is the user's code, judged by its path alone.

    Not the user's are: files below ``site-packages`` or ``dist-packages``, below ``lib/python3.X`` (the standard
    library), frozen modules, torch's own packages wherever torch lies, this package's ``workers/``, and native code.
    """
    return (
        frame.file not in ("???", GARBAGE_COLLECTION.file) and not is_native(frame) and not _LIBRARY.search(frame.file)
    )


def short_path(file: str) -> str:
    """Return a library's path without the folder that holds it, so that it is the same on all hosts.

    Example:
        >>> short_path("/opt/venv/lib/python3.11/site-packages/torch/_tensor.py")
        'site-packages/torch/_tensor.py'
    """
    return _SHORT.sub("", file)


def place_of(frames: tuple[Frame, ...]) -> Frame | None:
    """Return the frame where a stack stands for its reader: the innermost of the user's, or else the innermost."""
    return next(filter(is_users, frames), frames[0] if frames else None)
