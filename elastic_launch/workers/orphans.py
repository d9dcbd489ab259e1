"""Kill orphans: the processes that a lost keeper leaves to this process, which is a subreaper.

If the agent is a library call, the program around it may have children of its own. Those are spared.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
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
            the workers are, the processes in their sessions, those with the job's run id in their environment, and
            standbys, which have ended with their keeper and are to be reaped.
        workers: the pids of the round's workers.
        run_id: the job's ``TORCHELASTIC_RUN_ID``.
    """
    run_id_entry = os.fsencode(f"TORCHELASTIC_RUN_ID={run_id}") + b"\0"
    part_entry = f"{PART}={os.getpid()}".encode() + b"\0"

    def is_orphan(pid: int, environment: bytes) -> bool:
        if pid in live_keepers or part_entry in environment:
            return False
        if is_alone or pid in workers or run_id_entry in environment or int(_stat_of(pid)[3]) in workers:
            return True
        return keeper_main.name_of(pid) == keeper_main.STANDBY

    end = time.monotonic() + KILL_PATIENCE
    while keeper_main.has_children():
        is_last_look = time.monotonic() > end  # after this process may have stood still
        children = keeper_main.children_by_parent().get(os.getpid(), ())
        environments = {pid: _environment_of(pid) for pid in children}
        known = {pid: environment for pid, environment in environments.items() if environment is not None}
        orphans = [pid for pid, environment in known.items() if is_orphan(pid, environment)]
        if not orphans:
            if len(known) == len(environments) or is_last_look:
                return
            time.sleep(0.001)
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


def _environment_of(pid: int) -> bytes | None:
    """Return a process's environment; None while it executes a program, which for a moment has none yet."""
    environment = _read(pid, "environ")
    if not environment and _stat_of(pid)[0] not in (b"Z", b"X"):
        if not _read(pid, "cmdline"):
            return None
        environment = _read(pid, "environ")
    return environment + b"\0"


def _read(pid: int, name: str) -> bytes:
    """Return what is in a file of /proc/PID; empty if the process has ended, or belongs to another user."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _stat_of(pid: int) -> list[bytes]:
    """Return what ``read_stat`` does; for a process that has been reaped, that it is dead, and in session -1."""
    try:
        return keeper_main.read_stat(pid)
    except OSError:
        return [b"X", b"-1", b"-1", b"-1"]
