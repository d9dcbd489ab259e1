"""The kernel's view of a process, from /proc: for a worker that cannot say itself where it stands.

It may be stopped, in the kernel, in a long C call, or no Python at all. Everything here is read as far as this user
may; the process does not notice. State, system call and ``wchan`` are those of its main thread.
"""

from __future__ import annotations

import os

from elastic_launch.core.progress.stacks import KernelView

_MAX_COMMAND = 200
"""Characters of a command line that are kept."""
_TICKS = os.sysconf("SC_CLK_TCK")
"""Units of the CPU times in /proc/PID/stat, per second."""

_BY_MACHINE = {
    "x86_64": {
        0: "read",
        1: "write",
        7: "poll",
        16: "ioctl",
        23: "select",
        24: "sched_yield",
        35: "nanosleep",
        42: "connect",
        43: "accept",
        45: "recvfrom",
        47: "recvmsg",
        61: "wait4",
        72: "fcntl",
        73: "flock",
        74: "fsync",
        202: "futex",
        230: "clock_nanosleep",
        232: "epoll_wait",
        247: "waitid",
        257: "openat",
        270: "pselect6",
        271: "ppoll",
        281: "epoll_pwait",
        288: "accept4",
    },
    "aarch64": {
        22: "epoll_pwait",
        25: "fcntl",
        29: "ioctl",
        32: "flock",
        56: "openat",
        63: "read",
        64: "write",
        72: "pselect6",
        73: "ppoll",
        82: "fsync",
        95: "waitid",
        98: "futex",
        101: "nanosleep",
        115: "clock_nanosleep",
        124: "sched_yield",
        202: "accept",
        203: "connect",
        207: "recvfrom",
        212: "recvmsg",
        242: "accept4",
        260: "wait4",
    },
}
"""Names of the system calls in which workers are found, by number, for each kind of CPU."""
_SYSCALLS = _BY_MACHINE.get(os.uname().machine, {})


def kernel_view(pid: int) -> KernelView | None:
    """Return what the kernel tells of a process; None if it is gone. Fields that this user may not read are empty."""
    stat = _read(pid, "stat")
    # The name is in parentheses, and may contain some itself.
    head, _, tail = stat.rpartition(")")
    fields = tail.split()
    if len(fields) < 13:
        return None
    name = head.partition("(")[2]
    call, *arguments = _read(pid, "syscall").split() or [""]
    # "running" if it is in none, "-1" if it sleeps in none, such as in a page fault.
    syscall = _SYSCALLS.get(int(call), call) if call.isdecimal() else ""
    wchan = _read(pid, "wchan").strip()
    command = _read(pid, "cmdline").replace("\0", " ").strip()
    transfers = _fields(_read(pid, "io"))
    return KernelView(
        state=fields[0],
        wchan="" if wchan == "0" else wchan,
        syscall=syscall,
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS,
        io_bytes=transfers.get("rchar", 0) + transfers.get("wchar", 0),
        tracer_pid=_fields(_read(pid, "status")).get("TracerPid", 0),
        reads_stdin=_reads_stdin(syscall, arguments),
        command=command[:_MAX_COMMAND] or name,
        name=name,
    )


def python_children(pid: int, limit: int) -> list[int]:
    """Return the pids of the Python processes below one, nearest first.

    Args:
        pid: the process to start from; it is not among the results itself.
        limit: maximum number of results.
    """
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            parent = _read(int(name), "stat").rpartition(")")[2].split()[1:2]
            if parent:
                children.setdefault(int(parent[0]), []).append(int(name))
    below = [pid]
    for parent_pid in below:
        below += sorted(children.get(parent_pid, ()))
    found: list[int] = []
    for child in below[1:]:
        if len(found) < limit and _is_python(child):
            found.append(child)
    return found


def _is_python(pid: int) -> bool:
    try:
        return "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False  # it has ended, or belongs to another user


def _reads_stdin(syscall: str, arguments: list[str]) -> bool:
    """Return whether a system call waits for descriptor 0, as Python's ``input`` does, with or without readline."""
    first = int(arguments[0], 16) if arguments else -1
    # select's first argument is the greatest descriptor plus 1.
    return (syscall == "read" and first == 0) or (syscall in ("select", "pselect6") and first == 1)


def _read(pid: int, name: str) -> str:
    """Return the text of a file in /proc/PID; empty if it cannot be read."""
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _fields(text: str) -> dict[str, int]:
    """Return the numbers behind names in lines such as ``TracerPid:\t0``."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: int(value) for name, _, value in pairs if value.strip().isdecimal()}
