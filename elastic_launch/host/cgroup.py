"""This process's cgroups, and whether the kernel's OOM killer has struck in them.

Reads a few small files in /proc and /sys/fs/cgroup. The counters tell that a process was killed for lack of memory, but
not which one.
"""

from __future__ import annotations

import os

_HOST = "proc/vmstat"


class OomCounter:
    """How many processes the OOM killer has ended since this object was made: in this cgroup, or else on the host.

    A kill counts for the cgroup of the killed process, no matter whether that cgroup, one above it, or the host ran out
    of memory. So the cgroups above are not asked: they would count neighbours, too. The counter is ahead of the signal:
    when a worker is seen to be dead, its kill has been counted. In version 1, a worker that has moved to a cgroup below
    its launcher's does not count.
    """

    def __init__(self, root: str = "/") -> None:
        """Remember the counter as it is now. Where none can be read, nothing counts.

        Args:
            root: the directory with ``proc`` and ``sys``.
        """
        self._root = root
        self._folders = cgroup_folders("memory", root)
        # A cgroup without the memory controller is part of the nearest one above that has it.
        files = [f"{folder}/{name}" for folder in self._folders for name in ("memory.events", "memory.oom_control")]
        self._file, self._before = "", 0
        for file in [*files, _HOST]:
            count = _field(root, file, "oom_kill")  # in version 1 since Linux 4.13
            if count is not None:
                self._file, self._before = file, count
                break

    def killed(self) -> int:
        """The number of processes killed since; 0 if it is not known."""
        return max(0, (_field(self._root, self._file, "oom_kill") or 0) - self._before) if self._file else 0

    def describe(self) -> str:
        """One line for the report on a worker that died of SIGKILL; empty if the OOM killer did not strike."""
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


def cgroup_folders(controller: str, root: str = "/") -> list[str]:
    """The directories of this process's cgroup for a controller and of the cgroups above it, nearest first.

    Not all of them need exist. In a container the path in /proc may be the host's, or lead out of what can be seen from
    here (``/../..``). Then only the mount itself exists, and that is the cgroup.

    Args:
        controller: its name in version 1. In version 2 all controllers share one tree.
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
    """The text of a file of the kernel's; empty if it cannot be read."""
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _limits(root: str, folder: str) -> list[int]:
    """The memory limit of a cgroup in bytes, if it has one."""
    texts = [read(root, f"{folder}/{name}").strip() for name in ("memory.max", "memory.limit_in_bytes")]
    return [int(text) for text in texts if text.isdecimal() and int(text) < 1 << 60]  # version 1 has no word for none


def _field(root: str, path: str, name: str) -> int | None:
    """The number behind a name at the start of a line."""
    for line in read(root, path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None


def _size(count: int) -> str:
    """A number of bytes as ``64.0 GiB``, or below one GiB as ``512 MiB``."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
