"""Layer 2: makes a process that was forked what a new program would be. Runs in workers; imports next to nothing."""

from __future__ import annotations

import os
import signal
import sys
from types import MappingProxyType

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost milliseconds
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

PR_SET_NAME = 15


def like_executed(environment: dict[bytes, bytes], handlers: Mapping[int, Any] = MappingProxyType({})) -> None:
    """Give the process signals that are none of the keeper's, none of them blocked, and an environment of its own.

    Args:
        environment: all of it.
        handlers: of signals, where they are not to have Python's defaults.
    """
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_IGN)  # as Python has it
    for signum in signal.valid_signals():
        if callable(handler := handlers.get(signum)):
            signal.signal(signum, handler)
        elif callable(signal.getsignal(signum)):
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environb.clear()
    os.environb.update(environment)


def buffer_lines() -> None:
    """Have each line written at once: the standard streams may be pipes now, which somebody watches."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        except (AttributeError, ValueError):
            continue  # there is none, or it is closed


def new_random_states() -> None:
    """Seed the generators that a new process would have seeded by itself; Python's own does so after a fork."""
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()


def show_name(name: str, argv: list[bytes]) -> None:
    """Have ``ps`` show a name and a command line, the latter as far as this process's own had room for it."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_NAME, os.fsencode(name)[:15], 0, 0, 0)
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, proc(5)
    except (OSError, ValueError, IndexError):
        return
    if 0 < start < end:
        text = b"\0".join(argv)[: end - start - 1]
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
