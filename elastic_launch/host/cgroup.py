"""Find this process's cgroups, and count the processes that the kernel's OOM killer has ended in them.

Reads a few small files in /proc and /sys/fs/cgroup. The counters show that a process was killed for lack of memory, but
not which one.
"""

from __future__ import annotations

import os

_HOST = "proc/vmstat"


class OomCounter:
    """Counts the processes that the OOM killer ends from now on: in this cgroup, or else on the host.

    A kill counts for the cgroup of the killed process, no matter whether that cgroup, one above it, or the host ran out
    of memory. So the cgroups above are not asked: they would count neighbours, too. The counter is ahead of the signal:
    when a worker is seen to be dead, its kill has been counted. In version 1, a worker that has moved to a cgroup below
    its launcher's does not count.
    """

    def __init__(self, root: str = "/") -> None:
        """Read the counter's present value. If there is no counter, ``killed`` returns 0.

        Args:
            root: the directory with ``proc`` and ``sys``.
        """
        self._root = root
        self._folders = cgroup_folders("memory", root)
        # A cgroup without the memory controller is part of the nearest one above that has it.
        files = [f"{folder}/{name}" for folder in self._folders for name in ("memory.events", "memory.oom_control")]
        files.append(_HOST)
        # In version 1 there is a counter since Linux 4.13.
        self._file = next((file for file in files if _field(root, file, "oom_kill") is not None), "")
        self._before = self._count()

    def killed(self) -> int:
        """Return the number of processes killed since then; 0 if it is not known."""
        return max(0, self._count() - self._before)

    def describe(self) -> str:
        """Return a line for the report on a worker that died of SIGKILL; empty if the OOM killer did not strike."""
        killed = self.killed()
        if not killed:
            return ""
        what = f"the kernel's OOM killer ended {'a process' if killed == 1 else f'{killed} processes'}"
        if self._file == _HOST:
            total = _field(self._root, "proc/meminfo", "MemTotal:")
            size = f" (memory {_size(total * 1024)})" if total else ""
            return f"{what} on this host{size}: out of memory is a possible cause"
        limit = min((limit for folder in self._folders for limit in _limits(self._root, folder)), default=0)
        size = f" (memory limit {_size(limit)})" if limit else ""
        return f"{what} of this cgroup{size}: out of memory is the likely cause"

    def _count(self) -> int:
        return _field(self._root, self._file, "oom_kill") or 0


def cgroup_folders(controller: str, root: str = "/") -> list[str]:
    """Return the directories of this process's cgroup and of the cgroups above it, nearest first.

    Some of them may not exist. In a container the path in /proc may be the host's, or lead out of what can be seen from
    here (``/../..``). Then only the mount itself exists, and that is the cgroup.

    Args:
        controller: the controller's name in version 1. In version 2 all controllers share one tree.
        root: the directory with ``proc`` and ``sys``; the results are relative to it.
    """
    folders = []
    for line in read(root, "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts = ["sys/fs/cgroup"]
        elif controller in controllers.split(","):
            # The directory is named after all controllers that are mounted there. One name alone is the usual link.
            mounts = [f"sys/fs/cgroup/{name}" for name in dict.fromkeys((controllers, controller))]
        else:
            continue
        parts = [part for part in path.split("/") if part]
        depths = range(len(parts), -1, -1) if ".." not in parts else [0]
        folders += ["/".join([mount, *parts[:depth]]) for mount in mounts for depth in depths]
    return folders


def read(root: str, path: str) -> str:
    """Return the text of a file in /proc or /sys; empty if it cannot be read."""
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _limits(root: str, folder: str) -> list[int]:
    """Return the memory limits of a cgroup in bytes: one or none."""
    texts = [read(root, f"{folder}/{name}").strip() for name in ("memory.max", "memory.limit_in_bytes")]
    return [int(text) for text in texts if text.isdecimal() and int(text) < 1 << 60]  # version 1 has no word for none


def _field(root: str, path: str, name: str) -> int | None:
    """Return the number behind a name at the start of a line; None if there is none."""
    for line in read(root, path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None


def _size(count: int) -> str:
    """Format a number of bytes as ``64.0 GiB``, or below one GiB as ``512 MiB``."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
