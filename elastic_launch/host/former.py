"""Whether another agent on this host, which this one may have replaced, is gone with all that it had started."""

from __future__ import annotations

import contextlib
import os

PROC = "/proc"
"""Where the system shows its processes."""
_ENDED = (b"Z", b"X", b"x")
"""States of a process that has ended."""


def space() -> str:
    """Return a text that processes share if they see the same pids, until the host reboots; empty: unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip().replace("-", "")[:16]
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def start_time(pid: int) -> int:
    """Return when a process was started, in clock ticks since the host booted; 0: it is gone, or that is unknown."""
    try:
        with open(f"{PROC}/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return 0 if fields[0] in _ENDED else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def is_gone(pid: int, started: int) -> bool:
    """Return whether an agent has ended, and so has its keeper, which kills the workers.

    Args:
        pid: the agent's, in this ``space``.
        started: its ``start_time``.
    """
    now = start_time(pid)
    if now == started or not os.path.exists(f"{PROC}/self/stat") or (now == 0 and _is_another_users(pid)):
        return False
    return not any(_belongs_to(keeper, pid) for keeper in os.listdir(PROC) if keeper.isdigit())


def _is_another_users(pid: int) -> bool:
    """Whether there is such a process of another user, whose files in /proc may be hidden (``hidepid``)."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return False


def _belongs_to(process: str, agent: int) -> bool:
    """Whether a process is a keeper, of this user, that may be an agent's.

    A keeper's last argument is its pidfd of the agent. The kernel gives that the pid -1 when the agent has been reaped.
    A process that is just ending has no arguments any more, before the kernel kills its children: it may be any keeper.
    """
    with contextlib.suppress(OSError, ValueError):
        with open(f"{PROC}/{process}/comm", "rb") as file:
            if file.read().strip() != b"elastic-keeper":
                return False
        if os.stat(f"{PROC}/{process}").st_uid != os.geteuid() or start_time(int(process)) == 0:
            return False
        with open(f"{PROC}/{process}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
        if len(words) < 2:
            return True
        fd = int(words[-2])
        with open(f"{PROC}/{process}/fdinfo/{fd}", "rb") as file:
            pids = [int(line.split()[1]) for line in file if line.startswith(b"Pid:")]
        return pids != [] and pids[0] in (-1, agent)
    return False
