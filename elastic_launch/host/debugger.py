"""A debugger that follows child processes: pydevd, of which debugpy and several IDEs are made.

It replaces ``os.posix_spawn`` and its like in the debugged program, so that each Python that this starts connects to
the debugger. The workers are to do so, but neither the keeper nor a helper process.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any


def _debugger() -> Any:
    """Return the module of pydevd that follows children; None if no debugger has loaded it."""
    return sys.modules.get("_pydev_bundle.pydev_monkey")


def is_present() -> bool:
    """Return whether this program is being debugged."""
    return _debugger() is not None


def not_followed() -> contextlib.AbstractContextManager[None]:
    """Return a context in which processes start without the debugger."""
    debugger = _debugger()
    skip: contextlib.AbstractContextManager[None] = (
        debugger.skip_subprocess_arg_patch() if debugger else contextlib.nullcontext()
    )
    return skip


def followed(argv: list[str]) -> list[str]:
    """Return the command with which a process connects to the debugger; unchanged without one."""
    debugger = _debugger()
    return list(debugger.patch_args(argv)) if debugger else argv
