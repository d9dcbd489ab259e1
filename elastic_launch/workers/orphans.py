"""Kill orphans: the processes that a lost keeper leaves to this process, which is a subreaper.

If the agent is a library call, the program around it may have children of its own. Those are spared.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Collection, Iterator

from elastic_launch.env import PART
from elastic_launch.workers import keeper_main

KILL_PATIENCE = 2.0
"""Seconds to wait for a process to end after SIGKILL."""

live_keepers: set[int] = set()
"""The pids of this process's keepers. Several agents may run in the threads of one program."""

_subreaper_lock = threading.Lock()
_subreaper_users = 0
_was_subreaper = False


@contextlib.contextmanager
def subreaper() -> Iterator[bool]:
    """Make this process a subreaper, which adopts what a killed keeper leaves; restore the setting afterwards.

    Yields whether the system supports it.
    """
    global _subreaper_users, _was_subreaper
    with _subreaper_lock:
        if _subreaper_users == 0:
            _was_subreaper = keeper_main.get_subreaper()
        _subreaper_users += 1
        is_supported = keeper_main.set_subreaper(True)
    try:
        yield is_supported
    finally:
        with _subreaper_lock:
            _subreaper_users -= 1
            if _subreaper_users == 0:
                keeper_main.set_subreaper(_was_subreaper)


def kill_orphans(is_alone: bool, workers: Collection[int], run_id: str) -> None:
    """Kill what a lost keeper left to this process, and wait until it is gone.

    Args:
        is_alone: whether this process had no other child before the keeper, and no thread that could have started one.
            Then all children are orphans of the job, except keepers and other parts of the launcher. Otherwise only
            the workers are, the processes in their sessions, and those with the job's run id in their environment.
        workers: the pids of the round's workers.
        run_id: the job's ``TORCHELASTIC_RUN_ID``.
    """
    run_id_entry = os.fsencode(f"TORCHELASTIC_RUN_ID={run_id}") + b"\0"
    part_entry = f"{PART}={os.getpid()}".encode() + b"\0"

    def is_orphan(pid: int) -> bool:
        environment = _environment_of(pid)
        if pid in live_keepers or part_entry in environment:
            return False
        return is_alone or pid in workers or run_id_entry in environment or _session_of(pid) in workers

    while keeper_main.has_children() and (
        orphans := [pid for pid in keeper_main.children_by_parent().get(os.getpid(), ()) if is_orphan(pid)]
    ):
        for orphan in orphans:
            for pid in (orphan, *keeper_main.descendants(orphan)):
                keeper_main.kill(pid, signal.SIGKILL)
        for orphan in orphans:
            with contextlib.suppress(OSError), open(os.pidfd_open(orphan), "rb") as process:
                if not has_ended(process.fileno(), KILL_PATIENCE):
                    return  # uninterruptible (state D): nothing helps
            reap(orphan)


def has_ended(pidfd: int, seconds: float) -> bool:
    """Wait up to some seconds for the end of a process. Returns whether it has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def reap(pid: int) -> int | None:
    """Reap a child. Returns its exit code, minus the signal's number if one killed it; None if it is not known.

    It is not if the child still runs, or if another thread of the program has reaped it.
    """
    try:
        reaped, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if reaped else None


def _environment_of(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read() + b"\0"
    except OSError:
        return b""


def _session_of(pid: int) -> int:
    """Return the session of a process, running or not yet reaped; -1 if it is gone."""
    try:
        return int(keeper_main.read_stat(pid)[3])
    except OSError:
        return -1
