"""Waiting for conditions: the only way in which a test waits."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

DEADLINE = 180.0
"""Seconds until a condition that a test waits for counts as failed: far above what it takes."""
SOON = 25.0
"""Seconds within which happens what happens at once, also on a machine that is busy or stands still for some seconds.

Below the 30 s and more that it takes if it only happens at the end of a timeout.
"""


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Return when the condition holds; fail when it does not within DEADLINE."""
    begin = time.monotonic()
    while not condition():
        waited = time.monotonic() - begin
        assert waited < DEADLINE, f"waited {DEADLINE:g} s in vain: {what or condition}"
        time.sleep(min(0.005 + waited / 50, 0.05))  # seldom where it takes long: others need the CPU


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
