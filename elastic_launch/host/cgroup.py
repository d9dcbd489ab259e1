"""Layer 2: whether the kernel's OOM killer has been at work here, by its own counters.

Reads a few small files of /proc and /sys/fs/cgroup. It tells that a process was killed for memory, not which one.
"""

from __future__ import annotations

import os

_HOST = "proc/vmstat"


class OomCounter:
    """How many processes the OOM killer has ended since this object was made: of this cgroup, or else of the host.

    A process counts for the cgroup that it is in, whichever memory ran out: that of its cgroup, of one above, or of the
    host. So cgroups above are not asked: they would tell of neighbours, too. The counter is ahead of the signal: when a
    worker is seen to be dead, its kill has been counted. In cgroups of version 1 a worker that has moved to a cgroup
    below its launcher's does not count.
    """

    def __init__(self, root: str = "/") -> None:
        """Remember the counter as it is.

        Where nothing can be read, nothing counts. ``root`` is where ``proc`` and ``sys`` are.
        """
        self._root = root
        self._folders = _memory_cgroups(root)
        # A cgroup without the memory controller is part of the next one above that has it.
        files = [f"{folder}/{name}" for folder in self._folders for name in ("memory.events", "memory.oom_control")]
        self._file, self._before = "", 0
        for file in [*files, _HOST]:
            count = _field(root, file, "oom_kill")  # version 1 has it since Linux 4.13
            if count is not None:
                self._file, self._before = file, count
                break

    def killed(self) -> int:
        """The number of processes since; 0 where it is not known."""
        return max(0, (_field(self._root, self._file, "oom_kill") or 0) - self._before) if self._file else 0

    def describe(self) -> str:
        """One line for the report on a worker that SIGKILL has ended; empty where the OOM killer was not at work."""
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


def _memory_cgroups(root: str) -> list[str]:
    """The folders of the cgroup that this process's memory belongs to, and of those above it, the nearest first.

    Not all of them need be there: in a container the path may be the host's, or lead out of what can be seen from
    here (``/../..``), and then the mount itself is the cgroup.
    """
    folders = []
    for line in _read(root, "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = "sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup"
        parts = [part for part in path.split("/") if part]
        folders += ["/".join([mount, *parts[:depth]]) for depth in range(len(parts), -1, -1)]
    return folders


def _limits(root: str, folder: str) -> list[int]:
    """The memory limit of a cgroup, in bytes, if it has one."""
    texts = [_read(root, f"{folder}/{name}").strip() for name in ("memory.max", "memory.limit_in_bytes")]
    return [int(text) for text in texts if text.isdecimal() and int(text) < 1 << 60]  # version 1 has no word for none


def _field(root: str, path: str, name: str) -> int | None:
    """The number after a name at the start of a line."""
    for line in _read(root, path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None


def _size(count: int) -> str:
    """``64.0 GiB``; ``512 MiB`` where it is less than one."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"


def _read(root: str, path: str) -> str:
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""
