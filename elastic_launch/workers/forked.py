"""Make a forked process what a newly executed program would be. Runs in workers, and imports next to nothing."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost milliseconds
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def reset_handlers(handlers: Mapping[int, Any]) -> None:
    """Replace the keeper's signal handlers. All signals stay blocked.

    Args:
        handlers: handlers of signals that are not to get Python's default.
    """
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_IGN)  # as Python does when it starts
    for signum in signal.valid_signals():
        if callable(handler := handlers.get(signum)):
            signal.signal(signum, handler)
        elif callable(signal.getsignal(signum)):
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


def become_program(environment: Mapping[bytes, bytes]) -> None:
    """Let signals in and replace the keeper's environment.

    Args:
        environment: the whole new environment.
    """
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        # Forget one that arrived while all were blocked: the program was not prepared for it, and would die of it.
        before = signal.signal(signum, signal.SIG_IGN)
        signal.signal(signum, signal.SIG_DFL if before is None else before)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environb.clear()
    os.environb.update(environment)
    for name in ("elastic_launch.workers.step_hook", "_elastic_launch_step_hook"):
        if step_hook := sys.modules.get(name):
            step_hook.words = None  # type: ignore[attr-defined]  # this fork is a worker, with a memory of its own


def use_line_buffering() -> None:
    """Have each line written at once: the standard streams may now be pipes that are watched."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        except (AttributeError, ValueError):
            continue  # it does not exist, or it is closed


def reseed_random_generators() -> None:
    """Seed numpy's and torch's generators, as a new process would. Python's own reseeds itself after a fork."""
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
