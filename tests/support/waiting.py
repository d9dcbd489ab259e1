"""Waiting for conditions: the only way in which a test waits."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

DEADLINE = 60.0
"""Seconds until a condition that a test waits for counts as failed: far above what it takes."""


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Return when the condition holds; fail when it does not within DEADLINE."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE:g} s in vain: {what or condition}"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
