"""Write the launcher's own messages to standard error, or to what a program has put in its place.

They never hold up the agent for long: if their reader has stopped (a pager, Ctrl-S), messages are lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from elastic_launch.core.text import visible
from elastic_launch.env import environment

if TYPE_CHECKING:
    from elastic_launch.core.agent.messages import Log

RED, GREEN, YELLOW = "31", "32", "33"
"""Colours for ``paint``."""
LINE_PATIENCE = 0.2
"""Seconds that a line may wait for its reader. The agent waits with it."""
REPORT_PATIENCE = 10.0
"""Seconds that the report at the end may wait for its reader."""


_thread = threading.local()
"""Where a thread's lines go. Agents may run in several threads of a program."""


class Shown(str):
    """A text in which control characters have been made visible, and then colours added."""

    __slots__ = ()


def log(text: str) -> None:
    """Write one line of the launcher's."""
    writer: Callable[[str], None] = getattr(_thread, "writer", _write_line)
    writer(text)


def _write_line(text: str) -> None:
    write(launcher_line(text), LINE_PATIENCE)


def launcher_line(text: str) -> Shown:
    """Return a text as a line of the launcher's. No further line of the text can be mistaken for one."""
    return Shown(f"elastic-run: {shown(text)}\n".replace("\n", "\n  ").removesuffix("  "))


def shown(text: str) -> Shown:
    """Return a text with its control characters made visible, apart from line breaks and the launcher's colours."""
    return text if isinstance(text, Shown) else Shown(visible(text, lines=True))


@contextlib.contextmanager
def log_through(writer: Callable[[str], None]) -> Iterator[None]:
    """Have ``writer`` write the lines of this thread, because it keeps them apart from the workers' output."""
    before: Callable[[str], None] = getattr(_thread, "writer", _write_line)
    _thread.writer, _thread.needs_new_line = writer, False
    try:
        yield
    finally:
        _thread.writer = before


def begin_with_new_line(needed: bool) -> None:
    """Set whether this thread's next ``write`` would follow an unfinished line of a worker's."""
    _thread.needs_new_line = needed


def write(text: str, patience: float) -> None:
    """Write to standard error, and give up after ``patience`` seconds. Ignores errors.

    Control characters are made visible: the text may quote file names, hosts and errors.
    """
    begin = "\n" if getattr(_thread, "needs_new_line", False) else ""
    _thread.needs_new_line = False
    if (file := replacement(2)) is not None:
        with contextlib.suppress(Exception):  # whatever the program's own stream may raise
            file.write(f"{begin}{shown(text)}")
            file.flush()
        return
    data = memoryview(f"{begin}{shown(text)}".encode(errors="backslashreplace"))
    end = time.monotonic() + patience
    with contextlib.suppress(OSError), unblocked(2) as fd:
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        while data and poller.poll(max(0.0, end - time.monotonic()) * 1000):
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(fd, data[: select.PIPE_BUF]) :]


def replacement(stream: int) -> TextIO | None:
    """Return what a program has put in the place of ``sys.stdout`` (1) or ``sys.stderr`` (2).

    Notebooks, pytest and ``contextlib.redirect_stderr`` do that.

    Returns:
        None: nothing, or another way to write to the standard stream.
    """
    name = "stdout" if stream == 1 else "stderr"
    file: TextIO | None = getattr(sys, name)
    if file is None or file is getattr(sys, f"__{name}__"):
        return None
    try:
        return None if os.path.sameopenfile(file.fileno(), stream) else file
    except Exception:  # it has no descriptor, which a program's own stream may say in any way
        return file


def log_line(line: Log, write: Callable[[str], None], to: Callable[[str], None] | None = None) -> None:
    """Write a line with the colour of its kind; ``write`` as for ``in_colour``, ``to`` in its place if it is given."""
    from elastic_launch.job import Level, LineKind  # late: the command line imports this file first

    colour = RED if line.kind is LineKind.FAILURE else YELLOW if line.level is Level.WARNING else ""
    text = line.text
    in_colour(write, colour)(text) if to is None else to(paint(text, colour) if write is log and colour else text)


def in_colour(write: Callable[[str], None], colour: str) -> Callable[[str], None]:
    """Return a function that writes lines in a colour: if ``write`` is ``log``, and not one of the program's own."""
    return (lambda text: write(paint(text, colour))) if write is log and colour else write


def shows_colours(stream: int) -> bool:
    """Return whether to colour what goes to a standard stream: on a terminal, unless the user decides otherwise.

    ``NO_COLOR`` comes before ``FORCE_COLOR``, and that before ``TERM=dumb``. Both count if they are not empty.
    """
    environ = environment()
    if environ.get("NO_COLOR"):
        return False
    is_terminal = os.isatty(stream) and replacement(stream) is None
    return bool(environ.get("FORCE_COLOR")) or (is_terminal and environ.get("TERM") != "dumb")


def paint(text: str, colour: str, stream: int = 2) -> str:
    """Return a text with its first line in a colour, if the standard stream that it is for shows colours."""
    if not shows_colours(stream):
        return text
    first, newline, rest = shown(text).partition("\n")
    return Shown(f"\x1b[{colour}m{first}\x1b[0m{newline}{rest}")


@contextlib.contextmanager
def unblocked(stream: int) -> Iterator[int]:
    """Yield a descriptor of a standard stream to which writing does not block.

    A pipe or a terminal is opened again for that, because the flags of the stream itself belong to its owner.
    """
    kind = os.fstat(stream).st_mode
    try:
        if not (stat.S_ISFIFO(kind) or stat.S_ISCHR(kind)):
            raise FileNotFoundError("a file never blocks, and a socket cannot be opened again")
        fd = os.open(f"/proc/self/fd/{stream}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        yield stream
        return
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Occupy those of descriptors 0 to 2 that the caller has closed, before a socket gets such a number."""
    occupied: list[int] = []
    try:
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(fd, True)
            occupied.append(fd)
        os.close(fd)
        yield
    finally:
        for fd in occupied:
            os.close(fd)
